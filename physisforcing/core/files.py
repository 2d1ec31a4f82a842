"""Files and folders that a reader sees whole, written aside, then renamed; and outputs that one process at a time writes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8. A killed writer leaves the old file, never half of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def replace_folder(folder: Path, target: Path) -> None:
    """Give the complete ``folder`` the name ``target``; the folder that had it goes away last. A process that is killed between the two
    renames leaves the old one as ``replaced(target)``, and no ``target``."""
    old = replaced(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(folder, target)
    shutil.rmtree(old, ignore_errors=True)


def put_back(target: Path) -> None:
    """Give the folder that ``replace_folder`` was killed over its name again."""
    if not target.exists() and replaced(target).exists():
        os.rename(replaced(target), target)


def replaced(target: Path) -> Path:
    """What a folder is called while another one takes its name."""
    return target.with_name(f".{target.name}.replaced")


@contextlib.contextmanager
def locked(output: Path, what: str) -> Iterator[None]:
    """One process at a time writes ``output``: ``UserError`` for the others, and where no lock can be made beside it. ``what`` it makes there, for the
    message. The lock ends with the process that has it; it does not hold what that one had started."""
    output = output.resolve()
    lock = output.with_name(f".{output.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            while True:
                held = stack.enter_context(lock.open("w"))
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(held.fileno(), lock):
                    break  # else the one before has ended since it was opened, and its file is nobody's
        except BlockingIOError as error:
            fix = "wait for it, or choose another output="
            raise UserError("output", got=f"{output}, in use", wanted=f"one {what} at a time", fix=fix) from error
        except OSError as error:
            fix = "an output= in a folder that can be written to"
            raise UserError("output", got=f"{lock}: {error.strerror}", wanted="a lock beside it", fix=fix) from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
