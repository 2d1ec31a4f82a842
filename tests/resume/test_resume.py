"""Training resumes bit-exactly, and whatever kills a process leaves the last good checkpoint loadable."""

import functools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.backbones.wan import ConditionerConfig, WanConfig
from physisforcing.worldmodel.data.batches import WindowSampler, step_generator
from physisforcing.worldmodel.data.windows import WindowTable
from physisforcing.worldmodel.flow_matching import FlowMatchingConfig
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.training.checkpoint import is_complete, latest_checkpoint, load_training, save_checkpoint
from physisforcing.worldmodel.training.config import DataConfig, TrainWorldModelConfig
from physisforcing.worldmodel.training.evaluate import heldout_losses
from physisforcing.worldmodel.training.tensors import shard_name
from physisforcing.worldmodel.training.worldmodel import Trainer, train_world_model
from ranks import fork
from tiny_training import bank, codec_folder, config


@pytest.mark.parametrize("actions", [False, True])
def test_ten_steps_equal_five_and_five(tmp_path, actions):
    banks = bank(0), bank(1)
    straight = config(tmp_path, "straight", 10)
    straight.actions = actions
    train_world_model(straight, banks)
    # A run that is stopped after its checkpoint at step 5 and one that starts again in the same folder.
    stopped = config(tmp_path, "stopped", 10)
    stopped.actions = actions
    from physisforcing.worldmodel.training import worldmodel as module

    class Stop(Exception):
        pass

    original = module.Trainer.step

    def step(self, number):
        if number == 7:
            raise Stop
        return original(self, number)

    module.Trainer.step = step
    try:
        with pytest.raises(Stop):
            train_world_model(stopped, banks)
    finally:
        module.Trainer.step = original
    assert latest_checkpoint(tmp_path / "stopped").name == "step-000005"
    torch.manual_seed(999)  # a new process has other global random numbers
    stopped.run.resume = True
    train_world_model(stopped, banks)
    for name in ("weights", "average", "optimizer", "rng"):
        straight = load_training(tmp_path / "straight" / "step-000010")[0][name]
        resumed = load_training(tmp_path / "stopped" / "last")[0][name]
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[key], resumed[key]) for key in straight), name
        assert any("denoiser.actions." in key for key in straight) == (actions and name != "rng"), name
    finals = [json.loads((tmp_path / run / "heldout.json").read_text())["after"] for run in ("straight", "stopped")]
    assert finals[0] == finals[1]


def test_a_run_does_not_go_on_with_other_teachers(tmp_path):
    banks = bank(0), bank(1)
    banks[0].targets.identity = {"encoder": {"name": "vjepa2", "checksum": "a" * 64}}
    train_world_model(config(tmp_path, "run", 5), banks)
    settings = config(tmp_path, "run", 5)
    settings.run.resume = True
    banks[0].targets.identity = {"encoder": {"name": "vjepa2", "checksum": "b" * 64}}
    with pytest.raises(UserError, match="teacher"):
        train_world_model(settings, banks)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("run", "seed", 1),
        ("run", "batch", 4),
        ("optim", "lr", 2e-3),
        ("data", "start_fraction", 0.1),
        ("run", "steps", 9),
    ],
)
def test_other_settings_do_not_continue_a_run(tmp_path, section, name, value):
    banks = bank(0), bank(1)
    train_world_model(config(tmp_path, "run", 5), banks)
    again = config(tmp_path, "run", 5)
    again.run.resume, again.run.log_every = True, 1
    again.data.workers = 9
    train_world_model(again, banks)  # what is reported and where it runs may change
    setattr(getattr(again, section), name, value)
    with pytest.raises(UserError, match=rf"{section}\.{name}"):
        train_world_model(again, banks)


def test_a_setting_that_is_newer_than_the_checkpoint_has_its_default(tmp_path):
    banks = bank(0), bank(1)
    train_world_model(config(tmp_path, "run", 5), banks)
    state = latest_checkpoint(tmp_path / "run") / "training" / "state.json"
    stored = json.loads(state.read_text())
    del stored["settings"]["data.end_fraction"]
    state.write_text(json.dumps(stored))
    again = config(tmp_path, "run", 5)
    again.run.resume = True
    train_world_model(again, banks)
    again.data.end_fraction = 0.25
    with pytest.raises(UserError, match=r"data\.end_fraction"):
        train_world_model(again, banks)


def fine_tuning(tmp_path, init) -> TrainWorldModelConfig:
    """A run from ``init`` whose config says nothing about the model."""
    made = config(tmp_path, "tuned", 2)
    made.run.init = str(init)
    made.backbone, made.conditioner, made.physics = WanConfig(), ConditionerConfig(), PhysicsConfig()
    return made


def initial_model(tmp_path):
    made = config(tmp_path, "initial", 2)
    made.conditioner.lags = (0, 4, 8)
    return train_world_model(made, (bank(0), bank(1)))


def test_a_model_to_start_from_brings_its_settings(tmp_path):
    init = initial_model(tmp_path)
    tuned = fine_tuning(tmp_path, init)
    export = train_world_model(tuned, (bank(0), bank(1)))
    assert tuned.conditioner.lags == (0, 4, 8)
    assert (tuned.backbone.num_layers, tuned.backbone.tap, tuned.backbone.latent_channels) == (2, 1, 4)
    assert (tuned.physics.phi_hidden, tuned.physics.psi_hidden, tuned.physics.feature_dim) == (16, 16, 16)
    recorded = yaml.safe_load((tmp_path / "tuned" / "config.yaml").read_text())
    stored = json.loads((export / "denoiser.json").read_text())
    assert recorded["conditioner"]["lags"] == stored["conditioner"]["lags"] == [0, 4, 8]
    assert recorded["backbone"]["ffn_dim"] == json.loads((export / "transformer/config.json").read_text())["ffn_dim"]


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("backbone", "num_layers", 3),
        ("backbone", "tap", 2),
        ("conditioner", "lags", (0, 2, 4)),
        ("physics", "phi_hidden", 24),
    ],
)
def test_settings_against_the_model_to_start_from_are_refused(tmp_path, section, name, value):
    tuned = fine_tuning(tmp_path, initial_model(tmp_path))
    setattr(getattr(tuned, section), name, value)
    with pytest.raises(UserError, match=rf"^{section}\.{name}"):
        train_world_model(tuned, (bank(0), bank(1)))
    assert not (tmp_path / "tuned").exists()


def test_another_codec_than_that_of_the_model_to_start_from_is_refused(tmp_path):
    tuned = fine_tuning(tmp_path, initial_model(tmp_path))
    tuned.codec = str(codec_folder(tmp_path, "other", '{"latents_mean": [1.0]}'))
    with pytest.raises(UserError, match=r"^codec.*latents"):
        train_world_model(tuned, (bank(0), bank(1)))


def test_draws_do_not_depend_on_history_and_favour_episode_starts():
    table = WindowTable.build([100] * 5, stride=4)
    sampler = WindowSampler.build(table, start_fraction=0.5)
    late = sampler.draw(8, step_generator(3, 1000))
    assert torch.equal(late, sampler.draw(8, step_generator(3, 1000)))
    assert not torch.equal(late, sampler.draw(8, step_generator(3, 1001)))
    rows = sampler.draw(4000, step_generator(0, 0))
    share = (table.start_W[rows] == 0).float().mean().item()
    assert share == pytest.approx(0.5 + 0.5 * 5 / len(table), abs=0.03)


def test_a_share_of_the_draws_is_near_the_end_and_without_it_nothing_changes():
    table = WindowTable.build([100, 140], stride=4)
    plain = WindowSampler.build(table, start_fraction=0.5)
    ends = WindowSampler.build(table, start_fraction=0.5, end_fraction=0.75)
    generator = step_generator(3, 1)  # what a run without the option has always drawn
    anywhere = torch.randint(len(table), (64,), generator=generator)
    first = torch.nonzero(table.start_W == 0).flatten()[torch.randint(2, (64,), generator=generator)]
    before = torch.where(torch.rand(64, generator=generator) < 0.5, first, anywhere)
    assert torch.equal(plain.draw(64, step_generator(3, 1)), before)
    rows = ends.draw(8000, step_generator(0, 0))
    last = torch.tensor([88, 128])[table.episode_W]  # the last starts: 8 steps are left at least
    assert table.start_W.unique(return_counts=True)[0].max() == 128
    near = (table.start_W >= last - 56) & (table.start_W <= last - 16)
    chance = 0.75 + 0.25 * 0.5 * near.float().mean().item()  # no window at an episode's start is near its end here
    assert near[rows].float().mean().item() == pytest.approx(chance, abs=0.02)
    with pytest.raises(UserError, match=r"data\.end_fraction"):
        DataConfig(end_fraction=1.5)
    with pytest.raises(UserError, match="short episodes"):
        WindowSampler.build(WindowTable.build([20], stride=4), 0.5, end_fraction=0.5)


def test_windows_without_targets_add_nothing():
    full = bank(0)
    full.targets.row_W[::2] = -1
    batch = full.batch(torch.arange(4))
    assert not batch["targets"]["select_BN"][[0, 2]].any() and not batch["targets"]["token_mask_BFhw"][[0, 2]].any()
    assert torch.equal(batch["targets"]["points_BFN2"][1], full.targets.targets.points_WFN2[1])
    assert full.physics_rows().tolist() == list(range(1, len(full.table), 2))


@pytest.mark.parametrize(
    "options",
    [{}, {"border": "drop"}, {"query_frames": [2]}, {"visibility": "share"}, {"weights": "gradient"}],
    ids=lambda options: "".join(options) or "default",
)
def test_heldout_values_do_not_depend_on_the_chunk_size(tmp_path, options):
    held = bank(3)
    held.targets.targets.select_WN[::2] = False  # windows without a valid point
    held.targets.targets.select_WN[1, 1:] = False  # and one with very few
    held.targets.targets.mask_WFhw[::3] = False
    settings = config(tmp_path, "run", 1)
    for name, value in options.items():
        setattr(settings.physics, name, value)
    if "visibility" in options:
        seen = held.targets.targets.visible_WFN
        held.targets.targets.visible_WFN = seen * torch.rand(seen.shape, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(settings, bank(0), torch.device("cpu"))
    trainer.denoiser.transformer.proj_out.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    if "weights" in options:
        trainer.forcing.meter.average_3.copy_(torch.tensor([0.1, 0.3, 0.2]))
        trainer.forcing.meter.steps_3.fill_(5)

    def values(chunk: int) -> dict[str, float]:
        return heldout_losses(trainer.denoiser, trainer.forcing, held, FlowMatchingConfig(), windows=64, chunk=chunk)

    alone = values(1)
    assert alone["epe_px"] > 0 and alone["sem"] > 0 and "pairs" not in alone
    weights = [alone.get(f"lambda_{name}", 0.5) for name in ("pix", "sem")]
    assert alone["loss"] == pytest.approx(alone["fm"] + weights[0] * alone["pix"] + weights[1] * alone["sem"])
    assert ("weights" in options) == (weights != [0.5, 0.5])
    for chunk in (8, 64):
        assert values(chunk) == pytest.approx(alone, rel=1e-5), chunk
    held.targets.targets.select_WN[:] = False
    assert "epe_px" not in values(8), "a value of nothing is left out, not 0"


def saves(run: Path, say: int) -> None:
    """Write checkpoints for ever, and the number of each once it is there."""

    def model(folder: Path, step: int) -> None:
        folder.mkdir()
        save_file({"w": torch.full((400_000,), float(step))}, folder / "model.safetensors")

    for step in range(1, 1000):
        tensors = {"weights": {"w": torch.full((400_000,), float(step))}}
        save_checkpoint(run, step, functools.partial(model, step=step), tensors, {"seed": 0})
        os.write(say, b"%d " % step)


def killed_save(run: Path, wait_s: float) -> int:
    """Kill a process that saves, some time after its third checkpoint. Returns the number of the last one that it told of."""
    said, say = os.pipe()
    child = fork(lambda: saves(run, say), "the writer")
    os.close(say)
    told = b""
    while told.count(b" ") < 3:
        more = os.read(said, 4096)
        assert more, "it ended by itself"
        told += more
    time.sleep(wait_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(said, 4096):
        told += more
    os.close(said)
    return int(told.split()[-1])


def test_kill_during_saving_leaves_a_good_checkpoint(tmp_path):
    draw = random.Random(0)
    save(tmp_path / "first", 1)  # imports what is imported late
    for trial in range(6):
        reported = killed_save(tmp_path / f"run{trial}", draw.uniform(0.0, 0.05))
        run = tmp_path / f"run{trial}"
        found = latest_checkpoint(run)
        assert found is not None and int(found.name.removeprefix("step-")) >= reported >= 3
        tensors, state = load_training(found)
        assert (tensors["weights"]["w"] == state["step"]).all()
        assert is_complete(run / "last")
        # The next writer of this folder clears what the killed one left behind.
        save_checkpoint(run, 999, lambda folder: folder.mkdir(), {}, {})
        assert not list(run.glob(".writing-*"))


def save(run, step: int) -> None:
    save_checkpoint(run, step, lambda folder: folder.mkdir(), {"weights": {"w": torch.full((10,), float(step))}}, {})


def test_a_run_goes_on_from_what_it_wrote_last(tmp_path):
    save(tmp_path, 6)
    save(tmp_path, 2)  # a shorter run in the same folder
    assert latest_checkpoint(tmp_path).name == "step-000002"
    (tmp_path / "last").unlink()
    assert latest_checkpoint(tmp_path).name == "step-000006"
    save(tmp_path, 999_999)
    save(tmp_path, 1_000_000)
    (tmp_path / "last").unlink()
    assert latest_checkpoint(tmp_path).name == "step-1000000", "by number of steps, not by name"


def test_a_new_run_refuses_the_folder_of_another(tmp_path):
    banks = bank(0), bank(1)
    first = train_world_model(config(tmp_path, "run", 5), banks)
    before = (first / "conditioner.safetensors").read_bytes()
    again = config(tmp_path, "run", 2)
    again.run.seed = 7
    with pytest.raises(UserError, match=r"run\.out.*step-000005"):
        train_world_model(again, banks)
    assert (first / "conditioner.safetensors").read_bytes() == before
    assert "seed: 0" in (tmp_path / "run" / "config.yaml").read_text(), "the refused run leaves no trace"


def test_a_checkpoint_that_is_not_finite_is_not_written(tmp_path):
    save(tmp_path, 1)
    for group, value in (("weights", float("nan")), ("optimizer", float("inf"))):
        tensors = {"weights": {"w": torch.ones(3)}} | {group: {"w": torch.tensor([1.0, value])}}
        with pytest.raises(FloatingPointError, match=f"{group}/w"):
            save_checkpoint(tmp_path, 2, lambda folder: folder.mkdir(), tensors, {})
    assert latest_checkpoint(tmp_path).name == "step-000001"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-000001"]


def test_damaged_checkpoints_are_passed_over(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    newest = tmp_path / "step-000002" / "training" / shard_name(0)
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(bytes(data))
    assert latest_checkpoint(tmp_path).name == "step-000001"
    (tmp_path / "step-000001" / "COMPLETE").unlink()
    assert latest_checkpoint(tmp_path) is None
