"""Trainings of a policy on a tiny large backbone that take seconds: pipeline folders (``tiny_paper``), and latent stores with drawn windows, states
and actions of the sizes that a policy on TI2V-5B has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import tiny_paper
from physisforcing.core.lerobot import LeRobotWriter
from physisforcing.core.lerobot_format import robot_features
from physisforcing.policy.training_config import TrainPolicyConfig
from physisforcing.worldmodel.data.canvas import canvas_layout
from physisforcing.worldmodel.data.latent_actions import RecordedActions, actions_path, write_actions
from physisforcing.worldmodel.data.latent_shards import LatentWindow, StoreInfo, write_shard, write_store

#: Latent frames of 9 pictures; pictures, and recorded rows between two.
FRAMES, STRIDE, HZ = 3, 4, 50.0
#: Channels of the tiny autoencoder, and width of its sentences.
CHANNELS, TEXT = 8, 16


def store(
    folder: Path,
    *,
    canvas: str = "robotwin",
    joints: tuple[int, int] = (14, 14),
    tasks: tuple[str, ...] = ("press", "lift"),
    episodes: int = 4,
    channels: int = CHANNELS,
    text: int = TEXT,
    windows: int = 2,
    latents: str = "",
    targets: bool = False,
    hz: float = HZ,
    stride: int = STRIDE,
) -> Path:
    """``joints``: widths of actions and states. Tasks take turns; an episode has 50 rows and a window at every 8th. ``targets``: with drawn ones for
    the physics losses."""
    draw, layout = torch.Generator().manual_seed(0), canvas_layout(canvas)
    shape = (channels, FRAMES, layout.height // 16, layout.width // 16)
    info = StoreInfo(
        kind="wan", latents=latents, text="drawn", channels=channels, stride=(4, 16, 16), conditioned=False,
        fps=hz / stride, canvas=canvas, teachers={"tracker": "random"} if targets else None,
    )  # fmt: skip
    listed = []
    for episode in range(episodes):
        content = f"{episode:032d}"
        name = f"9x{layout.height}x{layout.width}/{content}.safetensors"
        tensors = {
            "latents_WCFhw": torch.randn(windows, *shape, generator=draw),
            "text_LD": torch.randn(4 + episode % 4, text, generator=draw),
        }
        write_shard(folder / name, tensors)
        rows = np.random.default_rng(episode)
        actions, states = (rows.normal(size=(50, width)).astype(np.float32) for width in joints)
        place = actions_path(content)
        write_actions(folder / place, RecordedActions(states_TA=states, actions_TA=actions, hz=hz))
        seen = ""
        if targets:
            import tiny_large

            seen = tiny_large._targets(folder, shape, episode, 0)
        listed += [
            LatentWindow(
                shard=name, row=row, shape=shape, caption="press it", source="drawn", episode=episode, start=8 * row,
                content=content, actions=place, targets=seen, target_row=row if seen else -1, task=tasks[episode % len(tasks)],
            )
            for row in range(windows)
        ]  # fmt: skip
    write_store(folder, info, listed)
    return folder


def dataset(folder: Path, lengths: tuple[int, ...] = (36, 20), tasks: tuple[str, ...] = ("press",)) -> Path:
    """Recordings of three cameras at 50 Hz, 14 joints; tasks take turns."""
    names = ("head", "left_wrist", "right_wrist")
    features = robot_features([f"j{k}" for k in range(14)], cameras=names, height=48, width=64, fps=HZ)
    features.pop("observation.state_measured")
    writer = LeRobotWriter(folder, features, robot_type="drawn", fps=HZ)
    for number, length in enumerate(lengths):
        draw = np.random.default_rng(number)
        columns = {
            "observation.state": draw.normal(size=(length, 14)).astype(np.float32),
            "action": draw.normal(size=(length, 14)).astype(np.float32),
            "next.success": np.ones(length, bool),
        }
        shade = np.arange(length, dtype=np.uint8)[:, None, None, None] * 4
        frames = {
            f"observation.images.{name}": np.broadcast_to(shade + place * 20, (length, 48, 64, 3)).astype(np.uint8)
            for place, name in enumerate(names)
        }
        writer.add_episode(
            columns=columns, frames=frames, instruction="press the bell", task_name=tasks[number % len(tasks)], seed=number,
            success=True, scene_hash=f"{number}", policy="expert", embodiment="drawn", assets_version="1",
        )  # fmt: skip
    writer.finalize()
    return folder


def pipeline(folder: Path) -> Path:
    return tiny_paper.ti2v(folder / "ti2v")


def config(
    model: Path, latents: Path, out: Path, *words: str, experiment: str = "policy_robotwin"
) -> TrainPolicyConfig:
    """The recipe at a tiny size: four updates of two windows."""
    from physisforcing.core.config import compose

    small = [
        f"experiment={experiment}", f"model={model}", f"data.latents=[{latents}]", "data.heldout=1", "data.workers=2",
        "policy.width=16", "policy.ffn_dim=24", "text_tokens=8", f"run.out={out}", "run.steps=4", "run.batch=2",
        "run.device=cpu", "run.log_every=1", "run.save_every=2", "run.eval_every=100", "run.compile=none",
        "optim.warmup=1", "optim.lr=0.01", "heldout_windows=2",
    ]  # fmt: skip
    return compose("train_policy", [*small, *words], TrainPolicyConfig)
