"""What the physics losses cost: time of a training step of the pico transformer with them over without them.

Both variants run in one process, alternating, on the same random batch; the ratio of the medians is printed with its spread,
as one JSON line. Teacher targets are cached before training, so their cost is not part of a step.

    python benchmarks/physics_losses.py [--device cuda] [--batch 2] [--steps 9] [--points 625] [--json docs/results/training.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from physisforcing.planner.measurements import measurement, write_measurements
from physisforcing.worldmodel.backbones.wan import ConditionerConfig, WanConfig, WanDenoiser, build_denoiser
from physisforcing.worldmodel.flow_matching import FlowMatchingConfig
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.physics.forcing import PhysisForcing
from physisforcing.worldmodel.training.objective import draw_noise, objective

GRID = (5, 15, 20)
TEACHER_DIM = 112
#: Of the weights and of the batch.
SEED = 0


def random_batch(config: WanConfig, batch: int, points: int, device: str, generator: torch.Generator) -> dict:
    """A batch of the small geometry: a quarter of the points and of the tokens is physics-informative, as on real windows."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    targets = {
        "points_BFN2": draw(batch, GRID[0], points, 2),
        "visible_BFN": draw(batch, GRID[0], points) > 0.1,
        "select_BN": draw(batch, points) > 0.75,
        "token_mask_BFhw": draw(batch, *GRID) > 0.75,
        "teacher_BFhwC": draw(batch, *GRID, TEACHER_DIM),
    }
    return {
        "latents_BCFhw": draw(batch, config.latent_channels, *GRID),
        "text_BLD": draw(batch, 32, config.text_dim),
        "proprioception_BKA": draw(batch, 3, 14),
        "targets": targets,
    }


def step_seconds(denoiser: WanDenoiser, forcing: PhysisForcing | None, batch: dict, precision: str) -> float:
    """One forward and backward pass, without the optimiser (equal in both variants up to the heads' few parameters)."""
    device = batch["latents_BCFhw"].device
    drawn = draw_noise(
        batch["latents_BCFhw"].shape, FlowMatchingConfig(), torch.Generator(device=device).manual_seed(SEED)
    )
    context = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
    _wait(device)
    begun = time.perf_counter()
    objective(denoiser, forcing, batch, drawn, FlowMatchingConfig(), context)["loss"].backward()
    _wait(device)
    spent = time.perf_counter() - begun
    denoiser.zero_grad(set_to_none=True)
    return spent


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--points", type=int, default=625)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=None)
    parser.add_argument("--json", type=Path, help="write the measurement here")
    options = parser.parse_args()
    precision = options.precision or ("bf16" if options.device.startswith("cuda") else "fp32")
    torch.manual_seed(SEED)
    config = WanConfig()
    denoiser = build_denoiser(config, ConditionerConfig()).to(options.device)
    forcing = PhysisForcing(PhysicsConfig(), width=config.dim, teacher_dim=TEACHER_DIM).to(options.device)
    generator = torch.Generator().manual_seed(SEED)
    batch = random_batch(config, options.batch, options.points, options.device, generator)
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for step in range(options.steps + 2):
        for name, heads in (("without", None), ("with", forcing)):
            spent = step_seconds(denoiser, heads, batch, precision)
            if step >= 2:  # the first two passes warm allocators and kernels up
                seconds[name].append(spent)
    ratios = sorted(a / b for a, b in zip(seconds["with"], seconds["without"], strict=True))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    command = (
        f"python benchmarks/physics_losses.py --device {options.device} --batch {options.batch} --steps {options.steps} "
        f"--points {options.points} --precision {precision}"
    )
    line = measurement(
        "physics/step_cost/ratio",
        round(medians["with"] / medians["without"], 4),
        unit="step time with losses / without",
        low=round(ratios[0], 4),
        high=round(ratios[-1], 4),
        n=options.steps,
        seeds=str(SEED),
        against={f"{name}_ms": round(1e3 * value, 2) for name, value in medians.items()},
        command=command,
    )
    print(json.dumps(line))
    if options.json:
        write_measurements(options.json, [line])


if __name__ == "__main__":
    main()
