"""A world-model server as a process: killed in the middle of a request, started again, ended politely, and what it writes: nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from physisforcing.core.types import RolloutRequest
from physisforcing.planner.service.client import HttpSettings, HttpWorldModel, ServiceError
from physisforcing.planner.service.conformance import run_suite

#: Told to the server's Python through ``sitecustomize``: whatever opens a file for writing, or makes, moves or removes one, is named.
WATCH = """
import os, sys
KINDS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "tempfile.mkstemp"}
def hook(event, args):
    write = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    if event in KINDS or (event == "open" and isinstance(args[2], int) and args[2] & write and args[0] != "/dev/null"):
        os.write(2, f"TOUCHED {event} {args[0]!r}\\n".encode())
sys.addaudithook(hook)
"""


@contextlib.contextmanager
def running(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen, dict[str, Any]]]:
    """``physis serve worldmodel`` in ``folder``, which is its home, its temporary folder and where it stands, too."""
    for name in ("watch", "home", "tmp", "here"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "watch" / "sitecustomize.py").write_text(WATCH)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PHYSIS_", "XDG_"))}
    environment |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"PYTHONPATH": str(folder / "watch"), "OMP_NUM_THREADS": "1"}
    with (folder / "errors").open("wb") as errors:
        command = [sys.executable, "-m", "physisforcing", "serve", "worldmodel", "--json", *words]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=folder / "here", text=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (folder / "errors").read_text()
        yield process, json.loads(line)
    finally:
        process.kill()
        process.wait()


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for name in ("home", "tmp", "here") for path in (folder / name).rglob("*")}


def request(client: HttpWorldModel) -> RolloutRequest:
    spec = client.spec
    return RolloutRequest(
        context_BVTHWC=np.zeros((1, 1, 1, spec.views.height, spec.views.width, 3), np.uint8),
        instructions=["click the bell"],
        seeds_BS=np.array([[3]]),
        horizon=spec.horizons[0],
        proprioception_BKA=np.zeros((1, len(spec.proprioception_lags), 14), np.float32),
        actions_BSPA=np.zeros((1, 1, 8, 14), np.float32) if "actions" in spec.conditions else None,
    )


def test_a_server_killed_in_mid_request_and_started_again(tmp_path: Path) -> None:
    toy = "model=physisforcing.planner.service.toy"
    caught: list[tuple[BaseException, float]] = []
    with running(tmp_path, f"{toy}:slow") as (process, ready):
        port = int(ready["url"].rsplit(":", 1)[1])
        client = HttpWorldModel(ready["url"], settings=HttpSettings(attempts=3, backoff_s=0.05))

        def ask() -> None:
            try:
                client.rollout(request(client))
            except BaseException as error:
                caught.append((error, time.monotonic()))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        killed = time.monotonic()
        process.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
    assert len(caught) == 4
    for error, when in caught:
        assert isinstance(error, ServiceError) and error.code == "NO_REPLY" and error.retryable
        assert when - killed < 5
    with running(tmp_path, f"{toy}:actions", f"port={port}", "limits.max_request_bytes=1000000") as (process, ready):
        assert ready["url"] == f"http://127.0.0.1:{port}"  # the address is free again
        again = HttpWorldModel(ready["url"])
        found = again.rollout(request(again))
        assert found.frames_BSVTHWC is not None and found.frames_BSVTHWC.shape == (1, 1, 1, 5, 24, 32, 3)
        names = [
            "wrong fields",
            "wrong pictures",
            "bad documents",
            "byte fuzzing",
            "no HTTP",
            "leaving clients",
            "overload",
        ]
        for check in run_suite(ready["url"], only=names, examples=20, timeout_s=30):
            assert check.status != "fail", check
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert files_below(tmp_path) == set()
    touched = [line for line in (tmp_path / "errors").read_text().splitlines() if "TOUCHED" in line]
    assert touched == []


def test_the_watch_sees_what_is_written(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    code = "open('a', 'w'); import os; os.mkdir('b'); open('/dev/null', 'w'); open('a')"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert (
        done.stderr.split("\n")[:2] == ["TOUCHED open 'a'", "TOUCHED os.mkdir 'b'"]
        and done.stderr.count("TOUCHED") == 2
    )


def test_a_mistake_in_the_command_is_said_before_anything_listens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from physisforcing import cli
    from physisforcing.core.video import write_mp4

    videos = tmp_path / "videos"
    videos.mkdir()
    write_mp4(videos / "a.mp4", np.zeros((5, 16, 16, 3), np.uint8), fps=10)
    entry = {"task": "click_bell", "seed": 100000, "replan": 0, "files": ["a.mp4"]}
    about = {"format": "physis-videos-1", "name": "v", "fps": 10, "frames": 5, "height": 16, "width": 16}
    (videos / "manifest.json").write_text(json.dumps(about | {"videos": [entry]}))

    for words, field in (
        (["model=no/such/folder"], "world_model"),
        (["host=0.0.0.0"], "token"),
        (["limits.max_batch=3"], "limits.max_batch_size"),
        (["port=70000"], "port"),
        (["limits.deadline_s=0"], "limits.deadline_s"),
        ([f"model={videos}"], "recorded videos"),
    ):
        assert cli.main(["serve", "worldmodel", *words]) == 2
        assert field in capsys.readouterr().err
