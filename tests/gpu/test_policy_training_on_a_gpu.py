"""On a GPU, a policy's training with compiled blocks computes the losses and gradients of kernels called one by one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from physisforcing.policy.mixture import attention
from physisforcing.policy.training import PolicyTrainer
from physisforcing.policy.windows import PolicyBank, episode_statistics
from physisforcing.worldmodel.data.batches import step_generator
from tests.helpers import tiny_policy_training

pytestmark = pytest.mark.gpu


def losses_and_gradients(
    folder: Path, compiled: str, weight: float
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    config = tiny_policy_training.config(folder, compiled)
    # heads of 64 numbers as in the nano backbone
    config.backbone.num_heads, config.backbone.head_dim, config.backbone.num_layers = 2, 64, 2
    config.backbone.ffn_dim, config.run.compile, config.video_weight = 256, compiled, weight
    bank = tiny_policy_training.banks()[0].bank
    values = {item.name: getattr(bank, item.name) for item in dataclasses.fields(bank)}
    moved = {name: value.cuda() for name, value in values.items() if isinstance(value, torch.Tensor)}
    resident = dataclasses.replace(bank, **moved)
    episodes = tiny_policy_training.episodes(0)
    windows = PolicyBank.of(resident, episodes, episode_statistics(episodes, "zscore"), tiny_policy_training.CHUNK)
    torch.manual_seed(0)
    trainer = PolicyTrainer(config, windows, torch.device("cuda"))
    torch.manual_seed(1)
    for layer in (trainer.policy.expert.proj_out, trainer.policy.transformer.proj_out):
        layer.weight.data.normal_(std=0.3)
    batch = trainer.batch(0)
    terms = trainer._backward(batch, trainer.draw(batch, step_generator(1, 0, trainer.device)))
    # what the actions do not need has none
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainer.policy.named_parameters()}
    return {name: float(terms[name].detach()) for name in ("loss", "action")}, found


def test_attention_reads_gradients_of_any_layout() -> None:
    """cuDNN's plan of the backward pass holds the layout of its first gradient (docs/results/policy.md)."""
    torch.manual_seed(0)
    made = [torch.randn(4, 61, 2, 64, device="cuda") for _ in range(4)]
    query, key, value = (x.transpose(1, 2).double().requires_grad_() for x in made[:3])
    came = made[3].transpose(1, 2)
    wanted = torch.autograd.grad(attention(query, key, value), (query, key, value), came.double())
    for gradient in (came.bfloat16(), came.bfloat16().contiguous()):
        parts = [x.bfloat16().transpose(1, 2).requires_grad_() for x in made[:3]]
        for found, exact in zip(torch.autograd.grad(attention(*parts), parts, gradient), wanted, strict=True):
            assert (found.double() - exact).norm() < 0.02 * exact.norm(), gradient.stride()


@pytest.mark.parametrize("weight", [0.0, 1.0], ids=["actions alone", "video and actions"])
def test_compiled_blocks_train_alike(tmp_path: Path, weight: float) -> None:
    plain, gradients = losses_and_gradients(tmp_path, "none", weight)
    compiled, others = losses_and_gradients(tmp_path, "blocks", weight)
    assert compiled == pytest.approx(plain, rel=1e-2)
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        gap = (others[name] - gradient).norm()
        assert gap < 0.05 * gradient.norm() + 1e-3 * largest, name
