"""Another export's transformer in a policy that is there already: same architecture, same latents, everything else stays."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from physisforcing.core.errors import UserError
from physisforcing.core.files import locked, put_back, replace_folder, replaced
from physisforcing.worldmodel.convert.parts import stock_folder
from physisforcing.worldmodel.convert.writing import plan_shards, write_part

from .backbone import Backbone, check_architecture, check_latents, open_backbone, tail, video_account
from .checkpoint import SETTINGS, TRANSFORMER, read_settings, transformer_folder, write_settings

#: Bytes of a file of weights, as diffusers cuts them.
SHARD_BYTES = 5_000_000_000


def swap_backbone(
    policy: Path | str,
    source: str | Path | Backbone,
    output: Path | str | None = None,
    *,
    autoencoder: str | Path | None = None,
) -> dict[str, Any]:
    """Put the transformer of ``source`` (``backbone.open_backbone``) into the folder ``policy``, or into a copy of it at ``output``.

    Returns what was taken and what was replaced; the same is in ``policy.json``. The transformer's tensors pass one at a time in the type
    of their file; action expert, proprioception, statistics and settings stay. A killed call leaves the folder as it was, or with
    ``output`` none; killed between its last two steps it leaves the folder under a hidden name, and the next call puts it back first.
    ``UserError`` names what differs in the architecture, other latents, a backbone whose weights would be drawn, and another call at work.
    """
    policy = Path(policy)
    target = policy if output is None else Path(output)
    if output is not None and os.path.lexists(target):
        raise UserError("output", got=str(target), wanted="a name that is not taken", fix="output=<another folder>")
    killed = output is None and replaced(target).exists()
    if not killed:
        read_settings(policy)  # names what is no policy before anything is made
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target, "swap"):
        if killed:
            put_back(target)
        return _swap(policy, source, target, autoencoder)


def _swap(policy: Path, source: str | Path | Backbone, target: Path, autoencoder: str | Path | None) -> dict[str, Any]:
    """See ``swap_backbone``."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    from physisforcing.worldmodel.backbones.loading import read_transformer
    from physisforcing.worldmodel.backbones.wan import ConditionerConfig

    config, info, extra = read_settings(policy)
    backbone = source if isinstance(source, Backbone) else open_backbone(source, autoencoder=autoencoder)
    if backbone.drawn:
        fix = "build a new policy on a drawn backbone: a trained expert would read noise"
        raise UserError("backbone", got=f"random:{backbone.name}", wanted="weights", fix=fix)
    check_architecture(
        read_transformer(transformer_folder(policy, extra["packaged"]), WanTransformer3DModel), backbone, tail(policy)
    )
    note = check_latents(info.latents, backbone, tail(policy))
    part = stock_folder(TRANSFORMER, backbone.folder, WanTransformer3DModel)
    shards = plan_shards(part, SHARD_BYTES)
    report = {
        "from": backbone.name,
        **video_account(backbone),
        "weights": "taken",
        "tensors": len(part.shapes),
        "replaced": info.source.get("video", {}).get("from", ""),
        "not_taken": dict(backbone.beside),
        "notes": [] if note is None else [note],
    }
    aside = target.with_name(f".{target.name}.swapping")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(policy, aside, ignore=shutil.ignore_patterns(TRANSFORMER, SETTINGS))
    (aside / TRANSFORMER).mkdir()
    write_part(part, shards, aside / TRANSFORMER, lambda _bytes: None)
    conditioner = extra["conditioner"]
    write_settings(
        aside,
        config,
        dataclasses.replace(info, source={**info.source, "video": report}, latents=info.latents or backbone.latents),
        tap=extra["tap"],
        conditioner=conditioner and ConditionerConfig.of(conditioner),
    )
    replace_folder(aside, target)
    return report
