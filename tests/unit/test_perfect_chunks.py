"""The simulator as world model under plans of several rollouts, with a twin that counts: no simulator is needed for that."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.types import ActionChunk, ActionSpec, DecoderNeeds, Observation, Rollout, RolloutRequest
from physisforcing.envs.simulator_world_model import SimulatorConfig, SimulatorWorldModel
from physisforcing.envs.tries import Order, Try
from physisforcing.envs.twin import Met
from physisforcing.planner.action_planner import ActionPlanner, ActionPlannerConfig
from physisforcing.planner.worldarena import prompted, unprompted

SENTENCE = "press the bell"
LIMITS = ActionSpec(names=tuple("abcdefghijklmn"), low=(-300.0,) * 14, high=(300.0,) * 14)


class CountingTwin:
    """Its pictures are as bright as so many control steps have been executed; the expert's targets count the steps to come."""

    task, options, views = "click_bell", {}, ("head",)

    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.now = 0

    def meet(self, state: Any) -> Met:
        self.now = len(state.commands_TA)
        pictures = np.full((1, 240, 320, 3), self.now, np.uint8)
        return Met(pictures_VHWC=pictures, instruction=SENTENCE, state_A=np.zeros(14, np.float32))

    def imagine(self, order: Order) -> Try:
        self.orders.append(order)
        steps = self.now + np.arange(0, order.steps + 1, order.stride)
        frames = np.broadcast_to(steps.astype(np.uint8)[None, :, None, None, None], (1, len(steps), 120, 160, 3))
        rows = self.now + 1 + np.arange(order.steps, dtype=np.float32)
        return Try(
            frames_VTHWC=frames,
            actions_PA=np.repeat(rows[:, None], 14, 1),
            success=bool(steps[-1] >= 50),
            failure="",
            executed=None,
        )

    def close(self) -> None:
        pass


class Live:
    """An episode after so many control steps."""

    def __init__(self, steps: int = 0) -> None:
        self.steps, self.scene = steps, "scene"

    def states(self) -> list[Any]:
        return [SimpleNamespace(scene_hash=self.scene, commands_TA=np.arange(self.steps * 14.0).reshape(-1, 14))]


def simulator(live: Live, **settings: Any) -> tuple[SimulatorWorldModel, CountingTwin]:
    twin = CountingTwin()
    model = SimulatorWorldModel(SimulatorConfig(**settings), twin=twin)  # type: ignore[arg-type]
    return model.bind_source(live.states, task="click_bell", options={}, action_spec=LIMITS), twin


def ask(grey: int, later: int | None = None, *, plan: int = 0, batch: int = 1, **changes: Any) -> RolloutRequest:
    request = RolloutRequest(
        context_BVTHWC=np.full((batch, 1, 1, 120, 160, 3), grey, np.uint8),
        instructions=[SENTENCE] * batch,
        seeds_BS=np.zeros((batch, 1), np.int64),
        horizon=17,
        ids=[("click_bell", 7, plan)] * batch,
        plan_steps=None if later is None else [later] * batch,
    )
    return dataclasses.replace(request, **changes)


class Levels:
    """Targets are the grey levels of the pictures; remembers what it was told."""

    needs, fingerprint = DecoderNeeds(), "levels"

    def __init__(self) -> None:
        self.told: list[str] = []

    def decode(self, rollout: Rollout, state_BA: Any, instructions: list[str]) -> list[list[ActionChunk]]:
        self.told += instructions
        assert rollout.frames_BSVTHWC is not None
        rows = rollout.frames_BSVTHWC[:, :, 0, 1:, 0, 0, 0].astype(np.float32).repeat(2, -1)[..., None].repeat(14, -1)
        return [[ActionChunk(actions_PA=sample) for sample in row] for row in rows]


def observe(steps: int) -> Observation:
    state = np.zeros(14, np.float32)
    pictures = {"head": np.full((240, 320, 3), steps, np.uint8)}
    return Observation(images=pictures, state_A=state, measured_A=state, instruction=SENTENCE, step=steps)


def test_a_later_rollout_is_what_follows_in_the_same_imagination() -> None:
    model, twin = simulator(Live(3))
    first = model.rollout(ask(3, 0)).frames_BSVTHWC
    second = model.rollout(ask(35, 32, batch=2))
    assert first is not None and first[0, 0, 0, :, 0, 0, 0].tolist() == list(range(3, 36, 2))
    assert second.frames_BSVTHWC is not None and second.frames_BSVTHWC.shape == (2, 1, 1, 17, 120, 160, 3)
    assert second.frames_BSVTHWC[1, 0, 0, :, 0, 0, 0].tolist() == list(range(35, 68, 2))
    assert [order.steps for order in twin.orders] == [32, 64] and second.cost["success"] == 1
    (found,) = model.imagine(ask(35, 32))[0]
    assert found.actions_PA.shape == (32, 14) and found.actions_PA[0, 0] == 36
    odd = model.rollout(ask(0, 5)).frames_BSVTHWC
    assert odd is not None and odd[0, 0, 0, :, 0, 0, 0].tolist() == list(range(8, 41, 2)), "also between two pictures"


def test_it_goes_on_from_plans_that_began_at_this_moment_only() -> None:
    live = Live(3)
    model, _ = simulator(live)
    with pytest.raises(UserError, match="plan that began"):
        model.rollout(ask(35, 32))
    model.rollout(ask(3, 0))
    for wrong in (ask(35, 32, plan=1), ask(35, 32, ids=None)):
        with pytest.raises(UserError, match="plan that began"):
            model.rollout(wrong)
    live.steps = 5
    with pytest.raises(UserError, match="plan that began"):
        model.rollout(ask(35, 32))
    with pytest.raises(UserError, match="other pictures"):
        model.rollout(ask(3, 0))
    acting, _ = simulator(Live(3), mode="actions")
    actions = np.zeros((1, 1, 32, 14), np.float32)
    acting.rollout(ask(3, 0, actions_BSPA=actions))
    with pytest.raises(MissingCapabilityError, match="plan_steps"):
        acting.rollout(ask(35, 32, actions_BSPA=actions))


@pytest.mark.parametrize("candidates", [1, 2])
def test_the_planner_plans_several_rollouts_with_the_perfect_model(candidates: int) -> None:
    """64 rows from two rollouts, executed; then the next plan."""
    live = Live()
    model, twin = simulator(live)
    config = ActionPlannerConfig(
        rollout_chunks=2, execute_horizon=48, candidates=candidates, verifier="random" if candidates > 1 else ""
    )
    planner = ActionPlanner(model, Levels(), config, action_spec=LIMITS)
    planner.reset(task="click_bell", seed=7, instruction=SENTENCE)
    rows = planner.act(observe(0))
    assert rows[:, 0].tolist() == [2 * (k // 2) + 2 for k in range(48)]
    live.steps = 48
    assert planner.act(observe(48))[0, 0] == 50
    assert [order.steps for order in twin.orders] == [32, 64] * 2


@pytest.mark.parametrize("template", ["{instruction}", "A fixed workspace. {instruction}", "{instruction} Slowly."])
def test_the_perfect_model_hears_the_bare_sentence_and_the_decoder_the_prompt(template: str) -> None:
    model, _ = simulator(Live())
    decoder = Levels()
    inner = ActionPlanner(unprompted(model, template), decoder, ActionPlannerConfig(), action_spec=LIMITS)
    policy = prompted(inner, template)
    policy.reset(task="click_bell", seed=7, instruction=SENTENCE)
    assert policy.act(observe(0)).shape == (32, 14)
    assert decoder.told == [template.replace("{instruction}", SENTENCE)]
    shown = unprompted(model, template)
    assert shown.spec == model.spec and (shown is model) == (template == "{instruction}")
    if template != "{instruction}":
        with pytest.raises(MissingCapabilityError, match="learned one"):
            shown.rollout(ask(0, instructions=["sing"]))
        with pytest.raises(MissingCapabilityError, match="learned one"):
            model.rollout(ask(0, instructions=[template.replace("{instruction}", SENTENCE)]))
