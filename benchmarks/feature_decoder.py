"""The feature decoder at WorldArena's published size on Wan2.2-TI2V-5B: latency of a plan, over-fitting, and what pico's decoder reached.

    python benchmarks/feature_decoder.py --json docs/results/feature_decoder.json
    python benchmarks/feature_decoder.py --parts latency --repetitions 60
    python benchmarks/feature_decoder.py --parts pico --run runs/idm_feature --json docs/results/feature_decoder.json
    python benchmarks/feature_decoder.py --parts pico --run runs/idm_latent --name pico_latent --json docs/results/feature_decoder.json
    python benchmarks/feature_decoder.py --tiny                      # every line of it on a CPU, in half a minute

``latency``: diffusers' transformer of the real architecture with random weights in bfloat16 (what diffusers keeps in float32 stays so),
480x640, 45 pictures: 12 latent frames of 15x20 tokens, batch 1, eager; the decoder in float32 with TF32 products. A plan is the partial forward to the last tap, resampler and
encoder, and 20 DDIM steps; encoding the picture and the sentence is not in it. Timed with CUDA events, waited for after each plan.
Presets: ``paper`` reads blocks 11, 15, 19 and draws four samples, ``worldarena`` reads 15 and 16 (their mask) and draws one.
Beside it the whole transformer once, which a video would need once a denoising step. p50 with a 95 % interval from order statistics.

``overfit``: the decoder of the published size (48.3 M here, 48.6 M published) learns random windows by heart: features of the 5B transformer for random first latents,
one noise a window and the same sentence for all, random smooth joint targets, no dropout; loss curve, and the error of what is decoded.

``pico``: held-out errors of a run of ``physis train idm``, from its ``metrics.json``; ``--name`` keeps the runs of several decoders apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cost_networks import FULL
from cost_results import median_interval
from torch import Tensor

from physisforcing.planner.decoder_fit import Fit, FitConfig
from physisforcing.planner.feature_decoder.config import (
    ActionHeadConfig,
    FeatureDecoderConfig,
    ResamplerConfig,
    paper_size,
    worldarena,
)
from physisforcing.planner.feature_decoder.decoder import FeatureInverseDynamics, chunk_of
from physisforcing.planner.feature_decoder.sampling import ddim, exponential_sigmas
from physisforcing.planner.feature_decoder.training import FeatureBatch, score_matching
from physisforcing.planner.inverse_dynamics import JOINTS
from physisforcing.planner.measurements import machine_provenance, measurement, write_measurements
from physisforcing.worldmodel.features import denoiser_features, first_pass, partial_forward

SEED = 0
#: Latent rows and columns at 480x640 (stride 16), latent frames of 45 pictures, text tokens.
LATENT, TEXT_TOKENS = (48, 12, 30, 40), 512
NAME = "planner/feature_decoder"
SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "num_layers": 20,
    "text_dim": 16,
    "ffn_dim": 64,
    "freq_dim": 32,
}


def tiny(config: FeatureDecoderConfig) -> FeatureDecoderConfig:
    """The same number of blocks and frames, everything else small: a rehearsal."""
    resampler = ResamplerConfig(width=32, depth=1, heads=2, head_dim=16, latents_per_frame=2)
    head = ActionHeadConfig(width=32, encoder_layers=1, decoder_layers=1, heads=2)
    sampling = dataclasses.replace(config.sampling, steps=4)
    sizes = {"feature_dim": 48, "latent_frames": 3, "grid": (2, 3), "frames": 9, "goal_dim": 16, "goal_tokens": 5}
    return dataclasses.replace(config, **sizes, resampler=resampler, head=head, sampling=sampling)


class World:
    """The transformer, and random inputs of its size."""

    def __init__(self, options: argparse.Namespace) -> None:
        from diffusers import WanTransformer3DModel

        self.device, self.tiny = torch.device(options.device), options.tiny
        torch.manual_seed(SEED)
        with self.device:
            self.model = WanTransformer3DModel(**FULL.transformer | (SMALL if options.tiny else {}))
        exact = set(self.model._keep_in_fp32_modules)
        for name, parameter in self.model.named_parameters():
            if not exact & set(name.split(".")):
                parameter.data = parameter.data.bfloat16()
        self.model.eval().requires_grad_(False)
        self.generator = torch.Generator(self.device).manual_seed(SEED)
        self.shape = (48, 3, 4, 6) if options.tiny else LATENT
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(first latent, noise, text) of one sample. The latent is smooth, as a picture's: a coarse random field made larger, so that
        two windows differ in what many tokens share, not in each token's own noise."""
        channels, frames, height, width = self.shape
        text = self.randn(1, 8 if self.tiny else TEXT_TOKENS, self.model.config.text_dim)
        coarse = self.randn(1, channels, 3, 4)
        first = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
        return (
            first[:, :, None],
            self.randn(1, channels, frames, height, width),
            text.bfloat16(),
        )

    def decoder(self, name: str, **head: float) -> FeatureInverseDynamics:
        config = {"paper": paper_size, "worldarena": worldarena}[name]()
        config.head = dataclasses.replace(config.head, **head)  # type: ignore[arg-type]
        torch.manual_seed(SEED)
        with self.device:
            model = FeatureInverseDynamics(tiny(config) if self.tiny else config)
        model.set_statistics(torch.zeros(14), torch.full((14,), 0.5), torch.full((14,), 0.5))
        return model

    def goal(self, batch: int, config: FeatureDecoderConfig) -> tuple[Tensor, Tensor]:
        keep = torch.ones(batch, config.goal_tokens, dtype=torch.bool, device=self.device)
        return self.randn(batch, config.goal_tokens, config.goal_dim), keep


class Stopwatch:
    """Milliseconds between marks: CUDA events on a GPU, the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.moments = device.type == "cuda", []

    def mark(self, name: str) -> None:
        moment: Any = time.perf_counter()
        if self.cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.moments.append((name, moment))

    def spans(self) -> dict[str, float]:
        if self.cuda:
            torch.cuda.synchronize()
        pairs = list(zip(self.moments, self.moments[1:], strict=False))
        found = {b: (x.elapsed_time(y) if self.cuda else 1e3 * (y - x)) for (_, x), (b, y) in pairs}
        self.moments = []
        return found | {"plan": sum(found.values())}


@torch.inference_mode()
def one_plan(world: World, model: FeatureInverseDynamics, watch: Stopwatch, noise_SRA: Tensor) -> dict[str, float]:
    """A plan of fresh inputs; milliseconds of its parts."""
    config, request = model.config, model.needs.features
    assert request is not None
    first, noise, text = world.inputs()
    goal = world.goal(1, config)
    watch.mark("")
    features = denoiser_features(world.model, first, noise, text, request)
    watch.mark("features")
    memory = model.head.encode(model.resampler(features.float()), *goal).repeat(len(noise_SRA))
    watch.mark("resampler")
    sigmas = exponential_sigmas(config.sampling.steps, config.sampling.last_sigma, config.sampling.sigma_max)
    rows = ddim(lambda x, sigma: model.head.denoise(x, sigma, memory), noise_SRA, sigmas)
    watch.mark("ddim")
    assert rows.shape == (len(noise_SRA), config.rows, config.action_dim)
    return watch.spans()


@torch.inference_mode()
def whole_forward(world: World, watch: Stopwatch) -> float:
    """Milliseconds of all blocks, which a video needs once a denoising step."""
    from physisforcing.core.types import FeatureRequest

    first, noise, text = world.inputs()
    blocks = len(world.model.blocks)
    latents, timesteps = first_pass(first, noise, FeatureRequest(taps=(blocks,)))
    watch.mark("")
    partial_forward(world.model, latents, timesteps, text, (blocks,))
    watch.mark("forward")
    return watch.spans()["forward"]


def latency(world: World, options: argparse.Namespace, shared: dict[str, Any]) -> list[dict[str, Any]]:
    lines, watch = [], Stopwatch(world.device)
    models = {name: world.decoder(name).eval() for name in ("paper", "worldarena")}
    noises = {name: model.draw_noise([0])[0].to(world.device) for name, model in models.items()}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    wholes = []
    for repetition in range(-options.warmup, options.repetitions):
        measured = {name: one_plan(world, model, watch, noises[name]) for name, model in models.items()}
        whole = whole_forward(world, watch)
        if repetition >= 0:
            wholes.append(whole)
            for name, row in measured.items():
                rows[name].append(row)
    forward = statistics.median(wholes)
    for name, found in rows.items():
        plans, config = [row["plan"] for row in found], models[name].config
        parts = {f"{part}_p50_ms": round(statistics.median(row[part] for row in found), 3) for part in found[0]}
        against = shared["context"] | parts | {"taps": list(config.taps), "draws": config.sampling.draws}
        against |= {"ddim_steps": config.sampling.steps, "whole_forward_p50_ms": round(forward, 3)}
        against["decoder_parameters"] = sum(p.numel() for p in models[name].parameters())
        low, high = median_interval(plans)
        interval = {"low": round(low, 3), "high": round(high, 3)}
        lines.append(
            line(f"{name}/plan_p50_ms", statistics.median(plans), "ms", len(plans), against, shared, **interval)
        )
        p95 = float(np.quantile(plans, 0.95))
        lines.append(line(f"{name}/plan_p95_ms", p95, "ms", len(plans), against, shared))
    return lines


def smooth_rows(world: World, windows: int, config: FeatureDecoderConfig) -> Tensor:
    """Random joint targets [N,R,A]: a start, and slow cosines from it, about .5 rad; grippers within 0..1."""
    times = torch.linspace(0, math.pi, config.rows, device=world.device)[None, :, None]
    start = 0.4 * world.randn(windows, 1, config.action_dim)
    rows = start + sum(
        0.3 * world.randn(windows, 1, config.action_dim) * (torch.cos(k * times) - 1) / k for k in (1, 2, 3)
    )
    rows[..., [6, 13]] = rows[..., [6, 13]].sigmoid()
    return rows


@torch.no_grad()
def random_windows(world: World, model: FeatureInverseDynamics, windows: int) -> FeatureBatch:
    request = model.needs.features
    assert request is not None
    parts = [denoiser_features(world.model, *world.inputs(), request).bfloat16() for _ in range(windows)]
    rows = smooth_rows(world, windows, model.config)
    tokens, keep = world.goal(1, model.config)
    goal = tokens.expand(windows, -1, -1), keep.expand(windows, -1)
    return FeatureBatch(features_BKFhwD=torch.cat(parts), goal=goal, state_BA=rows[:, 0], rows_BRA=rows)


def decoded_error(model: FeatureInverseDynamics, batch: FeatureBatch) -> float:
    """RMSE over joints, degrees, of decoded chunks."""
    model.eval()
    noise, found = model.draw_noise([0]), []
    with torch.no_grad():
        for at in range(len(batch.rows_BRA)):
            features, goal = batch.features_BKFhwD[at : at + 1].float(), tuple(g[at : at + 1] for g in batch.goal)
            found.append(chunk_of(model.rows(features, goal, batch.state_BA[at : at + 1], noise)[0].cpu().numpy()))
    made = np.stack([chunk.actions_PA for chunk in found])
    wanted = batch.rows_BRA[:, 1:].cpu().numpy()
    return float(np.degrees(np.sqrt(((made - wanted)[..., JOINTS] ** 2).mean())))


def overfit(world: World, options: argparse.Namespace, shared: dict[str, Any]) -> list[dict[str, Any]]:
    none = {"attention_dropout": 0.0, "residual_dropout": 0.0, "feed_forward_dropout": 0.0}
    model = world.decoder(options.overfit_preset, **none)
    batch = random_windows(world, model, options.windows)
    joints = batch.rows_BRA[..., list(JOINTS)]
    deviation = batch.rows_BRA.std((0, 1))
    model.set_statistics(batch.rows_BRA.mean((0, 1)), deviation, deviation)
    before, curve = decoded_error(model, batch), []
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        at = torch.randint(options.windows, (options.batch,), generator=generator, device=world.device)
        features, goal = batch.features_BKFhwD[at].float(), tuple(g[at] for g in batch.goal)
        rows = batch.rows_BRA[at]
        drawn = FeatureBatch(features_BKFhwD=features, goal=goal, state_BA=rows[:, 0], rows_BRA=rows)
        return score_matching(model, drawn, generator)

    def log(row: dict[str, Any]) -> None:
        curve.append([row["step"], round(row["loss"], 5)])
        print(f"  step {row['step']}: loss {row['loss']:.4f}, {row['step_ms']:.1f} ms a step", flush=True)

    precision = "bf16" if world.device.type == "cuda" else "fp32"
    fit = FitConfig(
        steps=options.steps, batch=options.batch, lr=options.lr, ema=0.99, precision=precision,
        log_every=max(1, options.steps // 30), time_limit_s=60 * options.minutes,
    )  # fmt: skip
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        steps = Fit(model, loss, fit, folder=Path(folder)).run(log)
    seconds, after = time.perf_counter() - began, decoded_error(model, batch)
    spread = float(torch.rad2deg((joints[:, 1:] - joints.mean((0, 1))).square().mean().sqrt()))
    against = shared["context"] | {
        "windows": options.windows,
        "steps": steps,
        "batch": options.batch,
        "lr": options.lr,
        "seconds": round(seconds, 1),
        "before_deg": round(before, 3),
        "targets_rms_deg": round(spread, 3),
        "loss_curve": curve,
        "preset": options.overfit_preset,
        "decoder_parameters": sum(p.numel() for p in model.parameters()),
    }
    if world.device.type == "cuda":
        against["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    print(f"  {before:.2f} -> {after:.2f} degrees (targets {spread:.2f})", flush=True)
    name = f"{options.overfit_preset}/overfit"
    return [
        line(f"{name}/joint_deg", after, "degrees", options.windows, against, shared),
        line(
            f"{name}/loss_last",
            float(np.mean([v for _, v in curve[-max(1, len(curve) // 6) :]])),
            "1",
            options.windows,
            against,
            shared,
        ),
    ]


def pico(run: Path, name: str, shared: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of a training run's held-out errors, of any decoder."""
    metrics = json.loads((run / "metrics.json").read_text())
    config = json.loads((run / "config.json").read_text())
    # the numbers were made where the training ran, not where this reads them
    made = shared["provenance"]
    versions = made.get("versions", {}) | {"torch": metrics.get("torch", "")}
    shared = shared | {"provenance": made | {"hardware": metrics.get("hardware", ""), "versions": versions}}
    facts: dict[str, Any] = {"decoder": config["decoder"]}
    facts |= {k: metrics[k] for k in ("parameters", "steps", "episodes", "tasks", "world_model") if k in metrics}
    facts["train_seconds"] = round(metrics["train_seconds"], 1)
    if config["decoder"] == "feature":
        facts["taps"] = config["feature"]["model"]["taps"]
    decoded = "model" if config["decoder"] == "feature" else "real"  # real: of recorded pictures or their latents
    lines = []
    for place in ("start", "anywhere"):
        against = facts | {f"{row}_joint_deg": value["joint_deg"] for row, value in metrics[place].items()}
        against |= {k: metrics[k][place] for k in ("now_deg", "spread_deg") if k in metrics}
        count = metrics["windows"][place]
        for row, said in ((decoded, "drive"), (f"{decoded}_measured", "measured")):
            if row in metrics[place]:
                value, unit = metrics[place][row]["joint_deg"], "degrees"
                lines.append(line(f"{name}/{place}/joint_deg_{said}", value, unit, count, against, shared))
        value = metrics[place][decoded]["gripper_percent"]
        lines.append(line(f"{name}/{place}/gripper_percent", value, "percent", count, against, shared))
    return lines


def line(
    claim: str,
    value: float,
    unit: str,
    n: int,
    against: dict[str, Any],
    shared: dict[str, Any],
    low: float | None = None,
    high: float | None = None,
) -> dict[str, Any]:
    return measurement(
        f"{NAME}/{claim}",
        round(value, 4),
        unit=unit,
        low=low,
        high=high,
        n=n,
        seeds=str(SEED),
        against=against,
        command=shared["command"],
        provenance=shared["provenance"],
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="latency,overfit", help="of latency, overfit, pico")
    parser.add_argument("--json", type=Path, help="write measurements here")
    parser.add_argument("--run", type=Path, help="folder of physis train idm, for the part pico")
    parser.add_argument("--name", default="pico", help="of that run in the claims")
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--windows", type=int, default=16, help="that are learned by heart")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--minutes", type=float, default=3.0, help="of over-fitting at most")
    parser.add_argument("--overfit-preset", choices=("paper", "worldarena"), default="paper")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small networks: a rehearsal")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    if set(options.parts) - {"latency", "overfit", "pico"}:
        parser.error("parts are latency, overfit, pico")
    if ("pico" in options.parts) != (options.run is not None):
        parser.error("--parts pico needs --run FOLDER, and no other part reads it")
    if options.tiny:
        options.repetitions, options.warmup = min(options.repetitions, 3), 1
        options.steps, options.windows, options.lr = min(options.steps, 60), 4, 3e-3
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    torch.set_float32_matmul_precision("high")
    said = shlex.join(["python", "benchmarks/feature_decoder.py", *arguments])
    shared: dict[str, Any] = {"command": said, "provenance": machine_provenance()}
    lines = pico(options.run, options.name, shared) if options.run else []
    if set(options.parts) & {"latency", "overfit"}:
        world = World(options)
        model = "tiny" if options.tiny else "Wan2.2-TI2V-5B, random weights, bfloat16"
        shared["context"] = {
            "model": model,
            "parameters": world.parameters,
            "video": "tiny" if options.tiny else "480x640x45, batch 1",
        }
        print(f"{world.parameters / 1e9:.3f} billion parameters, {torch.__version__}", flush=True)
        if "latency" in options.parts:
            lines += latency(world, options, shared)
        if "overfit" in options.parts:
            lines += overfit(world, options, shared)
    for found in lines:
        print(f"{found['claim']:58} {found['value']:>10} {found['unit']}, n {found['n']}")
    if options.json:
        write_measurements(options.json, lines)
    return lines


if __name__ == "__main__":
    main()
