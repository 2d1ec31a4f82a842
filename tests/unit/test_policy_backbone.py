"""Where a policy's weights come from: each kind of export, drawn weights, what is left out, and another backbone in the same policy."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from physisforcing.core.errors import UserError
from physisforcing.core.files import locked
from physisforcing.core.paths import weights_root
from physisforcing.policy import backbone as backbones
from physisforcing.policy.backbone import build_policy, open_backbone
from physisforcing.policy.checkpoint import PolicyInfo, load_policy, save_policy
from physisforcing.policy.config import PolicyModelConfig
from physisforcing.policy.initial import resize
from physisforcing.policy.swap import swap_backbone
from physisforcing.worldmodel.backbones.folder import save_settings
from physisforcing.worldmodel.storage import fingerprint, latents_fingerprint
from tests.helpers.tiny_paper import cosmos_transformer, vae, wan_transformer

PICO = weights_root() / "worldmodel"
WEIGHTS = "diffusion_pytorch_model.safetensors"
#: An expert for the shipped transformer, and one for the tiny large ones.
SMALL = {"width": 32, "ffn_dim": 48, "steps_per_latent": 8.0}


def pico_config(**more: Any) -> PolicyModelConfig:
    return PolicyModelConfig(**(SMALL | more))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training writes of a large backbone, with a pipeline's autoencoder in the same folder."""
    folder = tmp_path_factory.mktemp("large") / "export"
    wan_transformer(8, 8, 4).save_pretrained(folder / "transformer")
    save_settings(folder / "transformer", first_latent="pinned", tap=2)
    vae(8, 16).save_pretrained(folder / "vae")
    save_file({"phi.1.weight": torch.zeros(2), "psi.1.weight": torch.zeros(2)}, folder / "physics_heads.safetensors")
    (folder / "adapter").mkdir()
    save_file({"lora_A": torch.zeros(2)}, folder / "adapter" / "adapter_model.safetensors")
    return folder


def test_the_shipped_backbone_and_its_conditioner() -> None:
    model, report = build_policy("shipped", pico_config(proprioception="backbone"))
    stored = load_file(PICO / "transformer" / WEIGHTS)
    names = {name for name in model.transformer.state_dict() if ".action." not in name}
    assert names == set(stored)
    assert all(torch.equal(model.transformer.state_dict()[name], value.float()) for name, value in stored.items())
    for name, value in load_file(PICO / "conditioner.safetensors").items():
        assert torch.equal(model.proprioception.state_dict()[name], value.float()), name
    wanted = resize(stored["blocks.1.attn1.to_q.weight"].float(), (256, 32))
    torch.testing.assert_close(model.blocks[1].action.attn1.to_q.weight, wanted)
    assert report["video"]["from"] == "shipped" and report["video"]["weights"] == "taken"
    assert report["video"]["tensors"] == len(stored)
    assert report["video"]["fingerprint"] == fingerprint(PICO / "transformer")
    assert report["proprioception"]["from"] == "shipped" and report["action_expert"]["drawn_tensors"] == 4
    heads = load_file(PICO / "physics_heads.safetensors")
    assert {name: left["tensors"] for name, left in report["not_taken"].items()} == {
        "physics_heads.safetensors": len(heads)
    }
    assert report["latents"] == latents_fingerprint(weights_root() / "vae")
    tap = json.loads((PICO / "denoiser.json").read_text())["tap"]
    assert model.tap == report["video"]["tap"] == tap
    total = sum(value.numel() for value in model.state_dict().values())
    assert total == sum(report[part]["parameters"] for part in ("video", "action_expert", "proprioception"))
    assert str(PICO.parent) not in json.dumps(report)


def test_a_linear_token_leaves_the_conditioner() -> None:
    _, report = build_policy("shipped", pico_config(initial="random"))
    assert set(report["not_taken"]) == {"physics_heads.safetensors", "conditioner.safetensors"}
    assert report["action_expert"]["from"] == "drawn, seed 0"
    assert report["action_expert"]["drawn_tensors"] == report["action_expert"]["tensors"]
    assert report["proprioception"] == {"tensors": 2, "parameters": 15 * 384, "from": "drawn, seed 0"}


def test_drawn_weights_are_the_seeds() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, report = build_policy(None, pico_config(proprioception="backbone"), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    again, _ = build_policy("random:shipped", pico_config(proprioception="backbone"), seed=3)
    other, _ = build_policy("random:shipped", pico_config(proprioception="backbone"), seed=4)
    shipped, _ = build_policy("shipped", pico_config(proprioception="backbone"))
    for (name, one), two in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    for name in ("transformer.blocks.0.attn1.to_q.weight", "proprioception.net.0.weight"):
        rows = [model.state_dict()[name] for model in (first, other, shipped)]
        assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert not first.transformer.proj_out.weight.any()
    assert torch.equal(first.proprioception.state_mean, shipped.proprioception.state_mean)
    assert report["video"]["weights"] == "drawn, seed 3" and report["video"]["fingerprint"] == ""
    assert {name: value.shape for name, value in first.state_dict().items()} == {
        name: value.shape for name, value in shipped.state_dict().items()
    }


def test_an_export_of_a_large_backbone(large: Path) -> None:
    config = pico_config(action_dim=3, state_dim=3, width=16, ffn_dim=24, steps_per_latent=16.0)
    model, report = build_policy(large, config, dtype=torch.bfloat16)
    assert report["video"]["from"] == "/".join(large.parts[-2:]) and model.tap == 2
    assert {name: left["tensors"] for name, left in report["not_taken"].items()} == {
        "physics_heads.safetensors": 2,
        "adapter": 1,
    }
    assert report["latents"] == latents_fingerprint(large / "vae")
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16  # and what diffusers keeps in float32 is
    assert model.blocks[0].scale_shift_table.dtype == torch.float32
    assert open_backbone(large / "transformer").latents == report["latents"]
    with pytest.raises(UserError, match=r"policy\.proprioception"):
        build_policy(large, pico_config(proprioception="backbone"))


def test_drawn_weights_of_a_large_backbone_keep_its_types(large: Path) -> None:
    config = pico_config(action_dim=3, state_dim=3, width=16, ffn_dim=24)
    taken, _ = build_policy(large, config, dtype=torch.bfloat16)
    drawn, _ = build_policy(f"random:{large}", config, dtype=torch.bfloat16)
    kinds = [
        {name: (value.shape, value.dtype) for name, value in model.state_dict().items()} for model in (taken, drawn)
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("kind, word", [("conditioned", "conditioning channels"), ("cosmos", "Cosmos3"), ("two", "high and one for low"),
                                        ("none", "config.json"), ("nowhere", "on this disk")])  # fmt: skip
def test_what_cannot_be_a_backbone(kind: str, word: str, tmp_path: Path) -> None:
    place = tmp_path / "model"
    if kind == "conditioned":
        wan_transformer(36, 16, 2).save_pretrained(place / "transformer")
    elif kind == "cosmos":
        cosmos_transformer().save_pretrained(place / "transformer")
    elif kind == "two":
        for part in ("transformer", "transformer_2"):
            wan_transformer(16, 16, 2).save_pretrained(place / part)
    elif kind == "none":
        place.mkdir()
    with pytest.raises(UserError, match=word):
        open_backbone(place)


def test_other_latents_are_refused(tmp_path: Path) -> None:
    shutil.copytree(PICO, tmp_path / "mine")
    assert open_backbone(tmp_path / "mine").autoencoder == "shipped"  # by its latents
    vae(16, 8).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"autoencoder.*latents"):
        open_backbone(tmp_path / "mine", autoencoder=tmp_path / "other")
    with pytest.raises(UserError, match=r"policy\.state_dim"):
        build_policy("shipped", pico_config(state_dim=3, proprioception="backbone"))


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    model, report = build_policy("shipped", pico_config())
    info = PolicyInfo(latents=report["latents"], source=report)
    save_policy(tmp_path / "policy", model, info)
    (tmp_path / "policy" / "statistics.json").write_text("{}")
    return tmp_path / "policy"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The shipped world model trained further, so to speak."""
    shutil.copytree(PICO, tmp_path / "tuned")
    path = tmp_path / "tuned" / "transformer" / WEIGHTS
    path.chmod(0o644)
    save_file({name: value * 1.25 for name, value in load_file(path).items()}, path)
    return tmp_path / "tuned"


@pytest.mark.parametrize("copied", [False, True])
def test_another_backbone_in_a_policy(policy: Path, other: Path, copied: bool, tmp_path: Path) -> None:
    output = tmp_path / "swapped" if copied else None
    before, expert = fingerprint(policy), load_file(policy / "expert.safetensors")
    report = swap_backbone(policy, other, output)
    folder = output or policy
    assert (fingerprint(policy) == before) == copied
    model, info = load_policy(folder)
    for name, value in load_file(other / "transformer" / WEIGHTS).items():
        assert torch.equal(model.transformer.state_dict()[name], value.float()), name
    for name, value in expert.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert (folder / "statistics.json").read_text() == "{}"
    assert info.source["video"] == report and report["replaced"] == "shipped"
    assert report["from"].endswith("/tuned") and report["fingerprint"] == fingerprint(other / "transformer")
    assert report["not_taken"]["physics_heads.safetensors"] > 0 and report["notes"] == []
    assert info.source["action_expert"]["from"] == "the video's, resized"
    assert [path.name for path in tmp_path.iterdir() if path.name[0] == "."] == []


def test_a_swap_that_is_killed_loses_nothing(policy: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, names = fingerprint(policy), list[str]()
    rename = os.rename

    def once(old: Path, new: Path) -> None:
        if names:
            raise SystemExit("killed")
        names.append(Path(new).name)
        rename(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", once)
        with pytest.raises(SystemExit):
            swap_backbone(policy, other)
    assert names == [f".{policy.name}.replaced"] and not policy.exists()
    with pytest.raises(UserError, match="random:shipped"):
        swap_backbone(policy, "random:shipped")
    assert fingerprint(policy) == before, "put back, whatever the next call does then"
    with locked(policy, "conversion"), pytest.raises(UserError, match="in use"):
        swap_backbone(policy, other)
    swap_backbone(policy, other)
    assert fingerprint(policy) != before and load_policy(policy)[1].source["video"]["from"].endswith("/tuned")
    assert [path.name for path in policy.parent.iterdir() if path.name.startswith(f".{policy.name}.")] == []


def test_a_backbone_that_does_not_fit_changes_nothing(policy: Path, other: Path, large: Path, tmp_path: Path) -> None:
    before = fingerprint(policy)
    with pytest.raises(UserError, match=r"num_layers 3.*num_layers"):
        swap_backbone(policy, large)
    with pytest.raises(UserError, match="random:shipped"):
        swap_backbone(policy, "random:shipped")
    settings = json.loads((policy / "policy.json").read_text())
    (policy / "policy.json").write_text(json.dumps(settings | {"latents": "0123456789ab"}))
    with pytest.raises(UserError, match="0123456789ab"):
        swap_backbone(policy, other)
    (policy / "policy.json").write_text(json.dumps(settings | {"latents": ""}))
    report = swap_backbone(policy, other, tmp_path / "unknown")
    assert "autoencoder=FOLDER" in report["notes"][0]
    (policy / "policy.json").write_text(json.dumps(settings, indent=2) + "\n")
    assert fingerprint(policy) == before
    path = other / "transformer" / WEIGHTS
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(path).items()}, path)
    with pytest.raises(UserError, match="NaN"):
        swap_backbone(policy, other)
    assert fingerprint(policy) == before
    assert backbones.tail(policy) == "/".join(policy.parts[-2:])
