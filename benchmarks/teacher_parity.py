"""Teachers in half precision against their float32 forms, on simulator clips: do the fast ones give the same targets?

    python benchmarks/teacher_parity.py --data DATASET --cotracker-source FOLDER --json parity.json
    python benchmarks/teacher_parity.py --clips clips.npy ... --cotracker-checkpoint scaled_offline.pth --vjepa2 FOLDER --depth FOLDER
    python benchmarks/teacher_parity.py --tiny --cotracker-source FOLDER       # every line of it on a CPU

Clips: an array uint8 [n,T,H,W,3] (``.npy``, or the first array of an ``.npz``), or windows of a dataset folder. A teacher whose
weights are not given has its real architecture with random weights; without CoTracker's source the tracker is left out. With random
weights CoTracker3 hardly moves its points: ``--amplify`` multiplies its last layers, so that rounding has something to act upon
(5 moves points by some ten pixels). Float32 is run without TF32.

Limits, which decide whether a fast form may be the default: tracks, in pixels of 240x320, median <= 0.25 and p95 <= 1; visibility
equal for >= 99 %; cosines of 512 tokens within 0.01; depth weights of eq. (2) within 1 % of their range. Values are over all clips;
low and high are the lowest and highest clip's. Claims: ``physics/parity/<weights>/<teacher>/<form>/<measure>``.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cost_networks import TINY, tiny_depth, tiny_encoder
from torch import Tensor, nn

from physisforcing.core.errors import UserError
from physisforcing.core.readers import open_dataset
from physisforcing.planner.measurements import machine_provenance, measurement, write_measurements
from physisforcing.worldmodel.physics.regions import foreground_weight
from physisforcing.worldmodel.physics.relation import even_order, gather_tokens, relation_matrix, select_tokens
from physisforcing.worldmodel.teachers.cotracker3 import PUBLISHED_SHA256, CoTracker3
from physisforcing.worldmodel.teachers.depth_anything import DepthAnything
from physisforcing.worldmodel.teachers.fast_cotracker import FastCoTracker3
from physisforcing.worldmodel.teachers.fast_vjepa2 import speed_up
from physisforcing.worldmodel.teachers.ground_truth import query_grid
from physisforcing.worldmodel.teachers.lookup import at_points
from physisforcing.worldmodel.teachers.vjepa2 import VJepa2

#: Pixels in which tracks are compared, (H, W).
SIZE = (240, 320)
TOKENS = 512
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
#: Measure -> (unit, limit, whether the value must be at least that).
LIMITS = {
    "track_median_px": ("px of 240x320", 0.25, False),
    "track_p95_px": ("px of 240x320", 1.0, False),
    "visibility_agreement": ("share", 0.99, True),
    "relation_max": ("cosine", 0.01, False),
    "relation_mean": ("cosine", 0.01, False),
    "depth_weight_p99": ("share of its range", 0.01, False),
    "depth_rank_correlation": ("Spearman", 0.999, True),
}
#: One clip's numbers, of which a measure is made: arrays are joined over the clips.
Found = dict[str, np.ndarray]


@contextmanager
def exact_matmuls() -> Iterator[None]:
    """Float32 in full: no TF32 in products and convolutions."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def read_clips(options: argparse.Namespace) -> list[Tensor]:
    """Clips uint8 [1,T,H,W,3] with T = 1 + 4 (F - 1)."""
    if options.clips:
        loaded = np.load(options.clips, allow_pickle=False)
        clips = list(loaded if isinstance(loaded, np.ndarray) else loaded[loaded.files[0]])[: options.count]
    elif options.data:
        clips = list(windows(options.data, options.count, options.frames, options.stride))
    elif options.tiny:
        clips = list(np.random.default_rng(0).integers(0, 256, (2, 5, 96, 128, 3), dtype=np.uint8))
    else:
        raise UserError("clips", got=None, wanted="--clips FILE or --data FOLDER", fix="collect a few episodes first")
    for clip in clips:
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3:
            got = f"{clip.dtype}{list(clip.shape)}"
            raise UserError("clips", got=got, wanted="uint8 [n,T,H,W,3]", fix="save RGB frames of 0 to 255")
    return [torch.from_numpy(np.ascontiguousarray(clip[: 1 + 4 * ((len(clip) - 1) // 4)]))[None] for clip in clips]


def windows(folder: str, count: int, frames: int, stride: int) -> Iterator[np.ndarray]:
    """The first window of ``count`` episodes spread over the dataset, shortened to the episode's length."""
    dataset = open_dataset(folder)
    for index in np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(int)):
        steps = np.arange(0, dataset.episode(int(index)).length, stride)[:frames]
        yield dataset.frames(int(index), steps.tolist())


def tracker_forms(options: argparse.Namespace, _clip: Tensor) -> tuple[Any, dict[str, Any]]:
    """-> the float32 form, and the fast ones by name."""
    place: dict[str, Any] = {"source": options.cotracker_source, "device": options.device}
    if options.cotracker_checkpoint:
        exact = CoTracker3(options.cotracker_checkpoint, options.cotracker_sha256, **place)
    else:
        exact = CoTracker3.with_random_weights(options.seed, **place)
        for head in (exact.network.updateformer.flow_head, exact.network.updateformer.vis_conf_head):
            head.weight.data *= options.amplify
    if options.tiny:
        exact.network.model_resolution = TINY.working
    fast = {f"fast_{dtype}": FastCoTracker3(exact, dtype=dtype) for dtype in DTYPES}
    return exact, fast


def encoder_forms(options: argparse.Namespace, _clip: Tensor) -> tuple[Any, dict[str, Any]]:
    def make(dtype: torch.dtype) -> VJepa2:
        if options.vjepa2:
            return VJepa2.from_folder(options.vjepa2, device=options.device, dtype=dtype)
        config = tiny_encoder() if options.tiny else None
        return VJepa2.from_config(config, seed=options.seed, device=options.device, dtype=dtype)

    forms: dict[str, Any] = {name: make(dtype) for name, dtype in DTYPES.items()}
    return make(torch.float32), forms | {f"fast_{name}": speed_up(make(dtype)) for name, dtype in DTYPES.items()}


def depth_forms(options: argparse.Namespace, clip: Tensor) -> tuple[Any, dict[str, Any]]:
    def make(dtype: torch.dtype) -> DepthAnything:
        if options.depth:
            return DepthAnything.from_folder(options.depth, device=options.device, dtype=dtype)
        config = tiny_depth() if options.tiny else None
        return DepthAnything.from_config(config, seed=options.seed, device=options.device, dtype=dtype)

    exact, fast = make(torch.float32), {name: make(dtype) for name, dtype in DTYPES.items()}
    if not options.depth:
        spread_out([exact, *fast.values()], clip)
    return exact, fast


def spread_out(forms: list[DepthAnything], clip: Tensor) -> None:
    """The random weights that transformers draws give an almost even map, in which there is nothing but rounding to compare: draw
    those of the decoder larger, and bring the map to mean 1 and deviation 0.2 in the last layer."""
    for form in forms:
        generator = torch.Generator().manual_seed(0)
        for module in (*form.model.neck.modules(), *form.model.head.modules()):
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                shape = module.weight.shape
                module.weight.copy_(torch.randn(shape, generator=generator) * (2 / math.prod(shape[1:])) ** 0.5)
    heads = [form.model.head.conv3 for form in forms]
    heads[0].bias.fill_(1e4)  # above the ReLU
    found = forms[0].depth(clip[:, 0]).double() - 1e4
    factor = 0.2 / max(float(found.std()), 1e-6)
    for head in heads:
        head.weight.mul_(factor)
        head.bias.fill_(1 - factor * float(found.mean()))


class Comparison:
    """What each teacher says of a clip, and how far two answers lie apart."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.queries, self.grid = ((3, 4), TINY.grid[1:]) if options.tiny else ((25, 25), (15, 20))
        self.device = options.device

    def points(self, clip: Tensor) -> Tensor:
        return torch.from_numpy(query_grid(self.queries, tuple(clip.shape[2:4]))).float()[None].to(clip.device)

    def tracker(self, teacher: Any, clip: Tensor) -> Any:
        return teacher.track(clip, self.points(clip))

    def encoder(self, teacher: Any, clip: Tensor) -> Tensor:
        """Cosines of evenly spread tokens, [K,K]."""
        features = teacher.encode(clip, (1 + clip.shape[1] // 4, *self.grid)).flatten(1, 3)
        everywhere = torch.ones(1, 1, features.shape[1], dtype=torch.bool, device=features.device)
        index, _ = select_tokens(everywhere, even_order(1, features.shape[1], device=features.device), TOKENS)
        return relation_matrix(gather_tokens(features, index))[0]

    def depth(self, teacher: Any, clip: Tensor) -> tuple[Tensor, Tensor]:
        """The map [H,W], and the weights of eq. (2) at the queries."""
        found = teacher.depth(clip[:, 0])
        at = at_points(found, self.points(clip).to(found.device), tuple(clip.shape[2:4]))
        return found[0], foreground_weight(at, kind=teacher.kind)[0]

    def compare_tracker(self, exact: Any, fast: Any, clip: Tensor) -> Found:
        scale = torch.tensor([SIZE[1] / clip.shape[3], SIZE[0] / clip.shape[2]], device=clip.device)
        apart = (exact.points_BTN2 - fast.points_BTN2)[:, 1:] * scale
        moved = (exact.points_BTN2 - exact.points_BTN2[:, :1])[:, 1:] * scale
        equal = (exact.visible_BTN == fast.visible_BTN)[:, 1:]
        return {
            "apart": _array(apart.norm(dim=-1)),
            "moved": _array(moved.norm(dim=-1)),
            "equal": _array(equal.float()),
        }

    def compare_encoder(self, exact: Tensor, fast: Tensor, _clip: Tensor) -> Found:
        return {"cosines": _array((exact - fast).abs()), "spread": _array(exact)}

    def compare_depth(self, exact: Any, fast: Any, _clip: Tensor) -> Found:
        weights = (exact[1] - fast[1]).abs() / (exact[1].max() - exact[1].min()).clamp(min=1e-6)
        return {"weights": _array(weights), "ranks": np.array([rank_correlation(exact[0], fast[0])])}


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, over at most 100,000 values spread over two maps."""
    step = max(1, one.numel() // 100_000)
    ranks = [part.flatten()[::step].double().argsort().argsort().double() for part in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy().ravel()


def measures(teacher: str, found: Found) -> dict[str, float]:
    if teacher == "tracker":
        median, p95 = np.quantile(found["apart"], [0.5, 0.95])
        names = ("track_median_px", "track_p95_px", "visibility_agreement")
        return dict(zip(names, (median, p95, found["equal"].mean())))
    if teacher == "encoder":
        return {"relation_max": found["cosines"].max(), "relation_mean": found["cosines"].mean()}
    return {"depth_weight_p99": np.quantile(found["weights"], 0.99), "depth_rank_correlation": found["ranks"].min()}


def notes(teacher: str, found: Found) -> dict[str, float]:
    """What says whether the comparison had anything to compare."""
    if teacher == "tracker":
        return {
            "moved_median_px": round(float(np.median(found["moved"])), 3),
            "apart_max_px": float(found["apart"].max()),
        }
    if teacher == "encoder":
        return {"cosine_std": round(float(found["spread"].std()), 4)}
    return {}


def run(
    teacher: str, forms: tuple[Any, dict[str, Any]], clips: list[Tensor], options: argparse.Namespace
) -> dict[str, list[Found]]:
    """Fast form -> one ``Found`` a clip."""
    exact, fast = forms
    comparison = Comparison(options)
    answer: Callable[..., Any] = getattr(comparison, teacher)
    compare: Callable[..., Found] = getattr(comparison, f"compare_{teacher}")
    found: dict[str, list[Found]] = {name: [] for name in fast}
    for number, clip in enumerate(clips):
        clip = clip.to(options.device)
        with exact_matmuls():
            truth = answer(exact, clip)
        for name, form in fast.items():
            found[name].append(compare(truth, answer(form, clip), clip))
        print(f"{teacher}: clip {number + 1} of {len(clips)}", flush=True)
    return found


def lines_of(
    teacher: str, found: dict[str, list[Found]], options: argparse.Namespace, shared: dict[str, Any]
) -> list[dict[str, Any]]:
    given = {"tracker": options.cotracker_checkpoint, "encoder": options.vjepa2, "depth": options.depth}[teacher]
    weights = "given" if given else "random"
    if teacher == "tracker" and not given and options.amplify != 1:
        weights = "random_amplified"
    lines = []
    for form, parts in found.items():
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        each = [measures(teacher, part) for part in parts]
        for name, value in measures(teacher, joined).items():
            unit, limit, least = LIMITS[name]
            kept = value >= limit if least else value <= limit
            print(
                f"{teacher:8} {form:10} {name:24} {value:.6f} limit {limit}: {'kept' if kept else 'MISSED'}", flush=True
            )
            span = sorted(one[name] for one in each)
            against = {"limit": limit, "kept": bool(kept)} | notes(teacher, joined)
            lines.append(
                measurement(
                    f"physics/parity/{weights}/{teacher}/{form}/{name}",
                    float(f"{value:.4g}"),
                    unit=unit,
                    n=len(parts),
                    low=float(f"{span[0]:.4g}"),
                    high=float(f"{span[-1]:.4g}"),
                    seeds=str(options.seed),
                    against=against,
                    **shared,
                )
            )
    return lines


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, help=".npy or .npz of uint8 [n,T,H,W,3]")
    parser.add_argument("--data", help="folder of a dataset")
    parser.add_argument("--count", type=int, default=4, help="clips")
    parser.add_argument("--frames", type=int, default=81, help="of a window of the dataset")
    parser.add_argument("--stride", type=int, default=2, help="between frames of a window")
    parser.add_argument("--teachers", nargs="+", choices=("tracker", "encoder", "depth"))
    parser.add_argument("--cotracker-source", help="folder with the package cotracker")
    parser.add_argument("--cotracker-checkpoint", type=Path)
    parser.add_argument("--cotracker-sha256", default=PUBLISHED_SHA256)
    parser.add_argument("--vjepa2", type=Path, help="folder of V-JEPA 2")
    parser.add_argument("--depth", type=Path, help="folder of Depth-Anything-V2")
    parser.add_argument("--amplify", type=float, default=1.0, help="factor of CoTracker3's random last layers")
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write measurements here")
    parser.add_argument("--tiny", action="store_true", help="small networks and random clips: a rehearsal")
    options = parser.parse_args(arguments)
    if options.teachers is None:
        tracks = options.cotracker_source or options.cotracker_checkpoint
        if not tracks:
            print("tracker: skipped, needs --cotracker-source", flush=True)
        options.teachers = ["tracker", "encoder", "depth"] if tracks else ["encoder", "depth"]
    return options


def command(arguments: list[str]) -> str:
    """The command without folders of one machine."""
    kept, hide = [], False
    for argument in arguments:
        kept.append(Path(argument).name if hide else argument)
        hide = argument in (
            "--clips",
            "--data",
            "--cotracker-source",
            "--cotracker-checkpoint",
            "--vjepa2",
            "--depth",
            "--json",
        )
    return shlex.join(["python", "benchmarks/teacher_parity.py", *kept])


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    clips = read_clips(options)
    print(f"{len(clips)} clips, {', '.join(str(list(clip.shape[1:4])) for clip in clips)}", flush=True)
    shared = {"command": command(arguments), "provenance": machine_provenance()}
    forms = {"tracker": tracker_forms, "encoder": encoder_forms, "depth": depth_forms}
    for teacher in options.teachers:
        lines = lines_of(teacher, run(teacher, forms[teacher](options, clips[0]), clips, options), options, shared)
        if options.json:
            write_measurements(options.json, lines)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        raise SystemExit(str(error)) from None
