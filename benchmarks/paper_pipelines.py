"""Pipeline folders of the large backbones with random weights, in diffusers' layout: what the benchmarks run where published weights would stand.

The text encoder has one layer: nothing of it is measured. The autoencoder's latents are standardised on one clip.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cost_networks import in_bfloat16

WAN: dict[str, Any] = {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "5b": WAN | {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
    "a14b": WAN
    | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, "in_channels": 36, "out_channels": 16},
    "cosmos3": {},
}
VAES: dict[int, dict[str, Any]] = {
    16: {"z_dim": 16, "scale_factor_spatial": 8},
    48: {
        "z_dim": 48, "base_dim": 160, "decoder_base_dim": 256, "is_residual": True, "in_channels": 12, "out_channels": 12,
        "patch_size": 2, "scale_factor_spatial": 16,
    },
}  # fmt: skip
#: What ``use_tiny_sizes`` changes in TRANSFORMERS.
TINY_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "5b": {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3, "ffn_dim": 96},
    "a14b": {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3, "ffn_dim": 96},
    "cosmos3": {
        "head_dim": 16, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 3, "vocab_size": 400, "rope_axes_dim": [4, 2, 2],
    },
}  # fmt: skip


def use_tiny_sizes() -> None:
    """From here on ``build`` makes models that a CPU trains."""
    for kind, more in TRANSFORMERS.items():
        more |= TINY_TRANSFORMERS[kind]
    VAES[16] |= {"base_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1}
    VAES[48] |= {"base_dim": 4, "decoder_base_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1}


def build(kind: str, folder: Path, frames_THWC: np.ndarray, device: torch.device) -> None:
    """A pipeline folder in diffusers' layout: random weights, latents standardised on this clip."""
    import diffusers

    torch.manual_seed(0)
    cosmos = kind == "cosmos3"
    name = "Cosmos3OmniTransformer" if cosmos else "WanTransformer3DModel"
    with device:
        model = in_bfloat16(getattr(diffusers, name)(**TRANSFORMERS[kind]))
    model.save_pretrained(folder / "transformer")
    del model
    _save_vae(16 if kind == "a14b" else 48, folder / "vae", frames_THWC, device)
    shift = 10.0 if cosmos else 5.0
    diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    ).save_pretrained(folder / "scheduler")
    _save_text(folder, cosmos)
    _save_index(folder, cosmos, kind)


def _save_vae(channels: int, folder: Path, frames_THWC: np.ndarray, device: torch.device) -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(1)
    neutral = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    with device:
        vae = AutoencoderKLWan(**VAES[channels], **neutral).to(
            torch.bfloat16 if device.type == "cuda" else torch.float32
        )
    video = torch.from_numpy(frames_THWC).to(device, vae.dtype).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mode().float()[0]
    mean, std = latents.mean((1, 2, 3)), latents.std((1, 2, 3)).clamp(min=1e-4)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.save_pretrained(folder)


def _save_text(folder: Path, cosmos: bool) -> None:
    """A tokenizer that knows the words of two sentences, and for Wan an encoder of one layer with the width of UMT5-xxl."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
    import tiny_paper

    if cosmos:
        tiny_paper.bytes_tokenizer().save_pretrained(folder / "text_tokenizer")
        return
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = tiny_paper.words_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    config = UMT5Config(vocab_size=len(tokenizer), d_model=4096, d_kv=64, d_ff=256, num_layers=1, num_heads=4)
    UMT5EncoderModel(config).to(torch.bfloat16).save_pretrained(folder / "text_encoder")


def _save_index(folder: Path, cosmos: bool, kind: str) -> None:
    import diffusers

    from physisforcing.worldmodel.convert.pipeline import cosmos_index

    index: dict[str, Any] = {"_diffusers_version": diffusers.__version__, "vae": ["diffusers", "AutoencoderKLWan"]}
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    if cosmos:
        index |= cosmos_index() | {
            "transformer": ["diffusers", "Cosmos3OmniTransformer"],
            "enable_safety_checker": False,
        }
        index["text_tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    else:
        index |= {
            "_class_name": "WanImageToVideoPipeline", "transformer": ["diffusers", "WanTransformer3DModel"],
            "text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "image_encoder": [None, None], "image_processor": [None, None], "transformer_2": [None, None],
            "boundary_ratio": None, "expand_timesteps": kind == "5b",
        }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
