"""Requests of several threads answered together: one thread asks a model, everybody gets their own part of its answer."""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any, Generic, Self, TypeVar

from .errors import UserError

Request = TypeVar("Request")
Answer = TypeVar("Answer")
#: Requests that wait for their turn at the same time, where nothing else is said.
MOST_WAITING = 256


class BusyError(RuntimeError):
    """More requests wait than may: ask again later."""


class ClosedError(RuntimeError):
    """The batcher was closed before it could answer."""


class Gatherer(ABC, Generic[Request, Answer]):
    """Merges requests of the same ``kind`` up to ``max_batch`` samples; the oldest is never held back longer than ``wait_s`` seconds in the hope
    of company. An error reaches the caller whose request made it and nobody else. ``what`` is the model's name in errors.
    """

    def __init__(self, *, max_batch: int, wait_s: float, max_waiting: int, what: str) -> None:
        self.max_batch, self.wait_s, self.max_waiting, self.what = max_batch, wait_s, max_waiting, what
        for name, value in (("max_batch", self.max_batch), ("max_waiting", max_waiting)):
            if value < 1:
                raise UserError(name, got=value, wanted="at least 1", fix=f"{name}=16")
        if not 0 <= wait_s < math.inf:
            raise UserError("wait_s", got=wait_s, wanted="seconds, at least 0", fix="wait_s=0.005")
        self._waiting: deque[_Ticket] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="batcher")
        self._thread.start()

    @abstractmethod
    def kind_of(self, request: Request) -> Any:
        """What requests must have in common to be merged."""

    @abstractmethod
    def samples_of(self, request: Request) -> int:
        """How much of ``max_batch`` it takes."""

    @abstractmethod
    def compute(self, requests: Sequence[Request]) -> Sequence[Answer]:
        """Answers to requests of one kind, in their order. Called by one thread alone."""

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    def ask(self, request: Request) -> Answer:
        """The answer, when it is there. ``BusyError`` while ``max_waiting`` requests wait, ``ClosedError`` after ``close``."""
        ticket = _Ticket(request, self.samples_of(request), self.kind_of(request))
        with self._changed:
            if self._closed:
                raise ClosedError(f"{self.what} is closed")
            if len(self._waiting) >= self.max_waiting:
                raise BusyError(f"{self.max_waiting} requests are waiting")
            self._waiting.append(ticket)
            self._changed.notify_all()
        ticket.done.wait()
        if ticket.error is not None:
            raise ticket.error
        return ticket.answer

    def close(self, timeout_s: float | None = None) -> bool:
        """End: what waits gets ``ClosedError`` at once, what is computed is finished and answered, for which this waits (at most
        ``timeout_s``). Whether it is over. Again is harmless."""
        with self._changed:
            self._closed = True
            for ticket in self._waiting:
                ticket.fail(ClosedError(f"{self.what} was closed before this request began"))
            self._waiting.clear()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ the one thread that calls the model

    def _work(self) -> None:
        while (group := self._next_group()) is not None:
            self._answer(group)

    def _next_group(self) -> list[_Ticket] | None:
        """The oldest request and those that fit beside it; None after ``close``."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            while not self._closed:
                group = self._fitting()
                left = self._waiting[0].since + self.wait_s - time.monotonic()
                if left <= 0 or sum(ticket.samples for ticket in group) >= self.max_batch:
                    for ticket in group:
                        self._waiting.remove(ticket)
                    return group
                self._changed.wait(left)
            return None

    def _fitting(self) -> list[_Ticket]:
        first = self._waiting[0]
        group, samples = [first], first.samples
        for ticket in list(self._waiting)[1:]:
            if ticket.kind == first.kind and samples + ticket.samples <= self.max_batch:
                group.append(ticket)
                samples += ticket.samples
        return group

    def _answer(self, group: list[_Ticket]) -> None:
        try:
            parts = list(self.compute([ticket.request for ticket in group]))
            if len(parts) != len(group):
                raise RuntimeError(f"{self.what} gave {len(parts)} answers to {len(group)} requests")
        except BaseException as error:  # whatever it is: nobody may wait for ever
            if len(group) == 1:
                group[0].fail(error)
                return
            # One of them is to blame: each alone, so that the others get their answers.
            for ticket in group:
                self._answer([ticket])
            return
        for ticket, part in zip(group, parts, strict=True):
            ticket.succeed(part)


class _Ticket:
    """One caller's request and what becomes of it."""

    def __init__(self, request: Any, samples: int, kind: Any) -> None:
        self.request, self.since, self.samples, self.kind = request, time.monotonic(), samples, kind
        self.done = threading.Event()
        self.answer: Any = None
        self.error: BaseException | None = None

    def succeed(self, answer: Any) -> None:
        self.answer = answer
        self.done.set()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.done.set()
