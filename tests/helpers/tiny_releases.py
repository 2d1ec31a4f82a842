"""Tiny releases on disk: stock models with random weights, their tensors under the original names, and what is asked of conversions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from physisforcing.worldmodel.convert.command import ConvertConfig, run
from released_checkpoints import (
    LATENTS,
    T5,
    TINY_VAE,
    TINY_WAN,
    WanVae,
    original_autoencoder,
    original_transformer,
    random_state,
    save_shards,
)

WAN_WEIGHTS = "diffusion_pytorch_model"


def stock(kind: Any, **config: Any) -> Any:
    """A stock model with random weights, none of them at a constant that two tensors share."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = kind(**config).eval()
        for value in model.parameters():
            torch.nn.init.normal_(value, std=0.2)
    return model


def wan_transformer(in_channels: int = 8, out_channels: int = 8) -> Any:
    from diffusers import WanTransformer3DModel

    heads = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "num_layers": 2, "freq_dim": 16}
    return stock(WanTransformer3DModel, in_channels=in_channels, out_channels=out_channels, text_dim=16, **heads)


def wan_vae(nested: bool) -> Any:
    from diffusers import AutoencoderKLWan

    colours = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16} if nested else {}
    config = TINY_VAE | {"num_res_blocks": 1, "is_residual": nested} | colours | LATENTS
    return stock(AutoencoderKLWan, **config, **({"decoder_base_dim": 8} if nested else {}))


def original_vae(model: Any, nested: bool) -> dict[str, torch.Tensor]:
    skeleton = WanVae(4, 8, TINY_VAE["dim_mult"], TINY_VAE["temperal_downsample"], nested, 8 if nested else None, 1)
    return original_autoencoder(model.state_dict(), skeleton)


def settings_of(model: Any) -> dict[str, Any]:
    return {key: value for key, value in model.config.items() if key[0] != "_"}


def same(a: Any, b: Any) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def t5_state() -> dict[str, torch.Tensor]:
    """A tiny text encoder of Wan's."""
    return random_state(T5(vocab=60, dim=16, inner=16, ffn=32, heads=2, layers=2), seed=5)


def write_settings(path: Path) -> Path:
    """What no shape of the tiny models says, with comments as the authors' configs have them."""
    model = json.dumps({**TINY_WAN, "model_type": "ti2v", "text_len": 512})
    path.write_text(f'{{\n  "transformer": {model},  // Wan\'s own\n  "vae": {json.dumps(LATENTS)}\n}}\n')
    return path


def write_release(folder: Path, tokenizer: Path) -> Path:
    """TI2V-5B's files in tiny: shards with an index, pickled autoencoder and text encoder, tokenizer."""
    save_shards(folder, original_transformer(wan_transformer().state_dict()), WAN_WEIGHTS, shards=3)
    torch.save(original_vae(wan_vae(nested=True), nested=True), folder / "Wan2.2_VAE.pth")
    torch.save(t5_state(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(tokenizer, folder / "google" / "umt5-xxl")
    return folder


def convert_release(release: Path, settings: Path, output: Path) -> Path:
    """The release in the types of its files, in many shards."""
    config = ConvertConfig(source=str(release), output=str(output), dtype="keep", config=str(settings))
    run(config, shard_bytes=20_000)
    return output
