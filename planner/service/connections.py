"""uvicorn's HTTP/1.1 protocol with bounds of its own: how many connections, how long a head may take, typed errors for bad HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .faults import ServiceFault, invalid
from .limits import ServiceLimits


def guarded_protocol(limits: ServiceLimits) -> type[H11Protocol]:
    """A protocol class for ``uvicorn.Config(http=...)``.

    uvicorn waits for ever for a client that sends nothing, or its headers one letter at a time, or reads no answer. Here a
    connection has ``limits.header_s`` from one answer (or its beginning) to the whole head of the next request, and as long to
    read on; then it is cut. Past ``limits.max_connections`` a new one gets 429.
    """

    class GuardedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _unsent = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                fault = ServiceFault("OVERLOADED", "too many connections", retry_after_s=1)
                transport.write(_raw(fault, b"429 Too Many Requests"))
                transport.close()
            self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if not self.transport.is_closing():  # what comes after an error was answered is of no interest
                super().data_received(data)

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            if self.cycle is not before and not self.cycle.response_complete and not self.flow.write_paused:
                self._disarm()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete:
                self._arm()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._arm()

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.cycle is not None and not self.cycle.response_complete:
                self._disarm()

        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # no answer has begun
                self.transport.write(_raw(invalid("request: not valid HTTP/1.1"), b"400 Bad Request"))
            self.transport.close()
            self._arm()

        def _arm(self) -> None:
            self._disarm()
            self._unsent = self.transport.get_write_buffer_size()
            self._timer = self.loop.call_later(limits.header_s, self._too_late)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_late(self) -> None:
            if 0 < self.transport.get_write_buffer_size() < self._unsent:  # slow, but reading
                self._arm()
            else:
                self.transport.abort()

    return GuardedProtocol


def _raw(fault: ServiceFault, status: bytes) -> bytes:
    """A whole HTTP answer, for connections that have no request to answer."""
    body = fault.body()
    headers = {**fault.headers(), "content-length": str(len(body)), "connection": "close"}
    lines = [b"HTTP/1.1 " + status, *(f"{name}: {value}".encode() for name, value in headers.items())]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
