"""The virtual environment, PyTorch and this package with its dependencies."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import debian
from tools import SetupError, output, run, say, succeeds

#: Releases whose CPU build a machine may have configured for pip (a folder of wheels, an index of its own).
CPU_BUILDS = ("2.13.0+cpu", "2.15.0+cpu", "2.14.1+cpu", "2.12.1+cpu", "2.11.0+cpu")
TORCH = "torch>=2.11,<3"
PIP = ("-m", "pip", "--disable-pip-version-check")
PIP_INSTALL = (*PIP, "install", "-qq", "--no-compile", "--no-warn-script-location")


def remove(venv: Path) -> None:
    """Delete an environment that set-up made."""
    if not (venv / "pyvenv.cfg").is_file():
        raise SetupError(f"{venv} is not a virtual environment, so it is not deleted. Fix: move it away")
    shutil.rmtree(venv)


def create(venv: Path) -> None:
    """Make the environment with this interpreter and pip in it: uv where it is present, else venv."""
    python = venv / "bin" / "python"
    if succeeds([python, *PIP, "--version"]):
        return
    if venv.exists():
        remove(venv)
    say(f"making {venv} with Python {sys.version.split()[0]}")
    uv = shutil.which("uv")
    if uv and succeeds([uv, "venv", "--quiet", "--seed", "--python", sys.executable, venv]):
        return
    if succeeds([sys.executable, "-m", "venv", venv]):
        return
    # Debian keeps ensurepip in a package of its own, which a fresh machine lacks.
    shutil.rmtree(venv, ignore_errors=True)
    run([sys.executable, "-m", "venv", "--without-pip", venv])
    with tempfile.TemporaryDirectory() as folder:
        unpacked = debian.unpack(["python3-pip-whl"], Path(folder))
        wheels = sorted(unpacked.glob("usr/share/python-wheels/pip-*.whl"))
        if not wheels:
            raise SetupError("this Python has no pip. Fix: install python3-venv, or uv, and run this again")
        run([python, *PIP_INSTALL, "pip"], env={"PYTHONPATH": str(wheels[0])})


def wants_cuda() -> bool:
    """PHYSIS_CUDA decides where it is set (1 or 0), else whether an NVIDIA GPU answers."""
    asked = os.environ.get("PHYSIS_CUDA")
    if asked not in (None, "", "0", "1"):
        raise SetupError(f"PHYSIS_CUDA: got {asked!r}, wanted 0 or 1")
    return asked == "1" if asked else succeeds(["nvidia-smi", "-L"])


def torch_build(venv: Path) -> str:
    """``cuda`` or ``cpu``: the build of PyTorch that the environment has; empty where torch cannot be imported."""
    code = (
        "import contextlib\n"
        "build = ''\n"
        "with contextlib.suppress(ImportError, OSError):\n"
        "    import torch\n"
        "    build = 'cuda' if torch.version.cuda else 'cpu'\n"
        "print(build)\n"
    )
    return output([venv / "bin" / "python", "-c", code]).strip()


def install_torch(venv: Path) -> None:
    """PyTorch's CPU build without the gigabytes of the CUDA build, or the CUDA build where it is of use.

    An installed build of the other kind is replaced, except that a CUDA build which nobody asked to replace may stay on a
    machine without a GPU: it works there, too.
    """
    cuda, build = wants_cuda(), torch_build(venv)
    if build == ("cuda" if cuda else "cpu") or (build and not cuda and os.environ.get("PHYSIS_CUDA") != "0"):
        return
    if build:
        say(f"replacing the {build.upper()} build of PyTorch")
    # Any installed torch satisfies the requirement for uv, whatever its build: it has to be told to install it again.
    install = ["pip", "install", "--python", venv / "bin" / "python", "--reinstall-package", "torch"]
    if cuda:
        say("installing PyTorch with CUDA (several gigabytes)")
        run([_uv(venv / "bin" / "python"), *install, TORCH])
        if torch_build(venv) != "cuda":
            raise SetupError(
                "uv found no CUDA build of PyTorch: what it installed cannot use a GPU. Fix: let uv reach PyPI (UV_INDEX_URL, "
                "UV_FIND_LINKS and uv.toml may point elsewhere), or take the CPU build: PHYSIS_CUDA=0 make ..."
            )
        return
    _install_cpu_torch(venv, install)


def _install_cpu_torch(venv: Path, install: list[str | Path]) -> None:
    python = venv / "bin" / "python"
    for release in CPU_BUILDS:
        if succeeds([python, *PIP_INSTALL, "--only-binary=torch", f"torch=={release}"]) and torch_build(venv) == "cpu":
            say(f"PyTorch {release} from the wheels that pip is configured with")
            return
    say("installing PyTorch's CPU build through uv")
    if succeeds([_uv(python), *install, "--torch-backend=cpu", TORCH]) and torch_build(venv) == "cpu":
        return
    raise SetupError(
        f"no CPU build of PyTorch for Python {sys.version_info[0]}.{sys.version_info[1]} could be reached, neither through "
        "pip's configuration nor through `uv pip install --torch-backend=cpu`. Fix: allow uv to reach PyTorch's index, or "
        "point pip's find-links at a folder with a CPU wheel, or accept the CUDA build: PHYSIS_CUDA=1 make ..."
    )


def install_package(venv: Path, repository: Path) -> None:
    """This repository, editable, with its dependencies and what the tests need."""
    python = venv / "bin" / "python"
    say("installing the package and its dependencies")
    uv = shutil.which("uv")
    wanted = f"{repository}[dev]"
    if not (uv and succeeds([uv, "pip", "install", "--python", python, "-e", wanted])):
        run([python, *PIP_INSTALL, "-e", wanted])
    _headless_opencv(python)
    install_apart(venv)


def install_apart(venv: Path) -> None:
    """TorchAO, for the tests of training in 8 bits alone, where no other process finds it: diffusers would import it in each of them."""
    folder = venv / "apart"
    if not (folder / "torchao").is_dir():
        install = (*PIP_INSTALL, "--no-deps", "--target", folder, "torchao>=0.18")
        if not succeeds([venv / "bin" / "python", *install]):
            say("torchao could not be installed: the tests of training in 8 bits will be skipped")


def _headless_opencv(python: Path) -> None:
    """SAPIEN asks for opencv-python, which needs OpenGL and GLib; where those are missing the headless build takes over."""
    if succeeds([python, "-c", "import cv2"]):
        return
    say("this machine lacks the graphics libraries of opencv-python; using opencv-python-headless")
    run([python, *PIP, "uninstall", "-qq", "--yes", "opencv-python", "opencv-python-headless"])
    run([python, *PIP_INSTALL, "--no-deps", "opencv-python-headless"])
    if not succeeds([python, "-c", "import cv2"]):
        raise SetupError(f"OpenCV cannot be imported. Fix: run `{python} -c 'import cv2'` and install what it names")


def _uv(python: Path) -> str:
    """Path of uv, installed into the environment where the machine has none."""
    found = shutil.which("uv")
    if found:
        return found
    inside = python.parent / "uv"
    if not inside.is_file():
        run([python, *PIP_INSTALL, "uv"])
    return str(inside)


def site_packages(venv: Path) -> Path:
    """The environment's folder for pure Python packages."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(output([venv / "bin" / "python", "-c", code]).strip())
