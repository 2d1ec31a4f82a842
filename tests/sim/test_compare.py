"""``physis compare`` in the real simulator: the shipped decoder, a world model that does nothing, controls; killed and continued."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from chromium import needs_browser
from physisforcing.compare import CompareConfig
from physisforcing.core.errors import UserError
from physisforcing.core.results import ResultsFile

pytestmark = [pytest.mark.sim, pytest.mark.slow]
TASK, STEPS = "click_bell", 40
MODELS = "models={still:{source:physisforcing.envs.control_models:FrozenFrame,recipe:nothing,training_seed:0}}"


def command(output, *words: str) -> list[str]:
    settings = [f"tasks=[{TASK}]", "episodes=2", "threads=1", "videos=1", f"max_steps={STEPS}", f"output={output}"]
    return [sys.executable, "-m", "physisforcing", "compare", MODELS, *settings, *words]


def run(output, *words: str) -> dict:
    found = subprocess.run([*command(output, *words), "--json"], capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout[: found.stdout.rindex("}") + 1])


def told(output) -> list[tuple]:
    """What a comparison measured, times left out."""
    rows = ResultsFile(output / "results.jsonl").rows
    return sorted((r["policy"], r["seed"], r["status"], r["steps"], json.dumps(r.get("scores"))) for r in rows)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    output = tmp_path_factory.mktemp("compare")
    return output, run(output, "controls=[noop,oracle,other,objects_erased]")


def test_a_comparison_ends_with_a_report(compared):
    output, summary = compared
    assert summary["title"] == "Checkpoint comparison" and summary["errors"] == 0
    cells = {cell["model"]: cell for cell in summary["success"]}
    assert set(cells) == {"still", "noop", "oracle", "other", "objects_erased"}
    assert all(cell["n"] == 2 for cell in cells.values())
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "data-players" in page and "click_bell, scene 100000" in page
    claims = {line["claim"] for line in json.loads((output / "measurements.json").read_text())}
    assert f"compare/interpolated/still/{TASK}/success" in claims


@needs_browser
@pytest.mark.parametrize(("width", "mobile"), [(1280, False), (390, True)])
def test_its_report_plays_in_a_browser(compared, browser, width, mobile):
    """The page that a comparison wrote, at desktop and phone width: nothing sticks out, videos play, the console stays empty."""
    browser.events.clear()
    browser.open(compared[0] / "report.html", width, 900, mobile=mobile)
    assert browser.run("document.documentElement.scrollWidth") <= width
    group = "document.querySelector('[data-players]')"
    browser.run(f"{group}.scrollIntoView()")
    browser.wait(f"[...{group}.querySelectorAll('video')].every(v => v.readyState >= 2)")
    browser.run(f"{group}.querySelector('button').click()")
    browser.wait(f"[...{group}.querySelectorAll('video')].every(v => v.currentTime > 0.3)")
    assert browser.complaints() == []


def test_imaginations_are_held_against_what_happened(compared):
    """The real video of the expert is imagined closely where the decoder repeats the expert; a still picture is as wrong as the arm moves."""
    output, _ = compared
    rows = {(r["policy"], r["seed"]): r for r in ResultsFile(output / "results.jsonl").rows}
    for seed in (100000, 100001):
        oracle, still = rows["oracle", seed]["scores"], rows["still", seed]["scores"]
        assert oracle["gripper_px_0.48s_n"] > 0
        assert oracle["gripper_px_0.48s"] < 0.5 * oracle["gripper_moved_px_0.48s"]
        assert still["gripper_px_0.48s"] == pytest.approx(still["gripper_moved_px_0.48s"], abs=0.2)


def test_the_robot_follows_the_other_episode(compared):
    output, summary = compared
    verdicts = {(v["control"], v["task"]): v for v in summary["verdicts"]}
    assert verdicts["other", TASK]["holds"] is not None and "degrees" in verdicts["other", TASK]["text"]
    for row in ResultsFile(output / "results.jsonl").rows:
        if row["policy"] == "other":
            assert row["scores"]["joint_deg_to_other"] < row["scores"]["joint_deg"]


def test_killed_and_continued_it_measures_the_same(compared, tmp_path):
    output, summary = compared
    words = ["controls=[oracle]", f"demos={output / 'demonstrations'}"]
    with subprocess.Popen(
        command(tmp_path, *words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 600
        while len(ResultsFile(tmp_path / "results.jsonl").rows) < 1:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
    again = run(tmp_path, *words)
    assert told(tmp_path) == [row for row in told(output) if row[0] in ("still", "oracle")]
    for name in ("success", "scores"):
        assert again[name] == [cell for cell in unbaselined(summary[name]) if cell["model"] in ("still", "oracle")]


def unbaselined(cells: list[dict]) -> list[dict]:
    """Without the tests against baselines, which only the first comparison has."""
    return [cell | ({"against": {}} if "against" in cell else {}) for cell in cells]


def test_mistakes_are_named():
    for settings, match in (
        ({"models": {"a": "shipped"}, "controls": ["nop"]}, "noop"),
        ({"models": {"noop": "shipped"}}, "no control is called"),
        ({"models": {"a": {"source": "shipped", "recipee": "x"}}}, "recipe"),
        ({}, "at least one world model"),
        ({"models": {"a": "shipped"}, "first_seed": 3}, "100000"),
    ):
        with pytest.raises(UserError, match=match):
            CompareConfig(**settings).check()
