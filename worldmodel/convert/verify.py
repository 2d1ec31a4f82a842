"""A diffusers folder, checked tensor by tensor and left as it is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from physisforcing.core.errors import UserError

from ..backbones import loading
from .configs import read_jsonc
from .find import STOCK
from .parts import TEXT_WEIGHTS_NAME

#: Two experts of image-to-video: diffusers' converter wrote another shift for them than Wan's own config has.
WAN_SHIFT = 5.0


def verify(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """-> (part -> what was checked, notes) for a pipeline's folder or a single model's.

    Raises ``UserError`` (see ``backbones.loading``) for the first tensor or file that does not fit. Parts of other classes are told
    as not checked.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return {folder.name: _model(folder)}, []
    listed = read_jsonc(index)
    names = [name for name, value in listed.items() if isinstance(value, list) and value and value[0] is not None]
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(
            str(index), got=outside[0], wanted="names of folders beside it", fix="copy the whole folder again"
        )
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        fix = "copy or download the whole folder"
        raise UserError(str(index), got=f"no folder {missing[0]}", wanted="a folder for each part", fix=fix)
    models = [name for name in names if (folder / name / "config.json").is_file()]
    return {name: _model(folder / name) for name in models}, _notes(folder, listed)


def _model(folder: Path) -> dict[str, Any]:
    import diffusers

    content = read_jsonc(folder / "config.json")
    name = content.get("_class_name") or (content.get("architectures") or ["?"])[0]
    if name in STOCK:
        kind = getattr(diffusers, name)
        model = loading.build_empty(kind, loading.read_transformer(folder, kind))
        entries, shapes = loading.folder_entries(folder), loading.shapes_of(model)
    elif name == "UMT5EncoderModel":
        entries, shapes = loading.folder_entries(folder, TEXT_WEIGHTS_NAME), _umt5_shapes(folder)
    else:
        return {"class": name, "checked": False}
    loading.check_entries(entries, shapes, folder)
    types = Counter(str(entry.dtype).removeprefix("torch.") for entry in entries.values())
    return {"class": name, "checked": True, "tensors": len(entries), "dtypes": dict(types)}


def _umt5_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from accelerate import init_empty_weights
    from transformers import UMT5Config, UMT5EncoderModel

    with init_empty_weights(include_buffers=False):
        model = UMT5EncoderModel(UMT5Config.from_pretrained(folder, local_files_only=True))
    return {name: shape for name, shape in loading.shapes_of(model).items() if name != "encoder.embed_tokens.weight"}


def _notes(folder: Path, listed: dict[str, Any]) -> list[str]:
    settings = folder / "scheduler" / "scheduler_config.json"
    if listed.get("_class_name") != "WanImageToVideoPipeline" or not settings.is_file():
        return []
    shift = read_jsonc(settings).get("flow_shift")
    if shift == WAN_SHIFT:
        return []
    return [f"scheduler: flow_shift is {shift}; Wan2.2's own config says {WAN_SHIFT} (3.0 for 480p)"]
