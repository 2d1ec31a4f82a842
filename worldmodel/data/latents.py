"""``physis data latents``: a latent store for the large backbones, made once of datasets or filtered clips."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.errors import UserError
from physisforcing.core.shards import parse_shard

from ..teachers.selection import TeachersConfig
from .latent_settings import WindowSettings

if TYPE_CHECKING:
    import torch

    from .buckets import Bucket
    from .latent_plan import Job, Plan
    from .latent_shards import LatentWindow, StoreInfo
    from .target_shards import TargetRecipe

USAGE = """usage: physis data latents data=[FOLDER,...] model=PIPELINE out=STORE [field=value ...]

Encodes windows of demonstrations or clips with a pipeline's autoencoder and text encoder, and makes their physics targets: what the
training of a large backbone reads (model=PIPELINE data.latents=[STORE]). What is there already is kept, so the same command continues.

examples:
  physis data latents data=[runs/bell] model=wan22-5b out=runs/latents
  physis data latents data=[runs/clips] model=wan22-5b out=runs/latents fps=16 teacher=permissive buckets=[81x480x640,49x480x640]
  physis data latents data=[runs/robot] model=wan22-5b out=runs/latents camera=front stride=2 teacher=permissive device=cuda

fields:
  data            datasets of any known layout, and folders that physis data prepare ... to=clips made
  model, out      a pipeline folder in diffusers format; the store, to which more data may be added later
  buckets         FRAMESxROWSxCOLUMNS of pixels; a video goes into the longest that it fills, of these into that of its shape
  stride=1        recorded frames from one to the next; start_stride: from one window to the next (0: one behind the other)
  limit           at most so many windows of an episode
  fps=16          of clips; datasets have their own (fps of the dataset over stride), and all data of a store must agree
  camera          its name, where a dataset has several and none is called head
  canvas          several cameras as one picture: robotwin (384x320), libero (224x448); no simulator's truth (docs/policy.md)
  past_end=false  also windows that reach past the end of an episode, where the last picture repeats: what policies are trained on
  success_only    leave out episodes that are marked as failures (true)
  targets=true    physics targets by teacher= (as in physis data targets); false: for flow matching alone
  grid_rows, grid_columns=25    points that are followed from each window's first frame
  device=auto, dtype=bf16       where the encoders work, and the precision of what is kept; the autoencoder works in fp32
  shard=0/1       this machine's part of the episodes, where several machines share the store"""


@dataclass(slots=True, kw_only=True)
class LatentsCommand(WindowSettings):
    """Settings of ``physis data latents`` (see ``USAGE``)."""

    data: list[str]
    model: str
    out: str
    targets: bool = True
    device: str = "auto"
    workers: int = 2
    shard: str = "0/1"
    text_cache: str | None = None
    teacher: TeachersConfig = field(default_factory=TeachersConfig)

    def check(self) -> None:
        """``UserError`` for what can be in no store."""
        self.check_windows()
        if not self.data:
            raise UserError("data", got="nothing", wanted="datasets or folders of clips", fix="data=[FOLDER]")


def make_latents(command: LatentsCommand, *, progress: bool = False) -> dict[str, Any]:
    """Make what is missing of a store; returns the summary (``_summary``).

    ``UserError`` and ``DatasetError`` for what cannot end well, before any work: a store of another model, data of another rate, buckets
    that do not fit the model or its teachers, truth that is not there.
    """
    from tqdm import tqdm

    from .latent_maker import DTYPES, LatentMaker
    from .latent_plan import make_plan
    from .latent_shards import write_shard
    from .latent_sources import SizedEpisodes
    from .latent_targets import bucket_recipes, make_targets, teachers_of

    command.check()
    device = _pick_device(command.device)
    cache = Path(command.text_cache) if command.text_cache else None
    maker = LatentMaker(Path(command.model), device=device, dtype=DTYPES[command.dtype], text_cache=cache)
    out, part = Path(command.out), parse_shard(command.shard)
    plan = make_plan(command, command.data, maker, out)
    cached = out / "targets"
    recipes = bucket_recipes(command, command.teacher, maker, plan.jobs, cached) if command.targets else {}
    info = maker.info(plan.fps, teachers_of(recipes), command.canvas)
    _check_store(out, info)
    mine = [job for place, job in enumerate(plan.jobs) if place % part[1] == part[0]]
    computed = 0
    for job in tqdm(mine, desc="latents", disable=not progress):
        path = out / job.shard
        if not path.is_file():
            sized = SizedEpisodes(job.source, job.bucket.size, job.camera)
            write_shard(path, maker.make(sized, job.index, job.bucket, job.starts, command.stride, plan.fps))
            computed += len(job.starts)
        _keep_actions(out, job)
    seconds = {what: round(value / max(computed, 1), 4) for what, value in maker.seconds.items()}
    if recipes:
        options = {"device": str(device), "workers": command.workers, "progress": progress}
        targeted, spent = make_targets(mine, recipes, command.teacher, cached, **options)  # type: ignore[arg-type]
        seconds["targets"] = round(spent / targeted, 4) if targeted else 0.0
    windows = _list(out, info, plan.jobs, recipes)
    return _summary(out, plan, windows, bool(recipes)) | {"computed": computed, "seconds_a_window": seconds}


def _pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where torch finds one. ``UserError`` for a device that is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # torch's own, for a wrong word and for a GPU that it was not built for
        raise UserError("device", got=name, wanted="a device that torch sees", fix="device=cpu") from error


def _check_store(out: Path, info: StoreInfo) -> None:
    from .latent_shards import STORE_NAME, check_same, read_store

    if (out / STORE_NAME).is_file():
        check_same({out: read_store(out)[0], Path("this command"): info})


def _list(
    out: Path, info: StoreInfo, jobs: Sequence[Job], recipes: Mapping[Bucket, TargetRecipe]
) -> list[LatentWindow]:
    """Write the store's lists, of what is there; windows of earlier commands stay. Returns those of ``jobs``."""
    from .latent_shards import STORE_NAME, read_store, write_store

    listed: list[LatentWindow] | None = None
    # what another machine finished and listed while this one looked must not be lost with its list
    while (found := _windows(out, info, jobs, recipes)) != listed:
        known = read_store(out)[1] if (out / STORE_NAME).is_file() else []
        new = {window.identity for window in found}
        write_store(out, info, [window for window in known if window.identity not in new] + found)
        listed = found
    return found


def _windows(
    out: Path, info: StoreInfo, jobs: Sequence[Job], recipes: Mapping[Bucket, TargetRecipe]
) -> list[LatentWindow]:
    """The windows of ``jobs`` whose latents are there."""
    from .latent_actions import actions_path
    from .latent_plan import job_windows
    from .latent_targets import targets_of

    found: list[LatentWindow] = []
    for job in jobs:
        if not (out / job.shard).is_file():
            continue
        recipe, targets = recipes.get(job.bucket), ""
        if recipe is not None and (path := targets_of(job, recipe, out / "targets")).is_file():
            targets = path.relative_to(out).as_posix()
        actions = actions_path(job.content)
        found += job_windows(job, info, targets, actions if (out / actions).is_file() else "")
    return found


def _keep_actions(out: Path, job: Job) -> None:
    """The states and actions of an episode that has them, unless they are there."""
    from .latent_actions import actions_path, recorded_actions, write_actions

    path = out / actions_path(job.content)
    if not path.is_file() and (found := recorded_actions(job.source, job.index)) is not None:
        write_actions(path, found)


def _summary(out: Path, plan: Plan, windows: Sequence[LatentWindow], targets: bool) -> dict[str, Any]:
    """``windows`` of this command's data in all and by bucket; ``missing``: not there yet, of them; ``without_targets``: there without the
    targets that they are to have; ``without_actions``: there, of which no policy learns; ``left_out``: reason -> episodes; ``repeating``: clips slower than the store; bytes of the windows;
    ``unlisted``: shards in the store that no window names, such as those of another ``limit``."""
    from .latent_shards import read_store

    counts: dict[str, int] = {}
    for window in windows:
        name = window.shard.split("/")[0]
        counts[name] = counts.get(name, 0) + 1
    shards = {window.shard for window in windows}
    listed = {window.shard for window in read_store(out)[1]} | {job.shard for job in plan.jobs}
    there = {path.relative_to(out).as_posix() for path in out.glob("*x*x*/*.safetensors")}
    return {
        "out": str(out),
        "windows": len(windows),
        "missing": sum(len(job.starts) for job in plan.jobs) - len(windows),
        "without_targets": sum(not window.targets for window in windows) if targets else 0,
        "without_actions": sum(not window.actions for window in windows),
        "buckets": counts,
        "left_out": {why: names for why, names in plan.left_out.items() if names},
        "repeating": plan.repeating,
        "latent_bytes": sum((out / shard).stat().st_size for shard in shards),
        "target_bytes": sum((out / name).stat().st_size for name in {w.targets for w in windows if w.targets}),
        "unlisted": sorted(there - listed),
    }


def main(argv: Sequence[str]) -> int:
    """``physis data latents``; returns the exit code."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return 0
    from physisforcing.core.config import compose

    as_json = "--json" in argv
    command = compose("data_latents", [word for word in argv if word != "--json"], LatentsCommand)
    summary = make_latents(command, progress=True)
    if as_json:
        print(json.dumps(summary, indent=2))
        return 0
    _print(summary)
    return 0


def _print(summary: dict[str, Any]) -> None:
    from .latent_plan import told

    print(f"{summary['out']}: {summary['windows']} windows ({summary['computed']} computed now)")
    for name, count in summary["buckets"].items():
        print(f"  {name:<16}{count:>7}")
    for line in told(summary["left_out"], summary["repeating"]):
        print(f"  {line}")
    if summary["missing"]:
        print(f"  {summary['missing']} windows are made by other shards, or not yet", file=sys.stderr)
    if summary["without_targets"]:
        print(
            f"  targets of {summary['without_targets']} windows are made by other shards, or not yet", file=sys.stderr
        )
    if summary["without_actions"]:
        print(f"  {summary['without_actions']} windows have no states and actions, which a policy would need")
    print(f"  {summary['latent_bytes'] / 1e6:.1f} MB latents, {summary['target_bytes'] / 1e6:.1f} MB targets")
    if summary["unlisted"]:
        print(f"  {len(summary['unlisted'])} shards belong to no window any more (--json names them)")
    spent = [f"{what} {value:g}" for what, value in summary["seconds_a_window"].items() if value]
    if spent:
        print(f"  seconds a window: {', '.join(spent)}")
