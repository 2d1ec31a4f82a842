"""Training a codec's decoder further: better pictures, the same latents."""

import os
import signal
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.autoencoder import CausalVideoAutoencoder
from physisforcing.worldmodel.codec import load_codec
from physisforcing.worldmodel.data.windows import Episode
from physisforcing.worldmodel.storage import WEIGHTS_NAME, latents_fingerprint, save_diffusers
from physisforcing.worldmodel.training import vae
from physisforcing.worldmodel.training.checkpoint import latest_checkpoint, load_training
from physisforcing.worldmodel.training.config import AutoencoderConfig, TrainVaeConfig
from physisforcing.worldmodel.training.optim import learning_rate
from physisforcing.worldmodel.training.stopping import TrainingStopped
from physisforcing.worldmodel.training.vae import train_vae

SMALL = AutoencoderConfig(
    latent_channels=4, fine_channels=8, decoder_fine_channels=8, coarse_channels=8, group_channels=8, fine_blocks=1
)


def episodes(count: int = 3) -> list[Episode]:
    """A bright square that moves over noise, 40 control steps each, in small pictures."""
    made = []
    for number in range(count):
        frames = np.random.default_rng(number).integers(0, 80, (40, 48, 64, 3), dtype=np.uint8)
        for t, frame in enumerate(frames):
            frame[16:24, t : t + 8] = 230
        states = np.zeros((40, 14), np.float32)
        made.append(
            Episode(frames=frames, states_TA=states, instruction="", task="", index=number, seed=number, success=True)
        )
    return made


def config(folder: Path, **changes) -> TrainVaeConfig:
    made = TrainVaeConfig(model=SMALL, **changes)
    made.run.out, made.run.steps, made.run.batch, made.run.device = str(folder), 3, 2, "cpu"
    made.data.heldout = 1
    return made


def test_training_the_decoder_alone_keeps_the_latents_and_changes_the_pictures(tmp_path):
    first = train_vae(config(tmp_path / "first"), episodes())
    again = config(tmp_path / "second", decoder_only=True)
    again.run.init = str(first)
    second = train_vae(again, episodes())

    assert latents_fingerprint(first) == latents_fingerprint(second)
    window = torch.from_numpy(episodes(1)[0].frames[:9][None])
    one, two = load_codec(first), load_codec(second)
    assert torch.equal(one.encode(window), two.encode(window))
    assert not torch.equal(one.decode(one.encode(window)), two.decode(one.encode(window)))


def test_the_fingerprint_of_latents_follows_encoder_and_statistics_only(tmp_path):
    torch.manual_seed(0)
    model = CausalVideoAutoencoder(latent_channels=4, fine_channels=8, coarse_channels=8, group_channels=8)

    def stored(name: str) -> str:
        save_diffusers(model, tmp_path / name)
        return latents_fingerprint(tmp_path / name)

    model.set_statistics(torch.zeros(4), torch.ones(4))
    start = stored("start")
    with torch.no_grad():
        model.decode_out.weight.add_(1.0)
    assert stored("decoder") == start
    model.set_statistics(torch.zeros(4), 2 * torch.ones(4))
    assert (scaled := stored("statistics")) != start
    with torch.no_grad():
        model.encode_in.weight[0, 0, 0, 0] += 1.0
    assert stored("encoder") not in (start, scaled)


def test_a_codec_to_start_from_brings_its_sizes(tmp_path):
    first = train_vae(config(tmp_path / "first"), episodes())
    again = config(tmp_path / "second")
    again.run.init, again.model = str(first), AutoencoderConfig()
    train_vae(again, episodes())
    assert again.model == SMALL
    assert "latent_channels: 4" in (tmp_path / "second" / "config.yaml").read_text()
    other = config(tmp_path / "third")
    other.run.init, other.model = str(first), AutoencoderConfig(fine_channels=24)
    with pytest.raises(UserError, match=r"model\.fine_channels"):
        train_vae(other, episodes())


def test_ten_updates_equal_five_and_five(tmp_path, monkeypatch):
    def settings(name: str) -> TrainVaeConfig:
        made = config(tmp_path / name)
        made.run.steps, made.run.batch, made.run.save_every, made.run.eval_every = 10, 1, 5, 100
        return made

    train_vae(settings("straight"), episodes())
    stopped = settings("stopped")

    def stop(config, step, steps):
        if step == 7:
            raise KeyboardInterrupt
        return learning_rate(config, step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(vae, "learning_rate", stop)
        with pytest.raises(KeyboardInterrupt):
            train_vae(stopped, episodes())
    assert latest_checkpoint(tmp_path / "stopped").name == "step-000005"
    torch.manual_seed(999)  # a new process has other global random numbers
    stopped.run.resume = True
    train_vae(stopped, episodes())
    states = [load_training(tmp_path / name / "step-000010")[0] for name in ("straight", "stopped")]
    for group in ("weights", "average", "optimizer", "rng"):
        straight, resumed = (state[group] for state in states)
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[key], resumed[key]) for key in straight), group
    one, two = (sha256((tmp_path / name / "codec" / WEIGHTS_NAME).read_bytes()) for name in ("straight", "stopped"))
    assert one.digest() == two.digest()
    stopped.run.seed = 1
    with pytest.raises(UserError, match=r"run\.seed"):
        train_vae(stopped, episodes())


def test_a_codec_is_trained_by_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes"):
        train_vae(config(tmp_path / "run"), episodes())


def test_a_signal_saves_and_what_is_not_finite_is_left_out(tmp_path, monkeypatch):
    made = config(tmp_path / "run")
    made.run.steps, made.run.batch, made.run.save_every, made.run.eval_every = 6, 1, 100, 100
    made.run.nonfinite, plain = "skip", vae.train_step_terms
    calls = []

    def terms(model, frames, noise, loss):
        calls.append(len(calls))
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        made_terms = plain(model, frames, noise, loss)
        return made_terms | {"loss": made_terms["loss"] * (float("nan") if len(calls) == 2 else 1.0)}

    monkeypatch.setattr(vae, "train_step_terms", terms)
    with pytest.raises(TrainingStopped, match=r"4 of 6 updates.*run\.resume=true"):
        train_vae(made, episodes())
    tensors, state = load_training(tmp_path / "run" / "step-000004")
    assert (state["step"], state["skipped"]) == (4, 1)
    assert all(int(value) == 3 for name, value in tensors["optimizer"].items() if name.endswith("/step"))
    made.run.resume = True
    train_vae(made, episodes())
    assert len(calls) == 6 and latest_checkpoint(tmp_path / "run").name == "step-000006"


@pytest.mark.parametrize("field", ["compile", "precision", "nonfinite", "checkpointing"])
def test_an_unknown_way_to_run_is_refused_before_any_work(tmp_path, field):
    made = config(tmp_path / "run")
    setattr(made.run, field, "graph")
    with pytest.raises(UserError, match=rf"run\.{field}"):
        train_vae(made, episodes())
    assert not (tmp_path / "run").exists()


def test_without_a_codec_to_start_from_it_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"run\.init"):
        train_vae(config(tmp_path, decoder_only=True), episodes())
