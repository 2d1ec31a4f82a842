"""Where a result came from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def git_commit(folder: Path) -> str | None:
    """Twelve digits of the commit of the checkout that ``folder`` lies in, with ``+`` when tracked files have changes.

    Outside a checkout and where there is no git: what the variable ``PHYSIS_COMMIT`` says (for sources that were copied to
    another machine), else None.
    """
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not head:
        told = os.environ.get("PHYSIS_COMMIT", "").strip()
        return (told.rstrip("+")[:12] + ("+" if told.endswith("+") else "")) or None
    return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
