"""Behaviour that is not the expert's: its path up to some step, then smooth random joint targets.

A model that is to foresee what actions do has to see actions that miss, push and drop things, from the states that demonstrations
pass through.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.types import ActionSpec

from .recording import EpisodeRecorder, expert_targets, hold

#: The expert's part is at least this share of its path (before it the arms are hardly in the picture), and control steps behind it.
EARLIEST, TAIL_STEPS = 1 / 6, 48
#: A random goal is approached in so many control steps (first and last possible number).
APPROACH_STEPS = (8, 20)
#: A goal lies up to so many radians a joint from where the arm is; with the shortest approach that is 0.12 rad a step, the expert's own
#: limit. An arm gets a new goal with this probability, else it waits.
REACH_RAD, MOVES = 0.6, 0.75
#: Gripper opening a step, the expert's limit, and how often a gripper gets a new goal.
GRIPPER_STEP, GRIPS = 0.08, 0.35


def random_targets(
    start_A: NDArray[np.floating[Any]], rows: int, spec: ActionSpec, generator: np.random.Generator
) -> NDArray[np.float32]:
    """Drive targets [rows,A] of the control steps behind ``start_A``: random goals one after the other, each approached along half a
    cosine, inside the limits of ``spec``. Columns are grippers where their name says so, else joints of the side it begins with."""
    low, high = np.array(spec.low), np.array(spec.high)
    grips = np.array([name.endswith("gripper") for name in spec.names])
    sides = np.array([name.split("_")[0] for name in spec.names])
    now, made = np.asarray(start_A, dtype=np.float64), []
    while len(made) < rows:
        steps = int(generator.integers(APPROACH_STEPS[0], APPROACH_STEPS[1] + 1))
        goal = now.copy()
        for side in dict.fromkeys(sides.tolist()):
            arm = (sides == side) & ~grips
            offset = generator.uniform(-REACH_RAD, REACH_RAD, arm.sum())
            goal[arm] += offset * (generator.random() < MOVES)
            hand = (sides == side) & grips
            wanted = generator.uniform(0.0, 1.0, hand.sum())
            # half a cosine is pi/2 times as fast as a straight line
            far = GRIPPER_STEP * steps * 2 / np.pi
            goal[hand] += np.clip(wanted - goal[hand], -far, far) * (generator.random() < GRIPS)
        goal = goal.clip(low, high)
        share = 0.5 - 0.5 * np.cos(np.pi * np.arange(1, steps + 1) / steps)
        made.extend(now + share[:, None] * (goal - now))
        now = goal
    return np.stack(made[:rows]).astype(np.float32)


def record_diverted_expert(
    env: Any, seed: int, recorder: EpisodeRecorder, *, hold_frames: int = 4, tail_steps: int = TAIL_STEPS
) -> dict[str, Any]:
    """The expert's targets replayed through ``step`` up to a random step, then ``random_targets``, then hold.

    Success is what the task's check said until the end, the expert's part included: an episode that is diverted after the task was done
    has succeeded.
    """
    targets_TA = expert_targets(env, seed)
    _, info = env.reset(seed=seed, options={"observe": False})
    task = int.from_bytes(hashlib.sha256(env.task_name.encode()).digest()[:4], "big")
    generator = np.random.default_rng([seed, task, 0x726E])
    kept = int(generator.integers(int(EARLIEST * len(targets_TA)), len(targets_TA)))
    spec = env.action_spec
    tail_PA = random_targets(targets_TA[kept], tail_steps, spec, generator)
    recorder.frame(env)
    for target_A in np.concatenate([targets_TA[1 : kept + 1], tail_PA]).clip(spec.low, spec.high).astype(np.float32):
        env.step_blind(target_A)
        recorder.frame(env)
    hold(env, recorder, hold_frames)
    return info
