"""What only a GPU can show: the fast path's precision, compiled blocks, and resident batches without host synchronisation."""

import contextlib

import pytest
import torch

from physisforcing.worldmodel.backbones.wan import ConditionerConfig, WanConfig, build_denoiser
from physisforcing.worldmodel.flow_matching import FlowMatchingConfig
from physisforcing.worldmodel.training.objective import draw_noise, objective

pytestmark = pytest.mark.gpu

CONFIG = WanConfig(num_layers=3, ffn_dim=256, tap=2)


def setting(batch: int = 8):
    torch.manual_seed(0)
    denoiser = build_denoiser(CONFIG, ConditionerConfig()).cuda()
    torch.nn.init.normal_(denoiser.transformer.proj_out.weight, std=0.05)
    generator = torch.Generator("cuda").manual_seed(1)
    data = {
        "latents_BCFhw": torch.randn(batch, 16, 5, 15, 20, generator=generator, device="cuda"),
        "text_BLD": torch.randn(batch, 32, 384, generator=generator, device="cuda"),
        "proprioception_BKA": torch.randn(batch, 3, 14, generator=generator, device="cuda"),
        "targets": None,
    }
    return denoiser, data, draw_noise(data["latents_BCFhw"], FlowMatchingConfig(), generator)


def loss_and_gradient(denoiser, data, drawn, precision):
    denoiser.zero_grad(set_to_none=True)
    loss = objective(denoiser, None, data, drawn, FlowMatchingConfig(), precision)["loss"]
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None])
    return loss.item(), gradient


def bf16():
    return torch.autocast("cuda", dtype=torch.bfloat16)


def test_bfloat16_agrees_with_float32():
    denoiser, data, drawn = setting()
    exact, fast = (
        loss_and_gradient(denoiser, data, drawn, contextlib.nullcontext()),
        loss_and_gradient(denoiser, data, drawn, bf16()),
    )
    assert fast[0] == pytest.approx(exact[0], rel=5e-3)
    assert torch.nn.functional.cosine_similarity(exact[1], fast[1], dim=0) > 0.995


def test_compiled_blocks_agree_with_plain_ones_and_leave_the_export_alone():
    denoiser, data, drawn = setting()
    names = list(denoiser.state_dict())
    plain = loss_and_gradient(denoiser, data, drawn, bf16())
    denoiser.compile_blocks()
    compiled = loss_and_gradient(denoiser, data, drawn, bf16())
    assert compiled[0] == pytest.approx(plain[0], rel=5e-3)
    assert torch.nn.functional.cosine_similarity(plain[1], compiled[1], dim=0) > 0.995
    assert list(denoiser.state_dict()) == names


def test_an_update_does_not_wait_for_the_device():
    from physisforcing.worldmodel.training.optim import OptimConfig, WeightAverage, build_optimizer, set_learning_rate

    denoiser, data, drawn = setting()
    optimizer = build_optimizer(denoiser.parameters(), OptimConfig())
    average = WeightAverage(denoiser, 0.999)
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            set_learning_rate(optimizer, 1e-4)
            objective(denoiser, None, data, drawn, FlowMatchingConfig(), bf16())["loss"].backward()
            torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
