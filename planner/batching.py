"""Requests of several threads in one rollout: many simulators or clients, one world model, the same pictures as alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from physisforcing.core.gathering import MOST_WAITING, Gatherer
from physisforcing.core.gathering import BusyError as BusyError
from physisforcing.core.gathering import ClosedError as ClosedError
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


class Batcher(Gatherer[RolloutRequest, Rollout]):
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
        self._model, self._spec, self.pad = world_model, world_model.spec, pad
        batch = self._spec.max_batch if max_batch is None else max_batch
        super().__init__(max_batch=batch, wait_s=wait_s, max_waiting=max_waiting, what="the world model")

    @property
    def spec(self) -> WorldModelSpec:
        return self._spec

    def rollout(self, request: RolloutRequest) -> Rollout:
        """See core's ``WorldModel``; also ``BusyError`` and ``ClosedError``. Blocks until the answer is there."""
        check_request(request, self._spec)
        answer = self.ask(singly(request) if self.pad else request)
        return as_asked(answer, request) if self.pad else answer

    def kind_of(self, request: RolloutRequest) -> Any:
        return kind_of(request)

    def samples_of(self, request: RolloutRequest) -> int:
        return int(request.seeds_BS.size)

    def compute(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        parted = rollout_in_equal_parts if self.pad else rollout_in_parts
        return split(parted(self._model, merge(requests), self.max_batch), requests)
