"""Generation with the large models: bit-equal to the stock pipelines, with whose settings, from which seeds and first latents."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch

import tiny_paper
from physisforcing.worldmodel.backbones.folder import save_settings
from physisforcing.worldmodel.paper_generate import KINDS
from physisforcing.worldmodel.sampling import make_scheduler, seed_noise
from tiny_paper import our_latents

NAMES = ("a14b", "ti2v", "cosmos3")


def test_a14b_with_two_experts_is_bit_equal_to_the_stock_pipeline(paper_folders, paper_generator):
    """Wan writes guidance (low, high), diffusers (high, low): here they have names."""
    guidance = {"guidance": 2.0, "guidance_low": 4.0}
    made = our_latents(paper_generator("a14b", steps=6, **guidance), [7])[0]
    stock = tiny_paper.stock_pipeline(paper_folders["a14b"])
    stock.scheduler = tiny_paper.unipc(5.0)
    theirs = tiny_paper.stock_latents(stock, steps=6, guidance=2.0, guidance_scale_2=4.0, seed=7)
    assert torch.equal(made, theirs)
    swapped = tiny_paper.stock_latents(stock, steps=6, guidance=4.0, guidance_scale_2=2.0, seed=7)
    assert (swapped - made).abs().max() > 1e-2


def test_ti2v_is_bit_equal_to_the_stock_pipeline(paper_folders, paper_generator):
    made = our_latents(paper_generator("ti2v", steps=6, guidance=4.0, exact_times=True), [7])[0]
    stock = tiny_paper.stock_pipeline(paper_folders["ti2v"])
    theirs = tiny_paper.stock_latents(stock, steps=6, guidance=4.0, seed=7)
    assert torch.equal(made, theirs)
    fast = our_latents(paper_generator("ti2v", steps=6, guidance=4.0), [7])[0]
    torch.testing.assert_close(fast, theirs, atol=1e-5, rtol=1e-5)


def test_cosmos3_is_bit_equal_to_the_stock_pipeline_with_its_first_latent_held(paper_folders, paper_generator):
    """The stock sampler steps the clean first latent with a velocity of zero, and UniPC lets it drift by its last bit."""
    made = our_latents(paper_generator("cosmos3", steps=6, guidance=4.0, exact_times=True), [7])[0]
    stock = tiny_paper.stock_pipeline(paper_folders["cosmos3"])

    def hold(_pipeline: Any, _step: int, _timestep: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": torch.cat([made[:, :, :1], given["latents"][:, :, 1:]], dim=2)}

    theirs = tiny_paper.stock_latents(stock, steps=6, guidance=4.0, seed=7, callback_on_step_end=hold)
    assert torch.equal(made, theirs)
    drifting = tiny_paper.stock_latents(stock, steps=6, guidance=4.0, seed=7)
    assert (drifting[:, :, 0] - made[:, :, 0]).abs().max() < 1e-6
    torch.testing.assert_close(drifting, made, atol=1e-5, rtol=1e-5)


def test_euler_is_bit_equal_to_the_stock_pipeline_that_is_given_the_levels(paper_folders, paper_generator):
    """Left alone, the stock pipeline would shift twice."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Given(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, steps: int, device: Any = None) -> None:
            even = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
            super().set_timesteps(sigmas=(5.0 * even / (1.0 + 4.0 * even)).tolist(), device=device)

    made = our_latents(paper_generator("a14b", sampler="euler", steps=4, guidance=4.0), [7])[0]
    stock = tiny_paper.stock_pipeline(paper_folders["a14b"])
    stock.scheduler = Given()
    assert torch.equal(made, tiny_paper.stock_latents(stock, steps=4, guidance=4.0, seed=7))
    stock.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    assert (made - tiny_paper.stock_latents(stock, steps=4, guidance=4.0, seed=7)).abs().max() > 1e-2


def test_frames_are_those_of_the_stock_pipeline(paper_folders, paper_generator):
    from PIL import Image

    generator = paper_generator("a14b", steps=1, guidance=1.0)
    made = dict(generator.generate(tiny_paper.picture(), tiny_paper.PROMPT, [7]))[7]
    stock = tiny_paper.stock_pipeline(paper_folders["a14b"])
    stock.scheduler = tiny_paper.unipc(5.0)
    given = {
        **tiny_paper.SIZE,
        "num_frames": tiny_paper.SIZE["frames"],
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
    }
    del given["frames"]
    theirs = stock(
        Image.fromarray(tiny_paper.picture()), tiny_paper.PROMPT, generator=torch.Generator().manual_seed(7), **given
    )
    assert np.array_equal(made, (theirs.frames[0] * 255).round().astype(np.uint8))


def test_the_shift_is_the_one_asked_for_whatever_the_folder_says(paper_folders, paper_generator):
    made = paper_generator("a14b", steps=6)
    assert made.scheduler.config.flow_shift == 3.0 and made.sampler.shift == 5.0
    used = make_scheduler(made.sampler, made.scheduler)
    assert used.timesteps.tolist() == [999, 961, 909, 833, 714, 501]


def test_every_kind_has_its_authors_settings(paper_folders, paper_generator):
    kinds = {name: paper_generator(name).kind for name in NAMES} | {"one": paper_generator("a14b", experts="high").kind}
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


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_the_same_latents_wherever_it_stands(name, paper_generator):
    made = paper_generator(name, steps=2)
    together = our_latents(made, [3, 7])
    assert torch.equal(our_latents(made, [7])[0], together[1])
    assert (together[0] - together[1]).abs().max() > 0.1
    assert torch.equal(
        seed_noise(7, (2, 3, 4, 5)), torch.randn(1, 2, 3, 4, 5, generator=torch.Generator().manual_seed(7))
    )


def test_first_latents_of_a14b_and_the_folders_boundary(paper_generator):
    """``pinned`` ends with the picture's own latent in frame 0; ``mask`` with what was predicted there."""
    pinned = paper_generator("a14b", first_latent="pinned", experts="high", steps=2)
    encoded = pinned.vae.encode_first(
        pinned.experts.high,
        torch.from_numpy(tiny_paper.picture()).permute(2, 0, 1)[None] / 127.5 - 1.0,
        tiny_paper.SIZE["frames"],
    )
    assert (our_latents(pinned, [7])[0][:, :, :1] - encoded["first_BC1hw"]).abs().max() < 1e-5
    mask = paper_generator("a14b", steps=2, boundary=0.5)
    assert (our_latents(mask, [7])[0][:, :, :1] - encoded["first_BC1hw"]).abs().max() > 0.1
    assert mask.experts.boundary == 0.5 and paper_generator("a14b").experts.boundary == 0.9
    assert "boundary 0.5" in mask.describe() and "first latent mask" in mask.describe()
    assert "boundary" not in pinned.describe() and "first latent pinned" in pinned.describe()


def test_the_frame_rate_of_an_export_is_generated_unless_another_one_is_said(paper_folders, paper_generator, tmp_path):
    folder = shutil.copytree(paper_folders["cosmos3"] / "transformer", tmp_path / "transformer")
    options = {"steps": 1, "transformer": str(folder)}
    plain = our_latents(paper_generator("cosmos3", **options), [7])[0]
    save_settings(folder, first_latent="pinned", fps=12.0)
    made = {fps: paper_generator("cosmos3", fps=fps, **options) for fps in (None, 12.0, 24.0)}
    assert {fps: (one.fps, one.experts.high.fps) for fps, one in made.items()} == {
        None: (12.0, 12.0), 12.0: (12.0, 12.0), 24.0: (24.0, 24.0)
    }  # fmt: skip
    latents = {fps: our_latents(one, [7])[0] for fps, one in made.items()}
    assert torch.equal(latents[None], latents[12.0]) and torch.equal(latents[24.0], plain)
    assert not torch.equal(latents[None], plain)


def test_an_exported_transformer_takes_the_place_of_the_folders(paper_folders, paper_generator, tmp_path):
    from physisforcing.worldmodel.backbones.folder import load_backbone

    plain = our_latents(paper_generator("ti2v", steps=1), [7])[0]
    trained = load_backbone(paper_folders["ti2v"]).transformer
    trained.save_pretrained(tmp_path / "same")
    assert torch.equal(our_latents(paper_generator("ti2v", steps=1, transformer=str(tmp_path / "same")), [7])[0], plain)
    with torch.no_grad():
        trained.proj_out.weight.mul_(1.5)
    trained.save_pretrained(tmp_path / "other")
    other = our_latents(paper_generator("ti2v", steps=1, transformer=str(tmp_path / "other")), [7])[0]
    assert (other - plain).abs().max() > 1e-2
