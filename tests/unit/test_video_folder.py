"""Recorded videos as a world model: the right video for each id, and an error that names the id for everything else."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.types import ActionChunk, DecoderNeeds, Observation, RolloutRequest
from physisforcing.planner.action_planner import ActionPlanner, ActionPlannerConfig
from physisforcing.planner.check_worldmodel import check_world_model
from physisforcing.planner.contract_probe import scene
from physisforcing.planner.requests import merge, rollout_in_parts
from physisforcing.world_models import load_any
from physisforcing.worldmodel.adapters.video_folder import (
    VideoFolderWorldModel,
    VideoFolderWriter,
    VideoManifest,
)

IDS = [("click_bell", 100_000, 0), ("click_bell", 100_000, 1), ("lift_pot", 100_000, 0), ("lift_pot", 100_003, 0)]


def video(number: int, sample: int = 0, size=(48, 64), frames: int = 5) -> np.ndarray:
    """A scene that slides, differently for each sample."""
    return np.stack([np.roll(scene(number, *size), (3 + 5 * sample) * t, axis=1) for t in range(frames)])


@pytest.fixture
def folder(tmp_path):
    manifest = VideoManifest(name="recorded", fps=25 / 3, frames=5, height=48, width=64)
    writer = VideoFolderWriter(tmp_path / "videos", manifest)
    for number, name in enumerate(IDS):
        writer.add(name, np.stack([video(number, s) for s in range(2)]), instruction=f"do {name[0]}", source="toy 1f")
    writer.close()
    return tmp_path / "videos"


def ask(*names, samples: int = 1, instructions=None, contexts=None) -> RolloutRequest:
    numbers = [IDS.index(name) if name in IDS else 0 for name in names]
    pictures = contexts if contexts is not None else np.stack([video(n)[0] for n in numbers])
    return RolloutRequest(
        context_BVTHWC=pictures[:, None, None],
        instructions=instructions or [f"do {name[0]}" for name in names],
        seeds_BS=np.zeros((len(names), samples), np.int64),
        horizon=5,
        ids=list(names),
    )


def edit(folder, **changes):
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def entries(folder):
    return json.loads((folder / "manifest.json").read_text())["videos"]


def test_every_id_gets_its_own_videos_wherever_it_stands(folder):
    model = VideoFolderWorldModel(folder)
    order = [2, 0, 3, 1]
    made = model.rollout(ask(*(IDS[n] for n in order), samples=2))
    assert made.frames_BSVTHWC.shape == (4, 2, 1, 5, 48, 64, 3)
    for row, number in enumerate(order):
        for sample in range(2):
            gap = np.abs(made.frames_BSVTHWC[row, sample, 0].astype(int) - video(number, sample)).mean()
            others = [
                np.abs(made.frames_BSVTHWC[row, sample, 0].astype(int) - video(n, s)).mean()
                for n in range(4)
                for s in range(2)
            ]
            assert gap == min(others) < 3
    np.testing.assert_allclose(made.times_T, np.arange(5) * 0.12)
    assert made.cost["first_frame_difference"] < 3
    alone = model.rollout(ask(IDS[3], samples=2)).frames_BSVTHWC
    assert np.array_equal(alone[0], made.frames_BSVTHWC[2])


def test_it_keeps_the_contract_by_its_own_examples(folder):
    results = {r.name: r for r in check_world_model(lambda: load_any(str(folder)))}
    assert not [r.line() for r in results.values() if r.status == "fail"]
    assert results["seeds"].detail.startswith("not stochastic")
    assert results["batch-invariance"].status == results["first-frame"].status == "pass"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (("click_bell", 100_000, 2), "plan 2', wanted an id in the manifest, which holds plans [0, 1] of this episode"),
        (("click_bell", 100_003, 0), "task click_bell, seed 100003, plan 0"),
        (("lift_pott", 100_000, 0), "none of this episode"),
    ],
)
def test_a_missing_id_is_named(folder, name, said):
    with pytest.raises(UserError) as caught:
        VideoFolderWorldModel(folder).rollout(ask(IDS[0], name))
    assert said in str(caught.value)


def test_what_does_not_belong_to_the_id_is_refused(folder):
    model = VideoFolderWorldModel(folder)
    with pytest.raises(UserError, match="ids"):
        model.rollout(
            RolloutRequest(
                context_BVTHWC=ask(IDS[0]).context_BVTHWC,
                instructions=["x"],
                seeds_BS=np.zeros((1, 1), np.int64),
                horizon=5,
            )
        )
    with pytest.raises(MissingCapabilityError, match="rollout_chunks=1"):
        model.rollout(dataclasses.replace(ask(IDS[0]), plan_steps=[32]))
    model.rollout(dataclasses.replace(ask(IDS[0]), plan_steps=[0]))
    with pytest.raises(UserError, match="do click_bell"):
        model.rollout(ask(IDS[0], instructions=["do lift_pot"]))
    with pytest.raises(MissingCapabilityError, match="at most 2"):
        model.rollout(ask(IDS[0], samples=3))
    with pytest.raises(UserError, match="first frame differs by"):
        model.rollout(ask(IDS[0], contexts=255 - video(0)[:1]))
    driven = ask(IDS[0])
    driven.actions_BSPA = np.zeros((1, 1, 8, 14), np.float32)
    with pytest.raises(MissingCapabilityError, match="actions"):
        model.rollout(driven)


def test_ids_stay_with_their_contexts_when_requests_are_merged_and_parted(folder):
    model = VideoFolderWorldModel(folder)
    asked = [ask(IDS[1]), ask(IDS[2]), ask(IDS[0])]
    whole = merge(asked)
    assert whole.ids == [IDS[1], IDS[2], IDS[0]]
    parted = rollout_in_parts(model, whole, max_batch=1).frames_BSVTHWC
    assert np.array_equal(parted, np.concatenate([model.rollout(request).frames_BSVTHWC for request in asked]))


def test_the_planner_asks_for_the_videos_of_its_episode(folder):
    """Replans without another picture: the decoder does not move, so that the context stays that of the recorded videos."""

    class Decoder:
        fingerprint, needs, firsts = "still", DecoderNeeds(), []

        def decode(self, rollout, state_BA, instructions):
            self.firsts.append(rollout.frames_BSVTHWC[0, 0, 0])
            return [[ActionChunk(actions_PA=np.ones((8, 14), np.float32))]]

    decoder, settings = Decoder(), ActionPlannerConfig(execute_horizon=4, horizon=5)
    planner = ActionPlanner(VideoFolderWorldModel(folder), decoder, settings)
    planner.reset(task="click_bell", seed=100_000, instruction="do click_bell")
    for plan in range(2):
        state = np.zeros(14, np.float32)
        picture = video(plan)[0]
        seen = Observation(images={"head": picture}, state_A=state, measured_A=state, instruction="", step=4 * plan)
        planner.act(seen)
        assert np.abs(decoder.firsts[plan].astype(int) - video(plan)).mean() < 3
    with pytest.raises(UserError, match="plan 2"):
        planner.act(dataclasses.replace(seen, step=8))


def test_files_say_that_they_are_generated(folder):
    from physisforcing.core.video import probe_mp4

    comment = probe_mp4(folder / "lift_pot" / "100003_0_1.mp4").metadata["comment"]
    assert comment == "generated by toy 1f; lift_pot, seed 100003, plan 0"


def test_another_video_or_another_line_changes_the_fingerprint(folder):
    first = VideoFolderWorldModel(folder).spec.fingerprint
    assert VideoFolderWorldModel(folder).spec.fingerprint == first
    a, b = folder / "click_bell" / "100000_0_0.mp4", folder / "click_bell" / "100000_1_0.mp4"
    a.write_bytes(b.read_bytes())
    second = VideoFolderWorldModel(folder).spec.fingerprint
    edit(folder, fps=8.0)
    assert len({first, second, VideoFolderWorldModel(folder).spec.fingerprint}) == 3


def test_videos_of_another_size_need_a_word_about_it(folder):
    edit(folder, height=24, width=32)
    small = ask(IDS[0], contexts=video(0)[:1, ::2, ::2])
    with pytest.raises(UserError, match="48x64"):
        VideoFolderWorldModel(folder).rollout(small)
    edit(folder, resize="stretch")
    made = VideoFolderWorldModel(folder).rollout(small).frames_BSVTHWC[0, 0, 0]
    wanted = video(0).reshape(5, 24, 2, 32, 2, 3).mean((2, 4))
    assert made.shape == (5, 24, 32, 3) and np.abs(made - wanted).mean() < 3


def outside(folder):
    (folder.parent / "secret.mp4").write_bytes(b"x")
    return [entries(folder)[0] | {"files": ["../secret.mp4"]}]


def linked(folder):
    (folder.parent / "secret.mp4").write_bytes(b"x")
    (folder / "link.mp4").symlink_to(folder.parent / "secret.mp4")
    return [entries(folder)[0] | {"files": ["link.mp4"]}]


@pytest.mark.parametrize(
    ("videos", "said"),
    [
        (lambda f: [*entries(f), entries(f)[1]], "two entries of ('click_bell', 100000, 1)"),
        (lambda f: [entries(f)[0] | {"files": ["gone.mp4"]}], "gone.mp4"),
        (lambda f: [entries(f)[0] | {"files": []}], "no files"),
        (lambda f: [], "at least one"),
        (outside, "a file in the folder"),
        (linked, "a file in the folder"),
        (lambda f: [entries(f)[0] | {"sead": 3}], "sead"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused_at_once(folder, videos, said):
    edit(folder, videos=videos(folder))
    with pytest.raises(UserError) as caught:
        load_any(str(folder))
    assert said in str(caught.value)


def test_another_length_than_the_manifest_says_is_an_error(folder):
    edit(folder, frames=9)
    request = ask(IDS[0])
    request.horizon = 9
    with pytest.raises(UserError, match=r"5 frames in click_bell/100000_0_0\.mp4"):
        VideoFolderWorldModel(folder).rollout(request)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"format": "mine"}, "physis-videos-1"), ({"fps": 0.0}, "a rate"), ({"resize": "crop"}, "crop")],
)
def test_fields_that_cannot_be_are_refused(folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(UserError, match=said):
        load_any(str(folder))
