"""Names in released checkpoints, against the original modules' structure, at full published size and without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.backbones.loading import TensorEntry, build_empty
from physisforcing.worldmodel.convert import parts
from physisforcing.worldmodel.convert.keys import KeyMap
from physisforcing.worldmodel.convert.sources import Source
from physisforcing.worldmodel.convert.wan_keys import autoencoder_keys, transformer_keys
from released_checkpoints import T5, WanModel, WanVae, original_autoencoder, original_cosmos, shapes

#: As Wan-AI's config.json files say.
A14B = {"dim": 5120, "ffn_dim": 13824, "freq_dim": 256, "in_dim": 36, "num_layers": 40, "out_dim": 16}
TI2V_5B = {"dim": 3072, "ffn_dim": 14336, "freq_dim": 256, "in_dim": 48, "num_layers": 30, "out_dim": 48}
VAE_21 = {"base": 96, "z": 16, "mult": [1, 2, 4, 4], "timed": [False, True, True], "nested": False}
VAE_22 = {"base": 160, "z": 48, "mult": [1, 2, 4, 4], "timed": [False, True, True], "nested": True, "decoder": 256}


def source(model: torch.nn.Module | dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Source:
    """Headers of a checkpoint without its data."""
    found = model if isinstance(model, dict) else shapes(model)
    place = Path("original.safetensors")
    entries = {name: TensorEntry(place, dtype, shape) for name, shape in found.items()}
    return Source.of_entries(place, entries)


def on_meta(kind: type[torch.nn.Module], **sizes: object) -> torch.nn.Module:
    with torch.device("meta"):
        return kind(**sizes)


@pytest.mark.parametrize(
    ("sizes", "heads", "parameters"),
    [(A14B, 40, 14_288_901_184), (TI2V_5B, 24, 4_999_787_712)],
    ids=["A14B", "TI2V-5B"],
)
def test_transformers_of_published_size_map_one_to_one(sizes: dict, heads: int, parameters: int) -> None:
    original = on_meta(WanModel, **sizes)
    part = parts.wan_transformer("transformer", source(original), {}, "config")
    assert sorted(part.origin.values()) == sorted(shapes(original))
    assert part.config["num_attention_heads"] == heads and part.config["attention_head_dim"] == 128
    assert sum(value.numel() for value in original.parameters()) == parameters


def test_transformer_names_agree_with_diffusers_own_converter() -> None:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    names = list(shapes(on_meta(WanModel, **{**TI2V_5B, "num_layers": 3})))
    names += [f"blocks.2.cross_attn.{leaf}" for leaf in ("k_img.weight", "v_img.bias", "norm_k_img.weight")]
    names += [f"img_emb.proj.{k}.{leaf}" for k in (0, 1, 3, 4) for leaf in ("weight", "bias")]
    theirs = convert_wan_transformer_to_diffusers({name: name for name in names})
    assert {transformer_keys().stock(name): name for name in names} == theirs


@pytest.mark.parametrize(
    ("sizes", "parameters"), [(VAE_21, 126_892_531), (VAE_22, 704_688_668)], ids=["Wan2.1", "Wan2.2"]
)
def test_autoencoders_of_published_size_are_recognised(sizes: dict, parameters: int) -> None:
    from diffusers import AutoencoderKLWan

    original = on_meta(WanVae, **sizes)
    part = parts.wan_autoencoder(source(original), {}, "config")
    stock = build_empty(AutoencoderKLWan, {key: value for key, value in part.config.items() if key[0] != "_"})
    assert sum(value.numel() for value in original.parameters()) == parameters
    place = {id(value): name for name, value in stock.state_dict(keep_vars=True).items()}
    by_position = original_autoencoder(stock.state_dict(keep_vars=True), original)
    assert part.origin == {place[id(value)]: name for name, value in by_position.items()}
    nested = sizes["nested"]
    assert part.config["scale_factor_spatial"] == (16 if nested else 8) and part.config["scale_factor_temporal"] == 4
    assert part.config["patch_size"] == (2 if nested else None) and "clip_output" not in part.config
    assert part.config["latents_mean"][1] == (-0.0052 if nested else -0.7089)


def test_names_of_the_first_autoencoder_agree_with_diffusers_own_converter() -> None:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    names = list(shapes(on_meta(WanVae, **VAE_21)))
    keys = autoencoder_keys(4, 2, nested=False)
    assert {keys.stock(name): name for name in names} == convert_wan_vae_to_diffusers({name: name for name in names})


def test_text_encoder_of_published_size_maps_one_to_one() -> None:
    original = on_meta(T5, vocab=256384, dim=4096, inner=4096, ffn=10240, heads=64, layers=24)
    part = parts.text_encoder(source(original, torch.bfloat16))
    assert sorted(part.origin.values()) == sorted(shapes(original)) and len(part.origin) == 242
    assert (part.config["d_kv"], part.config["num_heads"], part.config["vocab_size"]) == (64, 64, 256384)
    assert part.stored("shared.weight") is torch.bfloat16


def test_cosmos3_nano_maps_one_to_one_without_its_vision_tower() -> None:
    from diffusers import Cosmos3OmniTransformer

    nano = build_empty(
        Cosmos3OmniTransformer, {"action_gen": True, "action_dim": 64, "sound_gen": True, "sound_dim": 64}
    )
    original = shapes(original_cosmos(nano.state_dict()))
    tower = {f"model.net.language_model.visual.blocks.{k}.norm1.weight": (1152,) for k in range(27)}
    tower |= {"model.visual.patch_embed.proj.bias": (1152,)}  # exports of some versions
    part = parts.cosmos3_transformer(source(original | tower, torch.bfloat16), {}, "config", torch.bfloat16)
    assert part.origin == dict(zip(nano.state_dict(), original, strict=True))
    assert list(part.left_out.values()) == [28]
    assert {key: part.config[key] for key in nano.config if key[0] != "_"} == {
        key: value for key, value in nano.config.items() if key[0] != "_"
    }
    assert part.stored("time_embedder.linear_1.weight") is torch.float32  # as the class keeps it
    assert part.stored("proj_in.weight") is torch.bfloat16


def test_a_rule_fits_a_whole_name_and_reads_both_ways() -> None:
    keys = KeyMap([("a.{i}.b.{p}", "c.{i}.d.{p}")], prefixes=("", "net."), left_out={"x.": "no use"})
    assert keys.stock("net.a.10.b.bias") == "c.10.d.bias" and keys.original("c.10.d.bias") == "a.10.b.bias"
    for other in ("a.1.b.weight.more", "a.01.b.weight", "a.1.b.gamma", "other.a.1.b.weight"):
        assert keys.stock(other) is None
    assert keys.why_left_out("net.x.y") == "no use" and keys.why_left_out("a.1.b.bias") is None


def test_what_shapes_say_is_not_overruled() -> None:
    sizes = {**TI2V_5B, "num_layers": 1}
    opened = source(on_meta(WanModel, **sizes))
    told = {"_class_name": "WanModel", "model_type": "ti2v", "text_len": 512, "num_heads": 24, "eps": 1e-6, **sizes}
    assert parts.wan_transformer("transformer", opened, told, "c.json").config["num_attention_heads"] == 24
    for wrong, field in (({"ffn_dim": 8960}, "ffn_dim"), ({"dim": 5120}, "dim"), ({"num_heads": 7}, "num_heads")):
        with pytest.raises(UserError, match=field):
            parts.wan_transformer("transformer", opened, told | wrong, "c.json")
    with pytest.raises(UserError, match="num_layers") as caught:
        parts.wan_transformer("transformer", opened, {"num_layer": 1}, "c.json")
    assert "c.json" in str(caught.value)
