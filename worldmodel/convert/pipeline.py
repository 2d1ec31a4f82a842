"""What makes a pipeline of its parts: ``model_index.json``, the scheduler with everything said, the tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from physisforcing.core.files import replace_text

from .parts import Part

#: Shift of the flow-matching schedule: Wan2.2's own configs say 5.0 for image-to-video (diffusers' converter writes 3.0 for A14B)
#: and 12.0 for text-to-video with two experts; Cosmos3's documentation says 10.0 for 720p.
SHIFT, SHIFT_TEXT_EXPERTS, SHIFT_COSMOS = 5.0, 12.0, 10.0
#: Share of the schedule from which on the low-noise expert takes over, as Wan2.2 has it.
BOUNDARY_IMAGE, BOUNDARY_TEXT = 0.9, 0.875
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
#: In a folder with other things, what belongs to a tokenizer.
TOKENIZER_NAMES = (
    "tokenizer*.json",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


def wan_index(parts: Mapping[str, Part], model_type: str | None) -> dict[str, Any]:
    """Content of ``model_index.json`` for Wan's parts: which pipeline class and how it is conditioned.

    More channels in than out is image-to-video with a mask; the same number is TI2V-5B (its 48 channels, or ``model_type`` ti2v) with
    one timestep a token, else text-to-video.
    """
    transformer = parts["transformer"].config
    two, channels = "transformer_2" in parts, transformer["out_channels"]
    per_token = transformer["in_channels"] == channels and (model_type == "ti2v" or channels == 48)
    image = per_token or transformer["in_channels"] > channels
    boundary = (BOUNDARY_IMAGE if image else BOUNDARY_TEXT) if two else None
    index = {"_class_name": "WanImageToVideoPipeline" if image else "WanPipeline"}
    index |= {"boundary_ratio": boundary, "expand_timesteps": per_token}
    if image:
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    return index | {"transformer_2": [None, None]}


def wan_shift(index: Mapping[str, Any]) -> float:
    """The schedule's shift of the pipeline that ``wan_index`` describes."""
    text = index["_class_name"] == "WanPipeline"
    return SHIFT_TEXT_EXPERTS if text and index["boundary_ratio"] is not None else SHIFT


def cosmos_index() -> dict[str, Any]:
    """The same for Cosmos3, as an image-to-video model without sound."""
    return {
        "_class_name": "Cosmos3OmniPipeline",
        "default_use_system_prompt": True,
        "enable_safety_checker": True,
        "use_native_flow_schedule": False,
        "safety_checker": [None, None],
        "sound_tokenizer": [None, None],
    }


def write_pipeline(
    folder: Path,
    index: Mapping[str, Any],
    parts: Iterable[Part],
    tokenizer: tuple[str, Path] | None,
    shift: float,
    needed: Iterable[str],
) -> list[str]:
    """Scheduler, tokenizer and ``model_index.json`` in ``folder``; the last one only where nothing ``needed`` is missing.

    ``tokenizer``: (its name in the pipeline, folder of its files). Returns what is missing.
    """
    import diffusers
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    replace_text(folder / "scheduler" / "scheduler_config.json", scheduler.to_json_string())
    content = {"_diffusers_version": diffusers.__version__, **index}
    content["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    content |= {part.name: [part.library, part.class_name] for part in parts}
    if tokenizer is not None:
        name, place = tokenizer
        content[name] = ["transformers", _copy_tokenizer(place, folder / name)]
    missing = [name for name in needed if name not in content]
    if not missing:
        replace_text(folder / "model_index.json", json.dumps(content, indent=2, sort_keys=True) + "\n")
    return missing


def tokenizer_files(place: Path) -> list[Path]:
    """What of a folder belongs to its tokenizer."""
    patterns = TOKENIZER_FILES if not (place / "config.json").is_file() else TOKENIZER_NAMES
    found = {path for pattern in patterns for path in place.glob(pattern)}
    return sorted(path for path in found if not path.name.endswith((".safetensors.index.json", "model_index.json")))


def _copy_tokenizer(place: Path, folder: Path) -> str:
    """Copies a tokenizer's files; returns the class that opens them."""
    shutil.rmtree(folder, ignore_errors=True)  # of another one, from a conversion that was interrupted
    folder.mkdir(parents=True)
    for path in tokenizer_files(place):
        shutil.copyfile(path, folder / path.name)
    settings = folder / "tokenizer_config.json"
    name = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") if settings.is_file() else None
    return {"T5Tokenizer": "T5TokenizerFast", None: "T5TokenizerFast"}.get(name, name)
