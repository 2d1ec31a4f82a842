"""Forward and backward passes of Wan2.2-TI2V-5B at 480x640x81 with both physics losses: plain diffusers beside ours, in one process.

    python benchmarks/paper_training.py --json training.json
    python benchmarks/paper_training.py --tiny --json tiny.json       # every row of it on a CPU, in a minute
    python benchmarks/paper_training.py --only ours_compiled,plain    # some rows

The real architecture with random weights, batch 1, 6,300 tokens, text of 512 tokens, bfloat16 weights and gradients (what diffusers
keeps in float32 stays so), targets cached on the device, heads of the paper's widths, no optimiser step. Rows:

plain_checkpointing   diffusers' forward, its own activation checkpointing       plain            without
plain_compiled        diffusers' compile_repeated_blocks                         ours_eager       our forward: modulations once a frame
ours_compiled         blocks compiled                                            ours_full        and computed again (recompute.py)
ours_selective        compiled, a share of the activations kept                  ours_eager_selective    eager, attention kept
lora_plain            rank 32 by peft, eager, checkpointing, autocast            lora_ours        ours_compiled with the same adapters
lora_full             lora_ours, computed again                                  lora_selective   lora_ours, a share kept
optimizer             fused AdamW on all weights in bfloat16 (reported by itself)

Each row is measured after its own warm-up and written at once; one that fails, for want of memory most of all, says so and the next goes
on. MFU: ``worldmodel/training/flops.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cost_networks import FULL, TINY, Size, in_bfloat16
from cost_results import median_interval
from torch import Tensor, nn

from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
from physisforcing.worldmodel.backbones.wan_paper import WAN_LORA_TARGETS, WanBackbone
from physisforcing.worldmodel.flow_matching import FlowMatchingConfig, flow_matching_loss
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.physics.forcing import PhysisForcing
from physisforcing.worldmodel.physics.relation import token_order
from physisforcing.worldmodel.training.config import LoraConfig
from physisforcing.worldmodel.training.denoiser import BackboneDenoiser
from physisforcing.worldmodel.training.flops import peak_flops, step_flops
from physisforcing.worldmodel.training.lora import add_lora
from physisforcing.worldmodel.training.recompute import recomputed

ROWS = (
    "plain_checkpointing", "plain", "plain_compiled", "ours_eager", "ours_compiled", "ours_full", "ours_selective",
    "ours_eager_selective", "lora_plain", "lora_ours", "lora_full", "lora_selective", "optimizer",
)  # fmt: skip
FLOW = FlowMatchingConfig(train_shift=1.0, motion_weight=0.0)
SEED, RANK = 0, 32


class Sample:
    """What a step reads: latents, noise, text, targets, all random but valid, on the device."""

    def __init__(self, size: Size, device: torch.device) -> None:
        draw = torch.Generator(device=device).manual_seed(SEED)
        frames, high, wide = size.grid
        channels = size.transformer["in_channels"]
        shape = (1, channels, frames, 2 * high, 2 * wide)
        options: dict[str, Any] = {"generator": draw, "device": device}
        self.grid, self.sigma = size.grid, torch.tensor([0.6], device=device)
        self.latents, self.noise = torch.randn(shape, **options), torch.randn(shape, **options)
        self.text = torch.randn(1, size.text, size.transformer["text_dim"], **options).bfloat16()
        points = size.queries[0] * size.queries[1]
        track = torch.rand(1, 1, points, 2, **options) + 0.02 * torch.randn(1, frames, points, 2, **options).cumsum(1)
        self.order = token_order(1, frames * high * wide, draw)
        self.targets = {
            "points_BFN2": track.clamp(0.02, 0.98),
            "visible_BFN": torch.rand(1, frames, points, **options) > 0.1,
            "select_BN": torch.rand(1, points, **options) > 0.7,
            "token_mask_BFhw": torch.rand(1, *size.grid, **options) > 0.7,
            "teacher_BFhwC": torch.randn(1, *size.grid, size.teacher_dim, **options),
        }

    def loss(self, velocity: Tensor, tapped: Tensor, forcing: PhysisForcing) -> Tensor:
        physics = forcing(tapped, self.grid, self.targets, self.order, sigma_B=self.sigma)
        return flow_matching_loss(velocity, self.latents, self.noise, FLOW) + physics.loss


def build(size: Size, device: torch.device) -> Any:
    """The transformer with random weights, as ``from_pretrained(dtype=torch.bfloat16)`` leaves it."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(SEED)
    with device:
        return in_bfloat16(WanTransformer3DModel(**size.transformer)).train()


def plain_step(model: Any, sample: Sample, forcing: PhysisForcing, tap: int, precision: Any) -> Callable[[], None]:
    """diffusers' own forward: a timestep a token, the tapped block's output by a hook."""
    kept: list[Tensor] = []
    model.blocks[tap - 1].register_forward_hook(lambda _block, _inputs, out: kept.append(out))
    times = (1000 * sample.sigma).repeat(sample.grid[0] * sample.grid[1] * sample.grid[2])[None]
    times[:, : sample.grid[1] * sample.grid[2]] = 0

    def step() -> None:
        kept.clear()
        noisy = (1 - sample.sigma) * sample.latents + sample.sigma * sample.noise
        noisy = torch.cat([sample.latents[:, :, :1], noisy[:, :, 1:]], 2).bfloat16()
        with precision():
            found = model(hidden_states=noisy, timestep=times, encoder_hidden_states=sample.text, return_dict=False)[0]
        sample.loss(found, kept[0], forcing).backward()

    return step


def our_step(denoiser: BackboneDenoiser, sample: Sample, forcing: PhysisForcing, precision: Any) -> Callable[[], None]:
    batch = {"latents_BCFhw": sample.latents, "text": sample.text}

    def step() -> None:
        with precision():
            velocity, tapped = denoiser.predict(batch, sample.noise, sample.sigma, need_tap=True)
            assert tapped is not None
            sample.loss(velocity, tapped, forcing).backward()

    return step


class Bench:
    """Rows of one model after another; ``lines`` are written after each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device("cpu" if options.tiny else "cuda")
        self.size = TINY if options.tiny else FULL
        self.sample = Sample(self.size, self.device)
        self.lines: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.heads: list[nn.Parameter] = []
        self.provenance, self.medians = machine_provenance(), {}
        self.backend = "eager" if options.tiny else "inductor"
        self.script, self.claim = "paper_training.py", "training/pf_wan_5b"

    def wanted(self, name: str) -> bool:
        return not self.options.only or name in self.options.only

    def forcing(self) -> PhysisForcing:
        hidden = self.size.hidden
        config = PhysicsConfig(phi_hidden=hidden, psi_hidden=hidden)
        made = PhysisForcing(config, width=self.size.width, teacher_dim=self.size.teacher_dim).to(self.device)
        self.heads = list(made.parameters())
        return made

    def row(self, name: str, prepare: Callable[[], tuple[Callable[[], None], Any, float]]) -> None:
        if not self.wanted(name):
            return
        try:
            step, model, operations = prepare()
            self.measure(name, step, model, operations)
        except (
            Exception
        ) as error:  # a kernel that is missing, a graph that does not compile: the other rows say what they say
            memory = isinstance(error, torch.OutOfMemoryError)
            reason = "out of memory" if memory else type(error).__name__
            self.write(name, float("nan"), [], {"failed": f"{reason}: {' '.join(str(error).split())[:160]}"})
            self.failed.append(name)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure(self, name: str, step: Callable[[], None], model: Any, operations: float) -> None:
        begun = time.perf_counter()
        times = []
        for number in range(self.options.warmup + self.options.repetitions):
            if number == self.options.warmup:
                warm = time.perf_counter() - begun
                self._reset()
            times.append(self._timed(step))
            for parameter in (*model.parameters(), *self.heads):
                parameter.grad = None
        times = times[self.options.warmup :]
        # what the warm-up took beyond its steps: compilation, first choice of kernels
        more: dict[str, Any] = {"warmup_s": round(warm, 1), "tflop": round(operations / 1e12, 2)}
        more["compile_s"] = round(max(0.0, warm - 1e-3 * self.options.warmup * statistics.median(times)), 1)
        if len(times) > 3:
            lower, _, upper = statistics.quantiles(times, n=4, method="inclusive")
            p95 = statistics.quantiles(times, n=20, method="inclusive")[-1]
            more |= {"q1_ms": round(lower, 2), "q3_ms": round(upper, 2), "p95_ms": round(p95, 2)}
        if self.device.type == "cuda":
            more["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            more["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        peak = peak_flops(self.device)
        if peak and operations:
            more["mfu_pct"] = round(100 * operations / (1e-3 * statistics.median(times)) / peak, 2)
        self.write(name, statistics.median(times), times, more)

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def _timed(self, step: Callable[[], None]) -> float:
        if self.device.type != "cuda":
            begun = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - begun)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        step()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last)

    def finish(self) -> int:
        """The exit code: 1 where a row failed, whose reason is in its line."""
        if self.failed:
            print(f"{len(self.failed)} of {len(self.medians)} rows failed: {', '.join(self.failed)}", flush=True)
        return int(bool(self.failed))

    def write(self, name: str, value: float, times: list[float], more: dict[str, Any]) -> None:
        self.medians[name] = value
        against = {
            f"{base}_ms": round(self.medians[base], 2) for base in ("plain", "plain_compiled") if base in self.medians
        }
        if name.startswith("lora") and "lora_plain" in self.medians:
            against = {"lora_plain_ms": round(self.medians["lora_plain"], 2)}
        low, high = median_interval(times) if times else (None, None)
        line = measurement(
            f"{self.claim}/{name}/step_ms", None if value != value else round(value, 2),  # type: ignore[arg-type]
            unit="ms", low=low, high=high, n=len(times), seeds=str(SEED), against=against | more,
            command=placeless(f"python benchmarks/{self.script} " + shlex.join(sys.argv[1:])), provenance=self.provenance,
        )  # fmt: skip
        self.lines.append(line)
        print(f"{name:<22}{value:10.1f} ms  {more}", flush=True)
        if self.options.json:
            write_measurements(self.options.json, self.lines)


def plain_rows(bench: Bench) -> None:
    size, sample = bench.size, bench.sample
    model = build(size, bench.device)
    forcing = bench.forcing()
    counted = BackboneDenoiser(WanBackbone(build_like(model), stride=(4, 16, 16)))
    operations = step_flops(counted, sample.latents.shape, size.text)
    step = plain_step(model, sample, forcing, size.tap, contextlib.nullcontext)

    def checkpointing() -> tuple[Callable[[], None], Any, float]:
        model.enable_gradient_checkpointing()
        return step, model, operations

    def plain() -> tuple[Callable[[], None], Any, float]:
        model.disable_gradient_checkpointing()
        return step, model, operations

    def compiled() -> tuple[Callable[[], None], Any, float]:
        model.disable_gradient_checkpointing()
        model.compile_repeated_blocks(backend=bench.backend)
        return step, model, operations

    bench.row("plain_checkpointing", checkpointing)
    bench.row("plain", plain)
    bench.row("plain_compiled", compiled)


def build_like(model: Any) -> Any:
    """The same architecture without memory, to count operations of."""
    from physisforcing.worldmodel.backbones.loading import build_empty

    return build_empty(type(model), {name: value for name, value in model.config.items() if not name.startswith("_")})


def our_rows(bench: Bench) -> None:
    size, sample = bench.size, bench.sample
    denoiser = BackboneDenoiser(WanBackbone(build(size, bench.device), stride=(4, 16, 16), tap=size.tap))
    forcing, run = bench.forcing(), denoiser.run_block
    operations = step_flops(denoiser, sample.latents.shape, size.text)

    def ready(kind: str, compiled: bool) -> Callable[[], tuple[Callable[[], None], Any, float]]:
        def prepare() -> tuple[Callable[[], None], Any, float]:
            compile_again(denoiser, bench.backend if compiled else None)
            denoiser.run_block = recomputed(run, kind, compiled)
            return our_step(denoiser, sample, forcing, contextlib.nullcontext), denoiser, operations

        return prepare

    bench.row("ours_eager", ready("none", False))
    bench.row("ours_compiled", ready("none", True))
    bench.row("ours_full", ready("full", True))
    bench.row("ours_selective", ready("selective", True))
    bench.row("ours_eager_selective", ready("selective", False))
    bench.row("optimizer", lambda: optimizer_step(denoiser))


def compile_again(denoiser: BackboneDenoiser, backend: str | None, *, tuned: bool = False) -> None:
    """Forget what was compiled, and with a ``backend`` compile all that torch wants to keep. ``tuned``: try kernels for every product."""
    import torch._functorch.config as partitioner

    torch.compiler.reset()
    partitioner.activation_memory_budget = 1.0
    for block in denoiser.blocks:
        block._compiled_call_impl = None
        if backend is not None:
            block.compile(dynamic=False, backend=backend, **({"mode": "max-autotune-no-cudagraphs"} if tuned else {}))


def optimizer_step(denoiser: BackboneDenoiser) -> tuple[Callable[[], None], Any, float]:
    fused = next(denoiser.parameters()).is_cuda
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-5, fused=fused)

    def step() -> None:
        for parameter in denoiser.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    return step, denoiser, 0.0


def lora_rows(bench: Bench) -> None:
    size, sample = bench.size, bench.sample
    config = LoraConfig(rank=4 if bench.options.tiny else RANK)
    kind = bench.device.type

    def autocast() -> Any:
        return torch.autocast(kind, dtype=torch.bfloat16)

    def plain() -> tuple[Callable[[], None], Any, float]:
        model = build(size, bench.device)
        add_lora(model, config, WAN_LORA_TARGETS, torch.bfloat16)
        model.enable_gradient_checkpointing()
        counted = step_flops(BackboneDenoiser(WanBackbone(model, stride=(4, 16, 16))), sample.latents.shape, size.text)
        for block in model.blocks:
            block.__class__ = type(block).__mro__[1]  # the stock block again
        return plain_step(model, sample, bench.forcing(), size.tap, autocast), model, counted

    def ours(recompute: str) -> tuple[Callable[[], None], Any, float]:
        denoiser = BackboneDenoiser(WanBackbone(build(size, bench.device), stride=(4, 16, 16), tap=size.tap))
        add_lora(denoiser.transformer, config, WAN_LORA_TARGETS, torch.bfloat16)
        compile_again(denoiser, bench.backend)
        denoiser.run_block = recomputed(denoiser.run_block, recompute, True)
        counted = step_flops(denoiser, sample.latents.shape, size.text)
        return our_step(denoiser, sample, bench.forcing(), autocast), denoiser, counted

    bench.row("lora_plain", plain)
    bench.row("lora_ours", lambda: ours("none"))
    bench.row("lora_full", lambda: ours("full"))
    bench.row("lora_selective", lambda: ours("selective"))


def read_options(text: str | None, rows: Sequence[str], words: Sequence[str] | None, repetitions: int) -> Any:
    """What the scripts that measure rows are told."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[])
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=repetitions)
    options = parser.parse_args(words)
    for name in options.only:
        if name not in rows:
            parser.error(f"--only {name}: one of {', '.join(rows)}")
    if options.warmup < 1 or options.repetitions < 1:
        parser.error("--warmup and --repetitions: 1 or more")
    torch.set_float32_matmul_precision("high")
    return options


def main(words: Sequence[str] | None = None) -> int:
    bench = Bench(read_options(__doc__, ROWS, words, 12))
    options = bench.options
    for rows in (plain_rows, our_rows, lora_rows):
        names = {plain_rows: "plain", our_rows: "o", lora_rows: "lora"}
        if not options.only or any(name.startswith(names[rows]) for name in options.only):
            rows(bench)
            gc.collect()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
