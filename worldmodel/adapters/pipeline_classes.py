"""Which diffusers pipelines may be opened, and in what they differ. A folder that names anything else is refused before anything is loaded."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from physisforcing.core.errors import UserError, unknown_name

#: TI2V-5B is released as this class, which takes text alone; its weights take a first frame through the image-to-video class.
TEXT_TO_VIDEO, IMAGE_TO_VIDEO = "WanPipeline", "WanImageToVideoPipeline"
#: Libraries that a pipeline's parts may come from: diffusers imports whatever ``model_index.json`` names.
LIBRARIES = frozenset({"diffusers", "transformers"})


@dataclass(slots=True, frozen=True)
class PipelineClass:
    """``frame_step``: frames are this times k, plus 1. ``side``: both sides divide by it. ``rate``: the argument that takes frames a
    second. ``guidance``: the argument for the guidance scale. ``sized``: height and width are arguments; otherwise the class chooses a
    size by itself. ``guarded``: brings a safety checker;
    ``switch``: with an argument at loading that turns it off. ``modules``: further libraries for its parts.
    """

    frame_step: int
    side: int = 16
    rate: str = ""
    guidance: str = "guidance_scale"
    sized: bool = True
    output: str = "frames"
    guarded: bool = False
    switch: str = ""
    modules: frozenset[str] = frozenset()


CLASSES: dict[str, PipelineClass] = {
    "WanImageToVideoPipeline": PipelineClass(4),
    "CogVideoXImageToVideoPipeline": PipelineClass(4, 8),
    "LTXImageToVideoPipeline": PipelineClass(8, 32, rate="frame_rate"),
    "LTX2ImageToVideoPipeline": PipelineClass(8, 32, rate="frame_rate", modules=frozenset({"ltx2"})),
    "HunyuanVideoImageToVideoPipeline": PipelineClass(4),
    "HunyuanVideo15ImageToVideoPipeline": PipelineClass(
        4, guidance="", sized=False, modules=frozenset({"hunyuan_video1_5"})
    ),
    "CosmosVideoToWorldPipeline": PipelineClass(8, rate="fps", guarded=True),
    "Cosmos2VideoToWorldPipeline": PipelineClass(4, rate="fps", guarded=True),
    "Cosmos2_5_PredictBasePipeline": PipelineClass(4, guarded=True),
    "Cosmos3OmniPipeline": PipelineClass(
        4, rate="fps", output="video", guarded=True, switch="enable_safety_checker", modules=frozenset({"cosmos"})
    ),
}


def read_class(folder: Path, transformer: str = "") -> str:
    """The class that opens the folder: the one that ``model_index.json`` names, after a look at everything it names; for a Wan
    text-to-video pipeline with ``expand_timesteps`` (TI2V-5B) the image-to-video class over the same weights. Any other
    Wan text-to-video pipeline is opened so where ``transformer``, a folder whose weights take the place of its own, was trained here, and so has
    learnt to continue a first frame.

    Raises ``UserError`` for a folder without it, a class or library that is not in the lists here, a Wan pipeline that takes no first
    frame, and Python files in the folder.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        fix = "pipeline.save_pretrained(FOLDER), or download the whole repository in diffusers format"
        raise UserError("pipeline", got=str(folder), wanted="a diffusers folder with model_index.json", fix=fix)
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("pipeline", got=str(index), wanted="JSON", fix=f"copy the file again ({error})") from error
    name = content.get("_class_name") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise UserError("pipeline", got=f"_class_name {name!r}", wanted="the name of one class", fix="no custom code")
    if name == TEXT_TO_VIDEO:
        name = _with_first_frame(content, transformer)
    if name not in CLASSES:
        raise unknown_name("pipeline", name, CLASSES, see="docs/bring_your_world_model.md")
    code = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    if code:
        fix = "use the folder without its code; only classes of diffusers and transformers are loaded"
        raise UserError("pipeline", got=code[0], wanted="a folder without Python files", fix=fix)
    allowed = LIBRARIES | CLASSES[name].modules
    for part, source in content.items():
        if isinstance(source, list) and source and source[0] is not None and source[0] not in allowed:
            wanted = f"parts from {', '.join(sorted(allowed))}"
            raise UserError(f"pipeline.{part}", got=source, wanted=wanted, fix="convert the folder with diffusers")
    return name


def takes_text_alone(index: dict[str, Any]) -> bool:
    """Whether this ``model_index.json`` is that of a Wan pipeline whose own transformers were never shown a first frame."""
    return index.get("_class_name") == TEXT_TO_VIDEO and index.get("expand_timesteps") is not True


def _trained_here(transformer: str) -> bool:
    from ..backbones.folder import read_settings, transformer_folder

    return bool(transformer) and "first_latent" in read_settings(transformer_folder(Path(transformer)))


def _with_first_frame(content: dict[str, Any], transformer: str) -> str:
    """The class with which a Wan text-to-video folder takes a first frame. ``UserError`` where its weights cannot."""
    if takes_text_alone(content) and not _trained_here(transformer):
        got = f"{TEXT_TO_VIDEO} without expand_timesteps: text to video, its transformer takes no first frame"
        fix = "use an image-to-video folder, such as Wan2.2-I2V-A14B or Wan2.2-TI2V-5B"
        raise UserError("pipeline", got=got, wanted=f"{IMAGE_TO_VIDEO}, or expand_timesteps: true", fix=fix)
    return IMAGE_TO_VIDEO


def check_size(kind: PipelineClass, pipeline: Any, height: int, width: int, frames: int) -> None:
    """``UserError`` for a size or length that the pipeline would change in silence."""
    side = math.lcm(kind.side, _patch(pipeline))
    for field, value in (("height", height), ("width", width)):
        if kind.sized and value % side:
            near = max(side, round(value / side) * side)
            raise UserError(field, got=value, wanted=f"a multiple of {side}", fix=f"{field}={near}")
    if frames < kind.frame_step + 1 or (frames - 1) % kind.frame_step:
        near = max(1, round((frames - 1) / kind.frame_step)) * kind.frame_step + 1
        raise UserError("frames", got=frames, wanted=f"{kind.frame_step}k+1, k at least 1", fix=f"frames={near}")


def _patch(pipeline: Any) -> int:
    """Pixels of one token's side where the pipeline says it; 1 where it does not."""
    scale = getattr(pipeline, "vae_scale_factor_spatial", None) or getattr(pipeline, "vae_spatial_compression_ratio", 1)
    transformer = getattr(pipeline, "transformer", None) or getattr(pipeline, "transformer_2", None)
    patch = getattr(getattr(transformer, "config", None), "patch_size", 1)
    patch = patch[-1] if isinstance(patch, list | tuple) else patch
    return int(scale) * int(patch or 1)
