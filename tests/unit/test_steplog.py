"""The log's lines are the same in metrics.jsonl, in TensorBoard and, where a project is named, at Weights & Biases."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from physisforcing.worldmodel.training import steplog
from physisforcing.worldmodel.training.steplog import StepLog


class Project(types.ModuleType):
    """Stands for the package wandb: keeps what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.begun: list[dict[str, Any]] = []
        self.told: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **words: Any) -> Project:
        self.begun.append(words)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def write(run: Path, first: int, last: int, **words: Any) -> None:
    log = StepLog(run, steps=last, batch=4, device=torch.device("cpu"), done=first, **words)
    for step in range(first, last):
        log.add({"loss": torch.tensor(1.0 / (step + 1)), "grad_norm": torch.tensor(2.0)}, wait_s=0.0)
        log.line(step + 1, lr=1e-3)
    log.event({"step": last, "heldout_loss": 0.25, "note": "words are no numbers"})
    log.close()


def test_every_number_of_every_line_is_in_tensorboard_and_told_to_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project()
    monkeypatch.setitem(sys.modules, "wandb", project)
    write(tmp_path, 0, 3, wandb="physis")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    numbers = [{k: v for k, v in line.items() if isinstance(v, float)} for line in lines]
    assert [line["step"] for line in lines] == [1, 2, 3, 3] and numbers[-1] == {"heldout_loss": 0.25}
    assert project.told == [(line["step"], found) for line, found in zip(lines, numbers, strict=True)]
    assert project.begun[0]["project"] == "physis" and project.finished == 1
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == set().union(*numbers)
    for name in board.Tags()["scalars"]:
        shown = [(event.step, event.value) for event in board.Scalars(name)]
        wanted = [(line["step"], found[name]) for line, found in zip(lines, numbers, strict=True) if name in found]
        assert [step for step, _ in shown] == [step for step, _ in wanted]
        assert [value for _, value in shown] == pytest.approx([value for _, value in wanted], rel=1e-6)


def test_a_continued_run_drops_the_lines_that_are_made_again(tmp_path: Path) -> None:
    write(tmp_path, 0, 4)
    write(tmp_path, 2, 5)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 5]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5]
    write(tmp_path, 0, 2)  # killed before its first checkpoint, it begins anew
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2]


def test_without_tensorboard_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("physisforcing.worldmodel.training.steplog._has_tensorboard", lambda: False)
    write(tmp_path, 0, 1)
    assert "metrics.jsonl alone" in capsys.readouterr().err and not (tmp_path / "tensorboard").exists()


def test_what_is_measured_shown_or_saved_between_two_lines_is_no_part_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(steplog.time, "perf_counter", lambda: clock[0])
    log = StepLog(tmp_path, steps=9, batch=6, device=torch.device("cpu"))

    def update(seconds: float) -> None:
        clock[0] += seconds
        log.add({"loss": torch.tensor(1.0)}, wait_s=0.5)

    with log.paused():  # held-out values before the first update
        clock[0] += 70.0
        log.event({"step": 0, "heldout_loss": 2.0})
    update(2.0)
    with log.paused():  # between the updates of one line
        clock[0] += 30.0
        log.event({"step": 1, "heldout_loss": 2.0})
    update(4.0)
    line = log.line(2, lr=0.1)
    assert line["step_ms"] == pytest.approx(3000.0) and line["clips_per_s"] == pytest.approx(2.0)
    assert line["data_wait_pct"] == pytest.approx(100.0 / 6.0) and line["eta_s"] == pytest.approx(21.0)
    log.event({"step": 2, "note": "a line alone"})
    update(5.0)
    assert log.line(3, lr=0.1)["step_ms"] == pytest.approx(5000.0)
    log.close()


def test_a_step_whose_update_is_skipped_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(steplog.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(steplog, "peak_flops", lambda _device: 1e6)
    log = StepLog(tmp_path, steps=40, batch=1, device=torch.device("cpu"))

    def steps(kinds: str) -> None:
        for kind in kinds:
            clock[0] += 1.0
            if kind == "s":
                log.skip({"step": 0, "skipped": 1}, wait_s=0.25)
            else:
                log.add({"loss": torch.tensor(3.0)}, wait_s=0.25, operations=1e5)

    steps("ussssssss")
    line = log.line(9, lr=0.1)
    assert line["step_ms"] == pytest.approx(1000.0) and line["loss"] == 3.0
    assert line["data_wait_pct"] == pytest.approx(25.0) and line["mfu_pct"] == pytest.approx(10.0)
    steps("ssss")
    assert log.line(13, lr=0.1) == {}, "none of them has a loss"
    steps("uuuu")
    line = log.line(17, lr=0.1)
    assert line["step_ms"] == pytest.approx(1000.0) and line["eta_s"] == pytest.approx(23.0)
    assert line["clips_per_s"] == pytest.approx(1.0) and line["data_wait_pct"] == pytest.approx(25.0)
    log.close()
