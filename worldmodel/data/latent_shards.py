"""The files of a latent store: what the large backbones train on, made once by ``physis data latents``.

A store is a folder::

    latents.json                       what all windows share: autoencoder, text encoder, frame rate, teachers
    windows.jsonl                      one line a window, in the order of datasets, episodes and starts
    81x480x640/<content>.safetensors   the windows of one episode or clip, of that many frames, rows and columns of pixels
    targets/<recipe>/<content>.safetensors    physics targets of the same windows, as ``data.target_shards`` writes them
    actions/<content>.safetensors      states and actions of the episodes that have them (``latent_actions.py``)

It needs none of the datasets it was made of, and may be moved. A shard holds ``latents_WCFhw`` (normalised, the mode of the
autoencoder), of a backbone with conditioning channels also ``condition_WCFhw`` (the first picture and grey behind it), and the sentence:
``text_LD``, embeddings without the zeros behind them, or ``text_L``, token ids int64.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.files import replace_text

SCHEMA = "physisforcing.latents/1"
STORE_NAME, WINDOWS_NAME = "latents.json", "windows.jsonl"
#: How the backbones read a sentence.
KINDS = ("wan", "cosmos3")


@dataclass(slots=True, kw_only=True)
class StoreInfo:
    """What all windows of a store share.

    ``kind``: one of ``KINDS``. ``latents``, ``text``: fingerprints of the autoencoder (``storage.latents_fingerprint``) and of what read
    the sentences. ``channels``, ``stride``: of the latents. ``conditioned``: whether there are latents of the first picture and grey.
    ``fps``: frames a second of the videos. ``teachers``: who made the targets, by kind, or None where there are none. ``canvas``: how several
    cameras became one picture (``canvas.py``), "" where one camera is seen; ``canvas_digest``: what that canvas did then.
    """

    kind: str
    latents: str
    text: str
    channels: int
    stride: tuple[int, int, int]
    conditioned: bool
    fps: float
    teachers: dict[str, Any] | None = None
    canvas: str = ""
    canvas_digest: str = ""

    def __post_init__(self) -> None:
        self.stride = (int(self.stride[0]), int(self.stride[1]), int(self.stride[2]))


@dataclass(slots=True, kw_only=True, frozen=True)
class LatentWindow:
    """One line of ``windows.jsonl``.

    ``shard``, ``row``: where its latents are; ``targets``, ``target_row``: its physics targets, "" and -1 where it has none; paths are
    relative to the store. ``shape``: [C,F,h,w] of its latents. ``source``, ``episode``, ``start``: what it was cut out of, for messages;
    ``content``: digest of the episode, which with ``start`` and ``shape`` tells one window from another. ``actions``: the file of its episode's
    states and actions, "" where there are none. ``task``: the name of its episode's task, "" where none is known.
    """

    shard: str
    row: int
    shape: tuple[int, int, int, int]
    caption: str
    source: str
    episode: int
    start: int
    targets: str = ""
    target_row: int = -1
    content: str = ""
    actions: str = ""
    task: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def identity(self) -> tuple[str, int, tuple[int, ...]]:
        """Of two windows with the same, one is superfluous."""
        return self.content or f"{self.shard} {self.row}", self.start, self.shape

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.source} episode {self.episode} from step {self.start}"


def write_store(folder: Path, info: StoreInfo, windows: Iterable[LatentWindow]) -> None:
    """Write ``latents.json`` and ``windows.jsonl``; a reader sees the old files or whole new ones."""
    lines = [json.dumps(asdict(window), ensure_ascii=False) for window in windows]
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / STORE_NAME, json.dumps({"schema": SCHEMA, **asdict(info)}, indent=2) + "\n")
    replace_text(folder / WINDOWS_NAME, "".join(f"{line}\n" for line in lines))


def read_store(folder: Path) -> tuple[StoreInfo, list[LatentWindow]]:
    """What ``write_store`` wrote. ``DatasetError`` for a folder that is none and for a line that is no window."""
    path = folder / STORE_NAME
    fix = "physis data latents makes one"
    if not path.is_file():
        raise DatasetError("data.latents", got=str(folder), wanted=f"a folder with {STORE_NAME}", fix=fix)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("schema", None) != SCHEMA:
            raise ValueError(f"not {SCHEMA}")
        info = StoreInfo(**values)
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise DatasetError(str(path), got=str(error), wanted=f"what {SCHEMA} says", fix=fix) from error
    windows = []
    for number, line in enumerate((folder / WINDOWS_NAME).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            windows.append(LatentWindow(**json.loads(line)))
        except (ValueError, TypeError) as error:
            known = ", ".join(item.name for item in fields(LatentWindow))
            where = f"{folder / WINDOWS_NAME} line {number}"
            raise DatasetError(where, got=line[:80], wanted=f"an object with {known}", fix=fix) from error
    return info, windows


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of one episode's windows aside, with their checksum, and rename the file."""
    from safetensors.torch import save_file

    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        save_file(kept, aside, metadata={"latents": json.dumps({"schema": SCHEMA, "payload_sha256": _payload(kept)})})
        aside.chmod(0o644)  # safetensors writes for the owner only
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_window(folder: Path, window: LatentWindow) -> dict[str, Tensor]:
    """``latents_CFhw``, ``condition_CFhw`` where there is one, and ``text_LD`` or ``text_L`` of a window, on the CPU.

    ``DatasetError`` for a shard that is missing, damaged or not the window's. Its checksum is compared once a process.
    """
    found = {}
    with _opened(folder, window) as file:
        check_shard(folder / window.shard)
        for name in file.keys():  # noqa: SIM118 (not a dict)
            whole = file.get_slice(name)
            stem, axes = name.split("_")
            found[name if axes[0] != "W" else f"{stem}_{axes[1:]}"] = whole[window.row] if axes[0] == "W" else whole[:]
        if tuple(found["latents_CFhw"].shape) != window.shape:
            raise ValueError(f"latents of shape {list(found['latents_CFhw'].shape)}, not {list(window.shape)}")
    return found


def sentence_length(folder: Path, window: LatentWindow) -> int:
    """Tokens of the sentence of a window, by the header of its shard alone. ``DatasetError`` as ``read_window``."""
    with _opened(folder, window) as file:
        name = "text_LD" if "text_LD" in file.keys() else "text_L"  # noqa: SIM118 (not a dict)
        return int(file.get_slice(name).get_shape()[0])


@contextlib.contextmanager
def _opened(folder: Path, window: LatentWindow) -> Iterator[Any]:
    """The shard of a window. ``DatasetError`` where it is missing, and where what is done with it shows that it is damaged."""
    from safetensors import SafetensorError, safe_open

    path, again = folder / window.shard, "run physis data latents again"
    name = f"latents of {window.name}"
    if not path.is_file():
        raise DatasetError(name, got="none", wanted=str(path), fix=again)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, KeyError, IndexError, OSError) as error:
        fix = f"delete it and {again}"
        raise DatasetError(name, got=f"{path}: {error}", wanted="a whole shard", fix=fix) from error


def check_shard(path: Path) -> None:
    """``ValueError`` where the tensors of a file of ``write_shard`` do not match its checksum. They are read once a process."""
    state = path.stat()
    _verify(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=1 << 16)
def _verify(path: Path, _modified: int, _size: int) -> None:
    """``ValueError`` where a shard's tensors do not match its checksum; once a process and state of the file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        said = json.loads((file.metadata() or {})["latents"])
        if said["schema"] != SCHEMA:
            raise ValueError(f"not {SCHEMA}")
        if said["payload_sha256"] != _payload({name: file.get_tensor(name) for name in file.keys()}):  # noqa: SIM118 (not a dict)
            raise ValueError("its tensors do not match its checksum")


def _payload(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(memoryview(value.reshape(-1).view(torch.uint8).numpy()) if value.numel() else b"")
    return digest.hexdigest()


def check_same(stores: Mapping[Path, StoreInfo]) -> StoreInfo:
    """What several stores share. ``UserError`` names the first that differs in what a run needs to be one."""
    (first, info), *others = stores.items()
    for folder, other in others:
        for name in (item.name for item in fields(StoreInfo)):
            if getattr(other, name) != getattr(info, name):
                fix = "make them with the same model=, fps=, teacher= and canvas="
                if name == "canvas_digest":
                    fix = "make the older one again: its canvas was put together in another way"
                wanted = f"{getattr(info, name)!r}, as in {first}"
                raise UserError(f"data.latents: {name} of {folder}", got=getattr(other, name), wanted=wanted, fix=fix)
    return info
