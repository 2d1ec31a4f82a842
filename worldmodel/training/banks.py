"""The windows that a run trains and is measured on: latents, conditions and physics targets. Those of the small models are resident on
the device, those of the large backbones are read from latent stores while the run trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from physisforcing.core.errors import UserError

from ..codec import VideoCodec, load_codec
from ..data.batches import BankTargets, OnlineTargets, WindowBank, build_bank
from ..data.latent_bank import LatentBank
from ..data.latent_shards import LatentWindow, check_same, read_store
from ..data.windows import Episode, FrameStore, WindowTable, read_episodes
from ..physics.config import PhysicsConfig
from ..teachers.online import OnlineTeachers
from ..teachers.selection import Teachers
from .config import TrainWorldModelConfig
from .initial import adopt_model
from .runtime import split_heldout


def prepare_banks(
    config: TrainWorldModelConfig, device: torch.device, episodes: list[Episode] | None = None
) -> tuple[WindowBank, WindowBank] | tuple[LatentBank, LatentBank | None]:
    """-> (training windows, held-out windows): latents, conditions and physics targets on ``device``.

    With ``run.init`` the sizes in ``config`` become those of that model first (``adopt_model``).
    """
    adopt_model(config)
    data = config.data
    if config.model:
        physics = config.physics if config.physics.wanted else None
        return open_stores(data.latents, data.heldout, device, physics, ahead=data.workers)
    if data.latents:
        wanted = "none without model="
        raise UserError("data.latents", got=data.latents, wanted=wanted, fix="model=<pipeline folder>, or data.roots")
    if data.heldout < 1:
        wanted = "at least 1: the run measures its losses on held-out episodes"
        raise UserError("data.heldout", got=data.heldout, wanted=wanted, fix="data.heldout=1")
    if episodes is None:
        episodes = read_episodes(
            data.roots, success_only=data.success_only, tasks=data.tasks, limit=data.limit, workers=data.workers
        )
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


def open_stores(
    folders: Sequence[str | Path], heldout: int, device: torch.device, physics: PhysicsConfig | None, *, ahead: int = 4
) -> tuple[LatentBank, LatentBank | None]:
    """-> (training windows, windows of ``heldout`` episodes spread evenly, None for 0). Episodes are whole on one side, also where several
    stores were made of them."""
    if not folders:
        fix = "physis data latents, then data.latents=[<its folder>]"
        raise UserError("data.latents", got="no store", wanted="one or more latent stores", fix=fix)
    stores = {Path(folder): read_store(Path(folder)) for folder in folders}
    info = check_same({folder: found for folder, (found, _) in stores.items()})
    windows = [(folder, window) for folder, (_, some) in stores.items() for window in some]
    episodes = _episodes(windows)
    if not episodes:
        raise UserError("data.latents", got="stores without windows", wanted="windows", fix="see physis data latents")
    banks = []
    for part in split_heldout(episodes, heldout):
        rows = [windows[row] for episode in part for row in episode]
        bank = LatentBank(info=info, windows=rows, device=device, physics=physics, ahead=ahead) if rows else None
        banks.append(bank)
    assert banks[0] is not None
    return banks[0], banks[1]


def _episodes(windows: Sequence[tuple[Path, LatentWindow]]) -> list[list[int]]:
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
