"""A diffusers pipeline folder as a world model: the contract, the stock pipeline as reference, and what is refused before it is loaded."""

from __future__ import annotations

import gc
import json
import shutil
import types
import weakref

import numpy as np
import pytest
import torch

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.types import FeatureRequest, RolloutRequest
from physisforcing.planner.check_worldmodel import check_world_model
from physisforcing.planner.contract_probe import scene
from physisforcing.world_models import load_any
from physisforcing.worldmodel.adapters.diffusers_pipeline import (
    PipelineConfig,
    PipelineWorldModel,
    load_pipeline,
    shifted,
)
from physisforcing.worldmodel.adapters.pipeline_classes import CLASSES, read_class
from tiny_paper import bytes_tokenizer, words_tokenizer

SETTINGS = {"height": 64, "width": 96, "frames": 9, "fps": 8, "steps": 2, "guidance": 3.0}
SMALL = SETTINGS | {"view_height": 48, "view_width": 64}


@pytest.fixture
def folder(tiny_wan_folder, tmp_path):
    """A copy that a test may damage, with settings."""
    copy = tmp_path / "pipeline"
    shutil.copytree(tiny_wan_folder, copy)
    (copy / "physis_pipeline.json").write_text(json.dumps(SMALL))
    return copy


def request(model, *, seeds=((7,),), text="press the bell") -> RolloutRequest:
    view = model.spec.views
    pictures = np.stack([scene(i, view.height, view.width) for i in range(len(seeds))])
    return RolloutRequest(
        context_BVTHWC=pictures[:, None, None],
        instructions=[text] * len(seeds),
        seeds_BS=np.array(seeds, np.int64),
        horizon=model.spec.horizons[0],
    )


def test_a_pipeline_keeps_the_contract_but_for_its_untrained_picture(folder):
    results = {r.name: r for r in check_world_model(lambda: load_any(str(folder)))}
    failed = {name for name, r in results.items() if r.status == "fail"}
    # random weights decode noise, and the suite says so: everything else holds
    assert failed == {"first-frame"} and results["first-frame"].measured["mean_to_context"] > 30
    assert results["batch-invariance"].measured == {"greatest": 0, "mean": 0}
    assert results["text-sensitivity"].measured["mean"] > 0.01
    assert results["seeds"].measured["mean"] > 1


def test_features_are_what_the_stock_pipelines_first_step_computes(tiny_wan_folder):
    from diffusers import WanImageToVideoPipeline
    from PIL import Image

    config = PipelineConfig(**SETTINGS | {"steps": 2}, view_height=64, view_width=96)
    model = load_pipeline(tiny_wan_folder, config)
    assert model.spec.blocks == 2 and model.spec.returns == {"frames", "features"}
    stock = WanImageToVideoPipeline.from_pretrained(tiny_wan_folder, local_files_only=True, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    seen, times = {1: [], 2: []}, []
    for number, block in enumerate(stock.transformer.blocks, start=1):
        block.register_forward_hook(lambda module, given, made, number=number: seen[number].append(made))
    stock.transformer.register_forward_pre_hook(
        lambda module, given, named: times.append(named["timestep"]), with_kwargs=True
    )
    asked = request(model, seeds=((7,),))
    stock(
        Image.fromarray(asked.context_BVTHWC[0, 0, 0]), prompt="press the bell", height=64, width=96,
        num_frames=config.frames, num_inference_steps=2, guidance_scale=1.0, output_type="latent",
        generator=torch.Generator().manual_seed(7),
    )  # fmt: skip
    asked.returns = frozenset({"features"})
    asked.features = FeatureRequest(taps=(1, 2), sigma=float(times[0].max()) / 1000)
    random = torch.get_rng_state()
    made = model.rollout(asked)
    assert torch.equal(torch.get_rng_state(), random), "a trainer's dropout draws from there"
    assert made.frames_BSVTHWC is None and made.cost["denoiser_calls"] == 1.0
    features = made.features_BSKFhwD
    assert features.shape[:3] == (1, 1, 2) and features.shape[-1] == 24
    for tap in (1, 2):
        stock_LD = seen[tap][0][0].numpy()  # the first step, before anything is denoised
        np.testing.assert_allclose(features[0, 0, tap - 1].reshape(stock_LD.shape), stock_LD, rtol=1e-4, atol=1e-5)
    asked.features = FeatureRequest(taps=(3,))
    with pytest.raises(MissingCapabilityError, match="taps"):
        model.rollout(asked)
    asked.features = None
    with pytest.raises(UserError, match="features"):
        model.rollout(asked)
    asked.returns, asked.features = frozenset({"frames"}), FeatureRequest(taps=(1,))
    with pytest.raises(UserError, match="among returns"):
        model.rollout(asked)


def test_remembered_sentences_do_not_keep_a_pipeline_alive(tiny_wan_folder):
    model = load_pipeline(tiny_wan_folder, PipelineConfig(**SETTINGS))
    kept, alive = model.text, weakref.ref(model.pipeline)
    one, both = kept.embed("press the bell"), kept.batch(["press the bell", "lift the red bottle off the table"])
    used = int(both[1][0].sum())
    assert one.shape == (1, 512, 16) and torch.equal(one[0, :used], both[0][0, :used]) and not one[0, used:].any()
    stock, _ = model.pipeline.encode_prompt(
        "press the bell", do_classifier_free_guidance=False, max_sequence_length=512
    )
    assert torch.equal(one, stock)
    assert not any(p.requires_grad for p in model.pipeline.transformer.parameters())
    del model
    gc.collect()
    assert alive() is None


def test_it_gives_what_the_stock_pipeline_gives(tiny_wan_folder):
    from diffusers import WanImageToVideoPipeline
    from PIL import Image

    config = PipelineConfig(**SETTINGS, view_height=64, view_width=96, prompt="A robot works. {instruction}!")
    model = load_pipeline(tiny_wan_folder, config)
    asked = request(model, seeds=((7, 8),))
    made = model.rollout(asked)
    stock = WanImageToVideoPipeline.from_pretrained(tiny_wan_folder, local_files_only=True, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    for sample, seed in enumerate((7, 8)):
        video = stock(
            Image.fromarray(asked.context_BVTHWC[0, 0, 0]),
            prompt="A robot works. press the bell!",
            height=64,
            width=96,
            num_frames=9,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).frames[0]
        wanted = (video.clip(0, 1) * 255).round().astype(np.uint8)
        assert np.array_equal(made.frames_BSVTHWC[0, sample, 0], wanted)
    np.testing.assert_allclose(made.times_T, np.arange(9) / 8)
    assert made.cost["denoiser_calls"] == 4 and model.spec.frame_dt == 0.125 and model.spec.horizons == (9,)


def test_a_text_to_video_folder_of_ti2v_takes_a_first_frame(folder):
    """TI2V-5B is released as WanPipeline: opened with the image-to-video class, its pictures are those of the same weights there."""
    from diffusers import WanPipeline

    stock = load_any(str(folder))
    index = json.loads((folder / "model_index.json").read_text())
    text = folder.parent / "released"
    parts = WanPipeline.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    parts.save_pretrained(text)
    released = json.loads((text / "model_index.json").read_text())
    assert released["_class_name"] == "WanPipeline" and released["expand_timesteps"] is True
    assert "image_encoder" in index and "image_encoder" not in released
    (text / "physis_pipeline.json").write_text(json.dumps(SMALL))
    model = load_any(str(text))
    assert type(model.pipeline).__name__ == "WanImageToVideoPipeline" and model.spec.name == "WanImageToVideo"
    made, wanted = (m.rollout(request(m, seeds=((7,),))).frames_BSVTHWC for m in (model, stock))
    assert np.array_equal(made, wanted)
    black = request(model)
    black.context_BVTHWC = np.zeros_like(black.context_BVTHWC)
    assert (model.rollout(black).frames_BSVTHWC != made).any(), "the first frame is read"
    failed = {r.name for r in check_world_model(lambda: load_any(str(text))) if r.status == "fail"}
    assert failed == {"first-frame"}, "random weights decode noise"


def test_other_settings_and_other_weights_have_other_fingerprints(folder):
    def fingerprint(**changes):
        (folder / "physis_pipeline.json").write_text(json.dumps(SMALL | changes))
        return load_any(str(folder)).spec.fingerprint

    first = fingerprint()
    assert fingerprint() == first and fingerprint(steps=3) != first and fingerprint(shift=3.0) != first
    from safetensors.torch import load_file, save_file

    weights = next((folder / "transformer").glob("*.safetensors"))
    state = load_file(weights)
    state["proj_out.bias"] += 1
    save_file(state, weights, metadata={"format": "pt"})
    assert fingerprint() != first


def test_the_shift_is_that_of_the_settings():
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    made = shifted(unipc, 5.0)
    made.set_timesteps(6)
    sigma = np.linspace(1, 1 / 6, 6)
    assert np.abs(np.asarray(made.timesteps) - 1000 * 5 * sigma / (1 + 4 * sigma)).max() < 2  # it cuts to whole numbers
    euler = shifted(FlowMatchEulerDiscreteScheduler(shift=1.0), 5.0)
    assert euler.config.shift == 5.0 and isinstance(euler, FlowMatchEulerDiscreteScheduler)
    with pytest.raises(UserError, match="DDIMScheduler has no shift"):
        shifted(DDIMScheduler(), 5.0)


# ---------------------------------------------------------------------- other classes


def t5(vocabulary):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def cogvideox(folder):
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXTransformer3DModel,
    )

    tokenizer = words_tokenizer()
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    scheduler = CogVideoXDDIMScheduler()
    CogVideoXImageToVideoPipeline(tokenizer, t5(len(tokenizer)), vae, transformer, scheduler).save_pretrained(folder)


def ltx(folder):
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXImageToVideoPipeline,
        LTXVideoTransformer3DModel,
    )

    tokenizer = words_tokenizer()
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    LTXImageToVideoPipeline(scheduler, vae, t5(len(tokenizer)), tokenizer, transformer).save_pretrained(folder)


def cosmos3(folder):
    from diffusers import AutoencoderKLWan, Cosmos3OmniPipeline, Cosmos3OmniTransformer, UniPCMultistepScheduler

    tokenizer = bytes_tokenizer()
    vae = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1] * 4,
        num_res_blocks=1,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = Cosmos3OmniTransformer(
        head_dim=24,
        hidden_size=48,
        intermediate_size=64,
        latent_channel=4,
        patch_latent_dim=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        rope_axes_dim=(4, 4, 4),
        dtype="float32",
    ).float()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    made = Cosmos3OmniPipeline(transformer, tokenizer, vae, scheduler, enable_safety_checker=False)
    made.save_pretrained(folder)


@pytest.mark.parametrize("build", [cogvideox, ltx, cosmos3])
def test_other_classes_run_with_their_own_arguments(build, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build(tmp_path / "pipeline")
    extra = {"safety_checker": False} if build is cosmos3 else {}
    model = load_pipeline(tmp_path / "pipeline", PipelineConfig(**SMALL, **extra))
    alone = model.rollout(request(model)).frames_BSVTHWC
    together = model.rollout(request(model, seeds=((7, 9),))).frames_BSVTHWC
    assert alone.shape == (1, 1, 1, 9, 48, 64, 3) and np.array_equal(alone[:, 0], together[:, 0])
    assert (together[:, 0] != together[:, 1]).any()
    other = model.rollout(request(model, text="lift the red bottle")).frames_BSVTHWC
    assert np.abs(other[:, :, :, 1:].astype(int) - alone[:, :, :, 1:]).mean() > 0.01


class Recorder:
    """Stands in for a pipeline: keeps its arguments, gives the video that it was told to."""

    def __init__(self, video, output="frames"):
        self.video, self.output, self.calls = video, output, []

    def __call__(self, **arguments):
        self.calls.append(arguments)
        return types.SimpleNamespace(**{self.output: self.video[None] if self.output == "frames" else self.video})


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_gets_the_arguments_that_its_call_has(name):
    import inspect

    import diffusers

    kind = CLASSES[name]
    video = np.linspace(0, 1, 9 * 64 * 96 * 3, dtype=np.float32).reshape(9, 64, 96, 3)
    settings = SMALL | {"view_height": 64, "view_width": 96, "negative_prompt": "blurred"}
    config = PipelineConfig(**settings | ({} if kind.guidance else {"guidance": None}))
    recorder = Recorder(video, kind.output)
    model = PipelineWorldModel(recorder, kind, config, weights_fingerprint="w")
    frames = model.rollout(request(model, seeds=((3, 4),))).frames_BSVTHWC
    assert np.array_equal(frames[0, 1, 0], (video * 255).round().astype(np.uint8))
    known = inspect.signature(getattr(diffusers, name).__call__).parameters
    assert set(recorder.calls[0]) <= set(known)
    assert [call["generator"].initial_seed() for call in recorder.calls] == [3, 4]
    assert (kind.rate or "fps") not in known or recorder.calls[0].get(kind.rate) == 8


def model_of(video, **changes):
    return PipelineWorldModel(
        Recorder(video), CLASSES["WanImageToVideoPipeline"], PipelineConfig(**SMALL | changes), weights_fingerprint="w"
    )


def test_a_video_of_another_size_and_numbers_that_are_none_are_errors():
    video = np.zeros((9, 64, 96, 3), np.float32)
    for wrong in (video[:5], video[:, :32]):
        model = model_of(wrong)
        with pytest.raises(UserError, match="as asked"):
            model.rollout(request(model))
    video[4, 3, 2, 1] = np.nan
    model = model_of(video, dtype="float16")
    with pytest.raises(UserError, match="not finite in float16"):
        model.rollout(request(model))


# ---------------------------------------------------------------------- what is refused


def edit(folder, **changes):
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def unset(folder, name, field):
    file = folder / "model_index.json"
    content = json.loads(file.read_text()) | {"_class_name": name}
    file.write_text(json.dumps({key: value for key, value in content.items() if key != field}))


def code(folder):
    (folder / "transformer" / "model.py").write_text("raise SystemExit('ran')")


def pickled(folder):
    for path in (folder / "transformer").glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))


DAMAGE = {
    "no folder": (lambda folder: shutil.rmtree(folder), "no such file or folder"),
    "unknown class": (
        lambda f: edit(f, _class_name="WanImageToVidePipeline"),
        "did you mean 'WanImageToVideoPipeline'",
    ),
    "text to video": (
        lambda f: edit(f, _class_name="WanPipeline", expand_timesteps=False),
        "text to video, its transformer takes no first frame",
    ),
    "text to video, not said": (lambda f: unset(f, "WanPipeline", "expand_timesteps"), "without expand_timesteps"),
    "custom class": (lambda f: edit(f, _class_name=["pipeline", "Mine"]), "the name of one class"),
    "foreign library": (lambda f: edit(f, transformer=["os", "system"]), "parts from diffusers, transformers"),
    "code": (code, "without Python files"),
    "pickled weights": (pickled, "safetensors"),
    "no part": (lambda f: shutil.rmtree(f / "vae"), "a complete WanImageToVideoPipeline"),
    "no JSON": (lambda f: (f / "model_index.json").write_text("{"), "JSON"),
    "no settings": (lambda f: (f / "physis_pipeline.json").unlink(), "physis_pipeline.json"),
    "settings no JSON": (lambda f: (f / "physis_pipeline.json").write_text("height=3"), "a JSON object"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_folder_that_is_not_as_it_should_be_is_refused(folder, name):
    damage, said = DAMAGE[name]
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_any(str(folder))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"height": 48}, "a multiple of 32"),
        ({"frames": 10}, "frames=9"),
        ({"heigth": 64}, "height"),
        ({"steps": None}, "steps"),
        ({"fps": 0}, "fps"),
        ({"prompt": "no place for it"}, "{instruction}"),
        ({"dtype": "fp16"}, "float16"),
        ({"resize": "crop"}, "stretch"),
        ({"safety_checker": False}, "has none"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder, changes, said):
    settings = {name: value for name, value in (SMALL | changes).items() if value is not None}
    (folder / "physis_pipeline.json").write_text(json.dumps(settings))
    with pytest.raises(UserError) as caught:
        load_any(str(folder))
    assert said in str(caught.value)


def test_settings_may_stand_beside_the_folder(folder, tmp_path):
    (folder / "physis_pipeline.json").unlink()
    settings = tmp_path / "wan-letterboxed.json"
    settings.write_text(json.dumps(SMALL | {"pipeline": "pipeline", "resize": "letterbox", "name": "boxed"}))
    assert load_any(str(settings)).spec.name == "boxed"
    assert read_class(folder) == "WanImageToVideoPipeline"
