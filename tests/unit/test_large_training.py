"""Training of the large backbones, tiny: what is learnt, against stock diffusers; continuation and exports."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_large
import tiny_paper
from physisforcing.core.errors import UserError
from physisforcing.worldmodel.backbones.folder import load_backbone
from physisforcing.worldmodel.backbones.protocol import to_timesteps
from physisforcing.worldmodel.training.checkpoint import latest_checkpoint, load_training
from physisforcing.worldmodel.training.objective import objective
from physisforcing.worldmodel.training.worldmodel import Trainer, train_world_model
from ranks import fork

pytestmark = pytest.mark.usefixtures("own_cache")  # sentences are embedded
KINDS = ("ti2v", "a14b", "cosmos3")


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
def test_the_flow_loss_is_that_of_the_stock_network(large_models, tmp_path, kind, first_latent):
    model, store = large_models[kind]
    config = tiny_large.config(model, [store], tmp_path / "run", rank=0)
    config.large.first_latent = first_latent
    trainer = tiny_large.trainer(config)
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
def test_a_run_that_was_stopped_goes_on_bit_exactly_and_its_export_is_stock(large_models, tmp_path, kind):
    model, store = large_models[kind]
    straight = train_world_model(tiny_large.config(model, [store], tmp_path / "straight"))
    halved = tiny_large.config(model, [store], tmp_path / "halved")
    trainer = tiny_large.trainer(copy.deepcopy(halved))
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
    said = json.loads((straight / "transformer" / "physis_backbone.json").read_text())
    first = "mask" if kind == "a14b" else "pinned"
    assert said == {"first_latent": first, "tap": 1} | ({"fps": 16.0} if kind == "cosmos3" else {})
    checkpoint = tmp_path / "straight" / "step-000002" / "model"
    assert (checkpoint / "adapter").is_dir() and not (checkpoint / "transformer").exists()


@pytest.mark.parametrize(("kind", "rank", "where"), [("ti2v", 2, "update"), ("a14b", 0, "save")])
def test_a_run_that_is_killed_goes_on_with_the_bits_of_one_left_alone(large_models, tmp_path, kind, rank, where):
    """Killed at the end of the update after the first checkpoint, and before the second checkpoint is put in its place."""
    model, store = large_models[kind]
    train_world_model(tiny_large.config(model, [store], tmp_path / "straight", rank=rank))
    config = tiny_large.config(model, [store], tmp_path / "killed", rank=rank)

    def dies() -> None:
        step, rename = Trainer.step, os.rename

        def last_step(trainer: Trainer, number: int):
            made = step(trainer, number)
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return made

        def last_rename(source, target) -> None:
            if Path(target).name == "step-000004":
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        if where == "update":
            Trainer.step = last_step
        else:
            os.rename = last_rename
        train_world_model(copy.deepcopy(config))

    child = fork(dies, "the killed run")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert load_training(latest_checkpoint(tmp_path / "killed"))[1]["step"] == 2
    config.run.resume = True
    train_world_model(config)
    one, other = (load_training(tmp_path / name / "last") for name in ("straight", "killed"))
    assert one[1]["step"] == other[1]["step"] == 4
    assert one[0].keys() == other[0].keys() >= {"weights", "optimizer", "rng"}
    for group, values in one[0].items():
        assert values.keys() == other[0][group].keys()
        assert all(torch.equal(value, other[0][group][key]) for key, value in values.items()), group
    assert any(name.startswith("forcing.") for name in one[0]["weights"])
    assert not list((tmp_path / "killed").glob(".writing-*"))


def _check_stock(kind: str, model: Path, export: Path) -> None:
    """The export has the stock model's keys and loads in its class; the adapter on the base model is the merged model; the stock pipeline and our
    generation make the same latents of it."""
    import diffusers

    from physisforcing.worldmodel.paper_generate import PaperConfig, PaperGenerator

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
    like_stock = {"a14b": {"shift": 3.0}, "ti2v": {"shift": 5.0}, "cosmos3": {"shift": 10.0, "fps": 24.0}}[kind]
    ours = PaperConfig(
        **tiny_paper.SIZE, transformer=str(export / "transformer"), steps=2, guidance=1.0, exact_times=True, sampler="unipc", **like_stock
    )  # fmt: skip
    made = tiny_paper.our_latents(PaperGenerator(model, ours), [0])[0]
    # Two loaders read these weights, which may then lie otherwise in memory; equal bits are asserted in test_paper_backbones_generation.py.
    torch.testing.assert_close(made, after, atol=1e-5, rtol=1e-5)


def test_all_weights_are_trained_and_exported_without_adapters(large_models, tmp_path):
    model, store = large_models["ti2v"]
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


def test_gradients_of_parts_are_those_of_the_whole_batch(large_models, tmp_path):
    model, store = large_models["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "whole")
    config.run.batch, config.flow.motion_weight, config.physics.query_frames = 4, 2.0, [0, 1]
    parts = copy.deepcopy(config)
    parts.run.micro = 1
    found = []
    for settings in (config, parts):
        terms = tiny_large.trainer(settings).step(0)
        found.append({name: float(value) for name, value in terms.items() if not name.startswith("share")})
    assert found[0]["related"] < 4, "one of the samples has no targets"
    assert found[0].pop("tokens") > 0 and found[0]["pairs"] > 0
    assert {name: found[1][name] for name in found[0]} == pytest.approx(found[0], rel=2e-5)
    parts.run.micro = 3
    with pytest.raises(UserError, match=r"run\.micro.*got 3.*divides the 4 samples"):
        tiny_large.trainer(parts)


def test_counts_and_means_of_parts():
    from physisforcing.worldmodel.training.parallel import sum_parts

    parts = [{"loss": torch.tensor(1.0), "pairs": torch.tensor(3.0), "epe_px": torch.tensor(2.0)}]
    parts.append({"loss": torch.tensor(3.0), "pairs": torch.tensor(1.0), "epe_px": torch.tensor(6.0)})
    assert {name: float(value) for name, value in sum_parts(parts).items()} == {
        "loss": 2.0,
        "pairs": 4.0,
        "epe_px": 3.0,
    }


def test_adapters_belong_to_the_weights_they_began_with(large_models, tmp_path):
    model, store = large_models["ti2v"]
    trainer = tiny_large.trainer(tiny_large.config(model, [store], tmp_path / "run"))
    (tmp_path / "run").mkdir()
    path = trainer.save(tmp_path / "run", 1)
    tiny_paper.ti2v(tmp_path / "again")
    same = tiny_large.config(tmp_path / "again", [store], tmp_path / "run")
    assert tiny_large.trainer(same).restore(path) == 1
    other = tiny_paper.wan_transformer(8, 8, 99)
    other.save_pretrained(tmp_path / "again" / "transformer")
    with pytest.raises(UserError, match=r"run\.init.*weights"):
        tiny_large.trainer(same).restore(path)


def test_what_is_noted_beside_the_weights_stays_that_of_the_run(large_models, tmp_path):
    from physisforcing.worldmodel.backbones.folder import save_settings

    model, store = large_models["a14b"]
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    trainer = tiny_large.trainer(tiny_large.config(model, [store], tmp_path / "run"))
    (tmp_path / "run").mkdir()
    path = trainer.save(tmp_path / "run", 1)
    assert tiny_large.trainer(tiny_large.config(moved, [store], tmp_path / "run")).restore(path) == 1
    for noted, wanted in (
        ({"first_latent": "pinned"}, "first_latent=mask"),
        ({"first_latent": "mask", "tap": 2}, "tap=1"),
    ):
        save_settings(moved / "transformer", **noted)
        other = tiny_large.trainer(tiny_large.config(moved, [store], tmp_path / "run"))
        with pytest.raises(UserError, match=f"large.{wanted}"):
            other.restore(path)


def test_latents_of_another_autoencoder_are_refused(large_models, tmp_path):
    model, store = large_models["ti2v"]
    other = Path(shutil.copytree(model, tmp_path / "other"))
    torch.manual_seed(9)
    vae = tiny_paper.vae(8, 16)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    vae.save_pretrained(other / "vae")
    with pytest.raises(UserError, match=r"data\.latents: got 'of the autoencoder .*other/vae"):
        train_world_model(tiny_large.config(other, [store], tmp_path / "run"))


def test_a_finished_run_is_a_beginning(large_models, tmp_path):
    model, store = large_models["ti2v"]
    export = train_world_model(tiny_large.config(model, [store], tmp_path / "first"))
    config = tiny_large.config(model, [store], tmp_path / "second", steps=1)
    config.run.init = str(export)
    trainer = tiny_large.trainer(config)
    heads = load_file(export / "physics_heads.safetensors")
    assert all(torch.equal(value, heads[name]) for name, value in trainer.forcing.state_dict().items())
    weight = trainer.denoiser.transformer.blocks[0].attn1.to_q.base_layer.weight
    kept = load_file(export / "transformer" / "diffusion_pytorch_model.safetensors")["blocks.0.attn1.to_q.weight"]
    assert torch.equal(weight.bfloat16(), kept)


def test_modules_trained_whole_are_exact_and_beside_the_adapter(large_models, tmp_path):
    model, store = large_models["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run")
    config.lora.also, config.run.precision = ["patch_embedding", "proj_out", "blocks.0.ffn"], "bf16"
    trainer = tiny_large.trainer(config)
    stored = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, parameter in trainer.denoiser.named_parameters():
        plain = name.removeprefix("backbone.transformer.").replace(".base_layer.", ".")
        if plain in stored and parameter.requires_grad:
            assert torch.equal(parameter, stored.pop(plain)), "every digit of the file is there"
    assert not any(name.startswith(tuple(config.lora.also)) for name in stored)
    config.lora.also = config.lora.also[:2]
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
        tiny_large.trainer(config)


def test_modules_under_adapters_are_trained_whole_by_their_stock_names(large_models, tmp_path):
    model, store = large_models["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run")
    config.lora.also = ["blocks.0.ffn"]
    whole = load_file(train_world_model(config) / "adapter" / "whole_modules.safetensors")
    stock = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    assert set(whole) == {name for name in stock if name.startswith("blocks.0.ffn.")} and len(whole) == 4


def test_a_run_that_was_ended_early_is_exported_without_training_on(large_models, tmp_path):
    model, store = large_models["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run")
    config.large.export = True
    with pytest.raises(UserError, match=r"large\.export.*run\.resume=true"):
        train_world_model(copy.deepcopy(config))
    trainer = tiny_large.trainer(copy.deepcopy(config))
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


def test_a_pipeline_without_autoencoder_costs_the_videos_alone(large_models, tmp_path):

    model, store = large_models["ti2v"]
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    config = tiny_large.config(bare, [store], tmp_path / "run", steps=1)
    config.large.videos = 1
    assert (train_world_model(config) / "transformer" / "config.json").is_file()
    told = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "not made" in told and not (tmp_path / "run" / "videos").exists()


def test_an_export_that_is_cut_off_leaves_the_one_before(large_models, tmp_path, monkeypatch):
    from physisforcing.worldmodel.training import export as module

    model, store = large_models["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run")
    export = train_world_model(copy.deepcopy(config))
    (export / "of the first").touch()
    before = {path.name: path.read_bytes() for path in (export / "transformer").iterdir()}
    config.run.resume = True
    for name in ("write_part", "save_settings", "save_heads"):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                train_world_model(copy.deepcopy(config))
        assert {path.name: path.read_bytes() for path in (export / "transformer").iterdir()} == before, name
        assert (export / "of the first").is_file(), name
    train_world_model(config)
    assert not (export / "of the first").exists(), "a whole export in place of the one before, nothing mixed"
    assert {path.name: path.read_bytes() for path in (export / "transformer").iterdir()} == before
    assert [path.name for path in export.parent.iterdir() if path.name[0] == "."] == []
