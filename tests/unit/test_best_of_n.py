"""Several candidates, chunked rollouts, and decoders that need something else than pictures, against exact stand-ins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.results import config_hash
from physisforcing.core.types import (
    DT,
    ActionChunk,
    ActionSpec,
    DecoderNeeds,
    FeatureRequest,
    Observation,
    Rollout,
    RolloutRequest,
    ViewLayout,
    WorldModelSpec,
)
from physisforcing.planner.action_planner import ActionPlanner, ActionPlannerConfig, noise_seed
from physisforcing.planner.verifiers import Random, VerifierInput

H, W, FRAMES = 8, 16, 17
LIMITS = ActionSpec(names=tuple(f"joint{k}" for k in range(14)), low=(-9.0,) * 14, high=(9.0,) * 14)


class SpeedByPlace:
    """Test double: candidate k of a plan moves the number in its picture (0..2.55) by ``speeds[k]`` a frame."""

    def __init__(self, speeds: Sequence[float], **changes: Any) -> None:
        self.speeds, self.requests = speeds, []
        values: dict[str, Any] = {
            "name": "double",
            "views": ViewLayout(height=H, width=W),
            "context_frames": 1,
            "horizons": (FRAMES,),
            "frame_dt": 2 * DT,
            "conditions": frozenset({"text"}),
            "returns": frozenset({"frames", "latents", "features"}),
            "proprioception_lags": (0, 8, 40),
            "fingerprint": "w",
        }
        self.spec = WorldModelSpec(**(values | changes))
        #: noise seed -> place among the candidates, for every plan of episode 5
        self.place = {noise_seed(5, plan, k, chunk): k for plan in range(4) for k in range(40) for chunk in range(4)}

    def rollout(self, request: RolloutRequest) -> Rollout:
        self.requests.append(request)
        place_BS = np.vectorize(lambda seed: self.place[seed])(request.seeds_BS)
        speed_BS = np.array(self.speeds)[place_BS % len(self.speeds)]
        now_B = request.context_BVTHWC[:, 0, 0, 0, 0, 0] / 100
        value_BST = now_B[:, None, None] + speed_BS[..., None] * np.arange(FRAMES)
        shape = (*value_BST.shape[:2], 1, FRAMES, H, W, 3)
        frames = np.broadcast_to(np.round(100 * value_BST)[:, :, None, :, None, None, None], shape).astype(np.uint8)
        return Rollout(
            times_T=np.arange(FRAMES) * 2 * DT,
            frames_BSVTHWC=frames if "frames" in request.returns else None,
            features_BSKFhwD=value_BST[:, :, None, :, None, None, None] if "features" in request.returns else None,
        )


class Reader:
    """Test double: joint 0 is the number in the pictures, or in the features; the others stay. Spread: 0.01 for each candidate."""

    fingerprint = "reader"

    def __init__(self, needs: DecoderNeeds | None = None) -> None:
        self.needs, self.states = needs or DecoderNeeds(), []

    def decode(
        self, rollout: Rollout, state_BA: NDArray[np.float32], instructions: Sequence[str]
    ) -> list[list[ActionChunk]]:
        self.states.append(state_BA.copy())
        if "features" in self.needs.returns:
            assert rollout.features_BSKFhwD is not None
            value_BST = rollout.features_BSKFhwD[:, :, 0, :, 0, 0, 0]
        else:
            assert rollout.frames_BSVTHWC is not None
            value_BST = rollout.frames_BSVTHWC[:, :, 0, :, 0, 0, 0] / 100
        chunks = []
        for b, state in enumerate(state_BA):
            rows_SPA = np.repeat(np.repeat(state[None, None], 2 * (FRAMES - 1), 1), value_BST.shape[1], 0)
            rows_SPA[..., 0] = np.repeat(value_BST[b, :, 1:], 2, axis=1)
            spread = np.full(rows_SPA.shape[1], 0.01, np.float32)
            chunks.append([ActionChunk(actions_PA=rows.astype(np.float32), spread_P=spread) for rows in rows_SPA])
        return chunks


class Fastest:
    """Test double: prefers the candidate that gets furthest, and remembers what it was asked."""

    needs = frozenset({"frames"})
    fingerprint = "fastest"

    def __init__(self) -> None:
        self.seen: list[VerifierInput] = []

    def score(self, given: VerifierInput) -> NDArray[np.float64]:
        self.seen.append(given)
        return given.actions_SPA[:, -1, 0].astype(np.float64)


def observation(step: int, value: float) -> Observation:
    state = np.zeros(14, np.float32)
    state[0] = value
    pictures = {"head": np.full((H, W, 3), round(100 * value), np.uint8)}
    return Observation(images=pictures, state_A=state, measured_A=state, instruction="press it", step=step)


def planner(model: SpeedByPlace, decoder: Reader | None = None, **settings: Any) -> ActionPlanner:
    extra = {name: settings.pop(name) for name in ("verifier_object", "recorder") if name in settings}
    made = ActionPlanner(
        model,
        decoder or Reader(),
        ActionPlannerConfig(**settings),
        extra.get("recorder"),
        LIMITS,
        verifier=extra.get("verifier_object"),
    )
    made.reset(task="click_bell", seed=5, instruction="press the bell")
    return made


def test_the_best_of_n_is_executed_and_imagined_in_one_rollout() -> None:
    model, verifier = SpeedByPlace([0.01, 0.02, 0.05, 0.03]), Fastest()
    videos: list[NDArray[np.uint8]] = []
    recorder = type("Recorder", (), {"imagined": lambda self, step, frames: videos.append(frames)})()
    made = planner(model, candidates=4, verifier_object=verifier, recorder=recorder, execute_horizon=16)
    rows = made.act(observation(0, 0.5))
    assert rows[-1, 0] == pytest.approx(0.5 + 8 * 0.05) and videos[0][-1, 0, 0, 0] == 130
    assert [request.seeds_BS.tolist() for request in model.requests] == [[[noise_seed(5, 0, k) for k in range(4)]]]
    made.act(observation(16, 0.9))
    assert model.requests[1].seeds_BS.tolist() == [[noise_seed(5, 1, k) for k in range(4)]]
    assert model.requests[1].ids == [("click_bell", 5, 1)]
    given = verifier.seen[0]
    assert given.task == "click_bell" and given.execute == 16 and given.instruction == "press the bell"
    assert given.frames_STHWC is not None and given.frames_STHWC.shape == (4, FRAMES, H, W, 3)
    telemetry = made.telemetry()
    assert telemetry["candidates"] == 8 and telemetry["plans"] == 2 and telemetry["verifying_s"] > 0
    assert telemetry["verifier_chosen"] == pytest.approx((1.3 + 1.7) / 2, abs=1e-5)
    assert telemetry["verifier_mean"] == pytest.approx(((0.66 + 0.82 + 1.3 + 0.98) / 4) + 0.2, abs=1e-5)


def test_equal_scores_choose_the_first_and_a_candidate_alone_is_what_it_is_among_others() -> None:
    class Equal(Fastest):
        def score(self, given: VerifierInput) -> NDArray[np.float64]:
            return np.zeros(len(given.actions_SPA))

    speeds = [0.02, 0.03, 0.01]
    many = planner(SpeedByPlace(speeds), candidates=3, verifier_object=Equal()).act(observation(0, 0.5))
    one = planner(SpeedByPlace(speeds)).act(observation(0, 0.5))
    np.testing.assert_array_equal(many, one)


def test_candidates_that_stay_still_are_not_chosen_and_all_still_ones_are_imagined_again() -> None:
    class Stillest(Fastest):
        def score(self, given: VerifierInput) -> NDArray[np.float64]:
            return -super().score(given)

    model = SpeedByPlace([0.0, 0.03, 0.02, 0.0])
    made = planner(model, candidates=4, verifier_object=Stillest())
    assert made.act(observation(0, 0.5))[-1, 0] == pytest.approx(0.5 + 16 * 0.02), "the stillest that moves"
    assert made.telemetry()["resampled"] == 0
    model = SpeedByPlace([0.0, 0.0, 0.0, 0.01])
    made = planner(model, candidates=3, verifier_object=Fastest())
    made.act(observation(0, 0.5))
    assert [request.seeds_BS.tolist()[0] for request in model.requests] == [
        [noise_seed(5, 0, k) for k in range(3)],
        [noise_seed(5, 0, k) for k in range(3, 6)],
    ]
    assert made.telemetry()["resampled"] == 1 and made.telemetry()["candidates"] == 6
    made = planner(SpeedByPlace([0.0]), candidates=2, verifier_object=Fastest(), max_resamples=1)
    assert np.abs(made.act(observation(0, 0.5)) - observation(0, 0.5).state_A).max() < 0.01
    assert made.telemetry()["still"] == 1 and made.telemetry()["resampled"] == 1


def test_a_single_candidate_asks_and_reports_exactly_what_it_always_did() -> None:
    model = SpeedByPlace([0.01])
    made = planner(model, verifier="spread")
    made.act(observation(0, 0.5))
    request = model.requests[0]
    assert request.context_BVTHWC.shape == (1, 1, 1, H, W, 3) and request.seeds_BS.shape == (1, 1)
    assert request.returns == frozenset({"frames"}) and request.features is None and request.actions_BSPA is None
    assert request.proprioception_BKA is not None and request.proprioception_BKA.shape == (1, 3, 14)
    names = {"plans", "resampled", "still", "clipped", "imagination_s", "decoding_s", "spread"}
    assert set(made.telemetry()) == names
    old = {"execute_horizon": 32, "horizon": 17, "min_motion": 0.02, "max_resamples": 3}
    assert made.fingerprint == f"double-{config_hash({'world_model': 'w', 'decoder': 'reader'} | old)}"
    several = planner(model, candidates=2, verifier="spread").fingerprint
    assert several != made.fingerprint != planner(model, rollout_chunks=2).fingerprint
    assert several != planner(model, candidates=2, verifier="smoothness").fingerprint
    assert several == planner(model, candidates=2, verifier="random", verifier_object=_spread()).fingerprint


def _spread() -> Any:
    from physisforcing.planner.verifiers import Spread

    return Spread()


@pytest.mark.parametrize("candidates", [1, 3])
def test_chunked_rollouts_go_on_from_the_last_picture_and_state(candidates: int) -> None:
    model, decoder, verifier = SpeedByPlace([0.01, 0.02, 0.03]), Reader(), Fastest()
    made = planner(
        model, decoder, rollout_chunks=3, execute_horizon=96, candidates=candidates, verifier_object=verifier
    )
    rows = made.act(observation(0, 0.2))
    speed = 0.03 if candidates == 3 else 0.01
    np.testing.assert_allclose(rows[:, 0], 0.2 + speed * np.repeat(np.arange(1, 49), 2), atol=1e-5)
    first, second, third = model.requests
    assert first.seeds_BS.shape == (1, candidates)
    assert second.seeds_BS.shape == third.seeds_BS.shape == (candidates, 1)
    assert third.seeds_BS[:, 0].tolist() == [noise_seed(5, 0, k, 2) for k in range(candidates)]
    assert len(second.instructions) == candidates and second.ids == [("click_bell", 5, 0)] * candidates
    starts = [request.plan_steps for request in model.requests]
    assert starts == [[0], [32] * candidates, [64] * candidates], "each rollout says where in the plan it begins"
    for k in range(candidates):
        end = 0.2 + 16 * model.speeds[k]
        assert second.context_BVTHWC[k, 0, 0, 0, 0, 0] == round(100 * end)
        assert decoder.states[1][k, 0] == pytest.approx(end, abs=1e-5)
        # lags 0, 8 and 40 steps before: the decoded rows of this candidate, before them the episode's start
        assert second.proprioception_BKA is not None
        lagged = [end, 0.2 + 12 * model.speeds[k], 0.2]
        assert second.proprioception_BKA[k, :, 0].tolist() == pytest.approx(lagged, abs=1e-5)
        assert third.proprioception_BKA is not None
        lagged = [0.2 + 32 * model.speeds[k], 0.2 + 28 * model.speeds[k], 0.2 + 12 * model.speeds[k]]
        assert third.proprioception_BKA[k, :, 0].tolist() == pytest.approx(lagged, abs=1e-5)
    if candidates == 3:
        frames = verifier.seen[0].frames_STHWC
        assert frames is not None and frames.shape[:2] == (3, 3 * 16 + 1)
        assert frames[2, ::16, 0, 0, 0].tolist() == [20, 68, 116, 164], "no picture twice"


def test_more_candidates_than_the_model_takes_at_once_are_imagined_in_parts() -> None:
    model = SpeedByPlace([0.01, 0.02, 0.05, 0.03, 0.04], max_batch=2)
    rows = planner(model, candidates=5, verifier_object=Fastest()).act(observation(0, 0.5))
    assert rows[-1, 0] == pytest.approx(0.5 + 16 * 0.05)
    assert [request.seeds_BS.size for request in model.requests] == [2, 2, 1]


def test_a_decoder_is_given_what_it_needs_and_nothing_else_is_asked_for() -> None:
    features = FeatureRequest(taps=(3,), sigma=0.9)
    needs = DecoderNeeds(returns=frozenset({"features"}), features=features, horizons=(FRAMES,), frame_dt=2 * DT)
    model, videos = SpeedByPlace([0.01, 0.04]), []
    recorder = type("Recorder", (), {"imagined": lambda self, step, frames: videos.append(frames)})()
    made = planner(model, Reader(needs), recorder=recorder)
    assert made.act(observation(0, 0.5))[-1, 0] == pytest.approx(0.5 + 16 * 0.01)
    assert model.requests[0].returns == frozenset({"features"}) and model.requests[0].features == features
    assert videos == [], "no pictures, no video"
    made = planner(model, Reader(needs), candidates=2, verifier="spread")
    made.act(observation(0, 0.5))
    assert model.requests[-1].returns == frozenset({"features"}), "spread needs no pictures"
    made = planner(model, Reader(needs), candidates=2, verifier_object=Fastest())
    assert made.act(observation(0, 0.5))[-1, 0] == pytest.approx(0.5 + 16 * 0.04)
    assert model.requests[-1].returns == frozenset({"features", "frames"})
    planner(model, Reader(needs), rollout_chunks=2).act(observation(0, 0.5))
    assert model.requests[-1].returns == frozenset({"features", "frames"}), "there is nothing else to go on from"


def test_pictures_of_a_collage_stand_where_its_tiles_are() -> None:
    views = ViewLayout(names=("head", "wrist"), height=12, width=16, tiles=((0, 0, 8, 16), (8, 0, 4, 8)))
    model = SpeedByPlace([0.01], views=views)
    seen = observation(0, 0.5)
    seen.images["wrist"] = np.full((8, 16, 3), 90, np.uint8)
    planner(model).act(seen)
    canvas = model.requests[0].context_BVTHWC
    assert canvas.shape == (1, 1, 1, 12, 16, 3)
    assert (
        (canvas[..., :8, :, :] == 50).all()
        and (canvas[..., 8:, :8, :] == 90).all()
        and not canvas[..., 8:, 8:, :].any()
    )


def test_settings_that_cannot_work_are_refused() -> None:
    model = SpeedByPlace([0.01])
    with pytest.raises(UserError, match=r"planner\.verifier.*choose among"):
        planner(model, candidates=2)
    with pytest.raises(UserError, match=r"planner\.candidates"):
        planner(model, candidates=0)
    with pytest.raises(UserError, match=r"planner\.rollout_chunks"):
        planner(model, rollout_chunks=0)
    with pytest.raises(UserError, match=r"execute_horizon: got 65, wanted 1\.\.64"):
        planner(model, rollout_chunks=2, execute_horizon=65)
    with pytest.raises(MissingCapabilityError, match="ActionSpec"):
        ActionPlanner(model, Reader(), ActionPlannerConfig(candidates=2, verifier="smoothness"))
    for needs, match in (
        (DecoderNeeds(frame_dt=DT), "every 0.060 s"),
        (DecoderNeeds(horizons=(9,)), "horizon"),
        (DecoderNeeds(returns=frozenset({"depth"})), "returns depth"),
    ):
        with pytest.raises(MissingCapabilityError, match=match):
            planner(model, Reader(needs))
    silent = SpeedByPlace([0.01], returns=frozenset({"features"}))
    needs = DecoderNeeds(returns=frozenset({"features"}), features=FeatureRequest(taps=(1,)))
    planner(silent, Reader(needs))
    with pytest.raises(MissingCapabilityError, match="features and frames"):
        planner(silent, Reader(needs), candidates=2, verifier_object=Fastest())


def test_random_choice_depends_on_the_noise_seed_only() -> None:
    speeds = [0.01, 0.02, 0.03, 0.04]
    first = planner(SpeedByPlace(speeds), candidates=4, verifier_object=Random()).act(observation(0, 0.5))
    again = planner(SpeedByPlace(speeds), candidates=4, verifier_object=Random()).act(observation(0, 0.5))
    np.testing.assert_array_equal(first, again)
    chosen = set()
    for plan in range(4):
        made = planner(SpeedByPlace(speeds), candidates=4, verifier_object=Random())
        made._counts["plans"] = plan
        chosen.add(round(float(made.act(observation(0, 0.5))[-1, 0]), 3))
    assert len(chosen) > 1
