"""A decoder's errors, made: their size, their smoothness, and that the episode's seed alone decides them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from physisforcing.envs.perfect_planner import SmoothErrors


def planner():
    names = [
        *(f"left_joint_{k}" for k in range(6)),
        "left_gripper",
        *(f"right_joint_{k}" for k in range(6)),
        "right_gripper",
    ]
    spec = SimpleNamespace(action_spec=SimpleNamespace(names=names))
    still = SimpleNamespace(
        fingerprint="perfect", reset=lambda **about: None, telemetry=dict, model=SimpleNamespace(spec=spec)
    )
    still.act = lambda observation: np.zeros((4000, 14), np.float32)
    return still


def errors(policy, seed):
    policy.reset(task="t", seed=seed, instruction="")
    return policy.act(None)


def test_size_and_smoothness():
    made_PA = errors(SmoothErrors(planner(), 2.0), 5)
    joints = np.degrees(np.delete(made_PA, [6, 13], axis=1))
    assert joints.std(0) == pytest.approx(np.full(12, 2.0), rel=0.15)
    assert made_PA[:, [6, 13]].std(0) == pytest.approx(np.full(2, 0.02), rel=0.15)
    # a Gaussian kernel of deviation 2 steps: neighbours correlate with exp(-1/16), ten steps apart hardly at all
    together = [np.mean(joints[lag:] * joints[: len(joints) - lag]) / joints.var() for lag in (1, 10)]
    assert together[0] == pytest.approx(np.exp(-1 / 16), abs=0.02) and abs(together[1]) < 0.1


def test_the_seed_decides():
    policy = SmoothErrors(planner(), 3.0, vary=True)
    first, deviation = errors(policy, 1), policy.telemetry()["error_deg"]
    assert np.array_equal(first, errors(policy, 1)) and not np.array_equal(first, errors(policy, 2))
    sizes = []
    for seed in range(200):
        policy.reset(task="t", seed=seed, instruction="")
        sizes.append(policy.telemetry()["error_deg"])
    assert 0 < min(sizes) < 0.2 and 2.8 < max(sizes) < 3 and np.mean(sizes) == pytest.approx(1.5, abs=0.15)
    assert np.degrees(np.delete(first, [6, 13], axis=1)).std() == pytest.approx(deviation, rel=0.1)
    assert policy.fingerprint != SmoothErrors(planner(), 3.0).fingerprint
    policy.reset(task="another", seed=1, instruction="")
    assert policy.telemetry()["error_deg"] != deviation
