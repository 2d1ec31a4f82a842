"""The page on one's own robot data, command by command, with a tiny model and a drawn dataset that knows nothing of our simulator."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import drawn_clips
import tiny_large
from physisforcing import cli
from physisforcing.core.lerobot import LeRobotWriter, robot_features

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "your_own_robot_data.md").read_text(encoding="utf-8")
#: What a CPU can do in place of the page's sizes.
SMALL = {
    "buckets=[49x480x640]": "buckets=[9x64x96]",
    "device=cuda": "device=cpu",
    "frames=49": "frames=9",
    "size=480x640": "size=64x96",
}
TRAIN = [
    "run.device=cpu",
    "run.compile=none",
    "run.steps=2",
    "run.batch=2",
    "run.log_every=1",
    "run.save_every=1",
    "lora.rank=2",
]
TRAIN += [
    "run.eval_every=2",
    "large.video_steps=2",
    "heldout_windows=2",
    "physics.phi_hidden=16",
    "physics.psi_hidden=16",
]


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.strip().splitlines()]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the page asks for: ``my_robot``, ``wan22-5b`` and a first picture."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PHYSIS_HOME", str(tmp_path / "home"))
    tiny_large.pipeline(tmp_path, "ti2v").rename(tmp_path / "wan22-5b")
    names = [f"joint{i}" for i in range(6)]
    features = robot_features(names, cameras=("front", "side"), height=96, width=128, fps=30.0)
    writer, draw = LeRobotWriter(tmp_path / "my_robot", features, robot_type="arm"), np.random.default_rng(0)
    for seed in range(4):
        film = drawn_clips.film("bottle", draw, 40)
        state = draw.normal(size=(40, 6)).astype(np.float32)
        columns = dict.fromkeys(("observation.state", "observation.state_measured", "action"), state)
        writer.add_episode(
            columns=columns | {"next.success": np.zeros(40, bool)},
            frames={f"observation.images.{camera}": film for camera in ("front", "side")},
            instruction="put the cup on the plate", task_name="cup", seed=seed, success=True, scene_hash=str(seed),
            policy="human", embodiment="arm", assets_version="none",
        )  # fmt: skip
    writer.finalize()
    Image.fromarray(drawn_clips.film("bottle", draw, 2)[0]).save(tmp_path / "first.png")
    return tmp_path


def test_the_page_runs_as_written(place, capsys):
    pytest.importorskip("peft")
    for words in commands():
        assert words[0] == "physis"
        given = [SMALL.get(word, word) for word in words[1:]]
        if given[:2] == ["train", "worldmodel"]:
            given += TRAIN
        if given[0] == "generate":
            given += ["steps=2"]
        assert cli.main(given) == 0, given
    told = capsys.readouterr().out
    assert "runs/robot_latents: 4 windows" in told
    windows = [json.loads(line) for line in Path("runs/robot_latents/windows.jsonl").read_text().splitlines()]
    assert {window["start"] for window in windows} == {0} and all(window["targets"] for window in windows)
    lines = [json.loads(line) for line in Path("runs/robot/metrics.jsonl").read_text().splitlines()]
    assert any(line.get("pix", 0) > 0 for line in lines) and any(line.get("sem", 0) > 0 for line in lines)
    assert any("heldout_fm" in line for line in lines) and list(Path("runs/robot/videos").glob("*.mp4"))
    assert Path("rollout.mp4").stat().st_size > 0 and Path("runs/robot/export/adapter").is_dir()
