"""Processes of environments: a worker that is itself a daemon may have one, and it ends with the worker."""

import subprocess
import sys
import time

from process_state import alive

SCRIPT = """
import functools, multiprocessing, os, signal, sys, types

from physisforcing.envs.processes import EnvProcess

def work(pipe):
    assert multiprocessing.current_process().daemon
    make = functools.partial(types.SimpleNamespace, observation_space=1, action_space=2, close=dict, unwrapped=None)
    environment = EnvProcess(make)
    assert environment.spaces(60) == (1, 2) and multiprocessing.current_process().daemon
    pipe.send(environment.pid)
    signal.pause()

if __name__ == "__main__":
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=work, args=(theirs,), daemon=True)
    worker.start()
    theirs.close()
    print(ours.recv(), flush=True)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
"""


def test_a_daemon_may_have_an_environment_which_ends_with_it(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    pid, deadline = int(run.stdout), time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
