"""The command line: verbs are found lazily, mistakes are one message with exit code 2."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from physisforcing import cli
from physisforcing.core.errors import IncompleteCoverageError, UserError, VulkanUnavailableError


def test_help_lists_every_verb_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in cli.VERBS)
    assert "examples:" in text and "physis doctor" in text


def test_no_verb_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["docter"], "doctor"),
        (["data", "colect"], "collect"),
        (["train", "worldmodle"], "worldmodel"),
        (["data"], "collect"),
    ],
)
def test_a_typo_offers_the_nearest_verb(words: list[str], offered: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert offered in error and "Traceback" not in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (UserError("task", got="x", wanted="y", fix="z"), 2),
        (IncompleteCoverageError("3 of 5 episodes"), 3),
        (VulkanUnavailableError("no Vulkan device"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verb_main(argv: list[str]) -> int:
        assert argv == ["a=1"]
        raise raised

    module = types.SimpleNamespace(main=verb_main)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    assert cli.main(["generate", "a=1"]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("physis: ")


def test_a_shared_module_learns_its_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def verb_main(argv: list[str]) -> int:
        seen.append(argv)
        return 0

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: types.SimpleNamespace(main=verb_main))
    assert cli.main(["train", "vae", "seed=1"]) == 0
    assert cli.main(["data", "collect", "seed=1"]) == 0
    assert seen == [["vae", "seed=1"], ["seed=1"]]


@pytest.mark.parametrize("name", sorted(cli.VERBS))
def test_every_verb_answers_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main([*name.split(), "--help"])
    except SystemExit as left:  # argparse leaves this way
        code = int(left.code or 0)
    assert code == 0
    assert len(capsys.readouterr().out) > 40


def test_importing_the_command_is_cheap() -> None:
    code = "import sys, physisforcing.cli; print([m for m in ('torch','numpy','hydra','sapien','diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
