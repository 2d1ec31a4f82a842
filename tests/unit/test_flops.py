"""The count of operations against torch's own counter, and against what is known of the large models."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tiny_paper
from physisforcing.worldmodel.backbones.cosmos3 import Cosmos3Backbone
from physisforcing.worldmodel.backbones.loading import build_empty
from physisforcing.worldmodel.backbones.wan_paper import WAN_LORA_TARGETS, WanBackbone
from physisforcing.worldmodel.training.config import LoraConfig
from physisforcing.worldmodel.training.flops import forward_flops, named_peak, step_flops

TI2V = {"num_attention_heads": 24, "num_layers": 30, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336}
A14B = {"num_attention_heads": 40, "num_layers": 40, "in_channels": 36, "out_channels": 16, "ffn_dim": 13824}


def counted(backbone, shape, text, shown) -> float:
    """By torch's counter over a forward and a backward pass, attention as plain matrix products."""
    draw = torch.Generator().manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        x = torch.randn(shape, generator=draw)
        backbone(x, torch.tensor([0.5]), text, shown)[0].square().mean().backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("rank", [0, 4])
def test_wan_is_counted_as_torch_counts_it(rank):
    backbone = WanBackbone(tiny_paper.wan_transformer(8, 8, 0), stride=(4, 16, 16))
    if rank:
        pytest.importorskip("peft")
        from physisforcing.worldmodel.training.lora import add_lora

        add_lora(backbone.transformer, LoraConfig(rank=rank), WAN_LORA_TARGETS, torch.float32)
    shape, text = (1, 8, 3, 8, 12), torch.randn(1, 16, 16)
    found = step_flops(backbone, shape, 16)
    wanted = counted(backbone, shape, text, backbone.conditions(torch.randn(1, 8, 1, 8, 12), text, 3))
    assert found == pytest.approx(wanted, rel=0.03)


def test_cosmos3_is_counted_as_torch_counts_it():
    backbone = Cosmos3Backbone(tiny_paper.cosmos_transformer())
    shape, text = (1, 8, 3, 8, 12), torch.arange(20)[None]
    found = step_flops(backbone, shape, 20)
    wanted = counted(backbone, shape, text, backbone.conditions(torch.randn(1, 8, 1, 8, 12), text, 3))
    assert found == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_forward_pass_is_counted_as_torch_counts_it_whatever_is_trained(frozen):
    backbone = WanBackbone(tiny_paper.wan_transformer(8, 8, 0), stride=(4, 16, 16)).requires_grad_(not frozen)
    shape, text = (1, 8, 3, 8, 12), torch.randn(1, 16, 16)
    shown = backbone.conditions(torch.randn(1, 8, 1, 8, 12), text, 3)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone(torch.randn(shape), torch.tensor([0.5]), text, shown)
    assert forward_flops(backbone, shape, 16) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12), ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_the_peak_of_a_device_by_its_name(name, peak):
    assert named_peak(name) == peak


@pytest.mark.parametrize(
    ("config", "channels", "size", "forward"), [(TI2V, 48, (21, 30, 40), 71e12), (A14B, 16, (21, 60, 80), 1135e12)]
)
def test_the_large_models_cost_what_is_known_of_them(config, channels, size, forward):
    """Three times the forward pass, within what the text tokens and the layers around the blocks add."""
    from diffusers import WanTransformer3DModel

    model = build_empty(WanTransformer3DModel, {**config, "attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256})
    backbone = WanBackbone(model, stride=(4, 16, 16))
    assert step_flops(backbone, (1, channels, *size), 512) == pytest.approx(3 * forward, rel=0.03)
    assert forward_flops(backbone, (1, channels, *size), 512) == pytest.approx(forward, rel=0.03)
    model.requires_grad_(False)
    tokens, width = size[0] * size[1] * size[2] // 4, 128 * config["num_attention_heads"]
    attention = 4 * tokens * (tokens + 512) * width * config["num_layers"]
    frozen = step_flops(backbone, (1, channels, *size), 512)
    assert frozen == pytest.approx(3 * attention + 2 * (forward - attention), rel=0.03)


def test_results_are_gathered_as_they_were_measured(repository):
    place = importlib.util.spec_from_file_location("gathering", repository / "docs" / "results" / "card_rows.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    for data, page in module.TOPICS.values():
        stored, text = json.loads((module.FOLDER / data).read_text()), (module.FOLDER / page).read_text()
        assert module.gathered(stored, []) == stored and module.page(text, stored) == text
    new = {
        "claim": "training/memory/5b",
        "value": 1.5,
        "hardware": "NVIDIA H200",
        "command": "c",
        "against": {"fits_gb": [24]},
    }
    known = new | {"claim": "training/memory/h200/5b", "value": 2.0}
    other = new | {"claim": "training/memory/h100/5b", "value": 3.0}
    assert module.gathered([known, other], [new]) == [other, new | {"claim": "training/memory/h200/5b"}]
    usual, slower = (
        {
            "claim": c,
            "value": v,
            "hardware": "NVIDIA H200",
            "command": "c",
            "against": {"gpus": 1},
        }
        for c, v in (("training/5b/a", 2.0), ("training/5b/b", 3.0))
    )
    found = module.compared([usual, slower], "training/5b/a")
    assert [line["against"] for line in found] == [
        {"gpus": 1},
        {"gpus": 1, "ratio": 1.5, "ratio_to": "training/5b/h200/a"},
    ]
