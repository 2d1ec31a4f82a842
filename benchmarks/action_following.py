"""Does an action model imagine what its actions do? Two executions from one state, and which of them an imagination is nearer to.

    python benchmarks/action_following.py --collect runs/states.safetensors [--tasks adjust_bottle stack_blocks_two] [--states 50]
        [--workers 2]                                        # a simulator, no model; continues where it was stopped
    python benchmarks/action_following.py --measure runs/states.safetensors --model runs/actions/export [--codec FOLDER]
        [--name pico_actions] [--no-sentence] [--device auto] [--json docs/results/actions.json]      # a model, no simulator

Each held-out state has the expert's next 32 control steps and 32 steps of smooth random targets, both executed from the same fork of
the simulator. The model imagines both with the same noise. Points of arms and objects are followed in the imagined video by the
classical tracker; the distance to an execution is the mean over the points and pictures that both executions and the tracker call
visible. Only points count that the two executions move apart. An imagination in which nothing is left to follow is not nearer.

``pair``: a state's two executions; it counts where each of the two imaginations is nearer to its own execution than to the other.
``imagination``: each by itself. ``executed video``: the same tracker on the pictures of the executions, the most that can be had.
A text model (``--model shipped``) imagines the same for both and gets half of the imaginations and no pair.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from action_following_states import CHUNKS, GROUPS, LAGS, States, collect
from numpy.typing import NDArray

from physisforcing.core.errors import UserError
from physisforcing.core.paths import weights_root
from physisforcing.core.stats import wilson
from physisforcing.core.types import RolloutRequest
from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
from physisforcing.worldmodel.model import FlowWorldModel, load_world_model
from physisforcing.worldmodel.teachers.classical import ClassicalTracker
from physisforcing.worldmodel.training.runtime import pick_device


@dataclass(slots=True, kw_only=True)
class Distances:
    """Mean distances in pixels of 120x160 of each of S states' two imaginations to its own execution and to the other one, by group;
    NaN where there is nothing to follow. ``points``: how many points and pictures they are means of. ``toward``: how far the points lie
    on the way from their own execution (0) to the other one (1)."""

    own_SG2: NDArray[np.float64]
    other_SG2: NDArray[np.float64]
    points_SG2: NDArray[np.int64]
    toward_SG2: NDArray[np.float64]

    @property
    def nearer_SG2(self) -> NDArray[np.bool_]:
        return self.own_SG2 < self.other_SG2  # nothing is nearer than NaN


def main() -> int:
    options = parse()
    if options.collect:
        collect(options.collect, options.tasks, options.states, start_seed=options.start_seed, workers=options.workers)
        return 0
    states = States.load(options.measure)
    shipped = str(options.model) == "shipped"
    folder = weights_root() / "worldmodel" if shipped else options.model
    codec = options.codec or (weights_root() / "vae")
    text = StoredText(states, left_out=options.no_sentence)
    model = load_world_model(folder, pick_device(options.device), codec=codec, steps=options.steps, text=text)  # type: ignore[arg-type]
    found = imagined_distances(model, states, options.batch)
    ceiling = distances(states, states.tracked_S2TN2, states.seen_S2TN)
    lines = report(states, found, ceiling, options)
    if options.json:
        write_measurements(options.json, lines)
    return 0


class StoredText:
    """The instructions that a file of states holds, embedded; ``left_out``: zeros, as ``text_dropout`` makes them in training."""

    def __init__(self, states: States, *, left_out: bool = False) -> None:
        self._left_out = left_out
        self._tokens = {row["instruction"]: tokens for row, tokens in zip(states.about, states.text_SLD, strict=True)}

    def batch(self, sentences: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens_BLD = torch.from_numpy(np.stack([self._tokens[sentence] for sentence in sentences]).astype(np.float32))
        mask_BL = tokens_BLD.any(2)
        return (torch.zeros_like(tokens_BLD) if self._left_out else tokens_BLD), mask_BL


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verb = parser.add_mutually_exclusive_group(required=True)
    verb.add_argument("--collect", type=Path, metavar="FILE", help="make the states")
    verb.add_argument("--measure", type=Path, metavar="FILE", help="read the states and imagine")
    parser.add_argument("--tasks", nargs="+", default=["adjust_bottle", "stack_blocks_two"])
    parser.add_argument("--states", type=int, default=50, help="states a task, one a scene")
    parser.add_argument("--start-seed", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", type=Path, default="shipped", help="world-model folder, or shipped")
    parser.add_argument("--codec", type=Path, help="its codec (the shipped one)")
    parser.add_argument("--name", default="", help="of the model in the claims (its own by default)")
    parser.add_argument("--no-sentence", action="store_true", help="the model has the actions and the picture alone")
    parser.add_argument("--steps", type=int, help="denoising steps (the model's own)")
    parser.add_argument("--batch", type=int, default=16, help="states imagined together")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    return parser.parse_args()


def imagined_distances(model: FlowWorldModel, states: States, batch: int) -> Distances:
    """Imagine both chunks of every state with the noise of the scene's seed, and follow the points."""
    if model.spec.proprioception_lags != LAGS:
        fix = "collect states with these lags"
        raise UserError("model", got=f"lags {model.spec.proprioception_lags}", wanted=f"lags {LAGS}", fix=fix)
    tracker, parts, begun = ClassicalTracker(), [], time.perf_counter()
    for first in range(0, len(states), batch):
        rows = slice(first, min(first + batch, len(states)))
        videos = torch.from_numpy(imagine(model, states, rows)).flatten(0, 1)
        queries = torch.from_numpy(states.points_S2TN2[rows, :, 0]).flatten(0, 1)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            tracks = list(pool.map(tracker.track, videos.split(1), queries.split(1)))
        points, seen = (torch.cat([getattr(t, name) for t in tracks]) for name in ("points_BTN2", "visible_BTN"))
        parts.append((points.unflatten(0, (-1, 2)).numpy(), seen.unflatten(0, (-1, 2)).numpy()))
        print(f"{rows.stop}/{len(states)} states, {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    points_S2TN2, seen_S2TN = (np.concatenate(part) for part in zip(*parts, strict=True))
    return distances(states, points_S2TN2, seen_S2TN)


def imagine(model: FlowWorldModel, states: States, rows: slice) -> NDArray[np.uint8]:
    """Both imaginations of some states, uint8 [S,2,T,H,W,C]."""
    about = states.about[rows]
    acts = "actions" in model.spec.conditions
    rollout = model.rollout(
        RolloutRequest(
            context_BVTHWC=states.context_SHWC[rows][:, None, None],
            instructions=[row["instruction"] for row in about],
            seeds_BS=np.array([[row["seed"]] * 2 for row in about], dtype=np.int64),
            horizon=states.points_S2TN2.shape[2],
            proprioception_BKA=states.proprioception_SKA[rows],
            actions_BSPA=states.actions_S2PA[rows] if acts else None,
        )
    )
    assert rollout.frames_BSVTHWC is not None
    return rollout.frames_BSVTHWC[:, :, 0]


def distances(states: States, points_S2TN2: NDArray[np.float32], seen_S2TN: NDArray[np.bool_]) -> Distances:
    """How far tracks of two videos of every state are from both executions."""
    true, count = states.points_S2TN2, (len(states), len(GROUPS), 2)
    both_STN = states.visible_S2TN.all(1)
    both_STN[:, 0] = False  # all begin alike
    own, other, toward = (np.full(count, np.nan) for _ in range(3))
    number = np.zeros(count, np.int64)
    for chunk in range(2):
        apart = [np.linalg.norm(points_S2TN2[:, chunk] - true[:, c], axis=-1) for c in (chunk, 1 - chunk)]
        way_STN2 = (true[:, 1 - chunk] - true[:, chunk]).astype(np.float64)
        along_STN = ((points_S2TN2[:, chunk] - true[:, chunk]) * way_STN2).sum(-1)
        for group in range(len(GROUPS)):
            use_STN = both_STN & seen_S2TN[:, chunk] & (states.group_SN == group)[:, None]
            for place in range(len(states)):
                use_TN = use_STN[place]
                number[place, group, chunk] = use_TN.sum()
                if use_TN.any():
                    own[place, group, chunk] = apart[0][place][use_TN].mean()
                    other[place, group, chunk] = apart[1][place][use_TN].mean()
                    toward[place, group, chunk] = along_STN[place][use_TN].sum() / (way_STN2[place][use_TN] ** 2).sum()
    return Distances(own_SG2=own, other_SG2=other, points_SG2=number, toward_SG2=toward)


def report(states: States, found: Distances, ceiling: Distances, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the shares and make the measurements."""
    trained = options.name or ("pico" if str(options.model) == "shipped" else options.model.parent.name)
    name = trained + "_without_sentence" * options.no_sentence
    shared: dict[str, Any] = {
        "seeds": sorted({row["seed"] for row in states.about}),
        "command": command(options, trained),
    }
    shared["provenance"] = machine_provenance()
    path, lines = f"video/action_following/{name}", []
    near, most = found.nearer_SG2, ceiling.nearer_SG2
    shares = {"arm_and_object_pair": (near.all((1, 2)), most.all((1, 2)))}
    for place, group in enumerate(GROUPS):
        shares[f"{group}_pair"] = near[:, place].all(1), most[:, place].all(1)
        shares[f"{group}_imagination"] = near[:, place].ravel(), most[:, place].ravel()
    for kind, (hits, best) in shares.items():
        low, high = wilson(int(hits.sum()), len(hits))
        parts = by_part(states, hits)
        against = {"executed_video": float(best.mean()), **parts}
        value = float(hits.mean())
        lines.append(
            measurement(
                f"{path}/{kind}", value, unit="share", low=low, high=high, n=len(hits), against=against, **shared
            )
        )
        said = ", ".join(f"{part} {share:.2f}" for part, share in against.items())
        print(f"{kind:20} {hits.sum()}/{len(hits)} = {value:.3f} ({low:.3f}..{high:.3f}); {said}")
    for place, group in enumerate(GROUPS):
        for kind, value in of_group(found, place).items():
            against = {"executed_video": of_group(ceiling, place)[kind]}
            claim, unit = f"{path}/{group}_{kind}", "px of 120x160, median" if kind.endswith("px") else "1"
            lines.append(measurement(claim, value, unit=unit, n=2 * len(states), against=against, **shared))
            print(f"{group}_{kind}: {value:.4g} (executed video {against['executed_video']:.4g})")
    return lines + [measurement(**line, **shared) for line in causes(path, found)]


def causes(path: str, found: Distances) -> list[dict[str, Any]]:
    """Where imaginations go instead: by executed chunk the median place between the own (0) and the other execution (1), and among the
    imaginations whose objects are not nearer to their own execution the share whose arms are."""
    lines: list[dict[str, Any]] = []
    arm, thing = (GROUPS.index(name) for name in ("arm", "object"))
    for chunk, executed in enumerate(CHUNKS):
        for place, group in enumerate(GROUPS):
            known = found.toward_SG2[:, place, chunk]
            known = known[~np.isnan(known)]
            if len(known):
                claim = f"{path}/{group}_toward_other/{executed}_executed"
                low, value, high = np.percentile(known, (25, 50, 75))
                about = {"low and high": "quartiles"}
                lines.append(
                    {
                        "claim": claim,
                        "value": float(value),
                        "low": float(low),
                        "high": float(high),
                        "unit": "1",
                        "n": len(known),
                        "against": about,
                    }
                )
        near = found.nearer_SG2[:, :, chunk]
        wrong = ~near[:, thing]
        if wrong.any():
            hits = int(near[wrong, arm].sum())
            low, high = wilson(hits, int(wrong.sum()))
            claim = f"{path}/arm_right_where_object_is_wrong/{executed}_executed"
            value = hits / int(wrong.sum())
            lines.append(
                {"claim": claim, "value": value, "low": low, "high": high, "unit": "share", "n": int(wrong.sum())}
            )
    for line in lines:
        print(f"{line['claim']}: {line['value']:.3f} ({line['low']:.3f}..{line['high']:.3f}), n={line['n']}")
    return lines


def by_part(states: States, hits: NDArray[np.bool_]) -> dict[str, float]:
    """The share of hits by task and, where every imagination counts by itself, by what was executed."""
    tasks = np.array([row["task"] for row in states.about])
    hits_SK = hits.reshape(len(states), -1)
    parts = {task: float(hits_SK[tasks == task].mean()) for task in dict.fromkeys(tasks.tolist())}
    if hits_SK.shape[1] == len(CHUNKS):
        parts |= {f"{chunk} executed": float(hits_SK[:, place].mean()) for place, chunk in enumerate(CHUNKS)}
    return parts


def of_group(found: Distances, group: int) -> dict[str, float]:
    """Medians of the distances, how many points and pictures they are means of, and imaginations in which none was left."""
    own, other = found.own_SG2[:, group], found.other_SG2[:, group]
    return {
        "own_px": float(np.nanmedian(own)),
        "other_px": float(np.nanmedian(other)),
        "followed": float(found.points_SG2[:, group].mean()),
        "lost": float(np.isnan(own).sum()),
    }


def command(options: argparse.Namespace, name: str) -> str:
    said = f"python benchmarks/action_following.py --measure {options.measure} --model {options.model} --name {name}"
    return placeless(said + " --no-sentence" * options.no_sentence)


if __name__ == "__main__":
    sys.exit(main())
