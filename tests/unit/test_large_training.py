"""Training of the large backbones, tiny: what is learnt, against stock diffusers; exports; batches of one shape; what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_large
import tiny_paper
from physisforcing.core.config import compose
from physisforcing.core.errors import DatasetError, UserError
from physisforcing.worldmodel.backbones.folder import load_backbone
from physisforcing.worldmodel.backbones.protocol import to_timesteps
from physisforcing.worldmodel.data.latent_bank import EpochSampler
from physisforcing.worldmodel.data.latent_shards import read_store, read_window, write_store
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.training.banks import open_stores
from physisforcing.worldmodel.training.config import TrainWorldModelConfig
from physisforcing.worldmodel.training.initial import adopt_model
from physisforcing.worldmodel.training.objective import objective
from physisforcing.worldmodel.training.worldmodel import Trainer, train_world_model

CPU = torch.device("cpu")
KINDS = ("ti2v", "a14b", "cosmos3")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """kind -> (pipeline folder, store)."""
    folder = tmp_path_factory.mktemp("large")
    return {
        kind: (tiny_large.pipeline(folder, kind), tiny_large.store(folder / f"{kind}-store", kind)) for kind in KINDS
    }


def opened(config: TrainWorldModelConfig):
    return open_stores(config.data.latents, config.data.heldout, CPU, config.physics, ahead=2)


def trainer_of(config: TrainWorldModelConfig) -> Trainer:
    adopt_model(config)
    return Trainer(config, opened(config)[0], CPU)


def flow_reference(
    kind: str, model: Path, batch: dict, noise: torch.Tensor, sigma: torch.Tensor, first: int
) -> torch.Tensor:
    """The flow-matching loss with diffusers' own forward, written out for one sample at a time."""
    import diffusers

    x0, found = batch["latents_BCFhw"], []
    name = "Cosmos3OmniTransformer" if kind == "cosmos3" else "WanTransformer3DModel"
    stock = getattr(diffusers, name).from_pretrained(model / "transformer")
    for row in range(len(x0)):
        one, s = x0[row : row + 1], sigma[row]
        noisy = one * (1 - s) + noise[row : row + 1] * s
        if first:
            noisy[:, :, 0] = one[:, :, 0]
        if kind == "cosmos3":
            backbone = load_backbone(model, fps=16.0, exact_times=True)  # held against the stock pipeline elsewhere
            text = batch["text"][row : row + 1]
            shown = backbone.conditions(one[:, :, :1], text, one.shape[2])
            velocity = backbone(noisy, sigma[row : row + 1], text, shown)[0]
        else:
            times = to_timesteps(sigma[row : row + 1])
            if kind == "a14b":
                mask = torch.zeros(1, 4, *one.shape[2:])
                mask[:, :, 0] = 1
                noisy = torch.cat([noisy, mask, batch["condition_BCFhw"][row : row + 1]], 1)
            if first:
                tokens = one.shape[3] // 2 * (one.shape[4] // 2)
                times = times.repeat(one.shape[2] * tokens)[None]
                times[:, :tokens] = 0
            text = batch["text"][row : row + 1]
            velocity = stock(hidden_states=noisy, timestep=times, encoder_hidden_states=text, return_dict=False)[0]
        found.append((velocity - (noise[row : row + 1] - one))[:, :, first:].square().mean())
    return torch.stack(found).mean()


@pytest.mark.parametrize(
    ("kind", "first_latent"), [("ti2v", None), ("a14b", None), ("a14b", "pinned"), ("cosmos3", None)]
)
def test_the_flow_loss_is_that_of_the_stock_network(made, tmp_path, kind, first_latent):
    model, store = made[kind]
    config = tiny_large.config(model, [store], tmp_path / "run", rank=0)
    config.large.first_latent = first_latent
    trainer = trainer_of(config)
    batch = trainer.batch(3)
    draw = torch.Generator().manual_seed(5)
    noise, sigma = torch.randn(batch["latents_BCFhw"].shape, generator=draw), torch.tensor([0.3, 0.9])
    found = objective(trainer.denoiser, None, batch, (noise, sigma, None), config.flow, nullcontext())["fm"]
    first = 0 if kind == "a14b" and first_latent is None else 1
    assert trainer.denoiser.first_predicted == first
    with torch.no_grad():
        wanted = flow_reference(kind, model, batch, noise, sigma, first)
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_goes_on_bit_exactly_and_its_export_is_stock(made, tmp_path, kind):
    model, store = made[kind]
    straight = train_world_model(tiny_large.config(model, [store], tmp_path / "straight"))
    halved = tiny_large.config(model, [store], tmp_path / "halved")
    trainer = trainer_of(copy.deepcopy(halved))
    for step in range(2):
        trainer.step(step)
    (tmp_path / "halved").mkdir()
    trainer.save(tmp_path / "halved", 2)
    halved.run.resume = True
    resumed = train_world_model(halved)
    for file in (
        "transformer/diffusion_pytorch_model.safetensors",
        "adapter/pytorch_lora_weights.safetensors",
        "physics_heads.safetensors",
    ):
        a, b = load_file(straight / file), load_file(resumed / file)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), file
    _check_stock(kind, model, straight)
    assert json.loads((straight / "transformer" / "physis_backbone.json").read_text())["tap"] == 1
    checkpoint = tmp_path / "straight" / "step-000002" / "model"
    assert (checkpoint / "adapter").is_dir() and not (checkpoint / "transformer").exists()


def _check_stock(kind: str, model: Path, export: Path) -> None:
    """The export has the stock model's keys and loads in its class; the adapter on the base model is the merged model."""
    import diffusers

    name = "Cosmos3OmniTransformer" if kind == "cosmos3" else "WanTransformer3DModel"
    stock = getattr(diffusers, name)
    merged = stock.from_pretrained(export / "transformer", dtype=torch.float32)
    base = stock.from_pretrained(model / "transformer", dtype=torch.float32)
    assert merged.state_dict().keys() == base.state_dict().keys()
    moved = {
        name for name, value in merged.state_dict().items() if (value - base.state_dict()[name]).abs().max() > 1e-3
    }
    base.load_lora_adapter(
        export / "adapter", prefix=None, use_safetensors=True, weight_name="pytorch_lora_weights.safetensors"
    )
    base.fuse_lora()
    plain = {
        name.replace(".base_layer.", "."): value for name, value in base.state_dict().items() if ".lora_" not in name
    }
    assert moved, "training moved nothing"
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, plain[name].bfloat16().float(), rtol=1e-2, atol=1e-4)
    pipeline = tiny_paper.stock_pipeline(model)
    before = tiny_paper.stock_latents(pipeline, steps=2, guidance=1.0, seed=0)
    pipeline.transformer = merged
    after = tiny_paper.stock_latents(pipeline, steps=2, guidance=1.0, seed=0)
    assert after.isfinite().all() and not torch.equal(before, after)


def test_all_weights_are_trained_and_exported_without_adapters(made, tmp_path):
    model, store = made["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run", rank=0)
    config.large.videos, config.large.video_steps, config.optim.ema = 1, 2, 0.0
    export = train_world_model(config)
    before, after = (
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors") for folder in (model, export)
    )
    assert {name for name in before if not torch.equal(before[name].bfloat16(), after[name].bfloat16())} >= set(
        before
    ) - {name for name in before if "norm" in name}
    assert not (export / "adapter").exists()
    films = sorted(path.name for path in (tmp_path / "run" / "videos").iterdir())
    assert films == ["step-000000-0000.mp4", "step-000004-0000.mp4"]
    import av

    with av.open(str(tmp_path / "run" / "videos" / films[1])) as film:
        assert (film.streams.video[0].width, film.streams.video[0].height, film.streams.video[0].frames) == (192, 64, 9)
        assert "generated by the model after 4 steps" in film.metadata["comment"]


def test_gradients_of_parts_are_those_of_the_whole_batch(made, tmp_path):
    model, store = made["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "whole")
    config.run.batch, config.flow.motion_weight, config.physics.query_frames = 4, 2.0, [0, 1]
    parts = copy.deepcopy(config)
    parts.run.micro = 1
    found = []
    for settings in (config, parts):
        adopt_model(settings)
        bank = open_stores(settings.data.latents, 1, CPU, settings.physics)[0]
        terms = Trainer(settings, bank, CPU).step(0)
        found.append({name: float(value) for name, value in terms.items() if not name.startswith("share")})
    assert found[0]["related"] < 4, "one of the samples has no targets"
    assert found[0].pop("tokens") > 0 and found[0]["pairs"] > 0
    assert {name: found[1][name] for name in found[0]} == pytest.approx(found[0], rel=2e-5)
    parts.run.micro = 3
    with pytest.raises(UserError, match=r"run\.micro.*got 3.*divides the 4 samples"):
        Trainer(parts, bank, CPU)


def test_counts_and_means_of_parts():
    from physisforcing.worldmodel.training.parallel import sum_parts

    parts = [{"loss": torch.tensor(1.0), "pairs": torch.tensor(3.0), "epe_px": torch.tensor(2.0)}]
    parts.append({"loss": torch.tensor(3.0), "pairs": torch.tensor(1.0), "epe_px": torch.tensor(6.0)})
    assert {name: float(value) for name, value in sum_parts(parts).items()} == {
        "loss": 2.0,
        "pairs": 4.0,
        "epe_px": 3.0,
    }


def test_an_epoch_goes_once_through_every_shape():
    sampler = EpochSampler(groups=[torch.arange(6), torch.arange(10, 14), torch.tensor([20])])
    epoch = [sampler.rows(2, 7, step) for step in range(6)]  # 3 + 2 + 1 batches
    assert all(torch.equal(rows, sampler.rows(2, 7, step)) for step, rows in enumerate(epoch))
    assert sorted(torch.cat(epoch).tolist()) == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 20, 20]
    assert all(len({row // 10 for row in rows.tolist()}) == 1 for rows in epoch)
    again = [sampler.rows(2, 7, step).tolist() for step in range(6, 12)]
    assert sorted(row for rows in again for row in rows) == sorted(torch.cat(epoch).tolist())
    assert again != [rows.tolist() for rows in epoch] and sampler.rows(2, 8, 0).tolist() != epoch[0].tolist()


def test_windows_of_two_shapes_are_trained_in_batches_of_one(made, tmp_path):
    model, store = made["ti2v"]
    other = tiny_large.store(tmp_path / "other", "ti2v", seed=1, rows=6)
    config = tiny_large.config(model, [store, other], tmp_path / "run")
    trainer = trainer_of(config)
    shapes = set()
    for step in range(8):
        assert torch.isfinite(trainer.step(step)["loss"])
        shapes.add(trainer.bank.latent_shape(trainer.rows(step))[1:])
    assert shapes == {(8, 3, 4, 6), (8, 3, 6, 6)}


def test_a_batch_holds_what_the_store_holds(made):
    _, store = made["a14b"]
    bank = open_stores([store], 0, CPU, PhysicsConfig(), ahead=3)[0]
    rows = torch.tensor([5, 0, 5])
    batch = bank.batch(rows)
    windows = read_store(store)[1]
    for place, row in enumerate(rows.tolist()):
        kept = read_window(store, windows[row])
        assert torch.equal(batch["latents_BCFhw"][place], kept["latents_CFhw"])
        assert torch.equal(batch["condition_BCFhw"][place], kept["condition_CFhw"])
        length = len(kept["text_LD"])
        assert torch.equal(batch["text"][place, :length], kept["text_LD"]) and not batch["text"][place, length:].any()
    assert batch["text"].shape == (3, 512, 16)
    assert bank.name(5) == "set0 episode 2 from step 16"
    without = bank.batch(torch.tensor([7]))["targets"]
    assert (
        not without["select_BN"].any() and not without["token_mask_BFhw"].any() and batch["targets"]["select_BN"].any()
    )
    bank.close()


def test_the_next_batch_is_read_while_this_one_is_computed(made, tmp_path, monkeypatch):
    from physisforcing.worldmodel.data.latent_bank import LatentBank

    model, store = made["ti2v"]
    trainer = trainer_of(tiny_large.config(model, [store], tmp_path / "run"))
    read, load = [], LatentBank._load
    monkeypatch.setattr(LatentBank, "_load", lambda self, row: read.append(row) or load(self, row))
    trainer.batch(0)
    wanted = set(trainer.rows(0).tolist()) | set(trainer.rows(1).tolist())
    for row in wanted:
        trainer.bank._coming[row].result() if row in trainer.bank._coming else None
    assert set(read) == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "codec", "runs/vae"), r"codec.*no such setting with model="),
        (lambda c: setattr(c.data, "roots", ["runs/bell"]), r"data\.roots.*no such setting with model="),
        (lambda c: setattr(c, "text_dropout", 0.2), r"text_dropout.*no such setting with model="),
        (lambda c: setattr(c.data, "latents", []), r"data\.latents.*no store.*physis data latents"),
        (lambda c: setattr(c.data, "heldout", 4), r"data\.heldout.*fewer than the 4 episodes"),
        (lambda c: setattr(c.large, "tap", 9), r"tap.*a block from 1 to 3"),
        (lambda c: setattr(c.large, "first_latent", "mask"), r"first_latent.*no place for a mask"),
        (lambda c: setattr(c.backbone, "tap", 2), r"backbone\.tap.*no such setting with model=.*large\.tap="),
        (lambda c: setattr(c.teacher.tracker, "name", "classical"), r"teacher\.tracker\.name.*leave teacher out"),
        (lambda c: setattr(c.data, "start_stride", 8), r"data\.start_stride.*no such setting with model="),
        (lambda c: setattr(c.data, "workers", 0), r"data\.workers.*1 or more"),
        (lambda c: setattr(c, "model", ""), r"large\.videos.*no such setting without model="),
        (lambda c: setattr(c.run, "wandb", "physis"), r"run\.wandb.*without the package wandb"),
    ],
)
def test_what_does_not_belong_to_a_large_backbone_is_refused(made, tmp_path, change, message, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else real(name, *rest))
    model, store = made["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run", rank=0)
    change(config)
    with pytest.raises(UserError, match=message):
        train_world_model(config)


def test_stores_of_another_model_are_refused(made, tmp_path):
    config = tiny_large.config(made["ti2v"][0], [made["a14b"][1]], tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.latents: channels.*got 16.*wanted 8"):
        train_world_model(config)
    config = tiny_large.config(made["ti2v"][0], [made["ti2v"][1], made["a14b"][1]], tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.latents: channels of .*a14b-store"):
        train_world_model(config)
    blind = tiny_large.store(tmp_path / "blind", "ti2v", targets=False)
    config = tiny_large.config(made["ti2v"][0], [blind], tmp_path / "run")
    with pytest.raises(UserError, match=r"without physics targets.*physics=none"):
        train_world_model(config)


def test_a_damaged_shard_is_named(made, tmp_path):
    store = tiny_large.store(tmp_path / "store", "ti2v", episodes=1)
    shard = next(store.glob("9x*/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 255
    shard.write_bytes(data)
    bank = open_stores([store], 0, CPU, None)[0]
    with pytest.raises(DatasetError, match=r"latents of set0 episode 0 from step 0.*checksum"):
        bank.batch(torch.tensor([0]))


def test_adapters_belong_to_the_weights_they_began_with(made, tmp_path):
    model, store = made["ti2v"]
    trainer = trainer_of(tiny_large.config(model, [store], tmp_path / "run"))
    (tmp_path / "run").mkdir()
    path = trainer.save(tmp_path / "run", 1)
    tiny_paper.ti2v(tmp_path / "again")
    same = tiny_large.config(tmp_path / "again", [store], tmp_path / "run")
    assert trainer_of(same).restore(path) == 1
    other = tiny_paper.wan_transformer(8, 8, 99)
    other.save_pretrained(tmp_path / "again" / "transformer")
    with pytest.raises(UserError, match=r"run\.init.*weights"):
        trainer_of(same).restore(path)


def test_a_finished_run_is_a_beginning(made, tmp_path):
    model, store = made["ti2v"]
    export = train_world_model(tiny_large.config(model, [store], tmp_path / "first"))
    config = tiny_large.config(model, [store], tmp_path / "second", steps=1)
    config.run.init = str(export)
    trainer = trainer_of(config)
    heads = load_file(export / "physics_heads.safetensors")
    assert all(torch.equal(value, heads[name]) for name, value in trainer.forcing.state_dict().items())
    weight = trainer.denoiser.transformer.blocks[0].attn1.to_q.base_layer.weight
    kept = load_file(export / "transformer" / "diffusion_pytorch_model.safetensors")["blocks.0.attn1.to_q.weight"]
    assert torch.equal(weight.bfloat16(), kept)


@pytest.mark.parametrize(
    ("name", "rank", "lr"), [("pf_wan_5b", 0, 1e-5), ("pf_wan_a14b", 0, 1e-5), ("pf_cosmos3_nano", 16, 5e-4)]
)
def test_the_recipes_of_the_paper_compose(name, rank, lr):
    config = compose(
        "train_worldmodel", [f"experiment={name}", "model=folder", "data.latents=[store]"], TrainWorldModelConfig
    )
    assert (config.run.steps, config.run.batch, config.lora.rank, config.optim.lr) == (20000, 128, rank, lr)
    assert (config.flow.train_shift, config.flow.motion_weight, config.optim.ema) == (1.0, 0.0, 0.0)
    assert config.large.tap is None, "the middle block: 15 of 30, 20 of 40, 18 of 36"
    assert config.physics.phi_hidden == config.physics.psi_hidden == 2048 and config.physics.feature_dim == 256


def test_the_heads_learn_at_their_own_rate(made, tmp_path):
    model, store = made["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run")
    config.optim.heads = 10.0
    trainer = trainer_of(config)
    trainer.step(0)
    rates = {
        name: group["lr"]
        for group in trainer.optimizer.param_groups
        for name, p in trainer.model.named_parameters()
        if any(p is one for one in group["params"])
    }
    assert all(rate == pytest.approx(0.1) for name, rate in rates.items() if name.startswith("forcing."))
    assert all(rate == pytest.approx(0.01) for name, rate in rates.items() if name.startswith("denoiser."))


def test_deterministic_kernels_are_chosen_and_given_up_again(tmp_path):
    from physisforcing.worldmodel.training.runtime import choose_kernels

    try:
        choose_kernels(CPU, True)
        assert torch.are_deterministic_algorithms_enabled()
        choose_kernels(CPU, False)
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_unknown_way_of_sharding_is_refused(made, tmp_path):
    model, store = made["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run")
    config.run.sharding = "some"
    with pytest.raises(UserError, match=r"run\.sharding.*auto, weights or none"):
        trainer_of(config)


def test_modules_trained_whole_are_exact_and_beside_the_adapter(made, tmp_path):
    model, store = made["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run")
    config.lora.also, config.run.precision = ["patch_embedding", "proj_out"], "bf16"
    trainer = trainer_of(config)
    dtypes = {name: parameter.dtype for name, parameter in trainer.denoiser.named_parameters()}
    kept = dtypes["backbone.transformer.blocks.0.attn1.to_q.base_layer.weight"]
    assert (kept, dtypes["backbone.transformer.proj_out.weight"]) == (torch.bfloat16, torch.float32)
    config.run.precision = "auto"
    export = train_world_model(config)
    whole = load_file(export / "adapter" / "whole_modules.safetensors")
    assert set(whole) == {f"{name}.{part}" for name in config.lora.also for part in ("weight", "bias")}
    before, after = (load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in (model, export))
    for name, value in whole.items():
        assert torch.equal(after[name].float(), value.bfloat16().float()) and not torch.equal(value, before[name])
    config.lora.also = ["nowhere"]
    with pytest.raises(UserError, match=r"lora\.also.*nowhere"):
        trainer_of(config)


def test_modules_under_adapters_are_trained_whole_by_their_stock_names(made, tmp_path):
    model, store = made["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run")
    config.lora.also = ["blocks.0.ffn"]
    whole = load_file(train_world_model(config) / "adapter" / "whole_modules.safetensors")
    stock = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    assert set(whole) == {name for name in stock if name.startswith("blocks.0.ffn.")} and len(whole) == 4


def test_a_shape_without_any_targets_is_refused_before_the_first_batch(made, tmp_path):
    model, store = made["ti2v"]
    bare = tiny_large.store(tmp_path / "bare", "ti2v", episodes=4, seed=5, targets=False, rows=8)
    info, windows = read_store(bare)
    info.teachers = {"tracker": "random"}
    write_store(bare, info, windows)
    config = tiny_large.config(model, [store, bare], tmp_path / "run")
    config.data.heldout = 0
    with pytest.raises(UserError, match=r"no targets of any window with latents of \[8, 3, 8, 6\].*physics=none"):
        trainer_of(config)


def test_an_episode_in_two_stores_is_on_one_side(tmp_path):
    stores = [tiny_large.store(tmp_path / name, "ti2v", episodes=6, rows=rows) for name, rows in (("a", 0), ("b", 8))]
    other = tiny_large.store(
        tmp_path / "c", "ti2v", episodes=6, seed=1
    )  # the same pictures as in "a", under another name
    for folder in (stores[0], other):
        info, windows = read_store(folder)
        write_store(folder, info, [dataclasses.replace(w, content=f"film {w.episode}") for w in windows])
    training, heldout = open_stores([*stores, other], 2, CPU, None)
    seen, kept = ({window.episode for _, window in bank.windows} for bank in (training, heldout))
    assert not seen & kept and len(kept) == 2 and len(heldout) == 2 * 3 * 2 and len(training) == 4 * 3 * 2


def test_a_run_that_was_ended_early_is_exported_without_training_on(made, tmp_path):
    model, store = made["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run")
    config.large.export = True
    with pytest.raises(UserError, match=r"large\.export.*run\.resume=true"):
        train_world_model(copy.deepcopy(config))
    trainer = trainer_of(copy.deepcopy(config))
    for step in range(2):
        trainer.step(step)
    trainer.save(tmp_path / "run", 2)
    trainer.average.swap()
    trainer.export(tmp_path / "wanted")
    config.run.resume = True
    export = train_world_model(config)
    for file in ("transformer/diffusion_pytorch_model.safetensors", "physics_heads.safetensors"):
        a, b = load_file(tmp_path / "wanted" / file), load_file(export / file)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), file
    assert not (tmp_path / "run" / "step-000004").exists()


def test_a_run_goes_on_with_the_windows_it_began_with_wherever_they_lie(made, tmp_path):
    model, store = made["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run")
    trainer = trainer_of(config)
    trainer.step(0)
    checkpoint = trainer.save(tmp_path / "run", 1)
    moved = Path(shutil.copytree(store, tmp_path / "moved"))
    config.data.latents = [str(moved)]
    assert trainer_of(config).restore(checkpoint) == 1
    config.data.latents = [str(moved), str(tiny_large.store(tmp_path / "more", "ti2v", seed=3))]
    with pytest.raises(UserError, match=r"data\.latents: got 'windows .*as they were when the run began"):
        trainer_of(config).restore(checkpoint)


def test_the_heads_of_an_earlier_run_have_their_widths(made, tmp_path):
    model, store = made["ti2v"]
    export = train_world_model(tiny_large.config(model, [store], tmp_path / "first", steps=1))
    config = tiny_large.config(model, [store], tmp_path / "second", steps=1)
    config.run.init, usual = str(export), PhysicsConfig()
    config.physics.phi_hidden, config.physics.psi_hidden = usual.phi_hidden, usual.psi_hidden
    assert trainer_of(config).forcing.phi[1].out_features == 16
    config.physics.phi_hidden = 32
    with pytest.raises(UserError, match=r"physics\.phi_hidden: got 32, wanted 16"):
        trainer_of(config)


def test_targets_that_were_not_copied_are_named(made, tmp_path):
    model, store = made["ti2v"]
    part = Path(shutil.copytree(store, tmp_path / "part"))
    trainer = trainer_of(tiny_large.config(model, [part], tmp_path / "run"))
    shutil.rmtree(part / "targets")
    row = next(row for row, (_, window) in enumerate(trainer.bank.windows) if window.targets)
    with pytest.raises(DatasetError, match=r"targets of set0 episode .*targets/.*copy the whole store"):
        trainer.bank.batch(torch.tensor([row]))


def test_a_pipeline_without_autoencoder_costs_the_videos_alone(made, tmp_path):
    import shutil

    model, store = made["ti2v"]
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    config = tiny_large.config(bare, [store], tmp_path / "run", steps=1)
    config.large.videos = 1
    assert (train_world_model(config) / "transformer" / "config.json").is_file()
    told = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "not made" in told and not (tmp_path / "run" / "videos").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.lora, "also", ["proj_out"]), r"lora\.also.*without lora\.rank"),
        (
            lambda c: (setattr(c.physics, "weights", "gradient"), setattr(c.run, "micro", 1)),
            r"physics\.weights.*run\.micro",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(made, tmp_path, change, message):
    model, store = made["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run", rank=0)
    change(config)
    with pytest.raises(UserError, match=message):
        trainer_of(config)


def test_an_export_that_is_cut_off_leaves_the_one_before(made, tmp_path, monkeypatch):
    from physisforcing.worldmodel.training import export as module

    model, store = made["ti2v"]
    export = train_world_model(tiny_large.config(model, [store], tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in (export / "transformer").iterdir()}
    trainer = trainer_of(tiny_large.config(model, [store], tmp_path / "other"))
    monkeypatch.setattr(module, "save_settings", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.export(export)
    assert {path.name: path.read_bytes() for path in (export / "transformer").iterdir()} == before
