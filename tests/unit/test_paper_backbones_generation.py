"""Generation with the large models: bit-equal to the stock pipelines, schedules, guidance, experts, seeds, offloading and the command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_paper
from physisforcing.core.errors import UserError
from physisforcing.worldmodel.backbones.protocol import call_block
from physisforcing.worldmodel.paper_generate import KINDS, PaperConfig, PaperGenerator
from physisforcing.worldmodel.sampling import (
    Experts,
    SamplerConfig,
    guidance_of_wan,
    make_scheduler,
    sample,
    seed_noise,
)

NAMES = ("a14b", "ti2v", "cosmos3")
SIZE = {"height": tiny_paper.HEIGHT, "width": tiny_paper.WIDTH, "frames": tiny_paper.FRAMES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("paper")
    return {name: getattr(tiny_paper, name)(root / name) for name in NAMES}


@pytest.fixture
def generator(folders, tmp_path):
    def make(name: str, **settings: Any) -> PaperGenerator:
        config = PaperConfig(**SIZE | {"negative_prompt": tiny_paper.NEGATIVE, "text_cache": tmp_path} | settings)
        return PaperGenerator(folders[name], config)

    return make


def latents(generator: PaperGenerator, seeds: list[int]) -> list[torch.Tensor]:
    made = list(generator.latents(tiny_paper.picture(), tiny_paper.PROMPT, seeds))
    assert [seed for seed, _ in made] == seeds
    return [value for _, value in made]


# --- schedules -----------------------------------------------------------------------------------------------------


def test_noise_levels_are_those_of_wan():
    euler = make_scheduler(SamplerConfig(sampler="euler", steps=6, shift=5.0))
    wanted = [1000.0, 961.538, 909.091, 833.333, 714.286, 500.0]
    np.testing.assert_allclose(euler.timesteps.numpy(), wanted, atol=1e-3)
    assert euler.sigmas[-1] == 0.0 and len(euler.sigmas) == 7
    unipc = make_scheduler(SamplerConfig(sampler="unipc", steps=6, shift=5.0))
    assert unipc.timesteps.tolist() == [999, 961, 909, 833, 714, 501]
    assert unipc.sigmas[-1] == 0.0
    high = make_scheduler(SamplerConfig(sampler="unipc", steps=40, shift=5.0)).timesteps >= 900
    assert int(high.sum()) == 15, "of 40 steps, those of the high-noise expert"


def test_the_shift_is_the_one_asked_for_whatever_the_folder_says(folders, generator):
    made = generator("a14b", steps=6)
    assert made.scheduler.config.flow_shift == 3.0 and made.sampler.shift == 5.0
    used = make_scheduler(made.sampler, made.scheduler)
    assert used.timesteps.tolist() == [999, 961, 909, 833, 714, 501]


def test_every_kind_has_its_authors_settings(folders, generator):
    kinds = {name: generator(name).kind for name in NAMES} | {"one": generator("a14b", experts="high").kind}
    assert kinds == {"a14b": "a14b", "ti2v": "ti2v", "cosmos3": "cosmos3", "one": "a14b_one"}
    found = {k: (r.sampler.sampler, r.sampler.steps, r.sampler.shift, r.sampler.guidance) for k, r in KINDS.items()}
    assert found == {
        "a14b": ("unipc", 40, 5.0, 3.5),
        "a14b_one": ("euler", 40, 5.0, 5.0),
        "ti2v": ("unipc", 50, 5.0, 5.0),
        "cosmos3": ("unipc", 35, 10.0, 6.0),
    }
    assert {k: (r.frames, r.fps) for k, r in KINDS.items()} == {
        "a14b": (81, 16.0),
        "a14b_one": (81, 16.0),
        "ti2v": (121, 24.0),
        "cosmos3": (189, 24.0),
    }


# --- the stock pipelines -------------------------------------------------------------------------------------------


def test_a14b_with_two_experts_is_bit_equal_to_the_stock_pipeline(folders, generator):
    """Wan writes guidance (low, high), diffusers (high, low): here they have names."""
    guidance = guidance_of_wan((4.0, 2.0))
    made = latents(generator("a14b", steps=6, **guidance), [7])[0]
    stock = tiny_paper.stock_pipeline(folders["a14b"])
    stock.scheduler = tiny_paper.unipc(5.0)
    theirs = tiny_paper.stock_latents(stock, steps=6, guidance=2.0, guidance_scale_2=4.0, seed=7)
    assert torch.equal(made, theirs)
    swapped = tiny_paper.stock_latents(stock, steps=6, guidance=4.0, guidance_scale_2=2.0, seed=7)
    assert (swapped - made).abs().max() > 1e-2


def test_ti2v_is_bit_equal_to_the_stock_pipeline(folders, generator):
    made = latents(generator("ti2v", steps=6, guidance=4.0, exact_times=True), [7])[0]
    stock = tiny_paper.stock_pipeline(folders["ti2v"])
    theirs = tiny_paper.stock_latents(stock, steps=6, guidance=4.0, seed=7)
    assert torch.equal(made, theirs)
    fast = latents(generator("ti2v", steps=6, guidance=4.0), [7])[0]
    torch.testing.assert_close(fast, theirs, atol=1e-5, rtol=1e-5)


def test_cosmos3_is_bit_equal_to_the_stock_pipeline_with_its_first_latent_held(folders, generator):
    """The stock sampler steps the clean first latent with a velocity of zero, and UniPC lets it drift by its last bit."""
    made = latents(generator("cosmos3", steps=6, guidance=4.0, exact_times=True), [7])[0]
    stock = tiny_paper.stock_pipeline(folders["cosmos3"])

    def hold(_pipeline: Any, _step: int, _timestep: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": torch.cat([made[:, :, :1], given["latents"][:, :, 1:]], dim=2)}

    theirs = tiny_paper.stock_latents(stock, steps=6, guidance=4.0, seed=7, callback_on_step_end=hold)
    assert torch.equal(made, theirs)
    drifting = tiny_paper.stock_latents(stock, steps=6, guidance=4.0, seed=7)
    assert (drifting[:, :, 0] - made[:, :, 0]).abs().max() <= 2.4e-7
    torch.testing.assert_close(drifting, made, atol=1e-5, rtol=1e-5)


def test_euler_is_bit_equal_to_the_stock_pipeline_that_is_given_the_levels(folders, generator):
    """Left alone, the stock pipeline would shift twice."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Given(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, steps: int, device: Any = None) -> None:
            even = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
            super().set_timesteps(sigmas=(5.0 * even / (1.0 + 4.0 * even)).tolist(), device=device)

    made = latents(generator("a14b", sampler="euler", steps=4, guidance=4.0), [7])[0]
    stock = tiny_paper.stock_pipeline(folders["a14b"])
    stock.scheduler = Given()
    assert torch.equal(made, tiny_paper.stock_latents(stock, steps=4, guidance=4.0, seed=7))
    stock.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    assert (made - tiny_paper.stock_latents(stock, steps=4, guidance=4.0, seed=7)).abs().max() > 1e-2


def test_frames_are_those_of_the_stock_pipeline(folders, generator):
    from PIL import Image

    made = dict(generator("a14b", steps=1, guidance=1.0).generate(tiny_paper.picture(), tiny_paper.PROMPT, [7]))[7]
    stock = tiny_paper.stock_pipeline(folders["a14b"])
    stock.scheduler = tiny_paper.unipc(5.0)
    given = {**SIZE, "num_frames": SIZE["frames"], "num_inference_steps": 1, "guidance_scale": 1.0}
    del given["frames"]
    theirs = stock(
        Image.fromarray(tiny_paper.picture()), tiny_paper.PROMPT, generator=torch.Generator().manual_seed(7), **given
    )
    assert np.array_equal(made, (theirs.frames[0] * 255).round().astype(np.uint8))


# --- seeds, experts, first latents ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_the_same_latents_wherever_it_stands(name, generator):
    made = generator(name, steps=2)
    together = latents(made, [3, 7])
    assert torch.equal(latents(made, [7])[0], together[1])
    assert (together[0] - together[1]).abs().max() > 0.1
    assert torch.equal(
        seed_noise(7, (2, 3, 4, 5)), torch.randn(1, 2, 3, 4, 5, generator=torch.Generator().manual_seed(7))
    )


class Straight(torch.nn.Module):
    """The velocity that leads from everywhere to one value; notes who was asked at which level."""

    first_latent = "mask"

    def __init__(self, name: str, target: float, calls: list[tuple[str, float, float]]) -> None:
        super().__init__()
        self.name, self.target, self.calls = name, target, calls

    def forward(self, x, sigma, text, conditions):
        self.calls.append((self.name, float(text), round(float(sigma), 3)))
        return (x - self.target * text) / sigma.float().view(-1, 1, 1, 1, 1), None


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_samplers_reach_the_target_and_guidance_extrapolates(sampler):
    calls: list[tuple[str, float, float]] = []
    one = Experts(high=Straight("high", 0.5, calls))
    noise, yes, no = seed_noise(0, (1, 2, 2, 2)), (torch.tensor(1.0), {}), (torch.tensor(0.0), {})
    plain = sample(one, SamplerConfig(sampler=sampler, steps=5, guidance=1.0), noise, yes)
    near = (
        1e-4 if sampler == "euler" else 1e-2
    )  # UniPC's timesteps are cut to whole numbers: 999 for a level of 0.999999
    torch.testing.assert_close(plain, torch.full_like(noise, 0.5), atol=near, rtol=0)
    assert len(calls) == 5, "guidance 1 needs one pass a step"
    guided = sample(one, SamplerConfig(sampler=sampler, steps=5, guidance=3.0), noise, yes, no)
    torch.testing.assert_close(guided, torch.full_like(noise, 1.5), atol=3 * near, rtol=0)
    with pytest.raises(UserError, match="negative"):
        sample(one, SamplerConfig(sampler=sampler, steps=2, guidance=3.0), noise, yes)


def test_experts_change_at_the_boundary_and_each_has_its_guidance():
    calls: list[tuple[str, float, float]] = []
    placed: list[str] = []

    class Place:
        def __init__(self, backbone: Any) -> None:
            placed.append(backbone.name)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...

    two = Experts(high=Straight("high", 0.0, calls), low=Straight("low", 0.0, calls))
    config = SamplerConfig(sampler="euler", steps=6, shift=5.0, guidance=2.0, guidance_low=1.0)
    ticks = []
    noise, yes, no = seed_noise(0, (1, 2, 2, 2)), (torch.tensor(1.0), {}), (torch.tensor(0.0), {})
    sample(two, config, noise, yes, no, place=Place, advance=lambda: ticks.append(1))
    assert [(name, text) for name, text, _ in calls] == [("high", 1.0), ("high", 0.0)] * 3 + [("low", 1.0)] * 3
    assert [level for _, _, level in calls] == [1.0, 1.0, 0.962, 0.962, 0.909, 0.909, 0.833, 0.714, 0.5]
    assert placed == ["high", "low"] and len(ticks) == 6
    assert two.at(900.0)[0] == "high" and two.at(899.9)[0] == "low"


def test_first_latents_of_a14b_and_the_folders_boundary(generator):
    """``pinned`` ends with the picture's own latent in frame 0; ``mask`` with what was predicted there."""
    pinned = generator("a14b", first_latent="pinned", experts="high", steps=2)
    encoded = pinned.vae.encode_first(
        pinned.experts.high, torch.from_numpy(tiny_paper.picture()).permute(2, 0, 1)[None] / 127.5 - 1.0, SIZE["frames"]
    )
    assert (latents(pinned, [7])[0][:, :, :1] - encoded["first_BC1hw"]).abs().max() < 1e-5
    mask = generator("a14b", steps=2, boundary=0.5)
    assert (latents(mask, [7])[0][:, :, :1] - encoded["first_BC1hw"]).abs().max() > 0.1
    assert mask.experts.boundary == 0.5 and generator("a14b").experts.boundary == 0.9
    assert "boundary 0.5" in mask.describe() and "first latent mask" in mask.describe()
    assert "boundary" not in pinned.describe() and "first latent pinned" in pinned.describe()


# --- placement -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_offloading_changes_nothing_in_the_result(name, generator):
    plain = latents(generator(name, steps=2), [7])[0]
    for offload in ("model", "block"):
        made = generator(name, steps=2, offload=offload)
        before = {key: value.clone() for key, value in made.experts.high.transformer.state_dict().items()}
        assert torch.equal(latents(made, [7])[0], plain), offload
        after = made.experts.high.transformer.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert made.experts.high.run_block is call_block


def test_streamed_blocks_hold_two_blocks_at_most_and_give_them_back():
    from physisforcing.worldmodel.placement import StreamedBlocks

    blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(4))
    home = [block.weight.data_ptr() for block in blocks]
    streamed = StreamedBlocks(blocks, torch.device("cpu"))
    copied: list[int] = []

    def count(*_: object) -> None:
        used = [k for k, block in enumerate(blocks) if block.weight.data_ptr() != home[k]]
        copied.append(len(used) + len(streamed._waiting))

    x = plain = torch.randn(3, 2)
    for block in blocks:
        plain = block(plain)
        block.register_forward_hook(count)
    for _ in range(2):
        made = x
        for block in blocks:
            made = streamed.run(block, made)
        assert torch.equal(made, plain)
    assert copied == [2] * 8, "the one that computes and the next one"
    streamed.close()
    assert [block.weight.data_ptr() for block in blocks] == home and not streamed._waiting


def test_blocks_compile_to_one_graph_for_all_of_them(generator):
    """Traced without a compiler behind it: no break inside a block, and the second block finds the first one's graph."""
    made = generator("a14b", compile="blocks")
    assert all(block._compiled_call_impl is not None for block in (*made.experts.high.blocks, *made.experts.low.blocks))
    made = generator("ti2v", steps=1)
    plain = latents(made, [7])[0]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in made.experts.high.blocks:
        block.compile(backend="eager", fullgraph=True)
    assert torch.equal(latents(made, [7])[0], plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- text ----------------------------------------------------------------------------------------------------------


def test_wan_text_is_the_stock_embedding_and_is_cached(folders, tmp_path):
    from physisforcing.worldmodel.text_encoders import UMT5Text

    stock = tiny_paper.stock_pipeline(folders["ti2v"])
    sentences = [tiny_paper.PROMPT, "", "lift"]
    options = {"do_classifier_free_guidance": False, "max_sequence_length": 512}
    # one by one: in a batch the matrix products round differently
    with torch.no_grad():
        theirs = torch.cat([stock.encode_prompt(sentence, **options)[0] for sentence in sentences])
    text = UMT5Text(folders["ti2v"], cache=tmp_path)
    made = text.batch(sentences)
    assert torch.equal(made, theirs) and made.shape == (3, 512, 16)
    assert torch.equal(text.tokens("press the bell & lift   the red bottle"), text.tokens(tiny_paper.PROMPT)), "cleaned"
    written = sorted(tmp_path.iterdir())
    assert len(written) == 3

    def no_encoder(_module: Any, _call: Any) -> torch.Tensor:
        raise AssertionError("the encoder is not to be used")

    again = UMT5Text(folders["ti2v"], cache=tmp_path, run=no_encoder)
    assert torch.equal(again.batch(sentences), theirs) and not again._parts, "neither loaded nor used"
    other = UMT5Text(folders["ti2v"], cache=tmp_path, dtype=torch.bfloat16)
    assert other.fingerprint != text.fingerprint and sorted(tmp_path.iterdir()) == written


def test_a_prompt_that_is_cut_is_said_to_be(folders, tmp_path):
    from physisforcing.worldmodel.text_encoders import UMT5Text

    text = UMT5Text(folders["ti2v"], cache=tmp_path, max_tokens=8)
    whole = len(text._part("tokenizer")(("press the bell " * 5).strip()).input_ids)
    for _ in range(2):  # also when it comes from the cache
        with pytest.warns(UserWarning, match=f"{whole - 8} tokens longer than the 8"):
            assert UMT5Text(folders["ti2v"], cache=tmp_path, max_tokens=8).tokens("press the bell " * 5).shape == (
                8,
                16,
            )


def test_cosmos3_ids_are_the_stock_ones_and_need_no_weights(folders, tmp_path):
    from physisforcing.worldmodel.text_encoders import CosmosText

    stock = tiny_paper.stock_pipeline(folders["cosmos3"])
    size = {"height": 64, "width": 96, "fps": 12.0}
    theirs = stock.tokenize_prompt("press the bell", "blurred", num_frames=9, **size)
    light = shutil.copytree(folders["cosmos3"], tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors"))
    text = CosmosText(light)
    made = text.pair("press the bell", "blurred", frames=9, **size)
    assert [ids[0].tolist() for ids in made] == list(theirs)
    rows = text.batch(["press the bell", "press"], frames=9, **size)
    assert rows[0].tolist() == theirs[0] and rows[1, -1] == -1 and (rows >= 0).sum() < rows.numel()


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def picture_file(tmp_path) -> Path:
    from PIL import Image

    path = tmp_path / "first.png"
    Image.fromarray(tiny_paper.picture()).save(path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_the_command_writes_a_marked_video_a_seed(name, folders, picture_file, tmp_path, monkeypatch, capsys):
    from physisforcing.core.video import probe_mp4, read_mp4
    from physisforcing.generate import main

    monkeypatch.setenv("PHYSIS_HOME", str(tmp_path / "home"))
    common = [
        f"model={folders[name]}", f"image={picture_file}", 'prompt="press the bell"', "size=64x96", "frames=5", "steps=2",
        "sampler=euler", "shift=3", "guidance=2", "offload=model",
    ]  # fmt: skip
    assert main([*common, "seeds=[0,1]", f"out={tmp_path}/bell.mp4"]) == 0
    paths = [tmp_path / "bell_seed0.mp4", tmp_path / "bell_seed1.mp4"]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    info = probe_mp4(paths[1])
    assert (info.frames, info.height, info.width) == (5, 64, 96)
    assert info.fps == pytest.approx(16 if name == "a14b" else 24)
    comment = info.metadata["comment"]
    for part in (f"generated by {name}", "seed 1", "2 steps euler", "shift 3", "guidance 2", "fp32"):
        assert part in comment, comment
    assert info.metadata["title"] == "press the bell"
    assert main([*common, "seed=1", f"out={tmp_path}/one.mp4"]) == 0
    assert np.array_equal(read_mp4(tmp_path / "one.mp4"), read_mp4(paths[1]))
    assert not np.array_equal(read_mp4(paths[0]), read_mp4(paths[1]))


def test_an_exported_transformer_takes_the_place_of_the_folders(folders, generator, tmp_path):
    from physisforcing.worldmodel.backbones.folder import load_backbone

    plain = latents(generator("ti2v", steps=1), [7])[0]
    trained = load_backbone(folders["ti2v"]).transformer
    trained.save_pretrained(tmp_path / "same")
    assert torch.equal(latents(generator("ti2v", steps=1, transformer=str(tmp_path / "same")), [7])[0], plain)
    with torch.no_grad():
        trained.proj_out.weight.mul_(1.5)
    trained.save_pretrained(tmp_path / "other")
    other = latents(generator("ti2v", steps=1, transformer=str(tmp_path / "other")), [7])[0]
    assert (other - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ti2v", {"frames": 8}, r"frames.*4k\+1.*frames=9"),
        ("ti2v", {"height": 72}, "height.*multiple of 32"),
        ("a14b", {"width": 104}, "width.*multiple of 16"),
        ("ti2v", {"guidance_low": 3.0}, "one expert"),
        ("ti2v", {"experts": "both"}, "two experts"),
        ("ti2v", {"experts": "low"}, "experts"),
        ("ti2v", {"sampler": "unipcc"}, "did you mean 'unipc'"),
        ("ti2v", {"dtype": "bf32"}, "did you mean"),
        ("ti2v", {"offload": "blocks"}, "did you mean 'block'"),
        ("ti2v", {"compile": "block"}, "did you mean 'blocks'"),
        ("ti2v", {"steps": 0}, "steps"),
        ("ti2v", {"shift": 0.0}, "shift"),
        ("ti2v", {"boundary": 900.0}, "boundary"),
        ("ti2v", {"codec": "nowhere"}, "codec"),
        ("cosmos3", {"first_latent": "mask"}, "pinned"),
    ],
)
def test_settings_that_do_not_fit_are_named(name, settings, message, generator):
    with pytest.raises(UserError, match=message):
        generator(name, **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["size=64"], "size.*height x width"),
        (["state=[0.0]"], "state.*nothing"),
        (["instruction=x"], "prompt, instruction"),
        (["dataset=x"], "exactly one"),
        (["seeds=[1,1]"], "each seed once"),
    ],
)
def test_commands_that_do_not_fit_are_named(changes, message, folders, picture_file):
    from physisforcing.generate import main

    with pytest.raises(UserError, match=message):
        main([f"model={folders['ti2v']}", f"image={picture_file}", "prompt=press", *changes])


def test_settings_of_the_large_models_are_refused_by_others(picture_file):
    from physisforcing.generate import main

    with pytest.raises(UserError, match=r"shift: got 5\.0, wanted nothing"):
        main([f"image={picture_file}", "instruction=press", "shift=5"])
    with pytest.raises(UserError, match="seeds"):
        main([f"image={picture_file}", "instruction=press", "seeds=[1,2]"])
