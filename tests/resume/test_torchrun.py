"""torchrun's own agent passes SIGTERM on: its processes save, end, and the run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny_large
from physisforcing import cli
from physisforcing.worldmodel.training.checkpoint import latest_checkpoint

pytestmark = pytest.mark.slow


def words(folder: Path, *more: str) -> list[str]:
    return [
        "train", "worldmodel", "experiment=lora_24gb", f"model={folder / 'ti2v'}", f"data.latents=[{folder / 'store'}]", "data.heldout=0",
        "lora.rank=2", "run.batch=2", "run.micro=0", "run.compile=none", "run.checkpointing=none", "run.device=cpu", "run.steps=100000",
        "run.log_every=1", "run.save_every=100000", "run.eval_every=100000", "physics.phi_hidden=16", "physics.psi_hidden=16",
        "large.videos=0", f"run.out={folder / 'run'}", *more,
    ]  # fmt: skip


def lines(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    whole = (
        [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    )
    return [json.loads(line) for line in whole]


def test_sigterm_to_torchrun_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    tiny_large.pipeline(tmp_path, "ti2v")
    tiny_large.store(tmp_path / "store", "ti2v")
    run, about = tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "physisforcing",
    ]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([*command, *words(tmp_path)], stdout=log, stderr=log, env=about, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while len(lines(run)) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None and len(lines(run)) >= 3, (tmp_path / "log").read_text()[-3000:]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(timeout=150)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    saved, told = latest_checkpoint(run), (tmp_path / "log").read_text()
    assert code != 0 and "was ended by SIGTERM" in told and "run.resume=true continues it" in told, told[-3000:]
    assert saved is not None, told[-3000:]
    done = int(saved.name.removeprefix("step-"))
    assert done == lines(run)[-1]["step"] >= 3, "the update under way is the last one, and it is kept"
    assert cli.main(words(tmp_path, "run.resume=true", "large.export=true")) == 0
    assert (run / "export" / "transformer" / "config.json").is_file()
