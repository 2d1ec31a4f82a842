"""A training killed with SIGKILL at random moments, also while it saves, ends with the weights of one that was left alone.

``PHYSIS_KILLS=20`` kills more often than the suite does.
"""

import json
import os
import subprocess
import sys

from physisforcing.worldmodel.training.checkpoint import is_complete, load_training

#: One process that has imported everything forks a trainer for every life, which costs no start-up.
LIVES = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from physisforcing.worldmodel.training.checkpoint import is_complete, latest_checkpoint, load_training
from physisforcing.worldmodel.training.worldmodel import Trainer, train_world_model
from tiny_training import bank, config

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
Trainer(config(folder, "first", 1), bank(0), torch.device("cpu")).step(0)  # what is imported late is imported before the forks
banks, steps, draw = (bank(0), bank(1)), max(40, 8 * kills), random.Random(0)

def life(name):
    settings = config(folder, name, steps)
    settings.run.resume, settings.run.save_every = True, 2
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        train_world_model(settings, banks)
        os._exit(0)
    return child

config(folder, "straight", steps)
assert os.waitpid(life("straight"), 0)[1] == 0
found, run = [], folder / "killed"
for _ in range(kills):
    saving = draw.random() < 0.5
    child = life("killed")
    wait_until = time.monotonic() + 60
    def newest():
        return (run / "last").readlink().name if (run / "last").is_symlink() else ""
    start = newest()
    while newest() == start and time.monotonic() < wait_until:  # every life gets somewhere
        time.sleep(0.002)
    if saving:
        while not list(run.glob(".writing-*")) and time.monotonic() < wait_until:
            time.sleep(0.0002)
    else:
        time.sleep(draw.uniform(0.0, 0.1))
    seen = newest()
    torn = bool(list(run.glob(".writing-*")))
    os.kill(child, signal.SIGKILL)
    ended = os.waitpid(child, 0)[1]
    kept = latest_checkpoint(run)
    load_training(kept)
    found.append({"signal": ended, "seen": seen, "kept": kept.name, "saving": torn, "complete": is_complete(run / "last")})
assert os.waitpid(life("killed"), 0)[1] == 0
print(json.dumps(found))
"""


def test_killed_at_random_moments(tmp_path):
    kills = int(os.environ.get("PHYSIS_KILLS", "6"))
    helpers = os.path.join(os.path.dirname(__file__), "..", "helpers")
    done = subprocess.run(
        [sys.executable, "-c", LIVES, str(tmp_path), str(kills)],
        env=os.environ | {"PYTHONPATH": helpers, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lives = json.loads(done.stdout.splitlines()[-1])
    assert len(lives) == kills and sum(life["signal"] == 9 for life in lives) >= kills - 1, lives
    for life in lives:
        assert life["kept"] >= life["seen"] and life["complete"], (
            life
        )  # never older than what was there before the kill
    assert any(life["saving"] for life in lives), "no kill fell into a save"
    straight, killed = (load_training(tmp_path / name / "last") for name in ("straight", "killed"))
    assert straight[1]["step"] == killed[1]["step"] == max(40, 8 * kills)
    for group, tensors in straight[0].items():
        assert all((value == killed[0][group][key]).all() for key, value in tensors.items()), group
    assert is_complete(tmp_path / "killed" / "last") and not list((tmp_path / "killed").glob(".writing-*"))
