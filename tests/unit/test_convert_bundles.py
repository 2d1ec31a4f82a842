"""Two experts, and the bundles of PhysisForcing's authors, in tiny sizes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from physisforcing import cli
from physisforcing.core.errors import UserError
from physisforcing.worldmodel.backbones.folder import read_settings
from physisforcing.worldmodel.convert.command import ConvertConfig, run
from released_checkpoints import (
    LATENTS,
    TINY_WAN,
    WanModel,
    original_cosmos,
    original_transformer,
    random_state,
    save_shards,
)
from tiny_releases import (
    WAN_WEIGHTS,
    original_vae,
    same,
    settings_of,
    stock,
    t5_state,
    wan_transformer,
    wan_vae,
)


def test_two_experts_become_one_pipeline(wan_settings: Path, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    tiny = {**TINY_WAN, "in_dim": 20, "text_dim": 16}
    for seed, name in enumerate(("high_noise_model", "low_noise_model")):
        state = random_state(WanModel(**tiny), seed)
        save_shards(tmp_path / "A14B" / name, state, WAN_WEIGHTS, shards=2)
        (tmp_path / "A14B" / name / "config.json").write_text(
            json.dumps({**TINY_WAN, "in_dim": 20, "model_type": "i2v"})
        )
    config = ConvertConfig(source=str(tmp_path / "A14B"), output=str(tmp_path / "out"), dtype="bf16")
    report = run(config)
    assert report["notes"] == [
        "no model_index.json: the source has no vae, text_encoder, tokenizer; tokenizer=FOLDER gives one"
    ]
    for seed, name in enumerate(("transformer", "transformer_2")):
        state = random_state(WanModel(**tiny), seed)
        model = WanTransformer3DModel.from_pretrained(tmp_path / "out" / name, torch_dtype=torch.bfloat16)
        assert torch.equal(model.blocks[1].ffn.net[2].weight, state["blocks.1.ffn.2.weight"].bfloat16())
        # what diffusers computes in float32 has lost no digits
        assert torch.equal(model.blocks[1].scale_shift_table, state["blocks.1.modulation"])
    run(ConvertConfig(source=str(tmp_path / "out"), output=str(tmp_path / "back"), kind="to_wan"))
    low = load_file(tmp_path / "back" / "low_noise_model" / f"{WAN_WEIGHTS}.safetensors")
    assert torch.equal(low["blocks.1.modulation"], state["blocks.1.modulation"])
    assert torch.equal(low["head.head.weight"], state["head.head.weight"].bfloat16())
    shutil.rmtree(tmp_path / "A14B" / "low_noise_model")
    with pytest.raises(UserError, match="low_noise_model"):
        run(ConvertConfig(source=str(tmp_path / "A14B"), output=str(tmp_path / "other")))


def test_the_boundary_and_shift_are_the_models_own() -> None:
    from physisforcing.worldmodel.convert.pipeline import wan_index, wan_shift

    class Fake:
        def __init__(self, into: int, out: int) -> None:
            self.config = {"in_channels": into, "out_channels": out}

    cases = {
        "i2v_a14b": (wan_index({"transformer": Fake(36, 16), "transformer_2": Fake(36, 16)}, "i2v"), 0.9, False, 5.0),
        "t2v_a14b": (
            wan_index({"transformer": Fake(16, 16), "transformer_2": Fake(16, 16)}, "t2v"),
            0.875,
            False,
            12.0,
        ),
        "ti2v_5b": (wan_index({"transformer": Fake(48, 48)}, None), None, True, 5.0),
        "merged": (wan_index({"transformer": Fake(36, 16)}, "i2v"), None, False, 5.0),
    }
    for name, (index, boundary, per_token, shift) in cases.items():
        assert (index["boundary_ratio"], index["expand_timesteps"], wan_shift(index)) == (boundary, per_token, shift), (
            name
        )
        assert (index["_class_name"] == "WanPipeline") is (name == "t2v_a14b")


def test_the_authors_wan_bundle_inside_its_repository(wan_settings: Path, wan_release: Path, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    bundle = tmp_path / "repository" / "checkpoints" / "PF_Wan"
    shutil.copytree(wan_release / "google", bundle / "google")
    began = wan_transformer(in_channels=20)
    torch.save(original_transformer(began.state_dict()), bundle / "backbone.pth")
    torch.save(t5_state(), bundle / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(original_vae(wan_vae(nested=False), nested=False), bundle / "Wan2.1_VAE.pth")
    told = tmp_path / "tiny.json"
    told.write_text(json.dumps({"transformer": {**TINY_WAN, "in_dim": 20, "model_type": "i2v"}, "vae": LATENTS}))
    config = ConvertConfig(
        source=str(tmp_path / "repository"), output=str(tmp_path / "out"), config=str(told), dtype="fp32"
    )
    report = run(config)
    assert (report["kind"], report["first_latent"], len(report["notes"])) == ("pf_wan", "pinned", 2)
    assert same(began, WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer"))
    assert read_settings(tmp_path / "out" / "transformer") == {"first_latent": "pinned"}, (
        "generation and training read it"
    )
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert (index["_class_name"], index["boundary_ratio"], index["expand_timesteps"]) == (
        "WanImageToVideoPipeline",
        None,
        False,
    )


def tiny_cosmos() -> Any:
    from diffusers import Cosmos3OmniTransformer

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    sizes |= {"intermediate_size": 48, "vocab_size": 50, "latent_channel": 8, "patch_latent_dim": 32}
    heads = {"action_gen": True, "action_dim": 6, "num_embodiment_domains": 3, "sound_gen": True, "sound_dim": 5}
    return stock(Cosmos3OmniTransformer, **sizes, **heads, rope_axes_dim=[2, 1, 1], base_fps=16)


def cosmos_bundle(bundle: Path, began: Any) -> Path:
    """PF_Cosmos as its authors describe it, without a tokenizer: theirs is fetched when it first runs. Returns the settings of a tiny one."""
    state = original_cosmos(began.state_dict()) | {
        "model.net.language_model.visual.patch_embed.proj.bias": torch.zeros(3)
    }
    save_shards(bundle, state, "model", shards=3)
    (bundle / "assets").mkdir()
    torch.save(original_vae(wan_vae(nested=True), nested=True), bundle / "assets" / "Wan2.2_VAE.pth")
    expert = {"base_fps": 16, "patch_spatial": 2, "max_vae_latent_side_after_patchify": 20}
    (bundle / "config.json").write_text(
        json.dumps({"model_type": "cosmos3_omni", "model": {"config": {"diffusion_expert_config": expert}}})
    )
    told = bundle.parent / "tiny.json"
    told.write_text(json.dumps({"vae": LATENTS, "transformer": {"rope_axes_dim": [2, 1, 1], "base_fps": 16}}))
    return told


@pytest.mark.parametrize("inside", [True, False], ids=["tokenizer in it", "tokenizer elsewhere"])
def test_the_authors_cosmos_bundle(tmp_path: Path, tiny_wan_folder: Path, inside: bool) -> None:
    from diffusers import AutoencoderKLWan, Cosmos3OmniPipeline, Cosmos3OmniTransformer

    bundle, began = tmp_path / "PF_Cosmos", tiny_cosmos()
    told = cosmos_bundle(bundle, began)
    if inside:
        shutil.copytree(tiny_wan_folder / "tokenizer", bundle, dirs_exist_ok=True)
    arguments = [f"source={bundle}", f"output={tmp_path / 'out'}", "dtype=keep", f"config={told}"]
    if not inside:
        arguments.append(f"tokenizer={tiny_wan_folder / 'tokenizer'}")
    assert cli.main(["convert", *arguments]) == 0
    loaded = Cosmos3OmniTransformer.from_pretrained(tmp_path / "out" / "transformer")
    assert same(began, loaded) and settings_of(began) == settings_of(loaded)
    assert same(wan_vae(nested=True), AutoencoderKLWan.from_pretrained(tmp_path / "out" / "vae"))
    pipeline = Cosmos3OmniPipeline.from_pretrained(tmp_path / "out", enable_safety_checker=False, local_files_only=True)
    assert same(began, pipeline.transformer) and pipeline.text_tokenizer.pad_token == "<pad>"
    assert (pipeline.scheduler.config.flow_shift, pipeline.scheduler.config.use_karras_sigmas) == (10.0, False)
    assert sorted(path.name for path in (tmp_path / "out" / "text_tokenizer").iterdir()) == sorted(
        path.name for path in (tiny_wan_folder / "tokenizer").iterdir()
    )
    note = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert list(note["parts"]["transformer"]["left_out"].values()) == [1] and note["shift"] == 10.0


def test_a_bundle_without_a_tokenizer_says_how_to_give_one(
    tmp_path: Path, tiny_wan_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "PF_Cosmos"
    told = cosmos_bundle(bundle, tiny_cosmos())
    config = ConvertConfig(source=str(bundle), output=str(tmp_path / "out"), config=str(told), dtype="keep")
    report = run(config)
    assert report["notes"][-1] == "no model_index.json: the source has no text_tokenizer; tokenizer=FOLDER gives one"
    assert not (tmp_path / "out" / "model_index.json").exists()
    for folder, message in ((bundle, "a tokenizer's tokenizer_config.json"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UserError, match=message):
            run(dataclasses.replace(config, output=str(tmp_path / "other"), tokenizer=str(folder)))
    alone, broken = tmp_path / "alone", tmp_path / "broken"
    shutil.copytree(tiny_wan_folder / "tokenizer", alone)
    (alone / "tokenizer_config.json").unlink()
    shutil.copytree(tiny_wan_folder / "tokenizer", broken)
    (broken / "tokenizer_config.json").write_text("{")
    for folder, message in ((alone, "tokenizer_config.json"), (broken, "a JSON file")):
        with pytest.raises(UserError, match=message):
            run(dataclasses.replace(config, output=str(tmp_path / "other"), tokenizer=str(folder)))
    with pytest.raises(UserError, match="none with kind=diffusers"):
        run(ConvertConfig(source=str(tiny_wan_folder), tokenizer=str(tiny_wan_folder / "tokenizer")))
    assert not (tmp_path / "other").exists()
