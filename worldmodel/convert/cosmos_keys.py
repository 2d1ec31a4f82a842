"""Names in checkpoints of NVIDIA's cosmos-framework and in ``Cosmos3OmniTransformer``."""

from __future__ import annotations

from .keys import KeyMap, Pairs

#: The framework's exports put the first before every name, its network alone has none.
PREFIXES = ("model.net.", "net.", "")
#: The vision tower has a name in the network and Qwen's own, which exports of some versions keep.
TOWERS = ("language_model.visual.", "model.visual.", "visual.")
VISION = "the reasoner's vision tower, which generation does not use"


def cosmos3_keys() -> KeyMap:
    """``Cosmos3VFMNetwork`` -> ``Cosmos3OmniTransformer``: Qwen's names with ``_moe_gen`` for the generation stream -> diffusers' own.

    The tower (``TOWERS``) reads pictures for the reasoner and is no part of the stock transformer.
    """
    model, layer = "language_model.model", "language_model.model.layers.{i}"
    pairs: Pairs = [
        (f"{model}.embed_tokens.weight", "embed_tokens.weight"),
        (f"{model}.norm.weight", "norm.weight"),
        (f"{model}.norm_moe_gen.weight", "norm_moe_gen.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("vae2llm.{p}", "proj_in.{p}"),
        ("llm2vae.{p}", "proj_out.{p}"),
        ("time_embedder.mlp.0.{p}", "time_embedder.linear_1.{p}"),
        ("time_embedder.mlp.2.{p}", "time_embedder.linear_2.{p}"),
        ("sound2llm.{p}", "audio_proj_in.{p}"),
        ("llm2sound.{p}", "audio_proj_out.{p}"),
        ("sound_modality_embed", "audio_modality_embed"),
        ("action_modality_embed", "action_modality_embed"),
    ]
    for old, new in (("action2llm", "action_proj_in"), ("llm2action", "action_proj_out")):
        pairs += [(f"{old}.fc.weight", f"{new}.fc.weight"), (f"{old}.bias.weight", f"{new}.bias.weight")]
    attention = {
        "q_proj": ("to_q", "add_q_proj"),
        "k_proj": ("to_k", "add_k_proj"),
        "v_proj": ("to_v", "add_v_proj"),
        "o_proj": ("to_out", "to_add_out"),
        "q_norm": ("norm_q", "norm_added_q"),
        "k_norm": ("norm_k", "norm_added_k"),
    }
    for old, (understanding, generation) in attention.items():
        pairs.append((f"{layer}.self_attn.{old}.{{p}}", f"layers.{{i}}.self_attn.{understanding}.{{p}}"))
        pairs.append((f"{layer}.self_attn.{old}_moe_gen.{{p}}", f"layers.{{i}}.self_attn.{generation}.{{p}}"))
    same = ["self_attn.k_norm_und_for_gen.{p}"]
    for stream in ("", "_moe_gen"):
        same += [f"input_layernorm{stream}.weight", f"post_attention_layernorm{stream}.weight"]
        same += [f"mlp{stream}.{part}_proj.weight" for part in ("gate", "up", "down")]
    pairs += [(f"{layer}.{name}", f"layers.{{i}}.{name}") for name in same]
    return KeyMap(pairs, PREFIXES, dict.fromkeys(TOWERS, VISION))
