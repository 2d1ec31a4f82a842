"""What a training does with gradients that are too long or not finite, and when it is told to end."""

import json
import os
import signal

import pytest
import torch
from torch import nn

from physisforcing import cli
from physisforcing.core.config import compose
from physisforcing.core.errors import UserError
from physisforcing.worldmodel.training.checkpoint import latest_checkpoint, load_training
from physisforcing.worldmodel.training.config import TrainWorldModelConfig
from physisforcing.worldmodel.training.stopping import StopSignals, TrainingStopped
from physisforcing.worldmodel.training.worldmodel import Trainer, train_world_model
from tiny_training import bank, config


def bad_row(banks, settings, step: int) -> int:
    """Spoil one window that is first drawn at ``step``; returns its row."""
    trainer = Trainer(settings, banks[0], torch.device("cpu"))
    seen = {row for before in range(step) for row in trainer.rows(before).tolist()}
    row = next(row for row in trainer.rows(step).tolist() if row not in seen)
    banks[0].latents_WCFhw[row, 0, 1] = float("nan")
    return row


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_window(tmp_path):
    banks, settings = (bank(0), bank(1)), config(tmp_path, "run", 12)
    settings.run.save_every = 2
    banks[0].names_E[:] = [f"runs/bell episode {index}" for index in (3, 5, 8, 9)]
    row = bad_row(banks, settings, 3)
    name = banks[0].name(row)
    assert name.startswith("runs/bell episode ") and " from step " in name
    with pytest.raises(FloatingPointError, match=f"step 3: .*{name}") as raised:
        train_world_model(settings, banks)
    assert str(raised.value).count("runs/bell") == settings.run.batch
    assert latest_checkpoint(tmp_path / "run").name == "step-000002"
    assert all(bool(torch.isfinite(v).all()) for v in load_training(tmp_path / "run" / "last")[0]["weights"].values())


def test_a_skipped_update_changes_nothing_but_the_count(tmp_path):
    banks, settings = (bank(0), bank(1)), config(tmp_path, "run", 12)
    settings.run.nonfinite = "skip"
    row = bad_row(banks, settings, 3)
    trainer = Trainer(settings, banks[0], torch.device("cpu"))
    for step in range(3):
        trainer.step(step)

    def state():
        kept = [p.detach().clone() for p in trainer.model.parameters()] + [s.clone() for s in trainer.average.shadow]
        entries = [e.clone() for values in trainer.optimizer.state.values() for e in values.values()]
        return kept + entries

    before = state()
    terms = trainer.step(3)
    assert not torch.isfinite(terms["loss"])
    after = state()
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    record = trainer.guard.take_skipped()
    assert record == {"step": 4, "skipped": 1, "clips": trainer.clips(3)} and banks[0].name(row) in record["clips"]
    trainer.step(4)
    assert any(not torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_run_with_skipped_updates_ends_counts_and_resumes(tmp_path):
    for name, halves in (("straight", [10]), ("halves", [7, 10])):
        banks, settings = (bank(0), bank(1)), config(tmp_path, name, 10)
        settings.run.nonfinite, settings.run.save_every, settings.run.log_every = "skip", 1, 1
        bad_row(banks, settings, 3)
        for end in halves:
            settings.run.resume = True
            if end < 10:
                stop_after(settings, banks, end)
            else:
                train_world_model(settings, banks)
    counts = [
        json.loads((tmp_path / n / "last/training/state.json").read_text())["skipped"] for n in ("straight", "halves")
    ]
    assert counts[0] == counts[1] >= 1
    lines = [json.loads(line) for line in (tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if "clips" in line]
    assert [line["skipped"] for line in skipped] == list(range(1, counts[0] + 1))
    assert all(len(line["clips"]) == 3 for line in skipped)
    assert equal_checkpoints(tmp_path / "straight" / "last", tmp_path / "halves" / "last")


def equal_checkpoints(one, two) -> bool:
    first, second = load_training(one)[0], load_training(two)[0]
    assert first.keys() == second.keys()
    return all(
        first[group].keys() == second[group].keys()
        and all(torch.equal(value, second[group][key]) for key, value in first[group].items())
        for group in first
    )


def stop_after(settings, banks, done: int, number: int = signal.SIGTERM) -> TrainingStopped:
    """Train until a signal comes in update ``done``."""
    original = Trainer.step

    def step(self, number_of_step):
        if number_of_step == done - 1:
            os.kill(os.getpid(), number)
        return original(self, number_of_step)

    Trainer.step = step
    try:
        with pytest.raises(TrainingStopped) as raised:
            train_world_model(settings, banks)
    finally:
        Trainer.step = original
    return raised.value


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_update_under_way_and_the_run_goes_on_bit_equal(tmp_path, number):
    banks = bank(0), bank(1)
    train_world_model(config(tmp_path, "straight", 10), banks)
    settings = config(tmp_path, "told", 10)
    before = signal.getsignal(number)
    stopped = stop_after(settings, banks, 7, number)
    assert signal.getsignal(number) is before
    assert (stopped.done, stopped.exit_code) == (7, 3) and stopped.checkpoint == tmp_path / "told" / "step-000007"
    assert signal.Signals(number).name in str(stopped) and "run.resume=true" in str(stopped)
    settings.run.resume = True
    train_world_model(settings, banks)
    assert equal_checkpoints(tmp_path / "straight" / "last", tmp_path / "told" / "last")


def test_a_second_interrupt_does_not_wait():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.told == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_exit_codes_of_the_command(monkeypatch, capsys, tmp_path):
    from physisforcing.worldmodel.training import worldmodel as module

    ends = {3: TrainingStopped("SIGTERM", 7, 10, tmp_path / "step-000007"), 1: FloatingPointError("step 3: not finite")}
    for code, error in ends.items():

        def ended(config, error=error):
            raise error

        monkeypatch.setattr(module, "train_world_model", ended)
        assert cli.main(["train", "worldmodel", "codec=none"]) == code
        assert str(error) in capsys.readouterr().err
    settings = config(tmp_path, "run", 1)
    settings.run.nonfinite = "ignore"
    with pytest.raises(UserError, match=r"run\.nonfinite"):
        train_world_model(settings, (bank(0), bank(1)))


def test_gradients_are_clipped_to_the_limit_before_the_optimiser_sees_them(tmp_path, monkeypatch):
    """And without the limit the same update would be another one."""
    norms, weights = {}, {}
    for clip in (0.01, 1e9):
        settings = config(tmp_path, f"clip{clip}", 2)
        settings.optim.clip = clip
        trainer = Trainer(settings, bank(0), torch.device("cpu"))
        original = trainer.optimizer.step

        def seen(clip=clip, trainer=trainer, original=original):
            norms[clip] = float(nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()]))
            trainer.optimizer.param_groups[0]["betas"] = (0.0, 0.0)
            original()

        monkeypatch.setattr(trainer.optimizer, "step", seen)
        reported = float(trainer.step(0)["grad_norm"])
        assert reported > 0.01
        assert norms[clip] == pytest.approx(min(clip, reported), rel=1e-4)
        weights[clip] = torch.cat([state["exp_avg"].flatten() for state in trainer.optimizer.state.values()])
    ratio = weights[0.01].norm() / weights[1e9].norm()
    assert float(ratio) == pytest.approx(0.01 / norms[1e9], rel=1e-3) and norms[0.01] <= 0.01


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["optim.clip=0"], r"optim\.clip"),
        (["optim.ema=1.5"], r"optim\.ema"),
        (["optim.beta2=1"], r"optim\.beta2"),
        (["optim.lr=-1"], r"optim\.lr"),
        (["run.batch=0"], r"run\.batch"),
        (["run.steps=0"], r"run\.steps"),
        (["run.log_every=0"], r"run\.log_every"),
        (["run.save_every=0"], r"run\.save_every"),
        (["run.micro=-1"], r"run\.micro"),
        (["lora.rank=-2"], r"lora\.rank"),
    ],
)
def test_settings_with_which_nothing_is_trained_are_refused(words: list[str], field: str) -> None:
    with pytest.raises(UserError, match=f"^{field}: got .*Fix: "):
        compose("train_worldmodel", words, TrainWorldModelConfig)


def test_as_many_checkpoints_stay_as_are_asked_for(tmp_path):
    made = config(tmp_path, "kept", 7)
    made.run.save_every, made.run.keep = 1, 2
    (tmp_path / "kept" / "step-000001-mine").mkdir(parents=True)
    (tmp_path / "kept" / "step-notes.txt").touch()
    made.run.resume = True
    train_world_model(made, (bank(0), bank(1)))
    run = tmp_path / "kept"
    mine = ["step-000001-mine", "step-notes.txt"]
    assert sorted(path.name for path in run.glob("step-*")) == sorted([*mine, "step-000006", "step-000007"])
    assert latest_checkpoint(run) == run / "step-000007" and not list(run.glob(".writing-*"))
    # one that was damaged is no reason to remove what a run goes on from
    (run / "step-000007" / "COMPLETE").unlink()
    trainer = Trainer(made, bank(0), torch.device("cpu"))
    assert latest_checkpoint(run) == run / "step-000006"
    made.run.keep = 1
    trainer.save(run, 5)
    assert (run / "step-000006").is_dir(), "nothing newer than what was saved is removed"
    trainer.save(run, 8)
    kept = sorted(path.name for path in run.glob("step-*"))
    assert kept == sorted([*mine, "step-000007", "step-000008"]), "damaged ones do not count, and stay"
