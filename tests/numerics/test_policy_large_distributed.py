"""A policy on a tiny large backbone in two gloo processes against one: the same losses and weights, spread or whole, and exact checkpoints.

Two processes sum what one sums in another order: LOSS and WEIGHT as in ``test_policy_distributed.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny_large_policy
from physisforcing.policy.checkpoint import load_policy
from physisforcing.worldmodel.storage import latents_fingerprint
from physisforcing.worldmodel.training.checkpoint import load_training
from ranks import run_script, update_lines
from two_large_policies import CASES, train

LOSS, WEIGHT = 1e-4, 2e-3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all runs of this file."""
    folder = tmp_path_factory.mktemp("runs")
    model = tiny_large_policy.pipeline(folder)
    tiny_large_policy.store(folder / "store", latents=latents_fingerprint(model / "vae"))
    for case in CASES:
        train(folder, case, f"one-{case}")
    run_script("two_large_policies.py", folder, timeout=600)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_losses_and_weights_are_those_of_one_process(runs: Path, case: str) -> None:
    """Also of weights that are drawn, whose every block both processes draw alike."""
    one, two = update_lines(runs / f"one-{case}"), update_lines(runs / f"two-{case}")
    assert len(one) == len(two) == (1 if case in ("drawn", "spread") else 2)
    terms = ("loss", "action", "grad_norm") + (("video",) if case in ("full", "drawn") else ())
    for first, second in zip(one, two, strict=True):
        assert {name: second[name] for name in terms} == pytest.approx({n: first[n] for n in terms}, rel=LOSS, abs=1e-6)
    weights = [load_training(runs / f"{count}-{case}" / "last")[0]["weights"] for count in ("one", "two")]
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) > 100
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=WEIGHT, msg=lambda m, n=name: f"{n}: {m}")
    before, after = (json.loads((runs / f"{n}-{case}" / "heldout.json").read_text())["after"] for n in ("one", "two"))
    assert after == pytest.approx(before, rel=2e-3, abs=1e-5)


def test_going_on_is_bit_equal_and_may_be_in_another_number_of_processes(runs: Path) -> None:
    whole, halves = (load_training(runs / name / "last")[0] for name in ("two-full", "halves-full"))
    for group in ("weights", "optimizer", "rng"):
        assert whole[group].keys() == halves[group].keys()
        assert all(torch.equal(value, halves[group][name]) for name, value in whole[group].items()), group
    other, one = (load_training(runs / name / "last")[0]["weights"] for name in ("one-to-two", "one-full"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=WEIGHT, msg=lambda m, n=name: f"{n}: {m}")


def test_the_first_process_exports_whole_weights(runs: Path) -> None:
    state = load_policy(runs / "two-full" / "export")[0].state_dict()
    weights = load_training(runs / "two-full" / "last")[0]["weights"]
    rounded = 0
    for name, value in weights.items():
        kept = state[name.removeprefix("policy.")]
        exact = torch.equal(kept, value)
        rounded += not exact
        assert exact or torch.equal(kept, value.bfloat16().float()), name
    assert rounded > 60 and len(weights) == len(state)


def test_what_is_trained_is_spread_and_frozen_weights_where_it_is_asked_for(runs: Path) -> None:
    for case, spread in (("full", True), ("frozen", False), ("spread", True)):
        parts = [json.loads((runs / f"parts-{case}-{rank}.json").read_text()) for rank in (0, 1)]
        for name, (mine, all_of_it, is_shard) in parts[0].items():
            apart = spread and not name.startswith("proprioception.")
            assert is_shard == apart and mine + parts[1][name][0] == all_of_it * (1 if apart else 2), (case, name)
