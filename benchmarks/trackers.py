"""How far trackers are from the simulator's exact tracks, on expert demonstrations.

    python benchmarks/trackers.py [--tasks click_bell stack_blocks_two adjust_bottle] [--seeds 0 1] [--json docs/results/teachers.json]

Windows of 17 frames at stride 2 (as in training) at 240x320, 25x25 queries. Errors are of visible points, apart for those that move
(by 2 % of the diagonal or more, as the losses select), for those of them that the tracker says are visible (``claimed``), and for
those that stand; the first frame, which every tracker is given, is left
out. ``classical`` sees the pictures; ``degraded`` is the truth with the errors of ``teachers.degraded``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

import physisforcing.envs.robotwin  # noqa: F401  (registers the tasks)
from physisforcing.core.types import PointTracks
from physisforcing.envs.recording import EpisodeRecorder, record_expert
from physisforcing.planner.measurements import machine_provenance, measurement, write_measurements
from physisforcing.worldmodel.data.target_shards import TargetRecipe
from physisforcing.worldmodel.teachers.classical import ClassicalTracker
from physisforcing.worldmodel.teachers.degraded import degraded
from physisforcing.worldmodel.teachers.ground_truth import point_tracks

Window = tuple[NDArray[np.uint8], PointTracks]
Found = tuple[NDArray[np.float32], NDArray[np.bool_]]
BOUNDS = (1, 2, 4, 8)


def windows(task: str, seed: int) -> list[Window]:
    """Pictures and exact tracks of the windows of one demonstration, every 32 control steps."""
    env = gymnasium.make(f"RoboTwin/{task}-v0", disable_env_checker=True).unwrapped
    recorder, recipe = EpisodeRecorder(ground_truth="full"), TargetRecipe(start_stride=32)
    try:
        record_expert(env, seed, recorder)
    finally:
        env.close()
    truth, pictures = recorder.ground_truth(), np.stack(recorder.images["head"])
    steps = [recipe.steps(int(start), len(recorder)) for start in recipe.starts(len(recorder))]
    return [(pictures[s], point_tracks(truth, s.tolist())) for s in steps]


def classical(window: Window, _: int) -> Found:
    pictures, truth = window
    found = ClassicalTracker().track(torch.from_numpy(pictures)[None], torch.from_numpy(truth.points_TN2[:1]))
    return found.points_BTN2[0].numpy(), found.visible_BTN[0].numpy()


def spoiled(window: Window, number: int) -> Found:
    made = degraded(window[1], np.random.default_rng([0, number]))
    return made.points_TN2, made.visible_TN


def compare(found: Found, truth: PointTracks) -> dict[str, NDArray]:
    """Errors in pixels of visible points, ``moving``, ``claimed`` and ``still``, and where visibility agrees; queries on nothing are left out."""
    points, visible = found
    error = np.linalg.norm(points - truth.points_TN2, axis=-1)[1:]
    seen, known = truth.visible_TN[1:], truth.visible_TN[0]
    step = np.linalg.norm(np.diff(truth.points_TN2, axis=0), axis=-1)
    moves = (step * (truth.visible_TN[1:] & truth.visible_TN[:-1])).sum(0) >= 0.02 * np.hypot(*truth.size)
    agrees = (visible[1:] == seen)[:, known]
    return {
        "moving": error[seen & (known & moves)],
        "still": error[seen & (known & ~moves)],
        "claimed": error[seen & visible[1:] & (known & moves)],
        "agrees": agrees.ravel(),
        "agrees_moving": (visible[1:] == seen)[:, known & moves].ravel(),
    }


def lines(name: str, parts: list[dict[str, NDArray]], shared: dict[str, Any]) -> list[dict[str, Any]]:
    """Measurements of one tracker; intervals: bootstrap over windows."""
    rng, rows = np.random.default_rng(0), []
    chosen = rng.integers(0, len(parts), (300, len(parts)))

    def add(claim: str, unit: str, value: Callable[[list[dict[str, NDArray]]], float]) -> None:
        drawn = [value([parts[k] for k in row]) for row in chosen]
        low, high = np.percentile(drawn, [2.5, 97.5])
        middle = value(parts)
        print(f"  teachers/{name}/{claim:28} {middle:8.3f} {unit} [{low:.3f}, {high:.3f}]", flush=True)
        rows.append(
            measurement(f"teachers/{name}/{claim}", middle, unit=unit, low=float(low), high=float(high), **shared)
        )

    for which in ("moving", "claimed", "still"):
        for word, quantile in (("median", 50), ("p95", 95)):
            add(
                f"{which}/{word}_px",
                "px",
                lambda some, w=which, q=quantile: float(np.percentile(np.concatenate([p[w] for p in some]), q)),
            )
        for bound in BOUNDS:
            add(
                f"{which}/within_{bound}_px",
                "share",
                lambda some, w=which, b=bound: float((np.concatenate([p[w] for p in some]) < b).mean()),
            )
    for key, claim in (("agrees", "visibility_agrees"), ("agrees_moving", "moving/visibility_agrees")):
        add(claim, "share", lambda some, k=key: float(np.concatenate([p[k] for p in some]).mean()))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["click_bell", "stack_blocks_two", "adjust_bottle"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--json", type=Path, help="write measurements here")
    o = parser.parse_args()
    found = [window for task in o.tasks for seed in o.seeds for window in windows(task, seed)]
    command = f"python benchmarks/trackers.py --tasks {' '.join(o.tasks)} --seeds {' '.join(map(str, o.seeds))}"
    shared = {"n": len(found), "seeds": o.seeds, "command": command, "provenance": machine_provenance()}
    rows: list[dict[str, Any]] = []
    trackers = {"classical": classical, "degraded": spoiled}
    for name, track in trackers.items():
        begun = time.perf_counter()
        parts = [compare(track(window, number), window[1]) for number, window in enumerate(found)]
        each = 1000 * (time.perf_counter() - begun) / len(found)
        print(f"{name}: {len(found)} windows, {each:.0f} ms a window with its comparison")
        rows += lines(name, parts, shared)
    if o.json:
        write_measurements(o.json, rows)


if __name__ == "__main__":
    main()
