"""Documents: commands that exist, links that lead somewhere, figures that have their measurement."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from physisforcing import cli
from physisforcing.core.config import build, compose
from physisforcing.planner.measurements import placeless

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def shell_lines(text: str) -> list[str]:
    """Lines of shell blocks, continued ones joined, without comments."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.DOTALL)
    return [line.split(" #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands(text: str) -> list[list[str]]:
    """The ``physis ...`` lines of shell blocks, and inline code that starts with physis, as words."""
    lines = shell_lines(text)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [line.strip().removeprefix(".venv/bin/") for line in lines + inline]
    return [shlex.split(line)[1:] for line in found if line.startswith("physis ")]


#: Verbs that take folders or files without a field's name.
POSITIONAL = (
    "report",
    "data inspect",
    "data merge",
    "data prepare",
    "data pack",
    "data unpack",
    "check service",
    "check worldmodel",
    "pack track1",
    "check track1",
)


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_command_is_a_verb(path: Path) -> None:
    for words in commands(path.read_text(encoding="utf-8")):
        if words[0].startswith(("-", "<")):
            continue
        verb, rest = cli.find_verb(words)
        assert verb in cli.VERBS
        for word in rest:
            assert word.startswith(("-", "<")) or "=" in word or verb in POSITIONAL, (verb, word)


def test_every_verb_named_in_the_readme_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = {cli.find_verb(words)[0] for words in commands((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert len(verbs) >= 8
    for verb in sorted(verbs):
        try:
            code = cli.main([*verb.split(), "--help"])
        except SystemExit as stop:  # argparse ends a help text so
            code = stop.code
        text = capsys.readouterr().out
        assert code in (0, None), verb
        assert f"physis {verb}" in text, (verb, text[:200])


#: Verb -> YAML, module and dataclass that its settings must fit.
SCHEMAS = {
    "demo": ("demo", "physisforcing.demo", "DemoConfig"),
    "data collect": ("collect", "physisforcing.envs.collect", "CollectConfig"),
    "data nano": ("nano", "physisforcing.envs.nano", "NanoConfig"),
    "data targets": ("data_targets", "physisforcing.worldmodel.data.targets", "TargetsCommand"),
    "train vae": ("train_vae", "physisforcing.worldmodel.training.config", "TrainVaeConfig"),
    "train worldmodel": ("train_worldmodel", "physisforcing.worldmodel.training.config", "TrainWorldModelConfig"),
    "train idm": ("train_idm", "physisforcing.planner.train", "TrainIdmCommand"),
    "generate": ("generate", "physisforcing.worldmodel.generate", "GenerateConfig"),
    "eval plan": ("eval_plan", "physisforcing.eval_plan", "EvalPlanConfig"),
}


def test_settings_in_the_readme_fit_their_commands() -> None:
    checked = 0
    for words in commands((ROOT / "README.md").read_text(encoding="utf-8")):
        verb, rest = cli.find_verb(words)
        settings = [word for word in rest if "=" in word and not word.startswith("-")]
        if verb in SCHEMAS and settings:
            config, module, schema = SCHEMAS[verb]
            made = compose(config, settings, getattr(importlib.import_module(module), schema))
            check = getattr(made, "check", None)
            if check is not None:
                check()
            checked += 1
    assert checked >= 8


def settings_lines(text: str) -> list[list[str]]:
    """Commands in shell blocks that have settings, those that torchrun starts as well, as words."""
    found = []
    for line in shell_lines(text):
        start = re.search(r"(?:^|-m )(?:\.venv/bin/)?(?:physis|physisforcing) (?=[a-z])", line)
        words = shlex.split(line[start.end() :]) if start else []
        if any(re.match(r"[\w.+~]+=", word) for word in words):
            found.append(words)
    return found


def test_the_documents_have_commands_with_settings() -> None:
    assert sum(len(settings_lines(path.read_text(encoding="utf-8"))) for path in DOCUMENTS) > 120


class Composed(BaseException):
    """Ends a command once its settings are read."""


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_settings_in_shell_blocks_are_those_of_their_commands(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each command reads its settings as it always does, and goes no further."""

    def read(*arguments: Any) -> None:
        build(*arguments)
        raise Composed

    monkeypatch.chdir(tmp_path)
    importlib.import_module("physisforcing.policies")  # what imports ``build`` by name does so before it is replaced
    monkeypatch.setattr("physisforcing.core.config.build", read)  # what ``compose`` ends with, whoever imported that
    for words in settings_lines(path.read_text(encoding="utf-8")):
        with pytest.raises(Composed):
            cli.main(words)
    kept = [name for name, module in list(sys.modules.items()) if getattr(module, "build", None) is read]
    assert kept == ["physisforcing.core.config"], "a module that keeps the replacement would fail other tests"


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_relative_links_exist(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    anchors = {
        re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in re.findall(r"^#+ (.+)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        assert not file or (path.parent / file).exists(), target
        assert file or anchor in anchors, target


def _script(place: str) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(place).stem, ROOT / place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#: Folders of a machine, written so that this file names none.
TEMPORARY, HOME = "/".join(("", "tmp")), "/".join(("", "home", "me"))


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        (f"x m={{a:{TEMPORARY}/r/a/export,b:runs/b/export}} n=3/4", "x m={a:runs/a/export,b:runs/b/export} n=3/4"),
        (
            f"x url=http://h:8000/v1 m={{s:https://h/x}} o={HOME}/c/",
            "x url=http://h:8000/v1 m={s:https://h/x} o=runs/c",
        ),
        (f"x o=~/runs/a d=../../me/b data=[{HOME}/a,{TEMPORARY}/b]", "x o=runs/a d=runs/b data=[runs/a,runs/b]"),
        (
            f"python b.py --decoder {HOME}/d/model --output '{HOME}/o'",
            "python b.py --decoder runs/d/model --output 'runs/o'",
        ),
    ],
)
def test_commands_of_results_keep_no_path_of_one_machine(command: str, kept: str) -> None:
    assert placeless(command) == kept


@pytest.mark.parametrize(
    ("claim", "stays"),
    [
        ("planner/interpolated/model/click_bell/success", True),
        ("compare/interpolated/flow/click_bell/success", True),
        ("compare/interpolated/flow-minus-physis/click_bell/success_difference", True),
        ("compare/interpolated/flow/click_bell/object_px_0.96s", True),
        ("compare/interpolated/flow/click_bell/object_px_0.96s_floor", True),
        ("compare/interpolated/flow/imagined_success/ece", True),
        ("compare/interpolated/flow/every_chunk/imagined_success/balanced_accuracy", True),
        ("compare/interpolated/flow/click_bell/instruction/arm", True),
        ("compare/interpolated/flow/click_bell/object_px_0.24s", False),
        ("compare/interpolated/other/click_bell/joint_deg_to_other", True),
        ("compare/interpolated/retrieval_video/click_bell/joint_deg", False),
        ("a/b/success", True),
        ("compare/interpolated/flow/click_bell/scenery_lost_1.92s_floor", False),
    ],
)
def test_of_the_scores_of_a_comparison_the_tested_ones_are_kept(claim: str, stays: bool) -> None:
    assert _script("docs/results/merge.py").kept(claim) is stays


def test_a_repeated_comparison_is_equal_in_all_but_clocks(tmp_path: Path) -> None:
    row = {
        "policy": "flow",
        "episode": "bell/1",
        "status": "success",
        "scores": {"px": 1.5},
        "seconds": 3.0,
        "policy_s": 1.0,
    }
    row |= {"telemetry": {"plans": 2.0, "decoding_s": 0.4}, "panels": ["a.mp4"]}
    line = {"claim": "compare/interpolated/flow/bell/success", "value": 1.0, "command": "c"}
    again = row | {"seconds": 9.0, "policy_s": 2.0, "telemetry": {"plans": 2.0, "decoding_s": 0.9}}
    del again["panels"]
    other = again | {"episode": "bell/2"}
    rows = {"x": [row, row | {"episode": "bell/2"}], "x_again": [again, other | {"scores": {"px": 1.6}}]}
    for name, told in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told))
        (tmp_path / name / "measurements.json").write_text(json.dumps([line]))
    (found,) = _script("docs/results/merge.py").repetition(str(tmp_path / "x_again"))
    assert (found["claim"], found["value"], found["n"]) == ("compare/interpolated/repeated/equal_rows", 1, 2)


def test_tables_of_results_are_what_the_measurements_say() -> None:
    """``python docs/results/result_tables.py`` writes them."""
    module = _script("docs/results/result_tables.py")
    for page in (*module.PAGES, *module.OWN):
        assert page.read_text(encoding="utf-8") == module.filled(page), page.name
    line = {
        "claim": "a/b/success",
        "value": 0.8,
        "low": 0.67,
        "high": 0.89,
        "n": 50,
        "against": {"noop_p": 1e-9, "random_p": 0.5},
    }
    assert module.row(line) == "| `a/b/success` | 80 % | 67 to 89 % | 50 | 1e-09, 0.5 |"
    assert module.why(line | {"against": {"failures": {"no grasp": 2, "no motion": 8}}}) == "no motion: 8, no grasp: 2"


def test_file_map_is_what_the_modules_say() -> None:
    """``python docs/file_map.py`` writes it."""
    module = _script("docs/file_map.py")
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert "](../envs/robotwin/env.py)" in page and module.written(page) == page


def test_no_document_names_a_machine() -> None:
    for path in DOCUMENTS:
        found = re.findall(r"(?:/home/|/root/|/tmp/|/mnt/|/Users/)\S*", path.read_text(encoding="utf-8"))
        assert not found, (path.name, found)
