"""``physis convert``: releases in tiny sizes to pipelines whose outputs are bit-equal with the models they began as."""

from __future__ import annotations

import json
import os
import shutil
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from physisforcing import cli
from physisforcing.core.errors import UserError
from physisforcing.worldmodel.convert import writing
from physisforcing.worldmodel.convert.command import ConvertConfig, run
from released_checkpoints import (
    LATENTS,
    T5,
    TINY_VAE,
    TINY_WAN,
    WanModel,
    WanVae,
    original_autoencoder,
    original_cosmos,
    original_transformer,
    random_state,
    save_shards,
)

WAN_WEIGHTS = "diffusion_pytorch_model"


def stock(kind: Any, **config: Any) -> Any:
    """A stock model with random weights, none of them at a constant that two tensors share."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = kind(**config).eval()
        for value in model.parameters():
            torch.nn.init.normal_(value, std=0.2)
    return model


def wan_transformer(in_channels: int = 8, out_channels: int = 8) -> Any:
    from diffusers import WanTransformer3DModel

    heads = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "num_layers": 2, "freq_dim": 16}
    return stock(WanTransformer3DModel, in_channels=in_channels, out_channels=out_channels, text_dim=16, **heads)


def wan_vae(nested: bool) -> Any:
    from diffusers import AutoencoderKLWan

    colours = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16} if nested else {}
    config = TINY_VAE | {"num_res_blocks": 1, "is_residual": nested} | colours | LATENTS
    return stock(AutoencoderKLWan, **config, **({"decoder_base_dim": 8} if nested else {}))


def original_vae(model: Any, nested: bool) -> dict[str, torch.Tensor]:
    skeleton = WanVae(4, 8, TINY_VAE["dim_mult"], TINY_VAE["temperal_downsample"], nested, 8 if nested else None, 1)
    return original_autoencoder(model.state_dict(), skeleton)


@pytest.fixture(scope="module")
def t5_state() -> dict[str, torch.Tensor]:
    return random_state(T5(vocab=60, dim=16, inner=16, ffn=32, heads=2, layers=2), seed=5)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What no shape of the tiny models says, with comments as the authors' configs have them."""
    path = tmp_path_factory.mktemp("settings") / "tiny.jsonc"
    model = json.dumps({**TINY_WAN, "model_type": "ti2v", "text_len": 512})
    path.write_text(f'{{\n  "transformer": {model},  // Wan\'s own\n  "vae": {json.dumps(LATENTS)}\n}}\n')
    return path


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, tiny_wan_folder: Path, t5_state: dict[str, torch.Tensor]) -> Path:
    """TI2V-5B's files in tiny: shards with an index, pickled autoencoder and text encoder, tokenizer."""
    folder = tmp_path_factory.mktemp("release") / "Wan2.2-TI2V-5B"
    save_shards(folder, original_transformer(wan_transformer().state_dict()), WAN_WEIGHTS, shards=3)
    torch.save(original_vae(wan_vae(nested=True), nested=True), folder / "Wan2.2_VAE.pth")
    torch.save(t5_state, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(tiny_wan_folder / "tokenizer", folder / "google" / "umt5-xxl")
    return folder


@pytest.fixture(scope="module")
def converted(release: Path, settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "wan"
    config = ConvertConfig(source=str(release), output=str(output), dtype="keep", config=str(settings))
    run(config, shard_bytes=20_000)
    return output


def settings_of(model: Any) -> dict[str, Any]:
    return {key: value for key, value in model.config.items() if key[0] != "_"}


def same(a: Any, b: Any) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_converted_transformer_computes_bit_for_bit_what_it_did(converted: Path) -> None:
    from diffusers import WanTransformer3DModel

    began, loaded = wan_transformer(), WanTransformer3DModel.from_pretrained(converted / "transformer").eval()
    assert same(began, loaded) and len(list((converted / "transformer").glob("*.safetensors"))) > 1
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 8, 2, 4, 6, generator=draw), torch.randn(1, 5, 16, generator=draw)
    times = torch.tensor([[0.0] * 6 + [600.0] * 6])
    with torch.no_grad():
        outputs = [model(x, times, text, return_dict=False)[0] for model in (began, loaded)]
    assert torch.equal(*outputs) and outputs[0].abs().max() > 0.01


@pytest.mark.parametrize("nested", [True, False], ids=["Wan2.2", "Wan2.1"])
def test_converted_autoencoders_compute_bit_for_bit_what_they_did(nested: bool, settings: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    began, name = wan_vae(nested), f"Wan2.{1 + nested}_VAE.pth"
    torch.save(original_vae(began, nested), tmp_path / name)
    config = ConvertConfig(source=str(tmp_path / name), output=str(tmp_path / "out"), config=str(settings))
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


def test_a_converted_text_encoder_computes_what_wans_own_does(
    converted: Path, t5_state: dict[str, torch.Tensor]
) -> None:
    from transformers import UMT5EncoderModel

    model = UMT5EncoderModel.from_pretrained(converted / "text_encoder", local_files_only=True).eval()
    assert torch.equal(model.get_input_embeddings().weight, t5_state["token_embedding.weight"])
    assert torch.equal(model.encoder.embed_tokens.weight, model.shared.weight)
    ids = torch.tensor([3, 14, 15, 9, 2, 6])
    with torch.no_grad():
        ours = model(ids[None]).last_hidden_state[0]
    theirs = wan_t5(t5_state, ids)
    assert torch.allclose(ours, theirs, atol=2e-6) and theirs.abs().max() > 0.1


def test_a_converted_pipeline_generates(converted: Path) -> None:
    from diffusers import WanImageToVideoPipeline
    from PIL import Image

    pipeline = WanImageToVideoPipeline.from_pretrained(converted, local_files_only=True)
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


def test_the_note_says_what_was_converted(converted: Path, release: Path) -> None:
    note = json.loads((converted / "conversion.json").read_text())
    assert note["kind"] == "wan" and note["source"] == release.name and note["shift"] == 5.0
    files = {line["name"]: line for line in note["files"]}
    assert len(files) == 5
    for name, line in files.items():
        assert line["bytes"] == (release / name).stat().st_size
        assert (line["sha256"] is not None) is name.endswith(".pth")
    assert note["parts"]["transformer"]["tensors"] == len(wan_transformer().state_dict())
    assert not list(converted.parent.glob(".*"))


def test_a_converted_folder_is_checked_by_the_same_command(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", f"source={converted}", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "diffusers" and not report["notes"]
    assert {name for name, part in report["parts"].items() if part["checked"]} == {"transformer", "vae", "text_encoder"}
    assert cli.main(["convert", f"source={converted}", f"output={converted}2"]) == 2
    for part in ("transformer", "vae", "text_encoder"):
        assert cli.main(["convert", f"source={converted / part}"]) == 0
        assert f"{part}: " in capsys.readouterr().out


def test_the_way_back_gives_the_original_tensors(
    converted: Path, release: Path, settings: Path, tmp_path: Path
) -> None:
    config = ConvertConfig(source=str(converted), output=str(tmp_path / "back"), kind="to_wan", dtype="keep")
    report = run(config, shard_bytes=20_000)
    back, began = (
        {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
        for folder in (tmp_path / "back", release)
    )
    assert back.keys() == began.keys() and all(torch.equal(back[name], began[name]) for name in began)
    told = json.loads((tmp_path / "back" / "config.json").read_text())
    assert told == {**TINY_WAN, "_class_name": "WanModel", "model_type": "t2v", "text_len": 512, "text_dim": 16}
    assert report["notes"] == [] and not (tmp_path / "back" / "scheduler").exists()
    config = ConvertConfig(source=str(tmp_path / "back"), output=str(tmp_path / "again"), dtype="keep")
    run(config, shard_bytes=20_000)
    again, first = tree(tmp_path / "again" / "transformer"), tree(converted / "transformer")
    assert again == first


def test_two_experts_become_one_pipeline(settings: Path, tmp_path: Path) -> None:
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
    assert report["notes"] == ["no model_index.json: the source has no vae, text_encoder, tokenizer"]
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


def test_the_authors_wan_bundle_inside_its_repository(
    settings: Path, release: Path, t5_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    from diffusers import WanTransformer3DModel

    bundle = tmp_path / "repository" / "checkpoints" / "PF_Wan"
    shutil.copytree(release / "google", bundle / "google")
    began = wan_transformer(in_channels=20)
    torch.save(original_transformer(began.state_dict()), bundle / "backbone.pth")
    torch.save(t5_state, bundle / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(original_vae(wan_vae(nested=False), nested=False), bundle / "Wan2.1_VAE.pth")
    told = tmp_path / "tiny.json"
    told.write_text(json.dumps({"transformer": {**TINY_WAN, "in_dim": 20, "model_type": "i2v"}, "vae": LATENTS}))
    config = ConvertConfig(
        source=str(tmp_path / "repository"), output=str(tmp_path / "out"), config=str(told), dtype="fp32"
    )
    report = run(config)
    assert (report["kind"], report["first_latent"], len(report["notes"])) == ("pf_wan", "pinned", 2)
    assert same(began, WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer"))
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


def test_the_authors_cosmos_bundle(tmp_path: Path, tiny_wan_folder: Path) -> None:
    from diffusers import AutoencoderKLWan, Cosmos3OmniPipeline, Cosmos3OmniTransformer

    bundle, began = tmp_path / "PF_Cosmos", tiny_cosmos()
    state = original_cosmos(began.state_dict()) | {
        "model.net.language_model.visual.patch_embed.proj.bias": torch.zeros(3)
    }
    save_shards(bundle, state, "model", shards=3)
    shutil.copytree(tiny_wan_folder / "tokenizer", bundle, dirs_exist_ok=True)
    (bundle / "assets").mkdir()
    torch.save(original_vae(wan_vae(nested=True), nested=True), bundle / "assets" / "Wan2.2_VAE.pth")
    expert = {"base_fps": 16, "patch_spatial": 2, "max_vae_latent_side_after_patchify": 20}
    (bundle / "config.json").write_text(
        json.dumps({"model_type": "cosmos3_omni", "model": {"config": {"diffusion_expert_config": expert}}})
    )
    told = tmp_path / "tiny.json"
    told.write_text(json.dumps({"vae": LATENTS, "transformer": {"rope_axes_dim": [2, 1, 1], "base_fps": 16}}))
    arguments = [f"source={bundle}", f"output={tmp_path / 'out'}", "dtype=keep", f"config={told}"]
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


def test_only_one_tensor_is_alive_at_a_time(release: Path, settings: Path, tmp_path: Path) -> None:
    from physisforcing.worldmodel.convert import find

    found = find.find(release, "wan", find.asked(str(settings), {}, torch.bfloat16))
    alive: list[weakref.ref] = []
    most = 0
    for part in found.parts:
        read = part.source.read

        def counted(name: str, read: Any = read) -> torch.Tensor:
            nonlocal most
            value = read(name).clone()
            alive.append(weakref.ref(value))
            most = max(most, sum(one() is not None for one in alive))
            return value

        part.source.read = counted
        writing.write_part(part, writing.plan_shards(part, 10**9), tmp_path / part.name, lambda size: None)
    assert most == 1 and len(alive) == sum(len(part.shapes) for part in found.parts)


def killed_at(step: int, config: ConvertConfig) -> int:
    """Convert in a copy of this process that kills itself (SIGKILL) at its ``step``-th rename. Returns the signal that ended it."""
    child = os.fork()
    if child == 0:
        replace, count = os.replace, 0

        def counted(*places: Any) -> None:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*places)

        os.replace = counted
        try:
            run(config, shard_bytes=20_000)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_a_killed_conversion_leaves_nothing_and_is_continued(
    release: Path, settings: Path, converted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "wan"
    config = ConvertConfig(source=str(release), output=str(output), dtype="keep", config=str(settings))
    hidden, kept = tmp_path / ".wan.converting", {}
    for step in (1, 4, 9, 14):
        assert killed_at(step, config) == -signal.SIGKILL and not output.exists()
        now = {path: path.stat().st_mtime_ns for path in hidden.rglob("*.safetensors")}
        assert kept.items() <= now.items()  # complete files are not written again
        kept = now
    assert len(kept) > 3
    (next(iter(kept))).write_bytes(b"cut")  # a file of another size is not taken for a complete one
    run(config, shard_bytes=20_000)
    assert tree(output) == tree(converted) and not hidden.exists() and not list(tmp_path.glob(".*"))


def test_other_settings_do_not_continue_a_killed_conversion(
    release: Path, settings: Path, converted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "wan"
    config = ConvertConfig(source=str(release), output=str(output), dtype="bf16", config=str(settings))
    assert killed_at(14, config) == -signal.SIGKILL
    config.dtype = "keep"
    run(config, shard_bytes=20_000)
    assert tree(output) == tree(converted)
    with pytest.raises(UserError, match="not taken"):
        run(config)
