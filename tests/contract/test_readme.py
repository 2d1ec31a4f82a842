"""Sentences of the README that can be run."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


@pytest.mark.sim
def test_the_environment_recipe_works_as_written(repository: Path) -> None:
    text = re.sub(r"\s+", " ", (repository / "README.md").read_text(encoding="utf-8"))
    found = re.search(r"`(gymnasium\.make\([^`]+\))` after `(import [\w.]+)`", text)
    assert found, "the README says how an environment is made"
    make, imported = found.groups()
    code = f"import gymnasium\n{imported}\nenv = {make}\nenv.reset(seed=100000)\nprint(env.unwrapped.task_name)\nenv.close()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "click_bell"


def test_extras_are_named_and_those_without_an_importer_are_said_to_have_none(
    repository: Path, tracked_files: list[Path]
) -> None:
    text = re.sub(r"\s+", " ", (repository / "README.md").read_text(encoding="utf-8"))
    told = re.search(r"\*\*Optional extras\*\*.*?(`gpu`.*?imports it)", text)
    assert told, "the README says what the extras are for"
    extras = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert all(f"`{name}`" in told[0] for name in extras)
    sources = "\n".join(
        p.read_text(encoding="utf-8") for p in tracked_files if p.suffix == ".py" and "tests" not in p.parts
    )
    for name, module in {"gpu": "pynvml", "wandb": "wandb"}.items():
        unused = not re.search(rf"^\s*(?:import|from) {module}\b", sources, re.MULTILINE)
        assert unused == (f"`{name}`" in told[1]), name
