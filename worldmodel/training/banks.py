"""The windows that a run trains and is measured on: latents, conditions and physics targets, resident on the device."""

from __future__ import annotations

from pathlib import Path

import torch

from physisforcing.core.errors import UserError

from ..codec import VideoCodec, load_codec
from ..data.batches import BankTargets, OnlineTargets, WindowBank, build_bank
from ..data.windows import Episode, FrameStore, WindowTable, read_episodes
from ..teachers.online import OnlineTeachers
from ..teachers.selection import Teachers
from .config import TrainWorldModelConfig
from .initial import adopt_world_model
from .runtime import split_heldout


def prepare_banks(
    config: TrainWorldModelConfig, device: torch.device, episodes: list[Episode] | None = None
) -> tuple[WindowBank, WindowBank]:
    """-> (training windows, held-out windows): latents, conditions and physics targets on ``device``.

    With ``run.init`` the sizes in ``config`` become those of that model first (``adopt_world_model``).
    """
    adopt_world_model(config)
    data = config.data
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
    if config.physics.lambda_pix == 0 and config.physics.lambda_sem == 0:
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
