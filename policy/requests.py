"""What a policy is asked for a plan, and what it answers: plain arrays, so that one model can plan for many environments, also over a socket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError

if TYPE_CHECKING:
    from .checkpoint import PolicyInfo
    from .config import PolicyModelConfig


@dataclass(slots=True, kw_only=True, frozen=True)
class PolicySpec:
    """What a policy reads and gives. ``canvas``: how pictures become one, of ``size`` (height, width). ``lags``: control steps before now whose
    drive targets it reads. ``chunk``, ``action_dim``: P and A of its plans, one row a control step, ``control_hz`` of them a second.
    ``fingerprint``: weights and how actions are sampled."""

    name: str
    canvas: str
    size: tuple[int, int]
    lags: tuple[int, ...]
    state_dim: int
    action_dim: int
    chunk: int
    control_hz: float
    fingerprint: str

    @classmethod
    def of(
        cls, model: PolicyModelConfig, info: PolicyInfo, lags: Sequence[int], *, name: str, fingerprint: str
    ) -> PolicySpec:
        """Of the settings in a policy's folder. ``lags``: of its conditioner; empty where it reads the present state alone."""
        return cls(
            name=name, canvas=info.canvas, size=info.size, lags=tuple(lags) or (0,), state_dim=model.state_dim,
            action_dim=model.action_dim, chunk=model.chunk, control_hz=info.control_hz, fingerprint=fingerprint,
        )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class PlanRequest:
    """B plans. ``canvas_BHWC`` uint8, ``state_BKA``: drive targets at the spec's lags, float32, as the robot reports them. ``seeds_B``: of the noise;
    equal seeds give equal plans wherever they stand in the batch."""

    canvas_BHWC: NDArray[np.uint8]
    instructions: list[str]
    state_BKA: NDArray[np.float32]
    seeds_B: NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class PlanAnswer:
    """``actions_BPA``: joint targets float32 in the robot's units. ``seconds``: by stage, of the whole batch that was computed together."""

    actions_BPA: NDArray[np.float32]
    seconds: dict[str, float] = field(default_factory=dict)


class ChunkSource(Protocol):
    """Whatever answers requests: a model here, one in another process, several threads' requests in one batch."""

    @property
    def spec(self) -> PolicySpec: ...

    def plan(self, request: PlanRequest) -> PlanAnswer: ...


@runtime_checkable
class CanvasSource(Protocol):
    """A ``ChunkSource`` that makes canvases as well, with the bytes of ``canvas.compose``, faster than that."""

    def compose(self, pictures: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]: ...


def check_plan(request: PlanRequest, spec: PolicySpec) -> None:
    """``UserError`` for arrays that do not belong together or not to the policy."""
    batch = len(request.instructions)
    wanted = {
        "canvas_BHWC": ((batch, *spec.size, 3), np.uint8),
        "state_BKA": ((batch, len(spec.lags), spec.state_dim), np.float32),
        "seeds_B": ((batch,), np.int64),
    }
    for name, (shape, dtype) in wanted.items():
        array = getattr(request, name)
        if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype or not batch:
            got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            fix = "one row a plan, as policy.requests.PlanRequest says"
            raise UserError(name, got=got, wanted=f"{np.dtype(dtype)} {list(shape)}, at least one row", fix=fix)
    if not np.isfinite(request.state_BKA).all():
        fix = "check the robot's report"
        raise UserError("state_BKA", got="numbers that are not finite", wanted="drive targets", fix=fix)


def merge_plans(requests: Sequence[PlanRequest]) -> PlanRequest:
    """Requests one behind the other."""
    return PlanRequest(
        canvas_BHWC=np.concatenate([request.canvas_BHWC for request in requests]),
        instructions=[sentence for request in requests for sentence in request.instructions],
        state_BKA=np.concatenate([request.state_BKA for request in requests]),
        seeds_B=np.concatenate([request.seeds_B for request in requests]),
    )


def split_plans(answer: PlanAnswer, counts: Sequence[int]) -> list[PlanAnswer]:
    """The answer to merged requests -> the answer of each. Rows are copied, so that nobody holds on to the others'."""
    assert sum(counts) == len(answer.actions_BPA)
    parts, begin = [], 0
    for count in counts:
        rows = answer.actions_BPA[begin : begin + count].copy()
        parts.append(PlanAnswer(actions_BPA=rows, seconds=dict(answer.seconds)))
        begin += count
    return parts


def rows_of(request: PlanRequest, rows: NDArray[np.int64]) -> PlanRequest:
    """The part of a request that asks for these plans."""
    return PlanRequest(
        canvas_BHWC=request.canvas_BHWC[rows],
        instructions=[request.instructions[row] for row in rows],
        state_BKA=request.state_BKA[rows],
        seeds_B=request.seeds_B[rows],
    )
