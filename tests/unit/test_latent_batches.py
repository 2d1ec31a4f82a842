"""Batches from latent stores while a run trains: which windows, read when, and what a store has to hold."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

import tiny_large
from physisforcing.core.errors import DatasetError, UserError
from physisforcing.worldmodel.data import latent_bank
from physisforcing.worldmodel.data.latent_bank import EpochSampler, LatentBank
from physisforcing.worldmodel.data.latent_shards import read_store, read_window, write_store
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.training.banks import open_stores
from physisforcing.worldmodel.training.flops import step_flops
from physisforcing.worldmodel.training.worldmodel import train_world_model

CPU = torch.device("cpu")


def test_an_epoch_goes_once_through_every_shape():
    sampler = EpochSampler(groups=[torch.arange(6), torch.arange(10, 14), torch.tensor([20])])
    epoch = [sampler.rows(2, 7, step) for step in range(6)]  # 3 + 2 + 1 batches
    assert all(torch.equal(rows, sampler.rows(2, 7, step)) for step, rows in enumerate(epoch))
    assert sorted(torch.cat(epoch).tolist()) == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 20, 20]
    assert all(len({row // 10 for row in rows.tolist()}) == 1 for rows in epoch)
    again = [sampler.rows(2, 7, step).tolist() for step in range(6, 12)]
    assert sorted(row for rows in again for row in rows) == sorted(torch.cat(epoch).tolist())
    assert again != [rows.tolist() for rows in epoch] and sampler.rows(2, 8, 0).tolist() != epoch[0].tolist()


def test_windows_of_two_shapes_are_trained_in_batches_of_one(large_models, tmp_path):
    model, store = large_models["ti2v"]
    other = tiny_large.store(tmp_path / "other", "ti2v", seed=1, rows=6)
    config = tiny_large.config(model, [store, other], tmp_path / "run")
    trainer = tiny_large.trainer(config)
    counted = {}
    for step in range(8):
        assert torch.isfinite(trainer.step(step)["loss"])
        counted[trainer.bank.latent_shape(trainer.rows(step))[1:]] = trainer.operations
    shapes = (8, 3, 4, 6), (8, 3, 6, 6)
    assert counted == {shape: 2 * step_flops(trainer.denoiser, (1, *shape), 512) for shape in shapes}
    assert 1 < counted[shapes[1]] / counted[shapes[0]] < 1.5, "text costs the same in both"


def test_a_batch_holds_what_the_store_holds(large_models):
    _, store = large_models["a14b"]
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


def test_a_sentence_that_is_too_long_is_named_before_any_batch(large_models, monkeypatch):
    """The sentences of the four episodes have 4 to 7 tokens."""
    store = large_models["ti2v"][1]
    bank = open_stores([store], 0, CPU, None)[0]
    asked, length = [], latent_bank.sentence_length
    monkeypatch.setattr(latent_bank, "sentence_length", lambda *window: asked.append(window) or length(*window))
    monkeypatch.setattr(LatentBank, "_read", lambda *_: pytest.fail("lengths are told by headers"))
    bank.pad_sentences(7)
    assert bank.text_tokens == 7 and [window.episode for _, window in asked] == [0, 1, 2, 3], "each once"
    message = (
        r"data\.latents: got 'a sentence of 7 tokens, set0 episode 3 from step 0', wanted at most 6.*text_tokens=7"
    )
    with pytest.raises(UserError, match=message):
        bank.pad_sentences(6)


def test_the_next_batch_is_read_while_this_one_is_computed(large_models, tmp_path, monkeypatch):
    model, store = large_models["ti2v"]
    trainer = tiny_large.trainer(tiny_large.config(model, [store], tmp_path / "run"))
    read, load = [], LatentBank._load
    monkeypatch.setattr(LatentBank, "_load", lambda self, row: read.append(row) or load(self, row))
    trainer.batch(0)
    wanted = set(trainer.rows(0).tolist()) | set(trainer.rows(1).tolist())
    for row in wanted:
        trainer.bank._coming[row].result() if row in trainer.bank._coming else None
    assert set(read) == wanted


def test_the_rows_of_a_step_are_drawn_once(large_models, tmp_path, monkeypatch):
    model, store = large_models["ti2v"]
    trainer = tiny_large.trainer(tiny_large.config(model, [store], tmp_path / "run", steps=6))
    wanted = [trainer.rows(step).tolist() for step in range(6)]
    drawn, rows = [], EpochSampler.rows
    monkeypatch.setattr(EpochSampler, "rows", lambda self, *asked: drawn.append(asked[2]) or rows(self, *asked))
    asked, batch = [], LatentBank.batch
    monkeypatch.setattr(LatentBank, "batch", lambda self, some: asked.append(some.tolist()) or batch(self, some))
    for step in (0, 1, 2, 4, 5):  # a step out of turn is drawn for itself
        trainer.batch(step)
    assert asked == [wanted[step] for step in (0, 1, 2, 4, 5)]
    assert drawn == [0, 1, 2, 3, 4, 5]


def test_stores_of_another_model_are_refused(large_models, tmp_path):
    config = tiny_large.config(large_models["ti2v"][0], [large_models["a14b"][1]], tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.latents: channels.*got 16.*wanted 8"):
        train_world_model(config)
    config = tiny_large.config(
        large_models["ti2v"][0], [large_models["ti2v"][1], large_models["a14b"][1]], tmp_path / "run"
    )
    with pytest.raises(UserError, match=r"data\.latents: latents of .*a14b"):
        train_world_model(config)
    blind = tiny_large.store(tmp_path / "blind", "ti2v", targets=False)
    config = tiny_large.config(large_models["ti2v"][0], [blind], tmp_path / "run")
    with pytest.raises(UserError, match=r"without physics targets.*physics=none"):
        train_world_model(config)


def test_a_damaged_shard_is_named(large_models, tmp_path):
    store = tiny_large.store(tmp_path / "store", "ti2v", episodes=1)
    shard = next(store.glob("9x*/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 255
    shard.write_bytes(data)
    bank = open_stores([store], 0, CPU, None)[0]
    with pytest.raises(DatasetError, match=r"latents of set0 episode 0 from step 0.*checksum"):
        bank.batch(torch.tensor([0]))


def test_a_shape_without_any_targets_is_refused_before_the_first_batch(large_models, tmp_path):
    model, store = large_models["ti2v"]
    bare = tiny_large.store(tmp_path / "bare", "ti2v", episodes=4, seed=5, targets=False, rows=8)
    info, windows = read_store(bare)
    info.teachers = {"tracker": "random"}
    write_store(bare, info, windows)
    config = tiny_large.config(model, [store, bare], tmp_path / "run")
    config.data.heldout = 0
    with pytest.raises(UserError, match=r"no targets of any window with latents of \[8, 3, 8, 6\].*physics=none"):
        tiny_large.trainer(config)


def test_held_out_episodes_without_targets_are_named(tmp_path):
    store = tiny_large.store(tmp_path / "store", "ti2v", episodes=8)  # the fourth and the last have no targets
    info, windows = read_store(store)
    write_store(store, info, [w if w.episode not in (2, 6) else dataclasses.replace(w, targets="") for w in windows])
    assert len(open_stores([store], 2, CPU, None)[1]) == 4
    message = (
        r"data\.heldout: got 'set0 episode 2, set0 episode 6, held out and all without physics targets.*data\.heldout=3"
    )
    with pytest.raises(UserError, match=message):
        open_stores([store], 2, CPU, PhysicsConfig())
    training, heldout = open_stores([store], 3, CPU, PhysicsConfig())
    assert training.targets is not None and heldout.targets is not None


def test_targets_that_were_not_copied_are_named(large_models, tmp_path):
    model, store = large_models["ti2v"]
    part = Path(shutil.copytree(store, tmp_path / "part"))
    trainer = tiny_large.trainer(tiny_large.config(model, [part], tmp_path / "run"))
    shutil.rmtree(part / "targets")
    row = next(row for row, (_, window) in enumerate(trainer.bank.windows) if window.targets)
    with pytest.raises(DatasetError, match=r"targets of set0 episode .*targets/.*copy the whole store"):
        trainer.bank.batch(torch.tensor([row]))


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


def test_a_run_goes_on_with_the_windows_it_began_with_wherever_they_lie(large_models, tmp_path):
    model, store = large_models["ti2v"]
    config = tiny_large.config(model, [store], tmp_path / "run")
    trainer = tiny_large.trainer(config)
    trainer.step(0)
    checkpoint = trainer.save(tmp_path / "run", 1)
    moved = Path(shutil.copytree(store, tmp_path / "moved"))
    config.data.latents = [str(moved)]
    assert tiny_large.trainer(config).restore(checkpoint) == 1
    config.data.latents = [str(moved), str(tiny_large.store(tmp_path / "more", "ti2v", seed=3))]
    with pytest.raises(UserError, match=r"data\.latents: got 'windows .*as they were when the run began"):
        tiny_large.trainer(config).restore(checkpoint)
