"""Peak memory of whole training steps of the large backbones, and which cards they fit: the memory table of docs/results/training.md.

    python benchmarks/paper_memory.py --json memory.json
    python benchmarks/paper_memory.py --only 5b_lora_full_81 --limit-gib 22.5      # does it run where no more is given?
    python benchmarks/paper_memory.py --tiny                                       # every row on a CPU: no bytes, but that it runs

A step is forward, backward and AdamW, as `physis train worldmodel` makes it: adapters in float32 over weights in bfloat16, or all weights
(``float32`` under autocast, which is what the trainer does, or ``bfloat16`` altogether), both physics losses, heads included, random weights,
480x640 pixels, two samples one after the other (as ``run.micro=1``: the gradients of the first lie there while the second computes). Row: model, what is trained, activation checkpointing, 8-bit products, optimiser where it is not AdamW, pixel frames. Without --eager blocks are compiled.

``value`` is what PyTorch's allocator had at most in tensors. A card fits if what it had reserved at most, with the CUDA context (measured),
is no more than the card has; --limit-gib tries a limit out, where the allocator gives back what lies unused before it fails. What others hold
on the card when the script starts is no context and stands in the rows (`others_gib`); what they take or give back meanwhile counts as context.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cost_networks import FULL, TINY
from paper_pipelines import TINY_TRANSFORMERS, TRANSFORMERS
from paper_recipes import KINDS
from paper_training import compile_again
from torch import Tensor, nn

from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
from physisforcing.worldmodel.backbones.cosmos3 import Cosmos3Backbone
from physisforcing.worldmodel.backbones.wan_paper import WanBackbone
from physisforcing.worldmodel.flow_matching import FlowMatchingConfig, flow_matching_loss
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.physics.forcing import PhysisForcing
from physisforcing.worldmodel.physics.relation import token_order
from physisforcing.worldmodel.training.config import LoraConfig, OptimConfig
from physisforcing.worldmodel.training.denoiser import BackboneDenoiser
from physisforcing.worldmodel.training.float8 import use_float8
from physisforcing.worldmodel.training.lora import add_lora
from physisforcing.worldmodel.training.optim import build_optimizer
from physisforcing.worldmodel.training.recompute import recomputed

#: Card -> MiB that nvidia-smi says it has: RTX 4090, L40S, H100 80GB HBM3, H200.
CARDS = {24: 24564, 48: 46068, 80: 81559, 141: 143771}
STEPS, SAMPLES = 3, 2


@dataclass(slots=True, kw_only=True)
class Case:
    kind: str
    checkpointing: str = "none"
    frames: int = 81
    trained: str = "lora"
    optimizer: str = "adamw"
    fp8: bool = False

    @property
    def name(self) -> str:
        other = "_fp8" * self.fp8 + ("" if self.optimizer == "adamw" else f"_{self.optimizer}")
        return f"{self.kind}_{self.trained}_{self.checkpointing}{other}_{self.frames}"


CASES = {
    case.name: case
    for case in (
        *(Case(kind="5b", checkpointing=kind, frames=n) for n in (81, 49) for kind in ("none", "selective", "full")),
        *(Case(kind="5b", checkpointing=kind, trained="bfloat16") for kind in ("none", "full")),
        *(Case(kind="5b", checkpointing=kind, trained="float32") for kind in ("none", "selective", "full")),
        Case(kind="5b", trained="float32", fp8=True, optimizer="adamw8bit"),
        Case(kind="a14b", checkpointing="full"),
        *(Case(kind="a14b", checkpointing="full", trained="bfloat16", optimizer=kind) for kind in ("adamw", "adamw8bit")),
        Case(kind="cosmos3", checkpointing="full"),
    )
}  # fmt: skip


def build(case: Case, tiny: bool, device: torch.device) -> nn.Module:
    """The transformer with random weights, never in more than its own precision."""
    import diffusers

    cosmos = case.kind == "cosmos3"
    kind = diffusers.Cosmos3OmniTransformer if cosmos else diffusers.WanTransformer3DModel
    config = TRANSFORMERS[case.kind] | (TINY_TRANSFORMERS[case.kind] if tiny else {})
    usual = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if case.trained == "float32" else torch.bfloat16)
    try:
        with device:
            model = kind(**config)
    finally:
        torch.set_default_dtype(usual)
    exact = set(model._keep_in_fp32_modules or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if exact & set(name.split(".")):
            tensor.data = tensor.data.float()
    return model.train()


def prepare(
    case: Case, tiny: bool, device: torch.device, backend: str | None
) -> tuple[BackboneDenoiser, PhysisForcing]:
    """Network and heads as the trainer has them. ``backend``: of compilation; None compiles nothing."""
    transformer = build(case, tiny, device)
    if case.kind == "cosmos3":
        backbone: Any = Cosmos3Backbone(transformer)
    else:
        small = case.kind == "a14b"
        backbone = WanBackbone(
            transformer, stride=(4, 8, 8) if small else (4, 16, 16), first_latent="mask" if small else "pinned"
        )
    if case.trained == "lora":
        add_lora(transformer, LoraConfig(rank=KINDS[case.kind]["rank"]), backbone.lora_targets, torch.bfloat16)
    if case.fp8:
        use_float8(backbone.blocks, device)
    denoiser = BackboneDenoiser(backbone)
    compile_again(denoiser, backend)
    denoiser.run_block = recomputed(denoiser.run_block, case.checkpointing, backend is not None)
    size = TINY if tiny else FULL
    config = PhysicsConfig(phi_hidden=size.hidden, psi_hidden=size.hidden)
    return denoiser, PhysisForcing(config, width=backbone.width, teacher_dim=size.teacher_dim).to(device)


def sample(
    case: Case, denoiser: BackboneDenoiser, tiny: bool, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> (batch, targets of the physics losses): random but valid."""
    size, options = TINY if tiny else FULL, {"device": device}
    frames = 3 if tiny else 1 + (case.frames - 1) // 4
    high, wide = (64, 96) if tiny else (480, 640)
    _, tall, broad = denoiser.stride
    shape = (1, denoiser.latent_channels, frames, high // tall, wide // broad)
    batch: dict[str, Any] = {"latents_BCFhw": torch.randn(shape, **options)}
    if case.kind == "cosmos3":
        batch["text"] = torch.randint(0, 256, (1, 8 if tiny else 256), **options)
    else:
        batch["text"] = torch.randn(1, size.text, TRANSFORMERS[case.kind]["text_dim"], **options).bfloat16()
    if case.kind == "a14b":
        batch["condition_BCFhw"] = torch.randn(shape, **options)
    grid = (frames, shape[3] // denoiser.patch[1], shape[4] // denoiser.patch[2])
    points = size.queries[0] * size.queries[1]
    return batch, {
        "points_BFN2": torch.rand(1, frames, points, 2, **options),
        "visible_BFN": torch.rand(1, frames, points, **options) > 0.1,
        "select_BN": torch.rand(1, points, **options) > 0.7,
        "token_mask_BFhw": torch.rand(1, *grid, **options) > 0.7,
        "teacher_BFhwC": torch.randn(1, *grid, size.teacher_dim, **options),
    }


def loss_of(
    denoiser: BackboneDenoiser, forcing: PhysisForcing, batch: dict[str, Any], targets: dict[str, Any]
) -> Tensor:
    latents = batch["latents_BCFhw"]
    noise, sigma, grid = (
        torch.randn_like(latents),
        torch.tensor([0.6], device=latents.device),
        targets["token_mask_BFhw"].shape[1:],
    )
    velocity, tapped = denoiser.predict(batch, noise, sigma, need_tap=True)
    assert tapped is not None
    draw = torch.Generator(device=latents.device).manual_seed(0)
    order = token_order(1, grid[0] * grid[1] * grid[2], draw)
    flow = FlowMatchingConfig(train_shift=1.0, motion_weight=0.0)
    physics = forcing(tapped, tuple(grid), targets, order, sigma_B=sigma)
    return flow_matching_loss(velocity, latents, noise, flow) + physics.loss


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Whole steps of one case: GiB at most and what is known besides."""
    device = torch.device("cpu" if options.tiny else "cuda")
    backend = None if options.eager else "eager" if options.tiny else "inductor"
    denoiser, forcing = prepare(case, options.tiny, device, backend)
    trained = [p for p in (*denoiser.parameters(), *forcing.parameters()) if p.requires_grad]
    optimizer = build_optimizer(trained, OptimConfig(kind=case.optimizer))
    batch, targets = sample(case, denoiser, options.tiny, device)
    precise = (
        contextlib.nullcontext if case.trained == "bfloat16" else lambda: torch.autocast(device.type, torch.bfloat16)
    )
    seconds = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        for _ in range(SAMPLES):
            with precise():
                loss = loss_of(denoiser, forcing, batch, targets)
                (loss / SAMPLES).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        finite = bool(loss.isfinite())  # waits for the device
        seconds.append(time.perf_counter() - begun)
    found: dict[str, Any] = {
        "seconds_last_step": round(seconds[-1], 3),
        "first_step_s": round(seconds[0], 1),
        "finite": finite,
    }
    found |= {
        "samples": SAMPLES,
        "trained_millions": round(sum(p.numel() for p in trained) / 1e6, 3),
        "compiled": backend is not None,
    }
    return found


def run(case: Case, options: argparse.Namespace) -> tuple[float | None, dict[str, Any]]:
    """-> (GiB in tensors at most, or None where it failed or has no GPU; what else the line says)."""
    gpu = not options.tiny
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {"limit_gib": options.limit_gib} if options.limit_gib else {}
    try:
        found |= measure(case, options)
    except Exception as error:  # the other rows say what they say
        reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
        return None, found | {"failed": f"{reason}: {' '.join(str(error).split())[:160]}"}
    if not gpu:
        return None, found | {"skipped": "memory needs a GPU"}
    free, total = torch.cuda.mem_get_info()
    context = max(0, total - free - torch.cuda.memory_reserved() - options.others)
    found |= {"others_gib": round(options.others / 2**30, 2), **fitting(torch.cuda.max_memory_reserved(), context)}
    return torch.cuda.max_memory_allocated() / 2**30, found


def fitting(reserved: int, context: int) -> dict[str, Any]:
    """What a line says of bytes that the allocator had reserved at most and of those of the context: the cards that have both."""
    fits = [card for card, mib in CARDS.items() if reserved + context <= mib * 2**20]
    return {"reserved_gib": round(reserved / 2**30, 2), "context_gib": round(context / 2**30, 2), "fits_gb": fits}


def held_by_others() -> int:
    """Bytes in use on the card before this process has a context there, by nvidia-smi; the driver's own share, which no process can have, is
    none of them."""
    assert not torch.cuda.is_initialized(), "its own context would be counted"
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    asked = ["nvidia-smi", f"--id={card}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(asked, check=True, capture_output=True, text=True).stdout) * 2**20


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--limit-gib", type=float, default=0.0)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[])
    options = parser.parse_args(words)
    for name in options.only:
        if name not in CASES:
            parser.error(f"--only {name}: one of {', '.join(CASES)}")
    options.others = 0 if options.tiny else held_by_others()
    if options.limit_gib and not options.tiny:
        torch.cuda.set_per_process_memory_fraction(
            options.limit_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
        )
    torch.set_float32_matmul_precision("high")
    provenance, lines, failed = machine_provenance(), [], 0
    command = placeless("python benchmarks/paper_memory.py " + shlex.join(sys.argv[1:] if words is None else words))
    for name in options.only or CASES:
        value, more = run(CASES[name], options)
        failed += "failed" in more
        gc.collect()
        if not options.tiny:
            torch.cuda.empty_cache()
        tail = f"_within_{options.limit_gib:g}_gib" if options.limit_gib else ""
        lines.append(
            measurement(
                f"training/memory/{name}{tail}", None if value is None else round(value, 2),  # type: ignore[arg-type]
                unit="GiB", n=STEPS, seeds="0", against=more, command=command, provenance=provenance,
            )
        )  # fmt: skip
        print(f"{name:<33}{'' if value is None else f'{value:.2f} GiB'}  {more}", flush=True)
        if options.json:
            write_measurements(options.json, lines)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
