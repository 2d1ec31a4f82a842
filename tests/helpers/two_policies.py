"""Policy trainings of two gloo processes for tests/numerics/test_policy_distributed.py: ``python two_policies.py FOLDER``.

``FOLDER`` has a run ``one`` of one process with checkpoints after 3 and 6 updates.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path

from physisforcing.policy.training import train_policy
from physisforcing.policy.training_config import TrainPolicyConfig
from ranks import both
from tiny_policy_training import banks, config

STEPS = 6


def settings(folder: Path, name: str, steps: int = STEPS) -> TrainPolicyConfig:
    """``name``: ``<anything>`` with physics losses, ``<anything>_actions`` without the video's loss, ``whole_<anything>`` not spread."""
    alone = name.endswith("_actions")
    made = config(folder, name, steps, physics=not alone)
    made.run.save_every, made.run.resume = 3, True
    if alone:
        made.video_weight = 0.0
    if name.startswith("whole_"):
        made.run.sharding = "none"
    return made


def train(folder: Path, name: str, source: str = "") -> None:
    """``source``: the run whose first half this one goes on from."""
    if source and os.environ.get("RANK", "0") == "0":  # the other waits for it where they meet
        shutil.copytree(folder / source / "step-000003", folder / name / "step-000003")
    train_policy(settings(folder, name), banks(physics=not name.endswith("_actions")))


def main(folder: Path) -> None:
    train_policy(settings(folder, "first", steps=1), banks(physics=True))  # imports what is imported late
    for name in ("checkpoint", "fsdp"):
        importlib.import_module(f"torch.distributed.{name}")
    both(
        lambda: train(folder, "two"),
        lambda: train(folder, "halves", source="two"),
        lambda: train(folder, "one_to_two", source="one"),
        lambda: train(folder, "two_actions"),
        lambda: train(folder, "halves_actions", source="two_actions"),
        lambda: train(folder, "whole_actions"),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
