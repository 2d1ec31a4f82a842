"""Whole messages over a socket: deadlines, the versioned hello, and errors that arrive as what they were.

Every request is answered by ``{"ok": True, ...}`` or ``{"ok": False, "error": {...}}``. An error keeps its kind, and a
``UserError`` its field, got, wanted and fix, so that it reads the same on both sides.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
import time
from typing import Any

from .errors import DatasetError, MissingCapabilityError, UnstableSceneError, UserError, VulkanUnavailableError
from .wire import HEADER, Limits, WireError, body_size, decode_body, encode, truncated

#: Raised by one when a message changes its meaning; both sides compare it in the hello.
PROTOCOL = 1
#: Where servers and their clients read the token, unless it is given.
TOKEN_VARIABLE = "PHYSIS_TOKEN"
SHORTEST_TOKEN = 16
#: Before the hello is accepted, nothing longer than this is read.
HELLO_LIMITS = Limits(message_bytes=4096, array_bytes=0, arrays=0, depth=3, values=32, string_bytes=1024)
_USER_ERRORS = {kind.__name__: kind for kind in (UserError, MissingCapabilityError, DatasetError, WireError)}
_MESSAGE_ERRORS: dict[str, type[Exception]] = {
    "UnstableSceneError": UnstableSceneError,
    "VulkanUnavailableError": VulkanUnavailableError,
}
_LONGEST_TEXT = 8000


class PeerClosedError(ConnectionError):
    """The other side closed the connection between two messages."""


class RemoteFailureError(RuntimeError):
    """The other side failed in a way that is no user's mistake; the text holds its traceback."""


class Connection:
    """``peer`` names the other side in errors."""

    def __init__(self, sock: socket.socket, *, peer: str, limits: Limits | None = None) -> None:
        self.socket, self.peer, self.limits = sock, peer, limits or Limits()
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: dict[str, Any], *, timeout_s: float = 60.0) -> None:
        """Raise ``WireError`` before anything is sent, ``TimeoutError`` or ``OSError`` while sending."""
        frame = encode(message, self.limits)
        self.socket.settimeout(timeout_s)
        self.socket.sendall(frame)

    def receive(
        self, *, idle_s: float | None = None, timeout_s: float = 60.0, limits: Limits | None = None
    ) -> dict[str, Any]:
        """The next message. Waits ``idle_s`` for it to begin (None: for ever), then ``timeout_s`` for it to end.

        ``TimeoutError`` when either runs out, ``PeerClosedError`` when the peer has closed, ``WireError`` for a frame that is
        cut off, too large or damaged: the stream is then out of step and the connection is of no more use.
        """
        limits = limits or self.limits
        self.socket.settimeout(idle_s)
        first = self.socket.recv(1)
        if not first:
            raise PeerClosedError(f"{self.peer} closed the connection")
        deadline = time.monotonic() + timeout_s
        header = self._read(first, HEADER.size, deadline)
        return decode_body(self._read(b"", body_size(header, limits), deadline), limits)

    def _read(self, begun: bytes, size: int, deadline: float) -> bytes:
        parts = bytearray(begun)
        while len(parts) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{self.peer} sent {len(parts)} of {size} bytes in time")
            self.socket.settimeout(left)
            part = self.socket.recv(min(size - len(parts), 2**18))  # what was announced is not allocated until it comes
            if not part:
                raise truncated(len(parts), size)
            parts += part
        return bytes(parts)

    def close(self) -> None:
        self.socket.close()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: whoever resolves it may reach it


def check_token(host: str, token: str) -> None:
    """``UserError`` for a server that others reach without a token worth the name."""
    if not is_loopback(host) and len(token) < SHORTEST_TOKEN:
        raise UserError(
            "token",
            got=f"{len(token)} characters for host {host}, which others reach",
            wanted=f"at least {SHORTEST_TOKEN} characters",
            fix=f"set {TOKEN_VARIABLE} to a long random text on both sides, or keep host=127.0.0.1 and use an SSH tunnel",
        )


def hello(service: str, token: str) -> dict[str, Any]:
    """A client's first message."""
    return {"hello": service, "protocol": PROTOCOL, "token": token}


def check_hello(message: dict[str, Any], service: str, token: str) -> None:
    """``UserError`` unless the hello asks for ``service`` in this protocol with the right token.

    The token is compared in constant time, and before anything else, so that a stranger learns nothing.
    """
    given = message.get("token")
    given = given if isinstance(given, str) else ""
    if not hmac.compare_digest(given.encode(), token.encode()):
        raise UserError(
            "token",
            got="another one" if given else "none",
            wanted="the token that the server was started with",
            fix="pass token=... (or set PHYSIS_TOKEN) on this side",
        )
    for field, wanted, fix in (
        ("hello", service, "connect to a server of this kind"),
        ("protocol", PROTOCOL, "install the same version of physisforcing on both sides"),
    ):
        if message.get(field) != wanted:
            raise UserError(field, got=message.get(field), wanted=repr(wanted), fix=fix)


def failure(error: BaseException, *, details: str = "") -> dict[str, Any]:
    """The answer that carries ``error``; ``details`` (a traceback) travels only with errors that are no user's."""
    known = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _USER_ERRORS), None)
    if known is not None:
        assert isinstance(error, UserError)
        got = error.got if isinstance(error.got, None | bool | int | float | str) else None
        texts = {"field": error.field, "wanted": error.wanted, "fix": error.fix, "got_text": repr(error.got)}
        fields: dict[str, Any] = {name: str(text)[:_LONGEST_TEXT] for name, text in texts.items()}
        if repr(got) == fields["got_text"] and not (type(got) is int and got.bit_length() > 63):
            fields["got"] = got
        return {"ok": False, "error": {"kind": known, **fields}}
    kind = next((k.__name__ for k in type(error).__mro__ if k.__name__ in _MESSAGE_ERRORS), type(error).__name__)
    return {"ok": False, "error": {"kind": kind, "message": str(error)[:_LONGEST_TEXT], "details": details[-8000:]}}


def raise_failure(answer: dict[str, Any], *, peer: str) -> None:
    """Raise the error of an answer; nothing when it is ``{"ok": True, ...}``."""
    if answer.get("ok") is True:
        return
    error = answer.get("error")
    if not isinstance(error, dict) or not isinstance(error.get("kind"), str):
        raise WireError("answer", got=sorted(answer), wanted="'ok' or an error", fix=f"check what runs at {peer}")
    kind = error["kind"]
    if kind in _USER_ERRORS:
        got = error["got"] if "got" in error else _Verbatim(str(error.get("got_text")))
        raise _USER_ERRORS[kind](
            str(error.get("field")), got=got, wanted=str(error.get("wanted")), fix=str(error.get("fix"))
        )
    if kind in _MESSAGE_ERRORS:
        raise _MESSAGE_ERRORS[kind](str(error.get("message")))
    text = f"{kind} at {peer}: {error.get('message')}"
    raise RemoteFailureError("\n".join(filter(None, [text, str(error.get("details", ""))])))


class _Verbatim:
    """Stands for a value that did not travel and prints as it did."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text
