"""Activation checkpointing and LoRA: the same gradients with less memory, and only adapters trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.backbones.protocol import call_block
from physisforcing.worldmodel.backbones.wan import WanConfig, load_denoiser
from physisforcing.worldmodel.training import config as settings_module
from physisforcing.worldmodel.training.checkpoint import load_training
from physisforcing.worldmodel.training.lora import FILE
from physisforcing.worldmodel.training.recompute import BUDGET, recomputed
from physisforcing.worldmodel.training.worldmodel import Trainer, train_world_model
from tiny_training import bank, config


class Counted(TorchDispatchMode):
    """How often fused attention runs."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += "scaled_dot_product" in str(function) and "backward" not in str(function)
        return function(*args, **(kwargs or {}))


def gradients(tmp_path, kind: str, **changes) -> tuple[dict[str, torch.Tensor], int, int]:
    """Gradients of one step, how often attention ran in all, and bytes kept for the backward pass."""
    made = config(tmp_path, kind, 2)
    made.run.checkpointing = kind
    trainer = Trainer(made, bank(0), torch.device("cpu"))
    torch.nn.init.normal_(trainer.denoiser.transformer.proj_out.weight, generator=torch.Generator().manual_seed(1))
    kept = [0]

    def pack(value):
        kept[0] += value.numel() * value.element_size()
        return value

    found = {}
    trainer.optimizer.step = lambda: found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
    with Counted() as counted, torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        trainer.step(0)
    return found, counted.calls, kept[0]


def test_checkpointed_blocks_give_the_same_bits(tmp_path):
    plain, full, selective = (gradients(tmp_path, kind) for kind in ("none", "full", "selective"))
    for other in (full, selective):
        assert plain[0].keys() == other[0].keys()
        assert all(torch.equal(value, other[0][name]) for name, value in plain[0].items())
    # two blocks with two attentions each: computed again under full, kept under selective
    assert (plain[1], full[1], selective[1]) == (4, 8, 4)
    assert full[2] < 0.6 * plain[2]


def test_unknown_and_impossible_checkpointing_is_refused(tmp_path):
    made = config(tmp_path, "run", 1)
    made.run.checkpointing = "some"
    with pytest.raises(UserError, match=r"run\.checkpointing"):
        Trainer(made, bank(0), torch.device("cpu"))


def test_the_compiler_is_told_what_share_of_activations_to_keep(monkeypatch):
    """What it makes of that is measured on GPUs (docs/results/training.md)."""
    import torch._functorch.config as partitioner

    monkeypatch.setattr(partitioner, "activation_memory_budget", 1.0)
    assert recomputed(call_block, "selective", compiled=True) is call_block
    assert partitioner.activation_memory_budget == BUDGET < 1
    assert recomputed(call_block, "none", compiled=True) is call_block and partitioner.activation_memory_budget == 1.0
    assert recomputed(call_block, "full", compiled=True) is not call_block


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A trained model to put adapters on."""
    folder = tmp_path_factory.mktemp("base")
    made = config(folder, "base", 2)
    made.optim.lr = 1e-2
    train_world_model(made, (bank(0), bank(1)))
    return folder / "base" / "last" / "model"  # float32


def with_lora(tmp_path, name, steps, base, **lora):
    made = config(tmp_path, name, steps)
    made.run.init = str(base)
    made.optim.lr = 1e-2
    made.lora = settings_module.LoraConfig(**{"rank": 3, "alpha": 6.0} | lora)
    return made


def test_only_adapters_conditioner_and_heads_are_trained_saved_and_averaged(tmp_path, base):
    pytest.importorskip("peft")
    made = with_lora(tmp_path, "lora", 6, base)
    trainer = Trainer(made, bank(0), torch.device("cpu"))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert torch.equal(
        before["denoiser.transformer.blocks.0.attn1.to_q.base_layer.weight"],
        load_denoiser(base).transformer.blocks[0].attn1.to_q.weight,
    )
    for step in range(3):
        trainer.step(step)
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert moved == trained == set(trainer.average.names)
    assert all(".lora_" in name or name.startswith(("denoiser.conditioner", "forcing")) for name in trained)
    assert sum(".lora_A" in name for name in trained) == 2 * 10  # q, k, v, out twice, and two of the feed-forward
    path = trainer.save(tmp_path / "lora", 3)
    stored = load_training(path)[0]
    assert not any("base_layer" in name for name in stored["weights"]) and set(stored["average"]) == trained


def test_a_run_with_lora_resumes_bit_equal_and_exports_merged_and_as_adapter(tmp_path, base):
    pytest.importorskip("peft")
    from diffusers import WanTransformer3DModel

    banks = bank(0), bank(1)
    straight = with_lora(tmp_path, "straight", 8, base)
    export = train_world_model(straight, banks)
    halves = with_lora(tmp_path, "halves", 8, base)
    trainer = Trainer(halves, banks[0], torch.device("cpu"))
    for step in range(5):
        trainer.step(step)
    trainer.save(tmp_path / "halves", 5)
    halves.run.resume = True
    train_world_model(halves, banks)
    one, two = (load_training(tmp_path / name / "last")[0] for name in ("straight", "halves"))
    assert all(torch.equal(value, two[group][key]) for group in one for key, value in one[group].items())

    folder = tmp_path / "straight" / "last" / "model"
    merged = load_denoiser(folder).transformer
    assert json.loads((folder / "transformer/config.json").read_text()) == json.loads(
        (base / "transformer/config.json").read_text()
    )
    stock = WanTransformer3DModel.from_pretrained(base / "transformer")
    assert not torch.equal(stock.blocks[0].ffn.net[2].weight, merged.blocks[0].ffn.net[2].weight)
    stock.load_lora_adapter(str(folder / "adapter"), prefix=None, use_safetensors=True, weight_name=FILE)
    stock.fuse_lora()
    stock.unload_lora()
    for (name, value), (other, expected) in zip(merged.state_dict().items(), stock.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    assert (export / "adapter" / FILE).is_file()


def test_physics_gradients_reach_adapters_up_to_the_tap_and_no_further(tmp_path, base):
    pytest.importorskip("peft")
    trainer = Trainer(with_lora(tmp_path, "lora", 2, base), bank(0), torch.device("cpu"))
    for name, parameter in trainer.denoiser.transformer.named_parameters():
        if ".lora_B." in name:  # zero at the start, which stops the gradient of A
            torch.nn.init.normal_(parameter, std=0.02)
    held = trainer.batch(0)
    from physisforcing.worldmodel.flow_matching import add_noise, frame_timesteps

    x, sigma = held["latents_BCFhw"], torch.full((3,), 0.5)
    noisy = add_noise(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), sigma)
    context = trainer.denoiser.context(held["text_BLD"], held["proprioception_BKA"])
    _, tapped = trainer.denoiser(noisy, frame_timesteps(sigma, 3), context, need_tap=True)
    trainer.forcing(tapped, tuple(x.shape[2:]), held["targets"], sigma_B=sigma).loss.backward()
    for number, block in enumerate(trainer.denoiser.transformer.blocks, start=1):
        found = [p.grad for name, p in block.named_parameters() if ".lora_" in name]
        reached = [grad is not None and bool(grad.any()) for grad in found]
        assert len(found) == 20 and (all(reached) if number <= trainer.denoiser.tap else not any(reached)), number


def test_adapters_do_not_go_on_over_other_frozen_weights(tmp_path, base):
    pytest.importorskip("peft")
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    trainer = Trainer(with_lora(tmp_path, "run", 2, copy), bank(0), torch.device("cpu"))
    path = trainer.save(tmp_path / "run", 1)
    assert trainer.restore(path) == 1
    settings = json.loads((copy / "world_model.json").read_text())
    (copy / "world_model.json").write_text(json.dumps(settings | {"name": "another"}))
    with pytest.raises(UserError, match=r"run\.init"):
        Trainer(with_lora(tmp_path, "run", 2, copy), bank(0), torch.device("cpu")).restore(path)


def test_lora_names_what_is_wrong(tmp_path, base):
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"lora\.targets.*to_q"):
        Trainer(with_lora(tmp_path, "run", 1, base, targets=["to_qq"]), bank(0), torch.device("cpu"))
    made = with_lora(tmp_path, "run", 1, base)
    made.run.init = None
    made.backbone = WanConfig(latent_channels=4, num_heads=2, head_dim=12, num_layers=2, ffn_dim=32, tap=1)
    with pytest.raises(UserError, match=r"lora\.rank.*run\.init"):
        Trainer(made, bank(0), torch.device("cpu"))
    with pytest.raises(UserError, match=r"lora\.rank"):
        settings_module.LoraConfig(rank=-1)
