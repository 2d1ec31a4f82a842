"""Requests of several threads in one rollout: many simulators or clients, one world model, the same pictures as alone."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from typing import Self

from physisforcing.core.errors import UserError
from physisforcing.core.protocols import WorldModel
from physisforcing.core.types import Rollout, RolloutRequest, WorldModelSpec

from .requests import (
    as_asked,
    check_request,
    kind_of,
    merge,
    rollout_in_equal_parts,
    rollout_in_parts,
    singly,
    split,
)

#: Requests that wait for their turn at the same time, where nothing else is said.
MOST_WAITING = 256


class BusyError(RuntimeError):
    """More requests wait than may: ask again later."""


class ClosedError(RuntimeError):
    """The batcher was closed before it could answer."""


class Batcher:
    """A ``WorldModel`` for any number of threads, answered by another one in one thread.

    Requests that ask for the same (horizon, returns, features, conditions, number of candidates) are merged along B, up to
    ``max_batch`` samples (B x S; by default what the model's spec says), and the answer is split again. The oldest request is
    never held back longer than ``wait_s`` seconds in the hope of company. A model that is batch-invariant, as the contract
    asks, gives everybody the pictures of a request alone. An error reaches the caller whose request made it and nobody else.
    ``cost`` is shared by samples; ``batched`` is the number of samples that were computed together.

    ``pad``: every call of the model has exactly ``max_batch`` samples, one candidate a context, filled up with copies. On a GPU a
    matrix product of another size may round differently; with equal sizes pictures do not depend on the company.

    ``rollout`` raises ``BusyError`` while ``max_waiting`` requests wait, and ``ClosedError`` after ``close``.
    """

    def __init__(
        self,
        world_model: WorldModel,
        *,
        max_batch: int | None = None,
        wait_s: float = 0.005,
        pad: bool = False,
        max_waiting: int = MOST_WAITING,
    ) -> None:
        self._model, self._spec = world_model, world_model.spec
        self.max_batch = self._spec.max_batch if max_batch is None else max_batch
        self.wait_s, self.pad, self.max_waiting = wait_s, pad, max_waiting
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

    @property
    def spec(self) -> WorldModelSpec:
        return self._spec

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    def rollout(self, request: RolloutRequest) -> Rollout:
        """See core's ``WorldModel``; also ``BusyError`` and ``ClosedError``. Blocks until the answer is there."""
        check_request(request, self._spec)
        ticket = _Ticket(singly(request) if self.pad else request)
        with self._changed:
            if self._closed:
                raise ClosedError("the world model is closed")
            if len(self._waiting) >= self.max_waiting:
                raise BusyError(f"{self.max_waiting} requests are waiting")
            self._waiting.append(ticket)
            self._changed.notify_all()
        ticket.done.wait()
        if ticket.error is not None:
            raise ticket.error
        assert ticket.answer is not None
        return as_asked(ticket.answer, request) if self.pad else ticket.answer

    def close(self, timeout_s: float | None = None) -> bool:
        """End: what waits gets ``ClosedError`` at once, the rollout under way is finished and answered, for which this waits (at most
        ``timeout_s``). Whether it is over. Again is harmless."""
        with self._changed:
            self._closed = True
            for ticket in self._waiting:
                ticket.fail(ClosedError("the world model was closed before this request began"))
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
            compute = rollout_in_equal_parts if self.pad else rollout_in_parts
            answer = compute(self._model, merge([t.request for t in group]), self.max_batch)
            parts = split(answer, [t.request for t in group])
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

    def __init__(self, request: RolloutRequest) -> None:
        self.request, self.since = request, time.monotonic()
        self.samples, self.kind = int(request.seeds_BS.size), kind_of(request)
        self.done = threading.Event()
        self.answer: Rollout | None = None
        self.error: BaseException | None = None

    def succeed(self, answer: Rollout) -> None:
        self.answer = answer
        self.done.set()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.done.set()
