"""Train the pico codec and world model on one GPU within a time budget, through the code of ``physis train``.

    python benchmarks/train_pico.py --data runs/bell runs/stack --out runs/pico --vae-minutes 2 --world-minutes 8

The number of steps follows from a measured step time and is kept in ``<out>/plan.json``: calling the script again with the same
``--out`` continues where it was stopped. ``--pack FOLDER`` copies the results there, a few flat files. Overrides for the
world model or the autoencoder: ``--world key=value``, ``--vae key=value`` (as for ``physis train``).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import torch

from physisforcing.core.config import compose
from physisforcing.worldmodel.data.windows import Episode, read_episodes
from physisforcing.worldmodel.model import load_world_model
from physisforcing.worldmodel.training.config import TrainVaeConfig, TrainWorldModelConfig
from physisforcing.worldmodel.training.preview import preview
from physisforcing.worldmodel.training.runtime import choose_kernels, pick_device, split_heldout
from physisforcing.worldmodel.training.vae import train_vae
from physisforcing.worldmodel.training.worldmodel import Trainer, prepare_banks, train_world_model


def main() -> int:
    options = parse()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    choose_kernels(pick_device("auto"), False)
    begun = time.perf_counter()
    roots = f"data.roots=[{','.join(options.data)}]"
    shared = [roots, f"data.heldout={options.heldout}", f"data.workers={options.workers}", "run.resume=true"]
    vae = compose("train_vae", ["vae=pico", *shared, f"run.out={out / 'vae'}", *options.vae], TrainVaeConfig)
    world = compose(
        "train_worldmodel",
        ["experiment=pico", *shared, f"run.out={out / 'worldmodel'}", f"codec={out / 'vae' / 'codec'}", *options.world],
        TrainWorldModelConfig,
    )
    data = world.data
    episodes = read_episodes(
        data.roots, success_only=data.success_only, tasks=data.tasks, limit=data.limit, workers=data.workers
    )
    counts = {
        task: sum(episode.task == task for episode in episodes) for task in {episode.task for episode in episodes}
    }
    say("read", begun, episodes=len(episodes), tasks=counts, steps=sum(episode.length for episode in episodes))

    if not (out / "vae" / "codec" / "config.json").is_file():
        vae.run.steps = planned_steps(out, "vae", options.vae_minutes, lambda: vae_seconds(vae, episodes, out))
        train_vae(vae, episodes)
        say("autoencoder trained", begun)
    if options.world_minutes > 0:
        banks = prepare_banks(world, pick_device(world.run.device), episodes)
        say("windows encoded", begun, train=len(banks[0].table), heldout=len(banks[1].table))
        world.run.steps = planned_steps(
            out, "worldmodel", options.world_minutes, lambda: world_seconds(world, banks[0])
        )
        train_world_model(world, banks)
        say("world model trained", begun)
        show(out, world, episodes)
    if options.pack:
        pack(out, Path(options.pack))
    say("done", begun)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="LeRobot datasets")
    parser.add_argument("--out", required=True)
    parser.add_argument("--vae-minutes", type=float, default=2.0)
    parser.add_argument("--world-minutes", type=float, default=8.0, help="0: autoencoder only")
    parser.add_argument("--heldout", type=int, default=24)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--pack")
    parser.add_argument("--vae", nargs="*", default=[], help="overrides of physis train vae")
    parser.add_argument(
        "--world", nargs="*", default=["run.compile=blocks"], help="overrides of physis train worldmodel"
    )
    return parser.parse_args()


def planned_steps(out: Path, stage: str, minutes: float, measure) -> int:
    """Steps of a stage: from an earlier call's plan, else the budget over the measured seconds a step."""
    path = out / "plan.json"
    plan = json.loads(path.read_text()) if path.is_file() else {}
    if stage not in plan:
        seconds = measure()
        plan[stage] = {"minutes": minutes, "step_s": seconds, "steps": max(2, int(60.0 * minutes / seconds))}
        path.write_text(json.dumps(plan, indent=2) + "\n")
    print(f"{stage}: {plan[stage]}", file=sys.stderr, flush=True)
    return int(plan[stage]["steps"])


def world_seconds(config: TrainWorldModelConfig, bank) -> float:
    trainer = Trainer(config, bank, pick_device(config.run.device))
    return timed(
        trainer.step, warm=8 if trainer.device.type == "cuda" else 1, count=20 if trainer.device.type == "cuda" else 1
    )


def vae_seconds(config: TrainVaeConfig, episodes: list[Episode], out: Path) -> float:
    """Seconds a step, from a run of few steps that is thrown away."""
    import dataclasses

    gpu = pick_device(config.run.device).type == "cuda"
    few = 40 if gpu else 2
    shutil.rmtree(out / "vae_timing", ignore_errors=True)  # of a killed call
    run = dataclasses.replace(
        config.run, out=str(out / "vae_timing"), steps=few, log_every=few // 2, save_every=10**9, eval_every=10**9
    )
    train_vae(dataclasses.replace(config, run=run), episodes[: max(config.data.heldout + 1, 40)])
    lines = [json.loads(line) for line in (out / "vae_timing" / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(out / "vae_timing")
    return next(line["step_ms"] for line in reversed(lines) if "step_ms" in line) / 1e3


def timed(step, warm: int, count: int) -> float:
    for index in range(warm):
        step(index)
    synchronise()
    begun = time.perf_counter()
    for index in range(warm, warm + count):
        step(index)
    synchronise()
    return (time.perf_counter() - begun) / count


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def show(out: Path, world: TrainWorldModelConfig, episodes: list[Episode]) -> None:
    """Preview on held-out episodes, at their start and in their middle."""
    model = load_world_model(out / "worldmodel" / "export", pick_device(world.run.device), codec=world.codec)
    heldout = split_heldout(episodes, world.data.heldout)[1]
    values = {}
    for start in (0, 32):
        long_enough = [episode for episode in heldout if episode.length > start + 8]
        if long_enough:
            values[f"start_{start}"] = preview(model, long_enough, out / f"preview_{start:03d}.mp4", start=start)
    (out / "preview.json").write_text(json.dumps(values, indent=2) + "\n")
    print(json.dumps(values), file=sys.stderr, flush=True)


def pack(out: Path, target: Path) -> None:
    """At most 8 flat files: the codec, the world model (transformer apart), metrics, previews."""
    import tarfile

    target.mkdir(parents=True, exist_ok=True)

    def tar(name: str, entries: list[tuple[Path, str]]) -> None:
        with tarfile.open(target / name, "w") as archive:
            for path, inside in entries:
                if path.exists():
                    archive.add(path, inside)

    export = out / "worldmodel" / "export"
    tar("vae.tar", [(out / "vae" / "codec", "vae")])
    if export.exists():
        large = export / "transformer" / "diffusion_pytorch_model.safetensors"
        shutil.copyfile(large, target / "transformer.safetensors")
        small = [path for path in export.rglob("*") if path.is_file() and path != large]
        tar("worldmodel_rest.tar", [(path, f"worldmodel/{path.relative_to(export)}") for path in small])
    runs = [
        (out / kind / name, f"{kind}/{name}")
        for kind in ("vae", "worldmodel")
        for name in ("metrics.jsonl", "config.yaml", "provenance.json", "heldout.json")
    ]
    tar("runs.tar", [*runs, (out / "plan.json", "plan.json"), (out / "preview.json", "preview.json")])
    for video in sorted(out.glob("preview_*.mp4")):
        shutil.copyfile(video, target / video.name)


def say(what: str, begun: float, **values: object) -> None:
    print(f"[{time.perf_counter() - begun:7.1f} s] {what} {values or ''}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
