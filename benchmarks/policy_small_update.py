"""Where an update of a small policy spends its time on a GPU: milliseconds, time on its batch, and kernels by kind.

    python benchmarks/policy_small_update.py --json small_update.json
    python benchmarks/policy_small_update.py --tiny                      # rehearsed on a CPU

The packaged world model's size with the usual action expert, random windows on the device, a batch of 128 in bfloat16; rows are without and with
the video's loss, blocks compiled or not, and with gradients of attention in whatever layout they come (policy/mixture.py `attention` asks for one).
Each row has a process of its own (but with --tiny): that last one may read gradients at wrong places beside others. `batch` is what the host spends
until random numbers are drawn, `kernels` is of whole updates. A GPU that is waited for in `between` is kept from work by the host; one that is busy is not.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import shlex
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from cost_results import median_interval
from kernel_times import kernel_times

from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
from physisforcing.policy import mixture
from physisforcing.policy.training import PolicyTrainer
from physisforcing.policy.training_config import TrainPolicyConfig
from physisforcing.policy.windows import PolicyBank, episode_statistics
from physisforcing.worldmodel.training.runtime import choose_kernels

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
#: Row -> video_weight, run.compile.
ROWS = {
    "actions": (0.0, "none"), "actions_compiled": (0.0, "blocks"), "both_compiled": (1.0, "blocks"),
    "both_compiled_any_layout": (1.0, "blocks"),
}  # fmt: skip
#: (C, F, h, w) of a window.
LATENTS = (16, 5, 15, 20)


def trainer(row: str, options: argparse.Namespace, folder: Path, device: torch.device) -> PolicyTrainer:
    import tiny_policy_training
    import tiny_training

    config = TrainPolicyConfig(codec=str(tiny_training.codec_folder(folder)))
    config.video_weight, config.run.compile = ROWS[row]
    config.run.out, config.run.steps, config.run.batch = str(folder / row), 10**6, options.batch
    config.policy.chunk = 2 * tiny_policy_training.CHUNK
    if options.tiny:
        config.run.compile, config.backbone.num_layers, config.backbone.tap = "none", 1, 1
    bank = tiny_training.bank(0)
    latents = torch.randn(len(bank), *LATENTS, generator=torch.Generator().manual_seed(0))
    moved = {
        item.name: value.to(device)
        for item in dataclasses.fields(bank)
        if isinstance(value := getattr(bank, item.name), torch.Tensor)
    }
    bank = dataclasses.replace(bank, **(moved | {"latents_WCFhw": latents.to(device), "targets": None}))
    episodes = tiny_policy_training.episodes(0)
    windows = PolicyBank.of(bank, episodes, episode_statistics(episodes, "zscore"), config.policy.chunk)
    return PolicyTrainer(config, windows, device)  # type: ignore[arg-type]


def measure(made: PolicyTrainer, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """-> milliseconds of updates, of which of their batches."""
    times, waits = [], []
    for step in range(options.warm + options.updates):
        begun = time.perf_counter()
        made.step(step)
        if made.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
        waits.append(1e3 * made.wait_s)
    made.guard.check()
    return times[options.warm :], waits[options.warm :]


def lines(row: str, made: PolicyTrainer, options: argparse.Namespace) -> list[dict[str, Any]]:
    times, waits = measure(made, options)
    about: dict[str, Any] = {
        "batch": options.batch, "parameters": sum(p.numel() for p in made.policy.parameters()),
        "batch_ms": float(np.median(waits)), "gflop": made.operations / 1e9,
    }  # fmt: skip
    if made.device.type == "cuda":
        steps = iter(range(options.warm + options.updates, 10**6))
        kernels = kernel_times(lambda: made.step(next(steps)))
        about |= {"kernels_ms": kernels.ms | {"between": kernels.between_ms}, "kernels": kernels.counts}
        for name, ms, count in kernels.dearest:
            print(f"  {ms:8.2f} ms  {count:6.0f}  {name}", flush=True)
    low, high = median_interval(times)
    size = "tiny" if options.tiny else "small"
    return [
        measurement(
            f"policy/training/{size}/{row}/step_ms", float(np.median(times)), unit="ms", low=low, high=high, n=len(times),
            against=about, command=placeless(shlex.join(["python", *sys.argv])), provenance=machine_provenance(),
        )
    ]  # fmt: skip


def run(row: str, options: argparse.Namespace, words: list[str]) -> list[dict[str, Any]]:
    """A row. ``words``: the command that asked for it."""
    sys.argv = words
    device = torch.device("cpu" if options.tiny else "cuda")
    choose_kernels(device, deterministic=False)
    attention = F.scaled_dot_product_attention if row.endswith("_any_layout") else mixture.attention
    with tempfile.TemporaryDirectory() as place, mock.patch.object(mixture, "attention", attention):
        return lines(row, trainer(row, options, Path(place), device), options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    made = list[dict[str, Any]]()
    for row in ROWS:
        if options.tiny:
            made += run(row, options, sys.argv)
        else:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                made += pool.submit(run, row, options, sys.argv).result()
        print(f"{made[-1]['claim']}: {made[-1]['value']:.2f} ms {made[-1]['against']}", flush=True)
    if options.json:
        write_measurements(options.json, made)


if __name__ == "__main__":
    main()
