"""A program that renders with ComfyUI and knows nothing of gpumgr: its base URL is all there is to change.

Owns: its cycle, as such programs have it: upload, prompt, poll the history, fetch the picture. Must not: take a lease,
or say anything to gpumgr.
"""

from __future__ import annotations

import time
from typing import Any

import requests

POLL_SECONDS = 0.05
RENDER_SECONDS = 120.0
PICTURE = b"\x89PNG a picture to begin with"


class RenderFailed(Exception):
    pass


class Imagen:
    """``base_url``: ComfyUI's own, or ``http://broker/v1/image``."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.http = requests.Session()

    def render(self) -> bytes:
        """The picture. Raises: RenderFailed, requests.RequestException."""
        uploaded = self._ok(self.http.post(f"{self.base_url}/upload/image", files={"image": ("in.png", PICTURE)}))
        graph = {
            "1": {"class_type": "LoadImage", "inputs": {"image": uploaded.json()["name"]}},
            "9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}},
        }
        queued = self._ok(self.http.post(f"{self.base_url}/prompt", json={"prompt": graph}, timeout=RENDER_SECONDS))
        image = self._image(queued.json()["prompt_id"])
        return self._ok(self.http.get(f"{self.base_url}/view", params=image)).content

    def _image(self, prompt_id: str) -> dict[str, str]:
        until = time.monotonic() + RENDER_SECONDS
        while time.monotonic() < until:
            entry = self._ok(self.http.get(f"{self.base_url}/history/{prompt_id}")).json().get(prompt_id)
            if entry is not None:
                return self._of(entry)
            time.sleep(POLL_SECONDS)
        raise RenderFailed(f"{prompt_id} is not done after {RENDER_SECONDS:g} s")

    def _of(self, entry: dict[str, Any]) -> dict[str, str]:
        if entry["status"]["status_str"] != "success":
            raise RenderFailed(str(entry["status"]["messages"][-1]))
        found: dict[str, str] = entry["outputs"]["9"]["images"][0]
        return found

    def _ok(self, answer: requests.Response) -> requests.Response:
        if answer.status_code != 200:
            raise RenderFailed(
                f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text[:300]}"
            )
        return answer
