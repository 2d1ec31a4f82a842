"""Drawn recordings of a few tasks: a tool comes in over a table and moves the task's object."""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np

FPS, SIZE = 10.0, (96, 128)
#: Task -> colour and shape of its object, and captions.
TASKS: dict[str, tuple[tuple[int, int, int], str, tuple[str, ...]]] = {
    "bell": ((190, 170, 40), "disc", ("press the yellow bell", "ring the yellow bell", "push down on the yellow bell")),
    "bottle": ((30, 140, 60), "tall", ("lift the green bottle", "pick up the green bottle", "raise the green bottle")),
    "blocks": (
        (200, 30, 30),
        "squares",
        ("stack the red blocks", "put one red block on another", "pile up red blocks"),
    ),
}


def script() -> ModuleType:
    """``benchmarks/data_prepare.py`` as a module."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "data_prepare.py"
    spec = util.spec_from_file_location("data_prepare_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def film(task: str, generator: np.random.Generator, frames: int = 24) -> np.ndarray:
    """uint8 [T,96,128,3]: where object and tool are, and how fast the tool goes, is drawn anew for every take."""
    colour, shape, _ = TASKS[task]
    table = cv2.resize(
        generator.integers(144, 156, (6, 8, 3), dtype=np.uint8), SIZE[::-1], interpolation=cv2.INTER_CUBIC
    )
    for corner, other in (((0, 0), (127, 9)), ((0, 60), (9, 95)), ((112, 84), (127, 95)), ((60, 90), (70, 95))):
        cv2.rectangle(
            table, corner, other, (95, 80, 100), -1
        )  # scenery, the same in all takes: a wall and what stands round
    place = generator.uniform((40, 40), (90, 75))
    start, reach = generator.uniform((0, 0), (127, 20)), generator.uniform(0.5, 0.8)
    lifted = generator.uniform((-30, -30), (30, -10))
    out = []
    for t in np.linspace(0, 1, frames):
        picture = table.copy()
        near = min(t / reach, 1.0)
        moved = place + lifted * max(t - reach, 0) / (1 - reach)
        tool = start + (place - start) * near + (moved - place)
        _object(picture, shape, tuple(int(v) for v in moved), colour)
        end = tuple(int(v) for v in tool)
        cv2.line(picture, (int(start[0]), -5), end, (70, 70, 80), 9)
        cv2.circle(picture, end, 8, (40, 40, 45), -1)
        out.append(picture)
    return np.stack(out)


def _object(picture: np.ndarray, shape: str, at: tuple[int, int], colour: tuple[int, int, int]) -> None:
    x, y = at
    if shape == "disc":
        cv2.circle(picture, at, 19, colour, -1)
        cv2.circle(picture, at, 7, (190, 190, 190), -1)
    elif shape == "tall":
        cv2.rectangle(picture, (x - 8, y - 30), (x + 8, y + 22), colour, -1)
    else:
        for left in (-26, 4):
            cv2.rectangle(picture, (x + left, y - 11), (x + left + 22, y + 11), colour, -1)


def takes(count: int, seed: int) -> list[Any]:
    """``data_prepare.Take``s, the tasks in turn."""
    make, generator = script().Take, np.random.default_rng(seed)
    out = []
    for k in range(count):
        task = list(TASKS)[k % len(TASKS)]
        frames = film(task, generator)
        caption = str(generator.choice(TASKS[task][2]))
        out.append(make(frames=lambda frames=frames: frames, fps=FPS, caption=caption, task=task))
    return out
