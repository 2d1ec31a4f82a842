"""The commit that results name, on machines with and without git."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from physisforcing.core.provenance import git_commit


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *who, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_changed_checkout_carries_a_plus(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path) == head[:12]
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == head[:12] + "+"


def test_without_git_a_run_is_recorded_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from physisforcing.planner.measurements import machine_provenance
    from physisforcing.worldmodel.training.config import TrainVaeConfig
    from physisforcing.worldmodel.training.runtime import write_provenance

    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(Path(__file__).parent) is None
    write_provenance(tmp_path / "run", TrainVaeConfig())
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["commit"] is None
    assert machine_provenance()["commit"] == "not a git checkout"


@pytest.mark.parametrize(
    ("told", "kept"), [("0123456789abcdef", "0123456789ab"), ("0123456789abcdef+", "0123456789ab+"), (" ", None)]
)
def test_a_commit_that_is_told_has_twelve_digits_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, kept: str | None
) -> None:
    monkeypatch.setenv("PHYSIS_COMMIT", told)
    assert git_commit(tmp_path) == kept
