"""A denoiser step of Wan2.2-TI2V-5B at 480x640x81 without gradients: plain diffusers beside ours, in one process.

    python benchmarks/paper_generate.py --json generate.json
    python benchmarks/paper_generate.py --tiny                 # on a CPU, in a minute

One forward pass of one sample, random weights in bfloat16, text of 512 tokens. Guidance needs two a step: `ours_two` is one pass over both.

plain          diffusers' forward, a timestep a token          plain_compiled    its compile_repeated_blocks
ours           modulations once a latent frame                 ours_compiled     blocks compiled, as physis generate compile=blocks
ours_cudnn     ours_compiled, attention by cuDNN first         ours_pairs        rotary positions as one expression
ours_cached    keys and values of the text made once a clip    ours_all          cudnn, pairs and cached
ours_two       ours_compiled, two samples in the pass          ours_qkv          ours_compiled, one product for q, k and v
ours_tuned     blocks compiled with max-autotune
ours_fp8       ours_compiled, linear layers of the blocks in 8 bits with a scale a row (another result: its error is in the row)

Whole clips are timed by `paper_whole_clip.py` and `paper_recipes.py --clip-steps`.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from kernel_times import kernel_shares
from paper_training import Bench, build, compile_again, read_options
from torch import Tensor, nn
from wan_variants import PairAttention, TextCache, WanAttnProcessor, attention_first, use_attention

from physisforcing.planner.measurements import write_measurements
from physisforcing.worldmodel.backbones.protocol import call_block
from physisforcing.worldmodel.backbones.wan_paper import WanBackbone
from physisforcing.worldmodel.training.denoiser import BackboneDenoiser
from physisforcing.worldmodel.training.flops import forward_flops

#: Row -> what it does; the last two change the layers and stay last.
OURS: dict[str, dict[str, Any]] = {
    "ours_compiled": {}, "ours_cudnn": {"kernel": "cudnn"}, "ours_pairs": {"pairs": True}, "ours_cached": {"cached": True},
    "ours_all": {"kernel": "cudnn", "cached": True}, "ours_two": {"two": True}, "ours_tuned": {"tuned": True}, "ours_qkv": {},
    "ours_fp8": {},
}  # fmt: skip
ROWS = ("plain", "plain_compiled", "ours", *OURS)
#: Rows whose time is told apart by kernels.
PROFILED = ("plain_compiled", "ours_compiled")


class EightBitLinear(nn.Module):
    """A linear layer whose weight and input are rounded to 8-bit floats with a scale a row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.abs().amax(1, keepdim=True).float().clamp(min=1e-8) / 448.0
        self.register_buffer("weight8", (layer.weight.float() / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        scale = flat.abs().amax(1, keepdim=True).float().clamp(min=1e-8) / 448.0
        rounded = (flat.float() / scale).to(torch.float8_e4m3fn)
        made = torch._scaled_mm(
            rounded, self.weight8.t(), scale_a=scale, scale_b=self.scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )  # fmt: skip
        return (made if self.bias is None else made + self.bias.to(made.dtype)).unflatten(0, x.shape[:-1])


def eight_bits(block: nn.Module) -> None:
    """Large linear layers inside a block, in place."""
    for name, layer in list(block.named_modules()):
        if isinstance(layer, nn.Linear) and layer.in_features % 16 == 0 and layer.out_features % 16 == 0:
            path, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(path), leaf, EightBitLinear(layer))


class Steps(Bench):
    """Rows of forward passes; outputs are compared with the eager one of ours."""

    reference: Tensor | None = None
    compared = ""

    def forward_row(self, name: str, prepare: Callable[[], Callable[[], Tensor]], operations: float) -> None:
        kept: list[Tensor] = []
        call_of: list[Callable[[], Tensor]] = []

        def prepared() -> tuple[Callable[[], None], Any, float]:
            call = prepare()
            call_of[:] = [call]

            def step() -> None:
                with torch.no_grad():
                    kept[:] = [call()]

            return step, nn.Module(), operations

        self.row(name, prepared)
        if name in self.failed:
            return
        if not kept:
            return
        found = kept[0].float()[:1, :, 1:]  # of the first latent frame nothing is said
        if self.reference is None:
            self.reference, self.compared = found, name
        error = (found - self.reference).norm() / self.reference.norm()
        if self.device.type == "cuda" and name in PROFILED:
            with torch.no_grad():
                self.lines[-1]["against"] |= {"kernels_ms": kernel_shares(call_of[0])}
        self.lines[-1]["against"] |= {"relative_difference": round(float(error), 6), "difference_from": self.compared}
        if self.options.json:
            write_measurements(self.options.json, self.lines)
        print(f"  relative difference from {self.compared}: {float(error):.2e}", flush=True)


class Clip:
    """One forward pass by either way, with inputs of ``Sample``."""

    def __init__(self, bench: Steps) -> None:
        size, sample = bench.size, bench.sample
        model = build(size, bench.device).eval().requires_grad_(False)
        self.plain = copy.deepcopy(model)
        self.backbone = BackboneDenoiser(WanBackbone(model, stride=(4, 16, 16)))
        self.operations = forward_flops(self.backbone, sample.latents.shape, size.text)
        self.first, self.sample = sample.latents[:, :, :1], sample
        self.noisy = torch.cat([self.first, sample.noise[:, :, 1:]], 2).bfloat16()
        self.times = (1000 * sample.sigma).repeat(math.prod(sample.grid))[None]
        self.times[:, : sample.grid[1] * sample.grid[2]] = 0

    def stock(self) -> Tensor:
        text = self.sample.text
        return self.plain(self.noisy, timestep=self.times, encoder_hidden_states=text, return_dict=False)[0]

    def ours(self, samples: int = 1) -> Tensor:
        noisy, first, text = (x.expand(samples, *x.shape[1:]) for x in (self.noisy, self.first, self.sample.text))
        return self.backbone(noisy, self.sample.sigma.expand(samples), text, {"first_BC1hw": first})[0]

    def prepare(self, name: str, more: dict[str, Any], bench: Steps) -> Callable[[], Tensor]:
        """Our pass as a row of ``OURS`` wants it, blocks compiled."""
        blocks = self.backbone.blocks
        self.backbone.run_block = TextCache() if "cached" in more else call_block
        changed = "pairs" in more or "cached" in more
        use_attention(blocks, PairAttention() if changed else WanAttnProcessor())
        for block in blocks:
            if name == "ours_qkv":
                block.attn1.fuse_projections()
            if name == "ours_fp8":
                block.attn1.unfuse_projections()
                eight_bits(block)
        compile_again(self.backbone, bench.backend, tuned="tuned" in more and not bench.options.tiny)

        def call() -> Tensor:
            with attention_first(more.get("kernel")):
                return self.ours(2 if "two" in more else 1)

        return call


def main(words: Sequence[str] | None = None) -> int:
    bench = Steps(read_options(__doc__, ROWS, words, 20))
    bench.script, bench.claim = "paper_generate.py", "training/generate_5b"
    clip = Clip(bench)
    bench.forward_row("plain", lambda: clip.stock, clip.operations)

    def compiled() -> Callable[[], Tensor]:
        clip.plain.compile_repeated_blocks(backend=bench.backend)
        return clip.stock

    bench.forward_row("plain_compiled", compiled, clip.operations)
    bench.forward_row("ours", lambda: clip.ours, clip.operations)
    for name, more in OURS.items():
        operations = clip.operations * (2 if "two" in more else 1)
        bench.forward_row(name, lambda name=name, more=more: clip.prepare(name, more, bench), operations)
    ours, plain = bench.medians.get("ours_compiled"), bench.medians.get("plain_compiled")
    if ours and plain:
        print(f"plain_compiled / ours_compiled: {plain / ours:.3f}")
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
