"""A policy in LeRobot's loops, as far as it needs nothing of LeRobot: what is read of its observations, noise seeds, histories and refusals."""

from __future__ import annotations

import ast
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acting_policy import acting_policy
from physisforcing.core.errors import UserError
from physisforcing.core.message_server import MessageServerConfig
from physisforcing.core.types import Observation
from physisforcing.policy.act import ExecutionConfig, WorldActionPolicy
from physisforcing.policy.lerobot.loop import (
    LockstepLoop,
    as_pictures,
    camera_features,
    check_features,
    check_loop_rate,
    folder_spec,
    open_chunks,
)
from physisforcing.policy.planning import PlanningConfig, load_chunk_model
from physisforcing.policy.remote import PolicyServer
from physisforcing.policy.requests import PlanAnswer, PlanRequest, PolicySpec
from physisforcing.policy.sampling import plan_seed
from pico_policy import write_pico_policy

WIDTH, CHUNK = 3, 8


class Recording:
    """Row i of a plan is (seed of the noise mod 1000, number of the call, i)."""

    def __init__(self, canvas: str = "head", lags: tuple[int, ...] = (0,)) -> None:
        size = {"head": (120, 160), "robotwin": (384, 320), "libero": (224, 448)}[canvas]
        self.spec = PolicySpec(
            name="recording", canvas=canvas, size=size, lags=lags, state_dim=WIDTH, action_dim=WIDTH, chunk=CHUNK,
            control_hz=50 / 3, fingerprint="records",
        )  # fmt: skip
        self.requests: list[PlanRequest] = []

    def plan(self, request: PlanRequest) -> PlanAnswer:
        plans = np.zeros((len(request.seeds_B), CHUNK, WIDTH), np.float32)
        plans[:, :, 0] = (request.seeds_B % 1000)[:, None]
        plans[:, :, 1], plans[:, :, 2] = len(self.requests), np.arange(CHUNK)
        self.requests.append(request)
        return PlanAnswer(actions_BPA=plans)


def batch(size: int = 1, step: int = 0, names: tuple[str, ...] = ("head",)) -> dict[str, Any]:
    seen: dict[str, Any] = {f"observation.images.{name}": torch.full((size, 3, 240, 320), 0.2) for name in names}
    state = torch.arange(size)[:, None] * 100.0 + step + torch.zeros(size, WIDTH)
    return seen | {"observation.state": state, "task": ["press the bell"] * size, "robot_type": ""}


def test_rows_are_handed_out_one_by_one_and_looks_happen_every_execute_rows() -> None:
    source = Recording()
    loop = LockstepLoop(source, ExecutionConfig(execute=3), seed=5)
    rows = [loop.select(batch(2, step)) for step in range(7)]
    assert all(row.shape == (2, WIDTH) and row.dtype == torch.float32 for row in rows)
    assert [(int(row[0, 1]), int(row[0, 2])) for row in rows] == [(step // 3, step % 3) for step in range(7)]
    assert [request.state_BKA[1, 0, 0] for request in source.requests] == [100, 103, 106]


def test_seeds_follow_the_episode_whatever_the_batch() -> None:
    """Four episodes in batches of one, two and four, two plans each: the n-th has the noise of seed + n."""
    found = []
    for size in (1, 2, 4):
        source = Recording()
        loop = LockstepLoop(source, ExecutionConfig(execute=1), seed=1000)
        for _ in range(4 // size):
            loop.reset()
            loop.reset()  # an episode of which nothing was asked is none
            for step in range(2):
                loop.select(batch(size, step))
        plans = [request.seeds_B for request in source.requests]
        found.append({"first": np.concatenate(plans[::2]).tolist(), "second": np.concatenate(plans[1::2]).tolist()})
    wanted = {name: [plan_seed(1000 + n, plan) for n in range(4)] for plan, name in enumerate(("first", "second"))}
    assert found == [wanted] * 3


def test_states_of_earlier_control_steps_are_those_that_were_observed() -> None:
    source = Recording(lags=(0, 2, 5))
    loop = LockstepLoop(source, ExecutionConfig(execute=4), seed=0)
    for step in range(9):
        loop.select(batch(2, step))
    assert [request.state_BKA[1, :, 0].tolist() for request in source.requests] == [
        [100, 100, 100], [104, 102, 100], [108, 106, 103],
    ]  # fmt: skip
    loop.reset()
    loop.select(batch(2, 50))
    assert source.requests[-1].state_BKA[0, :, 0].tolist() == [50, 50, 50]  # nothing of the episode before
    with pytest.raises(UserError, match="reads states 5 control steps back"):
        loop.chunk(batch())


def test_the_same_actions_as_in_our_own_loop(tmp_path: Path) -> None:
    """A policy that reads states of three control steps, with pictures of noise: bit for bit."""
    model = load_chunk_model(write_pico_policy(tmp_path / "export"), PlanningConfig(steps=2))
    assert max(model.spec.lags) > 5
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 256, (11, 240, 320, 3), np.uint8)
    ours = WorldActionPolicy(model, ExecutionConfig(execute=5))
    ours.reset(task="", seed=42, instruction="press the bell")
    state, executed = np.zeros(14, np.float32), list[np.ndarray]()
    while len(executed) < 11:
        images = {"head": pictures[len(executed)]}
        executed += list(
            ours.act(Observation(images=images, state_A=state, measured_A=state, instruction="", step=len(executed)))
        )
        state = executed[-1]
    loop = LockstepLoop(model, ExecutionConfig(execute=5), seed=42)
    state_A = torch.zeros(14)
    for step in range(11):
        picture = torch.from_numpy(pictures[step]).permute(2, 0, 1)[None].float() / 255
        seen = {"observation.images.head": picture, "observation.state": state_A[None], "task": ["press the bell"]}
        state_A = loop.select(seen)[0]
        np.testing.assert_array_equal(state_A.numpy(), executed[step])


def test_pictures_come_back_as_the_camera_made_them() -> None:
    bytes_BHWC = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), np.uint8)
    bytes_BHWC[0, :, :, 0] = np.arange(30).reshape(6, 5)
    channels_first = torch.from_numpy(bytes_BHWC).permute(0, 3, 1, 2)
    every = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    for values in (channels_first, channels_first.float() / 255, (channels_first.double() / 255).float()):
        np.testing.assert_array_equal(as_pictures(values.numpy(), "x", 2), bytes_BHWC)
    assert as_pictures(every.numpy(), "x", 1)[0, :, :, 0].ravel().tolist() == list(range(256))
    for wrong in (
        channels_first.float(), channels_first.float() / 127.5 - 1, torch.full((2, 3, 4, 4), torch.nan),
        channels_first.permute(0, 2, 3, 1).float() / 255, channels_first.long(), channels_first[:1],
    ):  # fmt: skip
        with pytest.raises(UserError, match="observation"):
            as_pictures(wrong.numpy(), "observation.images.top", 2)


def test_cameras_of_the_canvas() -> None:
    assert camera_features("robotwin", {"head": "front"}) == {
        "observation.images.front": (3, 256, 320), "observation.images.left_wrist": (3, 128, 160),
        "observation.images.right_wrist": (3, 128, 160),
    }  # fmt: skip
    with pytest.raises(UserError, match="cameras of canvas head: head"):
        camera_features("head", {"wrist": "top"})
    source = Recording("robotwin")
    named = {"head": "front"}
    # two cameras by names that datasets give them, one by the user's
    for names in (("front", "left_camera", "cam_right_wrist"), ("front", "left_wrist", "right_wrist", "another")):
        loop = LockstepLoop(source, ExecutionConfig(execute=1), seed=0, cameras=named)
        seen = batch(names=names)
        seen["observation.images.front"] = torch.ones(1, 3, 256, 320)
        loop.select(seen)
        canvas = source.requests[-1].canvas_BHWC[0]
        assert (canvas[:256] == 255).all() and (canvas[256:] == 51).all()
    # what is called head is not taken for the head where the user says otherwise, and no camera is used twice
    for names, wanted in (
        (("head", "left_wrist", "right_wrist"), "wanted front as head"),
        (("front", "left_wrist"), "cam_right_wrist or right_camera as right_wrist"),
    ):
        loop = LockstepLoop(source, ExecutionConfig(execute=1), seed=0, cameras=named)
        with pytest.raises(UserError, match=wanted) as refused:
            loop.select(batch(names=names))
        lacking = "{head: NAME}" if "front" not in names else "{head: front, right_wrist: NAME}"
        assert refused.value.field == "policy.cameras" and f"--policy.cameras='{lacking}'" in refused.value.fix
    with pytest.raises(UserError, match="top as head and as left_wrist"):
        camera_features("robotwin", {"head": "top", "left_wrist": "top", "right_wrist": "r"})
    with pytest.raises(UserError, match="left_wrist as head and as left_wrist"):
        camera_features("robotwin", {"head": "left_wrist"})


def test_two_threads_are_refused_within_an_episode() -> None:
    """LeRobot's ``max_parallel_tasks`` shows one policy the steps of several tasks in turn."""
    loop = LockstepLoop(Recording(), ExecutionConfig(execute=1), seed=0)
    loop.select(batch())
    with ThreadPoolExecutor(1) as other:
        with pytest.raises(UserError, match="max_parallel_tasks"):
            other.submit(loop.select, batch()).result()
        loop.reset()
        other.submit(loop.select, batch()).result()
    with pytest.raises(UserError, match="one task at a time"):
        loop.select(batch())


def test_observations_that_are_none() -> None:
    def loop() -> LockstepLoop:
        return LockstepLoop(Recording(), ExecutionConfig(execute=1), seed=0)

    seen = batch()
    for change, words in (
        ({"task": ""}, "task: got ''"), ({"task": None}, "a sentence for each of 1"), ({"task": ["a", "b"]}, "each of 1"),
        ({"observation.state": torch.zeros(1, 7)}, r"got \(7,\)"), ({"observation.state": torch.zeros(3)}, r"wanted \[B,A\]"),
        ({"observation.images.head": torch.zeros(1, 3, 100, 100)}, "240x320"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            loop().select(seen | change)
    del seen["observation.state"]
    with pytest.raises(UserError, match=r"observation\.state"):
        loop().select(seen)
    begun = loop()
    begun.select(batch(2))
    with pytest.raises(UserError, match="wanted 2, as before"):
        begun.select(batch(3))
    assert loop().select(batch() | {"task": "press the bell"}).shape == (1, WIDTH)


def test_rates_and_shapes_are_compared() -> None:
    spec = Recording().spec
    for fps in (50 / 3, 16.67, 0):
        check_loop_rate(spec, fps)
    for fps in (17, 30, 16, None, -1):
        with pytest.raises(UserError, match=r"16\.67" if fps and fps > 0 else r"policy\.fps"):
            check_loop_rate(spec, fps)
    check_features(spec, (3,), None)
    for actions, states in (((4,), (3,)), ((3,), (4,)), ((3, 1), None)):
        with pytest.raises(UserError, match="as policy recording has"):
            check_features(spec, actions, states)
    for config in (ExecutionConfig(execute=9), ExecutionConfig(execute=4, execution="async", delay=2)):
        with pytest.raises(UserError, match=r"policy\.exec"):
            LockstepLoop(Recording(), config, seed=0)


@pytest.mark.parametrize("write", [acting_policy, write_pico_policy])
def test_a_folder_says_what_the_loaded_policy_says(write: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny" / "export")
    told, loaded = folder_spec(str(folder)), load_chunk_model(folder).spec
    for name in ("name", "canvas", "size", "lags", "state_dim", "action_dim", "chunk", "control_hz"):
        assert getattr(told, name) == getattr(loaded, name), name
    for wrong in ("", str(tmp_path)):
        with pytest.raises(UserError, match="policy"):
            folder_spec(wrong)


def test_a_server_must_make_the_same_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = acting_policy(tmp_path / "export")
    monkeypatch.setenv("PHYSIS_TOKEN", "secret")
    own = load_chunk_model(folder, PlanningConfig(steps=2))
    server = PolicyServer(own, MessageServerConfig(token="secret"))
    address = f"127.0.0.1:{server.open()}"
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        far = open_chunks(str(folder), address, {"steps": 2})
        loops = [LockstepLoop(source, ExecutionConfig(execute=1), seed=3) for source in (own, far)]
        seen = batch() | {"observation.state": torch.zeros(1, 14)}
        near, served = (loop.select(seen) for loop in loops)
        assert torch.equal(near, served)
        far.close()
        other = acting_policy(tmp_path / "other", seed=1)
        for place, steps in ((folder, 3), (other, 2)):
            with pytest.raises(UserError, match=r"policy\.server"):
                open_chunks(str(place), address, {"steps": steps})
    finally:
        server.stop()
        thread.join(20)


def test_nothing_imports_lerobot_but_the_plugin(repository: Path) -> None:
    """Its three modules, which LeRobot looks up by name."""
    found = set()
    for room in ("physisforcing", "worldmodel", "planner", "policy", "envs"):
        for path in (repository / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                if any(name.split(".")[0] == "lerobot" for name in names):
                    found.add(str(path.relative_to(repository)))
    modules = ("configuration", "modeling", "processor")
    assert found == {f"policy/lerobot/{name}_physis.py" for name in modules}
