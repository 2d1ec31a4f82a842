"""Windows of datasets and clips, encoded while a run trains: the batches of a latent store that was made of them, without the store.

Threads read pictures, sentences and targets ahead; the autoencoder sees a window when a batch asks for it, so that every update pays for
it and nothing is kept. Windows, their order and their names are those of ``physis data latents`` with the same settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from physisforcing.core.episodes import EpisodeSource

from ..teachers.selection import Teachers, TeachersConfig
from .buckets import Bucket
from .latent_actions import RecordedActions, recorded_actions
from .latent_bank import LatentBank
from .latent_maker import DTYPES, LatentMaker, as_in_commands, window_frames
from .latent_plan import Job, Plan, job_windows, make_plan, of_tasks
from .latent_settings import TRAINING, WindowSettings
from .latent_shards import LatentWindow, StoreInfo
from .latent_sources import RememberedFrames, SizedEpisodes
from .latent_targets import bucket_recipes, make_targets, targets_of, teachers_of
from .target_maker import TargetMaker
from .target_shards import TargetRecipe, cache_folder
from .window_targets import reduce_shard


@dataclass(slots=True, kw_only=True)
class LiveWindows:
    """What the banks of a run share. ``jobs``: by the shard that a store would keep their windows in. ``cache``: folder of the targets, None
    is ``targets`` in each dataset. ``other_tasks``: those of the episodes that are left out for theirs. ``online``: the teachers of
    targets that are made with each batch; None where they are cached."""

    settings: WindowSettings
    maker: LatentMaker
    plan: Plan
    info: StoreInfo
    jobs: dict[str, Job]
    recipes: dict[Bucket, TargetRecipe]
    cache: Path | None
    other_tasks: list[str]
    online: Teachers | None = None

    @classmethod
    def planned(
        cls,
        data: Sequence[str],
        settings: WindowSettings,
        model: Path,
        device: torch.device,
        *,
        teachers: TeachersConfig | None,
        cache: Path | None = None,
        text_cache: Path | None = None,
        tasks: Sequence[str] = (),
    ) -> LiveWindows:
        """Which windows of a training there are; nothing is computed. ``teachers``: None for no targets. ``tasks``: of these alone.
        ``UserError`` and ``DatasetError`` as ``latents.make_latents``."""
        settings.check_windows(TRAINING)
        maker = LatentMaker(model, device=device, dtype=DTYPES[settings.dtype], text_cache=text_cache)
        plan = make_plan(settings, data, maker, names=TRAINING)
        every, plan.jobs = plan.jobs, of_tasks(plan.jobs, tasks, lambda job: (job.task, job.name))
        others = [job.task for job in every if tasks and job.task not in tasks]
        recipes = bucket_recipes(settings, teachers, maker, plan.jobs, cache, TRAINING) if teachers is not None else {}
        info, jobs = maker.info(plan.fps, teachers_of(recipes), settings.canvas), {job.shard: job for job in plan.jobs}
        return cls(
            settings=settings, maker=maker, plan=plan, info=info, jobs=jobs, recipes=recipes, cache=cache, other_tasks=others
        )  # fmt: skip

    def make(self, teachers: TeachersConfig, *, online: bool, workers: int) -> None:
        """What the first batch needs: embeddings of the sentences, the autoencoder, and the targets that are not cached, or with ``online``
        the ``teachers``."""
        self.maker.load()
        with as_in_commands(self.maker.device):
            self.maker.embed(_sentences(self.plan.jobs))
        device = str(self.maker.device)
        if self.recipes and online:
            self.online = Teachers(teachers, device)
            self.online.load()
        else:
            options = {"device": device, "workers": workers, "progress": True}
            make_targets(self.plan.jobs, self.recipes, teachers, self.cache, **options)  # type: ignore[arg-type]

    def windows(self) -> list[tuple[Path, LatentWindow]]:
        """(dataset, window) in the order of a store, with the names of its files."""
        found = []
        for job in self.plan.jobs:
            targets = ""
            if (recipe := self.recipes.get(job.bucket)) is not None:
                path = targets_of(job, recipe, self.cache)
                targets = f"targets/{path.parent.name}/{path.name}"
            found += [(Path(job.source.root), window) for window in job_windows(job, self.info, targets)]
        return found


@dataclass(slots=True, kw_only=True)
class LiveBank(LatentBank):
    """``LatentBank`` over ``live``: ``windows`` say where each was cut out."""

    SETTING: ClassVar[str] = "data.roots"
    AGAIN: ClassVar[str] = "run.resume=true, which makes the targets that are missing first"
    live: LiveWindows

    def _job(self, row: int) -> Job:
        return self.live.jobs[self.windows[row][1].shard]

    def _read(self, row: int, sized: EpisodeSource | None = None) -> dict[str, Any]:
        """Pictures and sentence. ``sized``: the episodes of the window's job at the size of its bucket, where they are at hand."""
        live, job, window = self.live, self._job(row), self.windows[row][1]
        sized = sized or SizedEpisodes(job.source, job.bucket.size, job.camera)
        frames = torch.from_numpy(window_frames(sized, job.index, job.bucket, window.start, live.settings.stride))
        if self.device.type == "cuda":
            frames = frames.pin_memory()  # else the copy would wait for the update under way
        return {"frames_THWC": frames} | live.maker.sentence(window.caption, job.bucket, self.info.fps, keep=False)

    def _sentence_length(self, row: int) -> int:
        return self.live.maker.sentence_length(self.windows[row][1].caption, self._job(row).bucket, self.info.fps)

    def _load(self, row: int) -> dict[str, Any]:
        if self.live.online is None:
            return LatentBank._load(self, row)
        job, maker = self._job(row), self._target_maker(row)
        # the autoencoder and the teachers see the same pictures, which are decoded once
        recorded = RememberedFrames(job.source)
        sized = RememberedFrames(SizedEpisodes(recorded, job.bucket.size, job.camera))
        seen = recorded if maker.recipe.needs_truth else sized
        return self._read(row, sized) | {"prepared": maker.prepare(seen, job.index)}

    def _complete(self, row: int, sample: dict[str, Any]) -> dict[str, Any]:
        """Latents, and targets that are made with the batch."""
        with as_in_commands(self.device):
            made: dict[str, Any] = dict(self.live.maker.encode(sample.pop("frames_THWC")))
            if "prepared" in sample:
                maker = self._target_maker(row)
                shard, start = maker.finish(sample.pop("prepared")), maker.recipe.start
                found = reduce_shard(shard, [start], start + 1, maker.recipe, self._physics())
                made["targets"] = found.batch(torch.zeros(1, dtype=torch.int64))
        return sample | made

    def recorded(self, row: int) -> RecordedActions:
        job = self._job(row)
        found = recorded_actions(job.source, job.index)
        if found is None:
            raise self._without_actions(row)
        return found

    def _target_maker(self, row: int) -> TargetMaker:
        recipe, teachers = self.live.recipes[self._job(row).bucket], self.live.online
        assert teachers is not None
        values = {item.name: getattr(recipe, item.name) for item in fields(recipe)}
        return TargetMaker(OneWindow(**values, start=self.windows[row][1].start), teachers)

    def _made_by(self, row: int) -> tuple[TargetRecipe, int]:
        teachers = self.live.online
        if teachers is None:
            return LatentBank._made_by(self, row)
        return self.live.recipes[self._job(row).bucket], teachers.encoder.channels if teachers.encoder else 0

    def _targets_file(self, row: int) -> Path:
        return cache_folder(self._job(row).source, self.live.cache) / Path(self.windows[row][1].targets).relative_to(
            "targets"
        )


@dataclass(slots=True, kw_only=True)
class OneWindow(TargetRecipe):
    """A recipe for the window alone that starts at the recorded frame ``start``."""

    start: int = 0

    def starts(self, length: int) -> NDArray[np.int64]:
        return np.array([self.start])


def _sentences(jobs: Sequence[Job]) -> Iterable[str]:
    """Each once, with a progress bar where somebody looks."""
    from tqdm import tqdm

    return tqdm(dict.fromkeys(job.source.episode(job.index).instruction for job in jobs), desc="text", disable=None)
