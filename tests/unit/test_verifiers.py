"""Verifiers on constructed candidates of which the right one is known."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.types import DT, ActionSpec
from physisforcing.planner.track_consistency import TrackConsistency, track_there_and_back
from physisforcing.planner.verifiers import (
    Combined,
    Random,
    Smoothness,
    Spread,
    Verifier,
    VerifierInput,
    make_verifier,
)

NAMES = (
    *(f"left_joint_{k}" for k in range(1, 7)),
    "left_gripper",
    *(f"right_joint_{k}" for k in range(1, 7)),
    "right_gripper",
)
SPEC = ActionSpec(
    names=NAMES, low=(-2.0,) * 6 + (0.0,) + (-2.0,) * 6 + (0.0,), high=(2.0,) * 6 + (1.0,) + (2.0,) * 6 + (1.0,)
)
ROWS = 32


def candidates(*paths: NDArray[np.float64], **changes: Any) -> VerifierInput:
    """Chunks whose first joint follows these paths [P]; everything else stays at zero."""
    actions = np.zeros((len(paths), len(paths[0]), 14), np.float32)
    actions[..., 0] = np.stack(paths)
    values: dict[str, Any] = {
        "actions_SPA": actions.clip(SPEC.low, SPEC.high).astype(np.float32),
        "decoded_SPA": actions,
        "state_A": np.zeros(14, np.float32),
        "execute": ROWS,
        "seeds_S": np.arange(len(paths)),
        "action_spec": SPEC,
    }
    return VerifierInput(**(values | changes))


def gentle(end: float) -> NDArray[np.float64]:
    """From 0 to ``end`` with no jerk to speak of."""
    t = np.arange(1, ROWS + 1) / ROWS
    return end * (10 * t**3 - 15 * t**4 + 6 * t**5)


def test_spread_prefers_what_the_decoder_is_sure_of_among_the_rows_that_are_executed() -> None:
    spread = np.full((3, ROWS), 0.05, np.float32)
    spread[1, :16] = 0.01
    spread[2, 16:] = 0.0
    given = candidates(*[gentle(0.5)] * 3, spread_SP=spread, execute=16)
    np.testing.assert_allclose(Spread().score(given), [-0.05, -0.01, -0.05], atol=1e-7)
    with pytest.raises(MissingCapabilityError, match="spread"):
        Spread().score(candidates(gentle(0.5)))


def test_smoothness_prefers_the_gentle_path_and_measures_each_violation() -> None:
    t = np.arange(1, ROWS + 1)
    shaking = gentle(0.8) + 0.03 * (-1.0) ** t
    jump = np.where(t < 16, 0.0, 0.8)
    beyond = gentle(2.4)
    scores = Smoothness().score(candidates(gentle(0.8), shaking, jump, beyond))
    assert scores.argmax() == 0 and (scores[1:] < scores[0] - 0.5).all()
    # Each term by itself, against its own formula.
    path = np.concatenate([[0.0], shaking])
    jerk = (path[3:] - 3 * path[2:-1] + 3 * path[1:-2] - path[:-3]) / DT**3
    only_jerk = Smoothness(speed=1e9).score(candidates(shaking))
    assert only_jerk[0] == pytest.approx(-np.sqrt((jerk**2).sum() / (len(jerk) * 12)) / 15.0, rel=1e-4)
    only_limits = Smoothness(jerk=1e12, speed=1e9).score(candidates(beyond))
    assert only_limits[0] == pytest.approx(-np.sqrt((np.maximum(beyond - 2, 0) ** 2).mean()) / 0.05, rel=1e-4)
    only_speed = Smoothness(jerk=1e12).score(candidates(jump))
    assert only_speed[0] == pytest.approx(-np.sqrt((0.8 / DT - 2.0) ** 2 / (ROWS * 12)) / 0.5, rel=1e-4)


def test_a_gripper_may_jump_but_not_leave_its_range() -> None:
    still = candidates(np.zeros(ROWS), np.zeros(ROWS))
    still.actions_SPA[0, 10:, 6] = still.decoded_SPA[0, 10:, 6] = 1.0
    still.decoded_SPA[1, :, 6] = 1.5
    scores = Smoothness().score(still)
    assert scores[0] == 0.0 and scores[1] == pytest.approx(-10.0, rel=1e-5)
    with pytest.raises(MissingCapabilityError, match="ActionSpec"):
        Smoothness().score(candidates(np.zeros(ROWS), action_spec=None))


def test_a_chunk_of_one_row_has_no_jerk() -> None:
    assert Smoothness().score(candidates(np.array([0.1])))[0] == 0.0


def test_combined_is_the_weighted_sum_of_z_scores() -> None:
    spread = np.array([[0.1], [0.2], [0.6]], np.float32).repeat(ROWS, 1)
    given = candidates(gentle(2.0), gentle(1.0), gentle(0.1), spread_SP=spread)
    first, second = Spread().score(given), Smoothness().score(given)
    wanted = 2 * (first - first.mean()) / first.std() + 0.5 * (second - second.mean()) / second.std()
    both = make_verifier("2*spread + 0.5*smoothness")
    np.testing.assert_allclose(both.score(given), wanted, atol=1e-9)
    assert both.needs == frozenset({"spread", "action_spec"})
    assert make_verifier("spread+smoothness").fingerprint != both.fingerprint
    # A part for which all are equal has no say, whatever rounding makes of it.
    given.spread_SP = np.full((3, ROWS), 0.1, np.float32)
    np.testing.assert_allclose(both.score(given), 0.5 * (second - second.mean()) / second.std(), atol=1e-9)
    assert isinstance(make_verifier("combined"), Combined)
    assert make_verifier("combined").needs == frozenset({"spread", "action_spec", "frames"})


def test_random_knows_the_seed_and_nothing_else() -> None:
    first = Random().score(candidates(gentle(0.1), gentle(0.2), seeds_S=np.array([11, 12])))
    other = Random().score(candidates(gentle(3.0), gentle(0.0), gentle(1.0), seeds_S=np.array([12, 11, 13])))
    assert first.tolist() == [other[1], other[0]]
    seeds = np.arange(2000)
    many = Random().score(candidates(*[np.zeros(4)] * 2000, seeds_S=seeds))
    assert abs(many.mean() - 0.5) < 0.03 and many.min() >= 0 and many.max() < 1
    assert abs(np.corrcoef(seeds, many)[0, 1]) < 0.08


def test_names_and_weights_that_mean_nothing_are_refused() -> None:
    for name in ("spread", "smoothness", "track_consistency", "random", "combined"):
        assert isinstance(make_verifier(name), Verifier)
    with pytest.raises(UserError, match="did you mean 'smoothness'"):
        make_verifier("smothness")
    for text in ("0*spread", "spread+", "-1*spread", ""):
        with pytest.raises(UserError, match="WEIGHT"):
            make_verifier(text)
    with pytest.raises(UserError, match="physis train success"):
        make_verifier("spread+success")


# ---------------------------------------------------------------------- tracks, on drawn videos


def texture(size: int, seed: int) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(40, 220, (size // 4 + 1, size // 4 + 1, 3)).astype(np.uint8)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def draw(kind: str, frames: int = 9) -> NDArray[np.uint8]:
    """A textured square on a table, [T,96,128,3]: ``still``; ``moving`` to the right; ``melting`` into the table while it moves;
    ``gone`` after half of the time; ``swapped`` for another one; ``wobbling`` like jelly; ``covered`` by a plate that slides over it."""
    table = np.full((96, 128, 3), 150, np.uint8)
    block, other, plate = texture(28, 2), texture(28, 9), texture(40, 5)
    rows, columns = np.meshgrid(np.arange(28, dtype=np.float32), np.arange(28, dtype=np.float32), indexing="ij")
    video = []
    for t in range(frames):
        picture, x, y = table.copy(), 14 + (0 if kind in ("still", "covered") else 5 * t), 34
        patch = block
        if kind == "melting":
            share = min(1.0, t / (0.7 * frames))
            patch = ((1 - share) * block + share * 150).astype(np.uint8)
        elif kind == "swapped" and t > frames // 2:
            patch = other
        elif kind == "wobbling":
            size = np.float32(5 * np.sin(t))
            waves = columns + size * np.sin(rows / 4), rows + size * np.cos(columns / 4)
            patch = cv2.remap(block, *waves, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        if not (kind == "gone" and t > frames // 2):
            picture[y : y + 28, x : x + 28] = patch
        if kind == "covered":
            left = 80 - 9 * t
            picture[y - 6 : y + 34, max(left, 0) : left + 40] = plate[:, max(-left, 0) :]
        video.append(picture)
    return np.stack(video)


@pytest.fixture(scope="module")
def consistency() -> dict[str, Any]:
    kinds = ("still", "moving", "melting", "gone", "swapped", "wobbling", "covered")
    return {kind: track_there_and_back(draw(kind)) for kind in kinds}


def test_what_stays_itself_scores_better_than_what_does_not(consistency: dict[str, Any]) -> None:
    scores = {kind: found.score for kind, found in consistency.items()}
    assert scores["still"] == 0.0
    for wrong in ("melting", "gone", "swapped", "wobbling"):
        for right in ("still", "moving", "covered"):
            assert scores[wrong] < 2 * scores[right] - 0.2, scores


def test_what_is_covered_has_not_vanished(consistency: dict[str, Any]) -> None:
    assert consistency["gone"].vanished >= 10 and consistency["melting"].vanished >= 10
    assert consistency["covered"].vanished <= 2 and consistency["moving"].vanished <= 2
    assert consistency["swapped"].appeared >= 5
    assert consistency["moving"].moved >= 10 and consistency["moving"].error_px < 0.5
    assert consistency["wobbling"].error_px > 4 * consistency["moving"].error_px


def test_the_verifier_ranks_videos_of_any_size() -> None:
    videos = np.stack([draw("melting"), draw("moving")])
    verifier = TrackConsistency()
    given = candidates(gentle(0.1), gentle(0.1), frames_STHWC=videos)
    small = verifier.score(given)
    assert small[1] > small[0] + 0.5
    given.frames_STHWC = videos.repeat(2, axis=2).repeat(2, axis=3)
    large = verifier.score(given)
    assert large[1] > large[0] + 0.5
    with pytest.raises(MissingCapabilityError, match="pictures"):
        verifier.score(candidates(gentle(0.1)))
