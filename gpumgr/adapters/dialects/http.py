"""The generic dialect: health, unload, load and reports as the configuration writes them.

Owns: speaking HTTP to one consumer, and turning every failure into BackendError. The other dialects build on it
and bring their own calls; what the file says still wins. Must not: watch the card or decide anything.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import requests

from gpumgr.config import Call, ConsumerSettings, Report
from gpumgr.core.placement import Report as LoadedReport
from gpumgr.runtime.ports import BackendError

CONNECT_SECONDS = 2.0
REPORT_SECONDS = 2.0
LOAD_SECONDS = 60.0
LARGEST_ANSWER_BYTES = 4 * 2**20


class Http:
    """Each call is a connection of its own: one kept alive may be closed by the server just as we write on it, and
    an unload that fails for that reason would cost a second."""

    ask_again_seconds: float | None = 5.0
    health_default: ClassVar[Call] = Call(path=None)

    def __init__(self, settings: ConsumerSettings) -> None:
        self._settings = settings
        self._url = settings.url
        self.can_load = settings.load is not None
        self.load_starts_service = False

    @property
    def can_unload(self) -> bool:
        return self._settings.unload.path is not None

    def health(self) -> None:
        """Any answer below 400; without a configured path, any answer below 500 to ``/``."""
        call = self._settings.health
        path = call.path or self.health_default.path
        answer = self._send("GET", path or "/", timeout_seconds=call.timeout_seconds or REPORT_SECONDS)
        limit = 400 if path else 500
        if answer.status >= limit:
            raise BackendError("failed", f"{answer.asked} answers {answer.status}")

    def unload(self, within_seconds: float) -> None:
        self._call(self._settings.unload, within_seconds)

    def load(self) -> None:
        if self._settings.load is not None:
            self._call(self._settings.load, self._settings.load.timeout_seconds or LOAD_SECONDS)

    def loaded(self) -> LoadedReport | None:
        if self._settings.loaded is None:
            return None
        return LoadedReport(loaded=self._ask(self._settings.loaded))

    def busy(self) -> bool | None:
        return None if self._settings.busy is None else self._ask(self._settings.busy)

    # -- wire -----------------------------------------------------------------------------------------------

    def _call(self, call: Call, within_seconds: float) -> Answer:
        answer = self._send(call.method or "POST", call.path or "/", json=call.json, timeout_seconds=within_seconds)
        return answer.require()

    def _ask(self, report: Report) -> bool:
        """Whether the number, truth or length at the report's dotted path is above its limit."""
        value = self._json(report.path, timeout_seconds=report.timeout_seconds)
        for part in report.json.split("."):
            try:
                value = value[int(part)] if isinstance(value, list) else value[part]
            except (KeyError, IndexError, TypeError, ValueError):
                raise BackendError("failed", f"GET {report.path}: its answer has no {report.json!r}") from None
        if isinstance(value, list | dict | str):
            value = len(value)
        return float(value or 0) > report.above

    def _json(self, path: str, *, timeout_seconds: float) -> Any:
        return self._send("GET", path, timeout_seconds=timeout_seconds).require().json()

    def _send(self, method: str, path: str, *, json: Any = None, timeout_seconds: float) -> Answer:
        """One request, ended after ``timeout_seconds`` in all. Proxies of the environment are not for loopback,
        and a redirect would be an answer nobody configured."""
        until = time.monotonic() + timeout_seconds
        timeout = (min(CONNECT_SECONDS, timeout_seconds), timeout_seconds)
        asked = f"{method} {path}"
        try:
            with requests.Session() as session:
                session.trust_env = False
                with session.request(
                    method, self._url + path, json=json, timeout=timeout, allow_redirects=False, stream=True
                ) as response:
                    return Answer(asked, response.status_code, _body(response, until))
        except requests.ConnectTimeout:
            raise BackendError("unreachable", f"{self._url} did not take a connection") from None
        except requests.Timeout:
            raise BackendError("hung", f"{asked}: no answer within {timeout_seconds:g} s") from None
        except requests.ConnectionError:
            raise BackendError("unreachable", f"{self._url} cannot be reached") from None
        except requests.RequestException as error:
            raise BackendError("failed", f"{asked}: {type(error).__name__}") from None


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's whole answer. ``asked`` is for the error's sentence."""

    asked: str
    status: int
    body: bytes

    def require(self) -> Answer:
        """Raises: BackendError where the status says no."""
        if self.status >= 400:
            said = " ".join(self.body[:200].decode(errors="replace").split())
            raise BackendError("failed", f"{self.asked} answers {self.status} {said}".rstrip())
        return self

    def json(self) -> Any:
        """Raises: BackendError."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise BackendError("failed", f"{self.asked} answers something that is not JSON") from None


def _body(response: requests.Response, until: float) -> bytes:
    """The whole body, at most 4 MiB and not after ``until``: a server that trickles is a server that hangs."""
    parts, size = [], 0
    for part in response.iter_content(65536):
        parts.append(part)
        size += len(part)
        if size > LARGEST_ANSWER_BYTES:
            raise BackendError("failed", "its answer is larger than 4 MiB")
        if time.monotonic() > until:
            raise requests.ReadTimeout
    return b"".join(parts)
