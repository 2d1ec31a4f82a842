"""The page about the policy: its comparison of backbones, command by command at a tiny size."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_training
from physisforcing.core.config import compose
from physisforcing.envs.nano import TASKS, NanoConfig
from physisforcing.eval_policy import EvalPolicyConfig, spelled_out
from physisforcing.policy.checkpoint import load_policy
from physisforcing.policy.training import PolicyTrainer, train_policy
from physisforcing.policy.training_config import TrainPolicyConfig
from physisforcing.worldmodel.backbones.wan import load_denoiser
from physisforcing.worldmodel.data.targets import TargetsCommand
from physisforcing.worldmodel.model import HEADS_NAME
from physisforcing.worldmodel.training.config import TrainWorldModelConfig
from physisforcing.worldmodel.training.worldmodel import train_world_model
from tiny_policy_training import banks

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")
CELLS = ("forced", "flow", "base", "drawn")
#: What makes seconds on a CPU of hours on a GPU.
RUN = [
    "codec=codec", "heldout_windows=4", "run.steps=2", "run.batch=4", "run.device=cpu", "run.compile=none", "optim.warmup=1",
    "optim.ema=0",
]  # fmt: skip
WORLD = [
    "backbone.latent_channels=4", "backbone.num_heads=2", "backbone.head_dim=12", "backbone.num_layers=2", "backbone.ffn_dim=32",
    "backbone.tap=1", "conditioner.hidden=16",
]  # fmt: skip
POLICY = ["policy.chunk=8", "policy.width=16", "policy.ffn_dim=24", "run.steps=1"]
#: The one setting in which two cells differ, and where they are written.
APART = {"run.init", "run.out"}


def section() -> list[list[str]]:
    """The commands of the comparison as words, without ``physis``."""
    text = PAGE.split("### Comparing backbones\n")[1].split("\n### ")[0]
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert all(line.startswith("physis ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


def of(*verb: str) -> list[list[str]]:
    return [words[len(verb) :] for words in section() if tuple(words[: len(verb)]) == verb]


def flat(config: Any) -> dict[str, Any]:
    """Dotted name -> value of every setting."""

    def walk(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            found |= walk(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        return found

    return walk(dataclasses.asdict(config), "")


def apart(one: Any, two: Any) -> set[str]:
    mine, theirs = flat(one), flat(two)
    return {name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)}


def transformer(folder: str) -> dict[str, torch.Tensor]:
    return load_denoiser(Path(folder)).transformer.state_dict()


def test_the_cells_of_a_comparison_begin_with_their_own_video_and_differ_in_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_training.codec_folder(tmp_path)
    worlds: dict[str, TrainWorldModelConfig] = {}
    for words in of("train", "worldmodel"):
        made = compose("train_worldmodel", [*words, *WORLD, *RUN], TrainWorldModelConfig)
        parts = tiny_training.bank(0), tiny_training.bank(1)
        for bank in parts:
            bank.targets = bank.targets if made.physics.wanted else None
        train_world_model(made, parts)
        worlds[Path(made.run.out).name] = made
    assert list(worlds) == ["base", "forced", "flow"] and not worlds["base"].physics.wanted
    assert apart(worlds["base"], worlds["flow"]) == APART | {"data.tasks"}
    assert apart(worlds["forced"], worlds["flow"]) == {"run.out", "physics.lambda_pix", "physics.lambda_sem"}
    assert {name for name in worlds if Path(f"runs/cells/{name}/export/{HEADS_NAME}").is_file()} == {"forced"}
    stored = {name: transformer(f"runs/cells/{name}/export") for name in worlds}

    policies: dict[str, TrainPolicyConfig] = {}
    for name, words in zip(CELLS, of("train", "policy"), strict=True):
        made = policies[name] = compose("train_policy", [*words, *RUN, *POLICY], TrainPolicyConfig)
        assert load_policy(train_policy(made, banks()))[0].config == made.policy
        begun = PolicyTrainer(made, banks()[0], torch.device("cpu")).policy.transformer
        video = {key: value for key, value in begun.state_dict().items() if ".action." not in key}
        for other, weights in stored.items():
            assert video.keys() == weights.keys()
            same = [key for key, value in video.items() if torch.equal(value, weights[key])]
            assert (len(same) == len(video)) == (other == name), (name, other)
        if name == "drawn":
            matrices = [key for key in video if key.endswith("attn1.to_q.weight")]
            assert matrices and not any(torch.equal(video[key], stored["base"][key]) for key in matrices)
    for name, made in policies.items():
        assert made.run.out == f"runs/cells/policy_{name}_0" and apart(made, policies["base"]) <= APART
        assert (
            made.run.init == f"{'random:' if name == 'drawn' else ''}runs/cells/{name.replace('drawn', 'base')}/export"
        )


def test_the_table_compares_the_policies_that_were_trained() -> None:
    (words,) = of("eval", "policy")
    made = compose("eval_policy", spelled_out(words), EvalPolicyConfig)
    found = made.check()
    assert made.paired_seeds and tuple(made.tasks) == TASKS
    assert {(one.recipe, one.training_seed) for one in found.values()} == {(cell, k) for cell in CELLS for k in (0, 1)}
    for one in found.values():
        assert one.settings.source == f"runs/cells/policy_{one.recipe}_{one.training_seed}/export"
    (recorded,), (targets,) = of("data", "nano"), of("data", "targets")
    nano = compose("nano", recorded, NanoConfig)
    assert (nano.pictures, nano.ground_truth) == ("240x320", "sparse")
    assert compose("data_targets", targets, TargetsCommand).data == made.train_demos.split(",")
