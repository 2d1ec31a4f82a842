"""``benchmarks/perfect_model.py``: what becomes of finished and crashed episodes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from physisforcing.core.stats import wilson

ABOUT = {"commit": "c1", "hardware": "a GPU", "versions": {}, "date": "d"}


@pytest.fixture
def benchmark_module(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module("perfect_model")


def row(seed: int, status: str, **more: Any) -> dict[str, Any]:
    found = {"seed": seed, "status": status, "success": status == "success", "steps": 9, "assets": "pack", "reason": ""}
    return found | {"provenance": ABOUT, "error": "it died" if status == "error" else ""} | more


def test_crashed_episodes_stand_in_no_denominator(benchmark_module: Any) -> None:
    settings = benchmark_module.Settings(error=0.0, execute=32, decoder="", device="cpu")
    rows = [row(100_000, "success"), row(100_001, "failure", reason="still trying"), row(100_002, "error")]
    rows[1]["provenance"] = ABOUT | {"commit": "c2"}
    line = benchmark_module.success_line("t", rows, settings, "exact", "x")
    assert (line["value"], line["n"], line["seeds"]) == (0.5, 2, "100000-100001") and (
        line["low"],
        line["high"],
    ) == wilson(1, 2)
    assert line["against"]["crashed, in no denominator"] == [100_002] and line["against"]["failures"] == {
        "still trying": 1
    }
    assert line["hardware"] == "a GPU" and line["against"]["episodes by commit"] == {"c1": 1, "c2": 1}
    assert "episodes by hardware" not in line["against"]
    assert benchmark_module.success_line("t", [row(1, "error")], settings, "exact", "x") is None
    assert benchmark_module.success_line("t", [], settings, "exact", "x") is None


def test_errors_of_decoded_rows_add_up(benchmark_module: Any) -> None:
    """Sums of squares of two episodes give the RMSE of all their rows."""
    generator = np.random.default_rng(0)
    parts = [generator.normal(size=(rows, 14)) for rows in (3, 5)]
    found = benchmark_module.decoded_errors([benchmark_module.squares(part) for part in parts] + [{}])
    every = np.concatenate(parts)
    joints = np.rad2deg(every[:, [k for k in range(14) if k not in (6, 13)]])
    assert found["decoded_deg"] == pytest.approx(np.sqrt((joints**2).mean()))
    assert found["decoded_gripper"] == pytest.approx(np.sqrt((every[:, [6, 13]] ** 2).mean()))
    assert benchmark_module.decoded_errors([{}]) == {}


def test_errors_are_told_apart_by_outcome(benchmark_module: Any) -> None:
    settings = benchmark_module.Settings(error=0.0, execute=32, decoder="shipped", device="cpu")
    errors = {"success": {"deg": [4.0, 4], "gripper": [0.01, 1]}, "failure": {"deg": [36.0, 4], "gripper": [0.25, 1]}}
    rows = [row(seed, outcome, **errors[outcome]) for seed, outcome in enumerate(("success", "failure", "failure"))]
    about = benchmark_module.success_line("t", rows, settings, "decoder", "x")["against"]
    assert about["decoded_deg where it succeeded"] == 1 and about["decoded_deg where it failed"] == 3
    assert about["decoded_gripper where it succeeded"] == pytest.approx(0.1)
    assert about["decoded_gripper where it failed"] == 0.5
    assert about["decoded_deg"] == pytest.approx(np.sqrt(76 / 12))
    rows[1] |= {"plans_deg": [5.0, 9.0]}
    rows[2] |= {"plans_deg": [2.0], "deg": [4.0, 4]}
    about = benchmark_module.success_line("t", rows, settings, "decoder", "x")["against"]
    assert about["decoded_deg, median of first plans where it failed"] == 3.5
    assert about["decoded_deg, median of episodes where it failed"] == 2.0
    assert about["decoded_deg, median of episodes where it succeeded"] == 1.0
    alone = benchmark_module.success_line("t", rows[1:], settings, "decoder", "x")["against"]
    assert "decoded_deg" in alone and not any("where it" in name for name in alone)
