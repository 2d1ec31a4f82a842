"""Seconds of a whole clip of a large model's pipeline folder, as `physis generate` makes it, from the first picture to frames.

    python benchmarks/paper_whole_clip.py --model runs/a14b/model --name a14b_two --offload block --json clip.json
    python benchmarks/paper_whole_clip.py --model runs/tiny/model --name tiny --device cpu --frames 9 --size 96x128 --steps 2

``--offload``: where the model's parts are (docs/paper_scale.md): all along on the GPU, one at a time there, or block by block. A clip of two steps
comes first, which compiles, reads the weights for the first time and embeds the sentence; then the one that is timed: with the steps and the
guidance of the model's authors where none are said, and a drawn picture. ``host_gib``: of the process at most, files that it maps included.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
from physisforcing.worldmodel.paper_generate import PaperConfig, PaperGenerator
from physisforcing.worldmodel.placement import OFFLOAD

PROMPT = "stack the blocks"


def timed_clip(maker: PaperGenerator, picture_HWC: NDArray[np.uint8], seed: int) -> tuple[float, dict[str, Any]]:
    """-> (seconds of the clip; its steps, its parts and, on a GPU, the memory in tensors at most)."""
    device = maker.placement.device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    marks = [time.perf_counter()]

    def advance() -> None:
        if cuda:
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())

    with torch.no_grad():
        _, film = next(maker.generate(picture_HWC, PROMPT, [seed], advance=advance))
    marks.append(time.perf_counter())
    step = float(np.median(np.diff(marks[1:-1]))) if len(marks) > 3 else marks[1] - marks[0]
    seconds, decoding = marks[-1] - marks[0], marks[-1] - marks[-2]
    more = {
        "steps": len(marks) - 2, "step_ms": round(1e3 * step, 1), "decode_s": round(decoding, 2),
        "other_s": round(seconds - decoding - step * (len(marks) - 2), 2), "frames": len(film), "guidance": maker.sampler.guidance,
    }  # fmt: skip
    if cuda:
        more["peak_memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return seconds, more


def compiling_clip(maker: PaperGenerator, picture_HWC: NDArray[np.uint8]) -> float:
    """Seconds of a clip of two steps, one of each expert where there are two; the maker has its own settings again afterwards."""
    usual = maker.sampler
    maker.sampler = dataclasses.replace(usual, steps=2)
    try:
        return timed_clip(maker, picture_HWC, 0)[0]
    finally:
        maker.sampler = usual


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="a pipeline folder")
    parser.add_argument("--name", required=True, help="part of the rows' names")
    parser.add_argument("--offload", default="none", choices=OFFLOAD)
    parser.add_argument("--transformer", default="", help="other weights, such as an export")
    parser.add_argument("--experts", help="both or high")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--size", default=(480, 640), type=lambda text: tuple(map(int, text.split("x"))))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--compile", default="", help="blocks, or none; left out: blocks on a GPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json")
    options = parser.parse_args(words)
    cuda, (high, wide) = options.device.startswith("cuda"), options.size
    command = placeless("python benchmarks/paper_whole_clip.py " + shlex.join(sys.argv[1:] if words is None else words))
    picture = np.random.default_rng(0).integers(0, 256, (high, wide, 3), dtype=np.uint8)
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as texts:
        config = PaperConfig(
            transformer=options.transformer, experts=options.experts, device=options.device, dtype="bf16" if cuda else "fp32",
            offload=options.offload, frames=options.frames, height=high, width=wide, steps=options.steps,
            compile=options.compile or ("blocks" if cuda else "none"), text_cache=Path(texts),
        )  # fmt: skip
        begun = time.perf_counter()
        maker = PaperGenerator(options.model, config)
        loading = time.perf_counter() - begun
        first = compiling_clip(maker, picture)
        seconds, more = timed_clip(maker, picture, 1)
    more |= {
        "offload": options.offload, "load_s": round(loading, 1), "first_clip_of_two_steps_s": round(first, 1),
        "host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1), "threads": torch.get_num_threads(),
    }  # fmt: skip
    line = measurement(
        f"training/generate_{options.name}_offload_{options.offload}/clip_seconds", round(seconds, 3),
        unit="s a clip", n=1, seeds="1", against=more, command=command, provenance=machine_provenance(),
    )  # fmt: skip
    print(f"{options.name} offload={options.offload}: {seconds:.2f} s  {more}", flush=True)
    if options.json:
        write_measurements(options.json, [line])


if __name__ == "__main__":
    main()
