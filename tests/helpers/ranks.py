"""Copies of a process for tests: one that is killed, or two ranks that train together. A start of its own costs a process more than it trains.

Ranks are copies of a script in an interpreter of its own, which imports everything once.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed import TCPStore
from tqdm import tqdm

#: Where the ranks of this process meet, until it ends.
_STORES: list[TCPStore] = []
#: Linux's prctl: this signal when the parent dies.
PR_SET_PDEATHSIG = 1


def run_script(name: str, *arguments: object, timeout: float) -> None:
    """Run ``tests/helpers/<name>`` with one numeric thread; what it says on stderr is the message where it fails or takes longer."""
    command = [sys.executable, str(Path(__file__).with_name(name)), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]


def update_lines(run: Path) -> list[dict]:
    """The lines of a run's log that tell of updates."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "grad_norm" in line]


def fork(run: Callable[[], object], told: str) -> int:
    """A copy of this process that calls ``run`` and ends with 0, or with 1 and a line that begins with ``told``. Returns its process id.

    What kills this process reaches the copy, too, and so does the end of the thread that makes it.
    """
    parent = os.getpid()
    gc.freeze()  # what is there already is not looked through in the copy, which would make it copy all memory
    child = os.fork()
    if child:
        gc.unfreeze()
        return child
    code = 1
    try:
        assert ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) == 0
        if os.getppid() != parent:  # it died before that was said
            os._exit(1)
        # bars of all processes draw under one semaphore, which a copy that is killed while it draws would never give back
        tqdm.set_lock(threading.RLock())
        # before there is another thread: the first call after a fork makes torch's pool of threads anew, and where two threads make it
        # at once one of them may find none
        torch.set_num_threads(1)
        run()
        code = 0
    except BaseException as error:
        print(f"{told}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def kill_once(child: int, reached: Callable[[], object], *, within_s: float) -> None:
    """SIGKILL to a copy as soon as ``reached`` is true, which has to be before it ends and in this time."""
    end = time.monotonic() + within_s
    while not reached() and time.monotonic() < end:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it could be killed"
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and reached()


def pair(*cases: Callable[[], object]) -> list[int]:
    """Fork two ranks that run ``cases`` one after the other. Returns their process ids.

    As under ``torchrun`` this process, which has to stay, is where they meet, of each case at a place of its own: a rank that looked for
    the other one before it is there would try again only after a second.
    """
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in cases]
    _STORES.extend(stores)

    def run(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        for store, case in zip(stores, cases, strict=True):
            os.environ["MASTER_PORT"] = str(store.port)
            case()

    return [fork(lambda rank=rank: run(rank), f"rank {rank}") for rank in (0, 1)]


def both(*cases: Callable[[], object]) -> None:
    """``pair``, to its good end. Where one rank fails the other is ended: it may wait for the first one for hours."""
    ranks = pair(*cases)
    ended = dict([os.wait()])
    if any(ended.values()):
        for rank in ranks:
            if rank not in ended:
                os.kill(rank, signal.SIGKILL)
    ended |= dict([os.wait()])
    assert [ended[rank] for rank in ranks] == [0, 0], ended
