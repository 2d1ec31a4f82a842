"""The large backbones against the stock transformers: velocities with the stock pipelines' own inputs, taps, gradients, first latents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_paper
from physisforcing.core.errors import UserError
from physisforcing.worldmodel.backbones.folder import LORA_TARGETS, load_backbone, save_settings
from physisforcing.worldmodel.backbones.protocol import VideoBackbone, first_predicted

NAMES = ("a14b", "ti2v", "cosmos3")


@pytest.fixture(scope="module")
def calls(paper_folders: dict[str, Path]) -> dict[str, list[tuple[dict[str, Any], torch.Tensor, list[torch.Tensor]]]]:
    """What the stock pipelines give their transformer in a short generation, what comes back, and what each block puts out."""
    return {name: _calls(folder, name) for name, folder in paper_folders.items()}


def _calls(folder: Path, name: str) -> list[tuple[dict[str, Any], torch.Tensor, list[torch.Tensor]]]:
    pipeline = tiny_paper.stock_pipeline(folder)
    seen: list[Any] = []
    blocks: list[torch.Tensor] = []
    transformer = pipeline.transformer
    for block in transformer.layers if name == "cosmos3" else transformer.blocks:
        block.register_forward_hook(lambda _m, _i, out: blocks.append(out[1] if isinstance(out, tuple) else out))

    def keep(_module: Any, _inputs: Any, named: dict[str, Any], out: Any) -> None:
        made = out[0] if torch.is_tensor(out[0]) else out[0][0]
        seen.append((named, made.clone(), list(blocks)))
        blocks.clear()

    transformer.register_forward_hook(keep, with_kwargs=True)
    tiny_paper.stock_latents(pipeline, steps=2, guidance=4.0, seed=3)
    return seen


def inputs(
    name: str, named: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """A stock call as arguments of a backbone."""
    if name == "cosmos3":
        x, ids = named["vision_tokens"][0], named["input_ids"][None]
        made = {"first_BC1hw": x[:, :, :1], "text_length_B": torch.tensor([ids.shape[1]])}
        return x, named["vision_timesteps"][:1].double() / 1000, ids, made
    x, text, times = named["hidden_states"], named["encoder_hidden_states"], named["timestep"]
    if name == "ti2v":
        return x, times[:, -1].double() / 1000, text, {"first_BC1hw": x[:, :, :1]}
    made = {"first_BC1hw": x[:, 20:, :1], "condition_BCFhw": x[:, 16:]}
    return x[:, :16], times.double() / 1000, text, made


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_velocity_and_taps_are_bit_equal_to_the_stock_forward(name, paper_folders, calls):
    for tap in (1, 3):
        backbone = load_backbone(paper_folders[name], tap=tap, exact_times=True)
        promised = {*VideoBackbone.__annotations__, *(name for name in vars(VideoBackbone) if name[0] != "_")}
        assert {"transformer", "tap", "blocks", "conditions"} <= promised
        assert not [name for name in promised if not hasattr(backbone, name)]
        assert len(calls[name]) >= 2, "with and without the sentence"
        for named, velocity, blocks in calls[name]:
            x, sigma, text, conditions = inputs(name, named)
            made, tapped = backbone(x, sigma, text, conditions, need_tap=True)
            assert torch.equal(made, velocity) and made.abs().max() > 0.1
            assert torch.equal(tapped, blocks[tap - 1].view_as(tapped))
            assert tapped.shape == (1, 3 * made.shape[3] * made.shape[4] // 4, backbone.width)


@pytest.mark.parametrize("name", ["ti2v", "cosmos3"])
@torch.no_grad()
def test_times_embedded_once_a_frame_differ_by_rounding_alone(name, paper_folders, calls):
    """A matrix product with 3 rows may round differently than one with 18: that is the whole difference."""
    fast, exact = load_backbone(paper_folders[name]), load_backbone(paper_folders[name], exact_times=True)
    for named, _, _ in calls[name]:
        given = inputs(name, named)
        torch.testing.assert_close(fast(*given)[0], exact(*given)[0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a14b_in_bfloat16_equals_the_stock_forward_in_bfloat16(paper_folders, calls):
    from diffusers import WanTransformer3DModel

    stock = WanTransformer3DModel.from_pretrained(paper_folders["a14b"] / "transformer", dtype=torch.bfloat16).eval()
    backbone = load_backbone(paper_folders["a14b"], dtype=torch.bfloat16)
    kept = {value.dtype for name, value in backbone.transformer.named_parameters() if "time_embedder" in name}
    assert kept == {torch.float32} and backbone.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    named = calls["a14b"][0][0]
    low = {key: named[key].bfloat16() for key in ("hidden_states", "encoder_hidden_states")}
    theirs = stock(**low, timestep=named["timestep"], return_dict=False)[0]
    made = backbone(*inputs("a14b", named))[0]
    assert made.dtype == torch.bfloat16 and torch.equal(made, theirs)


@torch.no_grad()
def test_conditions_of_a14b_are_what_its_pipeline_concatenates(paper_folders, calls):
    from physisforcing.worldmodel.pipeline_vae import load_vae, picture_tensor

    backbone, vae = load_backbone(paper_folders["a14b"]), load_vae(paper_folders["a14b"] / "vae")
    picture = picture_tensor(tiny_paper.picture(), tiny_paper.HEIGHT, tiny_paper.WIDTH, crop=False)
    encoded = vae.encode_first(backbone, picture, tiny_paper.FRAMES)
    made = backbone.conditions(
        encoded["first_BC1hw"], torch.zeros(1, 4, 16), 3, condition_BCFhw=encoded["condition_BCFhw"]
    )
    stock = calls["a14b"][0][0]["hidden_states"][:, 16:]
    assert torch.equal(made["condition_BCFhw"], stock)
    assert stock[:, :4, 0].eq(1).all() and stock[:, :4, 1:].eq(0).all(), "the mask: the first picture and no other"
    alone = vae.encode(picture.unsqueeze(2))
    assert torch.equal(made["first_BC1hw"], alone), "the encoder is causal"
    with pytest.raises(UserError, match="condition_BCFhw"):
        backbone.conditions(alone, torch.zeros(1, 4, 16), 3)


@torch.no_grad()
def test_mask_and_pinned_differ_as_described(paper_folders, calls):
    from diffusers import WanTransformer3DModel

    mask = load_backbone(paper_folders["a14b"])
    pinned = load_backbone(paper_folders["a14b"], first_latent="pinned", exact_times=True)
    assert (first_predicted(mask), first_predicted(pinned)) == (0, 1)
    x, sigma, text, conditions = inputs("a14b", calls["a14b"][0][0])
    other = x.clone()
    other[:, :, 0] += 1.0
    assert (mask(other, sigma, text, conditions)[0] - mask(x, sigma, text, conditions)[0])[:, :, 1:].abs().max() > 1e-4
    velocity = pinned(x, sigma, text, conditions)[0]
    assert torch.equal(pinned(other, sigma, text, conditions)[0], velocity), "frame 0 of x is not read"
    stock = WanTransformer3DModel.from_pretrained(paper_folders["a14b"] / "transformer", dtype=torch.float32).eval()
    clean = torch.cat([conditions["condition_BCFhw"][:, 4:, :1], x[:, :, 1:]], dim=2)
    times = torch.full((1, 3, 24), float(1000 * sigma)).index_fill_(1, torch.tensor([0]), 0.0).flatten(1)
    theirs = stock(torch.cat([clean, conditions["condition_BCFhw"]], 1), times, text, return_dict=False)[0]
    assert torch.equal(velocity, theirs), "frame 0 is clean and has timestep 0"


@pytest.mark.parametrize("name", NAMES)
def test_the_tap_carries_gradients_to_the_blocks_before_it_only(name, paper_folders, calls):
    backbone = load_backbone(paper_folders[name], tap=2)
    backbone(*inputs(name, calls[name][0][0]), need_tap=True)[1].square().mean().backward()
    ends = ".self_attn.add_v_proj.weight" if name == "cosmos3" else ".attn1.to_v.weight"
    found = dict(backbone.blocks.named_parameters())
    assert [found[f"{k}{ends}"].grad is not None for k in range(3)] == [True, True, False]
    assert found[f"0{ends}"].grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_samples_and_blocks_may_be_recomputed(name, paper_folders, calls):
    """Samples with texts of two lengths; the gradient with recomputed activations is bit-equal."""
    from torch.utils.checkpoint import checkpoint

    backbone = load_backbone(paper_folders[name])
    given = [inputs(name, named) for named, _, _ in calls[name][:2]]
    padded = torch.nn.utils.rnn.pad_sequence([text[0] for _, _, text, _ in given], batch_first=True, padding_value=-1)
    conditions = {key: torch.cat([one[3][key] for one in given]) for key in given[0][3]}
    x, sigma = torch.cat([one[0] for one in given]), torch.tensor([0.9, 0.3])
    together = backbone(x, sigma, padded, conditions)[0]
    for row, (_, _, text, own) in enumerate(given):
        alone = backbone(x[row : row + 1], sigma[row : row + 1], text, own)[0]
        torch.testing.assert_close(together[row : row + 1], alone, atol=2e-6, rtol=1e-5)
    weight = next(backbone.blocks[0].parameters())
    together.square().mean().backward()
    plain, weight.grad = weight.grad, None
    times = []
    first = backbone.blocks[0].self_attn.add_q_proj if name == "cosmos3" else backbone.blocks[0].attn1.to_q
    first.register_forward_hook(lambda *_: times.append(1))
    backbone.run_block = lambda block, *given: checkpoint(block, *given, use_reentrant=False)
    backbone(x, sigma, padded, conditions)[0].square().mean().backward()
    calls_a_pass = 2 if name == "cosmos3" else 1  # a packed sequence each, or a batch
    assert torch.equal(weight.grad, plain) and len(times) == 2 * calls_a_pass


@torch.no_grad()
def test_the_transformer_inside_stays_a_stock_one(paper_folders, calls, tmp_path):
    """Its own forward, its keys, and what it saves are those of a stock model."""
    from diffusers import WanTransformer3DModel

    backbone = load_backbone(paper_folders["ti2v"])
    named, velocity, _ = calls["ti2v"][0]
    assert torch.equal(backbone.transformer(**named)[0], velocity)
    named, velocity, _ = calls["a14b"][0]
    assert torch.equal(load_backbone(paper_folders["a14b"]).transformer(**named)[0], velocity), (
        "one modulation a sample"
    )
    assert {type(block).__name__ for block in backbone.blocks} == {"WanTransformerBlock"}
    backbone.transformer.save_pretrained(tmp_path)
    stock = WanTransformer3DModel.from_pretrained(tmp_path)
    assert list(stock.state_dict()) == list(backbone.transformer.state_dict())


@pytest.mark.parametrize(
    ("name", "a_block"), [("a14b", 10), ("ti2v", 10), ("cosmos3", 4)], ids=["a14b", "ti2v", "cosmos3"]
)
def test_lora_targets_name_modules_of_every_block(name, a_block, paper_folders):
    """Wan: q, k, v, out of both attentions and both layers of the feed-forward. Cosmos3: attention of the pictures' stream."""
    backbone = load_backbone(paper_folders[name])
    assert backbone.lora_targets == LORA_TARGETS[type(backbone.transformer).__name__]
    modules = dict(backbone.transformer.named_modules())
    for target in backbone.lora_targets:
        found = [module for key, module in modules.items() if key.endswith(f".{target}")]
        assert found and all(isinstance(module, torch.nn.Linear) for module in found), target
    hit = [key for key in modules if key.endswith(tuple(f".{target}" for target in backbone.lora_targets))]
    assert len(hit) == a_block * len(backbone.blocks)
    if name == "cosmos3":
        assert all(".self_attn." in key and ("add" in key.rsplit(".", 1)[1]) for key in hit)


def test_geometry_comes_from_the_folder(paper_folders, tmp_path):
    found = {name: load_backbone(folder) for name, folder in paper_folders.items()}
    assert {name: (b.stride, b.patch, b.latent_channels, b.tap, b.first_latent) for name, b in found.items()} == {
        "a14b": ((4, 8, 8), (1, 2, 2), 16, 1, "mask"),
        "ti2v": ((4, 16, 16), (1, 2, 2), 8, 1, "pinned"),
        "cosmos3": ((4, 16, 16), (1, 2, 2), 8, 1, "pinned"),
    }
    alone = shutil.copytree(paper_folders["a14b"] / "transformer", tmp_path / "a14b")
    assert load_backbone(alone).stride == (4, 8, 8), "16 channels are Wan2.1's"
    unknown = shutil.copytree(paper_folders["ti2v"] / "transformer", tmp_path / "ti2v")
    with pytest.raises(UserError, match=r"vae/config\.json"):
        load_backbone(unknown)


def test_what_weights_were_trained_with_lies_beside_them(paper_folders, tmp_path):
    folder = shutil.copytree(paper_folders["a14b"] / "transformer", tmp_path / "transformer")
    save_settings(folder, first_latent="pinned", tap=3)
    again = load_backbone(folder)
    assert (again.first_latent, again.tap) == ("pinned", 3)
    other = load_backbone(folder, first_latent="mask", tap=2)
    assert (other.first_latent, other.tap) == ("mask", 2), "what is asked for counts"
    (folder / "physis_backbone.json").write_text('{"first_latents": "mask"}')
    with pytest.raises(UserError, match="did you mean 'first_latent'"):
        load_backbone(folder)


def test_cosmos3_has_the_frame_rate_that_it_was_trained_at(paper_folders, tmp_path):
    folder = shutil.copytree(paper_folders["cosmos3"] / "transformer", tmp_path / "transformer")
    options = {"stride": (4, 16, 16)}
    save_settings(folder, first_latent="pinned", tap=3)
    assert load_backbone(folder, **options).fps == 24.0, "a file without a rate"
    save_settings(folder, first_latent="pinned", tap=3, fps=16.0)
    assert load_backbone(folder, **options).fps == 16.0 and load_backbone(folder, fps=8.0, **options).fps == 8.0
    for wrong in ('"16"', "0", "-1", "Infinity"):
        (folder / "physis_backbone.json").write_text(f'{{"first_latent": "pinned", "fps": {wrong}}}')
        with pytest.raises(UserError, match=r"physis_backbone\.json: fps.*frames a second"):
            load_backbone(folder, **options)


def _without_config(folder: Path) -> None:
    (folder / "transformer" / "config.json").unlink()


def _without_weights(folder: Path) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()


def _changed(**values: Any):
    def change(folder: Path) -> None:
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _without_a_shard(folder: Path) -> None:
    from diffusers import WanTransformer3DModel

    path = folder / "transformer"
    model = WanTransformer3DModel.from_pretrained(path)
    (path / "diffusion_pytorch_model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="100KB")
    shards = sorted(path.glob("*-of-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()


def _without_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["blocks.1.attn1.to_q.weight"]
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (_without_config, {}, "transformer in diffusers format"),
        (_without_weights, {}, r"wanted diffusion_pytorch_model\.safetensors"),
        (_without_a_shard, {}, r"00002-of-"),
        (_without_a_tensor, {}, r"no blocks\.1\.attn1\.to_q\.weight"),
        (_changed(_class_name="WanTransformer3DModle"), {}, "did you mean 'WanTransformer3DModel'"),
        (_changed(_class_name="CogVideoXTransformer3DModel"), {}, "known names"),
        (_changed(num_layers=4), {}, r"no blocks\.3\..*and \d+ more"),
        (_changed(in_channels=24), {}, "24 channels in, 8 out.*or 20"),
        (_changed(patch_size=[2, 2, 2]), {}, "one latent frame deep"),
        (lambda _: None, {"first_latent": "mask"}, "first_latent.*pinned"),
        (lambda _: None, {"first_latent": "pined"}, "did you mean 'pinned'"),
        (lambda _: None, {"tap": 4}, "tap.*block from 1 to 3"),
        (lambda _: None, {"part": "transformer_2"}, "transformer_2"),
    ],
)
def test_what_does_not_fit_is_named(damage, options, message, paper_folders, tmp_path):
    folder = shutil.copytree(paper_folders["ti2v"], tmp_path / "folder")
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_backbone(folder, **options)


def test_transformers_of_another_kind_are_refused():
    from physisforcing.worldmodel.backbones.cosmos3 import Cosmos3Backbone
    from physisforcing.worldmodel.backbones.wan_paper import WanBackbone

    with pytest.raises(UserError, match="image encoder"):
        WanBackbone(tiny_paper.wan_transformer(8, 8, 0, image_dim=16), stride=(4, 8, 8))
    with pytest.raises(UserError, match=r"12 channels in, 8 out.*or 20"):
        WanBackbone(tiny_paper.wan_transformer(12, 8, 0), stride=(4, 8, 8))
    with pytest.raises(UserError, match="pinned"):
        Cosmos3Backbone(tiny_paper.cosmos_transformer(), first_latent="mask")


@pytest.mark.parametrize(
    ("name", "settings", "shape", "tokens", "width", "tap"),
    [
        ("a14b", {"in_channels": 36, "out_channels": 16}, (16, 21, 60, 80), 25_200, 5120, 20),
        (
            "ti2v",
            {"in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30},
            (48, 21, 30, 40),
            6_300,
            3072,
            15,
        ),
        ("cosmos3", {}, (48, 21, 30, 40), 6_300, 4096, 18),
    ],
    ids=["a14b", "ti2v", "cosmos3"],
)
def test_full_size_architectures_at_480_by_640_and_81_frames(name, settings, shape, tokens, width, tap):
    """Shapes alone: no numbers are computed."""
    from diffusers import Cosmos3OmniTransformer, WanTransformer3DModel

    from physisforcing.worldmodel.backbones.cosmos3 import Cosmos3Backbone
    from physisforcing.worldmodel.backbones.wan_paper import WanBackbone

    with torch.device("meta"), torch.no_grad():
        if name == "cosmos3":
            backbone = Cosmos3Backbone(Cosmos3OmniTransformer())
            # the stock one enters autocast, which knows no meta device
            backbone.transformer.rotary_emb.forward = lambda position_ids, **_: [torch.zeros(1, 6340, 128)] * 2
            text = torch.zeros(1, 40, dtype=torch.int64)
        else:
            backbone = WanBackbone(WanTransformer3DModel(text_dim=4096, **settings), stride=(4, 8, 8))
            text = torch.zeros(1, 512, 4096)
        x = torch.zeros(1, *shape)
        conditions = {"first_BC1hw": x[:, :, :1], "text_length_B": torch.tensor([40], device="cpu")}
        if name == "a14b":
            conditions = backbone.conditions(x[:, :, :1], text, shape[1], condition_BCFhw=x)
        velocity, tapped = backbone(x, torch.ones(1), text, conditions, need_tap=True)
    assert velocity.shape == x.shape and tapped.shape == (1, tokens, width)
    assert (backbone.tap, backbone.width) == (tap, width)
