"""Teacher targets of every window of a dataset, computed once and cached on disk: ``physis data targets``.

One safetensors shard an episode, ``<cache>/<recipe>/<content>.safetensors``; the cache is the dataset's own folder
``targets`` unless another is named. The folder's name is a digest of the recipe (window geometry, query grid, teachers with
their versions, licences and checksums), the file's a digest of the episode's own content, so a shard is found by what it was
computed from: renumbered or merged datasets keep theirs, changed ones do not find a stale one. Shards are written aside and
renamed; a killed run continues where it stopped, and machines that share a folder may work on one dataset.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.errors import UserError
from physisforcing.core.shards import parse_shard

from ..teachers.selection import Teachers, TeachersConfig
from .target_shards import Geometry, TargetRecipe, cache_folder, find_recipe, shard_path, write_shard

if TYPE_CHECKING:
    from physisforcing.core.episodes import EpisodeSource

    from .target_maker import TargetMaker

USAGE = """usage: physis data targets data=[FOLDER,...] [field=value ...]

Computes point tracks, depth and encoder features of every training window, and caches them in FOLDER/targets. What is there
already is kept. Training does this by itself for what is missing.

examples:
  physis data targets data=[runs/bell]
  physis data targets data=[runs/bell,runs/blocks] device=cuda processes=4
  physis data targets data=[runs/bell] teacher=permissive
  physis data targets data=[runs/bell] teacher=permissive teacher.encoder.name=vjepa2 teacher.encoder.path=vjepa2-vitl

teachers (teacher=NAME sets all three; teacher.tracker.name=..., teacher.depth.name=..., teacher.encoder.name=... one):
  simulator    exact tracks and depth, EfficientNet-Lite0 features (default; needs ground truth in the dataset)
  degraded     the same, with the errors of a learned tracker in the tracks
  permissive   classical tracker, no depth, EfficientNet-Lite0; refuses weights under any but permissive licences
  paper        CoTracker3, Depth-Anything V2, V-JEPA 2: your own copies, by path; relations of 512 tokens a window
Any dataset of a known layout will do for the last two. Training takes the same words (physis train worldmodel teacher=...).

fields:
  data, cache     datasets; a folder instead of FOLDER/targets, for datasets that are read-only (training: data.targets_cache)
  device          auto, cpu, cuda, cuda:1
  workers=2       threads that read and decode, of each process
  processes=1     with device=cuda spread over the machine's GPUs
  shard=0/1       this machine's part of the episodes, where several machines share the folder
  ray=false       episodes as Ray tasks in the cluster that RAY_ADDRESS names, or on this machine (needs the extra ray)
  recipe.*        window geometry (frames, stride, start_stride, grid_rows, grid_columns, token_rows, token_columns)"""


@dataclass(slots=True, kw_only=True)
class TargetsCommand:
    """Settings of ``physis data targets`` (see ``USAGE``)."""

    data: list[str]
    cache: str | None = None
    device: str = "auto"
    workers: int = 2
    processes: int = 1
    shard: str = "0/1"
    ray: bool = False
    teacher: TeachersConfig = field(default_factory=TeachersConfig)
    recipe: Geometry = field(default_factory=Geometry)


@dataclass(slots=True, kw_only=True)
class Coverage:
    """What a run of ``build`` did."""

    computed: int = 0
    cached: int = 0
    windows: int = 0


def build(
    dataset: EpisodeSource,
    recipe: TargetRecipe,
    *,
    teachers: TeachersConfig | None = None,
    cache: str | Path | None = None,
    episodes: Sequence[int] | None = None,
    device: str = "cpu",
    workers: int = 2,
    processes: int = 1,
    ray: bool = False,
    progress: bool = False,
) -> Coverage:
    """Compute the shards that are missing.

    Pictures and exact tracks are read in ``workers`` threads, networks run on ``device``; ``processes`` of them, on the GPUs in
    turn, or as Ray tasks. ``recipe`` must be that of the ``teachers``. A process that dies loses its current episode only: its
    error is raised, and the next call continues.
    """
    from tqdm import tqdm

    config = teachers or TeachersConfig()
    wanted = list(range(dataset.num_episodes)) if episodes is None else sorted(set(episodes))
    missing = [index for index in wanted if not shard_path(dataset, index, recipe, cache).is_file()]
    if missing:
        place = None if cache is None else str(Path(cache).resolve())  # of this process, wherever the work is done
        job = _Job(str(Path(dataset.root).resolve()), recipe, config, place, device, workers)
        label = f"targets {dataset.root.name}"
        if ray:
            made = _with_ray(job, missing)
        elif processes > 1 and len(missing) > 1:
            made = _with_processes(job, missing, min(processes, len(missing)))
        else:
            made = _here(job, dataset, missing, _maker(job))
        for _ in tqdm(made, total=len(missing), desc=label, disable=not progress):
            pass
    windows = sum(len(recipe.starts(dataset.episode(index).length)) for index in wanted)
    return Coverage(computed=len(missing), cached=len(wanted) - len(missing), windows=windows)


def resolve_recipe(teachers: TeachersConfig, folders: Sequence[Path], geometry: Geometry | None = None) -> TargetRecipe:
    """The recipe of these teachers. Where weights are their identity and none are named, that of the targets in ``folders``."""
    geometry = geometry or Geometry()
    loaded = Teachers(teachers)
    if loaded.unidentified:
        return find_recipe(list(folders), teachers, geometry)
    infos = {kind: loaded.info(kind) for kind in ("tracker", "depth", "encoder")}
    shape = {item.name: getattr(geometry, item.name) for item in fields(Geometry)}
    return TargetRecipe(**shape, **infos, names=teachers.names, relations=teachers.relations, common=teachers.common)


@dataclass(slots=True)
class _Job:
    """What a process needs to make shards of one dataset; travels to it by value."""

    root: str
    recipe: TargetRecipe
    config: TeachersConfig
    cache: str | Path | None
    device: str
    workers: int

    def on(self, number: int) -> _Job:
        """The job for process ``number``: on the GPUs in turn, where none is named."""
        import torch

        if self.device != "cuda" or torch.cuda.device_count() < 2:
            return self
        return replace(self, device=f"cuda:{number % torch.cuda.device_count()}")


def _maker(job: _Job) -> TargetMaker:
    """Loads the teachers, before any thread asks for them, and compares them with those of the recipe."""
    from .target_maker import TargetMaker

    teachers = Teachers(job.config, job.device)
    teachers.load()
    for kind, info in job.recipe.teachers.items():
        if (here := teachers.info(kind)) != info:
            got, wanted = (f"{one.key} {one.checksum}".strip() for one in (here, info))
            fix = "use the same weights and versions everywhere, or take the recipe of these teachers"
            raise UserError(f"teacher.{kind}", got=got, wanted=wanted, fix=fix)
    return TargetMaker(job.recipe, teachers)


def _here(job: _Job, dataset: EpisodeSource, missing: Sequence[int], maker: TargetMaker) -> Iterator[int]:
    import torch

    from .latent_maker import as_in_commands

    device = torch.device(job.device)
    with ThreadPoolExecutor(max_workers=max(job.workers, 1)) as pool:
        for index, prepared in _bounded_map(pool, lambda i: maker.prepare(dataset, i), missing, job.workers + 2):
            path = shard_path(dataset, index, job.recipe, job.cache)
            with as_in_commands(device):
                made = maker.finish(prepared)
            write_shard(path, made, job.recipe, prepared.content)
            yield index


#: What a process of ``_with_processes`` keeps: its job, dataset and maker.
_mine: list[Any] = []


def _start(job: _Job, numbers: Any) -> None:
    os.environ.setdefault("OPENCV_FOR_THREADS_NUM", "1")  # else each process takes all cores for the classical tracker
    _mine[:] = [job.on(numbers.get())]


def _make(index: int) -> int:
    """One episode in a process that loads its teachers with the first."""
    import torch

    from physisforcing.core.readers import open_dataset

    job = _mine[0]
    if len(_mine) == 1:
        torch.set_num_threads(1 if job.device == "cpu" else 2)
        _mine.extend([open_dataset(job.root), _maker(job)])
    return next(_here(job, _mine[1], [index], _mine[2]))


def _work(job: _Job, episodes: Sequence[int]) -> list[int]:
    """What a Ray task runs."""
    from physisforcing.core.readers import open_dataset

    return list(_here(job, open_dataset(job.root), episodes, _maker(job)))


def _with_processes(job: _Job, missing: Sequence[int], processes: int) -> Iterator[int]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    numbers = context.Queue()
    for number in range(processes):
        numbers.put(number)
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(job, numbers))
    try:
        for done in as_completed([pool.submit(_make, index) for index in missing]):
            yield done.result()
    except BrokenProcessPool as error:
        got = f"one of {processes} processes ended by itself, often for lack of memory"
        fix = "use fewer, and run the command again: what is done is kept"
        raise UserError("processes", got=got, wanted="processes that work to the end", fix=fix) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _with_ray(job: _Job, missing: Sequence[int]) -> Iterator[int]:
    try:
        import ray
    except ImportError as error:
        fix = "pip install 'physisforcing[ray]', or processes=N"
        raise UserError("ray", got="not installed", wanted="Ray 2.40 or newer", fix=fix) from error
    if not ray.is_initialized():
        ray.init()
    gpu = job.device.startswith("cuda")
    if gpu:
        if not ray.cluster_resources().get("GPU"):
            raise UserError("device", got=job.device, wanted="a cluster with GPUs", fix="device=cpu")
        job = replace(job, device="cuda")  # a task sees the GPU that Ray gave it, and no other
    task = ray.remote(num_cpus=max(1, job.workers), num_gpus=1 if gpu else 0)(_work)
    units = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 1))
    shares = max(1, min(len(missing), units if gpu else units // max(1, job.workers)))
    waiting = [task.remote(job, missing[k::shares]) for k in range(shares)]
    while waiting:
        ready, waiting = ray.wait(waiting)
        for one in ready:
            yield from ray.get(one)


def _bounded_map(
    pool: ThreadPoolExecutor, work: Callable[[int], Any], items: Sequence[int], ahead: int
) -> Iterator[tuple[int, Any]]:
    """Like ``pool.map``, but at most ``ahead`` results wait in memory. Yields (item, result)."""
    waiting = [(item, pool.submit(work, item)) for item in items[:ahead]]
    for place in range(len(items)):
        item, future = waiting.pop(0)
        if place + ahead < len(items):
            waiting.append((items[place + ahead], pool.submit(work, items[place + ahead])))
        yield item, future.result()


def main(argv: Sequence[str]) -> int:
    """``physis data targets``; returns the exit code."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return 0
    import torch

    from physisforcing.core.config import compose
    from physisforcing.core.readers import open_dataset

    command = compose("data_targets", list(argv), TargetsCommand)
    part, parts = parse_shard(command.shard)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if command.device == "auto" else command.device
    datasets = [open_dataset(root) for root in command.data]
    folders = [cache_folder(dataset, command.cache) for dataset in datasets]
    recipe = resolve_recipe(command.teacher, folders, command.recipe)
    for kind, info in recipe.teachers.items():
        print(f"{kind:8} {info.key} ({info.licence})")
    for dataset in datasets:
        done = build(
            dataset,
            recipe,
            teachers=command.teacher,
            cache=command.cache,
            episodes=range(part, dataset.num_episodes, parts),
            device=device,
            workers=command.workers,
            processes=command.processes,
            ray=command.ray,
            progress=True,
        )
        print(f"{dataset.root}: {done.windows} windows, {done.computed} episodes computed, {done.cached} cached")
    return 0
