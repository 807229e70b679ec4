"""A holder that renders one picture with ComfyUI under a lease: python examples/imagen.py workflow.json

The workflow is what ComfyUI saves with "Save (API Format)". Everything goes directly to ComfyUI; the broker is only
asked for the GPU.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import requests

from gpumgr.client import Gpu, HeldLease, LeaseLost
from gpumgr.errors import GpumgrError


def render(lease: HeldLease, workflow: object) -> dict[str, object]:
    """Raises: LeaseLost, requests.RequestException."""
    answer = requests.post(f"{lease.url}/prompt", json={"prompt": workflow}, timeout=10)
    answer.raise_for_status()
    prompt_id = answer.json()["prompt_id"]  # /prompt answers at once; the work has only been queued
    while True:
        lease.check()
        history: dict[str, dict[str, object]] = requests.get(f"{lease.url}/history/{prompt_id}", timeout=10).json()
        if prompt_id in history:
            return history[prompt_id]
        time.sleep(1)


def main() -> int:
    workflow = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        with Gpu().lease("image", holder="imagen", wait_seconds=300) as lease:
            print(json.dumps(render(lease, workflow), indent=2))
    except (GpumgrError, LeaseLost) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
