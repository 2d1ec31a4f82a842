"""A policy on a large backbone as a folder, written a tensor at a time from weights that may be spread over processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from physisforcing.worldmodel.backbones.loading import in_modules, kept_in_float32
from physisforcing.worldmodel.convert.writing import plan_shards, write_part
from physisforcing.worldmodel.model import save_heads
from physisforcing.worldmodel.physics.forcing import PhysisForcing
from physisforcing.worldmodel.storage import save_tensors
from physisforcing.worldmodel.training.export import SHARD_BYTES, LivePart
from physisforcing.worldmodel.training.parallel import whole
from physisforcing.worldmodel.training.processes import Processes

from .checkpoint import EXPERT, TRANSFORMER, PolicyInfo, expert_state, write_settings
from .model import WorldActionModel
from .normalization import ActionStatistics

#: Layers of the action expert and the proprioception that compute in float32 or are read once a plan; they are stored in it.
EXACT_EXPERT = ("action_in", "proj_out", "proprioception")


def export_large(
    folder: Path,
    policy: WorldActionModel,
    info: PolicyInfo,
    statistics: ActionStatistics,
    forcing: PhysisForcing | None,
    processes: Processes,
) -> None:
    """Write the policy as ``checkpoint.load_policy`` reads it, matrices in bfloat16. Every process takes part in putting weights together, and
    the first writes."""
    if processes.first:
        (folder / TRANSFORMER).mkdir(parents=True)
    # of the outermost module: asking it makes FSDP take back weights that lie around gathered
    state = policy.state_dict()
    part = _video(policy, state)
    shards = plan_shards(part, SHARD_BYTES)
    if processes.first:
        write_part(part, shards, folder / TRANSFORMER, lambda _bytes: None)
    else:
        for name in (name for shard in shards for name in shard.tensors):
            part.read(name)
    exact = (*kept_in_float32(policy.transformer), *EXACT_EXPERT)
    expert = {}
    for name, value in expert_state(state).items():
        together = whole(value.detach())
        if processes.first:
            dtype = torch.float32 if in_modules(name, exact) else torch.bfloat16
            expert[name] = together.to("cpu", dtype, copy=True).contiguous()
    if not processes.first:
        return
    save_tensors(expert, folder / EXPERT)
    write_settings(folder, policy.config, info, tap=policy.tap)
    statistics.save(folder)
    if forcing is not None:
        save_heads(forcing, folder, None)


def _video(policy: WorldActionModel, state: dict[str, Tensor]) -> LivePart:
    """The transformer without the action expert's blocks."""
    prefix, theirs = f"{TRANSFORMER}.", expert_state(state)
    tensors: dict[str, Callable[[], Tensor]] = {}
    shapes = {}
    for name, value in state.items():
        if name.startswith(prefix) and name not in theirs:
            plain = name.removeprefix(prefix)
            tensors[plain] = lambda value=value: whole(value.detach())  # type: ignore[misc]
            shapes[plain] = tuple(value.shape)
    transformer: nn.Module = policy.transformer
    return LivePart(
        tensors=tensors,
        shapes=shapes,
        config=json.loads(transformer.to_json_string()),  # type: ignore[operator]
        float32=kept_in_float32(transformer),
    )
