"""What an update waits for windows of a latent store, at full size, read from a disk whose cache is empty.

    python benchmarks/latent_loading.py [--windows 160] [--seconds 60] [--json loading.json]

A store of distinct windows is written as `physis data latents` writes them for 81 frames of 480x640: latents and sentence in bfloat16, tracks
of 300 points, an encoder's features of every token (random numbers, which no disk or checksum tells from others). Then updates are
played: the bank of the trainer gives a batch of one window, is told the next one, and the update's time passes asleep, that which was
measured on a GPU (docs/results/training.md). Before each half the kernel forgets the store's files, and no window is asked for twice. Beside it
the same without reading ahead. A machine with eight GPUs and one disk asks for eight times as much: `megabytes` are those of a window.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
from physisforcing.worldmodel.data.latent_bank import LatentBank
from physisforcing.worldmodel.data.latent_shards import LatentWindow, StoreInfo, write_shard, write_store
from physisforcing.worldmodel.data.target_shards import EpisodeTargets, TargetRecipe
from physisforcing.worldmodel.data.target_shards import write_shard as write_targets
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.training.banks import open_stores

FRAMES, POINTS, WORDS, TEXT_WIDTH, TEACHER_WIDTH = 81, (15, 20), 40, 4096, 112
HEIGHT, WIDTH = 480, 640


@dataclass(frozen=True, kw_only=True)
class Kind:
    """``channels``, ``stride``: of the latents. ``update_s``: the adapters' update of one sample on an H200."""

    channels: int
    stride: tuple[int, int, int]
    conditioned: bool
    update_s: float


KINDS = {
    "pf_wan_5b": Kind(channels=48, stride=(4, 16, 16), conditioned=False, update_s=0.364),
    "pf_wan_a14b": Kind(channels=16, stride=(4, 8, 8), conditioned=True, update_s=7.57),
}


def write(folder: Path, kind: Kind, count: int) -> None:
    """A store of ``count`` windows, each of an episode of its own."""
    draw, text = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    shape = kind.channels, (FRAMES - 1) // 4 + 1, HEIGHT // kind.stride[1], WIDTH // kind.stride[2]
    info = StoreInfo(
        kind="wan", latents="drawn", text="drawn", channels=kind.channels, stride=kind.stride, conditioned=kind.conditioned,
        fps=16.0, teachers={"tracker": "drawn"},
    )  # fmt: skip
    windows = []
    for episode in range(count):
        tensors = {"latents_WCFhw": torch.randn(1, *shape, generator=draw).bfloat16()}
        tensors["text_LD"] = torch.randn(WORDS, TEXT_WIDTH, generator=text).bfloat16()
        if kind.conditioned:
            tensors["condition_WCFhw"] = torch.randn(1, *shape, generator=draw).bfloat16()
        name = f"{FRAMES}x{HEIGHT}x{WIDTH}/{episode:05d}.safetensors"
        write_shard(folder / name, tensors)
        windows.append(
            LatentWindow(
                shard=name, row=0, shape=shape, caption=f"task {episode}", source="drawn", episode=episode, start=0,
                targets=_targets(folder, shape, episode), target_row=0,
            )
        )  # fmt: skip
    write_store(folder, info, windows)


def _targets(folder: Path, shape: tuple[int, ...], episode: int) -> str:
    draw, points = np.random.default_rng(episode), POINTS[0] * POINTS[1]
    frames, high, wide = shape[1], shape[2] // 2, shape[3] // 2
    recipe = TargetRecipe(
        frames=FRAMES, stride=1, start_stride=16, grid_rows=POINTS[0], grid_columns=POINTS[1], token_rows=high, token_columns=wide
    )  # fmt: skip
    track = draw.uniform(40, 400, (1, 1, points, 2)) + np.cumsum(draw.normal(0, 2, (1, FRAMES, points, 2)), axis=1)
    made = EpisodeTargets(
        starts_W=np.zeros(1, np.int32),
        points_WTN2=(32 * np.clip(track, 1, 478)).astype(np.int16),
        visible_WTN=draw.random((1, FRAMES, points)) > 0.1,
        depth_WN=draw.uniform(0.5, 1.5, (1, points)).astype(np.float32),
        body_WN=np.zeros((1, points), np.int32),
        rows_WF=np.arange(frames, dtype=np.int32)[None],
        features_EhwC=draw.normal(size=(frames, high, wide, TEACHER_WIDTH)).astype(np.float16),
        token_WK=np.zeros((1, 0), np.uint16),
        count_W=np.zeros(0, np.int32),
        relation_WR=np.zeros((1, 0), np.int8),
        size=(HEIGHT, WIDTH),
        subpixels=32,
        channels=TEACHER_WIDTH,
    )
    place = f"targets/{recipe.digest()}/{episode:05d}.safetensors"
    write_targets(folder / place, made, recipe, "drawn")
    return place


def forget(folder: Path) -> int:
    """Have the kernel forget what it keeps of the files in ``folder``; their bytes."""
    found = 0
    os.sync()  # what is not on the disk yet is not forgotten
    for path in folder.rglob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        try:
            found += os.fstat(handle).st_size
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    return found


def play(bank: LatentBank, rows: list[int], update_s: float, seconds: float, *, ahead: bool) -> list[float]:
    """Seconds that each update waited for its batch, the first left out, which nothing was read ahead of."""
    waited, begun = [], time.perf_counter()
    for place, row in enumerate(rows):
        if time.perf_counter() - begun > seconds and len(waited) > 4:
            break
        asked = time.perf_counter()
        bank.batch(torch.tensor([row]))
        waited.append(time.perf_counter() - asked)
        if ahead and place + 1 < len(rows):
            bank.expect(torch.tensor(rows[place + 1 : place + 2]))
        time.sleep(update_s)
    return waited[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=160)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each half")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument(
        "--work", help="where the stores are written for the time of the run: the disk that is measured"
    )
    parser.add_argument("--json")
    options = parser.parse_args()
    command = placeless("python benchmarks/latent_loading.py " + shlex.join(sys.argv[1:]))
    provenance, lines = machine_provenance(), []
    for name in options.kinds:
        kind = KINDS[name]
        with tempfile.TemporaryDirectory(dir=options.work) as made:
            folder = Path(made)
            write(folder, kind, options.windows)
            found: dict[str, float] = {}
            half = options.windows // 2
            parts = {"ahead": list(range(half)), "asked": list(range(half, options.windows))}
            for how, rows in parts.items():
                size = forget(folder)
                bank = open_stores([folder], 0, torch.device("cpu"), PhysicsConfig(), ahead=8)[0]
                waited = play(bank, rows, kind.update_s, options.seconds, ahead=how == "ahead")
                bank.close()
                shares = sorted(100 * one / (one + kind.update_s) for one in waited)
                found[how] = 100 * sum(waited) / (sum(waited) + kind.update_s * len(waited))
                more = {
                    "read_ahead": how == "ahead",
                    "update_ms": 1e3 * kind.update_s,
                    "megabytes": round(size / options.windows / 1e6, 2),
                    "smallest_pct": round(shares[0], 4),
                    "largest_pct": round(shares[-1], 4),
                }
                if how == "asked" and found["ahead"]:
                    more["ratio"] = round(found["asked"] / found["ahead"], 2)
                claim = (
                    f"training/{name}/loader_wait_pct" if how == "ahead" else f"training/{name}/loader_wait_unread_pct"
                )
                lines.append(
                    measurement(
                        claim, round(found[how], 4), unit="%", n=len(waited), seeds="0", against=more, command=command, provenance=provenance,
                    )
                )  # fmt: skip
                print(f"{name:<12} {how:<6} waits {found[how]:.3f} % of {len(waited)} updates  {more}", flush=True)
        if options.json:
            write_measurements(options.json, lines)


if __name__ == "__main__":
    main()
