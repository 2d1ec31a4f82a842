"""What a world model that answers must get right: spec, shapes, times, returns, first frame, determinism, batches, conditions.

Each check takes a ``Probe`` and gives an ``Outcome``; ``ContractBroken`` says what is wrong, ``NotApplicable`` what the check needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from physisforcing.core.errors import UserError
from physisforcing.core.types import DT, FeatureRequest, Rollout, ViewLayout, WorldModelSpec

from .contract_probe import CONDITIONS, RETURNS, Probe, Row, difference, output


class ContractBroken(Exception):
    """The model does not do what its spec or the contract says. ``measured``: the figures that show it."""

    def __init__(self, message: str, **measured: float) -> None:
        super().__init__(message)
        self.measured = measured


class NotApplicable(Exception):
    """This check cannot be made of this model; the message says what it needs. ``measured``: what was seen anyway."""

    def __init__(self, needs: str, **measured: float) -> None:
        super().__init__(needs)
        self.measured = measured


@dataclass(slots=True, kw_only=True)
class Outcome:
    """A check that passed: one sentence and its figures."""

    detail: str
    measured: dict[str, float] = field(default_factory=dict)


Check = Callable[[Probe], Outcome]
#: Shape of each return after [B,S]: number of axes, and the dtypes allowed.
AXES = {"frames": (5, ("uint8",)), "latents": (4, ("float32",)), "features": (5, ("float16", "float32"))}


# ---------------------------------------------------------------------- what it says and returns


def check_spec(probe: Probe) -> Outcome:
    problems = list(spec_problems(probe.spec))
    if problems:
        raise ContractBroken("; ".join(problems))
    spec = probe.spec
    steps = spec.frame_dt / DT
    detail = (
        f"{spec.name}: {spec.views.height}x{spec.views.width}, frames {', '.join(map(str, spec.horizons))}, one every"
        f" {spec.frame_dt:.4g} s, conditions {', '.join(sorted(spec.conditions)) or 'none'}"
    )
    return Outcome(detail=detail, measured={"frame_dt_s": spec.frame_dt, "control_steps_a_frame": round(steps, 4)})


def spec_problems(spec: WorldModelSpec) -> list[str]:
    """What is wrong with a spec, in words; an empty list where nothing is."""
    whole = all(isinstance(h, int) and h >= 2 for h in spec.horizons)
    bad = {
        "name is empty": not spec.name,
        "views is not a ViewLayout": not isinstance(spec.views, ViewLayout),
        "context_frames is below 1": spec.context_frames < 1,
        "horizons are not increasing whole numbers of frames from 2": not spec.horizons
        or not whole
        or any(b <= a for a, b in pairwise(spec.horizons)),
        "frame_dt is not a positive number of seconds": not (math.isfinite(spec.frame_dt) and spec.frame_dt > 0),
        f"conditions are not among {sorted(CONDITIONS)}": not frozenset(spec.conditions) <= CONDITIONS,
        f"returns are not some of {sorted(RETURNS)}": not spec.returns or not frozenset(spec.returns) <= RETURNS,
        "proprioception_lags and the condition proprioception need each other": bool(spec.proprioception_lags)
        != ("proprioception" in spec.conditions),
        "actions need an action_spec": "actions" in spec.conditions and spec.action_spec is None,
        "max_batch is below 1": spec.max_batch < 1,
        "features need blocks": "features" in spec.returns and spec.blocks < 1,
        "fingerprint is empty": not isinstance(spec.fingerprint, str) or not spec.fingerprint,
    }
    problems = [text for text, wrong in bad.items() if wrong]
    if spec.action_spec is not None:
        a = spec.action_spec
        if not len(a.names) == len(a.low) == len(a.high) or any(h < low for low, h in zip(a.low, a.high)) or a.dt <= 0:
            problems.append("action_spec has other numbers of names and limits, limits the wrong way round, or no dt")
    return problems


def check_shapes(probe: Probe) -> Outcome:
    rollout = probe.base()
    _check_shape(probe, rollout, probe.main, (1, 1), probe.horizon)
    made = output(rollout, probe.main)
    return Outcome(detail=f"{probe.main} {made.dtype} {list(made.shape)}")


def _check_shape(probe: Probe, rollout: Rollout, name: str, lead: tuple[int, int], horizon: int) -> None:
    axes, dtypes = AXES[name]
    found = {"frames": rollout.frames_BSVTHWC, "latents": rollout.latents_BSCFhw, "features": rollout.features_BSKFhwD}
    made = found[name]
    if made is None:
        raise ContractBroken(f"{name} was asked for and is not in the rollout")
    if not isinstance(made, np.ndarray):
        raise ContractBroken(f"{name} is a {type(made).__name__}, not a numpy array")
    views = probe.spec.views
    wanted = (*lead, probe.views, horizon, views.height, views.width, 3)
    right = made.shape == wanted if name == "frames" else made.ndim == axes + 2 and made.shape[:2] == lead
    if not right or made.dtype.name not in dtypes:
        shape = list(wanted) if name == "frames" else f"[{lead[0]}, {lead[1]}] and {axes} more axes"
        raise ContractBroken(f"{name} is {made.dtype} {list(made.shape)}; wanted {' or '.join(dtypes)} {shape}")
    if not np.isfinite(made.astype(np.float32)).all():
        raise ContractBroken(f"{name} holds numbers that are not finite")


def check_times(probe: Probe) -> Outcome:
    worst = _time_error(probe, probe.base(), probe.horizon)
    spec = probe.spec
    if "actions" in spec.conditions and spec.action_spec is not None:
        rows = (probe.horizon - 1) * spec.frame_dt / spec.action_spec.dt
        if abs(rows - round(rows)) > 1e-3:
            raise ContractBroken(f"{probe.horizon} frames last {rows:.3f} actions, which is not a whole number")
    return Outcome(detail="times are multiples of frame_dt from 0", measured={"greatest_error_s": worst})


def _time_error(probe: Probe, rollout: Rollout, horizon: int) -> float:
    times, wanted = np.asarray(rollout.times_T, np.float64), np.arange(horizon) * probe.spec.frame_dt
    if times.shape != wanted.shape:
        raise ContractBroken(f"times_T has shape {list(times.shape)}, wanted [{horizon}]")
    worst = float(np.abs(times - wanted).max())
    if not worst <= 1e-6:
        text = f"times_T ends at {times[-1]:.6g} s; {horizon} frames every {probe.spec.frame_dt:.6g} s end at"
        raise ContractBroken(f"{text} {wanted[-1]:.6g} s", greatest_error_s=worst)
    return worst


def check_horizons(probe: Probe) -> Outcome:
    lengths = probe.spec.horizons
    tried = sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})
    if len(tried) == 1:
        _check_shape(probe, probe.base(), probe.main, (1, 1), probe.horizon)
    for horizon in tried[1:]:
        rollout = probe.model.rollout(probe.request([probe.row(0)], [[11]], horizon=horizon))
        _check_shape(probe, rollout, probe.main, (1, 1), horizon)
        _time_error(probe, rollout, horizon)
    return Outcome(detail=f"{', '.join(map(str, tried))} frames", measured={"tried": len(tried), "of": len(lengths)})


def check_returns(probe: Probe) -> Outcome:
    offered = sorted(probe.spec.returns)
    wanted_sets = {frozenset({name}) for name in offered} | {frozenset(offered)}
    for wanted in sorted(wanted_sets, key=lambda names: (len(names), sorted(names))):
        asked_before = wanted == {probe.main}
        request = probe.request([probe.row(0)], [[11]], returns=wanted)
        rollout = probe.base() if asked_before else probe.model.rollout(request)
        for name in sorted(wanted):
            _check_shape(probe, rollout, name, (1, 1), probe.horizon)
    return Outcome(detail=f"{', '.join(offered)}: each alone and together")


def check_features(probe: Probe) -> Outcome:
    spec = probe.spec
    if "features" not in spec.returns:
        raise NotApplicable("returns with features")
    middle = probe.features.taps[0]
    taps = tuple(sorted({1, middle, spec.blocks}))
    request, wider = (probe.request([probe.row(0)], [[11]], returns=frozenset({"features"})) for _ in range(2))
    wider.features = FeatureRequest(taps=taps)
    alone = output(probe.model.rollout(request), "features")
    together = output(probe.model.rollout(wider), "features")
    if alone.shape[2] != 1 or together.shape[2] != len(taps):
        raise ContractBroken(f"{len(taps)} taps gave {together.shape[2]} feature maps, one tap {alone.shape[2]}")
    place = taps.index(middle)
    gap = difference(alone, together[:, :, place : place + 1], "features")
    if gap.mean > 1.0:
        raise ContractBroken(f"tap {middle} is another map beside other taps than alone", **gap.measured())
    return Outcome(detail=f"taps {', '.join(map(str, taps))}: {list(together.shape)}", measured=gap.measured())


def check_first_frame(probe: Probe) -> Outcome:
    if "frames" not in probe.spec.returns:
        raise NotApplicable("returns with frames")
    first = output(probe.base(), "frames")[0, 0, :, 0]
    mine, others = probe.row(0).context_VTHWC[:, -1], [probe.row(i).context_VTHWC[:, -1] for i in range(1, 4)]
    apart = [difference(first, context, "frames").mean for context in others if not np.array_equal(context, mine)]
    other = min(apart, default=255.0)  # no other context: nothing to mistake it for
    own = difference(first, mine, "frames")
    figures = {"mean_to_context": round(own.mean, 3), "mean_to_another_context": round(other, 3)}
    limit = probe.settings.first_frame_tolerance
    if own.mean > limit:
        text = f"frame 0 is {own.mean:.1f} grey levels from the context on average, more than {limit:g}"
        raise ContractBroken(f"{text}: it must show the context", **figures)
    if own.mean >= other:
        raise ContractBroken("frame 0 is as near to another context as to its own", **figures)
    return Outcome(detail=f"{own.mean:.2f} grey levels from the context on average", measured=figures)


# ---------------------------------------------------------------------- noise, batches


def check_determinism(probe: Probe) -> Outcome:
    first = output(probe.base(), probe.main)
    probe.base(seed=12)  # whatever the model remembers has changed
    again = probe.model.rollout(probe.base_request())
    gap = difference(first, output(again, probe.main), probe.main)
    if not probe.spec.deterministic:
        needs = f"a spec that says deterministic; the same request twice differs by {gap.greatest:.4g} {gap.unit}"
        raise NotApplicable(needs, **gap.measured())
    if gap.greatest > 0:
        text = f"the same request gives another answer, up to {gap.greatest:.4g} {gap.unit}"
        raise ContractBroken(text, **gap.measured())
    return Outcome(detail="the same request twice, another seed between: bit-equal", measured=gap.measured())


def check_seeds(probe: Probe) -> Outcome:
    gap = difference(output(probe.base(), probe.main), output(probe.base(seed=12), probe.main), probe.main)
    kind = f"stochastic: two seeds differ by {gap.mean:.3g} {gap.unit} on average"
    return Outcome(
        detail=kind if gap.greatest > 0 else "not stochastic: the seed changes nothing", measured=gap.measured()
    )


def check_request_kept(probe: Probe) -> Outcome:
    probe.base()
    if probe.overwritten:
        raise ContractBroken(f"the model wrote into {', '.join(sorted(probe.overwritten))} of the request")
    return Outcome(detail="arrays of the request are as they were")


def check_batch(probe: Probe) -> Outcome:
    """The base sample stands last in a batch: last context, last sample."""
    spec, limit = probe.spec, probe.settings.max_samples
    room = min(spec.max_batch, limit)
    if room < 2:
        raise NotApplicable(f"max_batch of 2 or more (spec: {spec.max_batch}) and max_samples of 2 or more ({limit})")
    samples = 1 if room < 4 or probe.row(0).id is not None else 2
    seeds = [[101, 102][:samples], [103, 11][-samples:]]
    request = probe.request([probe.row(1), probe.row(0)], seeds)
    together = probe.model.rollout(request)
    _check_shape(probe, together, probe.main, (2, samples), probe.horizon)
    if (
        samples > 1 and request.actions_BSPA is not None
    ):  # the last sample has actions of its own: ask for exactly those
        alone = probe.model.rollout(replace(probe.base_request(), actions_BSPA=request.actions_BSPA[1:, -1:]))
    else:
        alone = probe.base()
    gap = difference(output(alone, probe.main), output(together, probe.main)[1:, -1:], probe.main)
    tolerance = probe.settings.batch_tolerance
    detail = (
        f"alone and as sample [1,{samples - 1}] of [2,{samples}]: greatest difference {gap.greatest:.3g} {gap.unit}"
    )
    if gap.greatest > tolerance:
        raise ContractBroken(
            f"{detail}, more than {tolerance:g}: noise depends on the place in the batch", **gap.measured()
        )
    return Outcome(detail=f"{detail} (tolerance {tolerance:g})", measured=gap.measured())


def check_max_batch(probe: Probe) -> Outcome:
    """``max_batch`` contexts are answered; one more is answered as well or refused, not answered wrongly."""
    spec, limit = probe.spec, probe.settings.max_samples

    def ask(count: int) -> None:
        rows = [probe.row(i) for i in range(count)]
        rollout = probe.model.rollout(probe.request(rows, [[200 + i] for i in range(count)]))
        _check_shape(probe, rollout, probe.main, (count, 1), probe.horizon)

    if spec.max_batch + 1 > limit:
        raise NotApplicable(f"max_samples={spec.max_batch + 1} to ask for more than max_batch")
    ask(spec.max_batch)
    try:
        ask(spec.max_batch + 1)
    except UserError:
        return Outcome(detail=f"{spec.max_batch} at once; one more is refused", measured={"answered": spec.max_batch})
    return Outcome(detail=f"{spec.max_batch} at once, one more in parts", measured={"answered": spec.max_batch + 1})


# ---------------------------------------------------------------------- conditions


def check_sensitivity(condition: str) -> Check:
    """The check that another ``condition`` gives another video, all else equal."""

    def check(probe: Probe) -> Outcome:
        if condition not in probe.spec.conditions:
            raise NotApplicable(f"conditions with {condition}")
        first, other_seed = output(probe.base(), probe.main), output(probe.base(seed=12), probe.main)
        changed = probe.request([_another(probe, condition)], [[11]])
        second = output(probe.model.rollout(changed), probe.main)
        gap = difference(_later(probe, first), _later(probe, second), probe.main)
        by_seed = difference(_later(probe, first), _later(probe, other_seed), probe.main)
        figures = {"mean": round(gap.mean, 5), "mean_between_seeds": round(by_seed.mean, 5)}
        if gap.mean < probe.settings.sensitivity:
            text = f"another {condition} changes the video by {gap.mean:.3g} {gap.unit} on average, less than"
            raise ContractBroken(f"{text} {probe.settings.sensitivity:g}: it is ignored", **figures)
        detail = f"another {condition}: {gap.mean:.3g} {gap.unit} on average; another seed: {by_seed.mean:.3g}"
        return Outcome(detail=detail, measured=figures)

    return check


def _another(probe: Probe, condition: str) -> Row:
    """Context 0 with another ``condition``."""
    row = probe.row(0)
    if condition == "actions":
        return probe.moved(row, -0.5)
    if condition == "text":
        texts = [*probe.settings.instructions, "open the laptop"]
        return replace(row, instruction=next(text for text in texts if text != row.instruction))
    if condition == "goal":
        assert row.goal_VHWC is not None
        return replace(row, goal_VHWC=255 - row.goal_VHWC)
    assert row.proprioception_KA is not None
    low, high = probe.limits()
    return replace(row, proprioception_KA=(row.proprioception_KA + 0.2 * (high - low)).astype(np.float32))


def _later(probe: Probe, values: np.ndarray) -> np.ndarray:
    """Frames after the first, which only shows the context; latents and features as they are."""
    return values[:, :, :, 1:] if probe.main == "frames" else values


def check_fingerprint(probe: Probe) -> Outcome:
    if probe.load_again is None:
        raise NotApplicable("a factory or folder that can be loaded twice")
    again = probe.load_again()
    if again is probe.model:
        raise NotApplicable("a factory that makes a new model at every call")
    one, two = probe.spec.fingerprint, again.spec.fingerprint
    if one != two:
        raise ContractBroken(f"loaded twice it calls itself {one} and {two}")
    gap = difference(
        output(probe.base(), probe.main), output(again.rollout(probe.base_request()), probe.main), probe.main
    )
    if probe.spec.deterministic and gap.greatest > 0:
        text = f"loaded twice with fingerprint {one} it answers differently, up to {gap.greatest:.4g} {gap.unit}"
        raise ContractBroken(text, **gap.measured())
    return Outcome(detail=f"{one} at both loads, and the same answer", measured=gap.measured())
