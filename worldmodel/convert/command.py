"""A conversion from settings to a report."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.results import config_hash

from ..backbones.folder import save_settings
from . import find, parts, sources, writing
from .configs import read_jsonc
from .parts import Part
from .pipeline import tokenizer_files, write_pipeline
from .verify import verify

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "keep": None}
#: Bytes of one file of weights, as diffusers shards them.
SHARD_BYTES = 5_000_000_000


@dataclass(slots=True, kw_only=True)
class ConvertConfig:
    """Settings of ``physis convert``.

    ``source``: folder or file of a release. ``output``: folder to write; not for ``kind=diffusers``, which is checked alone. ``kind``:
    auto, wan, pf_wan, pf_cosmos, diffusers, or to_wan for the way back. ``dtype``: of the transformers: bf16, fp16, fp32 or keep; modules that diffusers keeps
    in float32 stay so, autoencoder and text encoder have the type of their files. ``config``: JSON with what the tensors' shapes do
    not say. ``tokenizer``: folder of one for a release that has none, or in place of its own. ``sha256``: file name -> checksum that the
    file must have.
    """

    source: str = ""
    output: str | None = None
    kind: str = "auto"
    dtype: str = "bf16"
    config: str | None = None
    tokenizer: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """``UserError`` for what cannot be."""
        if not self.source:
            raise UserError("source", got=self.source, wanted="a folder or file", fix="source=Wan2.2-TI2V-5B")
        if self.kind not in ("auto", *find.KINDS):
            raise unknown_name("kind", self.kind, ("auto", *find.KINDS), see="physis convert --help")
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES, see="physis convert --help")
        for name, digest in self.sha256.items():
            if not re.fullmatch("[0-9a-fA-F]{64}", digest):
                fix = f"run sha256sum {name}"
                raise UserError(f"sha256 of {name}", got=digest, wanted="64 hexadecimal digits", fix=fix)


def run(config: ConvertConfig, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Convert, or check. Returns the report that is also ``conversion.json``. Raises ``UserError`` before anything is written, or for a
    tensor with numbers that are not finite, after which nothing has the output's name."""
    config.check()
    source = Path(config.source).expanduser()
    kind = find.kind_of(source) if config.kind == "auto" else config.kind
    if config.tokenizer is not None and kind in ("diffusers", "to_wan"):
        fix = "leave tokenizer= out; a diffusers folder has its tokenizer in tokenizer/ or text_tokenizer/"
        raise UserError("tokenizer", got=config.tokenizer, wanted=f"none with kind={kind}", fix=fix)
    if kind == "diffusers":
        if config.output is not None:
            fix = "leave output= out: the folder is checked and ready as it is"
            raise UserError("output", got=config.output, wanted="none for a diffusers folder", fix=fix)
        checked, notes = verify(source)
        return {"kind": kind, "source": source.name, "parts": checked, "notes": notes}
    if not config.output:
        raise UserError("output", got=config.output, wanted="a folder to write", fix="output=models/wan")
    if not source.exists():
        raise UserError("source", got=str(source), wanted="a folder or file on this disk", fix="download it first")
    if kind == "to_wan":
        return _write(_to_wan(source, DTYPES[config.dtype]), source, Path(config.output).expanduser(), shard_bytes)
    found = find.find(source, kind, find.asked(config.config, config.sha256, DTYPES[config.dtype]))
    if config.tokenizer is not None:
        name = next(name for name in found.needed if name.endswith("tokenizer"))
        found = replace(found, tokenizer=(name, _tokenizer_folder(Path(config.tokenizer), name)))
    read = {name for part in found.parts for name in part.source.digests}
    for name in config.sha256:
        if name not in read:
            raise unknown_name("sha256", name, read, see="the files of the source")
    return _write(found, source, Path(config.output).expanduser(), shard_bytes)


def _tokenizer_folder(folder: Path, part: str) -> Path:
    """``UserError`` for a folder without a tokenizer. Cosmos3's is a ``text_tokenizer`` whose class and template its config says."""
    folder = folder.expanduser()
    enough = (
        ("tokenizer_config.json",)
        if part == "text_tokenizer"
        else ("tokenizer.json", "tokenizer_config.json", "spiece.model")
    )
    if not any((folder / name).is_file() for name in enough):
        got = str(folder) if folder.is_dir() else f"{folder}: no such folder"
        fix = (
            "download the tokenizer's files (tokenizer.json, tokenizer_config.json) of the model that the release names"
        )
        raise UserError("tokenizer", got=got, wanted=f"a folder with a tokenizer's {' or '.join(enough)}", fix=fix)
    if (settings := folder / "tokenizer_config.json").is_file():
        read_jsonc(settings)  # one that is damaged is said before anything is converted
    return folder


def _to_wan(source: Path, dtype: torch.dtype | None) -> find.Found:
    """The transformers of a diffusers folder under Wan's own names: two experts in a folder each, one in the output itself."""
    if (source / "config.json").is_file():
        folders = {"": source}
    elif (source / "transformer_2").is_dir():
        folders = {folder: source / name for name, folder in find.EXPERTS.items()}
    else:
        folders = {"": source / "transformer"}
    made = [parts.original_transformer(name, folder, dtype) for name, folder in folders.items()]
    return find.Found(kind="to_wan", parts=made, index={}, shift=0.0, needed=())


def _write(found: find.Found, source: Path, output: Path, shard_bytes: int) -> dict[str, Any]:
    from tqdm import tqdm

    plans = [(part, writing.plan_shards(part, shard_bytes)) for part in found.parts]
    needed = sum(shard.bytes for _, shards in plans for shard in shards)
    writing.check_space(output, needed)
    report = _report(found, source)
    with writing.workplace(output, report | {"plan": _plan_hash(found, plans)}) as folder:
        with tqdm(total=needed, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
            for part, shards in plans:
                writing.write_part(part, shards, folder / part.name, bar.update)
        missing = []
        if "first_latent" in found.facts:
            save_settings(folder / "transformer", first_latent=found.facts["first_latent"])
        if found.index:
            missing = write_pipeline(folder, found.index, found.parts, found.tokenizer, found.shift, found.needed)
    if missing:
        how = "; tokenizer=FOLDER gives one" if any(name.endswith("tokenizer") for name in missing) else ""
        report["notes"].append(f"no model_index.json: the source has no {', '.join(missing)}{how}")
    return report | {"output": str(output), "bytes": needed}


def _report(found: find.Found, source: Path) -> dict[str, Any]:
    import diffusers
    import transformers

    digests = {name: digest for part in found.parts for name, digest in part.source.digests.items()}
    files = {entry.file for part in found.parts for entry in part.source.entries.values()}
    return {
        "kind": found.kind,
        "source": source.name,
        "files": [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": digests.get(path.name)}
            for path in sorted(files)
        ],
        "parts": {part.name or "transformer": _told(part) for part in found.parts},
        **({"shift": found.shift} if found.index else {}),
        **({"tokenizer": [path.name for path in tokenizer_files(found.tokenizer[1])]} if found.tokenizer else {}),
        **found.facts,
        "notes": sources.notes(digests.items()),
        "versions": {"diffusers": diffusers.__version__, "transformers": transformers.__version__},
    }


def _told(part: Part) -> dict[str, Any]:
    types = sorted({str(part.stored(name)).removeprefix("torch.") for name in part.shapes})
    return {
        "class": part.class_name,
        "tensors": len(part.shapes),
        "parameters": sum(torch.Size(shape).numel() for shape in part.shapes.values()),
        "dtypes": types,
        "left_out": dict(part.left_out),
    }


def _plan_hash(found: find.Found, plans: list[tuple[Part, list[writing.Shard]]]) -> str:
    """Of everything that decides the bytes of the output: a conversion is continued where it is the same."""
    files = {entry.file for part in found.parts for entry in part.source.entries.values()}
    states = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)]
    shards = [
        [part.name, part.config, shard.name, shard.header.decode("latin-1")] for part, made in plans for shard in made
    ]
    words = tokenizer_files(found.tokenizer[1]) if found.tokenizer is not None else []
    states += [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in words]
    return config_hash({"files": states, "shards": shards, "index": found.index, "shift": found.shift})
