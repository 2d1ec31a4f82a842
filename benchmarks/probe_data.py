"""Windows of demonstrations in one file: latents, conditions and raw physics targets, for machines without the dataset.

``physics_choices.py --prepare FILE`` writes it; ``probe.py`` and ``physics_choices.py`` read it. It holds a training and a held-out part.
Raw targets are tracks, visibility, depth and bodies of every window, so that every choice of eq. (1)-(8) can be made again without the
videos. To be small, latents are whole numbers of 1/16 (an error of 0.018, root mean square, under noise of 0.1 or more) and latent frames
that windows share are stored once; the encoder's features are whole numbers of half a standard deviation (an error of about 0.015 in
a cosine), kept for the training part at the tokens that one of the named choices reads; reading others is an error. A name that
ends in ``.xz`` is compressed.
"""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.errors import UserError
from physisforcing.core.types import PointTracks
from physisforcing.worldmodel.codec import load_codec
from physisforcing.worldmodel.data.batches import BankTargets, WindowBank, build_bank
from physisforcing.worldmodel.data.target_shards import EpisodeTargets, TargetRecipe, content_digest, read_shard
from physisforcing.worldmodel.data.window_targets import reduce_shard
from physisforcing.worldmodel.data.windows import FrameStore, WindowTable, read_episodes, window_steps
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.storage import latents_fingerprint
from physisforcing.worldmodel.teachers.degraded import degrade

SCHEMA = "physisforcing.probe-data/2"
LATENT_UNITS = 16
#: Steps of the stored features in one standard deviation.
FEATURE_UNITS = 2
#: Windows that are reduced at once.
CHUNK = 256
#: Choices that decide which tokens a window reads.
REGIONS = (
    *("motion", "visible_steps", "camera_motion", "dead_zone", "depth", "depth_eps"),
    *("select", "top_k", "min_motion", "mask"),
)

Arrays = dict[str, NDArray[Any]]


@dataclass(slots=True, kw_only=True)
class Part:
    """The training or held-out windows. ``plain``: the bank without targets, on the CPU; ``shard``: raw targets of all windows, whose
    "start" is the window's row; ``episodes``: task, seed and content digest of each episode of the table."""

    plain: WindowBank
    shard: EpisodeTargets
    recipe: TargetRecipe
    episodes: list[dict[str, Any]]

    def bank(self, physics: PhysicsConfig, device: torch.device, *, degraded: bool = False) -> WindowBank:
        """Windows on ``device`` with targets by these choices; none with both lambdas 0. ``degraded``: tracks as bad as a learned
        tracker's, with the errors that ``teacher=degraded`` makes. Raises ``UserError`` for tokens whose features are not stored."""
        kept = torch.bfloat16 if device.type == "cuda" else torch.float32
        plain = self.plain
        bank = WindowBank(
            table=plain.table,
            latents_WCFhw=plain.latents_WCFhw.to(device, kept),
            text_SLD=plain.text_SLD.to(device),
            sentence_W=plain.sentence_W.to(device),
            proprioception_WKA=plain.proprioception_WKA.to(device),
        )
        if physics.lambda_pix > 0 or physics.lambda_sem > 0:
            bank.targets = self.targets(physics, device, degraded=degraded)
        return bank

    def targets(self, physics: PhysicsConfig, device: torch.device, *, degraded: bool = False) -> BankTargets:
        shard = self.degraded() if degraded else self.shard
        rows = range(len(self.plain.table))
        parts = [
            reduce_shard(shard, rows[first : first + CHUNK], len(rows), self.recipe, physics)
            for first in range(0, len(rows), CHUNK)
        ]
        made, names = (
            parts[0],
            ("points_WFN2", "visible_WFN", "select_WN", "mask_WFhw", "body_WFhw", "token_WK", "relation_WR"),
        )
        for name in names:
            setattr(made, name, torch.cat([getattr(part, name) for part in parts]))
        made.teacher_EhwC, made.teacher_WF = (
            torch.from_numpy(shard.features_EhwC),
            torch.from_numpy(shard.rows_WF).long(),
        )
        if physics.lambda_sem > 0 and physics.relations == "features" and len(made.teacher_EhwC) > 1:
            known_Ehw = (made.teacher_EhwC != 0).any(-1)
            if bool((made.mask_WFhw & ~known_Ehw[made.teacher_WF]).any()):
                fix = "write the file again with this choice among those named"
                raise UserError("windows", got="tokens without features", wanted="the tokens of this choice", fix=fix)
        return BankTargets(row_W=torch.arange(len(rows), device=device), targets=made.to(device))

    def degraded(self) -> EpisodeTargets:
        """The raw targets with the default errors of ``teachers/degraded.py``, seeded as ``data/target_maker.py`` does."""
        shard, limit = self.shard, np.iinfo(np.int16).max
        points, visible = np.empty_like(shard.points_WTN2), np.empty_like(shard.visible_WTN)
        table = self.plain.table
        for row, (place, start) in enumerate(zip(table.episode_W.tolist(), table.start_W.tolist(), strict=True)):
            tracks = PointTracks(
                points_TN2=shard.points_WTN2[row].astype(np.float32) / shard.subpixels,
                visible_TN=shard.visible_WTN[row],
                size=shard.size,
                body_N=shard.body_WN[row],
                depth_N=shard.depth_WN[row],
            )
            seed = [int(self.episodes[place]["content"][:16], 16), start // self.recipe.start_stride]
            found = degrade(tracks, np.random.default_rng(np.random.SeedSequence(seed)))
            points[row] = np.clip(np.rint(found.points_TN2 * shard.subpixels), -limit, limit)
            visible[row] = found.visible_TN
        return replace(shard, points_WTN2=points, visible_WTN=visible)


def rows_of(bank: WindowBank, rows: Sequence[int] | Tensor) -> WindowBank:
    """A bank of some windows of ``bank``."""
    rows = torch.as_tensor(rows)
    at = rows.to(bank.latents_WCFhw.device)
    targets = bank.targets
    if targets is not None:
        assert isinstance(targets, BankTargets)
        targets = BankTargets(row_W=targets.row_W[at], targets=targets.targets)
    return WindowBank(
        table=WindowTable(episode_W=bank.table.episode_W[rows], start_W=bank.table.start_W[rows]),
        latents_WCFhw=bank.latents_WCFhw[at],
        text_SLD=bank.text_SLD,
        sentence_W=bank.sentence_W[at],
        proprioception_WKA=bank.proprioception_WKA[at],
        targets=targets,
    )


def load(path: Path) -> tuple[dict[str, Part], dict[str, Any]]:
    """The parts ``train`` and ``heldout`` of a file, and what it says of itself. Raises ``UserError`` for another file."""
    from safetensors.numpy import load as parse

    data = path.read_bytes()
    if path.suffix == ".xz":
        data = lzma.decompress(data)
    size = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"].get("probe", "{}"))
    if about.get("schema") != SCHEMA:
        fix = "physics_choices.py --prepare FILE --train DATASET --heldout DATASET"
        raise UserError(str(path), got=about.get("schema"), wanted=SCHEMA, fix=fix)
    arrays = parse(data)
    return {name: _part(name, arrays, about) for name in ("train", "heldout")}, about


def check_latents(about: dict[str, Any], codec: Path) -> None:
    """``UserError`` unless the file's latents are those of this codec."""
    if (found := latents_fingerprint(codec)) != about["latents"]:
        raise UserError("windows", got=f"latents {about['latents']}", wanted=found, fix="prepare them with this codec")


def _part(name: str, arrays: Arrays, about: dict[str, Any]) -> Part:
    found = {key.removeprefix(f"{name}/"): value for key, value in arrays.items() if key.startswith(f"{name}/")}
    table = WindowTable(
        episode_W=torch.from_numpy(found["episode_W"]).long(), start_W=torch.from_numpy(found["start_W"]).long()
    )
    windows, recipe = len(table), TargetRecipe.from_description(about["recipe"])
    latents_MChw = torch.from_numpy(found["latents_MChw"]).float() / about["latent_units"]
    plain = WindowBank(
        table=table,
        latents_WCFhw=latents_MChw[torch.from_numpy(found["latent_WF"]).long()].transpose(1, 2).contiguous(),
        text_SLD=torch.from_numpy(found["text_SLD"]).float(),
        sentence_W=torch.from_numpy(found["sentence_W"]).long(),
        proprioception_WKA=torch.from_numpy(found["proprioception_WKA"]),
    )
    shard = EpisodeTargets(
        starts_W=np.arange(windows, dtype=np.int32),
        points_WTN2=np.cumsum(found["step_WTN2"], axis=1, dtype=np.int16),
        visible_WTN=np.unpackbits(found["visible_WTb"], axis=-1, count=recipe.points).astype(bool),
        depth_WN=found["depth_WN"],
        body_WN=found["body_WN"].astype(np.int32),
        rows_WF=found["feature_WF"],
        features_EhwC=(found["features_EhwC"] * np.float32(about["feature_step"])).astype(np.float16),
        token_WK=np.zeros((windows, 0), np.uint16),
        count_W=np.zeros(0, np.int32),
        relation_WR=np.zeros((windows, 0), np.int8),
        size=(about["size"][0], about["size"][1]),
        subpixels=about["subpixels"],
        depth_kind=about["depth_kind"],
        channels=about["channels"],
    )
    return Part(plain=plain, shard=shard, recipe=recipe, episodes=about["episodes"][name])


def prepare(
    out: Path,
    roots: dict[str, Path],
    choices: Sequence[tuple[PhysicsConfig, bool]],
    *,
    codec: Path,
    lags: tuple[int, ...],
    strides: dict[str, int],
    limit: int | None = None,
    drop_still: bool = False,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Write the file and return what it says of itself.

    ``roots``: datasets of ``train`` and ``heldout``, whose targets must be cached (``physis data targets``; ``cache`` as there).
    ``choices``: those that training will be asked for, and whether with degraded tracks. ``strides``: control steps between starts,
    multiples of 8. ``limit``: episodes a task. ``drop_still``: leave out training windows in which no point is selected by default,
    except an episode's first.
    """
    arrays: Arrays = {}
    about: dict[str, Any] = {"schema": SCHEMA, "latents": latents_fingerprint(codec), "episodes": {}, "windows": {}}
    about |= {"recipe": TargetRecipe().describe(), "latent_units": LATENT_UNITS}
    for name, root in roots.items():
        part, keys, length_E = _read(root, codec, lags, strides[name], limit, cache)
        shard, table = part.shard, part.plain.table
        about |= {key: getattr(shard, key) for key in ("size", "subpixels", "depth_kind", "channels")}
        moves = part.targets(PhysicsConfig(lambda_sem=0.0), torch.device("cpu")).targets.select_WN.any(1)
        keep = torch.nonzero(moves | (table.start_W == 0) | (not drop_still or name != "train")).flatten().numpy()
        about["windows"][name] = {"kept": len(keep), "of": len(table), "with_motion": int(moves.sum())}
        about["episodes"][name] = part.episodes
        print(f"{name}: {about['windows'][name]}, {len(length_E)} episodes", flush=True)
        latent_WF, first = _shared(keys, part.plain.latents_WCFhw, keep)
        features, rows = np.zeros((1, *shard.features_EhwC.shape[1:]), np.int8), np.zeros(latent_WF.shape, np.int32)
        if name == "train":
            features, rows, about["feature_step"] = _features(part, keep, choices)
        found = {
            "episode_W": table.episode_W.numpy()[keep].astype(np.int16),
            "start_W": table.start_W.numpy()[keep].astype(np.int16),
            "latents_MChw": first,
            "latent_WF": latent_WF,
            "text_SLD": part.plain.text_SLD.numpy().astype(np.float16),
            "sentence_W": part.plain.sentence_W.numpy()[keep].astype(np.int16),
            "proprioception_WKA": part.plain.proprioception_WKA.numpy()[keep],
            # differences in time: 16-bit arithmetic wraps and comes back, and what stands still is zero
            "step_WTN2": np.diff(shard.points_WTN2[keep], axis=1, prepend=np.int16(0)),
            "visible_WTb": np.packbits(shard.visible_WTN[keep], axis=-1),
            "depth_WN": shard.depth_WN[keep],
            "body_WN": shard.body_WN[keep].astype(np.int16),
            "feature_WF": rows,
            "features_EhwC": features,
        }
        arrays |= {f"{name}/{key}": np.ascontiguousarray(value) for key, value in found.items()}
    _write(out, arrays, {"probe": json.dumps(about)})
    return about


def _read(
    root: Path, codec: Path, lags: tuple[int, ...], stride: int, limit: int | None, cache: Path | None
) -> tuple[Part, list[list[tuple]], list[int]]:
    """All windows of a dataset; what each of their latent frames is made of; lengths of the episodes."""
    from physisforcing.core.readers import open_dataset

    recipe, dataset = TargetRecipe(), open_dataset(root)
    episodes = read_episodes([root], success_only=False, limit=limit, workers=1)
    lengths = [episode.length for episode in episodes]
    table = WindowTable.build(lengths, stride)
    plain = build_bank(FrameStore.build(episodes, "cpu"), table, load_codec(codec), lags, chunk=16)
    shards = [read_shard(dataset, episode.index, recipe, cache) for episode in episodes]
    take = [table.start_W[table.episode_W == place].numpy() // recipe.start_stride for place in range(len(shards))]
    base = np.cumsum([0, *(len(shard.features_EhwC) for shard in shards)])

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(shard, name)[rows] for shard, rows in zip(shards, take, strict=True)])

    names = ("points_WTN2", "visible_WTN", "depth_WN", "body_WN", "token_WK", "relation_WR")
    values: dict[str, Any] = {name: joined(name) for name in names}
    values |= {name: getattr(shards[0], name) for name in ("size", "subpixels", "depth_kind", "channels", "count_W")}
    values["rows_WF"] = np.concatenate([s.rows_WF[t] + b for s, t, b in zip(shards, take, base, strict=False)])
    values["features_EhwC"] = np.concatenate([shard.features_EhwC for shard in shards])
    shard = EpisodeTargets(starts_W=np.arange(len(table), dtype=np.int32), **values)
    keys = []
    for place, start in zip(table.episode_W.tolist(), table.start_W.tolist(), strict=True):
        steps = window_steps(start, lengths[place]).tolist()
        # the codec makes a latent of its own four pictures and the four before; the first picture fills a group of its own
        own = [(0, steps[0]), (1, *steps[:5])]
        keys.append([(place, *key) for key in own + [(2, *steps[4 * k - 7 : 4 * k + 1]) for k in (2, 3, 4)]])
    told = [{"task": e.task, "seed": e.seed, "content": content_digest(dataset, e.index)} for e in episodes]
    return Part(plain=plain, shard=shard, recipe=recipe, episodes=told), keys, lengths


def _shared(keys: list[list[tuple]], latents_WCFhw: Tensor, keep: NDArray) -> tuple[NDArray, NDArray]:
    """Rows int32 [W,F] into latents int16 [M,C,h,w] in ``LATENT_UNITS``; equal latents once, in the order of their steps."""
    first: dict[tuple, Tensor] = {}
    for row in keep:
        for key, latent_Chw in zip(keys[row], latents_WCFhw[row].transpose(0, 1), strict=True):
            assert (first.setdefault(key, latent_Chw) - latent_Chw).abs().max() < 1e-3, "a codec with a longer memory"
    order = {key: place for place, key in enumerate(sorted(first))}
    stored = torch.stack([first[key] for key in order])
    rows = np.array([[order[key] for key in keys[row]] for row in keep], np.int32)
    return rows, (stored * LATENT_UNITS).round().to(torch.int16).numpy()


def _features(
    part: Part, keep: NDArray, choices: Sequence[tuple[PhysicsConfig, bool]]
) -> tuple[NDArray, NDArray, float]:
    """Features int8 of the frames and tokens that the windows ``keep`` read under any of the choices, rows [W,F], and the step."""
    used, rows = np.unique(part.shard.rows_WF[keep], return_inverse=True)
    rows = rows.reshape(len(keep), -1).astype(np.int32)
    needed = torch.zeros(len(used), *part.recipe.tokens[1:], dtype=torch.int32)
    asked = {tuple(getattr(physics, name) for name in REGIONS) + (degraded,) for physics, degraded in choices}
    for *values, degraded in sorted(asked, key=str):
        # which tokens are read does not depend on the features, so the check for them is left out
        physics = PhysicsConfig(lambda_sem=0.0, **dict(zip(REGIONS, values, strict=True)))
        mask = part.targets(physics, torch.device("cpu"), degraded=degraded).targets.mask_WFhw[torch.from_numpy(keep)]
        needed.index_add_(0, torch.from_numpy(rows).flatten(), mask.flatten(0, 1).int())
    print(f"features: {len(used)} frames, {100 * (needed > 0).float().mean():.0f} % of the tokens", flush=True)
    features = part.shard.features_EhwC[used].astype(np.float32)
    step = float(features.std()) / FEATURE_UNITS
    whole = np.clip(np.rint(features / step), -127, 127).astype(np.int8)
    return whole * (needed.numpy() > 0)[..., None], rows, step


def _write(out: Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    from safetensors.numpy import save

    data = save(arrays, metadata)
    print(f"{len(data) / 1e6:.1f} MB" + ("" if out.suffix == ".xz" else f" in {out.name}"), flush=True)
    if out.suffix == ".xz":
        data = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
        print(f"{len(data) / 1e6:.1f} MB in {out.name}", flush=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    aside.write_bytes(data)
    os.replace(aside, out)
