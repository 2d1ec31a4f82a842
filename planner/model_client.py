"""A world model in another process, behind the same protocol."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any, Self

from physisforcing.core.connection import Connection, PeerClosedError, hello, raise_failure
from physisforcing.core.errors import UserError
from physisforcing.core.types import Rollout, RolloutRequest, WorldModelSpec
from physisforcing.core.wire import WireError

from .model_messages import ANSWER_LIMITS, REQUEST_LIMITS, SERVICE, pack_request, unpack_rollout, unpack_spec


class ModelLostError(ConnectionError):
    """The process with the world model died, hung or went away; the message names where it was."""


class _ConnectionLostError(ModelLostError):
    """The connection broke; the server may be there again already."""


def parse_address(text: str, *, field: str = "planner.server") -> tuple[str, int]:
    """``HOST:PORT`` -> (host, port); ``UserError`` for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise UserError(field, got=text, wanted="HOST:PORT", fix=f"for instance {field}=127.0.0.1:7000")
    return host.strip("[]"), int(port)


class SocketWorldModel:
    """The ``WorldModel`` that ``ModelServer`` at ``address`` (HOST:PORT) has. ``about``: what the server says of it besides the spec.

    ``rollout`` raises what the model raised: ``UserError`` and ``MissingCapabilityError`` as they were, anything else as
    ``RemoteFailureError``. A connection that breaks is made once more, for which a server has ``connect_s`` seconds, and the request,
    which changes nothing on the other side, is sent again. ``ModelLostError`` when that fails or breaks too, and when there is no
    answer in ``reply_s`` seconds. Safe in several threads, one rollout at a time.
    """

    def __init__(self, address: str, *, token: str = "", connect_s: float = 10.0, reply_s: float = 600.0) -> None:
        self.address, self._token = address, token
        self._place, self.connect_s, self.reply_s = parse_address(address), connect_s, reply_s
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._spec, self.about = self._connect()

    @property
    def spec(self) -> WorldModelSpec:
        return self._spec

    def rollout(self, request: RolloutRequest) -> Rollout:
        """See core's ``WorldModel`` and this class."""
        message = {"op": "rollout", "request": pack_request(request)}
        with self._lock:
            try:
                answer = self._exchange(message)
            except _ConnectionLostError:
                answer = self._exchange(message)
            raise_failure(answer, peer=self.address)
            try:
                return unpack_rollout(answer.get("rollout"))
            except WireError as error:
                raise self._loss(str(error)) from error

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to one message. ``_ConnectionLostError`` where another try may help, ``ModelLostError`` after silence."""
        connection = self._connection or self._reconnect()
        try:
            connection.send(message)
        except WireError:
            raise  # too large: nothing was sent
        except OSError as error:
            # The server may have said why before it closed.
            raise self._last_word(connection, f"while sending: {error}") from error
        try:
            return connection.receive(idle_s=self.reply_s, limits=ANSWER_LIMITS)
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

    def _loss(self, why: str, kind: type[ModelLostError] = ModelLostError) -> ModelLostError:
        self.close()
        return kind(f"world-model server at {self.address}: {why}")

    def _reconnect(self) -> Connection:
        """``UserError`` where another model answers now."""
        spec, _ = self._connect()
        if spec.fingerprint != self._spec.fingerprint:
            self.close()
            got, wanted = spec.fingerprint, f"{self._spec.fingerprint}, as before"
            raise UserError("planner.server", got=got, wanted=wanted, fix="start the evaluation again")
        assert self._connection is not None
        return self._connection

    def _connect(self) -> tuple[WorldModelSpec, dict[str, Any]]:
        """Connect and introduce ourselves; tries again for ``connect_s`` seconds while nobody listens."""
        deadline = time.monotonic() + self.connect_s
        while True:
            try:
                sock = socket.create_connection(self._place, timeout=max(0.1, deadline - time.monotonic()))
                connection = Connection(sock, peer=self.address, limits=REQUEST_LIMITS)
                try:
                    connection.send(hello(SERVICE, self._token))
                    answer = connection.receive(idle_s=max(1.0, deadline - time.monotonic()), limits=ANSWER_LIMITS)
                    raise_failure(answer, peer=self.address)
                    spec = unpack_spec(answer.get("spec"))
                except BaseException:
                    connection.close()
                    raise
                self._connection = connection
                return spec, dict(answer.get("about") or {})
            except WireError as error:
                raise ModelLostError(f"what answers at {self.address} is no world-model server: {error}") from error
            except (PeerClosedError, OSError) as error:
                if time.monotonic() + 0.25 >= deadline:
                    raise ModelLostError(f"no world-model server at {self.address}: {error}") from error
                time.sleep(0.25)
