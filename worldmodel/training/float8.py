"""Matrix products of a large backbone's blocks in 8-bit floats, by TorchAO: weights, their gradients and the optimiser keep their types.

Activations, weights and gradients are scaled a row at a time (TorchAO's recipe ``rowwise``) and multiplied in ``float8_e4m3``; what comes out is bfloat16.
Names of parameters and checkpoints are those of the layers without it.

Numbers that were stored in bfloat16 are few, and some of them lie just between two 8-bit floats, where an update, however small its rate, tips all to
one side at once: at TI2V-5B's size one of 2e-8 changes the loss of its sample by 2 % (benchmarks/float8_ties.py). ``dither_weights`` is the remedy, on one
GPU: where weights are sharded, blocks are gathered in bfloat16, which rounds them back to where they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import nn

from physisforcing.core.errors import UserError

#: What 8-bit matrix products of a GPU want the sides of a weight to be multiples of.
MULTIPLE = 16
#: Of a float32's bits those that bfloat16 leaves out.
LOW = 16
#: The first GPUs that have them (Ada; Hopper is 9.0).
CAPABILITY = (8, 9)


def check_float8(wanted: bool, *, rank: int, device: torch.device | None = None) -> None:
    """``UserError`` where ``run.fp8`` is ``wanted`` and cannot be: beside adapters (``rank``), without TorchAO, on a GPU that has no such products
    (``device``; None is not known yet)."""
    if not wanted:
        return
    if rank:
        fix = "lora.rank=0, or leave run.fp8 out: frozen layers under adapters compute in bfloat16"
        raise UserError("run.fp8", got=f"true with lora.rank={rank}", wanted="all weights trained", fix=fix)
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        fix = "pip install 'physisforcing[fp8]', or leave run.fp8 out"
        raise UserError("run.fp8", got="no TorchAO here", wanted="the package torchao", fix=fix) from error
    if device is None or device.type != "cuda":
        return
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        got, least = f"compute capability {found[0]}.{found[1]}", "8.9 or later: Ada, Hopper, Blackwell"
        raise UserError("run.fp8", got=got, wanted=least, fix="leave run.fp8 out")


def use_float8(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Let the linear layers of ``blocks`` multiply in 8-bit floats, those whose sides are multiples of ``MULTIPLE``. To be called before compilation
    and sharding; on a CPU the same numbers are emulated, slowly. ``UserError`` where no layer has such sides."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # The tokens of a sample are no multiple of 16, and the gradient of a weight adds over them. Scales rounded to powers of two, the recipe's own, would
    # put one in 16 of the weights that were stored in bfloat16 just between two 8-bit floats; unrounded it is one in 200.
    usual, emulate = Float8LinearConfig.from_recipe_name("rowwise"), device.type == "cpu"
    config = dataclasses.replace(usual, pad_inner_dim=True, round_scales_to_power_of_2=False, emulate=emulate)
    count = 0

    def fits(module: nn.Module, name: str) -> bool:
        nonlocal count
        fine = not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)  # type: ignore[operator]
        count += fine
        return fine

    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=fits, config=config)
    if not count:
        wanted = f"layers whose sides are multiples of {MULTIPLE}"
        raise UserError("run.fp8", got="none in the blocks of this model", wanted=wanted, fix="leave run.fp8 out")


def dither_weights(block: nn.Module, draw: torch.Generator) -> None:
    """Move each weight of a linear layer that is a number of bfloat16 to one of the float32 numbers that bfloat16 rounds to it, all equally likely: as
    bfloat16 it stays what it is. Zeros, what is not finite and weights with more digits stay. ``draw``: on the device of ``block``, whose weights are
    float32."""
    half = 2 ** (LOW - 1)
    for layer in block.modules():
        if not isinstance(layer, nn.Linear):
            continue
        weight = layer.weight.detach()
        bits = weight.view(torch.int32)
        by = torch.randint(1 - half, half, bits.shape, generator=draw, device=bits.device, dtype=torch.int32)
        moved = (bits + by).view(torch.float32)
        fits = (bits % 2**LOW == 0) & (weight != 0) & weight.isfinite()
        weight.copy_(torch.where(fits, moved, weight))
