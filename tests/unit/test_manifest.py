"""Frozen manifests: round trip, drift, tampering, names."""

import json

import pytest

from physisforcing.core.errors import UserError
from physisforcing.envs.manifest import Manifest, ManifestDriftError, ManifestEntry, load_manifest


def entry(seed):
    return ManifestEntry(
        task="click_bell", seed=seed, instruction="Press the bell.", scene_hash=f"{seed:064x}", expert_steps=60
    )


@pytest.fixture
def manifest():
    return Manifest(
        name="test_click_bell",
        assets="pack 1",
        runtime="robotwin 0.1.3",
        embodiment="aloha",
        entries=tuple(entry(100_000 + i) for i in range(3)),
    )


def test_round_trip(manifest, tmp_path):
    manifest.save(tmp_path / "m.json")
    again = load_manifest(tmp_path / "m.json")
    assert again == manifest and again.key == manifest.key and again.key.startswith("test_click_bell@")
    assert again.entries[1].episode == "click_bell/100001"
    manifest.save(tmp_path / "m.json")


def test_frozen_means_frozen(manifest, tmp_path):
    import dataclasses

    manifest.save(tmp_path / "m.json")
    other = dataclasses.replace(manifest, entries=manifest.entries[:2])
    assert other.fingerprint != manifest.fingerprint
    with pytest.raises(UserError, match="another name"):
        other.save(tmp_path / "m.json")
    content = json.loads((tmp_path / "m.json").read_text())
    content["entries"][0]["seed"] = 7
    (tmp_path / "m.json").write_text(json.dumps(content))
    with pytest.raises(ManifestDriftError, match="edited"):
        load_manifest(tmp_path / "m.json")


def test_drift_names_expected_and_got(manifest):
    good = manifest.entries[0]
    info = {"task": "click_bell", "seed": 100_000, "scene_hash": good.scene_hash, "assets": "pack 2", "runtime": "r"}
    good.check(info, "Press the bell.")
    with pytest.raises(ManifestDriftError) as error:
        good.check(info | {"scene_hash": "f" * 64}, "Press the bell.")
    assert "f" * 64 in str(error.value) and good.scene_hash in str(error.value) and "pack 2" in str(error.value)
    with pytest.raises(ManifestDriftError, match="instruction"):
        good.check(info, "Press the red bell.")


def test_unknown_names_and_files(tmp_path):
    with pytest.raises(UserError, match="manifest"):
        load_manifest("test_click_bel")
    with pytest.raises(UserError, match="existing file"):
        load_manifest(tmp_path / "none.json")
    (tmp_path / "x.json").write_text('{"schema": "other"}')
    with pytest.raises(UserError, match=r"physisforcing\.manifest/1"):
        load_manifest(tmp_path / "x.json")
