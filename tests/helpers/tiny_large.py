"""A training of a large backbone that takes seconds: tiny pipeline folders (``tiny_paper``) and latent stores of random windows."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch

import tiny_paper
from physisforcing.worldmodel.data.latent_shards import LatentWindow, StoreInfo, write_shard, write_store
from physisforcing.worldmodel.data.target_shards import EpisodeTargets, TargetRecipe
from physisforcing.worldmodel.data.target_shards import write_shard as write_targets
from physisforcing.worldmodel.storage import latents_fingerprint
from physisforcing.worldmodel.training.banks import open_stores
from physisforcing.worldmodel.training.config import TrainWorldModelConfig
from physisforcing.worldmodel.training.initial import adopt_model
from physisforcing.worldmodel.training.worldmodel import Trainer

#: Latents [C,F,h,w] of the tiny pipelines and tokens a latent frame.
SHAPES = {"ti2v": (8, 3, 4, 6), "a14b": (16, 3, 8, 12), "cosmos3": (8, 3, 4, 6)}
STRIDES = {"ti2v": (4, 16, 16), "a14b": (4, 8, 8), "cosmos3": (4, 16, 16)}
CHANNELS, POINTS = 6, (2, 3)


@functools.cache
def fingerprint(kind: str) -> str:
    """That of the latents of ``pipeline``'s autoencoder."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_paper.vae(SHAPES[kind][0], STRIDES[kind][1]).save_pretrained(folder)
        return latents_fingerprint(Path(folder))


def store(folder: Path, kind: str, episodes: int = 4, *, seed: int = 0, targets: bool = True, rows: int = 0) -> Path:
    """A store of ``episodes`` with two windows each. Every fourth episode has no targets. ``rows``: other rows of latents."""
    draw = torch.Generator().manual_seed(seed)
    channels, frames, high, wide = SHAPES[kind]
    shape = (channels, frames, rows or high, wide)
    info = StoreInfo(
        kind="cosmos3" if kind == "cosmos3" else "wan", latents=fingerprint(kind), text="made here", channels=channels,
        stride=STRIDES[kind], conditioned=kind == "a14b", fps=16.0, teachers={"tracker": "random"} if targets else None,
    )  # fmt: skip
    windows = []
    for episode in range(episodes):
        tensors = {"latents_WCFhw": torch.randn(2, *shape, generator=draw)}
        if kind == "a14b":
            tensors["condition_WCFhw"] = torch.randn(2, *shape, generator=draw)
        length = 4 + episode
        if kind == "cosmos3":
            tensors["text_L"] = torch.randint(5, 290, (length,), generator=draw)
        else:
            tensors["text_LD"] = torch.randn(length, 16, generator=draw)
        name = f"9x{shape[2] * 16}x{shape[3] * 16}/{seed}-{episode}.safetensors"
        write_shard(folder / name, tensors)
        known = targets and episode % 4 != 3
        place = _targets(folder, shape, episode, seed) if known else ""
        windows += [
            LatentWindow(
                shard=name, row=row, shape=shape, caption=f"task {episode}", source=f"set{seed}", episode=episode,
                start=16 * row, targets=place, target_row=row if known else -1,
            )
            for row in (0, 1)
        ]  # fmt: skip
    write_store(folder, info, windows)
    return folder


def _targets(folder: Path, shape: tuple[int, ...], episode: int, seed: int) -> str:
    draw = np.random.default_rng([seed, episode])
    frames, high, wide = shape[1], shape[2] // 2, shape[3] // 2
    recipe = TargetRecipe(
        frames=4 * (frames - 1) + 1, stride=1, start_stride=16, grid_rows=POINTS[0], grid_columns=POINTS[1],
        token_rows=high, token_columns=wide,
    )  # fmt: skip
    points = POINTS[0] * POINTS[1]
    track = draw.uniform(2, 60, (2, 1, points, 2)) + np.cumsum(draw.normal(0, 3, (2, recipe.frames, points, 2)), axis=1)
    made = EpisodeTargets(
        starts_W=np.array([0, 16], np.int32),
        points_WTN2=(64 * np.clip(track, 1, 62)).astype(np.int16),
        visible_WTN=draw.random((2, recipe.frames, points)) > 0.1,
        depth_WN=draw.uniform(0.5, 1.5, (2, points)).astype(np.float32),
        body_WN=np.zeros((2, points), np.int32),
        rows_WF=np.arange(2 * frames, dtype=np.int32).reshape(2, frames),
        features_EhwC=draw.normal(size=(2 * frames, high, wide, CHANNELS)).astype(np.float16),
        token_WK=np.zeros((2, 0), np.uint16),
        count_W=np.zeros(0, np.int32),
        relation_WR=np.zeros((2, 0), np.int8),
        size=(64, 64),
        channels=CHANNELS,
    )
    place = f"targets/{recipe.digest()}/{seed}-{episode}.safetensors"
    write_targets(folder / place, made, recipe, "drawn")
    return place


def pipeline(folder: Path, kind: str) -> Path:
    return getattr(tiny_paper, kind)(folder / kind)


def config(model: Path, stores: list[Path], out: Path, steps: int = 4, *, rank: int = 2) -> TrainWorldModelConfig:
    made = TrainWorldModelConfig(model=str(model), heldout_windows=2)
    made.data.latents, made.data.heldout = [str(folder) for folder in stores], 1
    made.run.out, made.run.steps, made.run.batch, made.run.device = str(out), steps, 2, "cpu"
    made.run.log_every, made.run.save_every, made.run.eval_every = 1, 2, 100
    made.optim.warmup, made.optim.lr, made.lora.rank, made.large.videos = 1, 1e-2, rank, 0
    made.flow.motion_weight, made.flow.train_shift = 0.0, 1.0
    made.physics.phi_hidden = made.physics.psi_hidden = made.physics.feature_dim = 16
    return made


def trainer(config: TrainWorldModelConfig) -> Trainer:
    """The trainer of a run, on its training windows."""
    adopt_model(config)
    device = torch.device("cpu")
    return Trainer(
        config, open_stores(config.data.latents, config.data.heldout, device, config.physics, ahead=2)[0], device
    )
