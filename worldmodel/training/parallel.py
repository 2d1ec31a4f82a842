"""One run in several processes: ``fully_shard`` (FSDP2) spreads the transformer over them where it is trained whole.

The batch of a step is drawn whole in every process from (seed, step) and each keeps its rows, so that neither the sample stream nor the
loss depends on how many there are. Of the transformer every process keeps a part of each weight, its average and its optimiser state;
what is small (conditioner, action conditioner, physics heads) every process keeps whole, in float32, with gradients averaged here. So it does
with frozen weights and their adapters, which would be gathered at every step and have nothing to exchange (``run.sharding``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .optim import is_sharded, local
from .processes import Processes


def shard_block(block: nn.Module, processes: Processes) -> None:
    """Spread a block over the processes. On GPUs it is gathered in bfloat16 and its gradients are summed in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if processes.device.type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(block, mesh=processes.mesh, mp_policy=policy)


def shard_rest(module: nn.Module, whole: Iterable[nn.Module], processes: Processes) -> None:
    """Spread what of ``module`` is not in sharded blocks over the processes, together and in float32, but for the modules in ``whole``."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # the velocity, and a policy's video tokens behind a last block that nobody reads, are views, and nothing writes into them: a warning at
    # every step says nothing
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    kept = {parameter for part in whole for parameter in part.parameters()}
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(module, mesh=processes.mesh, mp_policy=plain, ignored_params=kept)


def gather_once(module: nn.Module, *, last: bool) -> None:
    """Before a part of an update: sharded weights stay gathered, and gradients stay whole, until its ``last`` part has gone backward. Then
    both are exchanged once an update, not once a part."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(last, recurse=False)
            part.set_reshard_after_forward(False, recurse=False)
            part.set_reshard_after_backward(last, recurse=False)


def scatter(module: nn.Module) -> None:
    """Let go of sharded weights in ``module`` that lie around gathered. What is not in blocks stays gathered after a forward pass without a
    backward one, and the next pass would compute with it whatever was written into the shards since then."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@torch.no_grad()
def whole(value: Tensor) -> Tensor:
    """A sharded tensor put together (every process must ask); another tensor as it is."""
    return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], processes: Processes) -> None:
    """Mean of the gradients of parameters that every process keeps whole; sharded ones have it already. What has none in any process keeps none,
    as in one process: zeros would let weight decay at it."""
    kept = [p for p in parameters if p.requires_grad and not is_sharded(p)]
    if not processes.many or not kept:
        return
    having = processes.total([float(p.grad is not None) for p in kept])
    if not (kept := [p for p, count in zip(kept, having, strict=True) if count]):
        return
    for parameter in kept:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.flatten().float() for p in kept])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    flat /= processes.world
    for parameter, mean in zip(kept, flat.split([p.numel() for p in kept]), strict=True):
        parameter.grad.copy_(mean.view_as(parameter))  # type: ignore[union-attr]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, processes: Processes) -> Tensor:
    """Scale all gradients to a common norm of at most ``limit``; returns the norm before, a scalar that is the same everywhere."""
    if not processes.many:
        return nn.utils.clip_grad_norm_(parameters, limit)
    found = [p.grad for p in parameters if p.grad is not None]
    parts = [local(grad) for grad in found if is_sharded(grad)]
    rest = [grad for grad in found if not is_sharded(grad)]
    square = torch.zeros((), device=found[0].device)
    if parts:
        square = torch.stack(torch._foreach_norm(parts)).square().sum()
        dist.all_reduce(square)
    if rest:
        square = square + torch.stack(torch._foreach_norm(rest)).square().sum()
    norm = square.sqrt()
    torch._foreach_mul_(parts + rest, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


#: Metrics that are means over the points in the loss of a process, and what a process has counted.
_OF_POINTS = ("epe_cells", "epe_px", "epe_uniform_px", "epe_still_px")
_COUNTS = ("pairs", "related")


@torch.no_grad()
def sum_parts(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Loss terms and metrics of a batch that was computed in equal parts: means of means, those over points weighted with their number,
    and counts added up."""
    made = {}
    for name in parts[0]:
        values = torch.stack([part[name].detach().float() for part in parts])
        if name in _COUNTS:
            made[name] = values.sum()
        elif name in _OF_POINTS and "pairs" in parts[0]:
            weights = torch.stack([part["pairs"].float() for part in parts])
            made[name] = (values * weights).sum() / weights.sum().clamp(min=1e-12)
        else:
            made[name] = values.mean()
    return made


@torch.no_grad()
def mean_terms(terms: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Loss terms and metrics of the whole batch, the same in every process."""
    terms = {name: value.detach().float() for name, value in terms.items()}
    if not processes.many:
        return terms
    pairs = terms.get("pairs")
    for name in _OF_POINTS:
        if pairs is not None and name in terms:
            terms[name] = terms[name] * pairs
    values = torch.stack(list(terms.values()))
    dist.all_reduce(values)
    summed = dict(zip(terms, values, strict=True))
    count = None if pairs is None else summed["pairs"].clamp(min=1e-12)
    means = {}
    for name, value in summed.items():
        if name in _COUNTS:
            means[name] = value / processes.sequence  # neighbours have counted the same
        elif name in _OF_POINTS and count is not None:
            means[name] = value / count
        else:
            means[name] = value / processes.world
    return means
