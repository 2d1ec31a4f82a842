"""How the stages of a plan are called: one kernel after the other, or replayed as CUDA graphs.

A plan is thousands of small kernels whose launches take longer than their work. Captured once they are launched together; compiled blocks join
most of them before that. Shapes are fixed: a batch or a sentence of another length captures again, which is counted.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .model import WorldActionModel

#: What the inputs and the stages before made, by name -> what this one makes.
Stage = Callable[[Mapping[str, Any]], Any]
KINDS = ("eager", "graph", "compile", "fused")
#: Calls before a capture, in which libraries choose their kernels.
WARM_UP = 3
#: Sets of shapes whose graphs are kept at the same time.
MOST_KEPT = 4


class Eager:
    """Stages called one after the other. A call -> (what the last one makes, seconds of each, by name)."""

    captures = 0

    def __init__(self, stages: Mapping[str, Stage], device: torch.device) -> None:
        self.stages, self.device = dict(stages), device
        self._last = next(reversed(self.stages))

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        at, clock = dict(inputs), _Clock(self.device)
        for name, stage in self.stages.items():
            at[name] = stage(at)
            clock.mark(name)
        return at[self._last], clock.seconds()


class Graphs(Eager):
    """The same as CUDA graphs, one a stage, in static memory: inputs are copied in, and what a call returns is overwritten by the next one.
    ``captures``: how often shapes were new."""

    def __init__(self, stages: Mapping[str, Stage], device: torch.device) -> None:
        super().__init__(stages, device)
        assert device.type == "cuda", "graphs are captured on a GPU"
        self._kept: dict[tuple[Any, ...], _Captured] = {}

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        key = tuple((name, tuple(value.shape), value.dtype) for name, value in inputs.items())
        captured = self._kept.pop(key, None)
        if captured is None:
            if len(self._kept) >= MOST_KEPT:
                del self._kept[next(iter(self._kept))]  # the one that was not used for longest
            captured = _Captured(self.stages, inputs)
            self.captures += 1
        self._kept[key] = captured
        captured.fill(inputs)
        clock = _Clock(self.device)
        for name, graph in captured.graphs.items():
            graph.replay()
            clock.mark(name)
        return captured.values[self._last], clock.seconds()

    def alone(self) -> dict[str, Callable[[], None]]:
        """The stages of the shapes that were used last, one by one, over what lies there: for measurements."""
        return {name: graph.replay for name, graph in next(reversed(self._kept.values())).graphs.items()}


class _Captured:
    """Graphs for one set of shapes. A later stage reads what an earlier one made where it lies."""

    def __init__(self, stages: Mapping[str, Stage], inputs: Mapping[str, Tensor]) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                at: dict[str, Any] = dict(self.inputs)
                for name, stage in stages.items():
                    at[name] = stage(at)
        torch.cuda.current_stream().wait_stream(side)
        del at
        pool = torch.cuda.graph_pool_handle()
        self.values: dict[str, Any] = dict(self.inputs)
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        for name, stage in stages.items():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self.values[name] = stage(self.values)
            self.graphs[name] = graph

    def fill(self, inputs: Mapping[str, Tensor]) -> None:
        for name, value in inputs.items():
            self.inputs[name].copy_(value, non_blocking=True)


class _Clock:
    """Seconds between marks, by events on a GPU: it is waited for once, at the end."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def mark(self, name: str) -> None:
        self._marks.append((name, self._now()))

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        if self._gpu:
            self._marks[-1][1].synchronize()
        found = {}
        for (_, before), (name, after) in zip(self._marks[:-1], self._marks[1:], strict=True):
            found[name] = before.elapsed_time(after) / 1e3 if self._gpu else after - before
        return found


def compile_blocks(
    model: WorldActionModel,
    *,
    backend: str | Callable[..., Any] = "inductor",
    names: Sequence[str] = ("forward", "prefill", "act"),
) -> None:
    """Compile what a block does in a plan, once for all blocks (twice where nobody reads the last one's video): their weights are inputs of the
    compiled function. Names of parameters stay. ``names``: of its methods."""
    kind = type(model.blocks[0])
    for name in names:
        compiled = torch.compile(getattr(kind, name), dynamic=False, fullgraph=True, backend=backend)
        for block in model.blocks:
            setattr(block, name, functools.partial(compiled, block))
