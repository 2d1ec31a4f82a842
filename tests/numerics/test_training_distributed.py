"""A run in two gloo processes against one process: the same samples and losses, exact checkpoints, and an end with the first that dies;
and one process that is killed again and again.

Two processes sum what one sums in another order, so weights agree within float32 rounding that Adam's first steps enlarge: LOSS and
WEIGHT below. Everything that only moves numbers (checkpoints, other numbers of processes) is held to equal bits.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from killed_lives import KILLS, steps_for
from physisforcing.core.errors import UserError
from physisforcing.worldmodel.backbones.wan import load_denoiser
from physisforcing.worldmodel.data.batches import step_generator
from physisforcing.worldmodel.flow_matching import FlowMatchingConfig
from physisforcing.worldmodel.training.checkpoint import is_complete, latest_checkpoint, load_training
from physisforcing.worldmodel.training.objective import draw_noise
from physisforcing.worldmodel.training.processes import Processes
from physisforcing.worldmodel.training.worldmodel import Trainer, train_world_model
from ranks import run_script, update_lines
from two_processes import BATCH, KILLED_PAIRS, LASTING, half_empty, settings, spoiled

#: Relative difference of logged losses, and absolute difference of weights, after ten updates at a learning rate of 0.01.
LOSS, WEIGHT = 1e-4, 2e-3

try:
    import peft  # noqa: F401

    PEFT = True
except ImportError:
    PEFT = False


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with all runs of this file."""
    folder = tmp_path_factory.mktemp("runs")
    train_world_model(settings(folder, "one"), half_empty())
    train_world_model(*spoiled(folder))
    base = str(folder / "one" / "step-000010" / "model") if PEFT else ""
    if PEFT:
        train_world_model(settings(folder, "one_lora", base=base), half_empty())
    run_script("two_processes.py", folder, base, timeout=1200)
    return folder


def same(one: Path, two: Path) -> bool:
    first, second = load_training(one)[0], load_training(two)[0]
    assert {group: set(values) for group, values in first.items()} == {g: set(v) for g, v in second.items()}
    return all(torch.equal(value, second[group][key]) for group in first for key, value in first[group].items())


def close(one: Path, two: Path) -> None:
    first, second = load_training(one)[0], load_training(two)[0]
    for group in ("weights", "average"):
        assert first[group].keys() == second[group].keys()
        for name, value in first[group].items():
            torch.testing.assert_close(
                value, second[group][name], rtol=0, atol=WEIGHT, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("name", ["", pytest.param("_lora", marks=pytest.mark.skipif(not PEFT, reason="needs peft"))])
def test_losses_norms_and_weights_are_those_of_one_process(runs, name):
    one, two = update_lines(runs / f"one{name}"), update_lines(runs / f"two{name}")
    assert len(one) == len(two) == 10
    for first, second in zip(one, two, strict=True):
        for term in ("loss", "fm", "pix", "sem", "grad_norm", "pairs", "related", "valid", "tokens", "epe_px"):
            assert second[term] == pytest.approx(first[term], rel=LOSS, abs=1e-6), (term, first["step"])
    assert any(line["pix"] > 0 for line in one) and one[0]["loss"] != one[-1]["loss"]
    close(runs / f"one{name}" / "last", runs / f"two{name}" / "last")
    before, after = (json.loads((runs / f"{n}{name}" / "heldout.json").read_text())["after"] for n in ("one", "two"))
    assert after == pytest.approx(before, rel=2e-3, abs=1e-5)


def test_each_process_computes_its_part_of_the_same_batches(runs):
    bank = half_empty()[0]
    trainer = Trainer(settings(runs, "rows"), bank, torch.device("cpu"))
    parts = [json.loads((runs / f"two-rows{rank}.json").read_text()) for rank in (0, 1)]
    drawn = [trainer.rows(step).tolist() for step in range(10)]
    assert [first + second for first, second in zip(*parts, strict=True)] == drawn
    without = [not bool((bank.targets.row_W[torch.tensor(rows)] >= 0).any()) for rows in parts[0] + parts[1]]
    assert any(without) and not all(without), "at some step one process has no targets at all"


def test_the_noise_of_a_sample_does_not_depend_on_the_number_of_processes():
    flow, whole = FlowMatchingConfig(), torch.Size((BATCH, 4, 3, 4, 5))
    drawn = draw_noise((BATCH, 4, 3, 4, 5), flow, step_generator(3, 7))
    assert all(torch.equal(a, b) for a, b in zip(drawn, draw_noise(whole, flow, step_generator(3, 7)), strict=True))


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"run\.batch.*multiple of the 4 processes.*run\.batch=8"):
        Processes(world=4).share(6)
    assert [Processes(world=4, rank=rank).share(8) for rank in (0, 3)] == [slice(0, 2), slice(6, 8)]


def test_resume_on_two_processes_is_bit_equal(runs):
    assert same(runs / "two" / "step-000010", runs / "halves" / "step-000010")


def test_a_signal_to_one_process_saves_and_ends_both(runs):
    assert (runs / "told" / "step-000004" / "COMPLETE").is_file()
    assert same(runs / "two" / "step-000010", runs / "told" / "step-000010")


def test_what_is_not_finite_in_one_process_is_skipped_by_both(runs):
    states = [load_training(runs / f"{name}_skip" / "last")[1] for name in ("one", "two")]
    assert 0 < states[0]["skipped"] == states[1]["skipped"] < 10
    close(runs / "one_skip" / "last", runs / "two_skip" / "last")
    skipped = [
        [
            json.loads(line)
            for line in (runs / f"{name}_skip" / "metrics.jsonl").read_text().splitlines()
            if '"clips"' in line
        ]
        for name in ("one", "two")
    ]
    assert skipped[0] == skipped[1] and all(len(line["clips"]) == BATCH for line in skipped[0])


def test_recomputed_blocks_under_sharding_give_the_same_bits(runs):
    assert same(runs / "two" / "step-000010", runs / "recomputed" / "step-000010")


def test_a_checkpoint_of_one_process_is_loaded_exactly_by_two_and_goes_on(runs):
    again = runs / "again" / "step-000005"
    assert len(list((again / "training").glob("shard-*"))) == 2
    assert same(runs / "one" / "step-000005", again)
    close(runs / "one" / "step-000010", runs / "one_to_two" / "step-000010")


def test_a_checkpoint_of_two_processes_is_loaded_exactly_by_one_and_goes_on(runs):
    made = settings(runs, "two_to_one")
    trainer = Trainer(made, half_empty()[0], torch.device("cpu"))
    done = trainer.restore(runs / "two" / "step-000005")
    assert same(runs / "two" / "step-000005", trainer.save(runs / "two_to_one", done))
    train_world_model(made, half_empty())
    close(runs / "two" / "step-000010", runs / "two_to_one" / "step-000010")


def test_the_first_process_exports_the_whole_average(runs):
    average = load_training(runs / "two" / "last")[0]["average"]
    state = load_denoiser(runs / "two" / "last" / "model").state_dict()
    trained = {name.removeprefix("denoiser."): value for name, value in average.items() if name.startswith("denoiser.")}
    assert set(trained) <= set(state) and len(trained) > 40
    assert all(torch.equal(value, state[name]) for name, value in trained.items())
    assert sorted(p.name for p in (runs / "two" / "export").iterdir()) == sorted(
        p.name for p in (runs / "one" / "export").iterdir()
    )


def test_a_killed_process_ends_the_others_and_the_run_goes_on_to_the_weights_of_one_that_was_left_alone(runs):
    trials = json.loads((runs / "killed.json").read_text())
    assert len(trials) == KILLED_PAIRS
    for trial in trials:
        assert os.WTERMSIG(trial["ended"][trial["killed"]]) == 9
        assert os.waitstatus_to_exitcode(trial["ended"][1 - trial["killed"]]) not in (0, -9)
        assert trial["kept"] >= trial["seen"] >= trial["start"], trial
        assert (trial["seen"] == trial["start"]) is (trial["how"] == "before a save"), trial
    assert {trial["how"] for trial in trials} == {"after a save", "in a save", "before a save"}
    assert trials[-1]["kept"] < f"step-{LASTING:06d}", "the last life had something to do"
    found = latest_checkpoint(runs / "killed")
    assert found is not None and is_complete(found) and same(found, runs / "unharmed" / "last")
    tensors, state = load_training(found)
    assert state["step"] == LASTING and state["processes"] == 2
    steps = [value for name, value in tensors["optimizer"].items() if name.endswith("/step")]
    assert all(int(value) == LASTING for value in steps)


def test_one_process_killed_at_random_moments_ends_with_the_weights_of_one_that_was_left_alone(runs):
    folder = runs / "alone"
    lives = json.loads((folder / "lives.json").read_text())
    assert len(lives) == KILLS == 20 and all(life["signal"] == 9 for life in lives), lives
    for life in lives:
        assert life["kept"] >= life["seen"] and life["complete"], (
            life
        )  # never older than what was there before the kill
    assert any(life["saving"] for life in lives), "no kill fell into a save"
    assert same(folder / "straight" / "last", folder / "killed" / "last")
    assert load_training(folder / "killed" / "last")[1]["step"] == steps_for(len(lives))
    assert not list((folder / "killed").glob(".writing-*"))
