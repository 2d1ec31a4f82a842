"""One policy in one process for many environments: plans over sockets, computed together; and the client that acts on them.

What travels is what ``requests`` holds: canvases, sentences, drive targets and noise seeds one way, chunks the other. Pictures are put together,
states remembered and rows executed on the client's side, so that the server keeps nothing of an episode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from physisforcing.core.gathering import MOST_WAITING, Gatherer
from physisforcing.core.message_client import MessageClient
from physisforcing.core.message_server import MessageServer, MessageServerConfig
from physisforcing.core.types import ActionSpec
from physisforcing.core.wire import Limits, WireError

from .act import ExecutionConfig, WorldActionPolicy
from .requests import ChunkSource, PlanAnswer, PlanRequest, PolicySpec, check_plan, merge_plans, split_plans

SERVICE = "physis policy"
#: A canvas of Fast-WAM's size has 368 640 bytes.
LIMITS = Limits(message_bytes=32 * 2**20, array_bytes=32 * 2**20, arrays=8, depth=4, values=4096, string_bytes=8192)
#: Plans of one request.
MOST_PLANS = 64
#: Plans computed together where nothing else is said.
BATCH = 16


class PlanBatcher(Gatherer[PlanRequest, PlanAnswer]):
    """A ``ChunkSource`` for any number of threads, answered by another one in one thread. Everybody gets the rows of a request alone. What the
    other one can ``prepare`` of a request is done in the thread that asks, so that a new sentence keeps nobody else waiting."""

    def __init__(
        self, source: ChunkSource, *, max_batch: int = BATCH, wait_s: float = 0.005, max_waiting: int = MOST_WAITING
    ) -> None:
        self._source = source
        super().__init__(max_batch=max_batch, wait_s=wait_s, max_waiting=max_waiting, what="the policy")

    @property
    def spec(self) -> PolicySpec:
        return self._source.spec

    def plan(self, request: PlanRequest) -> PlanAnswer:
        """See ``ChunkSource``; also ``BusyError`` and ``ClosedError``. Blocks until the answer is there."""
        check_plan(request, self.spec)
        prepare = getattr(self._source, "prepare", None)
        if prepare is not None:
            prepare(request)
        return self.ask(request)

    def kind_of(self, request: PlanRequest) -> None:
        """All requests to one policy are of one kind."""

    def samples_of(self, request: PlanRequest) -> int:
        return len(request.instructions)

    def compute(self, requests: Sequence[PlanRequest]) -> list[PlanAnswer]:
        answer = self._source.plan(merge_plans(requests))
        answer.seconds["batched"] = float(len(answer.actions_BPA))
        return split_plans(answer, [len(request.instructions) for request in requests])


class PolicyServer(MessageServer):
    """Answers ``plan`` with chunks of a policy. ``about``: what else clients are told of it (plain values)."""

    service, request_limits, answer_limits = SERVICE, LIMITS, LIMITS

    def __init__(
        self, source: ChunkSource, config: MessageServerConfig | None = None, *, about: dict[str, Any] | None = None
    ) -> None:
        super().__init__(config or MessageServerConfig())
        own = self.config
        self.batcher = PlanBatcher(
            source, max_batch=own.batch or BATCH, wait_s=own.wait_s, max_waiting=max(own.clients, 1)
        )
        self._about = dict(about or {}) | {"batch": self.batcher.max_batch}

    def welcome(self) -> dict[str, Any]:
        return {"ok": True, "spec": dataclasses.asdict(self.batcher.spec), "about": self._about}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("op") != "plan":
            raise _refused("op", message.get("op"), "'plan'")
        found = self.batcher.plan(unpack_plan(message.get("request")))
        return {"actions_BPA": found.actions_BPA, "seconds": found.seconds}

    def finish(self, timeout_s: float) -> bool:
        return self.batcher.close(timeout_s)


class SocketChunks(MessageClient):
    """The ``ChunkSource`` that ``PolicyServer`` at ``address`` (HOST:PORT) has; see ``MessageClient`` for errors."""

    service, request_limits, answer_limits = SERVICE, LIMITS, LIMITS
    what, field = "policy server", "policy.server"

    @property
    def spec(self) -> PolicySpec:
        return self._spec

    def met(self, welcome: dict[str, Any]) -> str:
        spec = unpack_spec(welcome.get("spec"))
        if not hasattr(self, "_spec"):  # of the one that was met first
            self._spec, self.about = spec, dict(welcome.get("about") or {})
        return spec.fingerprint

    def plan(self, request: PlanRequest) -> PlanAnswer:
        """See ``ChunkSource``. ``WireError`` for more than ``MOST_PLANS`` plans."""
        message = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
        answer = self.ask({"op": "plan", "request": message})
        actions, seconds = answer.get("actions_BPA"), answer.get("seconds")
        shape = (len(request.instructions), self._spec.chunk, self._spec.action_dim)
        fine = isinstance(actions, np.ndarray) and actions.dtype == np.float32 and actions.shape == shape
        fine = fine and isinstance(seconds, dict) and all(type(value) in (int, float) for value in seconds.values())
        if not fine:
            raise self.lost("an answer that is none")
        return PlanAnswer(actions_BPA=actions, seconds={str(k): float(v) for k, v in seconds.items()})


def remote_policy(
    address: str,
    config: ExecutionConfig | None = None,
    *,
    token: str = "",
    action_spec: ActionSpec | None = None,
    connect_s: float = 10.0,
) -> WorldActionPolicy:
    """``core.protocols.Policy`` whose plans are made by ``physis serve policy`` at ``address``."""
    chunks = SocketChunks(address, token=token, connect_s=connect_s)
    return WorldActionPolicy(chunks, config, action_spec=action_spec)


def unpack_plan(message: Any) -> PlanRequest:
    """``WireError`` for anything that is no request; whether it fits the policy is not checked here."""
    names = [field.name for field in dataclasses.fields(PlanRequest)]
    if not isinstance(message, dict) or set(message) != set(names):
        raise _refused("request", message, f"a map of {names}")
    sentences = message["instructions"]
    fine = isinstance(sentences, list) and all(type(text) is str for text in sentences)
    if not fine or not 1 <= len(sentences) <= MOST_PLANS:
        raise _refused("instructions", sentences, f"1 to {MOST_PLANS} sentences")
    for name in ("canvas_BHWC", "state_BKA", "seeds_B"):
        if not isinstance(message[name], np.ndarray):
            raise _refused(name, message[name], "an array")
    return PlanRequest(**message)


def unpack_spec(message: Any) -> PolicySpec:
    """``WireError`` for anything that is no spec."""
    kinds = {
        "name": str, "canvas": str, "size": tuple, "lags": tuple, "state_dim": int, "action_dim": int, "chunk": int,
        "control_hz": float, "fingerprint": str,
    }  # fmt: skip
    if not isinstance(message, dict) or set(message) != set(kinds):
        raise _refused("spec", message, f"a map of {sorted(kinds)}")
    values = dict(message)
    for name, kind in kinds.items():
        fine = type(values[name]) is kind
        if kind is tuple and fine:
            fine = all(type(number) is int for number in values[name])
        if not fine:
            raise _refused(f"spec.{name}", values[name], f"of the kind {kind.__name__}")
    return PolicySpec(**values)


def _refused(field: str, got: Any, wanted: str) -> WireError:
    shown = f"{type(got).__name__} {str(got)[:100]}"
    return WireError(field, got=shown, wanted=wanted, fix="use the same version of physisforcing on both sides")
