"""What only a GPU can show: the fast path's precision, compiled blocks, and resident batches without host synchronisation."""

import contextlib
import dataclasses

import pytest
import torch
from torch.overrides import TorchFunctionMode

from physisforcing.worldmodel.backbones.wan import ConditionerConfig, WanConfig, build_denoiser
from physisforcing.worldmodel.flow_matching import FlowMatchingConfig
from physisforcing.worldmodel.training.objective import draw_noise, objective

GPU = pytest.mark.gpu
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
    return denoiser, data, draw_noise(data["latents_BCFhw"].shape, FlowMatchingConfig(), generator)


def loss_and_gradient(denoiser, data, drawn, precision):
    denoiser.zero_grad(set_to_none=True)
    loss = objective(denoiser, None, data, drawn, FlowMatchingConfig(), precision)["loss"]
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None])
    return loss.item(), gradient


def bf16():
    return torch.autocast("cuda", dtype=torch.bfloat16)


@GPU
def test_bfloat16_agrees_with_float32():
    denoiser, data, drawn = setting()
    exact, fast = (
        loss_and_gradient(denoiser, data, drawn, contextlib.nullcontext()),
        loss_and_gradient(denoiser, data, drawn, bf16()),
    )
    assert fast[0] == pytest.approx(exact[0], rel=5e-3)
    assert torch.nn.functional.cosine_similarity(exact[1], fast[1], dim=0) > 0.995


@GPU
def test_compiled_blocks_agree_with_plain_ones_and_leave_the_export_alone():
    denoiser, data, drawn = setting()
    names = list(denoiser.state_dict())
    plain = loss_and_gradient(denoiser, data, drawn, bf16())
    denoiser.compile_blocks()
    compiled = loss_and_gradient(denoiser, data, drawn, bf16())
    assert compiled[0] == pytest.approx(plain[0], rel=5e-3)
    assert torch.nn.functional.cosine_similarity(plain[1], compiled[1], dim=0) > 0.995
    assert list(denoiser.state_dict()) == names


class HostWaits(TorchFunctionMode):
    """On a CPU nothing waits; what would wait on a GPU is found by its name instead."""

    NAMES = (
        *("tensor", "as_tensor", "new_tensor", "item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique"),
        *("equal", "__bool__", "__int__", "__float__"),
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in self.NAMES, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(device: str):
    if device == "cpu":
        with HostWaits():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_an_update_does_not_wait_for_the_device(device, resume_case, tmp_path, monkeypatch):
    """``Trainer.step`` with both physics losses on a bank that lies on the device."""
    from physisforcing.worldmodel.training import trainer as module

    settings, host = resume_case.config(tmp_path, "run", 4), resume_case.bank(0)
    targets = dataclasses.replace(
        host.targets, row_W=host.targets.row_W.to(device), targets=host.targets.targets.to(device)
    )
    names = ("latents_WCFhw", "text_SLD", "sentence_W", "proprioception_WKA", "actions_WPA")
    bank = dataclasses.replace(host, targets=targets, **{name: getattr(host, name).to(device) for name in names})
    trainer = module.Trainer(settings, bank, torch.device(device))
    terms = trainer.step(0)  # the first update allocates, and libraries start up in it
    if device == "cpu":  # an optimiser on a CPU keeps its step counts there and reads them; the losses read nothing
        losses = module.objective

        def watched(*arguments):
            with no_waiting(device):
                return losses(*arguments)

        monkeypatch.setattr(module, "objective", watched)
    with contextlib.nullcontext() if device == "cpu" else no_waiting(device):
        for step in range(1, 4):
            terms = trainer.step(step)
    values = {name: value.item() for name, value in terms.items()}
    assert values["pix"] > 0 and values["sem"] > 0 and values["grad_norm"] > 0
    assert all(map(torch.isfinite, terms.values()))
