"""A TCP server of whole messages: a hello with a token, then every request is answered in turn; many clients, bounded in every way."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .connection import HELLO_LIMITS, Connection, check_hello, check_token, failure
from .errors import UserError
from .wire import Limits, WireError

HELLO_S = 10.0


@dataclass(slots=True, kw_only=True)
class MessageServerConfig:
    """Where to listen, and for how long to wait. ``port`` 0: a free one. ``clients``: connections at the same time. ``batch``: samples
    computed together (0: what the model allows); ``pad``: always exactly so many. ``wait_s``: how long a
    request may wait for company. ``message_s``: a message must be complete after so long; a client may be silent for ever. ``grace_s``: for
    what is computed when the server ends."""

    host: str = "127.0.0.1"
    port: int = 0
    token: str = ""
    clients: int = 64
    batch: int = 0
    pad: bool = False
    wait_s: float = 0.005
    message_s: float = 60.0
    grace_s: float = 10.0

    def check(self) -> None:
        """``UserError`` for a host that needs a token, and for numbers out of range."""
        check_token(self.host, self.token)
        if not 0 <= self.port <= 65535:
            raise UserError("port", got=self.port, wanted="0 to 65535", fix="port=0 takes a free one")
        for name, low in (("clients", 1), ("batch", 0)):
            if getattr(self, name) < low:
                raise UserError(name, got=getattr(self, name), wanted=f"at least {low}", fix=f"{name}={low}")
        if not 0 <= self.grace_s <= 3600:
            raise UserError("grace_s", got=self.grace_s, wanted="0 to 3600 seconds", fix="grace_s=10")


class MessageServer(ABC):
    """Listens after ``open``; ``run`` serves until ``stop``. A class below says what is served.

    A client says hello and gets ``welcome``; then every message is answered in turn. What is wrong with one client's request is that
    client's error; a message that is too large or damaged ends its connection and no other.
    """

    #: What clients ask for in their hello, and how large requests and answers may be.
    service: str
    request_limits: Limits
    answer_limits: Limits

    def __init__(self, config: MessageServerConfig) -> None:
        config.check()
        self.config = config
        self._places = threading.BoundedSemaphore(config.clients)
        self._stopped = threading.Event()
        self._connections: set[Connection] = set()
        self._answering = 0
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None

    @abstractmethod
    def welcome(self) -> dict[str, Any]:
        """What a client is told, with ``ok``."""

    @abstractmethod
    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """The fields of an answer; whatever it raises is sent in its place."""

    @abstractmethod
    def finish(self, timeout_s: float) -> bool:
        """Refuse what waits and end what is computed, for which this waits. Whether it is over."""

    def open(self) -> int:
        """Listen; returns the port. ``UserError`` when the address cannot be had."""
        config = self.config
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        try:
            self._listener = socket.create_server((config.host, config.port), family=family)
        except OSError as error:
            got = f"{config.host}:{config.port} ({error.strerror or error})"
            fix = "port=0 takes a free port; host=127.0.0.1 is always there"
            raise UserError("port", got=got, wanted="a free port of an address of this machine", fix=fix) from error
        threading.Thread(target=self._accept, daemon=True, name="accept").start()
        return int(self._listener.getsockname()[1])

    def run(self) -> bool:
        """Wait until ``stop``; then everything is closed. Whether what was computed had an end (see ``close``)."""
        # In short waits, because a signal handler only runs between them.
        while not self._stopped.wait(0.5):
            pass
        return self.close()

    def stop(self) -> None:
        """End ``run``. Safe in a signal handler and from any thread."""
        self._stopped.set()

    def close(self) -> bool:
        """Refuse what comes and what waits; what is computed may take ``grace_s`` to end and be answered, then nobody waits for it
        any more: False. Its thread computes on, so that whoever wants to end the process has to do so (``os._exit``)."""
        self._stopped.set()
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        deadline = time.monotonic() + self.config.grace_s
        ended = self.finish(self.config.grace_s)
        while ended and self._answering and time.monotonic() < deadline:
            time.sleep(0.01)  # what was computed is on its way
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.socket.shutdown(socket.SHUT_RDWR)
        return ended

    def _accept(self) -> None:
        assert self._listener is not None
        while not self._stopped.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError:
                if self._stopped.is_set():
                    return
                time.sleep(0.1)  # a client that went away again, or no handle left for it
                continue
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that went away gives its place back
            connection = Connection(sock, peer=f"{address[0]}:{address[1]}", limits=self.answer_limits)
            if not self._places.acquire(blocking=False):
                got, fix = f"more than {self.config.clients} clients", "start the server with a larger clients="
                _refuse(connection, UserError("connection", got=got, wanted="a free place", fix=fix), wait_s=1.0)
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True, name="client").start()

    def _serve(self, connection: Connection) -> None:
        with self._lock:
            self._connections.add(connection)
        try:
            said = connection.receive(idle_s=HELLO_S, timeout_s=HELLO_S, limits=HELLO_LIMITS)
            check_hello(said, self.service, self.config.token)
            connection.send(self.welcome(), timeout_s=self.config.message_s)
            while not self._stopped.is_set():
                message = connection.receive(timeout_s=self.config.message_s, limits=self.request_limits)
                with self._under_way():
                    answer = self._answer(message)
                    try:
                        connection.send(answer, timeout_s=self.config.message_s)
                    except WireError as error:  # the answer does not fit a message
                        connection.send(failure(error), timeout_s=self.config.message_s)
        except UserError as error:  # a wrong hello, or a message after which the stream is out of step
            _refuse(connection, error, wait_s=HELLO_S)
            _drain(connection)
        except OSError:
            pass  # the client is gone
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()
            self._places.release()

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[None]:
        with self._lock:
            self._answering += 1
        try:
            yield
        finally:
            with self._lock:
                self._answering -= 1

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"ok": True, **self.answer(message)}
        except BaseException as error:  # also SystemExit of a model: its client is told
            return failure(error, details=traceback.format_exc(limit=12))


def _refuse(connection: Connection, error: UserError, *, wait_s: float) -> None:
    with contextlib.suppress(OSError, WireError):
        connection.send(failure(error), timeout_s=wait_s)


def _drain(connection: Connection) -> None:
    """Read what is still on its way, for a moment: a socket closed with unread bytes makes the peer drop the error it was sent."""
    with contextlib.suppress(OSError):
        connection.socket.shutdown(socket.SHUT_WR)
        connection.socket.settimeout(0.5)
        until = time.monotonic() + 2.0
        while time.monotonic() < until and connection.socket.recv(2**18):
            pass
