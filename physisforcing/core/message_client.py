"""The client's side of a message server: one connection, made again when it breaks, and answers or errors as they were."""

from __future__ import annotations

import socket
import threading
import time
from abc import ABC, abstractmethod
from typing import Any, Self

from .connection import Connection, PeerClosedError, hello, raise_failure
from .errors import ServerLostError, UserError
from .wire import Limits, WireError


class _ConnectionLostError(ServerLostError):
    """The connection broke; the server may be there again already."""


def parse_address(text: str, *, field: str) -> tuple[str, int]:
    """``HOST:PORT`` -> (host, port); ``UserError`` for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise UserError(field, got=text, wanted="HOST:PORT", fix=f"for instance {field}=127.0.0.1:7000")
    return host.strip("[]"), int(port)


class MessageClient(ABC):
    """A connection to a ``MessageServer`` at ``address`` (HOST:PORT).

    ``ask`` raises what the other side raised: ``UserError`` and ``MissingCapabilityError`` as they were, anything else as
    ``RemoteFailureError``. A connection that breaks is made once more, for which a server has ``connect_s`` seconds, and the message,
    which changes nothing on the other side, is sent again. ``ServerLostError`` when that fails or breaks too, and when there is no
    answer in ``reply_s`` seconds. Safe in several threads, one message at a time. ``what`` is the server's name in errors, ``field`` the setting
    that says its address.
    """

    service: str
    request_limits: Limits
    answer_limits: Limits
    what: str
    field: str

    def __init__(self, address: str, *, token: str = "", connect_s: float = 10.0, reply_s: float = 600.0) -> None:
        self.address, self._token = address, token
        self._place, self.connect_s, self.reply_s = parse_address(address, field=self.field), connect_s, reply_s
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._identity = self._connect()

    @abstractmethod
    def met(self, welcome: dict[str, Any]) -> str:
        """Read what the server says of itself; returns what must be the same when it is met again."""

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to one message."""
        with self._lock:
            try:
                answer = self._exchange(message)
            except _ConnectionLostError:
                answer = self._exchange(message)
        raise_failure(answer, peer=self.address)
        return answer

    def lost(self, why: str) -> ServerLostError:
        """The error of an answer that makes no sense; the connection is closed."""
        return self._loss(why)

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to one message. ``_ConnectionLostError`` where another try may help, ``ServerLostError`` after silence."""
        connection = self._connection or self._reconnect()
        try:
            connection.send(message)
        except WireError:
            raise  # too large: nothing was sent
        except OSError as error:
            # The server may have said why before it closed.
            raise self._last_word(connection, f"while sending: {error}") from error
        try:
            return connection.receive(idle_s=self.reply_s, limits=self.answer_limits)
        except TimeoutError as error:
            raise self._loss(f"no answer in {self.reply_s:g} s") from error
        except (OSError, WireError) as error:
            raise self._loss(str(error), _ConnectionLostError) from error

    def _last_word(self, connection: Connection, why: str) -> Exception:
        try:
            answer = connection.receive(idle_s=1.0, timeout_s=1.0)
            self.close()
            raise_failure(answer, peer=self.address)
        except UserError as error:
            return error
        except OSError:
            pass
        return self._loss(why, _ConnectionLostError)

    def _loss(self, why: str, kind: type[ServerLostError] = ServerLostError) -> ServerLostError:
        self.close()
        return kind(f"{self.what} at {self.address}: {why}")

    def _reconnect(self) -> Connection:
        """``UserError`` where another server answers now."""
        identity = self._connect()
        if identity != self._identity:
            self.close()
            wanted = f"{self._identity}, as before"
            raise UserError(self.field, got=identity, wanted=wanted, fix="start the evaluation again")
        assert self._connection is not None
        return self._connection

    def _connect(self) -> str:
        """Connect and introduce ourselves; tries again for ``connect_s`` seconds while nobody listens."""
        deadline = time.monotonic() + self.connect_s
        while True:
            try:
                sock = socket.create_connection(self._place, timeout=max(0.1, deadline - time.monotonic()))
                connection = Connection(sock, peer=self.address, limits=self.request_limits)
                try:
                    connection.send(hello(self.service, self._token))
                    answer = connection.receive(idle_s=max(1.0, deadline - time.monotonic()), limits=self.answer_limits)
                    raise_failure(answer, peer=self.address)
                    identity = self.met(answer)
                except BaseException:
                    connection.close()
                    raise
                self._connection = connection
                return identity
            except WireError as error:
                raise ServerLostError(f"what answers at {self.address} is no {self.what}: {error}") from error
            except (PeerClosedError, OSError) as error:
                if time.monotonic() + 0.25 >= deadline:
                    raise ServerLostError(f"no {self.what} at {self.address}: {error}") from error
                time.sleep(0.25)
