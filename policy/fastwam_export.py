"""A policy's folder as a Fast-WAM release: ``model.safetensors`` under the released names, ``config.json`` and ``dataset_stats.json``.

What such a release cannot express is refused before anything is written; what it may lack is left out and said in the report.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from physisforcing.core.errors import UserError
from physisforcing.core.files import replace_text
from physisforcing.worldmodel.backbones.loading import (
    TensorEntry,
    check_entries,
    file_entries,
    folder_entries,
    read_transformer,
)
from physisforcing.worldmodel.convert.sources import Source
from physisforcing.worldmodel.convert.writing import check_space, plan_shards, workplace, write_part
from physisforcing.worldmodel.storage import fingerprint

from . import fastwam, fastwam_config, fastwam_statistics, normalization
from .backbone import tail
from .checkpoint import EXPERT, SETTINGS, read_settings, transformer_folder
from .normalization import ActionStatistics


@dataclass(slots=True, kw_only=True)
class ReleasedPart:
    """A policy of ours as a release holds one: ``names``: released -> ours; ``read_from``: our name -> (source, name in its file)."""

    names: dict[str, str]
    read_from: dict[str, tuple[Source, str]]
    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any]
    weights_name: str = "model.safetensors"

    def _entry(self, name: str) -> TensorEntry:
        source, inside = self.read_from[self.names[name]]
        return source.entries[inside]

    def stored(self, name: str) -> torch.dtype:
        """The type in which the policy's folder has it."""
        return self._entry(name).dtype

    def read(self, name: str) -> Tensor:
        """A tensor by its released name."""
        source, inside = self.read_from[self.names[name]]
        return source.read(inside)

    def where(self, name: str) -> str:
        """Where it lies, for messages."""
        return f"{self._entry(name).file}: {self.read_from[self.names[name]][1]}"


def export(folder: Path, output: Path) -> dict[str, Any]:
    """A policy's ``folder`` as the release ``output``; returns the report that is also ``conversion.json``. ``UserError`` for what a release
    cannot hold, after which nothing has the output's name."""
    part = released_part(folder)
    (shard,) = plan_shards(part, 2**62)  # LeRobot reads one file
    check_space(output, shard.bytes)
    text, notes = released_statistics(folder)
    config, info, _ = read_settings(folder)
    if changed := fastwam_config.differences(config, info):
        notes.append(f"{fastwam_config.NAME} cannot say: {'; '.join(changed)}")
    report = {
        "kind": "to_fastwam",
        "source": tail(folder),
        "fingerprint": fingerprint(folder),
        "parts": {
            "model": {
                "tensors": len(part.shapes),
                "parameters": sum(torch.Size(shape).numel() for shape in part.shapes.values()),
                "dtypes": sorted({str(part.stored(name)).removeprefix("torch.") for name in part.shapes}),
            }
        },
        "statistics": "none" if text is None else fastwam_statistics.NAME,
        "notes": notes,
    }
    with workplace(output, report) as made:
        write_part(part, [shard], made, lambda _bytes: None)
        if text is not None:
            replace_text(made / fastwam_statistics.NAME, text)
    return report | {"output": str(output), "bytes": shard.bytes}


def released_statistics(folder: Path) -> tuple[str | None, list[str]]:
    """-> (text of ``dataset_stats.json``, what to say about it); None for a policy without statistics.

    The released file itself where the policy was made from one, else what ``statistics.json`` keeps. ``UserError`` for statistics that are
    damaged, that the layout cannot hold exactly, and for a released file that says something else than ``statistics.json``.
    """
    config, _, _ = read_settings(folder)
    widths = {"action_dim": config.action_dim, "state_dim": config.state_dim}
    stored, released = folder / normalization.NAME, folder / fastwam_statistics.NAME
    if not stored.is_file():
        if released.is_file():
            fix = f"copy {stored.name} as well, or leave both out"
            raise UserError(str(stored), got=f"nothing, and a {released.name}", wanted="both", fix=fix)
        return None, [
            f"the policy has no {stored.name}: {released.name} is not written, without which Fast-WAM does not act"
        ]
    statistics = ActionStatistics.load(folder, **widths)
    notes = [fastwam_statistics.told(statistics.kind)]
    if not released.is_file():
        values, missing = fastwam_statistics.write_released(statistics)
        lacks = f"{released.name} lacks what {stored.name} does not keep: {', '.join(missing)}"
        return json.dumps(values, indent=2) + "\n", [*notes, lacks]
    found = fastwam_statistics.read_released(released, statistics.kind, **widths)
    if difference := found.difference(statistics):
        fix = f"delete {released.name}, and it is written from {stored.name}, with which the policy acts"
        raise UserError(str(released), got=difference, wanted=f"what {stored.name} says", fix=fix)
    return released.read_text(encoding="utf-8"), notes


def released_part(folder: Path) -> ReleasedPart:
    """The tensors of a policy's folder under released names. ``UserError`` for a design that a release cannot express, and for files that
    are damaged or do not fit."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    config, info, extra = read_settings(folder)
    for name, value in fastwam.EXPRESSED.items():  # before anything is built: other designs have other tensors
        if getattr(config, name) != value:
            fix = "only policies of the published design have this layout: policy.config.fastwam_compat"
            raise UserError(f"{folder / SETTINGS}: {name}", got=getattr(config, name), wanted=value, fix=fix)
    transformer = transformer_folder(folder, extra["packaged"])
    video = read_transformer(transformer, WanTransformer3DModel)
    model = fastwam.hollow(config, video)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    prefix = "transformer."
    entries = {False: folder_entries(transformer), True: file_entries(folder / EXPERT)}
    read_from: dict[str, tuple[Source, str]] = {}
    for is_expert, found in entries.items():
        mine = {
            name if is_expert else name.removeprefix(prefix): shape
            for name, shape in shapes.items()
            if fastwam.is_expert(name) == is_expert
        }
        check_entries(found, mine, folder)
        source = Source.of_entries(folder, found)
        read_from |= {(name if is_expert else prefix + name): (source, name) for name in mine}
    names = fastwam.released_names(model)
    return ReleasedPart(
        names=names,
        read_from=read_from,
        shapes={released: shapes[ours] for released, ours in names.items()},
        config=fastwam_config.write(config, info, dict(model.transformer.config)),
    )
