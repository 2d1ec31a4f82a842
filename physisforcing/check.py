"""``physis check worldmodel``: the contract suite over anyone's world model, each check with a time limit in a process that may die.

The checks run in a worker process that reports them one by one. When a check outlasts its limit or the process ends, that check has
failed; the rest go on in a new process, twice at most.
"""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from physisforcing.core.errors import UserError
from physisforcing.planner.check_worldmodel import (
    LOAD,
    CheckResult,
    ContractSuite,
    check_names,
    summary,
)
from physisforcing.planner.contract_probe import CheckSettings

HELP = """usage: physis check worldmodel MODEL [field=value ...] [--json]

Does a world model do what its spec and the contract say? Every check passes, fails or is skipped with what it needs.

MODEL: {kinds}

settings (field=value):
  images=[a.png,b.png]   contexts to use instead of made-up pictures; best two from the model's own domain
  instructions=[..,..]   two sentences   state_dim=14   joint targets where the spec has no action_spec
  max_samples=4          videos in one request at most; more than the spec's max_batch tests that limit, too
  timeout=300            seconds for each check, loading included; a model that hangs fails the check
  only=[spec,times]      some of the checks   device=cpu   codec= and steps= for world-model folders
  batch_tolerance=2  first_frame_tolerance=30  sensitivity=0.01   in grey levels (0..255)

The current folder is on the module path, so that module:function finds a file that lies there. Naming a module imports it, which runs
its code, in a process of its own with your rights: check nothing that you would not run.

examples:
  physis check worldmodel shipped
  physis check worldmodel my_model:load images=[first.png,second.png]
  physis check worldmodel models/wan2.2-ti2v-5b timeout=3600 device=cuda --json

Exit codes: 0 nothing failed, 1 a check failed, 2 a mistake in the command (such as a model that is not there)."""

#: New worker processes after the first one.
RESTARTS = 2


@dataclass(slots=True, kw_only=True)
class CheckCommand(CheckSettings):
    """Settings of ``physis check worldmodel`` (see ``HELP``) besides those of the suite."""

    world_model: str = ""
    images: list[str] = field(default_factory=list)
    only: list[str] = field(default_factory=list)
    timeout: float = 300.0
    device: str = "cpu"
    codec: str = ""
    steps: int = 0

    def check(self) -> None:
        """``UserError`` for what would fail only in the worker."""
        from physisforcing.core.errors import check_at_least

        check_at_least(self, state_dim=1, max_samples=1, steps=0, timeout=1e-3)
        if len(set(self.instructions)) < 2:
            fix = "instructions=['press the bell','lift the bottle']"
            raise UserError("instructions", got=self.instructions, wanted="two different sentences", fix=fix)
        check_names(self.only)


def main(argv: Sequence[str]) -> int:
    """Entry of ``physis check worldmodel``."""
    words = [word for word in argv if word != "--json"]
    if not words or any(word in ("-h", "--help") for word in words):
        from physisforcing.world_models import KINDS

        print(HELP.format(kinds=KINDS))
        return 0 if words else 2
    from physisforcing.core.config import compose

    command = compose("check_worldmodel", words[1:], CheckCommand)
    command.world_model = words[0]
    command.check()
    as_json = len(words) < len(argv)
    report = check(command, show=None if as_json else lambda result: print(result.line(), flush=True))
    counts = report["counts"]
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print(f"{counts['pass']} passed, {counts['fail']} failed, {counts['skipped']} skipped: {report['model']}")
    return 1 if counts["fail"] else 0


def check(command: CheckCommand, show: Callable[[CheckResult], None] | None = None) -> dict[str, Any]:
    """Run the checks in worker processes: ``{"model", "fingerprint", "counts", "checks": [...]}``. ``show`` sees each result at once.

    Raises ``UserError`` for a model that does not exist or lacks a part.
    """
    pending, results, identity = check_names(command.only), [], {"model": "", "fingerprint": ""}
    for attempt in range(RESTARTS + 1):
        last = attempt == RESTARTS
        for kind, value in _worker_results(command, pending):
            if kind == "identity":
                identity = value
                continue
            result = CheckResult(**value)
            if result.name in pending:  # the load of a second process is reported once
                pending.remove(result.name)
                results.append(result)
                if show is not None:
                    show(result)
            if kind == "lost" and (result.name == LOAD or last):
                pending, dropped = [], pending
                for name in dropped:
                    needs = "a model that answers in time"
                    results.append(CheckResult(name=name, status="skipped", detail=needs))
                    if show is not None:
                        show(results[-1])
        if not pending:
            break
    return {
        "world_model": command.world_model,
        **identity,
        "counts": summary(results),
        "checks": [dataclasses.asdict(result) for result in results],
    }


def _worker_results(command: CheckCommand, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``result``, a result), (``identity``, ...) and at the end, where the process was lost, (``lost``, the failed result)."""
    read_end, write_end = os.pipe()
    job = json.dumps({"command": dataclasses.asdict(command), "names": [LOAD, *(n for n in names if n != LOAD)]})
    worker = [sys.executable, "-c", _START, str(write_end), job]
    # what the model prints goes to stderr: stdout is for the report
    process = subprocess.Popen(
        worker, pass_fds=(write_end,), stdin=subprocess.DEVNULL, stdout=2, start_new_session=True
    )
    os.close(write_end)
    name, finished = LOAD, False
    try:
        with open(read_end, "rb", buffering=0) as stream:
            for message in _messages(stream, command.timeout):
                if "begin" in message:
                    name = message["begin"]
                elif "user_error" in message:
                    raise UserError(**message["user_error"])
                elif "done" in message:
                    finished = True
                elif "identity" in message:
                    yield "identity", message["identity"]
                else:
                    yield "result", message["result"]
    finally:
        lost = _end(process)
    if not finished:
        detail = lost or f"no answer within {command.timeout:g} s"
        yield "lost", {"name": name, "status": "fail", "detail": detail}


#: What the worker runs: the folder in which the command was started comes first on its path, as with ``python -m``.
_START = "import os, sys; sys.path.insert(0, os.getcwd()); from physisforcing.check import work; work(sys.argv[1:])"


def _messages(stream: Any, timeout: float) -> Iterator[dict[str, Any]]:
    """Messages of the worker, one a line, until it closes the pipe or is silent for ``timeout`` seconds."""
    waiting, rest = selectors.DefaultSelector(), b""
    waiting.register(stream, selectors.EVENT_READ)
    until = time.monotonic() + timeout
    while waiting.select(max(0.0, until - time.monotonic())):
        data = stream.read(1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield json.loads(line)
        if lines:
            until = time.monotonic() + timeout


def _end(process: subprocess.Popen[bytes]) -> str:
    """Stop the worker and what it started. How it ended by itself, in words, or '' where it had to be killed."""
    try:
        code = process.wait(timeout=5 if process.poll() is not None else 1)
    except subprocess.TimeoutExpired:
        code = None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    if code is None:
        return ""
    return f"the process ended by {signal.Signals(-code).name}" if code < 0 else f"the process ended with code {code}"


# ---------------------------------------------------------------------- in the worker


def work(arguments: Sequence[str]) -> None:
    """The worker process: run the named checks and write what comes of them to a pipe."""
    job = json.loads(arguments[1])
    with open(int(arguments[0]), "w", encoding="utf-8") as pipe:

        def say(**message: Any) -> None:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()

        try:
            _work(CheckCommand(**job["command"]), job["names"], say)
        except UserError as error:
            got = error.got if error.got is None or isinstance(error.got, str | int | float) else repr(error.got)
            say(user_error={"field": error.field, "got": got, "wanted": error.wanted, "fix": error.fix})
        else:
            say(done=True)
    os._exit(0)  # threads of the model may not keep the process


def _work(command: CheckCommand, names: Sequence[str], say: Callable[..., None]) -> None:
    from physisforcing.core.protocols import WorldModel
    from physisforcing.world_models import find_loader
    from physisforcing.worldmodel.generate import read_picture

    def load() -> WorldModel:
        make = find_loader(
            command.world_model, command.device, codec=command.codec or None, steps=command.steps or None
        )
        return make()

    pictures = [read_picture(Path(image)) for image in command.images]
    suite = ContractSuite(load, command, pictures)
    for name in names:
        say(begin=name)
        result = suite.run(name)
        say(result=dataclasses.asdict(result))
        if name == LOAD:
            say(identity=suite.identity())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
