"""Control models: frozen picture, noise, recordings; the spec is the truth and what is played is the right part of the right recording."""

import dataclasses
import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from physisforcing.core.errors import DatasetError, MissingCapabilityError, UserError
from physisforcing.core.protocols import WorldModel
from physisforcing.core.types import DT, ActionChunk, DecoderNeeds, RolloutRequest
from physisforcing.envs.baselines import Retrieval
from physisforcing.envs.control_models import (
    FrozenFrame,
    NoiseWorldModel,
    OtherEpisodeWorldModel,
    PlayedVideo,
    RetrievalWorldModel,
)
from physisforcing.envs.geometry import Geometry
from physisforcing.planner.imagination import Imaginer

SMALL = Geometry(height=30, width=40, horizons=(3, 5))


def picture(number):
    return np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8)


def request(horizon=5, seeds=((1, 2), (3, 1)), ids=None, proprioception=None, pictures=(0, 1)):
    return RolloutRequest(
        context_BVTHWC=np.stack([picture(n) for n in pictures])[:, None, None],
        instructions=["press the bell"] * len(pictures),
        seeds_BS=np.array(seeds, np.int64),
        horizon=horizon,
        ids=ids,
        proprioception_BKA=proprioception,
    )


class Recordings:
    """A dataset as the models read it: pictures whose every number says episode and step."""

    root = Path("recordings")

    def __init__(self, episodes):
        self.episodes = [
            SimpleNamespace(index=i, task_name=task, seed=seed, success=success)
            for i, (task, seed, success) in enumerate(episodes)
        ]

    def fingerprint(self):
        known = repr([vars(e) for e in self.episodes])
        return hashlib.sha256(known.encode()).hexdigest()

    def frames(self, index, indices=None, key="observation.images.head"):
        assert key == "observation.images.head"
        steps = range(40) if indices is None else indices
        return np.stack([np.full((60, 80, 3), 50 * index + step, np.uint8) for step in steps])

    def columns(self, index):
        return {"observation.state": np.full((40, 14), 0.1 * index, np.float32)}


def test_geometry():
    spec = FrozenFrame().spec
    assert (spec.views.height, spec.views.width, spec.horizons, spec.frame_dt) == (120, 160, (17,), 2 * DT)
    full = FrozenFrame(Geometry(height=240, width=320, stride=1, horizons=(45,))).spec
    assert (full.views.height, full.horizons, full.frame_dt) == (
        240,
        (45,),
        DT,
    ) and full.fingerprint != spec.fingerprint
    for bad, field in (
        ({"height": 0}, "size"),
        ({"height": 100}, "size"),
        ({"width": 80}, "size"),
        ({"horizons": ()}, "horizons"),
    ):
        with pytest.raises(UserError, match=field):
            Geometry(**bad)


@pytest.mark.parametrize("kind", [FrozenFrame, NoiseWorldModel])
def test_frozen_and_noise(kind):
    model = kind(SMALL)
    assert isinstance(model, WorldModel)
    asked = request()
    rollout = model.rollout(asked)
    frames = rollout.frames_BSVTHWC
    assert frames.shape == (2, 2, 1, 5, 30, 40, 3) and frames.dtype == np.uint8
    np.testing.assert_array_equal(rollout.times_T, np.arange(5) * 2 * DT)
    np.testing.assert_array_equal(frames[:, :, :, 0], np.repeat(asked.context_BVTHWC[:, None, :, 0], 2, axis=1))
    if kind is FrozenFrame:
        assert (frames == frames[:, :, :, :1]).all()
    else:
        np.testing.assert_array_equal(frames[0, 0, :, 1:], frames[1, 1, :, 1:])  # equal seeds, other places
        assert (frames[0, 0, :, 1:] != frames[0, 1, :, 1:]).mean() > 0.99
        assert (frames[0, 0, 0, 1] != frames[0, 0, 0, 2]).mean() > 0.99 and 120 < frames[..., 1:, :, :, :].mean() < 135
    with pytest.raises(MissingCapabilityError, match="horizon"):
        model.rollout(request(horizon=4))


def test_a_recording_goes_on_where_the_robot_should_be():
    asked = []

    def find(task, seed):
        asked.append((task, seed))
        return np.stack([np.full((30, 40, 3), seed + step, np.uint8) for step in range(20)])

    model = PlayedVideo("played", find, fingerprint="a", execute_horizon=6, geometry=SMALL)
    ids = [("bell", 0, 0), ("bell", 100, 2)]
    frames = model.rollout(request(ids=ids)).frames_BSVTHWC
    assert frames[:, :, 0, :, 0, 0, 0].tolist() == [[[0, 2, 4, 6, 8]] * 2, [[112, 114, 116, 118, 119]] * 2]
    swapped = model.rollout(request(ids=ids[::-1])).frames_BSVTHWC
    np.testing.assert_array_equal(swapped, frames[::-1])
    assert asked == [("bell", 0), ("bell", 100)], "each recording is looked up once"
    with pytest.raises(UserError, match="ids"):
        model.rollout(request())
    other = PlayedVideo("played", find, fingerprint="a", execute_horizon=7, geometry=SMALL)
    assert other.spec.fingerprint != model.spec.fingerprint
    with pytest.raises(UserError, match="recording"):
        PlayedVideo("played", lambda *_: np.zeros((3, 45, 60, 3), np.uint8), fingerprint="a", geometry=SMALL).rollout(
            request(ids=ids)
        )


def test_a_later_rollout_of_a_plan_goes_on_in_the_recording():
    def find(task, seed):
        return np.stack([np.full((30, 40, 3), step, np.uint8) for step in range(60)])

    model = PlayedVideo("played", find, fingerprint="a", execute_horizon=6, geometry=SMALL)
    asked = dataclasses.replace(request(ids=[("bell", 0, 0), ("bell", 0, 2)]), plan_steps=[8, 16])
    frames = model.rollout(asked).frames_BSVTHWC[:, 0, 0, :, 0, 0, 0]
    assert frames.tolist() == [[8, 10, 12, 14, 16], [28, 30, 32, 34, 36]]
    for wrong in ([8], [8, -8]):
        with pytest.raises(UserError, match="plan_steps"):
            model.rollout(dataclasses.replace(asked, plan_steps=wrong))


class Levels:
    """A decoder whose targets are the grey levels of the pictures, one a picture after the first."""

    needs = DecoderNeeds()
    fingerprint = "levels"

    def decode(self, rollout, state_BA, instructions):
        rows = rollout.frames_BSVTHWC[:, :, 0, 1:, 0, 0, 0].astype(np.float32)
        steps = np.repeat(rows, 2, axis=-1)[..., None].repeat(14, -1)
        return [[ActionChunk(actions_PA=sample) for sample in row] for row in steps]


@pytest.mark.parametrize("samples", [1, 2])
def test_a_plan_of_several_rollouts_plays_one_recording_through(samples):
    def find(task, seed):
        return np.stack([np.full((30, 40, 3), step, np.uint8) for step in range(60)])

    model = PlayedVideo("played", find, fingerprint="a", execute_horizon=24, geometry=SMALL)
    imaginer = Imaginer(model, Levels(), horizon=5, limits_2A=None, returns=frozenset({"frames"}))
    context = np.zeros((1, 1, 30, 40, 3), np.uint8)
    made = imaginer.imagine(
        context, "press", np.zeros((1, 14), np.float32), np.zeros((3, samples), np.int64), ("bell", 0, 1)
    )
    for s in range(samples):
        assert made.frames_STHWC[s, :, 0, 0, 0].tolist() == list(range(24, 49, 2))
        assert made.actions_SPA[s, ::2, 0].tolist() == list(range(26, 49, 2))


def test_another_episode_of_the_same_task():
    dataset = Recordings(
        [("bell", 3, True), ("cup", 4, True), ("bell", 5, False), ("bell", 7, True), ("bell", 9, True)]
    )
    model = OtherEpisodeWorldModel(dataset, execute_horizon=8, geometry=SMALL)
    assert [model.other_seed("bell", seed) for seed in (3, 5, 7, 9, 100)] == [7, 7, 9, 3, 3]
    frames = model.rollout(request(ids=[("bell", 3, 0), ("bell", 9, 1)])).frames_BSVTHWC[:, 0, 0, :, 5, 5, 0]
    assert frames.tolist() == [[150, 152, 154, 156, 158], [8, 10, 12, 14, 16]]  # episode 3; episode 0 from step 8
    with pytest.raises(DatasetError, match="no other episode of cup"):
        model.other_seed("cup", 4)


def test_the_nearest_demonstration(tmp_path):
    dataset = Recordings([("bell", 0, True), ("bell", 1, True), ("bell", 2, False), ("bell", 3, True)])
    model = RetrievalWorldModel(Retrieval(dataset, cache_dir=tmp_path), execute_horizon=8, geometry=SMALL)
    assert model.spec.proprioception_lags == (0,) and model.spec.conditions == {"proprioception"}
    asked = request(ids=[("bell", 80, 0), ("bell", 81, 0)], proprioception=np.zeros((2, 1, 14), np.float32))
    for row, grey, state in ((0, 55, 0.1), (1, 140, 0.3)):
        asked.context_BVTHWC[row], asked.proprioception_BKA[row] = grey, state
    frames = model.rollout(asked).frames_BSVTHWC[:, 0, 0, :, 0, 0, 0]
    assert (model.episode("bell", 80), model.episode("bell", 81)) == (1, 3)
    assert frames.tolist() == [[50, 52, 54, 56, 58], [150, 152, 154, 156, 158]]
    later = request(ids=[("bell", 80, 1), ("bell", 81, 2)], proprioception=asked.proprioception_BKA)
    frames = model.rollout(later).frames_BSVTHWC[:, 0, 0, :, 0, 0, 0]
    assert frames.tolist() == [[58, 60, 62, 64, 66], [166, 168, 170, 172, 174]], "whatever the picture then is"
    on = dataclasses.replace(asked, context_BVTHWC=np.full_like(asked.context_BVTHWC, 140), plan_steps=[8, 8])
    assert model.rollout(on).frames_BSVTHWC[0, 0, 0, 0, 0, 0, 0] == 58, "a plan that goes on looks for nothing else"
    with pytest.raises(UserError, match="plan 1 of bell 82"):
        model.rollout(request(ids=[("bell", 82, 1), ("bell", 80, 1)], proprioception=asked.proprioception_BKA))
    asked.context_BVTHWC[0], asked.proprioception_BKA[0] = 140, 0.3
    assert model.rollout(asked).frames_BSVTHWC[0, 0, 0, 0, 0, 0, 0] == 150, "an episode that begins again looks again"
