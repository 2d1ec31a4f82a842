"""``physis data latents``: a latent store for the large backbones, made once of datasets or filtered clips."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.errors import UserError, check_at_least, unknown_name
from physisforcing.core.shards import parse_shard

from ..teachers.selection import TeachersConfig

if TYPE_CHECKING:
    from physisforcing.core.episodes import EpisodeSource

    from .buckets import Bucket
    from .latent_maker import LatentMaker
    from .latent_shards import LatentWindow, StoreInfo
    from .target_shards import TargetRecipe

USAGE = """usage: physis data latents data=[FOLDER,...] model=PIPELINE out=STORE [field=value ...]

Encodes windows of demonstrations or clips with a pipeline's autoencoder and text encoder, and makes their physics targets: what
physis train worldmodel model=PIPELINE data.latents=[STORE] reads. What is there already is kept, so the same command continues.

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
  success_only    leave out episodes that are marked as failures (true)
  targets=true    physics targets by teacher= (as in physis data targets); false: for flow matching alone
  grid_rows, grid_columns=25    points that are followed from each window's first frame
  device=auto, dtype=bf16       where and in which precision the encoders work (fp32 on a CPU); fp32 keeps latents exact
  shard=0/1       this machine's part of the episodes, where several machines share the store"""


@dataclass(slots=True, kw_only=True)
class LatentsCommand:
    """Settings of ``physis data latents`` (see ``USAGE``)."""

    data: list[str]
    model: str
    out: str
    buckets: list[str] = field(default_factory=lambda: ["81x480x640"])
    stride: int = 1
    start_stride: int = 0
    limit: int | None = None
    fps: float = 16.0
    camera: str | None = None
    success_only: bool = True
    targets: bool = True
    grid_rows: int = 25
    grid_columns: int = 25
    device: str = "auto"
    dtype: str = "bf16"
    workers: int = 2
    shard: str = "0/1"
    text_cache: str | None = None
    teacher: TeachersConfig = field(default_factory=TeachersConfig)

    def check(self) -> None:
        """``UserError`` for what can be in no store."""
        check_at_least(self, stride=1, start_stride=0, grid_rows=1, grid_columns=1)
        if not self.data:
            raise UserError("data", got="nothing", wanted="datasets or folders of clips", fix="data=[FOLDER]")
        if self.dtype not in ("bf16", "fp32"):
            raise unknown_name("dtype", self.dtype, ("bf16", "fp32"), see="physis data latents --help")
        if not self.fps > 0:
            raise UserError("fps", got=self.fps, wanted="frames a second", fix="fps=16")
        if self.limit is not None:
            check_at_least(self, limit=1)


@dataclass(slots=True, kw_only=True)
class Job:
    """The windows of one episode: cut out of ``source`` (recorded pictures) into ``shard``."""

    source: EpisodeSource
    index: int
    bucket: Bucket
    starts: list[int]
    camera: str
    content: str
    shard: str


def make_latents(command: LatentsCommand, *, progress: bool = False) -> dict[str, Any]:
    """Make what is missing of a store; returns the summary: windows by bucket, episodes left out and why, bytes, seconds a window.

    ``UserError`` for a store of another model, for data of another rate, and for buckets that do not fit the model or its teachers.
    """
    import torch
    from tqdm import tqdm

    from .latent_maker import DTYPES, LatentMaker
    from .latent_shards import write_shard
    from .latent_sources import SizedEpisodes

    command.check()
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if command.device == "auto" else command.device
    )
    cache = Path(command.text_cache) if command.text_cache else None
    maker = LatentMaker(Path(command.model), device=device, dtype=DTYPES[command.dtype], text_cache=cache)
    out, part = Path(command.out), parse_shard(command.shard)
    jobs, left_out, fps = _plan(command, maker)
    recipes = _recipes(command, maker, jobs)
    teachers = None
    if recipes:
        teachers = {kind: asdict(info) for kind, info in next(iter(recipes.values())).teachers.items()}
    info = maker.info(fps, teachers)
    _check_store(out, info)
    mine = [job for place, job in enumerate(jobs) if place % part[1] == part[0]]
    computed = 0
    for job in tqdm(mine, desc="latents", disable=not progress):
        path = out / job.shard
        if not path.is_file():
            sized = SizedEpisodes(job.source, job.bucket.size, job.camera)
            write_shard(path, maker.make(sized, job.index, job.bucket, job.starts, command.stride, fps))
            computed += len(job.starts)
    if recipes:
        _make_targets(command, out, mine, recipes, str(device), progress)
    windows = _write(out, info, jobs, recipes)
    return _summary(out, jobs, windows, left_out, computed, maker)


def _plan(command: LatentsCommand, maker: LatentMaker) -> tuple[list[Job], dict[str, list[str]], float]:
    """-> (jobs of all episodes, reason -> episodes that are left out, frames a second)."""
    from .buckets import Bucket, choose
    from .latent_sources import ClipEpisodes, camera_of, open_source

    stride = maker.described.stride
    buckets = [Bucket.parse(text, stride, maker.patch) for text in command.buckets]
    jobs: list[Job] = []
    left_out: dict[str, list[str]] = {"too short": [], "failed": []}
    rates: dict[str, float] = {}
    for root in command.data:
        source = open_source(root, command.fps * command.stride)
        rates[root] = source.fps / command.stride
        camera = camera_of(source, command.camera if not isinstance(source, ClipEpisodes) else None)
        for episode in source.episodes:
            name = f"{root} episode {episode.index}"
            if command.success_only and episode.success is False:
                left_out["failed"].append(name)
                continue
            frames = (episode.length - 1) // command.stride + 1
            bucket = choose(buckets, frames, _size(source, episode.index, camera))
            if bucket is None:
                left_out["too short"].append(name)
                continue
            starts = _starts(episode.length, bucket, command)
            content = hashlib.sha256(f"{source.content_hash(episode.index)} {camera}".encode()).hexdigest()
            shard = maker.shard_name(content, episode.instruction, bucket, starts, command.stride, rates[root])
            found = Job(
                source=source, index=episode.index, bucket=bucket, starts=starts, camera=camera, content=content, shard=shard
            )  # fmt: skip
            jobs.append(found)
    first, fps = next(iter(rates.items()))
    for root, rate in rates.items():
        if abs(rate - fps) > 0.01 * fps:
            fix = "stride= that fits both, or another store"
            raise UserError(f"data: {root}", got=f"{rate:.4g} frames a second", wanted=f"{fps:.4g} as {first}", fix=fix)
    if not jobs:
        fix = "buckets with fewer frames"
        wanted = "an episode that fills a bucket"
        raise UserError("buckets", got=f"{sum(map(len, left_out.values()))} episodes left out", wanted=wanted, fix=fix)
    return jobs, left_out, fps


def _starts(length: int, bucket: Bucket, command: LatentsCommand) -> list[int]:
    """First frames of the windows that lie within an episode."""
    span = (bucket.frames - 1) * command.stride
    step = command.start_stride or _window_step(bucket, command.stride)
    return list(range(0, length - span, step))[: command.limit]


def _window_step(bucket: Bucket, stride: int) -> int:
    """From one window to the next, one behind the other; a multiple of 8, where the simulator's truth has its depth."""
    return 8 * ((bucket.frames - 1) * stride // 8 + 1)


def _size(source: EpisodeSource, index: int, camera: str) -> tuple[int, int]:
    """(H, W) of the recorded pictures."""
    from .latent_sources import ClipEpisodes

    if isinstance(source, ClipEpisodes):
        clip = source.manifest.clips[index]
        return clip.height, clip.width
    shape = source.features[camera]["shape"]
    if shape[0] == 3:  # colours first, as some of LeRobot's datasets say
        return int(shape[1]), int(shape[2])
    return int(shape[0]), int(shape[1])


def _recipes(command: LatentsCommand, maker: LatentMaker, jobs: Sequence[Job]) -> dict[Bucket, TargetRecipe]:
    """Bucket -> what its targets are made by; nothing without targets."""
    from .target_shards import Geometry
    from .targets import resolve_recipe

    if not command.targets:
        return {}
    made = {}
    stride, patch = maker.described.stride, maker.patch
    for bucket in sorted({job.bucket for job in jobs}):
        geometry = Geometry(
            frames=bucket.frames, stride=command.stride,
            start_stride=command.start_stride or _window_step(bucket, command.stride),
            grid_rows=command.grid_rows, grid_columns=command.grid_columns,
            token_rows=bucket.rows // (stride[1] * patch[1]), token_columns=bucket.columns // (stride[2] * patch[2]),
        )  # fmt: skip
        made[bucket] = resolve_recipe(command.teacher, [Path(command.out) / "targets"], geometry)
    for job in jobs:
        if made[job.bucket].needs_truth:
            _check_truth(job)
    return made


def _check_truth(job: Job) -> None:
    """The simulator's truth is about recorded pictures: these may only be scaled."""
    from physisforcing.core.lerobot_format import HEAD

    height, width = _size(job.source, job.index, job.camera)
    if job.camera != HEAD:
        fix = "teacher=permissive, or targets=false"
        raise UserError("teacher", got=f"simulator truth of {job.camera}", wanted="the head camera's", fix=fix)
    if height * job.bucket.columns != width * job.bucket.rows:
        got = f"{job.bucket.name} of pictures of {height}x{width}"
        wanted = "buckets of the recorded shape: the simulator's points are not cut"
        raise UserError("buckets", got=got, wanted=wanted, fix="teacher=permissive, or another bucket")


def _seen(job: Job, recipe: TargetRecipe) -> EpisodeSource:
    """What the teachers look at: the recording, where they are the simulator's truth, else the pictures of the bucket."""
    from .latent_sources import SizedEpisodes

    return job.source if recipe.needs_truth else SizedEpisodes(job.source, job.bucket.size, job.camera)


def _make_targets(
    command: LatentsCommand,
    out: Path,
    jobs: Sequence[Job],
    recipes: dict[Bucket, TargetRecipe],
    device: str,
    progress: bool,
) -> None:
    from .targets import build

    for bucket, recipe in recipes.items():
        for source, some in _by_source([job for job in jobs if job.bucket == bucket]):
            build(
                _seen(some[0], recipe), recipe, teachers=command.teacher, cache=out / "targets",
                episodes=[job.index for job in some], device=device, workers=command.workers, progress=progress,
            )  # fmt: skip
            del source


def _by_source(jobs: Sequence[Job]) -> Iterator[tuple[EpisodeSource, list[Job]]]:
    for key in dict.fromkeys((id(job.source), job.camera) for job in jobs):
        some = [job for job in jobs if (id(job.source), job.camera) == key]
        yield some[0].source, some


def _check_store(out: Path, info: StoreInfo) -> None:
    from .latent_shards import STORE_NAME, check_same, read_store

    if (out / STORE_NAME).is_file():
        check_same({out: read_store(out)[0], Path("this command"): info})


def _write(out: Path, info: StoreInfo, jobs: Sequence[Job], recipes: dict[Bucket, TargetRecipe]) -> list[LatentWindow]:
    """The store's lists, of what is there; windows of earlier commands stay. Returns those of ``jobs``."""
    from .latent_shards import STORE_NAME, LatentWindow, read_store, write_store
    from .target_shards import shard_path

    found: list[LatentWindow] = []
    for job in jobs:
        if not (out / job.shard).is_file():
            continue
        recipe, targets = recipes.get(job.bucket), ""
        if recipe is not None:
            path = shard_path(_seen(job, recipe), job.index, recipe, out / "targets")
            targets = path.relative_to(out).as_posix() if path.is_file() else ""
        stride = info.stride
        shape = (
            info.channels, 1 + (job.bucket.frames - 1) // stride[0], job.bucket.rows // stride[1],
            job.bucket.columns // stride[2],
        )  # fmt: skip
        found += [
            LatentWindow(
                shard=job.shard, row=row, shape=shape, caption=job.source.episode(job.index).instruction,
                source=Path(job.source.root).name, episode=job.index, start=start, targets=targets,
                target_row=row if targets else -1, content=job.content[:32],
            )
            for row, start in enumerate(job.starts)
        ]  # fmt: skip
    known = read_store(out)[1] if (out / STORE_NAME).is_file() else []
    new = {window.identity for window in found}
    write_store(out, info, [window for window in known if window.identity not in new] + found)
    return found


def _summary(
    out: Path,
    jobs: Sequence[Job],
    windows: Sequence[LatentWindow],
    left_out: dict[str, list[str]],
    computed: int,
    maker: LatentMaker,
) -> dict[str, Any]:
    planned = sum(len(job.starts) for job in jobs)
    shards = {window.shard for window in windows}
    targets = {window.targets for window in windows if window.targets}
    counts: dict[str, int] = {}
    for window in windows:
        name = window.shard.split("/")[0]
        counts[name] = counts.get(name, 0) + 1
    return {
        "out": str(out),
        "windows": len(windows),
        "missing": planned - len(windows),
        "buckets": counts,
        "left_out": {why: names for why, names in left_out.items() if names},
        "latent_bytes": sum((out / shard).stat().st_size for shard in shards),
        "target_bytes": sum((out / shard).stat().st_size for shard in targets),
        "computed": computed,
        "seconds_a_window": {what: round(value / max(computed, 1), 4) for what, value in maker.seconds.items()},
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
    print(f"{summary['out']}: {summary['windows']} windows ({summary['computed']} computed now)")
    for name, count in summary["buckets"].items():
        print(f"  {name:<16}{count:>7}")
    for why, names in summary["left_out"].items():
        print(f"  left out, {why}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    if summary["missing"]:
        print(f"  {summary['missing']} windows are made by other shards, or not yet", file=sys.stderr)
    print(f"  {summary['latent_bytes'] / 1e6:.1f} MB latents, {summary['target_bytes'] / 1e6:.1f} MB targets")
    return 0
