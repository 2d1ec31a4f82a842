"""Our models as stable-worldmodel's dynamics and costs: signatures, numbers computed another way, and its own solver where it is installed."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types

import numpy as np
import pytest
import torch

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.requests import check_request
from physisforcing.core.types import DT, ActionSpec, Rollout, ViewLayout, WorldModelSpec
from physisforcing.worldmodel.adapters.stable_worldmodel import StableWorldModel, as_pictures, pooled_pixels

#: What stable-worldmodel 0.1.1 and its main branch say: method -> names of its arguments.
DOCUMENTED = {
    "encode": ["x"],
    "rollout": ["info_dict", "action_candidates"],
    "criterion": ["info_dict", "action_candidates"],
    "get_cost": ["info_dict", "action_candidates"],
}


class Dot:
    """A white dot that goes where two drive targets say: row 20 * a, column 28 * b. Three frames, two control steps each."""

    def __init__(self, conditions=("actions", "proprioception"), max_batch=5):
        self.requests = []
        spec = ActionSpec(names=("row", "column"), low=(0.0, 0.0), high=(1.0, 1.0))
        self.spec = WorldModelSpec(
            name="dot",
            views=ViewLayout(height=24, width=32),
            context_frames=1,
            horizons=(3, 5),
            frame_dt=2 * DT,
            conditions=frozenset(conditions),
            returns=frozenset({"frames"}),
            proprioception_lags=(0, 8) if "proprioception" in conditions else (),
            action_spec=spec if "actions" in conditions else None,
            max_batch=max_batch,
            fingerprint="d",
        )

    def rollout(self, request):
        check_request(request, self.spec)
        assert request.seeds_BS.size <= self.spec.max_batch
        self.requests.append(request)
        ends = request.actions_BSPA[:, :, 1::2]
        frames = np.zeros((*request.seeds_BS.shape, 1, request.horizon, 24, 32, 3), np.uint8)
        frames[:, :, :, 0] = request.context_BVTHWC[:, None, :, -1]
        for place in np.ndindex(*ends.shape[:3]):
            frames[place[0], place[1], 0, place[2] + 1] = dot(*ends[place])
        return Rollout(times_T=np.arange(request.horizon) * 2 * DT, frames_BSVTHWC=frames)


def dot(a, b):
    picture = np.zeros((24, 32, 3), np.uint8)
    row, column = round(20 * float(a)), round(28 * float(b))
    picture[row : row + 4, column : column + 4] = 255
    return picture


def first(picture):
    return torch.from_numpy(picture).permute(2, 0, 1)[None]  # [T,C,H,W]


def info(goals, samples=None):
    """What a policy hands to a solver [B,T,...], or, with ``samples``, what a solver hands to the model [B,S,T,...]."""
    made = {
        "pixels": torch.stack([first(dot(0, 0)) for _ in goals]),
        "goal": torch.stack([first(dot(*goal)) for goal in goals]),
        "proprio": torch.tensor([[[0.1, 0.2]]] * len(goals)),
    }
    return made if samples is None else {k: v[:, None].expand(-1, samples, *v.shape[1:]) for k, v in made.items()}


def test_the_methods_are_those_that_are_documented():
    for name, arguments in DOCUMENTED.items():
        assert list(inspect.signature(getattr(StableWorldModel, name)).parameters)[1:] == arguments
    assert not hasattr(StableWorldModel, "get_action")  # a solver would take it for a policy


def test_costs_are_distances_of_the_last_frame_to_the_goal():
    world_model = Dot()
    model = StableWorldModel(world_model)
    candidates = torch.randn(2, 7, 4, 2, generator=torch.Generator().manual_seed(0))
    goals = [(0.5, 0.5), (1.0, 0.0)]
    costs = model.get_cost(info(goals, samples=7), candidates)
    assert costs.shape == (2, 7) and costs.dtype == torch.float32
    for b, goal in enumerate(goals):
        for s in range(7):
            end = (0.5 + 0.5 * candidates[b, s, 3].numpy()).clip(0, 1)
            assert costs[b, s].item() == pytest.approx(pooled_gap(end, goal), rel=1e-4)
    # batches no larger than the model takes, one noise for all
    assert [request.seeds_BS.shape for request in world_model.requests] == [(2, 2), (2, 2), (2, 2), (2, 1)]
    assert all((request.seeds_BS == 0).all() for request in world_model.requests)


def pooled_gap(end, goal):
    """The squared distance of pooled pixels, block by block in numpy: 12 x 12 cells as adaptive pooling cuts them."""
    edges = [(int(np.floor(i * n / 12)), int(np.ceil((i + 1) * n / 12))) for n in (24, 32) for i in range(12)]
    gap = (dot(*end).astype(float) - dot(*goal)) / 255
    return sum((gap[y0:y1, x0:x1].mean((0, 1)) ** 2).sum() for y0, y1 in edges[:12] for x0, x1 in edges[12:])


def test_action_blocks_and_joint_targets_reach_the_model():
    world_model = Dot()
    model = StableWorldModel(world_model, action_mean=[0.4, 0.6], action_scale=[0.1, 0.2], instruction="go")
    blocks = torch.arange(8.0).reshape(1, 1, 2, 4) / 8  # two planning steps of two control steps each
    made = model.rollout(info([(0, 0)], samples=1), blocks)
    assert made["predicted_emb"].shape == (1, 1, 3, 432)
    wanted = np.array([0.4, 0.6]) + np.array([0.1, 0.2]) * (np.arange(8).reshape(4, 2) / 8)
    np.testing.assert_allclose(world_model.requests[0].actions_BSPA[0, 0], wanted, atol=1e-6)
    assert world_model.requests[0].instructions == ["go"]
    np.testing.assert_allclose(world_model.requests[0].proprioception_BKA[0], [[0.1, 0.2]] * 2)
    history = info([(0, 0)], samples=1) | {"proprio": torch.tensor([[[[0.3, 0.4], [0.1, 0.2]]]])}
    model.rollout(history, blocks)
    np.testing.assert_allclose(world_model.requests[1].proprioception_BKA[0], [[0.1, 0.2], [0.3, 0.4]])  # now first
    far = StableWorldModel(world_model).targets(torch.full((1, 1, 4, 2), 9.0))
    assert (far == 1).all()  # clipped to the limits


def test_goals_are_encoded_once_and_may_be_given():
    model = StableWorldModel(Dot(), embed=pooled_pixels(4))
    given = info([(0.5, 0.5)], samples=2)
    candidates = torch.zeros(1, 2, 4, 2)
    assert model.get_cost(given, candidates).abs().max() < 1e-8  # 0 is the middle of the range, where the goal is
    assert given["goal_emb"].shape == (1, 1, 48)
    del given["goal"]
    assert model.get_cost(given, candidates).shape == (1, 2)
    with pytest.raises(UserError, match="a goal picture"):
        model.get_cost({"pixels": given["pixels"], "proprio": given["proprio"]}, candidates)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"candidates": torch.zeros(1, 1, 3, 2)}, "4 control steps"),
        ({"candidates": torch.zeros(1, 1, 4, 3)}, "a multiple of 2"),
        ({"pixels": torch.full((1, 1, 1, 3, 24, 32), -2.1)}, "mean and std"),
        ({"pixels": torch.zeros(1, 1, 1, 24, 32, 3)}, "channels first"),
        ({"proprio": torch.zeros(1, 1, 3, 2)}, "1 or 2 rows"),
    ],
)
def test_what_does_not_fit_is_named(change, said):
    given = info([(0, 0)], samples=1)
    candidates = change.pop("candidates", torch.zeros(1, 1, 4, 2))
    with pytest.raises(UserError) as caught:
        StableWorldModel(Dot()).get_cost(given | change, candidates)
    assert said in str(caught.value)


def test_a_model_without_actions_is_refused():
    with pytest.raises(MissingCapabilityError, match="trained with actions"):
        StableWorldModel(Dot(conditions=("text",)))
    with pytest.raises(UserError, match="action_scale"):
        StableWorldModel(Dot(), action_scale=[1.0])


def test_pictures_come_as_bytes_or_floats():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 3, 4, 5), dtype=np.uint8)
    wanted = pixels.transpose(0, 1, 3, 4, 2)
    assert np.array_equal(as_pictures(torch.from_numpy(pixels), "p"), wanted)
    assert np.array_equal(as_pictures(pixels.astype(np.float32) / 255, "p"), wanted)


@pytest.fixture
def package(monkeypatch):
    """stable-worldmodel's solvers and protocols without its environments: its own ``__init__`` imports far more than they need."""
    found = importlib.util.find_spec("stable_worldmodel")
    if found is None or importlib.util.find_spec("loguru") is None:
        pytest.skip("needs stable-worldmodel (pip install --no-deps stable-worldmodel loguru)")
    before = set(sys.modules)
    bare = types.ModuleType("stable_worldmodel")
    bare.__path__ = list(found.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "stable_worldmodel", bare)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.startswith("stable_worldmodel"):
            del sys.modules[name]


def test_its_own_solver_finds_the_actions(package):
    protocols = package("stable_worldmodel.protocols")
    for name in ("criterion", "get_cost"):
        theirs = inspect.signature(getattr(protocols.Costable, name)).parameters
        assert list(theirs) == list(inspect.signature(getattr(StableWorldModel, name)).parameters)
    model = StableWorldModel(Dot(max_batch=64))
    assert not isinstance(model, protocols.Actionable)
    if hasattr(protocols, "Dynamics"):  # newer than 0.1.1
        assert isinstance(model, protocols.Dynamics) and isinstance(model, protocols.Costable)
    from gymnasium.spaces import Box

    solver = package("stable_worldmodel.solver").CEMSolver(model, num_samples=60, n_steps=6, topk=8, seed=0)
    config = types.SimpleNamespace(horizon=2, receding_horizon=2, history_len=1, action_block=2, warm_start=False)
    solver.configure(action_space=Box(-1, 1, (2, 2), np.float32), n_envs=2, config=config)
    goals = np.array([[0.8, 0.25], [0.2, 0.9]])
    plan = solver.solve(info(goals))["actions"]
    assert plan.shape == (2, 2, 4)
    reached = model.targets(plan)[:, -1]
    assert np.abs(reached - goals).max() < 0.1, reached


def test_more_contexts_than_the_model_takes_are_sent_in_parts():
    """One candidate each of more starts than the model's bound: the double refuses anything above it."""
    candidates = torch.randn(7, 2, 4, 2, generator=torch.Generator().manual_seed(1))
    goals = [(0.1 * i, 0.5) for i in range(7)]
    narrow, wide = Dot(max_batch=3), Dot(max_batch=100)
    costs = StableWorldModel(narrow).get_cost(info(goals, samples=2), candidates)
    assert torch.equal(costs, StableWorldModel(wide).get_cost(info(goals, samples=2), candidates))
    assert [request.seeds_BS.shape for request in narrow.requests] == [(3, 1), (3, 1), (1, 1)] * 2
