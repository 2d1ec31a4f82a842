"""Teachers by name and from folders: what is opened, what is refused, and under which licence."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import VJEPA2Model

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.teachers import depth_anything, dino, registry, vjepa2
from physisforcing.worldmodel.teachers.depth_anything import DepthAnything
from physisforcing.worldmodel.teachers.dino import Dino
from physisforcing.worldmodel.teachers.protocols import PointTracker, VideoEncoder
from physisforcing.worldmodel.teachers.registry import TeacherConfig, make_depth, make_encoder, make_tracker
from physisforcing.worldmodel.teachers.vjepa2 import VJepa2
from tiny_teachers import ENCODERS, GRID, depth_config, dino_config, noise, vjepa2_config


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Tiny checkpoints by registry name."""
    made = {
        "vjepa2": VJEPA2Model(vjepa2_config()),
        "dinov2": Dino.from_config(dino_config(2)).model,
        "dinov3": Dino.from_config(dino_config(3)).model,
        "depth_anything": DepthAnything.from_config(depth_config()).model,
    }
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in made}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a teacher opened a connection")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.usefixtures("no_network")
def test_teachers_from_folders_answer_as_the_saved_models(folders: dict[str, Path]) -> None:
    video = noise(1, 9, 40, 70, 3)
    for name in ("vjepa2", "vjepa2_resize", "dinov2", "dinov3"):
        folder = folders[name.removesuffix("_resize")]
        teacher = make_encoder(
            TeacherConfig(name=name, path=str(folder), checksum=sha256(folder / "model.safetensors").upper())
        )
        assert isinstance(teacher, VideoEncoder)
        assert teacher.info.checksum == sha256(folder / "model.safetensors")
        assert teacher.info.key.endswith(teacher.info.checksum[:12]) and "random" not in teacher.info.key
        if name.startswith("dino"):  # the same weights as the fixture's
            assert torch.equal(teacher.encode(video, GRID), ENCODERS[name]().encode(video, GRID))
    fast = make_encoder(TeacherConfig(name="dinov2", path=str(folders["dinov2"]), dtype="bfloat16"))
    assert fast.model.dtype == torch.bfloat16
    depth = make_depth(TeacherConfig(name="depth_anything", path=str(folders["depth_anything"])))
    frames = noise(1, 28, 28, 3)
    assert torch.equal(depth.depth(frames), DepthAnything.from_config(depth_config()).depth(frames))


def test_two_modes_have_two_keys(folders: dict[str, Path]) -> None:
    keys = {VJepa2.from_folder(folders["vjepa2"], mode=mode).info.key for mode in vjepa2.MODES}
    assert len(keys) == 2


def test_other_weights_than_expected_are_refused(folders: dict[str, Path]) -> None:
    for name, make in (("dinov2", make_encoder), ("vjepa2", make_encoder), ("depth_anything", make_depth)):
        digest = sha256(folders[name] / "model.safetensors")
        with pytest.raises(UserError, match=f"checksum: got '{digest}'") as refused:
            make(TeacherConfig(name=name, path=str(folders[name]), checksum="0" * 64))
        assert refused.value.field == "checksum"


def test_checksum_of_shards(tmp_path: Path) -> None:
    model = Dino.from_config(dino_config(2)).model
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (tmp_path / "model.safetensors").exists()
    lines = "".join(f"{sha256(shard)}  {shard.name}\n" for shard in shards)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    assert Dino.from_folder(tmp_path, checksum=digest).info.checksum == digest
    shards[0].unlink()
    with pytest.raises(UserError, match="all of its shards"):
        Dino.from_folder(tmp_path)


def test_pickled_weights_are_not_read(folders: dict[str, Path]) -> None:
    file = folders["dinov2"] / "model.safetensors"
    torch.save(load_file(file), folders["dinov2"] / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(UserError, match="safetensors"):
        Dino.from_folder(folders["dinov2"])


def test_weights_that_do_not_fit_are_refused(folders: dict[str, Path]) -> None:
    file = folders["dinov2"] / "model.safetensors"
    state = load_file(file)
    key = next(name for name in state if name.endswith("fc1.weight"))
    save_file({**state, key: state[key][:-1].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors missing or of another shape, such as .*fc1\.weight"):
        Dino.from_folder(folders["dinov2"])
    save_file({name: value for name, value in state.items() if name != key}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors missing or of another shape, such as .*fc1\.weight"):
        Dino.from_folder(folders["dinov2"])
    save_file(
        {name: value for name, value in state.items() if "mask_token" not in name}, file, metadata={"format": "pt"}
    )
    assert Dino.from_folder(folders["dinov2"]).channels == 48


def test_the_predictor_may_be_missing(folders: dict[str, Path]) -> None:
    file = folders["vjepa2"] / "model.safetensors"
    video, whole = noise(1, 9, 32, 80, 3), VJepa2.from_folder(folders["vjepa2"])
    encoder = {name: value for name, value in load_file(file).items() if not name.startswith("predictor.")}
    assert len(encoder) < len(load_file(file))
    save_file(encoder, file, metadata={"format": "pt"})
    assert torch.equal(VJepa2.from_folder(folders["vjepa2"]).encode(video, GRID), whole.encode(video, GRID))


def test_folders_of_other_models_and_configs_that_reach_out_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="model_type: got 'dinov2', wanted dinov3_vit"):
        make_encoder(TeacherConfig(name="dinov3", path=str(folders["dinov2"])))
    with pytest.raises(UserError, match="nothing is downloaded"):
        make_encoder(TeacherConfig(name="dinov2", path="facebook/dinov2-large"))
    with pytest.raises(UserError, match=r"vjepa2\.path"):
        make_encoder(TeacherConfig(name="vjepa2"))
    file = folders["depth_anything"] / "config.json"
    plain = json.loads(file.read_text())
    for entry in ({"auto_map": {"AutoModel": "evil.Model"}}, {"_attn_implementation": "someone/kernel"}):
        file.write_text(json.dumps({**plain, "backbone_config": {**plain["backbone_config"], **entry}}))
        with pytest.raises(UserError, match=f"config.json: {next(iter(entry))}"):
            make_depth(TeacherConfig(name="depth_anything", path=str(folders["depth_anything"])))
    file.write_text(json.dumps({**plain, "backbone": None, "use_timm_backbone": False}))  # as published configs have it
    assert make_depth(TeacherConfig(name="depth_anything", path=str(file.parent))).kind == "disparity"


# Registry


def test_unknown_names_and_settings_that_would_be_ignored() -> None:
    with pytest.raises(UserError, match="did you mean 'vjepa2'"):
        make_encoder(TeacherConfig(name="vjepa"))
    assert isinstance(make_tracker(TeacherConfig(name="classical"), permissive_only=True), PointTracker)
    with pytest.raises(UserError, match="did you mean 'depth_anything'"):
        make_depth(TeacherConfig(name="depth-anything"))
    with pytest.raises(UserError, match=r"efficientnet_lite0\.path"):
        make_encoder(TeacherConfig(name="efficientnet_lite0", path="/somewhere"))
    with pytest.raises(UserError, match="dtype: got 'fp8'"):
        make_encoder(TeacherConfig(name="dinov2", dtype="fp8"))
    with pytest.raises(TypeError):
        TeacherConfig("dinov2")  # type: ignore[misc]


def test_permissive_only(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dinov2", "vjepa2"):
        teacher = make_encoder(TeacherConfig(name=name, path=str(folders[name])), permissive_only=True)
        assert teacher.info.permissive
    for module in (dino, depth_anything):
        monkeypatch.setattr(module, "load_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(UserError) as refused:
        make_encoder(TeacherConfig(name="dinov3", path=str(folders["dinov3"])), permissive_only=True)
    assert "LicenseRef-DINOv3" in str(refused.value)
    assert refused.value.fix == "choose efficientnet_lite0, vjepa2, vjepa2_resize, dinov2"
    with pytest.raises(UserError) as refused:
        make_depth(TeacherConfig(name="depth_anything", path=str(folders["depth_anything"])), permissive_only=True)
    assert "CC-BY-NC-4.0" in str(refused.value) and "ViT-S" in refused.value.fix


def test_every_name_of_the_registry_stands_in_its_docstring() -> None:
    for entries in (registry.TRACKERS, registry.DEPTHS, registry.ENCODERS):
        assert all(f" {name} " in (registry.__doc__ or "") for name in entries)
