"""The stock models' configs, from the shapes of a checkpoint's tensors and what its own config says beyond them.

What a shape says is not asked for, and what is asked for may not contradict it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from physisforcing.core.errors import UserError, unknown_name

Shapes = Mapping[str, tuple[int, ...]]

#: Wan's transformers have this head size at every published width.
HEAD_DIM = 128
#: What a ``WanModel`` calls what ``WanTransformer3DModel`` calls otherwise.
_WAN_NAMES = {"in_dim": "in_channels", "out_dim": "out_channels", "num_heads": "num_attention_heads"}
_WAN_SAME = ("ffn_dim", "freq_dim", "text_dim", "num_layers", "eps", "patch_size", "cross_attn_norm", "qk_norm")
#: Fields of a ``WanModel`` that say nothing about the stock model.
_WAN_ASIDE = ("_class_name", "_diffusers_version", "model_type", "text_len", "window_size", "dim")


def read_jsonc(path: Path) -> dict[str, Any]:
    """A JSON object; lines may end in ``//`` comments, as in the authors' configs."""
    try:
        text = re.sub(r"(?m)(?:^|(?<=[\s,{\[]))//.*$", "", path.read_text(encoding="utf-8"))
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(str(path), got=str(error), wanted="a JSON file", fix="check the file") from error
    if not isinstance(content, dict):
        raise UserError(str(path), got=type(content).__name__, wanted="an object of settings", fix="check the file")
    return content


class Look:
    """Reads numbers out of shapes; ``UserError`` with file and tensor where one is missing."""

    def __init__(self, shapes: Shapes, where: Path, name: Callable[[str], str] = lambda bare: bare) -> None:
        self.shapes, self.where, self.name = shapes, where, name

    def shape(self, bare: str) -> tuple[int, ...]:
        """Shape of the tensor that the checkpoint calls ``bare``, without its prefix."""
        found = self.shapes.get(self.name(bare))
        if found is None:
            got, fix = f"no {self.name(bare)}", "copy the whole checkpoint, or give the file that holds it"
            raise UserError(str(self.where), got=got, wanted="the tensors of this kind of model", fix=fix)
        return found

    def has(self, bare: str) -> bool:
        return self.name(bare) in self.shapes

    def count(self, pattern: str) -> int:
        """One more than the highest number in the first group of ``pattern`` over all names; 0 for none."""
        return 1 + max((int(found[1]) for name in self.shapes if (found := re.search(pattern, name))), default=-1)


def merged(inferred: dict[str, Any], given: Mapping[str, Any], where: str, known: Iterable[str]) -> dict[str, Any]:
    """``inferred`` with what ``given`` adds. ``UserError`` for an unknown field and one that contradicts the shapes."""
    known = set(known)
    for name, value in given.items():
        if name not in known:
            raise unknown_name(f"{where}: {name}", name, known, see="docs/convert.md")
        value = list_of(value)
        if name in inferred and inferred[name] != value:
            fix = "use the config that belongs to these weights"
            wanted = f"{inferred[name]}, as the tensors' shapes say"
            raise UserError(f"{where}: {name}", got=value, wanted=wanted, fix=fix)
    return inferred | {name: value for name, value in given.items() if name not in inferred}


def wan_transformer(look: Look, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of ``WanTransformer3DModel``. ``given``: a ``WanModel``'s config, or none: heads of 128 are taken then."""
    dim, channels, *patch = look.shape("patch_embedding.weight")
    config: dict[str, Any] = {
        "patch_size": list(patch),
        "in_channels": channels,
        "out_channels": look.shape("head.head.weight")[0] // prod(patch),
        "text_dim": look.shape("text_embedding.0.weight")[1],
        "freq_dim": look.shape("time_embedding.0.weight")[1],
        "ffn_dim": look.shape("blocks.0.ffn.0.weight")[0],
        "num_layers": look.count(r"(?:^|\.)blocks\.(\d+)\."),
        "cross_attn_norm": look.has("blocks.0.norm3.weight"),
        "qk_norm": "rms_norm_across_heads" if look.has("blocks.0.self_attn.norm_q.weight") else None,
    }
    if look.has("img_emb.proj.1.weight"):
        config |= {"image_dim": look.shape("img_emb.proj.0.weight")[0], "added_kv_proj_dim": dim}
        if look.has("img_emb.emb_pos"):
            config["pos_embed_seq_len"] = look.shape("img_emb.emb_pos")[1]
    merged({"dim": dim}, {"dim": given.get("dim", dim)}, where, ("dim",))
    told = {_WAN_NAMES.get(key, key): value for key, value in given.items() if key not in _WAN_ASIDE}
    if isinstance(told.get("qk_norm"), bool):
        told["qk_norm"] = "rms_norm_across_heads" if told["qk_norm"] else None
    known = (*_WAN_NAMES.values(), *_WAN_SAME, "rope_max_seq_len")
    config = {"eps": 1e-6} | merged(config, told, where, known)
    heads = config.get("num_attention_heads") or (dim // HEAD_DIM if dim % HEAD_DIM == 0 else 0)
    if heads < 1 or dim % heads:
        wanted, fix = f"a number that divides the width {dim}", "config=FILE with the model's own num_heads"
        raise UserError(f"{where}: num_heads", got=config.get("num_attention_heads"), wanted=wanted, fix=fix)
    return config | {"num_attention_heads": heads, "attention_head_dim": dim // heads}


def wan_original(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``WanModel``'s config.json from that of a ``WanTransformer3DModel``."""
    into, out = config["in_channels"], config["out_channels"]
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    told = {"_class_name": "WanModel", "model_type": "i2v" if into > out else "ti2v" if out == 48 else "t2v"}
    told |= {"dim": dim, "in_dim": into, "out_dim": out, "num_heads": config["num_attention_heads"], "text_len": 512}
    told |= {name: config[name] for name in ("ffn_dim", "freq_dim", "num_layers", "eps")}
    usual = {"patch_size": [1, 2, 2], "text_dim": 4096}
    return told | {name: config[name] for name, value in usual.items() if list_of(config[name]) != list_of(value)}


def list_of(value: Any) -> Any:
    """A tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value


def wan_autoencoder(look: Look, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of ``AutoencoderKLWan``: Wan2.2's where the encoder's stages are nested, else Wan2.1's.

    The mean and deviation of latents are in no checkpoint: those of the published models are known by their 16 and 48 channels,
    others have to be ``given``. diffusers' converter also writes ``clip_output``, which the class refuses; it is not written here.
    """
    nested = any(name.startswith("encoder.downsamples.0.downsamples.") for name in look.shapes)
    stages = _nested_stages(look) if nested else _counted_stages(look)
    base, channels = look.shape("encoder.conv1.weight")[:2]
    latents = look.shape("conv2.weight")[0]
    config: dict[str, Any] = {
        "base_dim": base,
        "z_dim": latents,
        "dim_mult": [width // base for width, _, _ in stages],
        "num_res_blocks": stages[0][1],
        "attn_scales": [],
        "temperal_downsample": [timed for _, _, timed in stages[:-1]],
        "is_residual": nested,
        "in_channels": channels,
        "out_channels": look.shape("decoder.head.2.weight")[0],
    }
    patch = round((channels / 3) ** 0.5)
    config["scale_factor_spatial"] = 2 ** (len(stages) - 1) * patch
    config["scale_factor_temporal"] = 2 ** sum(config["temperal_downsample"])
    if nested:
        config["decoder_base_dim"] = look.shape("decoder.head.0.gamma")[0] // config["dim_mult"][0]
        config["patch_size"] = patch if patch > 1 else None
    if (latents, nested) in LATENTS:
        config["latents_mean"], config["latents_std"] = LATENTS[latents, nested]
    config = merged(config, given, where, ("latents_mean", "latents_std"))
    for name in ("latents_mean", "latents_std"):
        if len(config.get(name) or ()) != latents:
            wanted = f"{latents} numbers"
            raise UserError(f"{where}: {name}", got=config.get(name), wanted=wanted, fix="config=FILE with them")
    return config


def _counted_stages(look: Look) -> list[tuple[int, int, bool]]:
    """(width, blocks, whether time is halved) of each stage of Wan2.1's encoder, whose blocks are counted through."""
    stages, blocks, width = [], 0, 0
    for index in range(look.count(r"^encoder\.downsamples\.(\d+)\.")):
        place = f"encoder.downsamples.{index}"
        if look.has(f"{place}.resample.1.weight"):
            stages.append((width, blocks, look.has(f"{place}.time_conv.weight")))
            blocks = 0
        else:
            width, blocks = look.shape(f"{place}.residual.6.weight")[0], blocks + 1
    return [*stages, (width, blocks, False)]


def _nested_stages(look: Look) -> list[tuple[int, int, bool]]:
    """The same of Wan2.2's encoder."""
    stages = []
    for index in range(look.count(r"^encoder\.downsamples\.(\d+)\.")):
        place = f"encoder.downsamples.{index}.downsamples"
        blocks = look.count(rf"^{re.escape(place)}\.(\d+)\.residual\.")
        width = look.shape(f"{place}.0.residual.6.weight")[0]
        stages.append((width, blocks, look.has(f"{place}.{blocks}.time_conv.weight")))
    return stages


def text_encoder(look: Look) -> dict[str, Any]:
    """Arguments of ``UMT5Config``; every one of them is in a shape."""
    vocabulary, width = look.shape("token_embedding.weight")
    buckets, heads = look.shape("blocks.0.pos_embedding.embedding.weight")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": look.shape("blocks.0.attn.q.weight")[0] // heads,
        "d_ff": look.shape("blocks.0.ffn.fc1.weight")[0],
        "num_layers": look.count(r"^blocks\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def cosmos3_transformer(look: Look, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of ``Cosmos3OmniTransformer``. What no shape says has Cosmos3-Nano's value (the class's default) or is ``given``."""
    layer = "language_model.model.layers.0"
    vocabulary, width = look.shape("language_model.model.embed_tokens.weight")
    head = look.shape(f"{layer}.self_attn.q_norm_moe_gen.weight")[0]
    patch = int(given.get("latent_patch_size", 2))
    numbers = look.shape("vae2llm.weight")[1]
    config: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "head_dim": head,
        "num_attention_heads": look.shape(f"{layer}.self_attn.q_proj.weight")[0] // head,
        "num_key_value_heads": look.shape(f"{layer}.self_attn.k_proj.weight")[0] // head,
        "intermediate_size": look.shape(f"{layer}.mlp.up_proj.weight")[0],
        "num_hidden_layers": look.count(r"language_model\.model\.layers\.(\d+)\."),
        "attention_bias": look.has(f"{layer}.self_attn.q_proj.bias"),
        "hidden_act": "silu" if look.has(f"{layer}.mlp.gate_proj.weight") else "relu2",
        "qk_norm_for_text": look.has(f"{layer}.self_attn.q_norm.weight"),
        "use_und_k_norm_for_gen": look.has(f"{layer}.self_attn.k_norm_und_for_gen.weight"),
        "patch_latent_dim": numbers,
        "latent_patch_size": patch,
        "latent_channel": numbers // patch**2,
        "sound_gen": look.has("sound2llm.weight"),
        "action_gen": look.has("action2llm.fc.weight"),
    }
    if config["sound_gen"]:
        config["sound_dim"] = look.shape("sound2llm.weight")[1]
    if config["action_gen"]:
        domains, both = look.shape("action2llm.fc.weight")
        config |= {"num_embodiment_domains": domains, "action_dim": both // width}
    if head != HEAD_DIM and "rope_axes_dim" not in given and not given.get("rope_scaling"):
        wanted, fix = f"three numbers with the sum {head // 2}", "config=FILE with rope_axes_dim"
        raise UserError(f"{where}: rope_axes_dim", got=None, wanted=wanted, fix=fix)
    return merged(config, given, where, {*config, *COSMOS_SAID})


#: Settings of ``Cosmos3OmniTransformer`` that no shape says.
COSMOS_SAID = (
    "attention_dropout", "base_fps", "enable_fps_modulation", "rms_norm_eps", "rope_scaling", "rope_theta", "rope_axes_dim",
    "sound_latent_fps", "timestep_scale", "unified_3d_mrope_reset_spatial_ids", "unified_3d_mrope_temporal_modality_margin",
)  # fmt: skip


def cosmos3_said(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a framework's ``config.json`` (``model.config``) says of the settings that no shape says."""
    told = content.get("model", content)
    told = told.get("config", told) if isinstance(told, dict) else {}
    expert = told.get("diffusion_expert_config") or {}
    said = {name: expert[name] for name in COSMOS_SAID if name in expert}
    said |= {name: told[name] for name in ("sound_latent_fps",) if name in told}
    if "patch_spatial" in expert:
        said["latent_patch_size"] = expert["patch_spatial"]
    return said


#: (Latent channels, Wan2.2's nested layout) -> mean and standard deviation of the published autoencoders' latents.
LATENTS: dict[tuple[int, bool], tuple[list[float], list[float]]] = {
    (16, False): (
        [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497,
         0.2503, -0.2921],
        [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251,
         1.9160],
    ),
    (48, True): (
        [-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098,
         0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567,
         -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957,
         0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667],
        [0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454,
         0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999,
         0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444,
         0.4089, 0.7468, 0.7744],
    ),
}  # fmt: skip
