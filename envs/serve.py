"""``physis serve env``: one RoboTwin environment for one client at a time, over TCP.

The simulator runs in the main thread. Others accept connections and check their hello, so that a second client, a stranger
or one who says nothing gets an answer, or is dropped, without disturbing the episode that runs.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from physisforcing.core.connection import HELLO_LIMITS, Connection, check_hello, check_token, failure
from physisforcing.core.errors import UserError, VulkanUnavailableError
from physisforcing.core.serving import serve_command, serve_for_parent
from physisforcing.core.wire import WireError

from .host import EnvHost, make_robotwin
from .remote import SERVICE

HELP = """Serve one RoboTwin environment over TCP, for physisforcing.envs.remote.RemoteEnv.

settings (field=value):
  task=NAME          port=0 (0: a free one, printed)   host=127.0.0.1
  token=SECRET       needed for a host that others reach; better in the variable PHYSIS_TOKEN, which other users do not see
  cameras=[head]     depth=false   body_ids=false   control=interpolated   shadows=directional   instruction=template
  assets=FOLDER      embodiment=NAME
  env.NAME=VALUE     any other option of RoboTwinEnv
  idle_s=600         a client that says nothing for so long is sent away
  message_s=60       a message must be complete after so long
  --json             the first and only line of the output is JSON with the port

examples:
  physis serve env task=click_bell port=5555
  PHYSIS_TOKEN=$(openssl rand -hex 16) physis serve env task=click_bell host=0.0.0.0 port=5555
  physis serve env task=click_bell cameras=[head,left_wrist] control=topp --json"""

HELLO_S = 10.0
#: Connections whose hello is being waited for at the same time; more are closed at once.
STRANGERS = 8


@dataclass(slots=True, kw_only=True)
class ServeConfig:
    """Settings of ``physis serve env``. None leaves an option of the environment at its default."""

    task: str
    host: str = "127.0.0.1"
    port: int = 0
    token: str = ""
    cameras: list[str] | None = None
    depth: bool | None = None
    body_ids: bool | None = None
    control: str | None = None
    shadows: str | None = None
    instruction: str | None = None
    assets: str | None = None
    embodiment: str | None = None
    env: dict[str, Any] = field(default_factory=dict)
    idle_s: float = 600.0
    message_s: float = 60.0

    def check(self) -> None:
        """``UserError`` for a host that needs a token, and for numbers out of range."""
        for name in ("idle_s", "message_s"):
            if not 0 < getattr(self, name) < 1e6:
                raise UserError(name, got=getattr(self, name), wanted="seconds above 0", fix=f"{name}=60")
        if not 0 <= self.port <= 65535:
            raise UserError("port", got=self.port, wanted="0 to 65535", fix="port=0 takes a free one")
        check_token(self.host, self.token)

    def options(self) -> dict[str, Any]:
        """What ``RoboTwinEnv`` gets besides the task."""
        names = ("cameras", "depth", "body_ids", "control", "shadows", "instruction", "assets", "embodiment")
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**chosen, **self.env}


class EnvServer:
    """Listens after ``open``; ``run`` serves clients one after the other until ``stop``."""

    def __init__(self, config: ServeConfig, make_env: Callable[[], Any] | None = None) -> None:
        config.check()
        self.config = config
        self._host = EnvHost(make_env or partial(make_robotwin, config.task, config.options()))
        self._waiting: queue.SimpleQueue[Connection | None] = queue.SimpleQueue()
        self._claim = threading.Lock()
        self._strangers = threading.BoundedSemaphore(STRANGERS)
        self._client: Connection | None = None
        self._busy = self._stopping = False
        self._listener: socket.socket | None = None

    def open(self) -> int:
        """Make the environment, then listen; returns the port. ``UserError`` when the address cannot be had."""
        self._host.open()
        config = self.config
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        try:
            self._listener = socket.create_server((config.host, config.port), family=family, backlog=STRANGERS)
        except OSError as error:
            got = f"{config.host}:{config.port} ({error.strerror or error})"
            fix = "port=0 takes a free port; host=127.0.0.1 is always there"
            raise UserError("port", got=got, wanted="a free port of an address of this machine", fix=fix) from error
        threading.Thread(target=self._accept, daemon=True, name="accept").start()
        return self._listener.getsockname()[1]

    def run(self) -> None:
        """Serve until ``stop``; then everything is closed."""
        try:
            while not self._stopping:
                connection = self._waiting.get()
                if connection is None:
                    break
                try:
                    self._session(connection)
                finally:
                    self._client = None
                    _part(connection)
                    self._host.close()
                    self._busy = False
        finally:
            self.close()

    def stop(self) -> None:
        """End ``run`` after the operation under way. Safe in a signal handler and from any thread."""
        self._stopping = True
        self._waiting.put(None)
        client = self._client
        if client is not None:
            with contextlib.suppress(OSError):
                client.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._stopping = True
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        self._host.close()

    def _session(self, connection: Connection) -> None:
        self._client = connection
        config = self.config
        try:
            connection.send(self._host.answer({"op": "describe"}), timeout_s=config.message_s)
            while not self._stopping:
                message = connection.receive(idle_s=config.idle_s, timeout_s=config.message_s)
                if message.get("op") == "close":
                    connection.send({"ok": True}, timeout_s=config.message_s)
                    return
                answer = self._host.answer(message)
                try:
                    connection.send(answer, timeout_s=config.message_s)
                except WireError as error:  # the environment said something that does not fit a message
                    connection.send(failure(error), timeout_s=config.message_s)
        except TimeoutError:
            fix = f"connect again; a longer idle_s (now {config.idle_s:g}) waits longer"
            _refuse(connection, UserError("connection", got="silence", wanted="a message in time", fix=fix))
        except WireError as error:
            _refuse(connection, error)
        except OSError:
            pass  # the client is gone; the next one may come

    def _accept(self) -> None:
        assert self._listener is not None
        while not self._stopping:
            try:
                sock, address = self._listener.accept()
            except OSError:
                return
            if not self._strangers.acquire(blocking=False):
                sock.close()
                continue
            connection = Connection(sock, peer=f"{address[0]}:{address[1]}")
            threading.Thread(target=self._welcome, args=(connection,), daemon=True, name="hello").start()

    def _welcome(self, connection: Connection) -> None:
        """Check a hello and hand the connection to the main thread, or refuse it."""
        try:
            said = connection.receive(idle_s=HELLO_S, timeout_s=HELLO_S, limits=HELLO_LIMITS)
            check_hello(said, SERVICE, self.config.token)
            with self._claim:
                if self._busy or self._stopping:
                    raise UserError(
                        "connection",
                        got="a second client",
                        wanted="one client at a time (a process holds one RoboTwin scene)",
                        fix="wait until the first has closed, or start another server on another port",
                    )
                self._busy = True
            self._waiting.put(connection)
        except UserError as error:
            _refuse(connection, error)
            _part(connection)
        except OSError:
            connection.close()
        finally:
            self._strangers.release()


def _refuse(connection: Connection, error: UserError) -> None:
    with contextlib.suppress(OSError, WireError):
        connection.send(failure(error), timeout_s=HELLO_S)


def _part(connection: Connection) -> None:
    """Close without losing what was sent last: a socket closed with unread bytes makes the peer drop what is on its way."""
    with contextlib.suppress(OSError):
        connection.socket.shutdown(socket.SHUT_WR)
        connection.socket.settimeout(0.5)
        for _ in range(16):
            if not connection.socket.recv(2**16):
                break
    connection.close()


def main(argv: list[str]) -> int:
    """``physis serve env [field=value ...] [--json]``; see ``serve_command``."""
    return serve_command(argv, verb="env", text=HELP, schema=ServeConfig, make=EnvServer, what="task")


def serve_parent() -> int:
    """The server that ``spawn.ServerProcess`` starts: settings on standard input, which is its lifeline."""
    told = (UserError, VulkanUnavailableError)
    return serve_for_parent(lambda settings: EnvServer(ServeConfig(**settings)), told=told, orderly=True)


if __name__ == "__main__":
    sys.exit(serve_parent())
