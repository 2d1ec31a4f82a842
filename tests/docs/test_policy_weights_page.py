"""The page about a policy's weights: its examples run, and its tables are the code's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from physisforcing.core.config import compose
from physisforcing.policy.convert import LAYOUTS, ConvertPolicyConfig
from physisforcing.worldmodel.data.canvas import canvas_layout

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "policy_weights.md").read_text(encoding="utf-8")


def test_the_first_example_builds_a_policy() -> None:
    first, payload = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["report"]["video"]["from"] == "shipped" and names["model"].config.width == 64
    compile(payload, "payload", "exec")


def test_layouts_are_those_of_the_code() -> None:
    rows = {
        row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:4]]
        for row in PAGE.splitlines()
        if row.count("|") == 4
    }
    for column, name in enumerate(LAYOUTS):
        layout = LAYOUTS[name]
        assert rows["actions, states"][column] == f"{layout.action_dim}, {layout.state_dim}"
        canvas = canvas_layout(name)
        assert rows["canvas"][column] == f"{canvas.height}x{canvas.width}"
        assert (
            rows["statistics"][column] == {"zscore": "z-score", "minmax": "minimum and maximum"}[layout.normalization]
        )
        assert abs(eval(rows["actions a second"][column]) - layout.hz) < 1e-9


def test_settings_of_the_page_fit_the_command() -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines():
        compose("convert_policy", line.split()[2:], ConvertPolicyConfig).check()
