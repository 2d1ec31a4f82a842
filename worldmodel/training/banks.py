"""The windows that a run trains and is measured on: latents, conditions and physics targets. Those of the small models are resident on
the device, those of the large backbones are read from latent stores while the run trains, or encoded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from physisforcing.core.errors import UserError

from ..codec import VideoCodec, load_codec
from ..data.batches import BankTargets, OnlineTargets, WindowBank, build_bank
from ..data.latent_bank import LatentBank
from ..data.latent_plan import of_tasks, told
from ..data.latent_shards import LatentWindow, check_same, read_store
from ..data.live_bank import LiveBank, LiveWindows
from ..data.windows import Episode, FrameStore, WindowTable, read_episodes, tasks_left_out
from ..physics.config import PhysicsConfig
from ..teachers.online import OnlineTeachers
from ..teachers.selection import Teachers
from .config import TrainWorldModelConfig
from .initial import adopt_model
from .runtime import split_heldout


def prepare_banks(
    config: TrainWorldModelConfig,
    device: torch.device,
    episodes: list[Episode] | None = None,
    *,
    quiet: bool = False,
) -> tuple[WindowBank, WindowBank] | tuple[LatentBank, LatentBank | None]:
    """-> (training windows, held-out windows): latents, conditions and physics targets on ``device``.

    With ``run.init`` the sizes in ``config`` become those of that model first (``adopt_model``). ``quiet``: do not say what a large
    backbone's datasets give, and what is left out of any.
    """
    adopt_model(config)
    data = config.data
    if config.model:
        physics = config.physics if config.physics.wanted else None
        if data.latents:
            return open_stores(
                data.latents, data.heldout, device, physics, ahead=data.workers, tasks=data.tasks, quiet=quiet
            )  # fmt: skip
        return open_datasets(config, device, physics, quiet=quiet)
    refuse_stores(data.latents)
    if data.heldout < 1:
        wanted = "at least 1: the run measures its losses on held-out episodes"
        raise UserError("data.heldout", got=data.heldout, wanted=wanted, fix="data.heldout=1")
    if episodes is None:
        episodes = read_episodes(
            data.roots, success_only=data.success_only, tasks=data.tasks, limit=data.limit, workers=data.workers,
            quiet=quiet,
        )  # fmt: skip
    codec = load_codec(config.codec, device)
    banks = []
    for part in split_heldout(episodes, data.heldout):
        table = WindowTable.build([episode.length for episode in part], data.start_stride)
        banks.append(load_bank(config, part, table, codec, device))
    return banks[0], banks[1]


def load_bank(
    config: TrainWorldModelConfig, episodes: list[Episode], table: WindowTable, codec: VideoCodec, device: torch.device
) -> WindowBank:
    """Latents, conditions and, with physics losses, targets of the windows of ``table``."""
    data = config.data
    cache = Path(data.text_cache) if data.text_cache else None
    store = FrameStore.build(episodes, device)
    bank = build_bank(store, table, codec, config.conditioner.lags, text_cache=cache)
    if not config.physics.wanted:
        return bank
    if data.targets == "online":
        teachers = OnlineTeachers(Teachers(config.teacher, str(device)), config.physics)
        rows = {"episode_W": table.episode_W.to(device), "start_W": table.start_W.to(device)}
        grid = tuple(bank.latents_WCFhw.shape[2:])
        bank.targets = OnlineTargets(store=store, **rows, teachers=teachers, grid=grid)  # type: ignore[arg-type]
    else:
        options = {"teachers": config.teacher, "cache": data.targets_cache, "workers": data.workers}
        bank.targets = BankTargets.load(episodes, table, config.physics, device, **options)  # type: ignore[arg-type]
    return bank


def refuse_stores(folders: Sequence[str]) -> None:
    """``UserError`` where a small model is given latent stores."""
    if folders:
        wanted = "none without model="
        raise UserError("data.latents", got=folders, wanted=wanted, fix="model=<pipeline folder>, or data.roots")


def open_stores(
    folders: Sequence[str | Path],
    heldout: int,
    device: torch.device,
    physics: PhysicsConfig | None,
    *,
    ahead: int = 4,
    tasks: Sequence[str] = (),
    quiet: bool = False,
) -> tuple[LatentBank, LatentBank | None]:
    """-> (training windows, windows of ``heldout`` episodes spread evenly, None for 0). Episodes are whole on one side, also where several
    stores were made of them. ``tasks``: those of these tasks alone; what of others is left out is said unless ``quiet``."""
    assert folders, "check_large has looked"
    stores = {Path(folder): read_store(Path(folder)) for folder in folders}
    info = check_same({folder: found for folder, (found, _) in stores.items()})
    windows = [(folder, window) for folder, (_, some) in stores.items() for window in some]
    if not windows:
        raise UserError("data.latents", got="stores without windows", wanted="windows", fix="see physis data latents")
    every, windows = windows, of_tasks(windows, tasks, lambda placed: (placed[1].task, placed[1].name))
    if len(windows) < len(every) and not quiet:
        others = {(window.source, window.episode): window.task for _, window in every if window.task not in tasks}
        print(f"data.latents: left out, {tasks_left_out(list(others.values()))}", file=sys.stderr, flush=True)
    parts = _split(windows, heldout)
    options: dict[str, Any] = {"info": info, "device": device, "physics": physics, "ahead": ahead}
    training = LatentBank(windows=parts[0], **options)
    if parts[1] and physics is not None:
        _check_heldout(parts[1])
    return training, LatentBank(windows=parts[1], **options) if parts[1] else None


def open_datasets(
    config: TrainWorldModelConfig, device: torch.device, physics: PhysicsConfig | None, *, quiet: bool = False
) -> tuple[LiveBank, LiveBank | None]:
    """-> (training windows, held-out ones) of ``data.roots``, as ``open_stores`` gives them of a store with the same settings."""
    data = config.data
    text, targets = (Path(folder) if folder else None for folder in (data.text_cache, data.targets_cache))
    live = LiveWindows.planned(
        data.roots, data.live, Path(config.model), device, teachers=config.teacher if physics else None,
        cache=targets, text_cache=text, tasks=data.tasks,
    )  # fmt: skip
    windows = live.windows()
    parts = _split(windows, data.heldout)
    if not quiet:
        lines = [f"data.roots: {len(windows)} windows", *told(live.plan.left_out, live.plan.repeating)]
        if live.other_tasks:
            lines.append(f"left out, {tasks_left_out(live.other_tasks)}")
        print("\n  ".join(lines), file=sys.stderr, flush=True)
    live.make(config.teacher, online=data.targets == "online", workers=data.workers)
    options: dict[str, Any] = {"live": live, "info": live.info, "device": device, "physics": physics}
    options["ahead"] = data.workers
    return LiveBank(windows=parts[0], **options), LiveBank(windows=parts[1], **options) if parts[1] else None


#: A dataset or store, and a window of it.
Placed = tuple[Path, LatentWindow]


def _split(windows: Sequence[Placed], heldout: int) -> tuple[list[Placed], list[Placed]]:
    """-> (windows of some episodes, those of ``heldout`` others)."""
    rest, kept = split_heldout(_episodes(windows), heldout)
    return [windows[row] for rows in rest for row in rows], [windows[row] for rows in kept for row in rows]


def _check_heldout(windows: Sequence[Placed]) -> None:
    """``UserError`` that names the held-out episodes where none of them has targets, though others have."""
    if any(window.targets for _, window in windows):
        return
    names = list(dict.fromkeys(f"{window.source} episode {window.episode}" for _, window in windows))
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    raise UserError(
        "data.heldout",
        got=f"{', '.join(names[:4])}{more}, held out and all without physics targets",
        wanted="held-out episodes of which one has them",
        fix=f"data.heldout={len(names) + 1} holds out others as well, data.heldout=0 none; or physis data latents with a teacher= for them",
    )


def _episodes(windows: Sequence[Placed]) -> list[list[int]]:
    """Rows of the windows of each episode, in the order of the first. Windows belong together where dataset and episode have the same
    names, in whatever store, or where they were cut out of the same pictures under two names."""
    groups: dict[tuple[str, int] | str, list[int]] = {}
    for row, (_, window) in enumerate(windows):
        keys: list[tuple[str, int] | str] = [(window.source, window.episode)]
        if window.content:
            keys.append(window.content)
        known = {id(groups[key]): groups[key] for key in keys if key in groups}
        rows = [row for some in known.values() for row in some] + [row]
        for key, some in list(groups.items()) if len(known) > 1 else ():
            if id(some) in known:
                groups[key] = rows
        if len(known) == 1:
            (some,) = known.values()
            some.append(row)
            rows = some
        groups |= dict.fromkeys(keys, rows)
    return sorted({id(rows): sorted(rows) for rows in groups.values()}.values())
