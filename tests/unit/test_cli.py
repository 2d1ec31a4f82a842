"""The command line: verbs are found lazily, mistakes are one message with exit code 2."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from physisforcing import cli
from physisforcing.core.errors import IncompleteCoverageError, ServerLostError, UserError, VulkanUnavailableError


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
        (ServerLostError("127.0.0.1:7199: nobody answers"), 1),
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


class Composed(Exception):
    """Ends a command once its settings are known."""


def examples(text: str) -> list[str]:
    """The example commands of a help text: ``physis`` after the margin, ``example:`` or ``|``, up to a comment."""
    lines = [line.strip() for line in text.splitlines() if not line.startswith("usage:")]
    parts = [part for line in lines for part in re.sub(r"^examples?: ", "", line).split(" | ")]
    found = [re.split(r"\s{2,}", part)[0] for part in parts if part.startswith("physis ")]
    return [line for line in found if "<" not in line]


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with contextlib.suppress(SystemExit):  # argparse leaves this way
        cli.main([*words, "--help"])
    return capsys.readouterr().out


def test_every_example_of_every_help_can_be_typed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each runs up to the point where its settings are composed and checked, and names what the command cannot do without."""
    from physisforcing.core import config as module

    monkeypatch.setenv("COLUMNS", "200")
    original, composed = module.compose, []

    def compose(*arguments: object) -> None:
        composed.append(original(*arguments))
        getattr(composed[-1], "check", lambda: None)()
        raise Composed

    monkeypatch.setattr(module, "compose", compose)
    typed = set(examples(help_of([], capsys)))
    for verb in cli.VERBS:
        own = examples(help_of(verb.split(), capsys))
        assert own, f"physis {verb} --help has no example"
        typed |= set(own)
    for line in sorted(typed):
        words = shlex.split(line.replace(" ...", ""))[1:]
        verb, _ = cli.find_verb(words)
        source = importlib.util.find_spec(cli.VERBS[verb].module).origin
        text = Path(source).read_text(encoding="utf-8")
        if "core.config import compose" not in text and "serve_command(" not in text:
            continue  # it reads its own flags and words
        with pytest.raises(Composed):
            cli._run(words)
        made = composed[-1]
        if verb in ("train worldmodel", "train policy") and made.model:
            assert bool(made.data.latents) != bool(made.data.roots), line
        elif verb.startswith("train ") and "..." not in line:
            assert made.data if verb in ("train idm", "train success") else made.data.roots, line
            # Where train vae leaves its codec.
            codec = "shipped" if verb in ("train vae", "train success") else made.codec
            assert codec == "shipped" or codec.endswith("/codec"), line
    assert len(typed) >= 20


@pytest.mark.parametrize("field", ["codec", "planner.decoder"])
def test_missing_weights_name_the_setting(field: str) -> None:
    from physisforcing.planner.train import weights_folder

    with pytest.raises(UserError, match=rf"^{re.escape(field)}.*give {re.escape(field)}=FOLDER"):
        weights_folder("no/such/folder", "vae", field=field)


def test_importing_the_command_is_cheap() -> None:
    code = "import sys, physisforcing.cli; print([m for m in ('torch','numpy','hydra','sapien','diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
