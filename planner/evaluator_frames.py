"""The pictures that a judge sees, kept without loss: one PNG an episode, the recording above, the imagined video below."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError


def write_strip(
    path: Path, reference_THWC: NDArray[np.uint8], rollout_THWC: NDArray[np.uint8], about: dict[str, Any]
) -> None:
    """Both videos' chosen pictures, of one size, in two rows; ``about`` (JSON) goes into the file. Appears whole or not at all."""
    from PIL import Image, PngImagePlugin

    height, width = rollout_THWC.shape[1:3]
    assert reference_THWC.shape[1:] == rollout_THWC.shape[1:], "pictures of one size"
    columns = max(len(reference_THWC), len(rollout_THWC))
    sheet = np.zeros((2 * height, columns * width, 3), np.uint8)
    for row, part in enumerate((reference_THWC, rollout_THWC)):
        for column, picture in enumerate(part):
            place = slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)
            sheet[place] = picture
    text = PngImagePlugin.PngInfo()
    size = {"reference": len(reference_THWC), "rollout": len(rollout_THWC), "height": height, "width": width}
    text.add_text("Comment", json.dumps(about | {"strip": size}))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    Image.fromarray(sheet).save(partial, "PNG", pnginfo=text)
    os.replace(partial, path)


def read_strip(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8], dict[str, Any]]:
    """(pictures of the recording, of the imagined video, ``about``). ``UserError`` for a file that is not such a strip."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            about = json.loads(picture.info["Comment"])
            strip = about.pop("strip")
            sheet = np.asarray(picture.convert("RGB"))
        counts, height, width = (strip["reference"], strip["rollout"]), strip["height"], strip["width"]
        if sheet.shape[:2] != (2 * height, max(counts) * width):
            raise ValueError(f"{sheet.shape[0]}x{sheet.shape[1]} pixels")
    except (OSError, KeyError, TypeError, ValueError, SyntaxError, AttributeError) as error:
        fix = "delete it: it is imagined again"
        raise UserError(str(path), got=str(error)[:120], wanted="pictures that an evaluation wrote", fix=fix) from error
    rows = sheet.reshape(2, height, max(counts), width, 3).swapaxes(1, 2)
    return rows[0, : counts[0]].copy(), rows[1, : counts[1]].copy(), about
