"""Variants of the compiled 5B step of ``paper_training.py``: what else makes it faster, each beside the row that it changes.

    python benchmarks/paper_variants.py --json variants.json
    python benchmarks/paper_variants.py --tiny                         # on a CPU, in a minute
    python benchmarks/paper_variants.py --only base,cudnn,all

All weights trained, blocks compiled, no activation computed again; torch's own choice of an attention kernel where nothing is said:

base       ours_compiled of paper_training.py       cudnn      attention by cuDNN first         flash       by the flash kernel first
pairs      rotary positions as one expression       qkv        pairs, one product for q, k, v   all         cudnn, pairs, qkv
tuned      base compiled with max-autotune (minutes of compilation: only when named)

Rank 32, base in bfloat16:

lora_base  lora_ours: adapters in float32           lora_bf16  adapters in bfloat16, no autocast
lora_added adapters added inside their product      lora_cudnn lora_base, cuDNN first           lora_all    cudnn, pairs, added

``optimizer_fp32``: fused AdamW on all weights in float32 (80 GB with gradients and moments: an H200).
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from paper_training import RANK, Bench, build, compile_again, optimizer_step, our_step, read_options
from wan_variants import PairAttention, WanAttnProcessor, add_inside, attention_first, use_attention

from physisforcing.worldmodel.backbones.wan_paper import WAN_LORA_TARGETS, WanBackbone
from physisforcing.worldmodel.training.config import LoraConfig
from physisforcing.worldmodel.training.denoiser import BackboneDenoiser
from physisforcing.worldmodel.training.flops import step_flops
from physisforcing.worldmodel.training.lora import add_lora

#: Row -> what it does: kernel, pairs, join.
FULL_ROWS: dict[str, dict[str, Any]] = {
    "base": {}, "cudnn": {"kernel": "cudnn"}, "flash": {"kernel": "flash"}, "pairs": {"pairs": True},
    "qkv": {"pairs": True, "join": True}, "all": {"kernel": "cudnn", "pairs": True, "join": True}, "tuned": {"tuned": True},
}  # fmt: skip
LORA_ROWS: dict[str, dict[str, Any]] = {
    "lora_base": {}, "lora_bf16": {"half": True}, "lora_added": {"added": True}, "lora_cudnn": {"kernel": "cudnn"},
    "lora_all": {"kernel": "cudnn", "pairs": True, "added": True},
}  # fmt: skip
ROWS = (*FULL_ROWS, *LORA_ROWS, "optimizer_fp32")
UNASKED = ("tuned",)

Prepared = tuple[Callable[[], None], Any, float]


def denoiser_of(bench: Bench) -> BackboneDenoiser:
    return BackboneDenoiser(WanBackbone(build(bench.size, bench.device), stride=(4, 16, 16), tap=bench.size.tap))


def chosen(denoiser: BackboneDenoiser, step: Callable[[], None], more: dict[str, Any]) -> Callable[[], None]:
    """``step`` with the attention that a row asks for; the blocks are compiled after this."""
    use_attention(
        denoiser.blocks, PairAttention(join=more.get("join", False)) if "pairs" in more else WanAttnProcessor()
    )

    def run() -> None:
        with attention_first(more.get("kernel")):
            step()

    return run


def full_rows(bench: Bench) -> None:
    denoiser, forcing = denoiser_of(bench), bench.forcing()
    operations = step_flops(denoiser, bench.sample.latents.shape, bench.size.text)
    step = our_step(denoiser, bench.sample, forcing, contextlib.nullcontext)

    def row(more: dict[str, Any]) -> Prepared:
        compile_again(denoiser, bench.backend, tuned=more.get("tuned", False) and not bench.options.tiny)
        return chosen(denoiser, step, more), denoiser, operations

    for name, more in FULL_ROWS.items():
        bench.row(name, lambda more=more: row(more))


def lora_row(bench: Bench, more: dict[str, Any]) -> Prepared:
    denoiser = denoiser_of(bench)
    add_lora(denoiser.transformer, LoraConfig(rank=4 if bench.options.tiny else RANK), WAN_LORA_TARGETS, torch.bfloat16)
    if more.get("half"):
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    if more.get("added"):
        add_inside(denoiser.transformer)
    compile_again(denoiser, bench.backend)

    def precision() -> Any:
        return torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=not more.get("half"))

    step = our_step(denoiser, bench.sample, bench.forcing(), precision)
    operations = step_flops(denoiser, bench.sample.latents.shape, bench.size.text)
    return chosen(denoiser, step, more), denoiser, operations


def main(words: Sequence[str] | None = None) -> int:
    bench = Bench(read_options(__doc__, ROWS, words, 12))
    bench.script, bench.claim = "paper_variants.py", "training/pf_wan_5b/variant"
    bench.options.only = bench.options.only or [name for name in ROWS if name not in UNASKED]
    if any(bench.wanted(name) for name in FULL_ROWS):
        full_rows(bench)
        gc.collect()
    for name, more in LORA_ROWS.items():
        bench.row(name, lambda more=more: lora_row(bench, more))
    bench.row("optimizer_fp32", lambda: optimizer_step(denoiser_of(bench).float()))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
