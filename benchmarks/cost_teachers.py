"""Teachers of ``physics_cost.py``, plain and fast, with random weights, and the clock that times them inside a step."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from cost_networks import TINY, Size, tiny_depth, tiny_encoder

from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.teachers.cotracker3 import CoTracker3
from physisforcing.worldmodel.teachers.depth_anything import DepthAnything
from physisforcing.worldmodel.teachers.fast_cotracker import FastCoTracker3
from physisforcing.worldmodel.teachers.fast_vjepa2 import speed_up
from physisforcing.worldmodel.teachers.online import OnlineTeachers
from physisforcing.worldmodel.teachers.registry import TeacherConfig
from physisforcing.worldmodel.teachers.selection import Teachers, TeachersConfig
from physisforcing.worldmodel.teachers.vjepa2 import VJepa2

SEED = 0
TEACHERS = ("tracker", "depth", "encoder")


class Clock:
    """Moments of a step on the device; ``spans`` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.moments: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """Now ends what is called ``name``; an empty name only begins something."""
        moment: Any = time.perf_counter()
        if self.cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.moments.append((name, moment))

    def spans(self) -> dict[str, float]:
        """Milliseconds from each mark to the next by name (the same name adds up), and of everything as ``step``."""
        if self.cuda:
            torch.cuda.synchronize()
        between = self._between
        spans = {"step": between(self.moments[0][1], self.moments[-1][1])}
        for (_, before), (name, after) in zip(self.moments, self.moments[1:]):
            if name:
                spans[name] = spans.get(name, 0.0) + between(before, after)
        self.moments = []
        return spans

    def _between(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) if self.cuda else 1e3 * (after - before)


class Timed:
    """A teacher whose one method marks its beginning and its end on a clock."""

    def __init__(self, name: str, teacher: Any, method: str, clock: Clock) -> None:
        self._name, self._teacher, self._method, self._clock = name, teacher, method, clock

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._teacher, name)
        return self._timed(value) if name == self._method else value

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            self._clock.mark("reduction")  # what came before, between the teachers
            found = method(*inputs)
            self._clock.mark(self._name)
            return found

        return run


def build_teachers(
    kind: str, size: Size, device: torch.device, clock: Clock, options: argparse.Namespace
) -> OnlineTeachers:
    """``kind``: ``fast`` or ``plain``."""
    tiny = size is TINY
    half = getattr(torch, options.dtype if kind == "fast" else "bfloat16")
    tracker: Any = CoTracker3.with_random_weights(SEED, source=options.cotracker_source, device=device)
    if size.working:
        tracker.network.model_resolution = size.working
    encoder = VJepa2.from_config(tiny_encoder() if tiny else None, device=device, dtype=half)
    depth = DepthAnything.from_config(tiny_depth() if tiny else None, device=device, dtype=half)
    if kind == "fast":
        tracker = fast_tracker(tracker, options)
        encoder = speed_up(encoder, compiled=True, backend=options.backend)
        for part in (depth.model.neck, depth.model.head):
            part.to(memory_format=torch.channels_last)
    names = {"tracker": "cotracker3", "depth": "depth_anything", "encoder": "vjepa2"}
    teachers = Teachers(TeachersConfig(**{role: TeacherConfig(name=name) for role, name in names.items()}))
    teachers.tracker = Timed("tracker", tracker, "track", clock)  # in place of those that the names would load
    teachers.depth = Timed("depth", depth, "depth", clock)
    teachers.encoder = Timed("encoder", encoder, "encode", clock)
    return OnlineTeachers(teachers, PhysicsConfig(), grid=size.queries)


def fast_tracker(tracker: CoTracker3, options: argparse.Namespace) -> Any:
    if options.tracker == "adapter":
        return tracker
    return FastCoTracker3(tracker, dtype=options.tracker, compiled=True, backend=options.backend)
