"""What an update on several GPUs spends on computing, and on the exchange between them that no computing covers.

    torchrun --nproc_per_node=2 benchmarks/paper_exchange.py --model runs/5b/model --latents runs/5b/one --micro 4 --json exchange.json
    torchrun --nproc_per_node=2 benchmarks/paper_exchange.py ... --more run.gather=update

Updates of `physis train worldmodel experiment=pf_wan_5b` with all weights, by its own trainer. ``step_ms``: by the clock, without the profiler. Beside it, from
the profiler's timeline of the first process: ``exchange`` is the time in which NCCL's kernels run, waiting for another process included, ``compute`` that in which
other kernels and copies do, ``exposed`` the part of the exchange in which these do not, ``between`` the time in which nothing runs.
``kinds_ms``: the other kernels by what they do. Started without torchrun it profiles one GPU alone.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from kernel_times import KINDS, kind_of
from paper_scaling import overrides, part_of_claim

from physisforcing.core.config import compose
from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
from physisforcing.worldmodel.training.banks import prepare_banks
from physisforcing.worldmodel.training.config import TrainWorldModelConfig
from physisforcing.worldmodel.training.initial import adopt_model
from physisforcing.worldmodel.training.modules import check_run
from physisforcing.worldmodel.training.processes import Processes
from physisforcing.worldmodel.training.runtime import begin_run
from physisforcing.worldmodel.training.worldmodel import Trainer

Interval = tuple[float, float]


def joined(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time in intervals that do not touch, in order."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in joined(intervals))


def spent(kernels: Iterable[tuple[str, Interval]], whole_ms: float, steps: int) -> dict[str, float]:
    """Milliseconds of an update, of kernels by name with their microseconds on the device's clock in ``steps`` updates of ``whole_ms``."""
    kernels = list(kernels)
    exchange = [when for name, when in kernels if "nccl" in name.lower()]
    compute = [when for name, when in kernels if "nccl" not in name.lower()]
    busy = length([*exchange, *compute])
    parts = {"compute": length(compute), "exchange": length(exchange), "exposed": busy - length(compute)}
    made = {name: value / 1e3 / steps for name, value in parts.items()}
    return {name: round(value, 2) for name, value in (made | {"between": whole_ms - busy / 1e3 / steps}).items()}


def kinds(kernels: Iterable[tuple[str, Interval]], steps: int) -> dict[str, float]:
    """Milliseconds of an update in each kind of kernel, one added to the other, NCCL's left out."""
    found = dict.fromkeys(KINDS, 0.0)
    for name, (begin, end) in kernels:
        if "nccl" not in name.lower():
            found[kind_of(name)] += (end - begin) / 1e3 / steps
    return {kind: round(value, 2) for kind, value in found.items()}


def profiled(trainer: Trainer, first: int, steps: int) -> list[tuple[str, Interval]]:
    """Kernels of updates from ``first`` on, with when they ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for step in range(first, first + steps):
            trainer.step(step)
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [(one.name, (one.time_range.start, one.time_range.end)) for one in events if not one.is_user_annotation]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--latents", required=True)
    parser.add_argument("--work", default="runs", help="a folder for the run's settings; nothing else is saved")
    parser.add_argument("--experiment", default="pf_wan_5b")
    parser.add_argument("--micro", type=int, default=4, help="samples of a GPU in an update")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--more", nargs="*", default=[], help="further overrides")
    parser.add_argument("--json")
    options = parser.parse_args(words)
    chosen = overrides(options, Path(options.work) / "exchange", int(os.environ.get("WORLD_SIZE", "1")), lora=False)
    config = compose("train_worldmodel", chosen, TrainWorldModelConfig)
    processes = Processes.start(options.device, config.run.sequence)
    adopt_model(config)
    check_run(config, processes)
    _, device, _ = begin_run(config, processes)
    bank = processes.one_after_the_other(lambda: prepare_banks(config, device, quiet=not processes.first))[0]
    trainer, times = Trainer(config, bank, device, processes), []
    for step in range(options.warmup + options.updates):
        begun = time.perf_counter()
        trainer.step(step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    times, about = (
        times[options.warmup :],
        dict[str, Any](gpus=processes.world, samples=processes.world * options.micro),
    )
    value = statistics.median(times)
    if device.type == "cuda":
        about["memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        kernels = profiled(trainer, options.warmup + options.updates, 2)
        about |= {"kernels_ms": spent(kernels, value, 2), "kinds_ms": kinds(kernels, 2)}
    trainer.guard.check()
    if processes.first:
        claim = f"training/{options.experiment}/exchange{''.join(map(part_of_claim, options.more))}_{processes.world}_gpus_step_ms"
        asked = shlex.join(sys.argv[1:] if words is None else words)
        started = f"torchrun --nproc_per_node={processes.world}" if "WORLD_SIZE" in os.environ else "python"
        command = placeless(f"{started} benchmarks/paper_exchange.py {asked}")
        line = measurement(
            claim, round(value, 2), unit="ms", low=min(times), high=max(times), n=len(times), seeds="0", against=about,
            command=command, provenance=machine_provenance(),
        )  # fmt: skip
        print(f"{claim}: {value:.1f} ms {about}", flush=True)
        if options.json:
            write_measurements(Path(options.json), [line])
    processes.close()


if __name__ == "__main__":
    main()
