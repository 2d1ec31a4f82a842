"""What a server's process needs whatever it serves: its command, an output of its own, an end by signal, an end with its parent."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from .connection import TOKEN_VARIABLE, failure
from .errors import UserError


def serve_command(
    argv: Sequence[str], *, verb: str, text: str, schema: type[Any], make: Callable[[Any], Any], what: str
) -> int:
    """``physis serve VERB [field=value ...] [--json]``: runs until interrupted or terminated, then returns 0.

    ``text``: its help; ``make``: a server of the settings ``schema``, which ``configs/serve_VERB.yaml`` composes; ``what``: the field that says
    what is served. A server whose ``run`` gives False leaves work that does not end.
    """
    parser = argparse.ArgumentParser(
        prog=f"physis serve {verb}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    parser.add_argument("--json", action="store_true", help="print one line of JSON when ready")
    options = parser.parse_intermixed_args(list(argv))
    from .config import compose

    config = compose(f"serve_{verb}", options.overrides, schema)
    config.token = config.token or os.environ.get(TOKEN_VARIABLE, "")
    output = own_output()
    server = make(config)
    with stopped_by_signals(server.stop):
        ready = {"host": config.host, "port": server.open(), what: getattr(config, what), "pid": os.getpid()}
        line = f"serving {ready[what]} at {ready['host']}:{ready['port']} (pid {ready['pid']}; Ctrl-C ends it)"
        print(json.dumps({"ok": True, **ready}) if options.json else line, file=output, flush=True)
        ended = server.run()
    if ended is False:
        _end_now()
    return 0


def serve_for_parent(
    make: Callable[[dict[str, Any]], Any], *, told: tuple[type[Exception], ...] = (UserError,), orderly: bool = False
) -> int:
    """A server whose settings its parent process writes, as one line of JSON, to standard input, which is its lifeline: the process ends with
    its parent, also while ``make`` loads. One line with the port, or with what is wrong, goes to standard output. ``told``: the errors that the
    parent is told. ``orderly``: a server that was made is told to stop, and ends in its own time, in place of the process at once."""
    output, lifeline = own_output(), sys.stdin.buffer
    try:
        settings = json.loads(lifeline.readline())
        if not orderly:  # before anything is loaded, so that a parent that is gone is noticed while it is
            stopped_with_parent(lifeline.fileno(), lambda: os._exit(0))
        server = make(settings)
        if orderly:
            stopped_with_parent(lifeline.fileno(), server.stop)
        with stopped_by_signals(server.stop):
            print(json.dumps({"ok": True, "port": server.open()}), file=output, flush=True)
            ended = server.run()
        if ended is False:
            _end_now()
    except told as error:
        print(json.dumps(failure(error)), file=output, flush=True)
        return 1
    return 0


def _end_now() -> None:
    """End this process though something computes on: its thread would hold up, or crash, an interpreter that goes down in order."""
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call ``stop`` while active. Only in the main thread."""
    before = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def own_output() -> IO[str]:
    """Standard output for our lines alone: what libraries print goes to standard error from now on."""
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)
    return ours


def stopped_with_parent(handle: int, stop: Callable[[], None]) -> None:
    """Call ``stop`` once nothing can come through ``handle`` any more, which the parent process holds open as a lifeline."""
    threading.Thread(target=_until_closed, args=(handle, stop), daemon=True, name="lifeline").start()


def _until_closed(handle: int, then: Callable[[], None]) -> None:
    """Unbuffered, because a thread that waits inside a buffered reader keeps the interpreter from ending."""
    while os.read(handle, 4096):
        pass
    then()
