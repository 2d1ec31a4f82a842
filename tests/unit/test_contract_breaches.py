"""Each way to break the world-model contract is caught by the check for it, and by no other."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import pytest

from good_model import HORIZONS, Good, failed, run, variant
from physisforcing.core.types import DT


class NoisePlace(Good):
    def noise(self, request, b, s):
        return np.random.default_rng([int(request.seeds_BS[b, s]), b])


class GlobalNoise(Good):
    stream = np.random.default_rng(0)

    def noise(self, request, b, s):
        return self.stream


class OneNoise(Good):
    """Seeded by the batch: every candidate gets the noise of the first."""

    def noise(self, request, b, s):
        return np.random.default_rng(int(request.seeds_BS[0, 0]))


class Writes(Good):
    def rollout(self, request):
        answer = super().rollout(request)
        request.context_BVTHWC[...] = 0
        return answer


class Reloads(Good):
    """Weights that are drawn anew at every load under the same fingerprint."""

    count = 0

    def __init__(self):
        super().__init__()
        Reloads.count += 1
        self.number = Reloads.count

    def shift(self, request, b, s, t):
        return super().shift(request, b, s, t) + self.number


class Renamed(Reloads):
    def __init__(self):
        super().__init__()
        self.spec = dataclasses.replace(self.spec, fingerprint=f"g{self.number}")


def without(condition):
    """A model that takes a condition and does not look at it."""

    class Deaf(Good):
        def shift(self, request, b, s, t):
            blind = {
                "text": {"instructions": [""] * len(request.instructions)},
                "actions": {"actions_BSPA": None},
                "goal": {"goal_BVHWC": None},
                "proprioception": {"proprioception_BKA": None},
            }[condition]
            return super().shift(dataclasses.replace(request, **blind), b, s, t)

    return Deaf


def careless(change):
    """A model that never refuses what ``change`` makes of a request: it puts it right in silence."""

    class Careless(Good):
        def refuse(self, request):
            fixed = change(self, request)
            super().refuse(fixed)

        def rollout(self, request):
            fixed = change(self, request)
            return super().rollout(fixed)

    return Careless


def nearest_horizon(self, request):
    return dataclasses.replace(request, horizon=min(HORIZONS, key=lambda h: abs(h - request.horizon)))


def known_returns(self, request):
    return dataclasses.replace(request, returns=request.returns & self.spec.returns)


def zero_nan(name):
    def change(self, request):
        array = getattr(request, name)
        return dataclasses.replace(request, **{name: None if array is None else np.nan_to_num(array)})

    return change


def any_picture(self, request):
    context = request.context_BVTHWC
    if context.dtype != np.uint8:
        context = (255 * context).astype(np.uint8)
    return dataclasses.replace(request, context_BVTHWC=context)


def any_size(self, request):
    context = request.context_BVTHWC
    if context.shape[3] == 6:
        context = context.repeat(2, 3).repeat(2, 4)
    return dataclasses.replace(request, context_BVTHWC=context)


def pad_actions(self, request):
    actions = request.actions_BSPA
    if actions is not None and actions.shape[2] % 2:
        actions = np.concatenate([actions, actions[:, :, -1:]], axis=2)
    return dataclasses.replace(request, actions_BSPA=actions)


def first_sentences(self, request):
    return dataclasses.replace(request, instructions=request.instructions[: len(request.seeds_BS)])


def clamp_taps(self, request):
    features = request.features
    if features is not None:
        taps = tuple(min(t, self.spec.blocks) for t in features.taps)
        features = dataclasses.replace(features, taps=taps)
    return dataclasses.replace(request, features=features)


def unasked(name):
    """A text model that drops what it was given for a condition it does not have."""
    made = careless(lambda self, request: dataclasses.replace(request, **{name: None}))
    made.changes = {"conditions": frozenset({"text"}), "proprioception_lags": (), "action_spec": None}
    return made


def latents_for_features(self, request):
    wanted = request.returns
    if "features" in wanted:
        wanted = wanted - {"features"} | {"frames"}
    return dataclasses.replace(request, returns=wanted, features=None)


class NoFeatures(careless(latents_for_features)):
    changes: ClassVar[dict] = {"returns": frozenset({"frames", "latents"}), "blocks": 0}


BROKEN = {
    "spec: times": (variant(changes={"frame_dt": 0.0}), {"spec"}),
    "spec: fingerprint": (variant(changes={"fingerprint": ""}), {"spec"}),
    "spec: returns": (variant(changes={"returns": frozenset({"frames", "sound"})}), {"spec"}),
    "spec: lags": (variant(changes={"proprioception_lags": ()}), {"spec"}),
    "rate": (variant(times=lambda self, horizon: np.arange(horizon) * DT), {"times", "horizons"}),
    "late": (variant(times=lambda self, horizon: np.arange(1, horizon + 1) * 2 * DT), {"times", "horizons"}),
    "place": (NoisePlace, {"batch-invariance"}),
    "shared noise": (OneNoise, {"batch-invariance"}),
    "global noise": (GlobalNoise, {"determinism", "batch-invariance", "fingerprint"}),
    "writes": (Writes, {"request-kept"}),
    "reloads": (Reloads, {"fingerprint"}),
    "renamed": (Renamed, {"fingerprint"}),
    "text": (without("text"), {"text-sensitivity"}),
    "actions": (without("actions"), {"actions-sensitivity"}),
    "goal": (without("goal"), {"goal-sensitivity"}),
    "proprioception": (without("proprioception"), {"proprioception-sensitivity"}),
    "horizon": (careless(nearest_horizon), {"refuses-horizon"}),
    "returns": (careless(known_returns), {"refuses-unknown-return"}),
    "other return": (NoFeatures, {"refuses-other-return"}),
    "taps": (careless(clamp_taps), {"refuses-tap"}),
    "nan state": (careless(zero_nan("proprioception_BKA")), {"refuses-nan-proprioception"}),
    "nan actions": (careless(zero_nan("actions_BSPA")), {"refuses-nan-actions"}),
    "short actions": (careless(pad_actions), {"refuses-short-actions"}),
    "float context": (careless(any_picture), {"refuses-float-context"}),
    "small context": (careless(any_size), {"refuses-small-context"}),
    "rows": (careless(first_sentences), {"refuses-uneven-rows"}),
    "given actions": (unasked("actions_BSPA"), {"refuses-actions"}),
    "given goal": (unasked("goal_BVHWC"), {"refuses-goal"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_way_to_break_it_is_caught_by_its_check(name):
    model, checks = BROKEN[name]
    assert checks <= failed(run(model))


#: Models in which one thing alone is wrong: nothing else may fail.
ALONE = [name for name in BROKEN if not name.startswith(("spec", "global"))]


@pytest.mark.parametrize("name", ALONE)
def test_nothing_else_fails(name):
    model, checks = BROKEN[name]
    assert failed(run(model)) == checks


class ShowsAnother(Good):
    def video(self, request, b, s):
        made = super().video(request, b, s)
        made[:, 0] = 255 - made[:, 0]
        return made


class WrongType(Good):
    def rollout(self, request):
        made = super().rollout(request)
        if made.frames_BSVTHWC is not None:
            made.frames_BSVTHWC = made.frames_BSVTHWC.astype(np.float32) / 255
        return made


class ForgetsLatents(Good):
    def rollout(self, request):
        made = super().rollout(request)
        made.latents_BSCFhw = None
        return made


class ShortWhenLong(Good):
    def video(self, request, b, s):
        return super().video(request, b, s)[:, : HORIZONS[0]]


class NanLatents(Good):
    def rollout(self, request):
        made = super().rollout(request)
        if made.latents_BSCFhw is not None:
            made.latents_BSCFhw[..., 0] = np.nan
        return made


class LosesBatch(Good):
    """Answers more than max_batch, but only the first four."""

    def refuse(self, request):
        pass

    def rollout(self, request):
        made = super().rollout(request)
        if made.frames_BSVTHWC is not None:
            made.frames_BSVTHWC = made.frames_BSVTHWC[:4]
        return made


@pytest.mark.parametrize(
    ("model", "check_name", "words"),
    [
        (ShowsAnother, "first-frame", "grey levels from the context"),
        (WrongType, "shapes", "float32"),
        (ForgetsLatents, "returns", "latents was asked for"),
        (ShortWhenLong, "horizons", "wanted uint8 [1, 1, 2, 9, 12, 16, 3]"),
        (NanLatents, "returns", "not finite"),
        (LosesBatch, "max-batch", "[4, 1, 2, 5, 12, 16, 3]"),
    ],
)
def test_what_is_wrong_is_said(model, check_name, words):
    result = run(model, check_name)[check_name]
    assert result.status == "fail" and words in result.detail
