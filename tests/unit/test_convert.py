"""``physis convert``: a release in tiny size to a pipeline whose outputs are bit-equal with the models it began as."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from physisforcing import cli
from physisforcing.worldmodel.convert.command import ConvertConfig, run
from released_checkpoints import TINY_WAN
from tiny_releases import (
    original_vae,
    same,
    settings_of,
    t5_state,
    tree,
    wan_transformer,
    wan_vae,
)


def test_a_converted_transformer_computes_bit_for_bit_what_it_did(converted_wan: Path) -> None:
    from diffusers import WanTransformer3DModel

    began, loaded = wan_transformer(), WanTransformer3DModel.from_pretrained(converted_wan / "transformer").eval()
    assert same(began, loaded) and len(list((converted_wan / "transformer").glob("*.safetensors"))) > 1
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 8, 2, 4, 6, generator=draw), torch.randn(1, 5, 16, generator=draw)
    times = torch.tensor([[0.0] * 6 + [600.0] * 6])
    with torch.no_grad():
        outputs = [model(x, times, text, return_dict=False)[0] for model in (began, loaded)]
    assert torch.equal(*outputs) and outputs[0].abs().max() > 0.01


@pytest.mark.parametrize("nested", [True, False], ids=["Wan2.2", "Wan2.1"])
def test_converted_autoencoders_compute_bit_for_bit_what_they_did(
    nested: bool, wan_settings: Path, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKLWan

    began, name = wan_vae(nested), f"Wan2.{1 + nested}_VAE.pth"
    torch.save(original_vae(began, nested), tmp_path / name)
    config = ConvertConfig(source=str(tmp_path / name), output=str(tmp_path / "out"), config=str(wan_settings))
    report = run(config)
    assert report["notes"][0].startswith(f"{name} is not the published file")
    loaded = AutoencoderKLWan.from_pretrained(tmp_path / "out" / "vae").eval()
    assert same(began, loaded) and settings_of(began) == settings_of(loaded)
    side = 32 if nested else 16
    video = torch.randn(1, 3, 5, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        means = [model.encode(video).latent_dist.mode() for model in (began, loaded)]
        pictures = [model.decode(latents).sample for model, latents in zip((began, loaded), means, strict=True)]
    assert torch.equal(*means) and torch.equal(*pictures) and means[0].shape == (1, 8, 2, 2, 2)


def wan_t5(state: dict[str, torch.Tensor], ids: torch.Tensor, heads: int = 2) -> torch.Tensor:
    """Wan's encoder on its own tensors: relative positions in each block, no scaling, gate(tanh-GELU) times fc1. ids [L] -> [L,D]."""
    x = state["token_embedding.weight"][ids]
    distance = torch.arange(len(ids))[None] - torch.arange(len(ids))[:, None]
    assert len(ids) <= 8  # so near, that each distance has a bucket of its own
    bucket = distance.abs() + 16 * (distance > 0)

    def norm(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + 1e-6)

    for k in range(2):
        block = {name.removeprefix(f"blocks.{k}."): value for name, value in state.items() if f"blocks.{k}." in name}
        y = norm(x, block["norm1.weight"])
        q, key, v = ((y @ block[f"attn.{n}.weight"].T).unflatten(-1, (heads, -1)).transpose(0, 1) for n in "qkv")
        bias = block["pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)
        mixed = (q @ key.transpose(1, 2) + bias).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).flatten(1) @ block["attn.o.weight"].T
        y = norm(x, block["norm2.weight"])
        gate = torch.nn.functional.gelu(y @ block["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ block["ffn.fc1.weight"].T)) @ block["ffn.fc2.weight"].T
    return norm(x, state["norm.weight"])


def test_a_converted_text_encoder_computes_what_wans_own_does(converted_wan: Path) -> None:
    from transformers import UMT5EncoderModel

    model = UMT5EncoderModel.from_pretrained(converted_wan / "text_encoder", local_files_only=True).eval()
    assert torch.equal(model.get_input_embeddings().weight, t5_state()["token_embedding.weight"])
    assert torch.equal(model.encoder.embed_tokens.weight, model.shared.weight)
    ids = torch.tensor([3, 14, 15, 9, 2, 6])
    with torch.no_grad():
        ours = model(ids[None]).last_hidden_state[0]
    theirs = wan_t5(t5_state(), ids)
    assert torch.allclose(ours, theirs, atol=2e-6) and theirs.abs().max() > 0.1


def test_a_converted_pipeline_generates(converted_wan: Path) -> None:
    from diffusers import WanImageToVideoPipeline
    from PIL import Image

    pipeline = WanImageToVideoPipeline.from_pretrained(converted_wan, local_files_only=True)
    assert pipeline.config.expand_timesteps and pipeline.config.boundary_ratio is None
    scheduler = pipeline.scheduler.config
    assert (scheduler.flow_shift, scheduler.prediction_type, scheduler.use_flow_sigmas) == (
        5.0,
        "flow_prediction",
        True,
    )
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        image=Image.new("RGB", (32, 32), (90, 140, 60)),
        prompt="press the bell",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert made.shape == (1, 5, 32, 32, 3) and made.std() > 0


def test_the_note_says_what_was_converted(converted_wan: Path, wan_release: Path) -> None:
    note = json.loads((converted_wan / "conversion.json").read_text())
    assert note["kind"] == "wan" and note["source"] == wan_release.name and note["shift"] == 5.0
    files = {line["name"]: line for line in note["files"]}
    assert len(files) == 5
    for name, line in files.items():
        assert line["bytes"] == (wan_release / name).stat().st_size
        assert (line["sha256"] is not None) is name.endswith(".pth")
    assert note["parts"]["transformer"]["tensors"] == len(wan_transformer().state_dict())
    assert not list(converted_wan.parent.glob(".*"))


def test_a_converted_folder_is_checked_by_the_same_command(
    converted_wan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["convert", f"source={converted_wan}", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "diffusers" and not report["notes"]
    assert {name for name, part in report["parts"].items() if part["checked"]} == {"transformer", "vae", "text_encoder"}
    assert cli.main(["convert", f"source={converted_wan}", f"output={converted_wan}2"]) == 2
    for part in ("transformer", "vae", "text_encoder"):
        assert cli.main(["convert", f"source={converted_wan / part}"]) == 0
        assert f"{part}: " in capsys.readouterr().out


def test_the_way_back_gives_the_original_tensors(
    converted_wan: Path, wan_release: Path, wan_settings: Path, tmp_path: Path
) -> None:
    config = ConvertConfig(source=str(converted_wan), output=str(tmp_path / "back"), kind="to_wan", dtype="keep")
    report = run(config, shard_bytes=20_000)
    back, began = (
        {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
        for folder in (tmp_path / "back", wan_release)
    )
    assert back.keys() == began.keys() and all(torch.equal(back[name], began[name]) for name in began)
    told = json.loads((tmp_path / "back" / "config.json").read_text())
    assert told == {**TINY_WAN, "_class_name": "WanModel", "model_type": "t2v", "text_len": 512, "text_dim": 16}
    assert report["notes"] == [] and not (tmp_path / "back" / "scheduler").exists()
    config = ConvertConfig(source=str(tmp_path / "back"), output=str(tmp_path / "again"), dtype="keep")
    run(config, shard_bytes=20_000)
    again, first = tree(tmp_path / "again" / "transformer"), tree(converted_wan / "transformer")
    assert again == first
