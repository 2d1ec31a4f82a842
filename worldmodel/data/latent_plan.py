"""Which windows a latent store is to hold: every episode or clip in its bucket, and why others are left out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.types import RATE_TOLERANCE

from .latent_settings import COMMAND, SettingNames, WindowSettings

if TYPE_CHECKING:
    from physisforcing.core.episodes import EpisodeSource

    from .buckets import Bucket
    from .latent_maker import LatentMaker
    from .latent_shards import LatentWindow, StoreInfo

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Job:
    """The windows of one episode: cut out of ``source`` (recorded pictures) into ``shard``. ``content``: digest of its pictures."""

    source: EpisodeSource
    index: int
    bucket: Bucket
    starts: list[int]
    camera: str
    content: str
    shard: str

    @property
    def task(self) -> str:
        """The name of its episode's task, "" where none is known."""
        return self.source.episode(self.index).task_name

    @property
    def name(self) -> str:
        """What its episode is called in messages."""
        return f"{Path(self.source.root).name} episode {self.index}"


@dataclass(slots=True, kw_only=True)
class Plan:
    """``jobs`` of all episodes at ``fps``; ``left_out``: reason -> episodes; ``repeating``: clips with fewer frames a second than are
    shown, so that frames repeat."""

    fps: float
    jobs: list[Job] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: {"too short": [], "failed": [], "there already": []})
    repeating: list[str] = field(default_factory=list)


def make_plan(
    settings: WindowSettings,
    data: Sequence[str],
    maker: LatentMaker,
    store: Path | None = None,
    names: SettingNames = COMMAND,
) -> Plan:
    """Read what all ``data`` say of themselves. ``UserError`` for data of another rate than the rest or than the ``store``, where it is
    there, for buckets that do not fit the model, and where no episode fills a bucket."""
    from .buckets import Bucket
    from .latent_sources import ClipEpisodes, camera_of, open_source

    prefix, fps = names.prefix, settings.fps * settings.stride
    buckets = [Bucket.parse(text, maker.described.stride, maker.patch, prefix) for text in settings.buckets]
    sources = [(root, open_source(root, fps, settings.canvas, prefix)) for root in data]
    plan = Plan(fps=_common_rate(store, {root: found.fps / settings.stride for root, found in sources}, names))
    seen: set[str] = set()
    for root, source in sources:
        clips = isinstance(source, ClipEpisodes)
        camera = camera_of(source, None if clips else settings.camera, prefix)
        for episode in source.episodes:
            name = f"{root} episode {episode.index}"
            if settings.success_only and episode.success is False:
                plan.left_out["failed"].append(name)
                continue
            job = _job(settings, maker, buckets, plan.fps, source, episode.index, camera)
            if job is None:
                plan.left_out["too short"].append(name)
            elif job.content in seen:
                plan.left_out["there already"].append(name)
            else:
                seen.add(job.content)
                plan.jobs.append(job)
                if clips and source.manifest.clips[episode.index].fps < (1 - RATE_TOLERANCE) * plan.fps:
                    plan.repeating.append(name)
    if not plan.jobs:
        got = f"{sum(map(len, plan.left_out.values()))} episodes left out"
        wanted = "an episode that fills a bucket"
        raise UserError(f"{prefix}buckets", got=got, wanted=wanted, fix="buckets with fewer frames")
    return plan


def _job(
    settings: WindowSettings,
    maker: LatentMaker,
    buckets: list[Bucket],
    fps: float,
    source: EpisodeSource,
    index: int,
    camera: str,
) -> Job | None:
    """The windows of an episode; None where it fills no bucket."""
    from .buckets import choose

    episode = source.episode(index)
    frames = (episode.length - 1) // settings.stride + 1
    if settings.past_end:
        frames = max(frames, min(bucket.frames for bucket in buckets))
    bucket = choose(buckets, frames, recorded_size(source, index, camera))
    if bucket is None:
        return None
    # past the end: as long as a window shows a second picture, the first one in any case
    span = settings.stride if settings.past_end else (bucket.frames - 1) * settings.stride
    starts = list(range(0, max(episode.length - span, 1), window_step(settings, bucket)))[: settings.limit]
    content = hashlib.sha256(f"{source.content_hash(index)} {camera}".encode()).hexdigest()
    return Job(
        source=source, index=index, bucket=bucket, starts=starts, camera=camera, content=content,
        shard=maker.shard_name(content, episode.instruction, bucket, starts, settings.stride, fps),
    )  # fmt: skip


def job_windows(job: Job, info: StoreInfo, targets: str, actions: str = "") -> list[LatentWindow]:
    """The windows of a job as a store lists them. ``targets``, ``actions``: the files of its physics targets and of its actions, "" for none."""
    from .latent_shards import LatentWindow

    (time, high, wide), bucket = info.stride, job.bucket
    shape = info.channels, 1 + (bucket.frames - 1) // time, bucket.rows // high, bucket.columns // wide
    return [
        LatentWindow(
            shard=job.shard, row=row, shape=shape, caption=job.source.episode(job.index).instruction,
            source=Path(job.source.root).name, episode=job.index, start=start, targets=targets,
            target_row=row if targets else -1, content=job.content[:32],
            actions=actions, task=job.task,
        )
        for row, start in enumerate(job.starts)
    ]  # fmt: skip


def of_tasks(items: Sequence[T], tasks: Sequence[str], known_as: Callable[[T], tuple[str, str]]) -> list[T]:
    """The windows or episodes of these tasks, all where no task is named. ``known_as``: -> (the name of its task, "" for none; what it is
    called). ``UserError`` for a task of which there are none, and for something whose task nobody knows."""
    if not tasks:
        return list(items)
    found = [known_as(item) for item in items]
    if unknown := [name for task, name in found if not task]:
        fix = "leave data.tasks out, or physis data latents again for a store that was made before it knew its tasks"
        got, wanted = f"{unknown[0]} of no known task", "windows that know their tasks"
        raise UserError("data.tasks", got=got, wanted=wanted, fix=fix)
    known = {task for task, _ in found}
    for task in tasks:
        if task not in known:
            raise unknown_name("data.tasks", task, known, see="physis data inspect")
    return [item for item, (task, _) in zip(items, found, strict=True) if task in tasks]


def told(left_out: Mapping[str, Sequence[str]], repeating: Sequence[str]) -> Iterator[str]:
    """Lines for a reader: how many episodes a plan leaves out, why, and the first of them; and which clips repeat frames."""
    for why, names in left_out.items():
        if names:
            yield f"left out, {why}: {_some(names)}"
    if repeating:
        yield f"slower than the rate of the windows, frames repeat: {_some(repeating)}"


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _common_rate(store: Path | None, rates: Mapping[str, float], names: SettingNames) -> float:
    """Frames a second of all windows: the store's, where there is one, else those of the first data."""
    from .latent_shards import STORE_NAME, read_store

    first, fps = next(iter(rates.items()))
    if store is not None and (store / STORE_NAME).is_file():
        first, fps = str(store), read_store(store)[0].fps
    for root, rate in rates.items():
        if abs(rate - fps) > RATE_TOLERANCE * fps:
            fix = f"{names.prefix}stride= or {names.prefix}fps= that fits both, or keep them apart"
            got, wanted = f"{rate:.4g} frames a second", f"{fps:.4g} as {first}"
            raise UserError(f"{names.data}: {root}", got=got, wanted=wanted, fix=fix)
    return fps


def window_step(settings: WindowSettings, bucket: Bucket) -> int:
    """Recorded frames from one window to the next. Where nothing is said, one behind the other, and a multiple of 8, where the
    simulator's truth has its depth."""
    return settings.start_stride or 8 * ((bucket.frames - 1) * settings.stride // 8 + 1)


def recorded_size(source: EpisodeSource, index: int, camera: str) -> tuple[int, int]:
    """(H, W) of the recorded pictures of an episode."""
    from .latent_sources import ClipEpisodes

    if isinstance(source, ClipEpisodes):
        clip = source.manifest.clips[index]
        return clip.height, clip.width
    shape = source.features[camera]["shape"]
    if shape[0] == 3:  # colours first, as some of LeRobot's datasets say
        return int(shape[1]), int(shape[2])
    return int(shape[0]), int(shape[1])
