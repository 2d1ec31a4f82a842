"""On a GPU, 8-bit products of a layer are near those in float32, with their gradients, compiled and not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from physisforcing.worldmodel.training.float8 import CAPABILITY, use_float8

pytestmark = pytest.mark.gpu


def passes(layer: nn.Module, inputs: Tensor, gradient: Tensor, weight: nn.Parameter) -> list[Tensor]:
    """Output, and gradients of inputs and weight."""
    inputs, weight.grad = inputs.clone().requires_grad_(), None
    with torch.autocast("cuda", torch.bfloat16):
        out = layer(inputs.bfloat16())
    out.backward(gradient.to(out.dtype))
    assert inputs.grad is not None
    assert weight.grad is not None
    return [out.detach().float(), inputs.grad.float(), weight.grad.clone()]


@pytest.mark.parametrize("rows", [301, 304], ids=["rows that no 16 divides", "rows that 16 divides"])
def test_products_and_gradients_are_near(rows: int) -> None:
    pytest.importorskip("torchao", reason="needs the extra fp8 (torchao)")
    if torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip("needs Ada, Hopper or later")
    torch.manual_seed(0)
    layer = nn.Linear(512, 1024, device="cuda")
    inputs, gradient = torch.randn(1, rows, 512, device="cuda"), torch.randn(1, rows, 1024, device="cuda")
    double = [tensor.double()[0] for tensor in (inputs, gradient)]
    exact = [layer.weight.double() @ double[0].T, double[1] @ layer.weight.double(), double[1].T @ double[0]]
    exact[0] = exact[0].T + layer.bias.double()
    holder = nn.Sequential(layer)
    use_float8([holder], torch.device("cuda"))
    assert type(holder[0]).__name__ == "Float8Linear"
    for run in (holder[0], torch.compile(holder[0], dynamic=False)):
        for found, wanted in zip(passes(run, inputs, gradient, holder[0].weight), exact, strict=True):
            gap = (found.squeeze(0) - wanted).norm() / wanted.norm()
            assert 0.01 < gap < 0.06, gap  # in bfloat16 it is 0.003
