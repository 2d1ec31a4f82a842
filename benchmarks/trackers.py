"""Point trackers against the simulator's exact tracks, on expert clips with ground truth for every frame.

    python benchmarks/trackers.py [--tasks click_bell ...] [--seeds 0 1] [--json docs/results/teachers.json]
        [--cotracker-checkpoint FILE [--cotracker-sha256 DIGITS] [--cotracker-source FOLDER] [--device cuda]]

Windows of 17 frames at stride 2, 25x25 queries, 240x320; errors are end-point errors of frames 1 to 16 in its pixels. A point is
``moving`` where its true track leaves the query by more than 2 pixels within the window, else ``still``; a point counts in the
frames in which it truly is visible. ``trusted``: of these, the frames in which the tracker calls it visible too, which is what a
loss sees. ``degraded``: the exact tracks with the default errors of ``teachers/degraded.py``; ``unmoved``: every point stays.
Intervals: bootstrap over episodes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from physisforcing.worldmodel.teachers.classical import ClassicalTracker
from physisforcing.worldmodel.teachers.cotracker3 import PUBLISHED_SHA256, CoTracker3
from physisforcing.worldmodel.teachers.degraded import degrade
from physisforcing.worldmodel.teachers.ground_truth import point_tracks
from physisforcing.worldmodel.teachers.protocols import PointTracker

TASKS = ("click_bell", "stack_blocks_two", "adjust_bottle")
FRAMES, STRIDE = 17, 2
#: Starts of windows lie this many frames apart: half a window.
EVERY = FRAMES * STRIDE // 2
MOVING_PX = 2.0
WITHIN = (1, 2, 4, 8)
DRAWS = 200
#: Claim -> unit.
UNITS = {
    **{f"{kind}_{name}_px": "px of 240x320" for kind in ("moving", "still") for name in ("median", "p95")},
    **{f"{kind}_within_{px}px": "share" for kind in ("moving", "still") for px in WITHIN},
    **{f"{kind}_trusted_{name}_px": "px of 240x320" for kind in ("moving", "still") for name in ("median", "p95")},
    **{f"{kind}_trusted": "share" for kind in ("moving", "still")},
    "visibility_agreement": "share",
    "hidden_found": "share",
    "visible_kept": "share",
}


@dataclass(slots=True)
class Window:
    """``episode``: its place among the recorded ones, ``video_THWC`` uint8, ``truth``: exact tracks."""

    episode: int
    number: int
    video_THWC: NDArray[np.uint8]
    truth: PointTracks


@dataclass(slots=True)
class Found:
    """What one window gives, an entry a point and frame: errors (pixels) of truly visible points with the tracker's own flag,
    moving and still, and the two visibilities of every point on something."""

    moving: NDArray[np.float32]
    moving_trusted: NDArray[np.bool_]
    still: NDArray[np.float32]
    still_trusted: NDArray[np.bool_]
    true_visible: NDArray[np.bool_]
    called_visible: NDArray[np.bool_]


#: From a window to points [T,N,2] and visible [T,N].
Answer = Callable[[Window], tuple[NDArray[np.float32], NDArray[np.bool_]]]


def record(task: str, seed: int, episode: int) -> list[Window]:
    """The windows of an expert episode."""
    env = gymnasium.make(f"RoboTwin/{task}-v0", disable_env_checker=True)
    recorder = EpisodeRecorder(ground_truth="full")
    try:
        record_expert(env.unwrapped, seed, recorder, hold_frames=1)
    finally:
        env.close()
    truth, pictures, maps = recorder.ground_truth(), np.stack(recorder.images["head"]), {}
    windows = []
    for number, start in enumerate(range(0, truth.num_frames - STRIDE * (FRAMES - 1), EVERY)):
        frames = start + STRIDE * np.arange(FRAMES)
        windows.append(Window(episode, number, pictures[frames], point_tracks(truth, frames, maps=maps)))
    return windows


def by_tracker(tracker: PointTracker) -> Answer:
    def answer(window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        queries = torch.from_numpy(window.truth.points_TN2[:1])
        tracks = tracker.track(torch.from_numpy(window.video_THWC)[None], queries)
        return tracks.points_BTN2[0].numpy(), tracks.visible_BTN[0].numpy()

    return answer


def by_degrading(window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    tracks = degrade(window.truth, np.random.default_rng([window.episode, window.number]))
    return tracks.points_TN2, tracks.visible_TN


def unmoved(window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    points = np.broadcast_to(window.truth.points_TN2[:1], window.truth.points_TN2.shape)
    return points, np.ones_like(window.truth.visible_TN)


def compare(truth: PointTracks, points_TN2: NDArray[np.float32], visible_TN: NDArray[np.bool_]) -> Found:
    known = truth.depth_N > 0
    moved = np.linalg.norm(truth.points_TN2 - truth.points_TN2[:1], axis=-1).max(0) > MOVING_PX
    error = np.linalg.norm(points_TN2 - truth.points_TN2, axis=-1)[1:]
    seen, called = truth.visible_TN[1:], visible_TN[1:]
    parts = []
    for kind in (known & moved, known & ~moved):
        pick = seen & kind
        parts += [error[pick], called[pick]]
    return Found(*parts, true_visible=seen[:, known].ravel(), called_visible=called[:, known].ravel())


def numbers(found: list[Found]) -> dict[str, float]:
    """The values of ``UNITS``; NaN where there is nothing to count."""

    def joined(name: str) -> NDArray:
        return np.concatenate([getattr(one, name) for one in found])

    values: dict[str, float] = {}
    with np.errstate(invalid="ignore"):
        for kind in ("moving", "still"):
            error, trusted = joined(kind), joined(f"{kind}_trusted")
            values[f"{kind}_median_px"], values[f"{kind}_p95_px"] = quantile(error, 0.5), quantile(error, 0.95)
            values[f"{kind}_trusted_median_px"] = quantile(error[trusted], 0.5)
            values[f"{kind}_trusted_p95_px"] = quantile(error[trusted], 0.95)
            values[f"{kind}_trusted"] = share(trusted)
            values |= {f"{kind}_within_{px}px": share(error < px) for px in WITHIN}
    true, called = joined("true_visible"), joined("called_visible")
    values["visibility_agreement"] = share(true == called)
    values["hidden_found"], values["visible_kept"] = share(~called[~true]), share(called[true])
    return values


def quantile(values: NDArray, level: float) -> float:
    return float(np.quantile(values, level)) if len(values) else float("nan")


def share(flags: NDArray[np.bool_]) -> float:
    return float(flags.mean()) if len(flags) else float("nan")


def intervals(found: list[list[Found]]) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals; ``found``: the windows of each episode."""
    generator = np.random.default_rng(0)
    draws = [
        numbers([one for place in generator.integers(0, len(found), len(found)) for one in found[place]])
        for _ in range(DRAWS)
    ]
    bounds = {name: np.nanquantile([draw[name] for draw in draws], [0.025, 0.975]) for name in UNITS}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def main() -> int:
    options = parse()
    answers: dict[str, Answer] = {"classical": by_tracker(ClassicalTracker()), "degraded": by_degrading}
    if options.cotracker_checkpoint:
        tracker = CoTracker3(
            options.cotracker_checkpoint,
            options.cotracker_sha256,
            source=options.cotracker_source,
            device=options.device,
        )
        answers["cotracker3"] = by_tracker(tracker)
    jobs = [(task, seed) for task in options.tasks for seed in options.seeds]
    episodes = [record(task, seed, place) for place, (task, seed) in enumerate(jobs)]
    print(f"{len(jobs)} episodes, {sum(map(len, episodes))} windows of {FRAMES} frames", flush=True)
    still = numbers([compare(one.truth, *unmoved(one)) for windows in episodes for one in windows])
    shared: dict[str, Any] = {"n": len(jobs), "seeds": options.seeds, "provenance": machine_provenance()}
    shared["command"] = command(options)
    lines = []
    for name, answer in answers.items():
        begun = time.perf_counter()
        found = [[compare(one.truth, *answer(one)) for one in windows] for windows in episodes]
        seconds = (time.perf_counter() - begun) / sum(map(len, episodes))
        bounds, values = intervals(found), numbers([one for windows in found for one in windows])
        print(f"\n{name}: {seconds:.2f} s a window")
        for claim, unit in UNITS.items():
            low, high = bounds[claim]
            by_task = [
                f"{task} {numbers([one for job, part in zip(jobs, found) if job[0] == task for one in part])[claim]:.3g}"
                for task in options.tasks
            ]
            print(
                f"  {claim:24} {values[claim]:.3f} ({low:.3f}..{high:.3f}) unmoved {still[claim]:.3f}; {', '.join(by_task)}"
            )
            against = {"unmoved": still[claim], "windows": sum(map(len, episodes))}
            path = f"teachers/{name}/{claim}"
            lines.append(measurement(path, values[claim], unit=unit, low=low, high=high, against=against, **shared))
    if options.json:
        write_measurements(options.json, lines)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument(
        "--cotracker-checkpoint", type=Path, help="scaled_offline.pth; without it CoTracker3 is left out"
    )
    parser.add_argument("--cotracker-sha256", default=PUBLISHED_SHA256)
    parser.add_argument("--cotracker-source", type=Path, help="folder with the package cotracker (the installed one)")
    parser.add_argument("--device", default="cpu", help="where CoTracker3 runs")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    return parser.parse_args()


def command(options: argparse.Namespace) -> str:
    """The command without folders of one machine."""
    words = [
        f"python benchmarks/trackers.py --tasks {' '.join(options.tasks)} --seeds {' '.join(map(str, options.seeds))}"
    ]
    if options.cotracker_checkpoint:
        words.append(f"--cotracker-checkpoint {options.cotracker_checkpoint.name} --device {options.device}")
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
