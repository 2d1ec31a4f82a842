"""A Vulkan device for SAPIEN: the machine's own where it works, else Mesa's software driver.

What is found is noted in the path file that ``physisforcing.vulkan`` reads, so that commands work outside ``make`` too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import debian
from tools import SetupError, say

#: SAPIEN 3.0.3 needs a newer Mesa than the 22.3 of Debian 12; its backports suite has 25.0. SAPIEN also links libX11.
DRIVER = "mesa-vulkan-drivers"
LOADER = ("libvulkan1", "libx11-6", "libstdc++6")
SYSTEM_ICD = Path("/usr/share/vulkan/icd.d")


def noted(venv: Path) -> dict | None:
    """What the path file says, or None when there is none or a file that it names is gone."""
    path = _path_file(venv)
    if not path.is_file():
        return None
    driver = json.loads(path.read_text())
    files = [*driver["driver_files"], *driver["preload"]]
    return driver if all(Path(name).is_file() for name in files) else None


def provide(venv: Path) -> dict | None:
    """Find or install a device that draws, and note it. None, with the reason on stderr, where neither works."""
    path = _path_file(venv)
    path.unlink(missing_ok=True)
    for candidate in (_system(), _software_of_the_system()):
        if candidate is not None and _accept(venv, candidate):
            return candidate
    if not debian.available():
        say("no Vulkan device, and no apt to install Mesa's software driver with. `physis doctor` names the packages")
        return None
    try:
        made = _install_with_root() if os.geteuid() == 0 else None
        if made is not None and _accept(venv, made):
            return made
        made = _unpack_without_root(venv)
        if _accept(venv, made):
            return made
    except (SetupError, subprocess.CalledProcessError) as error:
        say(f"the Vulkan software driver could not be installed: {error}")
        return None
    say("Mesa's software driver was installed but does not draw. `physis doctor` says more")
    return None


def _path_file(venv: Path) -> Path:
    return venv / "physis-vulkan.json"


def _system() -> dict:
    return {"driver_files": [], "preload": [], "origin": "system"}


def _software_of_the_system() -> dict | None:
    """Mesa's software driver alone: a broken hardware driver beside it can keep the loader from working."""
    files = sorted(SYSTEM_ICD.glob("lvp_icd*.json"))
    return {"driver_files": [str(files[0])], "preload": [], "origin": "system software driver"} if files else None


def _install_with_root() -> dict | None:
    say("installing Mesa's Vulkan software driver with apt")
    debian.install(LOADER, backports=[DRIVER]) if _is_bookworm() else debian.install([*LOADER, DRIVER])
    return _software_of_the_system()


def _unpack_without_root(venv: Path) -> dict:
    """Unpack the packages below the environment and point the driver's description at the unpacked file."""
    say("unpacking Mesa's Vulkan software driver into the environment (no root needed)")
    folder = venv / "physis-vulkan"
    shutil.rmtree(folder, ignore_errors=True)
    if _is_bookworm():
        debian.unpack(LOADER, folder, backports=[DRIVER])
    else:
        debian.unpack([*LOADER, DRIVER], folder)
    drivers = sorted(folder.glob("**/libvulkan_lvp.so"))
    if not drivers:
        raise SetupError(f"{DRIVER} brought no libvulkan_lvp.so")
    for other in folder.glob("**/libvulkan_*.so"):
        if other not in drivers:
            other.unlink()
    described = next(folder.glob("usr/share/vulkan/icd.d/lvp_icd*.json"))
    content = json.loads(described.read_text())
    content["ICD"]["library_path"] = str(drivers[0])
    icd = folder / "lvp_icd.json"
    icd.write_text(json.dumps(content, indent=1))
    return {"driver_files": [str(icd)], "preload": _load_order(folder), "origin": f"unpacked in {folder}"}


def _load_order(folder: Path) -> list[str]:
    """The unpacked libraries, each after those it needs: what loads is kept, the rest is tried again."""
    files = {path.resolve() for path in folder.glob("**/*.so.*") if path.is_file() and "gconv" not in path.parts}
    code = (
        "import ctypes, json, sys\n"
        "left, order = json.load(sys.stdin), []\n"
        "while left:\n"
        "    again = []\n"
        "    for name in left:\n"
        "        try:\n"
        "            ctypes.CDLL(name)\n"
        "            order.append(name)\n"
        "        except OSError:\n"
        "            again.append(name)\n"
        "    if len(again) == len(left):\n"
        "        break\n"
        "    left = again\n"
        "print(json.dumps(order))\n"
    )
    listed = json.dumps(sorted(map(str, files)))
    done = subprocess.run([sys.executable, "-c", code], input=listed, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def _accept(venv: Path, candidate: dict) -> bool:
    """Note the candidate and draw a picture with it; the note stays only when the picture is right."""
    path = _path_file(venv)
    path.write_text(json.dumps(candidate, indent=1))
    done = subprocess.run(
        [venv / "bin" / "python", "-m", "physisforcing.vulkan"], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        say(f"Vulkan device: {json.loads(done.stdout)['name']} ({candidate['origin']})")
        return True
    path.unlink()
    return False


def _is_bookworm() -> bool:
    return debian.release().get("VERSION_CODENAME") == "bookworm" and debian.release().get("ID") == "debian"
