"""What the set-up steps share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class SetupError(RuntimeError):
    """Set-up cannot go on; the message says what to do."""


def say(text: str) -> None:
    print(f"set-up: {text}", file=sys.stderr, flush=True)


def run(command: Sequence[str | Path], *, env: dict[str, str] | None = None, quiet: bool = False) -> None:
    """Run a command with its output on stderr; raises ``CalledProcessError``. ``quiet``: show the output only on failure."""
    words = [str(word) for word in command]
    kept = subprocess.PIPE if quiet else sys.stderr
    done = subprocess.run(
        words, stdout=kept, stderr=subprocess.STDOUT if quiet else None, text=True, env={**os.environ, **(env or {})}
    )
    if done.returncode != 0:
        if quiet:
            print(done.stdout, file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, words)


def succeeds(command: Sequence[str | Path], *, env: dict[str, str] | None = None) -> bool:
    """Whether a command runs and exits with 0. Its output is not shown."""
    try:
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, env={**os.environ, **(env or {})}, check=False
        )
    except OSError:
        return False
    return done.returncode == 0


def output(command: Sequence[str | Path], *, env: dict[str, str] | None = None) -> str:
    """Standard output of a command; raises ``CalledProcessError``."""
    done = subprocess.run(
        [str(word) for word in command],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
    return done.stdout
