"""Any world model by one string: shipped weights, a folder of ours, a diffusers pipeline, recorded videos, a factory, a server.

This joins rooms: it knows where each kind lives, and imports it when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from physisforcing.core.errors import UserError

if TYPE_CHECKING:
    from physisforcing.core.protocols import WorldModel

KINDS = """a world model is one of
  shipped              the weights that come with the package
  FOLDER               a world-model folder (world_model.json), with its codec in vae/ beside it
  FOLDER or FILE.json  a diffusers image-to-video pipeline with physis_pipeline.json in it, or its settings file elsewhere
  FOLDER               recorded videos with a manifest.json
  module:function      a Python function without arguments that returns a WorldModel; importing it runs its code
  http://HOST:PORT     a world-model service"""


def load_any(name: str, device: str = "cpu", *, codec: str | None = None, steps: int | None = None) -> WorldModel:
    """The world model called ``name`` (see ``KINDS``). ``codec`` and ``steps`` are for our own folders.

    Raises ``UserError`` for a name that is none of them and for a folder that lacks a part.
    """
    return find_loader(name, device, codec=codec, steps=steps)()


def find_loader(
    name: str, device: str = "cpu", *, codec: str | None = None, steps: int | None = None
) -> Callable[[], WorldModel]:
    """What makes the model called ``name``, each time it is called; the name is checked here, nothing is loaded yet."""
    from physisforcing.planner.model_sources import source_kind

    path, kind = Path(name), source_kind(name)
    if kind == "service":
        return lambda: _served(name)
    if kind == "factory":
        from physisforcing.worldmodel.adapters.factory import find_factory

        return find_factory(name)
    if kind == "world_model":
        return lambda: _ours(name, device, codec, steps)
    if kind == "diffusers_pipeline":
        from physisforcing.worldmodel.adapters.diffusers_pipeline import open_pipeline

        return lambda: open_pipeline(path, device)
    if kind == "video_folder":
        return lambda: _videos(path)
    got = f"{name} ({'holds none of the files below' if path.exists() else 'no such file or folder'})"
    wanted = "world_model.json, model_index.json or manifest.json in a folder, shipped, module:function or a URL"
    raise UserError("world_model", got=got, wanted=wanted, fix="check the path; physis check worldmodel --help")


def _ours(name: str, device: str, codec: str | None, steps: int | None) -> WorldModel:
    from physisforcing.core.paths import weights_root
    from physisforcing.worldmodel.model import load_world_model

    folder = weights_root() / "worldmodel" if name == "shipped" else Path(name)
    codec = str(codec_folder(folder, codec))
    return load_world_model(folder, device, codec=codec, steps=steps)


def codec_folder(folder: Path, codec: str | None) -> Path:
    """The codec of the world-model ``folder``: the one that is named, the packaged one for ``shipped``, ``vae`` beside it by default."""
    from physisforcing.core.paths import weights_root

    if codec == "shipped":
        return weights_root() / "vae"
    return Path(codec) if codec else folder.parent / "vae"


def _videos(path: Path) -> WorldModel:
    from physisforcing.worldmodel.adapters.video_folder import VideoFolderWorldModel

    return VideoFolderWorldModel(path)


def _served(url: str) -> WorldModel:
    from physisforcing.planner.service.client import HttpWorldModel

    return HttpWorldModel(url)
