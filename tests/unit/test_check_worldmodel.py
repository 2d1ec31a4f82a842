"""The contract suite: a model that keeps the contract passes all of it, and each way to break it is caught by the check for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import textwrap
from typing import ClassVar

import numpy as np
import pytest

from physisforcing import cli
from physisforcing.check import CheckCommand, check
from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.requests import check_request
from physisforcing.core.types import DT, ActionSpec, Rollout, RolloutRequest, ViewLayout, WorldModelSpec
from physisforcing.planner.check_worldmodel import CHECKS, check_names, check_world_model, summary
from physisforcing.planner.contract_probe import CheckSettings, Probe, scene
from physisforcing.planner.service import toy
from physisforcing.world_models import load_any

HORIZONS = (5, 9)


class Good:
    """Keeps the contract in all it has: a picture that shifts by what text, actions, goal and joints add up to, with noise by seed."""

    changes: ClassVar[dict] = {}

    def __init__(self) -> None:
        joints = ActionSpec(names=("a", "b"), low=(-1.0, 0.0), high=(1.0, 1.0))
        values = {
            "name": "good",
            "views": ViewLayout(names=("head", "wrist"), height=12, width=16),
            "context_frames": 2,
            "horizons": HORIZONS,
            "frame_dt": 2 * DT,
            "conditions": frozenset({"text", "actions", "goal", "proprioception"}),
            "returns": frozenset({"frames", "latents", "features"}),
            "proprioception_lags": (0, 8),
            "action_spec": joints,
            "max_batch": 4,
            "fingerprint": "g00d",
            "blocks": 3,
        }
        self.spec = WorldModelSpec(**(values | self.changes))

    def rollout(self, request: RolloutRequest) -> Rollout:
        self.refuse(request)
        batch, samples = request.seeds_BS.shape
        order = [(b, s) for b in range(batch) for s in range(samples)]
        frames = [self.video(request, b, s) for b, s in order]
        shape = (batch, samples)
        made = Rollout(times_T=self.times(request.horizon))
        if "frames" in request.returns:
            made.frames_BSVTHWC = np.stack(frames).reshape(*shape, *frames[0].shape)
        if "latents" in request.returns:
            latents = [f[0].mean(-1)[None].astype(np.float32) for f in frames]
            made.latents_BSCFhw = np.stack(latents).reshape(*shape, *latents[0].shape)
        if "features" in request.returns:
            assert request.features is not None
            maps = [np.stack([f[0].astype(np.float32) * tap for tap in request.features.taps]) for f in frames]
            made.features_BSKFhwD = np.stack(maps).reshape(*shape, *maps[0].shape)
        return made

    def refuse(self, request: RolloutRequest) -> None:
        check_request(request, self.spec)
        if request.features is not None and max(request.features.taps) > self.spec.blocks:
            raise MissingCapabilityError("taps", got=request.features.taps, wanted="1..3", fix="fewer")
        if request.seeds_BS.size > self.spec.max_batch:
            raise MissingCapabilityError("seeds_BS", got=request.seeds_BS.size, wanted="4 or fewer", fix="in parts")

    def times(self, horizon: int) -> np.ndarray:
        return np.arange(horizon) * self.spec.frame_dt

    def noise(self, request: RolloutRequest, b: int, s: int) -> np.random.Generator:
        return np.random.default_rng(int(request.seeds_BS[b, s]))

    def shift(self, request: RolloutRequest, b: int, s: int, t: int) -> int:
        """Pixels that the picture has moved in frame t; here from all conditions."""
        text = int(hashlib.sha256(request.instructions[b].encode()).hexdigest(), 16) % 7
        actions, state, goal = request.actions_BSPA, request.proprioception_BKA, request.goal_BVHWC
        driven = 0.0 if actions is None else 10 * float(actions[b, s, : 2 * t, 0].sum())
        driven += 0.0 if goal is None else float(goal[b].mean()) / 20
        driven += 0.0 if state is None else 10 * float(state[b, 0, 0])
        return round((1 + text + driven) * t)

    def video(self, request: RolloutRequest, b: int, s: int) -> np.ndarray:
        now, generator = request.context_BVTHWC[b, :, -1], self.noise(request, b, s)
        frames = [now]
        for t in range(1, request.horizon):
            moved = np.roll(now, self.shift(request, b, s, t), axis=2).astype(int)
            frames.append((moved + generator.integers(-3, 4, moved.shape)).clip(0, 255).astype(np.uint8))
        return np.stack(frames, axis=1)


def run(model, *only, **settings):
    """Results by name of the checks of a model (a class is made anew at every load)."""
    results = check_world_model(model, CheckSettings(**({"max_samples": 5} | settings)), only=only)
    return {result.name: result for result in results}


def failed(results) -> set[str]:
    return {name for name, result in results.items() if result.status == "fail"}


def test_a_model_that_keeps_the_contract_passes_everything():
    results = run(Good)
    assert not failed(results), [r.line() for r in results.values() if r.status == "fail"]
    skipped = {name: r.detail for name, r in results.items() if r.status == "skipped"}
    assert skipped == {
        "refuses-actions": "a model without actions",
        "refuses-goal": "a model without goal",
        "refuses-other-return": "a model that does not return everything",
    }
    assert list(results) == ["load", *CHECKS]
    assert results["first-frame"].measured["mean_to_context"] == 0
    assert results["batch-invariance"].measured == {"greatest": 0, "mean": 0}
    assert results["seeds"].measured["mean"] == pytest.approx(
        1.7, abs=0.4
    )  # two uniform integers of -3..3, 4 of 5 frames
    assert results["max-batch"].detail == "4 at once; one more is refused"
    assert results["spec"].measured["control_steps_a_frame"] == 2


def variant(**members):
    return type("Broken", (Good,), members)


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


def test_a_model_that_raises_fails_and_says_where():
    def angry(self, request, b, s):
        raise ZeroDivisionError("no bell")

    results = run(variant(video=angry))
    assert {"shapes", "times", "determinism", "batch-invariance", "fingerprint"} <= failed(results)
    assert results["shapes"].detail.startswith("raised ZeroDivisionError: no bell at ")
    assert results["refuses-horizon"].status == "pass" and results["spec"].status == "pass"
    leaves = variant(video=lambda self, request, b, s: (_ for _ in ()).throw(SystemExit(3)))
    assert "SystemExit" in run(leaves, "shapes")["shapes"].detail
    wrong = variant(refuse=lambda self, request: 1 / (request.horizon in HORIZONS))
    assert "ZeroDivisionError" in run(wrong, "refuses-horizon")["refuses-horizon"].detail


def test_a_model_that_does_not_load_skips_the_rest():
    def load():
        raise RuntimeError("no weights")

    results = run(load)
    assert results["load"].status == "fail" and "no weights" in results["load"].detail
    assert summary(list(results.values())) == {"pass": 0, "fail": 1, "skipped": len(CHECKS)}
    assert run(lambda: object())["load"].status == "fail"
    with pytest.raises(UserError):
        run(lambda: load_any("nowhere/at/all"))


def test_what_a_model_cannot_do_is_skipped_with_what_it_needs():
    class Plain(Good):
        changes: ClassVar[dict] = {
            "conditions": frozenset({"text"}),
            "returns": frozenset({"frames"}),
            "proprioception_lags": (),
            "action_spec": None,
            "max_batch": 1,
            "deterministic": False,
            "views": ViewLayout(height=12, width=16),
        }

    model = Plain()
    results = run(lambda: model)
    assert not failed(results)
    needs = {name: r.detail for name, r in results.items() if r.status == "skipped"}
    assert needs["actions-sensitivity"] == "conditions with actions" and needs["features"] == "returns with features"
    assert needs["fingerprint"].startswith("a factory that makes a new model")
    assert needs["determinism"].startswith("a spec that says deterministic; the same request twice differs by 0")
    assert needs["batch-invariance"].startswith("max_batch of 2 or more")
    assert results["refuses-actions"].status == results["refuses-goal"].status == "pass"
    assert "max_samples=5" in run(Good, "max-batch", max_samples=4)["max-batch"].detail


def test_pictures_and_examples_stand_in_for_made_up_ones():
    seen = []

    class Watched(Good):
        def refuse(self, request):
            seen.append(request)
            super().refuse(request)

    picture = scene(3, 24, 32)
    check_world_model(Watched, pictures=[picture], only=["shapes"])
    assert seen[-1].context_BVTHWC.shape == (1, 2, 2, 12, 16, 3)
    wanted = picture.reshape(12, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(seen[-1].context_BVTHWC[0, 1, 1] - wanted).max() <= 1

    class Offers(Watched):
        def examples(self):
            rows = [
                Probe(Good(), CheckSettings()).request([Probe(Good(), CheckSettings()).row(i)], [[0]]) for i in (2, 3)
            ]
            return [dataclasses.replace(row, ids=[("task", 100 + i, 0)]) for i, row in enumerate(rows)]

    seen.clear()
    assert not failed(run(Offers))
    assert {name for request in seen for name in request.ids} == {("task", 100, 0), ("task", 101, 0)}


def test_unknown_names_are_refused():
    assert check_names(["times", "spec"]) == ["load", "spec", "times"]
    with pytest.raises(UserError, match="batch-invariance"):
        check_names(["batch-invarance"])


# ---------------------------------------------------------------------- the command

MODULE = """
import os, sys, time
import numpy as np
from physisforcing.core.requests import check_request
from physisforcing.core.types import Rollout, ViewLayout, WorldModelSpec

class Still:
    def __init__(self, fault=""):
        self.fault, self.calls = fault, 0
        print("loading", fault)
        self.spec = WorldModelSpec(name="still", views=ViewLayout(height=8, width=12), context_frames=1, horizons=(5,),
            frame_dt=0.12, conditions=frozenset(), returns=frozenset({"frames"}), max_batch=2, fingerprint="s1")
    def rollout(self, request):
        check_request(request, self.spec)
        self.calls += 1
        if self.fault == "hangs" and request.seeds_BS.size > 1:
            time.sleep(600)
        if self.fault == "dies" and self.calls == 1:
            os.kill(os.getpid(), 11)
        frames = np.repeat(request.context_BVTHWC[:, None], request.seeds_BS.shape[1], 1).repeat(5, 3)
        return Rollout(times_T=np.arange(5) * 0.12, frames_BSVTHWC=frames)

def load(): return Still()
def hangs(): return Still("hangs")
def dies(): return Still("dies")
def breaks(): raise RuntimeError("weights are gone")
def slow(): time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "still_model.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "broken_model.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def statuses(report):
    return {entry["name"]: entry["status"] for entry in report["checks"]}


def test_the_command_finds_a_module_in_the_current_folder(folder, capfd):
    assert cli.main(["check", "worldmodel", "still_model:load", "max_samples=3", "--json"]) == 0
    out, err = capfd.readouterr()
    report = json.loads(out)  # what the model prints is not in it
    assert "loading" in err and report["model"] == "still" and report["fingerprint"] == "s1"
    assert report["counts"]["fail"] == 0 and len(report["checks"]) == len(CHECKS) + 1
    seeds = next(entry for entry in report["checks"] if entry["name"] == "seeds")
    assert seeds["detail"].startswith("not stochastic") and seeds["measured"]["greatest"] == 0


def test_a_hang_and_a_crash_fail_their_checks_and_the_rest_goes_on(folder, capfd):
    report = check(CheckCommand(world_model="still_model:hangs", timeout=2.5, max_samples=3))
    found = statuses(report)
    assert found["batch-invariance"] == found["max-batch"] == "fail"
    assert found["determinism"] == found["fingerprint"] == found["refuses-horizon"] == "pass"
    detail = next(entry["detail"] for entry in report["checks"] if entry["name"] == "batch-invariance")
    assert detail == "no answer within 2.5 s"
    assert cli.main(["check", "worldmodel", "still_model:dies", "timeout=20", "only=[shapes,times,seeds,returns]"]) == 1
    out = capfd.readouterr().out
    assert out.count("the process ended by SIGSEGV") == 3 and "skipped: needs a model that answers in time" in out


def test_loading_that_fails_or_hangs_is_a_failed_check(folder, capfd):
    assert cli.main(["check", "worldmodel", "still_model:breaks", "only=[spec]"]) == 1
    assert "weights are gone" in capfd.readouterr().out
    report = check(CheckCommand(world_model="still_model:slow", timeout=2.0, only=["spec"]))
    assert statuses(report) == {"load": "fail", "spec": "skipped"}
    assert cli.main(["check", "worldmodel", "broken_model:load", "only=[spec]"]) == 1
    assert "a_package_that_is_not_there" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["not_a_module:load"], "not_a_module"),
        (["still_model:laod"], "'load'"),
        (["still_model:np"], "something to call"),
        (["no/such/folder"], "no such file or folder"),
        (["still_model:load", "only=[determinsm]"], "determinism"),
        (["still_model:load", "timout=3"], "timeout"),
        (["still_model:load", "images=[nothing.png]"], "nothing.png"),
        (["still_model:load", "instructions=[same,same]"], "two different sentences"),
    ],
)
def test_mistakes_are_one_message_with_exit_code_2(folder, capfd, words, said):
    assert cli.main(["check", "worldmodel", *words]) == 2
    err = capfd.readouterr().err
    assert said in err and "Traceback" not in err


def test_help_says_that_naming_a_module_runs_it(capsys):
    assert cli.main(["check", "worldmodel", "--help"]) == 0
    text = capsys.readouterr().out
    assert "runs\nits code" in text and "shipped" in text and "module:function" in text


@pytest.mark.parametrize("make", [toy.actions, toy.text])
def test_the_toys_of_the_service_keep_the_contract(make):
    results = {r.name: r for r in check_world_model(make)}
    assert [r.line() for r in results.values() if r.status == "fail"] == []
    assert results["text-sensitivity"].measured["mean"] > 1
    assert results["actions-sensitivity"].status == ("pass" if make is toy.actions else "skipped")


def test_a_toy_has_the_same_fingerprint_in_every_process():
    code = "from physisforcing.planner.service import toy; print(toy.actions().spec.fingerprint)"
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "12"
    }
    assert len(told) == 1 and toy.actions().spec.fingerprint.encode() in told.pop()
