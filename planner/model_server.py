"""One world model in one process for many simulators: a TCP server that merges what its clients ask for into common rollouts."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from physisforcing.core.connection import HELLO_LIMITS, Connection, check_hello, check_token, failure
from physisforcing.core.errors import UserError
from physisforcing.core.protocols import WorldModel
from physisforcing.core.wire import WireError

from .batching import Batcher
from .model_messages import ANSWER_LIMITS, REQUEST_LIMITS, SERVICE, pack_rollout, pack_spec, unpack_request

HELLO_S = 10.0


@dataclass(slots=True, kw_only=True)
class ModelServerConfig:
    """Where to listen, and for how long to wait. ``port`` 0: a free one. ``clients``: connections at the same time. ``batch``: samples
    computed together (0: what the model's spec allows); ``pad``: always exactly so many, see ``Batcher``. ``wait_s``: how long a
    request may wait for company. ``message_s``: a message must be complete after so long; a client may be silent for ever. ``grace_s``: for
    the rollout under way when the server ends."""

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


class ModelServer:
    """Listens after ``open``; ``run`` serves until ``stop``. ``about``: what else clients are told of the model (plain values).

    A client says hello and gets spec and ``about``; then every ``rollout`` is answered in turn. What is wrong with one client's
    request is that client's error; a message that is too large or damaged ends its connection and no other.
    """

    def __init__(
        self, world_model: WorldModel, config: ModelServerConfig | None = None, *, about: dict[str, Any] | None = None
    ) -> None:
        self.config = config or ModelServerConfig()
        self.config.check()
        batch = self.config.batch or None
        self.batcher = Batcher(
            world_model,
            max_batch=batch,
            wait_s=self.config.wait_s,
            pad=self.config.pad,
            max_waiting=self.config.clients,
        )
        said = dict(about or {}) | {"batch": self.batcher.max_batch, "pad": self.config.pad}
        self._welcome: dict[str, Any] = {"ok": True, "spec": pack_spec(world_model.spec), "about": said}
        self._places = threading.BoundedSemaphore(self.config.clients)
        self._stopped = threading.Event()
        self._connections: set[Connection] = set()
        self._answering = 0
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None

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
        """Wait until ``stop``; then everything is closed. Whether the rollout under way had an end (see ``close``)."""
        # In short waits, because a signal handler only runs between them.
        while not self._stopped.wait(0.5):
            pass
        return self.close()

    def stop(self) -> None:
        """End ``run``. Safe in a signal handler and from any thread."""
        self._stopped.set()

    def close(self) -> bool:
        """Refuse what comes and what waits; the rollout under way may take ``grace_s`` to end and be answered, then nobody waits for it
        any more: False. Its thread computes on, so that whoever wants to end the process has to do so (``os._exit``)."""
        self._stopped.set()
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        deadline = time.monotonic() + self.config.grace_s
        ended = self.batcher.close(self.config.grace_s)
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
            connection = Connection(sock, peer=f"{address[0]}:{address[1]}", limits=ANSWER_LIMITS)
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
            check_hello(said, SERVICE, self.config.token)
            connection.send(self._welcome, timeout_s=self.config.message_s)
            while not self._stopped.is_set():
                message = connection.receive(timeout_s=self.config.message_s, limits=REQUEST_LIMITS)
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
            if message.get("op") != "rollout":
                raise WireError("op", got=message.get("op"), wanted="'rollout'", fix="use SocketWorldModel")
            rollout = self.batcher.rollout(unpack_request(message.get("request")))
            return {"ok": True, "rollout": pack_rollout(rollout)}
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
