"""A holder that renders with ComfyUI under a lease and saves the pictures.

    python examples/imagen.py workflow_api.json [http://127.0.0.1:8770]

The workflow is what ComfyUI saves with "Save (API Format)". Everything goes directly to ComfyUI; the broker is only
asked for the GPU.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import requests

from gpumgr.client import DEFAULT_URL, BrokerUnreachable, Gpu, HeldLease, LeaseLost
from gpumgr.errors import GpumgrError


def render(lease: HeldLease, workflow: object) -> list[dict[str, str]]:
    """The images it made, as ComfyUI names them. Raises: LeaseLost, requests.RequestException."""
    answer = requests.post(f"{lease.url}/prompt", json={"prompt": workflow}, timeout=10)
    answer.raise_for_status()
    prompt_id = answer.json()["prompt_id"]  # /prompt answers at once; the work has only been queued
    while True:
        lease.check()
        history: dict[str, Any] = requests.get(f"{lease.url}/history/{prompt_id}", timeout=10).json()
        if prompt_id in history:
            outputs = history[prompt_id]["outputs"].values()
            return [image for output in outputs for image in output.get("images", [])]
        time.sleep(1)


def save(lease: HeldLease, image: dict[str, str]) -> Path:
    answer = requests.get(f"{lease.url}/view", params=image, timeout=60)
    answer.raise_for_status()
    file = Path(Path(image["filename"]).name)
    file.write_bytes(answer.content)
    return file


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        workflow = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        with Gpu(*sys.argv[2:3] or [DEFAULT_URL]).lease("image", holder="imagen", wait_seconds=300) as lease:
            for image in render(lease, workflow):
                print(f"saved {save(lease, image)}")
    except (GpumgrError, LeaseLost, BrokerUnreachable, requests.RequestException, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
