"""Pictures of several cameras as the one picture that a policy sees: the same function in training and in use.

A canvas is a ``core.types.ViewLayout`` with tiles. Tiles are filled by Pillow's bilinear filter, which averages over what a smaller pixel covers,
in integers: the same bytes on every machine, unlike torch's and OpenCV's, whose kernels differ by processor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.types import ViewLayout

from .windows import resize_area

#: Name -> cameras and where they stand. ``robotwin`` and ``libero`` are Fast-WAM's (reference, section 2.5), ``head`` the small models'.
CANVASES = {
    "head": ViewLayout(names=("head",), height=120, width=160),
    "robotwin": ViewLayout(
        names=("head", "left_wrist", "right_wrist"), height=384, width=320,
        tiles=((0, 0, 256, 320), (256, 0, 128, 160), (256, 160, 128, 160)),
    ),
    "libero": ViewLayout(
        names=("image", "wrist_image"), height=224, width=448, tiles=((0, 0, 224, 224), (0, 224, 224, 224)),
    ),
}  # fmt: skip
#: Of how pictures are resized: another one where the same cameras give other pixels.
VERSION = 3
#: What others call the cameras of a canvas; the first name that a dataset or an observation has is taken.
ALIASES = {
    "head": ("head", "cam_high", "head_camera", "cam_head"),
    "left_wrist": ("left_wrist", "cam_left_wrist", "left_camera"),
    "right_wrist": ("right_wrist", "cam_right_wrist", "right_camera"),
    "image": ("image", "agentview", "agentview_image"),
    "wrist_image": ("wrist_image", "robot0_eye_in_hand", "eye_in_hand"),
}


def canvas_layout(name: str, prefix: str = "") -> ViewLayout:
    """The canvas of this name. ``UserError`` for another one, with ``prefix`` before the name of the setting."""
    if name not in CANVASES:
        raise unknown_name(f"{prefix}canvas", name, CANVASES, see="docs/policy.md")
    return CANVASES[name]


def canvas_digest(name: str) -> str:
    """12 hex digits of what a canvas makes of the pictures of its cameras: where they stand and how they are resized."""
    return hashlib.sha256(f"{canvas_layout(name)!r} {VERSION}".encode()).hexdigest()[:12]


def canvas_cameras(
    name: str, known: Mapping[str, object] | tuple[str, ...] | list[str], prefix: str = ""
) -> dict[str, str]:
    """Camera of the canvas -> what it is called among ``known``. ``UserError`` where one is missing, as ``canvas_layout``."""
    found = {}
    for camera in canvas_layout(name, prefix).names:
        names = ALIASES.get(camera, (camera,))
        there = [alias for alias in names if alias in known]
        if not there:
            wanted = f"a camera {camera} (or {', '.join(names[1:])}) for {prefix}canvas={name}"
            got, fix = f"cameras {', '.join(sorted(known))}", f"record that camera, or {prefix}canvas=head"
            raise UserError(f"{prefix}canvas", got=got, wanted=wanted, fix=fix)
        found[camera] = there[0]
    return found


def compose(name: str, pictures: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """One canvas, uint8 [H,W,3], of pictures uint8 [h,w,3] of any size by the names of their cameras.

    ``UserError`` for a missing camera and for a picture that is none.
    """
    layout, found = canvas_layout(name), camera_pictures(name, pictures)
    if not layout.tiles:
        picture, (height, width) = found[layout.names[0]], (layout.height, layout.width)
        if picture.shape[:2] not in ((height, width), (2 * height, 2 * width)):
            wanted = f"{2 * height}x{2 * width}, halved by area, or {height}x{width}, as windows are recorded"
            raise UserError(
                f"images.{layout.names[0]}", got=list(picture.shape[:2]), wanted=wanted, fix="record it at that size"
            )
        return (
            picture if picture.shape[:2] == (height, width) else resize_area(picture)
        )  # as the small models' windows are made
    sizes = dict(zip(layout.names, layout.tiles, strict=True))
    return layout.compose({camera: _resized(picture, sizes[camera][2:]) for camera, picture in found.items()})


def camera_pictures(name: str, pictures: Mapping[str, NDArray[np.uint8]]) -> dict[str, NDArray[np.uint8]]:
    """Camera of the canvas, in its order -> its picture among ``pictures``. ``UserError`` as ``compose``."""
    found = {camera: pictures[alias] for camera, alias in canvas_cameras(name, pictures).items()}
    for camera, picture in found.items():
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            got = f"{picture.dtype} {list(picture.shape)}"
            raise UserError(
                f"images.{camera}", got=got, wanted="uint8 [H,W,3]", fix="give pictures as the camera made them"
            )
    return found


def _resized(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if picture.shape[:2] == size:
        return picture
    from PIL import Image

    image, (height, width) = Image.fromarray(np.ascontiguousarray(picture)), size
    # An axis at a time, since Pillow 13 takes rows first where it is less work, older ones never: both round between the axes.
    columns = image.resize((width, image.height), Image.Resampling.BILINEAR)
    return np.asarray(columns.resize((width, height), Image.Resampling.BILINEAR))
