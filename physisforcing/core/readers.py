"""``open_dataset``: one call for every layout of demonstrations that is read here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .episodes import EpisodeSource
from .errors import DatasetError, UserError

#: What each layout is recognised by.
LAYOUTS = {
    "LeRobot v3": "meta/info.json with codebase_version v3.x",
    "LeRobot v2.1": "meta/info.json with codebase_version v2.x",
    "RoboTwin HDF5": "data/episode0.hdf5, in the folder or one or two below",
    "XPolicyLab HDF5": "data/episode_0000000.hdf5, in the folder or one or two below",
    "WorldArena": "<task>/aloha-agilex_clean_50/aloha-agilex_clean_50/ with video and actions",
}


def detect_layout(root: str | Path) -> str:
    """One of ``LAYOUTS``; ``DatasetError`` names all of them when nothing fits."""
    from .hdf5_robotwin import robotwin_folders
    from .hdf5_xpolicylab import xpolicylab_folders
    from .worldarena import demo_folders

    root = Path(root)
    info = root / "meta" / "info.json"
    if info.is_file():
        try:
            version = str(json.loads(info.read_text(encoding="utf-8")).get("codebase_version"))
        except (ValueError, AttributeError) as error:
            fix = "copy meta/info.json again from its source"
            raise DatasetError(str(info), got=str(error), wanted="a JSON object", fix=fix) from error
        for start, layout in (("v3.", "LeRobot v3"), ("v2.", "LeRobot v2.1")):
            if version.startswith(start):
                return layout
        fix = "convert it with the version of LeRobot that wrote it"
        raise DatasetError(str(info), got=version, wanted="codebase_version v2.x or v3.x", fix=fix)
    if (root / "staging").is_dir():
        fix = "run the same collect command again to finish it"
        raise DatasetError(str(root), got="an unfinished collection", wanted="a dataset", fix=fix)
    if demo_folders(root):
        return "WorldArena"
    robotwin, xpolicylab = robotwin_folders(root), xpolicylab_folders(root)
    if robotwin and xpolicylab:
        got = f"both layouts: {robotwin[0]} and {xpolicylab[0]}"
        raise DatasetError(str(root), got=got, wanted="one layout", fix="open one of these folders")
    if robotwin or xpolicylab:
        return "RoboTwin HDF5" if robotwin else "XPolicyLab HDF5"
    wanted = "; or ".join(f"{name} ({sign})" for name, sign in LAYOUTS.items())
    got = "no such folder" if not root.is_dir() else "none of the known layouts"
    raise DatasetError(str(root), got=got, wanted=wanted, fix="correct the path; docs/data.md shows the layouts")


def open_dataset(
    root: str | Path,
    *,
    instruction: str | None = None,
    repeats: str | None = None,
    fps: float | None = None,
    channels: str | None = None,
) -> EpisodeSource:
    """Open demonstrations of any known layout with the interface of ``LeRobotDataset``.

    The options belong to HDF5 files (see ``open_robotwin``, ``open_xpolicylab``): which instruction, whether repeated rows
    are dropped, rows a second, and the order of colours. ``UserError`` for an option that the layout does not have.
    """
    layout = detect_layout(root)
    options = {"instruction": instruction, "repeats": repeats, "fps": fps, "channels": channels}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    known = {"RoboTwin HDF5": set(options), "XPolicyLab HDF5": set(options) - {"repeats"}}.get(layout, set())
    for name in given:
        if name not in known:
            fix = f"leave {name} out"
            raise UserError(name, got=given[name], wanted=f"no such option for {layout}", fix=fix)
    if layout == "RoboTwin HDF5":
        from .hdf5_robotwin import open_robotwin

        return open_robotwin(root, **given)
    if layout == "XPolicyLab HDF5":
        from .hdf5_xpolicylab import open_xpolicylab

        return open_xpolicylab(root, **given)
    if layout == "WorldArena":
        from .worldarena import WorldArenaDataset

        return WorldArenaDataset(root)
    if layout == "LeRobot v2.1":
        from .lerobot_v21 import LeRobotV21Dataset

        return LeRobotV21Dataset(root)
    from .lerobot import LeRobotDataset

    return LeRobotDataset(root)
