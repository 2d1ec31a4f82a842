"""Shards and merging: disjoint, together equal to the whole, independent of order, refusals that name what differs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.lerobot import GROUND_TRUTH_PATH, HEAD, LeRobotDataset, LeRobotWriter, robot_features
from physisforcing.core.merge import main, merge
from physisforcing.core.shards import parse_shard
from physisforcing.envs.seeds import Job, Outcome, SeedPlan, run_seeds
from physisforcing.envs.shards import ShardPlan

JOINTS = [f"joint{i}" for i in range(14)]


def write(root: Path, jobs, *, cameras=("head",), joints=JOINTS, **about) -> Path:
    """A dataset whose episodes depend on (task, seed, policy) alone."""
    writer = LeRobotWriter(root, robot_features(joints, cameras=cameras, height=32, width=48), robot_type="aloha")
    for task, seed, policy in jobs:
        rng = np.random.default_rng([seed, len(task), len(policy)])
        length = 3 + seed % 4
        state = rng.normal(size=(length, len(joints))).astype(np.float32)
        columns = dict.fromkeys(("observation.state", "observation.state_measured", "action"), state)
        columns["next.success"] = np.arange(length) == length - 1
        picture = rng.integers(40, 200, (1, 32, 48, 3), dtype=np.uint8)
        common = {"embodiment": "robot", "assets_version": "pack 1", "runtime": "robotwin 1", "scene_hash": f"h{seed}"}
        writer.add_episode(
            columns=columns,
            frames={f"observation.images.{camera}": picture.repeat(length, 0) for camera in cameras},
            instruction=f"{task} {seed % 2}",
            task_name=task,
            seed=seed,
            success=seed % 3 > 0,
            policy=policy,
            key=f"{task}-{seed:08d}-{policy}",
            attachments={GROUND_TRUTH_PATH: lambda path, seed=seed: path.write_bytes(bytes([seed % 256, 7]))},
            **(common | about),
        )
    return writer.finalize()


JOBS = [(task, seed, policy) for task in ("bell", "cup") for seed in range(5) for policy in ("expert", "noise")]


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_merged_parts_equal_the_whole(tmp_path) -> None:
    whole = write(tmp_path / "whole", JOBS)
    parts = [write(tmp_path / f"part{k}", JOBS[k::3]) for k in range(3)]
    report = merge(tmp_path / "merged", parts)
    assert report["fingerprint"] == LeRobotDataset(whole).fingerprint() and report["episodes"] == 20
    assert tree(tmp_path / "merged") == tree(whole), "every file is the same"
    merged = LeRobotDataset(tmp_path / "merged")
    assert merged.verify()["episodes"] == 20 and merged.ground_truth_path(7).read_bytes()[1] == 7
    merge(tmp_path / "other", [parts[2], parts[0], parts[1]])
    assert tree(tmp_path / "other") == tree(whole), "the order of the inputs does not matter"
    assert not list(tmp_path.glob(".*partial"))


def test_skipped_seeds_are_merged(tmp_path) -> None:
    parts = [write(tmp_path / f"part{k}", JOBS[k::2]) for k in range(2)]
    for k, part in enumerate(parts):
        row = {"task": "bell", "seed": 9 - k, "policy": "expert", "reason": "unstable", "message": ""}
        (part / "skipped.json").write_text(json.dumps([row]))
    merge(tmp_path / "merged", parts)
    assert [row["seed"] for row in json.loads((tmp_path / "merged/skipped.json").read_text())] == [8, 9]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"assets_version": "pack 2"}, "assets_version: got 'pack 2'"),
        ({"runtime": "robotwin 2"}, "runtime: got 'robotwin 2'"),
        ({"embodiment": "franka"}, "embodiment: got 'franka'"),
        ({"cameras": ("head", "left_wrist")}, "left_wrist"),
        ({"joints": JOINTS[:13]}, "action"),
    ],
)
def test_parts_that_do_not_agree_are_refused(tmp_path, change, named) -> None:
    one, other = write(tmp_path / "one", JOBS[:2]), write(tmp_path / "other", JOBS[2:4], **change)
    with pytest.raises(DatasetError) as error:
        merge(tmp_path / "merged", [one, other])
    assert named.split("'")[0] in str(error.value) and named.split(": ")[0] in str(error.value)
    assert str(one) in str(error.value) and "Fix" in str(error.value)
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*partial"))


def test_the_same_episode_twice_is_refused(tmp_path) -> None:
    one, other = write(tmp_path / "one", JOBS[:4]), write(tmp_path / "other", JOBS[3:6])
    with pytest.raises(DatasetError, match="bell seed 1 by 'noise' twice"):
        merge(tmp_path / "merged", [one, other])


def test_a_changed_file_is_found(tmp_path) -> None:
    one, other = write(tmp_path / "one", JOBS[:4]), write(tmp_path / "other", JOBS[4:6])
    video = other / f"videos/{HEAD}/chunk-000/file-001.mp4"
    data = bytearray(video.read_bytes())
    data[-30] ^= 1
    video.write_bytes(bytes(data))
    with pytest.raises(DatasetError, match=r"bell-00000002-noise.*copy the dataset again"):
        merge(tmp_path / "merged", [one, other])
    assert not (tmp_path / "merged").exists()


def test_mistakes(tmp_path, capsys) -> None:
    one = write(tmp_path / "one", JOBS[:1])
    with pytest.raises(UserError, match="output"):
        merge(one, [one])
    with pytest.raises(UserError, match="inputs"):
        merge(tmp_path / "x", [])
    with pytest.raises(DatasetError, match="nowhere"):
        merge(tmp_path / "x", [tmp_path / "nowhere"])
    assert main([str(tmp_path / "x"), str(one), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 1


@pytest.mark.parametrize("text", ["0", "4/4", "-1/4", "a/b", "1/0", "1/4/2"])
def test_wrong_shards_are_refused(text) -> None:
    with pytest.raises(UserError, match="shard=0/4"):
        parse_shard(text)
    assert parse_shard("3/4") == (3, 4)


class Simulator:
    """Scenes of some seeds do not come to rest."""

    bad = frozenset({("a", 0), ("a", 3), ("a", 10), ("b", 9)})

    def handle(self, job: Job) -> Outcome:
        kind = "unstable" if (job.task, job.seed) in self.bad else "recorded"
        return Outcome(task=job.task, seed=job.seed, kind=kind)

    def close(self) -> None:
        pass


def played(plan: SeedPlan) -> dict[tuple[str, int], str]:
    kinds: dict[tuple[str, int], str] = {}
    run_seeds(
        plan,
        Simulator,
        workers=0,
        on_outcome=lambda outcome: kinds.__setitem__((outcome.task, outcome.seed), outcome.kind),
    )
    return kinds


@pytest.mark.parametrize("parts", [2, 3, 4, 11])
def test_shards_are_disjoint_and_make_up_the_whole(parts) -> None:
    whole = played(ShardPlan(["a", "b"], 10, 0, {}, (0, 1)))
    assert sorted(seed for (task, seed), kind in whole.items() if task == "a" and kind == "recorded") == [
        *(1, 2, 4, 5, 6, 7, 8, 9, 13, 20),
    ]
    shards = [played(ShardPlan(["a", "b"], 10, 0, {}, (k, parts))) for k in range(parts)]
    union: dict[tuple[str, int], str] = {}
    for shard in shards:
        assert not union.keys() & shard.keys(), "no seed is tried twice"
        union |= shard
    assert union == whole


def test_a_shard_continues_where_it_stopped() -> None:
    done = played(ShardPlan(["a", "b"], 10, 0, {}, (1, 3)))
    plan = ShardPlan(["a", "b"], 10, 0, done, (1, 3))
    assert plan.missing() == 0 and plan.next() is None and plan.recorded == {"a": 3, "b": 3}
    some = dict(list(done.items())[:2])
    rest = played(ShardPlan(["a", "b"], 10, 0, some, (1, 3)))
    assert some | rest == done and not some.keys() & rest.keys()


def test_without_skipped_seeds_a_shard_plan_is_the_plain_one() -> None:
    plain, shard = SeedPlan(["c"], 6, 100_000, {}), ShardPlan(["c"], 6, 100_000, {}, (0, 1))
    assert played(plain) == played(shard)


def test_a_used_up_split_ends() -> None:
    plan = ShardPlan(["a"], 4, 59_998, {}, (0, 1))
    assert sorted(seed for _, seed in played(plan)) == [59_998, 59_999] and plan.missing() == 2
