"""A sample's forward and backward pass in one process and shared by several (`run.sequence`), on a CPU: milliseconds, and what each process holds.

    python benchmarks/sequence_split.py --processes 1,2 --json split.json
    python benchmarks/sequence_split.py --tiny

A Wan transformer with drawn weights, one thread a process, gloo. Memory is the most that a process held in the pass beyond what it held before (weights
and gradients, which every process has whole). `difference`: of the gradients, averaged over processes, from those of one process, relative. On GPUs
`benchmarks/paper_scaling.py --gpus 2 --more run.sequence=2` times whole updates.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
from physisforcing.worldmodel.backbones.sequence import SequenceSplit
from physisforcing.worldmodel.backbones.wan_paper import WanBackbone

WAN: dict[str, Any] = {
    "num_attention_heads": 8, "attention_head_dim": 64, "num_layers": 6, "ffn_dim": 2048, "in_channels": 48, "out_channels": 48,
    "text_dim": 64, "freq_dim": 256,
}  # fmt: skip
#: Latents [C,F,h,w]; tokens are of 1x2x2: 2100 of 7 frames.
LATENTS, TINY = (48, 7, 30, 40), (48, 2, 4, 8)


def held_gib(field: str) -> float:
    """Of this process: ``VmRSS`` now, ``VmHWM`` the most since ``forget``."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**20


def forget() -> None:
    """Give back what is free, and let ``VmHWM`` begin anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def one(place: int, count: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=place, world_size=count)
    torch.manual_seed(0)
    model = WanTransformer3DModel(**WAN | ({"num_layers": 2} if options.tiny else {}))
    backbone = WanBackbone(model, tap=1, stride=(4, 16, 16))
    if count > 1:
        backbone.share_samples(SequenceSplit(group=dist.group.WORLD, place=place, count=count))
    x = torch.randn(1, *(TINY if options.tiny else LATENTS))
    text, wanted = torch.randn(1, 16, WAN["text_dim"]), torch.randn_like(x)
    shown = backbone.conditions(x[:, :, :1], text, x.shape[2])
    times, memory = [], 0.0
    for _ in range(1 + options.passes):
        model.zero_grad(set_to_none=False)
        forget()
        before = held_gib("VmRSS")
        dist.barrier()
        begun = time.perf_counter()
        found, _ = backbone(x, torch.tensor([0.7]), text, shown)
        (found - wanted).square().mean().backward()
        dist.barrier()
        times.append(1e3 * (time.perf_counter() - begun))
        memory = held_gib("VmHWM") - before  # gradients are there from the second pass on
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    dist.all_reduce(gradients)
    save_file({"gradients": gradients / count}, f"{folder}/{place}.safetensors")
    Path(f"{folder}/{place}.json").write_text(json.dumps({"times": times[1:], "memory": memory}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    lines, alone, provenance = [], None, machine_provenance()
    for count in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            # copies of this process, which import nothing again; each computes in one thread
            mp.start_processes(one, (count, options, folder), nprocs=count, start_method="fork")  # type: ignore[no-untyped-call]
            made = [json.loads(Path(f"{folder}/{place}.json").read_text()) for place in range(count)]
            gradients = load_file(f"{folder}/0.safetensors")["gradients"]
        value, memory = statistics.median(made[0]["times"]), max(some["memory"] for some in made)
        about: dict[str, Any] = {"memory_gib": round(memory, 3), "threads": 1}
        if alone is not None:
            gap = (gradients - alone["gradients"]).norm() / alone["gradients"].norm()
            about |= {"ratio": round(value / alone["value"], 4), "memory_ratio": round(memory / alone["memory"], 4)}
            about |= {"difference": float(f"{float(gap):.3g}")}
        if count == 1:
            alone = made[0] | {"value": value, "gradients": gradients}
        lines.append(
            measurement(
                f"training/sequence/cpu/{count}_processes_ms", round(value, 1), unit="ms", low=round(min(made[0]["times"]), 1),
                high=round(max(made[0]["times"]), 1), n=options.passes, seeds="0", against=about,
                command=placeless("python benchmarks/sequence_split.py " + shlex.join(sys.argv[1:])), provenance=provenance,
            )
        )  # fmt: skip
        print(f"{count} processes: {value:.0f} ms {about}", flush=True)
        if options.json:
            write_measurements(options.json, lines)


if __name__ == "__main__":
    main()
