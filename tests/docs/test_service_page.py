"""The page about the world-model service: its Python runs, its tables are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from physisforcing.planner.service.conformance import checks
from physisforcing.planner.service.faults import CODES
from physisforcing.planner.service.limits import ServiceLimits

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "service.md").read_text(encoding="utf-8")


def test_the_python_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "service.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "(1, 1, 1, 5, 24, 32, 3)"


def test_the_table_of_errors_is_complete() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \| (`[A-Z_`, ]+) \| (yes|no) \|", PAGE, re.MULTILINE)
    told = {
        (name.strip("` "), int(status), again == "yes")
        for statuses, names, again in rows
        for status, name in zip(statuses.split(","), names.split(","), strict=True)
    }
    assert told == {(name, status, retryable) for name, (status, retryable) in CODES.items()}


def test_the_limits_and_the_number_of_checks_are_those_of_the_code() -> None:
    limits = PAGE.split("## Limits")[1].split("## Security")[0]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]+) \|", limits, re.MULTILINE))))
    assert named == set(ServiceLimits.__slots__)
    assert f"{len(checks())} checks, each" in PAGE
