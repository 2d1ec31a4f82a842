"""The three large pipelines with tiny random weights, in the layouts of their releases, with tokenizers made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

#: Pixels and frames of a tiny generation: latents of 3 frames, a token grid that is not square.
HEIGHT, WIDTH, FRAMES = 64, 96, 9
SIZE = {"height": HEIGHT, "width": WIDTH, "frames": FRAMES}
PROMPT, NEGATIVE = "press the  bell &amp; lift the red bottle", "blurred"

#: What ``words_tokenizer`` has seen.
SENTENCES = ("press the bell with the left arm", "lift the red bottle off the table")

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def wan_transformer(inputs: int, outputs: int, seed: int, **more: Any) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        in_channels=inputs, out_channels=outputs, num_attention_heads=2, attention_head_dim=24, num_layers=3, ffn_dim=48,
        text_dim=16, freq_dim=32, **more,
    )  # fmt: skip
    return model.eval()


def cosmos_transformer(seed: int = 0) -> Any:
    from diffusers import Cosmos3OmniTransformer

    torch.manual_seed(seed)
    model = Cosmos3OmniTransformer(
        head_dim=16, hidden_size=32, intermediate_size=48, latent_channel=8, patch_latent_dim=32, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=3, vocab_size=400, rope_axes_dim=[4, 2, 2],
    )  # fmt: skip
    return model.eval()


def vae(channels: int, side: int) -> Any:
    """Wan2.1's autoencoder for 8 pixels a latent cell, Wan2.2's for 16; latents with statistics that are not 0 and 1."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(1)
    shape: dict[str, Any] = {"base_dim": 4, "z_dim": channels, "dim_mult": [1] * 4, "num_res_blocks": 1}
    shape |= {"scale_factor_spatial": side, "latents_mean": [0.1 * k for k in range(channels)]}
    shape |= {"latents_std": [1.0 + 0.25 * k for k in range(channels)]}
    if side == 16:
        shape |= {"decoder_base_dim": 4, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
    return AutoencoderKLWan(**shape).eval()


def unipc(shift: float) -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def a14b(folder: Path) -> Path:
    """Wan2.2-I2V-A14B: two experts, mask and picture in 20 more channels; its folder says the shift that the converter writes."""
    from diffusers import WanImageToVideoPipeline

    WanImageToVideoPipeline(
        **umt5(), vae=vae(16, 8), scheduler=unipc(3.0), transformer=wan_transformer(36, 16, 2),
        transformer_2=wan_transformer(36, 16, 3), boundary_ratio=0.9,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def ti2v(folder: Path) -> Path:
    """Wan2.2-TI2V-5B."""
    from diffusers import WanImageToVideoPipeline

    WanImageToVideoPipeline(
        **umt5(), vae=vae(8, 16), scheduler=unipc(5.0), transformer=wan_transformer(8, 8, 4), expand_timesteps=True
    ).save_pretrained(folder)
    return folder


def cosmos3(folder: Path) -> Path:
    """Cosmos3-Nano without sound and actions."""
    from diffusers import Cosmos3OmniPipeline

    Cosmos3OmniPipeline(
        transformer=cosmos_transformer(), text_tokenizer=bytes_tokenizer(), vae=vae(8, 16), scheduler=unipc(10.0),
        enable_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def words_tokenizer() -> Any:
    """Knows the words of SENTENCES."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # A trained tokenizer numbers its pieces anew in every process: embedded texts, and with them every rounding, would differ.
    pieces = ["\u2581", *sorted({letter for sentence in SENTENCES for letter in sentence.replace(" ", "")})]
    pieces += sorted({"\u2581" + word for sentence in SENTENCES for word in sentence.split()})
    scores = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")] + [(piece, -1.0) for piece in pieces]
    words = Tokenizer(models.Unigram(scores, unk_id=2))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.add_special_tokens(["<pad>", "</s>", "<unk>"])
    end = ("</s>", words.token_to_id("</s>"))
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def umt5() -> dict[str, Any]:
    """Tokenizer and text encoder of a Wan pipeline."""
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = words_tokenizer()
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return {"tokenizer": tokenizer, "text_encoder": UMT5EncoderModel(config).eval()}


def bytes_tokenizer() -> Any:
    """Cosmos3's chat tokenizer, with bytes for words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE({piece: number for number, piece in enumerate(alphabet)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT
    return tokenizer


def stock_pipeline(folder: Path) -> Any:
    """diffusers' own pipeline over the folder, in float32."""
    import diffusers

    cosmos = (folder / "text_tokenizer").is_dir()
    kind = diffusers.Cosmos3OmniPipeline if cosmos else diffusers.WanImageToVideoPipeline
    options = {"enable_safety_checker": False} if cosmos else {}
    pipeline = kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_latents(pipeline: Any, *, steps: int, guidance: float, seed: int, **more: Any) -> torch.Tensor:
    """Latents [1,C,F,h,w] of the pipeline as it stands, from ``picture`` and ``PROMPT``."""
    from PIL import Image

    made = pipeline(
        image=Image.fromarray(picture()), prompt=PROMPT, negative_prompt=NEGATIVE, height=HEIGHT, width=WIDTH,
        num_frames=FRAMES, num_inference_steps=steps, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed), output_type="latent", **more,
    )  # fmt: skip
    return made.video if hasattr(made, "video") else made.frames


def our_latents(generator: Any, seeds: list[int]) -> list[torch.Tensor]:
    """Latents of a ``PaperGenerator`` for each seed, from ``picture`` and ``PROMPT``."""
    made = list(generator.latents(picture(), PROMPT, seeds))
    assert [seed for seed, _ in made] == seeds
    return [value for _, value in made]
