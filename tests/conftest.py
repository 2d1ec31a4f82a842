"""Which tests can run here. A test that cannot is skipped with the reason; nothing is skipped silently."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest


@functools.cache
def _no_simulator() -> str:
    """Why ``sim`` tests cannot run, or an empty string."""
    from physisforcing.core.errors import UserError, VulkanUnavailableError
    from physisforcing.core.vulkan import ensure_vulkan_env
    from physisforcing.envs.robotwin.runtime import runtime_installed

    if not runtime_installed():
        return "needs the RoboTwin runtime (make setup)"
    try:
        ensure_vulkan_env()
    except (VulkanUnavailableError, UserError) as error:
        return f"needs a Vulkan device: {error}"
    return ""


@functools.cache
def _no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "needs an NVIDIA GPU"


@functools.cache
def _no_assets() -> str:
    place = os.environ.get("ROBOTWIN_ASSETS", "")
    found = bool(place) and (Path(place) / "objects").is_dir()
    return "" if found else "needs RoboTwin's official assets (ROBOTWIN_ASSETS)"


REASONS: dict[str, Callable[[], str]] = {"sim": _no_simulator, "gpu": _no_gpu, "assets": _no_assets}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run. The (slow) checks are made only when a test asks for them."""
    for item in items:
        for marker, reason in REASONS.items():
            if item.get_closest_marker(marker) is not None and (why := reason()):
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tracked_files(repository: Path) -> list[Path]:
    """Files that git tracks; outside a checkout, everything that is not an output."""
    import subprocess

    command = ["git", "-C", str(repository), "-c", "safe.directory=*", "ls-files", "-z"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("needs a git checkout")
    names = [name for name in done.stdout.decode().split("\0") if name]
    return [repository / name for name in names if (repository / name).is_file()]
