"""The Pareto benchmark's arithmetic and its report, on made-up episodes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from physisforcing.core.stats import mcnemar, wilson


@pytest.fixture(scope="module")
def report(repository: Path) -> Any:
    sys.path.insert(0, str(repository / "benchmarks"))
    try:
        import plan_pareto_report

        return plan_pareto_report
    finally:
        sys.path.pop(0)


def cell(
    report: Any, steps: int, candidates: int, verifier: str, won: list[int], *, errors: int = 0, resampled: int = 0
) -> Any:
    """Episodes 100000.. of one task; ``won``: 1 for a success. Two plans an episode."""
    telemetry = {"plans": 2.0, "resampled": float(resampled), "imagination_s": 1.0, "decoding_s": 0.5}
    if candidates > 1:
        telemetry |= {"candidates": 2.0 * candidates + resampled * candidates, "verifying_s": 0.5}
    rows = [
        {"task": "bell", "seed": 100_000 + k, "status": "success" if w else "failure", "telemetry": telemetry}
        for k, w in enumerate(won)
    ]
    rows += [{"task": "bell", "seed": 100_500 + k, "status": "error", "telemetry": {}} for k in range(errors)]
    name = f"steps{steps}-n{candidates}" + (f"-{verifier}" if verifier else "")
    return report.CellResult(
        name=name,
        steps=steps,
        candidates=candidates,
        verifier=verifier,
        wanted=len(won) + errors,
        rows=rows,
        manifests={"bell": "test_bell@1"},
    )


def test_compute_counts_what_was_imagined(report: Any) -> None:
    single = cell(report, 4, 1, "", [1, 0, 1])
    assert single.evaluations == 4
    assert cell(report, 4, 1, "", [1], resampled=1).evaluations == 4 * 1.5
    several = cell(report, 2, 16, "spread", [1, 0], resampled=1, errors=3)
    assert several.evaluations == 2 * 16 * 1.5
    assert len(several.finished()) == 2 and several.successes() == 1 and several.successes("other") == 0


def test_the_front_is_what_nothing_cheaper_or_equal_beats(report: Any) -> None:
    half, more, all_of_them = [1, 0, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]
    cells = [
        cell(report, 8, 1, "", more),
        cell(report, 1, 1, "", half),
        cell(report, 2, 4, "random", half),
        cell(report, 2, 4, "spread", all_of_them),
        cell(report, 20, 16, "spread", all_of_them),
    ]
    assert [c.name for c in report.front(cells)] == ["steps1-n1", "steps2-n4-spread"]


def test_a_verifier_is_compared_on_the_episodes_that_both_finished(report: Any) -> None:
    single = cell(report, 2, 1, "", [1, 0, 0, 0, 1, 0, 0, 1])
    better = cell(report, 2, 4, "spread", [1, 1, 1, 1, 1, 1, 0], errors=1)
    (comparison,) = report.compare([single, better, cell(report, 8, 4, "spread", [1])])
    assert (comparison.n, comparison.only_cell, comparison.only_single) == (7, 4, 0)
    assert comparison.difference == pytest.approx(4 / 7) and comparison.p == mcnemar(4, 0)
    assert comparison.low < 4 / 7 < comparison.high


def test_the_report_holds_table_plot_and_measurements(report: Any, tmp_path: Path) -> None:
    cells = [
        cell(report, 1, 1, "", [1, 0, 0, 1]),
        cell(report, 1, 4, "spread", [1, 1, 0, 1], errors=1),
        cell(report, 1, 4, "random", [1, 0, 0, 1]),
        cell(report, 20, 16, "spread", []),
    ]
    cells[-1].wanted = 4
    settings = {"workers": 2, "device": "cpu", "manifest": "auto", "world_model": "shipped"}
    page = report.write_report(cells, tmp_path, command="python x", settings=settings, rehearsal=True)
    text = page.read_text()
    assert "rehearsal" in text and "Cells that are not complete: steps20-n16-spread" in text
    assert "no denominator: 1" in text
    low, high = wilson(3, 4)
    assert f"| 1 | 4 | spread | 3/4 | 75 % | {100 * low:.0f}-{100 * high:.0f} % | 4.0 | yes |" in text
    assert "| 1 | 4 | spread | 4 | +25 % |" in text and "`random` gains +0 %" in text
    lines = {line["claim"]: line for line in json.loads((tmp_path / "results/plan_pareto.json").read_text())}
    assert lines["planner/pareto/steps1-n4-spread/bell/success"]["value"] == 0.75
    assert lines["planner/pareto/steps1-n4-spread/gain"]["against"]["only_here"] == 1
    assert lines["planner/pareto/steps1-n1/denoiser_calls"]["value"] == 1.0
    assert (tmp_path / "images/plan_pareto.png").stat().st_size > 5000
    assert "](../images/plan_pareto.png)" in text
    assert {line["seeds"] for claim, line in lines.items() if claim.endswith("n4-spread/success")} != {""}
    harder = report.write_report(
        cells, tmp_path, command="x", settings=settings | {"manifest": "test_ood"}, rehearsal=True
    )
    assert harder.name == "plan_pareto_test_ood.md" and page.read_text() == text, (
        "other scenes have a report of their own"
    )
    other = {line["claim"] for line in json.loads(harder.with_suffix(".json").read_text())}
    assert not other & lines.keys() and "planner/pareto_test_ood/steps1-n1/success" in other
    named = report.write_report(cells, tmp_path, command="x", settings=settings | {"name": "short"}, rehearsal=True)
    assert named.name == "plan_pareto_short.md" and "plan_pareto_short.json" in named.read_text()


def test_a_cell_keeps_where_it_ran(report: Any, tmp_path: Path) -> None:
    """Results of a GPU are reported as such also where the report is written."""
    there = {"commit": "c0ffee", "hardware": "a GPU", "versions": {}, "date": "2026-01-02T03:04:05Z"}
    ran = cell(report, 1, 1, "", [1, 0])
    ran.provenance = there
    settings = {"workers": 2, "device": "cuda", "manifest": "auto", "world_model": "shipped"}
    page = report.write_report([ran], tmp_path, command="x", settings=settings, rehearsal=False)
    assert "- a GPU; commit c0ffee; 2026-01-02: steps1-n1." in page.read_text()
    assert {line["hardware"] for line in json.loads(page.with_suffix(".json").read_text())} == {"a GPU"}


def test_cells_share_scenes_and_differ_in_their_keys(report: Any, repository: Path) -> None:
    sys.path.insert(0, str(repository / "benchmarks"))
    try:
        import plan_pareto
    finally:
        sys.path.pop(0)
    arguments = plan_pareto.parse(["--episodes", "1", "--workers", "0"])
    cells = list(plan_pareto.cells(arguments))
    assert len(cells) == len({c.name for c in cells}) == 5 * 3 + 2 * 4
    assert {(c.steps, c.candidates) for c in cells} == {(s, n) for s in (1, 2, 4, 8, 20) for n in (1, 4, 16)}
    assert [c.verifier for c in cells if c.candidates == 1] == [""] * 5
    config = plan_pareto.cell_config(cells[-1], arguments)
    assert (
        config.planner.verifier == "combined"
        and config.planner.candidates == 16
        and config.planner.denoising_steps == 2
    )
    assert (
        plan_pareto.parse(["--tiny"]).episodes == 2 and plan_pareto.parse(["--tiny", "--episodes", "3"]).episodes == 3
    )
