"""A policy trained in two gloo processes, its weights spread over both, against one process: the same losses, and exact checkpoints.

Two processes sum what one sums in another order, so weights agree within float32 rounding that Adam's first steps enlarge: LOSS and
WEIGHT below. Going on from a checkpoint is held to equal bits.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from physisforcing.policy.checkpoint import load_policy
from physisforcing.worldmodel.training.checkpoint import load_training
from ranks import run_script, update_lines
from two_policies import STEPS, train

#: Relative difference of logged losses, and absolute difference of weights, after the updates at a learning rate of 0.01.
LOSS, WEIGHT = 1e-4, 2e-3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all runs of this file."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("one", "one_actions"):
        train(folder, name)
    run_script("two_policies.py", folder, timeout=600)
    return folder


def same(one: Path, two: Path) -> None:
    first, second = load_training(one)[0], load_training(two)[0]
    assert {group: set(values) for group, values in first.items()} == {g: set(v) for g, v in second.items()}
    for group, values in first.items():
        assert all(torch.equal(value, second[group][name]) for name, value in values.items()), group


def close(one: Path, two: Path) -> None:
    first, second = load_training(one)[0], load_training(two)[0]
    for group in ("weights", "average"):
        assert first[group].keys() == second[group].keys()
        for name, value in first[group].items():
            torch.testing.assert_close(
                value, second[group][name], rtol=0, atol=WEIGHT, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("kind", ["", "_actions"])
def test_losses_norms_and_weights_are_those_of_one_process(runs: Path, kind: str) -> None:
    one, two = update_lines(runs / f"one{kind}"), update_lines(runs / f"two{kind}")
    assert len(one) == len(two) == STEPS
    terms = ("loss", "action", "grad_norm") + (() if kind else ("video", "pix", "sem", "pairs", "related"))
    for first, second in zip(one, two, strict=True):
        for term in terms:
            assert second[term] == pytest.approx(first[term], rel=LOSS, abs=1e-6), (term, first["step"])
        assert ("video" in first) == (not kind)
    assert one[0]["loss"] != one[-1]["loss"]
    close(runs / f"one{kind}" / "last", runs / f"two{kind}" / "last")
    before, after = (json.loads((runs / f"{n}{kind}" / "heldout.json").read_text())["after"] for n in ("one", "two"))
    assert after == pytest.approx(before, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["two_actions", "whole_actions"])
def test_what_nothing_reads_stays_as_it_was(runs: Path, name: str) -> None:
    """Of the last block's video, with weights spread and not: no weight decay and no states, as in one process."""
    one, two = (load_training(runs / run / "last")[0] for run in ("one_actions", name))
    assert one["optimizer"].keys() == two["optimizer"].keys()
    unread = [key for key in one["weights"] if ".blocks.1." in key and ".action." not in key]
    unread = [key for key in unread if key.endswith("weight") and ("attn2" in key or "ffn" in key or "to_q" in key)]
    assert len(unread) > 6 and all(torch.equal(one["weights"][key], two["weights"][key]) for key in unread)
    close(runs / "one_actions" / "last", runs / name / "last")


def test_the_weights_were_spread(runs: Path) -> None:
    assert len(list((runs / "two" / "last" / "training").glob("shard-*"))) == 2


@pytest.mark.parametrize("kind", ["", "_actions"])
def test_resume_on_two_processes_is_bit_equal(runs: Path, kind: str) -> None:
    same(runs / f"two{kind}" / "last", runs / f"halves{kind}" / "last")


def test_checkpoints_go_on_in_another_number_of_processes(runs: Path) -> None:
    close(runs / "one" / "last", runs / "one_to_two" / "last")
    train(runs, "two_to_one", source="two")
    close(runs / "two" / "last", runs / "two_to_one" / "last")


def test_the_first_process_exports_the_whole_average(runs: Path) -> None:
    average = load_training(runs / "two" / "last")[0]["average"]
    state = load_policy(runs / "two" / "last" / "model")[0].state_dict()
    trained = {name.removeprefix("policy."): value for name, value in average.items() if name.startswith("policy.")}
    assert set(trained) <= set(state) and len(trained) > 80
    assert all(torch.equal(value, state[name]) for name, value in trained.items())
    half = load_policy(runs / "two" / "export")[0].state_dict()
    assert all(torch.equal(value.half().float(), half[name]) for name, value in trained.items())
    assert (runs / "two" / "export" / "statistics.json").read_bytes() == (
        runs / "one" / "export" / "statistics.json"
    ).read_bytes()
