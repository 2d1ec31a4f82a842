"""The benchmark of policy training rehearses its full-size path on a CPU: the published way and ours compute the same numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from physisforcing.core.config import compose
from physisforcing.policy.training_config import TrainPolicyConfig


@pytest.fixture
def benchmark(monkeypatch, repository):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import policy_training

    return policy_training


def test_both_ways_give_the_same_losses(benchmark, tmp_path: Path) -> None:
    out = tmp_path / "lines.json"
    words = ["--tiny", "--batch", "2", "--updates", "2", "--warmup", "1", "--arms", "plain,ours,frozen_plain,frozen"]
    assert benchmark.main([*words, "--work", str(tmp_path / "work"), "--json", str(out)]) == 0
    found = {line["claim"].removeprefix("policy/training/tiny/"): line for line in json.loads(out.read_text())}
    assert len(found) == 4 * 4
    for arm in ("plain", "ours", "frozen_plain", "frozen"):
        step, rate = (found[f"{arm}_1_gpus/{name}"] for name in ("step_ms", "samples_per_s"))
        assert 0 < step["low"] <= step["value"] <= step["high"] and step["n"] == 2
        assert rate["value"] == pytest.approx(2e3 / step["value"], rel=1e-3)
    for name in ("first_loss", "last_loss"):
        for plain, ours in (("plain", "ours"), ("frozen_plain", "frozen")):
            values = [found[f"{arm}_1_gpus/{name}"]["value"] for arm in (plain, ours)]
            assert values[0] == pytest.approx(values[1], rel=1e-4)
    about = {arm: found[f"{arm}_1_gpus/step_ms"]["against"] for arm in ("plain", "ours", "frozen")}
    assert about["ours"]["against"] == "plain" and about["ours"]["first_loss_differs_by"] < 1e-5
    assert about["ours"]["trained_parameters"] == about["ours"]["video_parameters"] + about["ours"]["expert_parameters"]
    assert about["frozen"]["trained_parameters"] == about["frozen"]["expert_parameters"]
    assert not list((tmp_path / "work").glob("**/step-*"))


def test_the_published_way_is_undone(benchmark) -> None:
    from physisforcing.policy import mixture
    from physisforcing.policy.model import WorldActionModel

    before = mixture.attend, WorldActionModel._video

    def inside() -> None:
        with benchmark.published_way():
            assert mixture.attend is not before[0] and WorldActionModel._video is not before[1]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        inside()
    assert (mixture.attend, WorldActionModel._video) == before


def test_it_measures_the_recipe(benchmark, tmp_path: Path) -> None:
    """Policy, loss and optimiser are those of experiment=policy_robotwin, but for the average and the length."""
    options = benchmark.read_options(["--batch", "16"])
    made = benchmark.recipe(tmp_path, "ours", options)
    recipe = compose("train_policy", ["experiment=policy_robotwin", "model=wan22-5b"], TrainPolicyConfig)
    assert made.policy == recipe.policy and made.video_weight == recipe.video_weight and made.run.batch == 16
    assert made.text_tokens == recipe.text_tokens == 128
    assert dataclasses.replace(made.optim, ema=recipe.optim.ema, warmup=recipe.optim.warmup) == recipe.optim
    assert made.run.compile == recipe.run.compile == "blocks"
