"""Seconds a clip of the large models at 480x640x81, summed from parts that are measured: a pass, the autoencoder, the way of an expert.

    python benchmarks/paper_clips.py --json clips.json
    python benchmarks/paper_clips.py --tiny                 # on a CPU, in a minute
    python benchmarks/paper_clips.py --only 5b,cosmos3

Full-size transformers and autoencoders with random weights. Per model the guided number of passes (two a step, one after the other, as
`physis generate` makes them) of compiled blocks in bfloat16, encoding the first picture, decoding in float32; the sampler's own arithmetic
and the text encoder (its embeddings are cached by sentence) are left out. Steps as the models' authors use them: 50, 40, 35.

5b, cosmos3         everything on the GPU
a14b                one expert on the GPU for all steps (`experts=high`)
a14b_two            two experts with offload=model: the same passes, and each expert to the GPU and back once, by one block's time times all

`paper_whole_clip.py` and `paper_recipes.py --clip-steps` time whole clips instead.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cost_results import median_interval
from paper_memory import Case, build, sample
from paper_recipes import VAES
from paper_training import compile_again
from torch import nn
from wan_variants import attention_first

from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
from physisforcing.worldmodel.backbones.cosmos3 import Cosmos3Backbone
from physisforcing.worldmodel.backbones.wan_paper import WanBackbone
from physisforcing.worldmodel.pipeline_vae import PipelineVae
from physisforcing.worldmodel.training.denoiser import BackboneDenoiser
from physisforcing.worldmodel.training.flops import forward_flops, peak_flops

STEPS = {"5b": 50, "a14b": 40, "cosmos3": 35}
ROWS = ("5b", "a14b", "cosmos3")
#: What a tiny autoencoder has instead.
TINY_VAE: dict[int, dict[str, Any]] = {
    channels: {"base_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1}
    | ({"decoder_base_dim": 4} if channels == 48 else {})
    for channels in VAES
}


class Clips:
    """Lines of one model after another, written after each."""

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        self.options, self.command = options, command
        self.device = torch.device("cpu" if options.tiny else "cuda")
        self.provenance, self.lines, self.failed = machine_provenance(), [], 0

    def timed(self, call: Callable[[], Any], n: int) -> list[float]:
        """Seconds of ``n`` calls after one that is not counted."""
        found = []
        for _ in range(1 + n):
            self.wait()
            begun = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - begun)
        return found[1:]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def write(self, name: str, value: float | None, **more: Any) -> None:
        low, high, n = more.pop("low", None), more.pop("high", None), more.pop("n", 0)
        self.lines.append(
            measurement(
                f"training/generate_{name}/clip_seconds", None if value is None else round(value, 3),  # type: ignore[arg-type]
                unit="s", low=low, high=high, n=n, seeds="0", against=more, command=self.command, provenance=self.provenance,
            )
        )  # fmt: skip
        print(f"{name:<10}{'failed' if value is None else f'{value:.2f} s'}  {more}", flush=True)
        if self.options.json:
            write_measurements(self.options.json, self.lines)

    def denoiser(self, kind: str) -> BackboneDenoiser:
        model = build(Case(kind=kind), self.options.tiny, self.device).eval().requires_grad_(False)
        if kind == "cosmos3":
            return BackboneDenoiser(Cosmos3Backbone(model))
        small = kind == "a14b"
        stride, first = ((4, 8, 8), "mask") if small else ((4, 16, 16), "pinned")
        return BackboneDenoiser(WanBackbone(model, stride=stride, first_latent=first))

    def passes(self, kind: str, denoiser: BackboneDenoiser) -> tuple[list[float], dict[str, Any]]:
        """Seconds of compiled passes, and what is known of them."""
        batch, _ = sample(Case(kind=kind), denoiser, self.options.tiny, self.device)
        latents = batch["latents_BCFhw"]
        noise, sigma = torch.randn_like(latents), torch.tensor([0.6], device=self.device)
        compile_again(denoiser, "eager" if self.options.tiny else "inductor")

        def call() -> None:
            with torch.no_grad(), attention_first(self.options.attention or None):
                denoiser.predict(batch, noise, sigma, need_tap=False)

        begun = time.perf_counter()
        self.timed(call, 1)
        compiled = time.perf_counter() - begun
        seconds = self.timed(call, self.options.repetitions)
        more: dict[str, Any] = {"pass_ms": round(1e3 * statistics.median(seconds), 2), "compile_s": round(compiled, 1)}
        operations, peak = forward_flops(denoiser, latents.shape, batch["text"].shape[1]), peak_flops(self.device)
        if peak:
            more["mfu_pct"] = round(100 * operations / statistics.median(seconds) / peak, 2)
        return seconds, more | {"steps": STEPS[kind], "passes": 2 * STEPS[kind]}

    def autoencoder(self, kind: str, denoiser: BackboneDenoiser) -> dict[str, float]:
        from diffusers import AutoencoderKLWan

        channels = 16 if kind == "a14b" else 48
        neutral = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
        with self.device:
            vae = PipelineVae(
                AutoencoderKLWan(**(VAES[channels] | neutral | (TINY_VAE[channels] if self.options.tiny else {})))
            )
        frames, high, wide = (9, 64, 96) if self.options.tiny else (81, 480, 640)
        picture = torch.rand(1, 3, high, wide, device=self.device) * 2 - 1
        latents = torch.randn(1, *vae.latent_shape(frames, high, wide), device=self.device)
        backbone: Any = denoiser.backbone
        encode = self.timed(lambda: vae.encode_first(backbone, picture, frames), 2)
        return {
            "encode_s": statistics.median(encode),
            "decode_s": statistics.median(self.timed(lambda: vae.frames(latents), 2)),
        }

    def there_and_back(self, blocks: nn.ModuleList) -> float:
        """Seconds of an expert's way from the CPU to the GPU and back: one block's, times all."""

        def move() -> None:
            blocks[0].to("cpu")
            blocks[0].to(self.device)

        return statistics.median(self.timed(move, 3)) * len(blocks)

    def row(self, kind: str) -> None:
        denoiser = self.denoiser(kind)
        seconds, more = self.passes(kind, denoiser)
        parts = self.autoencoder(kind, denoiser)
        around, count = parts["encode_s"] + parts["decode_s"], more["passes"]
        more |= {name: round(value, 3) for name, value in parts.items()}
        if self.device.type == "cuda":
            more["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        low, high = (round(count * bound + around, 3) for bound in median_interval(seconds))
        total = count * statistics.median(seconds) + around
        self.write(kind, total, low=low, high=high, n=len(seconds), summed="from parts", **more)
        if kind == "a14b":
            way = self.there_and_back(denoiser.blocks)
            more |= {"expert_there_and_back_s": round(way, 2), "summed": "from parts, one block's way times all"}
            self.write("a14b_two", total + 2 * way, n=len(seconds), **more)

    def try_row(self, kind: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            self.row(kind)
        except Exception as error:  # the other rows say what they say
            self.failed += 1
            reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
            self.write(kind, None, failed=f"{reason}: {' '.join(str(error).split())[:160]}")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(ROWS))
    parser.add_argument("--repetitions", type=int, default=5, help="passes that are timed")
    parser.add_argument("--attention", choices=("cudnn", "flash", ""), default="", help="kernel that comes first")
    options = parser.parse_args(words)
    for name in options.only:
        if name not in ROWS:
            parser.error(f"--only {name}: one of {', '.join(ROWS)}")
    torch.set_float32_matmul_precision("high")
    command = placeless("python benchmarks/paper_clips.py " + shlex.join(sys.argv[1:] if words is None else words))
    clips = Clips(options, command)
    for kind in options.only:
        clips.try_row(kind)
    return int(clips.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
