"""A policy's folder comes back bit by bit, stock diffusers reads its backbone, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from physisforcing.core.errors import UserError
from physisforcing.policy.checkpoint import EXPERT, SETTINGS, PolicyInfo, load_policy, save_policy
from physisforcing.policy.config import PolicyModelConfig
from physisforcing.policy.model import WorldActionModel
from physisforcing.worldmodel.backbones.wan import ConditionerConfig, ProprioceptionConditioner
from tests.helpers.tiny_policy import tiny_batch, tiny_policy, tiny_transformer

INFO = PolicyInfo(
    canvas="robotwin", size=(384, 320), frames=9, frame_stride=4, text={"encoder": "umt5", "tokens": 128}, tasks=("a",)
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_policy(tmp_path / "policy", tiny_policy("optional_idm"), INFO)
    return tmp_path / "policy"


def test_round_trip(saved: Path) -> None:
    model, loaded = tiny_policy("optional_idm"), load_policy(saved)
    assert loaded[1] == INFO
    assert loaded[0].config == model.config and loaded[0].tap == model.tap
    for (name, one), (other, two) in zip(model.state_dict().items(), loaded[0].state_dict().items(), strict=True):
        assert name == other and torch.equal(one, two), name
    batch = tiny_batch()
    made = []
    for policy in (model, loaded[0]):
        with torch.no_grad():
            context = policy.context(batch["text"], batch["state_BA"])
            kept = policy.prefill(batch["latents_BCFhw"], torch.zeros(2), context)
            made.append(policy.act(batch["actions_BPA"], policy.action_times(torch.tensor([0.5, 1.0])), kept))
    assert torch.equal(*made)


def test_the_backbone_is_a_stock_folder(saved: Path) -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    stock = WanTransformer3DModel.from_pretrained(saved / "transformer", local_files_only=True)
    for (name, one), (other, two) in zip(
        tiny_transformer().state_dict().items(), stock.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(one, two)


def test_the_backbones_conditioner_goes_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    conditioner = ProprioceptionConditioner(ConditionerConfig(state_dim=3, hidden=8, width=12))
    conditioner.set_statistics(torch.randn(10, 3, 3))
    config = PolicyModelConfig(action_dim=3, state_dim=3, width=16, ffn_dim=24, proprioception="backbone")
    model = WorldActionModel(tiny_transformer(), config, conditioner=conditioner)
    save_policy(tmp_path / "policy", model, INFO, torch.float16)
    loaded, _ = load_policy(tmp_path / "policy")
    state, text = torch.randn(2, 3, 3), torch.zeros(2, 5, 12)
    context = loaded.context(text, state)
    assert context.shape == (2, 8, 12)
    torch.testing.assert_close(context, model.context(text, state), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "damage", ["missing", "extra", "shape", "field", "format", "unknown", "nothing", "tap", "packaged"]
)
def test_what_does_not_fit_is_named(saved: Path, damage: str) -> None:
    settings, expert = json.loads((saved / SETTINGS).read_text()), load_file(saved / EXPERT)
    if damage == "missing":
        expert.pop("expert.action_in.weight")
    elif damage == "extra":
        expert["expert.other"] = torch.zeros(1)
    elif damage == "shape":
        expert["expert.action_in.weight"] = torch.zeros(16, 4)
    elif damage == "field":
        settings["model"].pop("action_shift")
    elif damage == "format":
        settings["format"] = 7
    elif damage == "unknown":
        settings["model"]["speed"] = 1
    elif damage == "tap":
        settings.pop("tap")
    elif damage == "packaged":
        settings["packaged"] = None
    else:
        (saved / SETTINGS).unlink()
    save_file(expert, saved / EXPERT)
    if damage != "nothing":
        (saved / SETTINGS).write_text(json.dumps(settings))
    words = {
        "missing": "expert.action_in.weight", "extra": "expert.other", "shape": "action_in", "field": "action_shift",
        "format": "format", "unknown": "speed", "nothing": SETTINGS, "tap": "tap: got 'nothing', wanted int",
        "packaged": "packaged: got None, wanted str",
    }  # fmt: skip
    with pytest.raises(UserError, match=words[damage]):
        load_policy(saved)
