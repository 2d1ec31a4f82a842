"""Names in Wan's own checkpoints (Wan-Video/Wan2.2: transformer, both autoencoders, UMT5 encoder) and in the stock models."""

from __future__ import annotations

from .keys import KeyMap, Pairs


def transformer_keys() -> KeyMap:
    """``WanModel`` -> ``WanTransformer3DModel``. Wan2.1's image branch (``img_emb``, ``k_img``) included.

    Wan applies its norms in the order norm1, norm3, norm2; diffusers numbers them as they come. Single files for other tools put
    ``model.diffusion_model.`` before every name.
    """
    embedder = "condition_embedder"
    pairs: Pairs = [
        ("patch_embedding.{p}", "patch_embedding.{p}"),
        ("time_embedding.0.{p}", f"{embedder}.time_embedder.linear_1.{{p}}"),
        ("time_embedding.2.{p}", f"{embedder}.time_embedder.linear_2.{{p}}"),
        ("time_projection.1.{p}", f"{embedder}.time_proj.{{p}}"),
        ("text_embedding.0.{p}", f"{embedder}.text_embedder.linear_1.{{p}}"),
        ("text_embedding.2.{p}", f"{embedder}.text_embedder.linear_2.{{p}}"),
        ("img_emb.proj.0.{p}", f"{embedder}.image_embedder.norm1.{{p}}"),
        ("img_emb.proj.1.{p}", f"{embedder}.image_embedder.ff.net.0.proj.{{p}}"),
        ("img_emb.proj.3.{p}", f"{embedder}.image_embedder.ff.net.2.{{p}}"),
        ("img_emb.proj.4.{p}", f"{embedder}.image_embedder.norm2.{{p}}"),
        ("img_emb.emb_pos", f"{embedder}.image_embedder.pos_embed"),
        ("head.head.{p}", "proj_out.{p}"),
        ("head.modulation", "scale_shift_table"),
        ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
        ("blocks.{i}.norm3.{p}", "blocks.{i}.norm2.{p}"),
        ("blocks.{i}.ffn.0.{p}", "blocks.{i}.ffn.net.0.proj.{p}"),
        ("blocks.{i}.ffn.2.{p}", "blocks.{i}.ffn.net.2.{p}"),
    ]
    leaves = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
    image = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
    for old, new, parts in (("self_attn", "attn1", leaves), ("cross_attn", "attn2", leaves | image)):
        pairs += [(f"blocks.{{i}}.{old}.{a}.{{p}}", f"blocks.{{i}}.{new}.{b}.{{p}}") for a, b in parts.items()]
    return KeyMap(pairs, prefixes=("", "model.diffusion_model."))


def autoencoder_keys(stages: int, res_blocks: int, nested: bool) -> KeyMap:
    """Wan2.1's autoencoder, or Wan2.2's where ``nested`` -> ``AutoencoderKLWan``.

    ``stages``: resolutions of encoder and decoder; ``res_blocks``: of each stage of the encoder (the decoder has one more). Wan2.1
    counts the decoder's blocks through all stages, Wan2.2 nests a list of blocks in each stage.
    """
    pairs: Pairs = [("conv1.{p}", "quant_conv.{p}"), ("conv2.{p}", "post_quant_conv.{p}")]
    for side in ("encoder", "decoder"):
        middle = f"{side}.mid_block.attentions.0"
        pairs += [
            (f"{side}.conv1.{{p}}", f"{side}.conv_in.{{p}}"),
            (f"{side}.head.0.gamma", f"{side}.norm_out.gamma"),
            (f"{side}.head.2.{{p}}", f"{side}.conv_out.{{p}}"),
            (f"{side}.middle.1.norm.gamma", f"{middle}.norm.gamma"),
            (f"{side}.middle.1.to_qkv.{{p}}", f"{middle}.to_qkv.{{p}}"),
            (f"{side}.middle.1.proj.{{p}}", f"{middle}.proj.{{p}}"),
        ]
        pairs += _residual(f"{side}.middle.0", f"{side}.mid_block.resnets.0")
        pairs += _residual(f"{side}.middle.2", f"{side}.mid_block.resnets.1")
    return KeyMap(pairs + (_nested(res_blocks) if nested else _counted(stages, res_blocks)))


def _nested(res_blocks: int) -> Pairs:
    pairs: Pairs = []
    for old, new, many in (
        ("encoder.downsamples.{i}.downsamples", "encoder.down_blocks.{i}", res_blocks),
        ("decoder.upsamples.{i}.upsamples", "decoder.up_blocks.{i}", res_blocks + 1),
    ):
        pairs += _residual(f"{old}.{{j}}", f"{new}.resnets.{{j}}")
        pairs += _resample(f"{old}.{many}", f"{new}.{'downsampler' if 'down' in new else 'upsampler'}")
    return pairs


def _counted(stages: int, res_blocks: int) -> Pairs:
    pairs = _residual("encoder.downsamples.{i}", "encoder.down_blocks.{i}")
    pairs += _resample("encoder.downsamples.{i}", "encoder.down_blocks.{i}")
    many = res_blocks + 1
    for stage in range(stages):
        first = stage * (many + 1)
        for block in range(many):
            pairs += _residual(f"decoder.upsamples.{first + block}", f"decoder.up_blocks.{stage}.resnets.{block}")
        if stage < stages - 1:
            pairs += _resample(f"decoder.upsamples.{first + many}", f"decoder.up_blocks.{stage}.upsamplers.0")
    return pairs


def _residual(old: str, new: str) -> Pairs:
    leaves = {
        "residual.0.gamma": "norm1.gamma",
        "residual.2.{p}": "conv1.{p}",
        "residual.3.gamma": "norm2.gamma",
        "residual.6.{p}": "conv2.{p}",
        "shortcut.{p}": "conv_shortcut.{p}",
    }
    return [(f"{old}.{a}", f"{new}.{b}") for a, b in leaves.items()]


def _resample(old: str, new: str) -> Pairs:
    return [(f"{old}.{leaf}", f"{new}.{leaf}") for leaf in ("resample.1.{p}", "time_conv.{p}")]


def text_encoder_keys() -> KeyMap:
    """Wan's ``T5Encoder`` -> ``UMT5EncoderModel``: each block has relative positions of its own; ``gate`` is the activated half."""
    attention, feed = "encoder.block.{i}.layer.0", "encoder.block.{i}.layer.1"
    pairs: Pairs = [
        ("token_embedding.weight", "shared.weight"),
        ("norm.weight", "encoder.final_layer_norm.weight"),
        ("blocks.{i}.norm1.weight", f"{attention}.layer_norm.weight"),
        ("blocks.{i}.norm2.weight", f"{feed}.layer_norm.weight"),
        ("blocks.{i}.pos_embedding.embedding.weight", f"{attention}.SelfAttention.relative_attention_bias.weight"),
        ("blocks.{i}.ffn.gate.0.weight", f"{feed}.DenseReluDense.wi_0.weight"),
        ("blocks.{i}.ffn.fc1.weight", f"{feed}.DenseReluDense.wi_1.weight"),
        ("blocks.{i}.ffn.fc2.weight", f"{feed}.DenseReluDense.wo.weight"),
    ]
    pairs += [(f"blocks.{{i}}.attn.{leaf}.weight", f"{attention}.SelfAttention.{leaf}.weight") for leaf in "qkvo"]
    return KeyMap(pairs)
