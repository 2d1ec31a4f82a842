"""What does not fit is named: file, tensor, what was got and wanted. Nothing is written then."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from physisforcing import cli
from physisforcing.core import files
from physisforcing.core.errors import UserError
from physisforcing.worldmodel.convert import find, writing
from physisforcing.worldmodel.convert.command import ConvertConfig, run
from released_checkpoints import T5, TINY_WAN, WanModel, random_state, save_shards

NAME = "diffusion_pytorch_model"
LAST = f"{NAME}-00002-of-00002.safetensors"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A tiny transformer in two shards, with its config."""
    folder = tmp_path / "release"
    save_shards(folder, random_state(WanModel(**TINY_WAN, text_dim=16)), NAME, shards=2)
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", **TINY_WAN}))
    return folder


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], file: str = LAST) -> None:
    """Edit the tensors of a shard, and its index along with them."""
    state = load_file(folder / file)
    edit(state)
    save_file(state, folder / file)
    index = folder / f"{NAME}.safetensors.index.json"
    content = json.loads(index.read_text())
    kept = {name: place for name, place in content["weight_map"].items() if place != file}
    index.write_text(json.dumps({"weight_map": kept | dict.fromkeys(state, file)}))


def missing_tensor(folder: Path) -> None:
    change(folder, lambda state: state.pop("head.modulation"))


def unknown_tensor(folder: Path) -> None:
    change(folder, lambda state: state.update({"blocks.1.extra.weight": torch.zeros(2)}))


def adapter(folder: Path) -> None:
    change(folder, lambda state: state.update({"blocks.1.self_attn.q.lora_A.weight": torch.zeros(2, 24)}))


def wrong_shape(folder: Path) -> None:
    change(folder, lambda state: state.update({"blocks.1.ffn.2.bias": torch.zeros(25)}))


def wrong_dtype(folder: Path) -> None:
    change(folder, lambda state: state.update({"blocks.1.ffn.2.bias": torch.zeros(24, dtype=torch.int8)}))


def eight_bit(folder: Path) -> None:
    change(folder, lambda state: state.update({"head.head.bias": torch.zeros(32).to(torch.float8_e4m3fn)}))


def missing_shard(folder: Path) -> None:
    (folder / LAST).unlink()


def cut_shard(folder: Path) -> None:
    whole = (folder / LAST).read_bytes()
    (folder / LAST).write_bytes(whole[: len(whole) // 2])


def text_for_shard(folder: Path) -> None:
    (folder / LAST).write_text("version https://git-lfs.github.com/spec/v1\n")


def missing_index(folder: Path) -> None:
    (folder / f"{NAME}.safetensors.index.json").unlink()


def broken_index(folder: Path) -> None:
    (folder / f"{NAME}.safetensors.index.json").write_text('{"weight_map": ')


def other_index(folder: Path) -> None:
    index = folder / f"{NAME}.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["blocks.7.modulation"] = LAST
    index.write_text(json.dumps(content))


def outside_index(folder: Path) -> None:
    shutil.copy(folder / LAST, folder.parent / LAST)
    index = folder / f"{NAME}.safetensors.index.json"
    index.write_text(index.read_text().replace(LAST, f"../{LAST}"))


def other_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**TINY_WAN, "num_layers": 3}))


CASES: dict[Callable[[Path], None], tuple[str, ...]] = {
    missing_tensor: ("no head.modulation", "wanted"),
    unknown_tensor: (f"{LAST}: blocks.1.extra.weight", "without a place"),
    adapter: ("lora_A.weight", "merge the adapter"),
    wrong_shape: (f"{LAST}: blocks.1.ffn.2.bias", "[25]", "[24]"),
    wrong_dtype: (f"{LAST}: blocks.1.ffn.2.bias", "int8", "float32, bfloat16 or float16"),
    eight_bit: (f"{LAST}: head.head.bias", "float8_e4m3fn", "as released"),
    missing_shard: (f"no {LAST}", "all 2 shards", "copy or download"),
    cut_shard: (LAST, "bytes", "cut off or damaged"),
    text_for_shard: (LAST, "a whole safetensors file"),
    missing_index: ("2 shards without an index", f"{NAME}.safetensors.index.json"),
    broken_index: ("index.json", "a weight_map"),
    other_index: (LAST, "blocks.7.modulation in only one of shard and index"),
    outside_index: (f"../{LAST}", "beside the index"),
    other_config: ("config.json: num_layers", "got 3", "wanted 2"),
}


@pytest.mark.parametrize("damage", CASES, ids=lambda damage: damage.__name__)
def test_each_damage_is_named_and_nothing_is_written(
    damage: Callable[[Path], None], release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(release)
    assert cli.main(["convert", f"source={release}", f"output={tmp_path / 'out'}"]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in CASES[damage]), message
    assert "Fix: " in message and sorted(path.name for path in tmp_path.glob("*out*")) == []


def test_numbers_that_are_not_finite_are_named(release: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    change(release, lambda state: state["head.head.bias"].__setitem__(3, 1e6))
    with pytest.raises(UserError, match=r"head\.head\.bias: got 'a number that float16 cannot hold'"):
        run(ConvertConfig(source=str(release), output=str(output), dtype="fp16"))
    run(ConvertConfig(source=str(release), output=str(output), dtype="bf16"))
    change(release, lambda state: state["head.head.bias"].__setitem__(3, float("nan")))
    with pytest.raises(UserError, match=r"head\.head\.bias: got 'NaN or infinity'"):
        run(ConvertConfig(source=str(release), output=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "source: got ''"),
        (["source=nowhere", "output=x"], "a folder or file on this disk"),
        (["source=nowhere", "kind=pf_wam"], "did you mean 'pf_wan'"),
        (["source=nowhere", "dtype=bf61"], "did you mean 'bf16'"),
        (["source=nowhere", "outputs=x"], "did you mean 'output'"),
    ],
)
def test_mistakes_in_the_command(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "--json", *words]) == 2
    assert message in capsys.readouterr().err


def test_sources_that_cannot_be_converted(release: Path, tmp_path: Path) -> None:
    state = random_state(T5(vocab=20, dim=8, inner=8, ffn=8, heads=2, layers=1))
    torch.save({**state, "step": 3}, tmp_path / "more.pth")
    torch.save({"head.modulation": torch.ones(2, 2).to_sparse()}, tmp_path / "sparse.pth")
    torch.save(state, tmp_path / "tar.pth", _use_new_zipfile_serialization=False)
    torch.save(state, tmp_path / "models_t5.pth")
    whole = (tmp_path / "models_t5.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder").mkdir()
    (tmp_path / "raw" / "model").mkdir(parents=True)
    (tmp_path / "raw" / ".metadata").touch()
    (tmp_path / "two").mkdir()
    for name in ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth"):
        (tmp_path / "two" / name).touch()
    cases = {
        "more.pth": "tensors by name",
        "sparse.pth": "dense tensors by name",
        "cut.pth": "a zip file",
        "tar.pth": "a zip file",
        "folder": "models_t5",
        "raw": "export_model",
    }
    for name, words in {**cases, "two": "one autoencoder"}.items():
        with pytest.raises(UserError, match=words):
            run(ConvertConfig(source=str(tmp_path / name), output=str(tmp_path / "out")))
    wrong = {"models_t5.pth": "0" * 64}
    with pytest.raises(UserError, match=r"sha256 of models_t5\.pth"):
        run(ConvertConfig(source=str(tmp_path / "models_t5.pth"), output=str(tmp_path / "out"), sha256=wrong))
    for unread, words in (({"model_t5.pth": "0" * 64}, "did you mean 'models_t5.pth'"), ({"a": "12"}, "hexadecimal")):
        with pytest.raises(UserError, match=words):
            run(ConvertConfig(source=str(tmp_path / "models_t5.pth"), output=str(tmp_path / "out"), sha256=unread))
    right = {"models_t5.pth": hashlib.sha256((tmp_path / "models_t5.pth").read_bytes()).hexdigest().upper()}
    run(ConvertConfig(source=str(tmp_path / "models_t5.pth"), output=str(tmp_path / "out"), sha256=right))
    assert (tmp_path / "out" / "text_encoder" / "model.safetensors").is_file()


def test_heads_that_no_shape_says_have_to_be_told(release: Path, tmp_path: Path) -> None:
    (release / "config.json").unlink()
    with pytest.raises(UserError, match="num_heads"):  # 24 is no multiple of 128
        run(ConvertConfig(source=str(release), output=str(tmp_path / "out")))


def test_two_conversions_to_one_output_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with writing.workplace(output, {}):
        with pytest.raises(UserError, match="one conversion at a time"):
            with writing.workplace(output, {}):
                raise AssertionError("unreachable")
    assert output.is_dir()


def test_a_disk_without_room_is_told_before(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="GB free"):
        writing.check_space(tmp_path / "out", 10**18)


def test_what_a_killed_conversion_has_written_is_room_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = tmp_path / ".out.converting" / "transformer"
    done.mkdir(parents=True)
    (done / "a.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _place: SimpleNamespace(free=500))
    writing.check_space(tmp_path / "out", 1500)
    with pytest.raises(UserError, match="GB free"):
        writing.check_space(tmp_path / "out", 1501)


def test_an_output_that_another_process_has_finished_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, flock = tmp_path / "out", files.fcntl.flock

    def late(*arguments: object) -> None:
        output.mkdir()  # between the first look and the lock
        (output / "model_index.json").touch()
        flock(*arguments)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with pytest.raises(UserError, match="a name that is not taken"):
        with writing.workplace(output, {}):
            raise AssertionError("unreachable")
    assert [path.name for path in output.iterdir()] == ["model_index.json"]
    monkeypatch.undo()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a name that is not taken"):
        with writing.workplace(tmp_path / "link", {}):
            raise AssertionError("unreachable")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"transformer": [', "a JSON file"),
        ("[]", "an object of settings"),
        ('{"../other": ["diffusers", "AutoencoderKLWan"]}', "names of folders beside it"),
    ],
)
def test_a_damaged_index_of_a_pipeline_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        run(ConvertConfig(source=str(tmp_path / "model")))
    assert "model_index.json" in str(raised.value)


def test_which_release_a_folder_is(tmp_path: Path) -> None:
    made = {"pf_wan": "backbone.pth", "pf_cosmos": "model.safetensors.index.json", "diffusers": "model_index.json"}
    for kind, file in {**made, "wan": "Wan2.1_VAE.pth"}.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / file).touch()
        assert find.kind_of(tmp_path / kind) == kind
    (tmp_path / "pf_wan" / "config.json").write_text('{"_class_name": "WanModel"}')
    assert find.kind_of(tmp_path / "pf_wan") == "pf_wan"
