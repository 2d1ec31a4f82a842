"""One HTTP exchange with a deadline for the whole of it, standard library only. Follows no redirect and uses no proxy."""

from __future__ import annotations

import http.client
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from physisforcing.core.errors import UserError


@dataclass(slots=True, kw_only=True, frozen=True)
class Reply:
    """``headers``: names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class NoReplyError(ConnectionError):
    """No whole answer came: refused, cut, or nothing in time (then ``timed_out``)."""

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class TooLargeError(NoReplyError):
    """The answer is larger than the caller reads; asked again it would be no smaller."""


@dataclass(slots=True, kw_only=True, frozen=True)
class Address:
    """Where a service is. ``prefix``: path before ``/v1``."""

    scheme: str
    host: str
    port: int
    prefix: str = ""

    @classmethod
    def of(cls, url: str) -> Address:
        """``UserError`` for anything but ``http(s)://host[:port][/prefix]``."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            fix = "http://127.0.0.1:8080 for a server that `physis serve worldmodel port=8080` started"
            raise UserError("url", got=url, wanted="http(s)://host[:port]", fix=fix)
        return cls(
            scheme=parts.scheme,
            host=parts.hostname,
            port=port or (443 if parts.scheme == "https" else 80),
            prefix=parts.path.rstrip("/"),
        )

    @property
    def keeps_secrets(self) -> bool:
        """Whether nobody between here and there reads what is sent: https, or this machine."""
        if self.scheme == "https" or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def connect(self, timeout_s: float) -> http.client.HTTPConnection:
        if self.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self.host, self.port, timeout=timeout_s, context=context)
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)


def token_for(address: Address, token: str | None, variable: str) -> str:
    """The token to send: the one that was given for this server, else that of the environment variable.

    ``UserError`` where the variable's would travel in the open: it was set for another server perhaps, and anyone on the way reads it.
    """
    if token is not None:
        return token
    secret = os.environ.get(variable, "")
    if secret and not address.keeps_secrets:
        raise UserError(
            "url",
            got=f"http to {address.host} while {variable} is set",
            wanted="https, or this machine, where that token is sent",
            fix="use https or an SSH tunnel, give the token for this server itself (token=..., --token; empty for none),"
            f" or unset {variable}",
        )
    return secret


def exchange(
    address: Address,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    timeout_s: float,
    connect_s: float = 5.0,
    most_bytes: int = 2**30,
) -> Reply:
    """Send a request and read the whole answer within ``timeout_s``. ``NoReplyError`` where that fails, ``TooLargeError`` for an
    answer above ``most_bytes``.

    A server may answer and close before it has read the body: what it said is read then, too.
    """
    deadline = time.monotonic() + timeout_s
    connection = address.connect(min(connect_s, timeout_s))
    # A timeout of the socket starts again with every byte: headers that drip in would never end.
    watch = threading.Timer(timeout_s, _cut, [connection])
    watch.daemon = True
    watch.start()
    try:
        connection.connect()
        assert connection.sock is not None
        connection.sock.settimeout(_left(deadline))
        try:
            connection.request(method, address.prefix + path, body, dict(headers or {}))
        except (BrokenPipeError, ConnectionResetError):
            if body is None:
                raise  # else the server may have answered before it had read everything
        return _answer(connection, deadline, most_bytes)
    except TooLargeError:
        raise  # an OSError itself
    except TimeoutError as error:
        raise NoReplyError(f"{address.host}:{address.port} did not answer in time", timed_out=True) from error
    except (OSError, http.client.HTTPException) as error:
        late = time.monotonic() >= deadline
        what = "did not answer in time" if late else str(error) or type(error).__name__
        raise NoReplyError(f"{address.host}:{address.port}: {what}", timed_out=late) from error
    finally:
        watch.cancel()
        connection.close()


def _cut(connection: http.client.HTTPConnection) -> None:
    """End whatever the connection waits for."""
    if isinstance(connection.sock, socket.socket):
        try:
            # Not ssl's own shutdown, which takes the cipher away while the other thread reads.
            socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)
        except OSError:
            pass  # it was over already


def _answer(connection: http.client.HTTPConnection, deadline: float, most_bytes: int) -> Reply:
    sock = connection.sock
    sock.settimeout(_left(deadline))
    response = connection.getresponse()
    parts, size = [], 0
    while not response.isclosed():  # Python 3.13 closes it with the last byte, and the socket with it
        sock.settimeout(_left(deadline))
        part = response.read1(2**18)
        if not part:
            break
        parts.append(part)
        size += len(part)
        if size > most_bytes:
            raise TooLargeError(f"the answer is larger than {most_bytes} bytes")
    if response.length:  # announced bytes that never came
        raise NoReplyError(f"the answer was cut off, {response.length} bytes are missing")
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Reply(status=response.status, headers=headers, body=b"".join(parts))


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
