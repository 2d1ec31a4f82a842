"""A denoiser step of Wan2.2-TI2V-5B at 480x640x81 without gradients: plain diffusers beside ours, in one process.

    python benchmarks/paper_generate.py --json generate.json
    python benchmarks/paper_generate.py --tiny                 # on a CPU, in a minute

One forward pass of one sample (guidance needs two a step), random weights in bfloat16, text of 512 tokens:

plain          diffusers' forward, a timestep a token          plain_compiled    its compile_repeated_blocks
ours           modulations once a latent frame                 ours_compiled     blocks compiled, as physis generate compile=blocks
ours_tuned     blocks compiled with max-autotune               ours_qkv          ours_compiled, one product for q, k and v
ours_fp8       ours_compiled, linear layers of the blocks in 8 bits with a scale a row (another result: its error is in the row)

Whole clips are timed by `paper_recipes.py --clip-steps`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from paper_training import Bench, build, compile_again
from torch import Tensor, nn

from physisforcing.worldmodel.backbones.wan_paper import WanBackbone
from physisforcing.worldmodel.training.denoiser import BackboneDenoiser
from physisforcing.worldmodel.training.flops import step_flops

ROWS = ("plain", "plain_compiled", "ours", "ours_compiled", "ours_tuned", "ours_qkv", "ours_fp8")


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
            rounded,
            self.weight8.t(),
            scale_a=scale,
            scale_b=self.scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
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

    def forward_row(self, name: str, call: Callable[[], Tensor], model: Any, operations: float) -> None:
        kept: list[Tensor] = []

        def step() -> None:
            with torch.no_grad():
                kept[:] = [call()]

        self.row(name, lambda: (step, nn.Module(), operations))
        if not kept:
            return
        found = kept[0].float()[:, :, 1:]  # of the first latent frame nothing is said
        if self.reference is None:
            self.reference = found
        error = (found - self.reference).norm() / self.reference.norm()
        self.lines[-1]["against"]["relative_difference"] = round(float(error), 6)
        print(f"  relative difference from plain: {float(error):.2e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[])
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    bench = Steps(options)
    bench.script, bench.claim = "paper_generate.py", "training/generate_5b"
    size, sample = bench.size, bench.sample
    model = build(size, bench.device).eval().requires_grad_(False)
    times = (1000 * sample.sigma).repeat(sample.grid[0] * sample.grid[1] * sample.grid[2])[None]
    times[:, : sample.grid[1] * sample.grid[2]] = 0
    first = sample.latents[:, :, :1]
    noisy = torch.cat([first, sample.noise[:, :, 1:]], 2).bfloat16()
    plain = copy.deepcopy(model)
    backbone = BackboneDenoiser(WanBackbone(model, stride=(4, 16, 16)))
    operations = step_flops(backbone, sample.latents.shape, size.text) / 3

    def stock() -> Tensor:
        found = plain(hidden_states=noisy, timestep=times, encoder_hidden_states=sample.text, return_dict=False)
        return found[0]

    def ours() -> Tensor:
        return backbone(noisy, sample.sigma, sample.text, {"first_BC1hw": first})[0]

    bench.forward_row("plain", stock, plain, operations)
    if bench.wanted("plain_compiled"):
        plain.compile_repeated_blocks(backend=bench.backend)
        bench.forward_row("plain_compiled", stock, plain, operations)
    bench.forward_row("ours", ours, backbone, operations)
    for name in ("ours_compiled", "ours_tuned", "ours_qkv", "ours_fp8"):
        if not bench.wanted(name):
            continue
        compile_again(backbone, None)
        if name == "ours_qkv":
            for block in backbone.blocks:
                block.attn1.fuse_projections()
        if name == "ours_fp8":
            for block in backbone.blocks:
                block.attn1.unfuse_projections()
                eight_bits(block)
        for block in backbone.blocks:
            mode = {"mode": "max-autotune-no-cudagraphs"} if name == "ours_tuned" and not options.tiny else {}
            block.compile(dynamic=False, backend=bench.backend, **mode)
        bench.forward_row(name, ours, backbone, operations)
    if bench.medians.get("ours_compiled"):
        print(
            f"plain_compiled / ours_compiled: {bench.medians.get('plain_compiled', 0) / bench.medians['ours_compiled']:.3f}"
        )


if __name__ == "__main__":
    main()
