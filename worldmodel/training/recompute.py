"""Activation checkpointing of the repeated blocks: ``run.checkpointing`` is ``none``, ``full`` or ``selective``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from physisforcing.core.errors import UserError

KINDS = ("none", "full", "selective")
#: Share of the memory for activations that compiled blocks with ``selective`` may take.
BUDGET = 0.4

Run = Callable[..., Any]


def check_checkpointing(kind: str) -> None:
    """``UserError`` for a kind that is not in ``KINDS``."""
    if kind not in KINDS:
        raise UserError("run.checkpointing", got=kind, wanted="none, full or selective", fix="run.checkpointing=full")


def recomputed(run: Run, kind: str, compiled: bool = False) -> Run:
    """``run(block, *inputs)`` such that the backward pass computes the block again instead of keeping what is inside it.

    ``full`` keeps a block's inputs alone. ``selective`` keeps what attention made as well (self- and cross-attention), which is the
    dearest to compute again where there are many tokens; of ``compiled`` blocks the compiler keeps what is dearest within a share of
    what it would keep (``BUDGET``). Gradients are the same bits in float32 on a CPU. There is no dropout, so no random state is kept.
    """
    if compiled:
        import torch._functorch.config as partitioner

        # read where a block is compiled, which is with its first call
        partitioner.activation_memory_budget = BUDGET if kind == "selective" else 1.0
    if kind == "none" or (kind == "selective" and compiled):
        return run
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, attention_operations())

    def again(block: Any, *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(block, *inputs)
        return checkpoint(run, block, *inputs, **options)

    return again


def attention_operations() -> list[Any]:
    """The operations that fused attention is made of, on any device."""
    names = (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    return [getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name)]
