"""A training that is killed with SIGKILL at random moments, half of them while it saves, and continued until it is done.

Lives are forks of a process that has imported everything (``two_processes.py``).
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from physisforcing.worldmodel.training.checkpoint import is_complete, latest_checkpoint, load_training
from physisforcing.worldmodel.training.worldmodel import train_world_model
from ranks import fork
from tiny_training import bank, config

KILLS = 20


def steps_for(kills: int) -> int:
    """Updates of a run that is long enough for so many lives."""
    return max(30, 6 * kills)


def life(folder: Path, name: str, steps: int) -> int:
    """Fork a process that continues the run ``name``."""
    settings = config(folder, name, steps)
    settings.run.resume, settings.run.save_every = True, 2

    def live() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        train_world_model(settings, (bank(0), bank(1)))

    return fork(live, name)


def killed_lives(folder: Path, kills: int) -> list[dict]:
    """A run ``straight`` that nobody kills, and a run ``killed`` of several lives; what was found after each."""
    steps, draw, found, run = steps_for(kills), random.Random(0), [], folder / "killed"

    def newest() -> str:
        return (run / "last").readlink().name if (run / "last").is_symlink() else ""

    assert os.waitpid(life(folder, "straight", steps), 0)[1] == 0
    for _ in range(kills):
        saving, start, deadline = draw.random() < 0.5, newest(), time.monotonic() + 60
        child = life(folder, "killed", steps)
        while newest() == start and time.monotonic() < deadline:  # every life gets somewhere
            time.sleep(0.002)
        if saving:
            while not list(run.glob(".writing-*")) and time.monotonic() < deadline:
                time.sleep(0.0002)
        else:
            time.sleep(draw.uniform(0.0, 0.1))
        seen, torn = newest(), bool(list(run.glob(".writing-*")))
        os.kill(child, signal.SIGKILL)
        ended, kept = os.waitpid(child, 0)[1], latest_checkpoint(run)
        assert kept is not None
        load_training(kept)
        found.append(
            {"signal": ended, "seen": seen, "kept": kept.name, "saving": torn, "complete": is_complete(run / "last")}
        )
    assert os.waitpid(life(folder, "killed", steps), 0)[1] == 0
    return found
