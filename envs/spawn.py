"""A server in a process of its own, for an environment or a model: started, watched, stopped.

Its settings and a fresh token go in through standard input, which stays open as a lifeline: the server stops when it closes,
so it never outlives the process that started it. Its first line on standard output says where it listens.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import subprocess
import sys
import tempfile
import time
from typing import Any

from physisforcing.core.connection import raise_failure
from physisforcing.core.errors import UserError
from physisforcing.core.message_client import ServerLostError

_LONGEST_LINE = 2**16


class SpawnedServer:
    """``python -m MODULE`` with ``settings``, and a fresh token where they have none, as one JSON line on its standard input.

    ``what``: its name in errors.
    """

    def __init__(
        self,
        module: str,
        settings: dict[str, Any],
        *,
        what: str,
        python: str | None = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        self.token, self.what = str(settings.get("token") or secrets.token_hex(16)), what
        try:
            said = json.dumps({**settings, "token": self.token})
        except TypeError as error:
            fix = "pass names, numbers and lists only"
            raise UserError("options", got=str(error), wanted="values that JSON can hold", fix=fix) from error
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
        command = [python or sys.executable, "-m", module]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, **(variables or {})},
                start_new_session=True,  # an interrupt at the keyboard is for us; we close the lifeline
            )
        except OSError as error:
            self._errors.close()
            fix = "give the path of a Python that has physisforcing installed"
            raise UserError("python", got=command[0], wanted=f"an interpreter ({error.strerror})", fix=fix) from error
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: wait_until_ready says how
            self._process.stdin.write(said.encode() + b"\n")
            self._process.stdin.flush()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self, timeout_s: float) -> int:
        """The port. Raises the server's own ``UserError``, or ``ServerLostError`` when it ends or hangs before listening."""
        line = self._first_line(timeout_s)
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise ServerLostError(f"{self.what} did not start within {timeout_s:g} s{self.post_mortem()}")
        raise_failure(said, peer=self.what)
        return int(said["port"])

    def _first_line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        deadline, line = time.monotonic() + timeout_s, bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    break
                part = os.read(self._process.stdout.fileno(), 4096)
                if not part:
                    break
                line += part
        return bytes(line)

    def post_mortem(self) -> str:
        """How the process ended and its last words, for an error message; empty while it runs and was silent."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        code = self._process.poll()
        state = f"; its process (pid {self.pid}) " + ("is still running" if code is None else f"ended with code {code}")
        return state + self._last_words()

    def _last_words(self, size: int = 2000) -> str:
        if self._errors.closed:
            return ""
        handle = self._errors.fileno()  # the process writes at this file's position, which must stay where it is
        begin = max(0, os.fstat(handle).st_size - size)
        words = os.pread(handle, size, begin).decode("utf-8", "replace").strip()
        return f"\nits last words:\n{words}" if words else ""

    def stop(self, grace_s: float = 10.0) -> None:
        """Close the lifeline; terminate, then kill, a process that does not end in time. Again is harmless."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        for end, wait_s in ((lambda: None, grace_s), (self._process.terminate, 3.0), (self._process.kill, 5.0)):
            end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(wait_s)
                break
        self._errors.close()


class ServerProcess(SpawnedServer):
    """``python -m physisforcing.envs.serve`` with ``options`` for the environment and extra environment ``variables``."""

    def __init__(self, task: str, *, python: str | None, variables: dict[str, str], options: dict[str, Any]) -> None:
        settings = {"task": task, "env": options}
        module, what = "physisforcing.envs.serve", "the environment server"
        super().__init__(module, settings, what=what, python=python, variables=variables)
