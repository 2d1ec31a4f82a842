"""Training in 8 bits is tested in a process of its own, with the TorchAO that set-up puts where no other process finds it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

APART = Path(sys.prefix) / "apart"


@pytest.mark.slow
def test_training_in_eight_bits() -> None:
    if importlib.util.find_spec("torchao") is not None:
        pytest.skip("torchao is installed: test_float8.py and test_adamw8bit.py run as they are")
    if not (APART / "torchao").is_dir():
        pytest.skip("needs torchao in the environment's folder apart/ (make setup)")
    files = [str(Path(__file__).with_name(name)) for name in ("test_float8.py", "test_adamw8bit.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    about = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    about["PYTHONPATH"] = os.pathsep.join(filter(None, (str(APART), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, capture_output=True, text=True, env=about, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in", done.stdout.splitlines()[-1]), "none of them is skipped"
