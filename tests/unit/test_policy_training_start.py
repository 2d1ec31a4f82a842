"""What a policy's training starts from: another policy with its settings, a world model with its heads, drawn or packaged weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_training
from physisforcing.core.errors import UserError
from physisforcing.core.paths import weights_root
from physisforcing.policy.checkpoint import load_policy
from physisforcing.policy.training import PolicyTrainer, train_policy
from physisforcing.policy.training_config import TrainPolicyConfig
from physisforcing.policy.training_start import adopt
from physisforcing.worldmodel.backbones.wan import load_denoiser
from physisforcing.worldmodel.training.worldmodel import train_world_model
from tiny_policy_training import as_usual, banks, config, trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy whose settings are not the usual ones."""
    folder = tmp_path_factory.mktemp("policy")
    made = config(folder, "first", 2)
    made.policy.action_shift, made.policy.weighting, made.policy.video_shift = 2.0, "bell", 4.0
    return train_policy(made, banks())


def test_a_policy_is_trained_further_with_its_own_settings(policy_folder: Path, tmp_path: Path, capfd) -> None:
    made = as_usual(config(tmp_path, "more", 2), policy_folder, tmp_path / "more")
    adopt(made)
    assert "policy.action_shift=2.0 (from run.init" in capfd.readouterr().err
    assert (made.policy.action_shift, made.policy.weighting, made.policy.chunk) == (2.0, "bell", 8)
    model = load_policy(policy_folder)[0]
    found = PolicyTrainer(made, banks()[0], CPU)
    assert all(
        torch.equal(a, b) for a, b in zip(found.policy.state_dict().values(), model.state_dict().values(), strict=True)
    )
    export = train_policy(made, banks())
    stored = json.loads((export / "policy.json").read_text())
    assert stored["model"]["video_shift"] == 4.0 and stored["source"]["policy"].endswith("first/export")
    assert (export / "statistics.json").read_bytes() == (policy_folder / "statistics.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chunk", 16),
        ("action_shift", 3.0),
        ("video_shift", 2.0),
        ("mode", "joint"),
        ("head", "bare"),
        ("normalization", "minmax"),
    ],
)
def test_settings_against_the_policy_to_start_from_are_refused(
    policy_folder: Path, tmp_path: Path, name: str, value: object
) -> None:
    made = as_usual(config(tmp_path, "more", 2), policy_folder, tmp_path / "more")
    setattr(made if name == "normalization" else made.policy, name, value)
    with pytest.raises(UserError, match=f"^(policy.)?{name}"):
        train_policy(made, banks())
    assert not (tmp_path / "more").exists()


def test_a_default_that_was_typed_is_refused_as_well(policy_folder: Path, tmp_path: Path, capsys) -> None:
    """By the command: what is composed does not tell it from one that nobody typed."""
    from physisforcing import cli

    words = [f"run.init={policy_folder}", f"codec={weights_root() / 'vae'}", f"run.out={tmp_path / 'more'}"]
    for typed in ("policy.action_shift=1.0", "policy={action_shift: 1}"):
        assert cli.main(["train", "policy", *words, "policy.video_shift=4.0", typed]) == 2
        assert "policy.action_shift: got 1.0, wanted 2.0, with which run.init was" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["", "a large one"])
def test_a_policy_has_no_weights_to_draw(policy_folder: Path, tmp_path: Path, model: str) -> None:
    made = as_usual(config(tmp_path, "more", 2), policy_folder, tmp_path / "more")
    made.run.init, made.model = f"random:{policy_folder}", model
    with pytest.raises(UserError, match=r"run\.init: got 'random:.*first/export'.*not a policy"):
        adopt(made)


def test_the_backbone_is_that_of_a_world_model_and_its_heads_go_along(tmp_path: Path) -> None:
    parts = {}
    for name, physics in (("plain", False), ("forced", True)):
        world = tiny_training.config(tmp_path, name, 2)
        world.physics.lambda_pix = world.physics.lambda_sem = 0.5 * physics
        some = tiny_training.bank(0), tiny_training.bank(1)
        for bank in some:
            bank.targets = bank.targets if physics else None
        parts[name] = train_world_model(world, some)
    for name, init in parts.items():
        made = as_usual(config(tmp_path, f"policy-{name}", 1, physics=True), init, tmp_path / f"policy-{name}")
        made.policy = config(tmp_path, "sizes").policy
        found = trainer(made, physics=True)
        stored = load_denoiser(init)
        for key, value in stored.transformer.state_dict().items():
            if "proj_out" not in key:
                assert torch.equal(found.policy.transformer.state_dict()[key], value), key
        kept = found.forcing.phi[1].weight  # type: ignore[union-attr]
        if name == "forced":
            assert torch.equal(kept, load_file(init / "physics_heads.safetensors")["phi.1.weight"].float())


def test_drawn_weights_have_the_architecture_of_the_world_model_that_is_named(tmp_path: Path) -> None:
    init = train_world_model(tiny_training.config(tmp_path, "world", 2), (tiny_training.bank(0), tiny_training.bank(1)))
    found = {}
    for name in ("", "random:"):
        made = as_usual(config(tmp_path, "policy", 1, physics=True), init, tmp_path / "policy")
        made.policy, made.run.init = config(tmp_path, "sizes").policy, f"{name}{init}"
        found[name] = trainer(made, physics=True)
    taken, drawn = (one.policy.state_dict() for one in found.values())
    assert {key: value.shape for key, value in taken.items()} == {key: value.shape for key, value in drawn.items()}
    layers = [key for key in taken if key.endswith("attn1.to_q.weight")]
    assert len(layers) == 4 and not any(torch.equal(taken[key], drawn[key]) for key in layers)
    heads = [one.forcing.phi[1].weight for one in found.values()]  # type: ignore[union-attr]
    assert not torch.equal(*heads)
    sources = [one.info().source["video"]["weights"] for one in found.values()]
    assert sources == ["taken", "drawn, seed 0"]


def test_a_policy_on_the_frozen_packaged_backbone_is_written_without_it(tmp_path: Path) -> None:
    made = TrainPolicyConfig(codec=str(weights_root() / "vae"), freeze_video=True, video_weight=0.0)
    made.run.init, made.run.device = "shipped", "cpu"
    adopt(made)
    part = banks()[0]
    found = PolicyTrainer(made, part, CPU)
    found.policy.expert.proj_out.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    for checkpoint in (True, False):
        folder = tmp_path / f"policy{checkpoint:d}"
        found.export(folder, checkpoint=checkpoint)
        assert not (folder / "transformer").exists()
        loaded, _ = load_policy(folder)
        for name, value in found.policy.state_dict().items():
            stored = (
                value
                if checkpoint or not (".action." in name or name.startswith(("expert.", "propr")))
                else value.half().float()
            )
            assert torch.equal(loaded.state_dict()[name], stored), name
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 10e6
    settings = json.loads((folder / "policy.json").read_text())
    settings["packaged"] = "0" * 12
    (folder / "policy.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="000000000000, on which it was trained"):
        load_policy(folder)
