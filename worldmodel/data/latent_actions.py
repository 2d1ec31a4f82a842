"""States and actions of the episodes in a latent store: what a policy is trained on beside the latents.

A store keeps them once an episode, in ``actions/<content>.safetensors``, so that it still needs none of the datasets it was made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from physisforcing.core.errors import DatasetError

if TYPE_CHECKING:
    from physisforcing.core.episodes import EpisodeSource

STATE, ACTION = "observation.state", "action"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedActions:
    """The columns ``observation.state`` and ``action`` of an episode, float32 [T,A], of ``hz`` rows a second."""

    states_TA: NDArray[np.float32]
    actions_TA: NDArray[np.float32]
    hz: float


def recorded_actions(source: EpisodeSource, index: int) -> RecordedActions | None:
    """Those of an episode of a dataset; None where it has not both. ``DatasetError`` where they have different lengths."""
    columns = source.columns(index)
    if STATE not in columns or ACTION not in columns:
        return None
    states, actions = (_rows(columns[name]) for name in (STATE, ACTION))
    if len(states) != len(actions):
        got = f"{len(actions)} rows, and {len(states)} of {STATE}"
        raise DatasetError(
            f"{source.root} episode {index}: {ACTION}",
            got=got,
            wanted="an action a state",
            fix="see physis data inspect",
        )
    return RecordedActions(states_TA=states, actions_TA=actions, hz=float(source.fps))


def _rows(column: NDArray[np.generic]) -> NDArray[np.float32]:
    values = np.asarray(column, dtype=np.float32)
    return values[:, None] if values.ndim == 1 else values


def actions_path(content: str) -> str:
    """Where a store keeps the actions of an episode, relative to it. ``content``: digest of the episode."""
    return f"actions/{content[:32]}.safetensors"


def write_actions(path: Path, recorded: RecordedActions) -> None:
    """Write them aside, with their checksum, and rename the file."""
    from .latent_shards import write_shard

    states, actions = (torch.from_numpy(np.array(x)) for x in (recorded.states_TA, recorded.actions_TA))
    write_shard(
        path, {"states_TA": states, "actions_TA": actions, "hz": torch.tensor(recorded.hz, dtype=torch.float64)}
    )


def read_actions(path: Path, name: str) -> RecordedActions:
    """What ``write_actions`` wrote. ``name``: of the episode. ``DatasetError`` for a file that is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    from .latent_shards import check_shard

    fix = "physis data latents again"
    if not path.is_file():
        raise DatasetError(f"actions of {name}", got="none", wanted=str(path), fix=fix)
    try:
        check_shard(path)
        with safe_open(path, framework="pt") as file:
            found = {key: file.get_tensor(key) for key in ("states_TA", "actions_TA", "hz")}
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        fix = f"delete it and run {fix}"
        raise DatasetError(f"actions of {name}", got=f"{path}: {error}", wanted="a whole file", fix=fix) from error
    return RecordedActions(
        states_TA=found["states_TA"].numpy(), actions_TA=found["actions_TA"].numpy(), hz=float(found["hz"])
    )
