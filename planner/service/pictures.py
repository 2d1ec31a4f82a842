"""PNG pictures in messages: the header is checked before anything is decompressed, and only pixels are looked at."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
_RGB = 2
#: Adam7: first row, first column, step of rows, step of columns of each pass.
_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def encode_png(picture_HWC: NDArray[np.uint8]) -> str:
    """RGB uint8 [H,W,3] -> Base64 of a PNG without metadata."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture_HWC)).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


def decode_png(data: str, height: int, width: int) -> NDArray[np.uint8]:
    """Base64 of a PNG -> RGB uint8 [height,width,3].

    ``ValueError`` says what is wrong: Base64, the file's structure, another size than announced, anything but 8-bit RGB (no
    alpha, palette, grey or animation), pixels that are missing. Nothing larger than the announced picture is ever allocated: text
    and colour chunks are dropped unread, and pixels are decompressed after the size in the header was found right.
    """
    from PIL import Image

    try:
        file = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("not standard Base64 (no 'data:' prefix, no line breaks)") from None
    pixels_only = _checked(file, height, width)
    try:
        with Image.open(io.BytesIO(pixels_only), formats=["PNG"]) as picture:
            picture.load()
            array = np.asarray(picture)
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error):
        raise ValueError("the PNG's pixels are damaged or cut off") from None
    if array.shape != (height, width, 3) or array.dtype != np.uint8:
        raise ValueError("not an 8-bit RGB picture")
    return array


def _checked(file: bytes, height: int, width: int) -> bytes:
    """Walk the chunks; returns the file with header, pixels and end alone."""
    if not file.startswith(_SIGNATURE):
        raise ValueError("not a PNG file")
    kept, pixels, at, chunks, interlaced = [_SIGNATURE], [], len(_SIGNATURE), 0, False
    most_chunks = 64 + len(file) // 256
    while True:
        if len(file) - at < 12:
            raise ValueError("the PNG is cut off")
        size, name = struct.unpack_from(">I4s", file, at)
        if size > len(file) - at - 12:
            raise ValueError("the PNG is cut off")
        chunk, at, chunks = file[at : at + 12 + size], at + 12 + size, chunks + 1
        if zlib.crc32(chunk[4:-4]) != struct.unpack(">I", chunk[-4:])[0]:
            raise ValueError("the PNG is damaged (checksum)")
        if chunks > most_chunks:
            raise ValueError("the PNG has too many chunks")
        if (chunks == 1) != (name == b"IHDR"):
            raise ValueError("a PNG begins with one header")
        if chunks == 1:
            interlaced = _check_header(chunk[8:-4], height, width)
        if name in _ANIMATION or name == b"tRNS":
            raise ValueError("animated and transparent PNG pictures are not accepted")
        if name in (b"IHDR", b"IDAT", b"IEND"):
            kept.append(chunk)
        if name == b"IDAT":
            pixels.append(chunk[8:-4])
        if name == b"IEND":
            break
    if at != len(file):
        raise ValueError("bytes after the PNG's end")
    _check_pixels(b"".join(pixels), height, width, interlaced)
    return b"".join(kept)


def _check_pixels(stream: bytes, height: int, width: int, interlaced: bool) -> None:
    """The pixel stream unpacks to exactly the picture: Pillow fills what is missing with black and drops what is too much."""
    passes = _PASSES if interlaced else ((0, 0, 1, 1),)
    sizes = [(len(range(top, height, down)), len(range(left, width, right))) for top, left, down, right in passes]
    wanted = sum(rows * (1 + 3 * columns) for rows, columns in sizes if rows and columns)
    try:
        unpacking = zlib.decompressobj()
        found = len(unpacking.decompress(stream, wanted + 1))
    except zlib.error:
        raise ValueError("the PNG's pixels are damaged") from None
    if found != wanted or not unpacking.eof:
        raise ValueError("the PNG has other pixels than its header says, or they are cut off")


def _check_header(header: bytes, height: int, width: int) -> bool:
    """Whether the picture is interlaced."""
    if len(header) != 13:
        raise ValueError("the PNG's header is damaged")
    found_width, found_height, depth, colour, compression, filtering, interlace = struct.unpack(">IIBBBBB", header)
    if (found_height, found_width) != (height, width):
        raise ValueError(f"the PNG is {found_height}x{found_width}, announced is {height}x{width}")
    if (depth, colour) != (8, _RGB):
        raise ValueError(f"the PNG has {depth} bits and colour type {colour}, wanted 8-bit RGB (type 2)")
    if compression or filtering or interlace > 1:
        raise ValueError("the PNG's header is damaged")
    return bool(interlace)
