"""``physics=paper``, ``recommended``, ``authors``, ``none``: what each says, and that the open choices are all listed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from physisforcing.core.config import compose
from physisforcing.core.errors import UserError
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.training.config import TrainWorldModelConfig

ROOT = Path(__file__).resolve().parents[2]


def preset(name: str) -> PhysicsConfig:
    return compose("train_worldmodel", [f"physics={name}"], TrainWorldModelConfig).physics


def unknown() -> list[str]:
    return yaml.safe_load((ROOT / "configs/physics/authors.yaml").read_text(encoding="utf-8"))["unknown"]


def test_recommended_is_the_default_of_the_library() -> None:
    assert preset("recommended") == PhysicsConfig() == compose("train_worldmodel", [], TrainWorldModelConfig).physics


def test_paper_takes_out_what_the_paper_does_not_have() -> None:
    paper = preset("paper")
    assert (paper.visible_steps, paper.visibility, paper.dead_zone, paper.min_motion) == (False, "off", 0.0, 0.0)
    assert (paper.motion, paper.select, paper.trajectory_loss, paper.relation_loss) == ("path", "mean", "mse", "l1")
    assert (paper.max_tokens, paper.phi_hidden, paper.query_frames, paper.temperature) == (512, 2048, [0], "fixed")


def test_none_has_no_losses() -> None:
    off = preset("none")
    assert (off.lambda_pix, off.lambda_sem) == (0.0, 0.0)


def test_authors_is_refused_until_somebody_knows() -> None:
    with pytest.raises(UserError, match="unknown: visible_steps, dead_zone") as caught:
        preset("authors")
    assert "configs/physics/authors.yaml" in str(caught.value)


def test_every_open_choice_has_one_row() -> None:
    page = (ROOT / "docs/physics_vs_authors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\S+) \|$", page, re.MULTILINE)
    assert [name for name, _ in rows] == unknown()
    assert {authors for _, authors in rows} == {"unknown"}
    assert set(unknown()) <= {field.name for field in dataclasses.fields(PhysicsConfig)}
    # what the page says of the presets is what they are
    for name in (
        "visible_steps",
        "visibility",
        "dead_zone",
        "min_motion",
        "phi_hidden",
        "border",
        "common",
        "upsample",
    ):
        cells = re.search(rf"^\| `{name}` \|(.*)\|$", page, re.MULTILINE).group(1).split(" | ")
        for cell, made in zip(cells[1:3], (preset("paper"), PhysicsConfig()), strict=True):
            said = re.search(r"`([^`]+)`", cell).group(1)
            value = getattr(made, name)
            assert said == (
                str(value).lower() if isinstance(value, bool) else f"{value:g}" if not isinstance(value, str) else value
            )
