"""Typed errors of the world-model service: a code, its HTTP status, and whether trying again can help."""

from __future__ import annotations

import json
from typing import Any

#: code -> (HTTP status, retryable). The v1 contract's table, and three of ours: ``NOT_FOUND``, ``METHOD_NOT_ALLOWED`` and
#: ``MISSING_CAPABILITY`` (what was asked for is valid, but no model of this kind can do it; ``needs`` names what it lacks).
CODES: dict[str, tuple[int, bool]] = {
    "INVALID_ARGUMENT": (400, False),
    "UNAUTHENTICATED": (401, False),
    "PERMISSION_DENIED": (403, False),
    "NOT_FOUND": (404, False),
    "METHOD_NOT_ALLOWED": (405, False),
    "REQUEST_ID_CONFLICT": (409, False),
    "PAYLOAD_TOO_LARGE": (413, False),
    "UNSUPPORTED_VERSION": (422, False),
    "MISSING_CAPABILITY": (422, False),
    "OVERLOADED": (429, True),
    "INTERNAL": (500, True),
    "NOT_READY": (503, True),
    "DEADLINE_EXCEEDED": (504, True),
}
_LONGEST_MESSAGE = 500


class ServiceFault(Exception):
    """An answer other than 200. ``message`` may name fields of the request, never a path, a host or a value of this machine."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        request_id: str | None = None,
        needs: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.message = code, message[:_LONGEST_MESSAGE]
        self.status, self.retryable = CODES[code]
        self.request_id, self.needs, self.retry_after_s = request_id, needs, retry_after_s

    def body(self) -> bytes:
        """The JSON document ``{"error": {...}}``."""
        error: dict[str, Any] = {
            "code": self.code,
            "message": self.message,
            "request_id": self.request_id,
            "retryable": self.retryable,
        }
        if self.needs is not None:
            error["needs"] = self.needs
        return json.dumps({"error": error}).encode()

    def headers(self) -> dict[str, str]:
        """Headers that belong to this error."""
        headers = {"content-type": "application/json"}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def invalid(message: str) -> ServiceFault:
    """``INVALID_ARGUMENT``: the request says something wrong; ``message`` begins with the field."""
    return ServiceFault("INVALID_ARGUMENT", message)
