"""Which choices of the physics losses matter: a training of the pico network for each choice and seed, all read out alike.

    python benchmarks/physics_choices.py --prepare FILE --train DATASET --heldout DATASET
    python benchmarks/physics_choices.py --windows FILE --results RUNS.jsonl --gpus 4 --minutes 8.5
    python benchmarks/physics_choices.py --results RUNS.jsonl --json docs/results/physics_choices.json --report

Each variant changes one option of ``PhysicsConfig`` (or the tracks); with equal seeds it starts from the same network and sees the same
windows and noise as the default. What is measured does not follow the choice: points that the default regions select, simulator
truth at the default latent times, fixed noise levels. ``epe_px``: soft-argmax of the trained phi at its own temperature and upsampling;
``argmax_px``: the same phi's best cell, so that sharpness alone gains nothing; ``probe_px``: a fresh default phi trained on the frozen
network, which also exists where no phi was trained; ``fm``: flow-matching loss. Runs are appended to the results file: the
command continues where it was stopped. ``--report``: paired differences over training seeds, t intervals, Holm's correction from
five seeds on; writes the lines and the table of docs/results/physics_choices.md.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import multiprocessing
import os
import queue
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import probe_data
import torch
from physics_choices_table import MEASURES, report, value_of
from readouts import ReadOut, measure, train_probes

from physisforcing.core.paths import weights_root
from physisforcing.core.results import ResultKey, ResultsFile, config_hash
from physisforcing.planner.measurements import machine_provenance
from physisforcing.worldmodel.backbones.wan import ConditionerConfig
from physisforcing.worldmodel.data.batches import WindowBank
from physisforcing.worldmodel.physics.config import CHOICES, PhysicsConfig
from physisforcing.worldmodel.physics.forcing import REPORT_SIZE
from physisforcing.worldmodel.training.config import TrainWorldModelConfig
from physisforcing.worldmodel.training.runtime import choose_kernels
from physisforcing.worldmodel.training.worldmodel import Trainer

ROOT = Path(__file__).resolve().parents[1]
#: Temperature of raw cosines, beside the heads.
RAW_TEMPERATURE = 0.02
#: Option -> values beside the default. ``depth=metric`` is what the default ``teacher`` means with simulator depth.
OPTIONS: dict[str, list[Any]] = {
    "depth": ["disparity", "off"],
    "select": ["topk", "both"],
    "mask": ["nearest"],
    "temperature": ["learnable"],
    "time": ["last", "uniform"],
    "trajectory_loss": ["ce_gauss", "huber"],
    "visibility": ["share", "off"],
    "motion": ["net"],
    "visible_steps": [False],
    "camera_motion": ["median"],
    "dead_zone": [0.0],
    "min_motion": [0.0],
    "border": ["drop"],
    "query_frames": [[0, 2]],
    "upsample": [2],
    "feature_dim": [64, 512],
    "sigma_weight": ["linear"],
    "relations": ["rigid"],
    "relation_loss": ["margin", "mse"],
    "common": ["remove"],
    "weights": ["gradient"],
    "lambda_pix": [0.0, 2.0],
    "lambda_sem": [0.0],
}
SAME = {("depth", "metric")}


@dataclass(slots=True, kw_only=True)
class Variant:
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    degraded: bool = False

    @property
    def physics(self) -> PhysicsConfig:
        return replace(PhysicsConfig(), **self.changes)


def variants() -> dict[str, Variant]:
    """All of them by name, the default first."""
    made = [Variant(name="default"), Variant(name="lambdas=0", changes={"lambda_pix": 0.0, "lambda_sem": 0.0})]
    for option, values in OPTIONS.items():
        for value in values:
            word = f"{value:g}" if isinstance(value, float) else "off" if value is False else str(value)
            word = "+".join(map(str, value)) if isinstance(value, list) else word
            made.append(Variant(name=f"{option}={word}", changes={option: value}))
    # whether the cross-entropy's gain is the loss or only its larger gradient
    weaker = {"trajectory_loss": "ce_gauss", "lambda_pix": 0.1}
    made.append(Variant(name="trajectory_loss=ce_gauss,lambda_pix=0.1", changes=weaker))
    made.append(Variant(name="teacher=degraded", degraded=True))
    asked = {(option, value) for option, values in OPTIONS.items() for value in values if isinstance(value, str)}
    named = {(option, value) for option, known in CHOICES.items() for value in known[1:]}
    assert asked | SAME == named, f"choices without a row: {sorted(named - asked - SAME)}"
    return {variant.name: variant for variant in made}


def run_key(variant: Variant, seed: int, manifest: str, options: argparse.Namespace) -> ResultKey:
    settings = {name: getattr(options, name) for name in ("steps", "batch", "probe_steps", "compile")}
    config = config_hash(settings | {"physics": asdict(variant.physics), "degraded": variant.degraded})
    return ResultKey(manifest=manifest, episode=f"{variant.name}/{seed}", fingerprint="pico", config=config)


def train_one(
    variant: Variant, seed: int, parts: dict[str, probe_data.Part], options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Train and measure one network. Raises ``FloatingPointError`` when a loss is not finite in the end."""
    config = TrainWorldModelConfig(physics=variant.physics)
    config.run = replace(config.run, seed=seed, steps=options.steps, batch=options.batch, log_every=options.steps + 1)
    config.run.compile = "blocks" if options.compile else "none"
    config.optim.warmup = max(1, options.steps // 8)
    standard = Variant(name="default")
    trainer = Trainer(config, bank_of(variant.name, variant, parts["train"], device), device)
    warm, begun = min(30, options.steps - 1), time.perf_counter()
    for step in range(options.steps):
        if step == warm:
            float(trainer.optimizer.param_groups[0]["params"][0].detach().sum())  # waits for the device
            begun = time.perf_counter()
        terms = trainer.step(step)
    last = {name: float(value) for name, value in terms.items()}
    rate = (options.steps - warm) / (time.perf_counter() - begun)
    if not all(map(math.isfinite, last.values())):
        raise FloatingPointError(f"a loss is not finite: {last}")
    trainer.average.swap()
    denoiser, tap = trainer.denoiser.requires_grad_(False), config.backbone.tap
    default = bank_of("default", standard, parts["train"], device)
    heldout = bank_of("heldout", standard, parts["heldout"], device)
    probes = train_probes(denoiser, [tap], default, steps=options.probe_steps, batch=options.batch)
    readouts = {"raw": ReadOut.raw(tap, RAW_TEMPERATURE), "probe": ReadOut.of_head(tap, probes[tap])}
    if trainer.forcing is not None and variant.physics.lambda_pix > 0:
        readouts["head"] = ReadOut.of_head(tap, trainer.forcing)
    found = measure(denoiser, readouts, heldout, flow=config.flow)
    scale = REPORT_SIZE[0] / heldout.latents_WCFhw.shape[-2]
    px = {
        name: {k: {f"{s:g}": scale * found.mean(name, k, s) for s in found.fm} for k in ("soft", "argmax")}
        for name in readouts
    }
    still = {name: scale * found.mean(name, "soft", None) for name in ("still", "uniform")}
    return {"px": px, "fm": {f"{s:g}": v for s, v in found.fm.items()}, "last": last, "steps_per_s": rate} | still


_BANKS: dict[str, WindowBank] = {}
_KEPT = ("default", "heldout")


def bank_of(name: str, variant: Variant, part: probe_data.Part, device: torch.device) -> WindowBank:
    """Windows under a variant's choices, kept in memory: the default's, the held-out ones, and one more."""
    if name not in _BANKS:
        for other in set(_BANKS) - set(_KEPT):
            del _BANKS[other]
        _BANKS[name] = part.bank(variant.physics, device, degraded=variant.degraded)
    return _BANKS[name]


def work(number: int, jobs: Any, path: Path, manifest: str, options: argparse.Namespace, deadline: float) -> None:
    """One process: trains one network after the other until there is no job left, or no time for one more."""
    gpu = options.gpus > 0
    device = torch.device(f"cuda:{number % options.gpus}" if gpu else "cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // (max(1, options.gpus) * options.per_gpu)) if gpu else 1)
    if gpu:
        torch.cuda.set_device(device)
    choose_kernels(device, False)
    parts, about = probe_data.load(path)
    probe_data.check_latents(about, options.codec)
    results, provenance, longest = ResultsFile(options.results), machine_provenance(), 0.0
    shared = {"steps": options.steps, "batch": options.batch, "probe_steps": options.probe_steps}
    shared |= {"compile": options.compile, "provenance": provenance, "windows": about["windows"]}
    shared["episodes"] = len(parts["heldout"].episodes)
    while time.time() + longest < deadline:
        try:
            name, seed = jobs.get(timeout=2)
        except queue.Empty:
            break
        begun, variant = time.time(), variants()[name]
        key = run_key(variant, seed, manifest, options)
        fields: dict[str, Any] = {"variant": name, "seed": seed, **shared}
        try:
            row = train_one(variant, seed, parts, options, device)
        except Exception:
            results.append(key, "error", error=traceback.format_exc()[-2000:], **fields)
            print(f"{name} seed {seed}: failed\n{traceback.format_exc()}", flush=True)
            if "CUDA" in traceback.format_exc():
                return  # nothing works any more in this process
            continue
        longest = max(longest, 1.15 * (time.time() - begun))
        results.append(key, "success", **fields, **row)
        said = {k: value_of(row, k) for k in MEASURES}
        words = " ".join(f"{k} {v:.3f}" for k, v in said.items() if v is not None)
        print(f"{name} seed {seed}: {words}; {row['steps_per_s']:.1f} steps/s, {time.time() - begun:.0f} s", flush=True)


def train_all(options: argparse.Namespace) -> int:
    deadline = time.time() + 60 * options.minutes
    manifest = hashlib.sha256(options.windows.read_bytes()).hexdigest()[:16]
    results, known = ResultsFile(options.results), variants()
    wanted = [(name, seed) for seed in options.seeds for name in options.variants or known]
    open_jobs = [
        job for job in wanted if not results.done(run_key(known[job[0]], job[1], manifest, options), retry_errors=True)
    ]
    workers = min(max(1, options.gpus) * options.per_gpu, max(1, len(open_jobs)))
    print(f"{len(wanted)} runs of {options.steps} steps, {len(open_jobs)} open, {workers} processes", flush=True)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    jobs = context.Queue()
    for job in open_jobs:
        jobs.put(job)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    arguments = (jobs, options.windows, manifest, options, deadline)
    processes = [context.Process(target=work, args=(number, *arguments)) for number in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    jobs.cancel_join_thread()
    results.reload()
    done = sum(results.done(run_key(known[name], seed, manifest, options)) for name, seed in wanted)
    print(f"{done} of {len(wanted)} runs done", flush=True)
    return 0 if done == len(wanted) else 3


def main() -> int:
    options = parse()
    if options.prepare:
        wanted = [(v.physics, v.degraded) for v in variants().values()]
        probe_data.prepare(
            options.prepare,
            {"train": options.train, "heldout": options.heldout},
            wanted,
            codec=options.codec,
            lags=ConditionerConfig().lags,
            strides={"train": options.stride, "heldout": options.heldout_stride},
            limit=options.limit,
            drop_still=options.drop_still,
            cache=options.targets_cache,
        )
        return 0
    if options.report:
        report(options.results, options.json, list(variants()))
        return 0
    return train_all(options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, help="write this file: .safetensors or .safetensors.xz")
    parser.add_argument("--train", type=Path, help="dataset with cached targets (physis data targets)")
    parser.add_argument("--heldout", type=Path, help="likewise, of other seeds")
    parser.add_argument("--targets-cache", type=Path, help="folder of the targets, if not in the datasets")
    parser.add_argument("--stride", type=int, default=8, help="control steps between training windows")
    parser.add_argument("--heldout-stride", type=int, default=16)
    parser.add_argument("--limit", type=int, help="episodes a task")
    parser.add_argument(
        "--drop-still", action="store_true", help="without training windows in which nothing is selected"
    )
    parser.add_argument("--codec", type=Path, default=weights_root() / "vae")
    parser.add_argument("--windows", type=Path, help="the file")
    parser.add_argument("--results", type=Path, help="JSON lines of the runs, continued")
    parser.add_argument(
        "--gpus", type=int, default=torch.cuda.device_count(), help="0: one process a core of --per-gpu"
    )
    parser.add_argument("--per-gpu", type=int, default=1, help="processes that share a GPU")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--probe-steps", type=int, default=200, help="updates of the fresh phi")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", help=f"of {', '.join(variants())} (all)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks (a minute for each process)")
    parser.add_argument("--minutes", type=float, default=600.0, help="start no run that would not end by then")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--json", type=Path, help="of --report")
    options = parser.parse_args()
    needed = ["train", "heldout"] if options.prepare else ["results", "json" if options.report else "windows"]
    if missing := [name for name in needed if getattr(options, name) is None]:
        parser.error(" ".join(f"--{name}" for name in missing))
    for name in options.variants or ():
        if name not in variants():
            parser.error(f"--variants {name}: not one of {', '.join(variants())}")
    return options


if __name__ == "__main__":
    sys.exit(main())
