"""The Wan denoiser: parity with the stock forward, the tap, exports, and the rollout model built on it."""

import numpy as np
import pytest
import torch

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.protocols import WorldModel
from physisforcing.core.types import RolloutRequest
from physisforcing.worldmodel.backbones.actions import ActionConfig
from physisforcing.worldmodel.backbones.wan import (
    ConditionerConfig,
    WanConfig,
    WanDenoiser,
    build_denoiser,
    load_denoiser,
    save_denoiser,
)
from physisforcing.worldmodel.codec import load_codec

TINY = WanConfig(latent_channels=4, num_heads=2, head_dim=12, num_layers=3, ffn_dim=32, tap=2)


def denoiser(config: WanConfig = TINY, seed: int = 0):
    torch.manual_seed(seed)
    model = build_denoiser(config, ConditionerConfig(hidden=16))
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    return model


def inputs(batch: int = 2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 3, 4, 5, generator=generator)
    timesteps = torch.tensor([[0.0, 300.0, 300.0], [0.0, 900.0, 900.0]])[:batch]
    text, state = torch.randn(batch, 32, 384, generator=generator), torch.randn(batch, 3, 14, generator=generator)
    return x, timesteps, text, state


def stock_forward(model, x, timesteps, context):
    _, rows, columns = model.transformer.config.patch_size
    per_token = timesteps.repeat_interleave(x.shape[3] // rows * (x.shape[4] // columns), dim=1)
    return model.transformer(x, per_token, context, return_dict=False)[0]


def test_forward_equals_the_stock_forward():
    model = denoiser()
    x, timesteps, text, state = inputs()
    context = model.context(text, state)
    assert context.shape == (2, 35, 384)
    velocity, tapped = model(x, timesteps, context, need_tap=True)
    torch.testing.assert_close(velocity, stock_forward(model, x, timesteps, context), atol=2e-5, rtol=1e-4)
    captured = []
    handle = model.transformer.blocks[1].register_forward_hook(lambda _m, _i, out: captured.append(out))
    stock_forward(model, x, timesteps, context)
    handle.remove()
    torch.testing.assert_close(tapped, captured[0], atol=2e-5, rtol=1e-4)


def test_patches_of_two_by_two_and_an_action_model_of_them():
    """As Wan2.2-TI2V-5B has them: the stock velocity, and bit-equal to it as an action model that has learned nothing yet."""
    small = denoiser()
    torch.manual_seed(2)
    config = {**small.transformer.config, "patch_size": (1, 2, 2)}
    transformer = type(small.transformer).from_config(config).eval()
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    model = WanDenoiser(transformer, small.conditioner, tap=2)
    _, timesteps, text, state = inputs()
    x, context = torch.randn(2, 4, 3, 4, 6), model.context(text, state)
    velocity, tapped = model(x, timesteps, context, need_tap=True)
    assert velocity.shape == x.shape and tapped.shape == (2, 3 * 2 * 3, 24)
    torch.testing.assert_close(velocity, stock_forward(model, x, timesteps, context), atol=2e-5, rtol=1e-4)
    model.add_actions(ActionConfig(hidden=8))
    actions = torch.randn(2, 16, 14)
    assert torch.equal(model(x, timesteps, context, action_BFD=model.action_embedding(actions, state))[0], velocity)
    torch.nn.init.normal_(model.actions.project.weight, std=0.5)
    other = model(x, timesteps, context, action_BFD=model.action_embedding(actions, state))[0]
    assert (other - velocity).abs().max() > 1e-3


def test_tap_carries_gradients_to_the_blocks_before_it_only():
    model = denoiser()
    x, timesteps, text, state = inputs()
    model(x, timesteps, model.context(text, state), need_tap=True)[1].square().mean().backward()
    reached = [block.ffn.net[2].weight.grad is not None for block in model.transformer.blocks]
    assert reached == [True, True, False]
    assert model.conditioner.net[0].weight.grad.abs().sum() > 0


def test_instruction_and_proprioception_change_the_velocity():
    model = denoiser()
    x, timesteps, text, state = inputs()
    plain = model(x, timesteps, model.context(text, state))[0]
    assert (model(x, timesteps, model.context(-text, state))[0] - plain).abs().max() > 1e-3
    assert (model(x, timesteps, model.context(text, -state))[0] - plain).abs().max() > 1e-3


def test_export_is_a_plain_diffusers_folder(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = denoiser()
    save_denoiser(model, tmp_path)
    stock = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "transformer", local_files_only=True)
    assert list(stock.state_dict()) == list(model.transformer.state_dict())
    x, timesteps, text, state = inputs()
    context = model.context(text, state).detach()
    with torch.no_grad():
        per_token = timesteps.repeat_interleave(20, dim=1)
        assert torch.equal(
            stock(x, per_token, context, return_dict=False)[0], stock_forward(model, x, timesteps, context)
        )
    loaded = load_denoiser(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x, timesteps, loaded.context(text, state))[0], model(x, timesteps, context)[0])


def count_flops(call) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def stock_transformer():
    """A stock model of ``TINY``'s size, made without any of our code."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=384,
        ffn_dim=32, num_layers=3,
    )  # fmt: skip


def test_physics_heads_cost_nothing_when_imagining(tmp_path):
    """An export that was trained with physics heads: the stock keys, parameters and operations, and nothing more."""
    from safetensors import safe_open

    from physisforcing.worldmodel.model import save_world_model
    from physisforcing.worldmodel.physics.config import PhysicsConfig
    from physisforcing.worldmodel.physics.forcing import PhysisForcing

    heads = PhysisForcing(PhysicsConfig(phi_hidden=16, psi_hidden=16, feature_dim=16), width=TINY.dim, teacher_dim=8)
    save_world_model(
        tmp_path, denoiser(), heads, sample_shift=3.0, latents_fingerprint="x", home_state=[0.0] * 14, dtype=None
    )
    assert (tmp_path / "physics_heads.safetensors").is_file()
    assert {f.name for f in (tmp_path / "transformer").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    stock = stock_transformer()
    with safe_open(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    assert sizes == {name: value.numel() for name, value in stock.state_dict().items()}
    assert sum(sizes.values()) == sum(p.numel() for p in stock.parameters())

    loaded = load_denoiser(tmp_path)
    x, timesteps, text, state = inputs()
    context = loaded.context(text, state).detach()
    per_token = timesteps.repeat_interleave(20, dim=1)
    ours = count_flops(lambda: loaded(x, timesteps, context))
    theirs = count_flops(lambda: stock(x, per_token, context, return_dict=False))
    # The one difference: times are embedded once a latent frame (3 of them) instead of once a token (60).
    embed = stock.condition_embedder
    times = [
        count_flops(lambda t=t: embed(t.flatten(), context, None, timestep_seq_len=t.shape[1]))
        for t in (timesteps, per_token)
    ]
    assert theirs - ours == times[1] - times[0] > 0
    assert count_flops(lambda: loaded(x, timesteps, context, need_tap=True)) == ours, "the tap only hands a tensor out"


def test_pico_has_at_most_8_million_parameters():
    from physisforcing.core.config import compose
    from physisforcing.worldmodel.training.config import TrainWorldModelConfig

    config = compose("train_worldmodel", ["experiment=pico"], TrainWorldModelConfig)
    assert config.backbone == WanConfig()
    model = build_denoiser(config.backbone, config.conditioner)
    assert 6e6 < sum(p.numel() for p in model.parameters()) <= 8e6


def test_conditioner_standardises_and_leaves_still_joints_alone():
    model = denoiser()
    states = torch.zeros(50, 3, 14)
    states[:, :, 0] = torch.arange(50.0)[:, None] - torch.tensor([0.0, 1.0, 3.0])
    model.conditioner.set_statistics(states)
    assert model.conditioner.state_mean[0] == pytest.approx(24.5)
    assert model.conditioner.state_std[0] == pytest.approx(torch.arange(50.0).std().item())
    assert model.conditioner.state_std[1:].eq(1).all()


# --- the rollout model ---------------------------------------------------------------------------------------------


class FixedText:
    """Embeddings that need no sentence encoder: a function of the sentence's length."""

    def batch(self, sentences):
        rows = [torch.full((32, 384), 0.01 * len(sentence)) for sentence in sentences]
        return torch.stack(rows), torch.ones(len(rows), 32, dtype=torch.bool)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from physisforcing.worldmodel.autoencoder import CausalVideoAutoencoder
    from physisforcing.worldmodel.model import save_world_model
    from physisforcing.worldmodel.storage import latents_fingerprint, save_diffusers

    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    codec = CausalVideoAutoencoder(
        latent_channels=4, fine_channels=8, decoder_fine_channels=8, coarse_channels=8, group_channels=8
    )
    codec.set_statistics(torch.zeros(4), torch.ones(4))
    save_diffusers(codec, root / "vae")
    save_world_model(
        root / "worldmodel",
        denoiser(),
        None,
        sample_shift=3.0,
        latents_fingerprint=latents_fingerprint(root / "vae"),
        home_state=[0.0] * 14,
        dtype=torch.float16,
    )
    return root


def test_weights_are_readable_by_everyone(folders):
    written = sorted(folders.rglob("*.safetensors"))
    assert len(written) == 3
    assert [path.stat().st_mode & 0o777 for path in written] == [0o644] * 3
    assert not [path for path in folders.rglob(".*")], "nothing left from writing aside"


def request(seeds, batch=1, **changes):
    context = np.random.default_rng(0).integers(0, 256, (batch, 1, 1, 120, 160, 3), dtype=np.uint8)
    values = {
        "context_BVTHWC": context,
        "instructions": ["click the bell"] * batch,
        "seeds_BS": np.asarray(seeds, dtype=np.int64),
        "horizon": 17,
        "proprioception_BKA": np.zeros((batch, 3, 14), np.float32),
        "returns": frozenset({"frames", "latents"}),
    }
    return RolloutRequest(**{**values, **changes})


def test_rollouts_depend_on_the_seed_alone(folders):
    from physisforcing.worldmodel.model import load_world_model

    model = load_world_model(folders / "worldmodel", steps=2, text=FixedText())
    assert isinstance(model, WorldModel) and model.spec.proprioception_lags == (0, 8, 16)
    alone = model.rollout(request([[7]]))
    together = model.rollout(request([[3, 7]]))
    assert alone.frames_BSVTHWC.shape == (1, 1, 1, 17, 120, 160, 3)
    assert np.array_equal(alone.latents_BSCFhw[0, 0], together.latents_BSCFhw[0, 1])
    assert not np.array_equal(together.latents_BSCFhw[0, 0], together.latents_BSCFhw[0, 1])
    np.testing.assert_allclose(alone.times_T, np.arange(17) * 0.12)
    first = model.codec.encode(torch.from_numpy(request([[7]]).context_BVTHWC[:, 0]))
    assert np.array_equal(alone.latents_BSCFhw[0, 0, :, :1], first[0].numpy())


def test_a_sample_is_bit_equal_wherever_its_context_stands_in_a_batch(folders):
    from physisforcing.worldmodel.model import load_world_model

    model = load_world_model(folders / "worldmodel", steps=2, text=FixedText())
    both = request([[7], [8]], batch=2, instructions=["click the bell", "lift the bottle off the table"])
    both.proprioception_BKA[:] = np.random.default_rng(1).normal(size=(2, 3, 14))
    together = model.rollout(both)
    for row in range(2):
        one = request(
            both.seeds_BS[row : row + 1],
            instructions=[both.instructions[row]],
            context_BVTHWC=both.context_BVTHWC[row : row + 1],
            proprioception_BKA=both.proprioception_BKA[row : row + 1],
        )
        alone = model.rollout(one)
        assert np.array_equal(alone.latents_BSCFhw[0], together.latents_BSCFhw[row])
        assert np.array_equal(alone.frames_BSVTHWC[0], together.frames_BSVTHWC[row])


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"horizon": 16}, MissingCapabilityError, "horizon"),
        ({"returns": frozenset({"flow"})}, MissingCapabilityError, "returns"),
        ({"proprioception_BKA": None}, UserError, "proprioception"),
        ({"proprioception_BKA": np.full((1, 3, 14), np.nan, np.float32)}, UserError, "finite"),
        ({"context_BVTHWC": np.zeros((1, 1, 1, 240, 320, 3), np.uint8)}, UserError, "context"),
        ({"actions_BSPA": np.zeros((1, 1, 4, 14), np.float32)}, MissingCapabilityError, "actions"),
    ],
)
def test_what_it_cannot_do_is_an_error(folders, changes, error, match):
    from physisforcing.worldmodel.model import load_world_model

    with pytest.raises(error, match=match):
        load_world_model(folders / "worldmodel", steps=1, text=FixedText()).rollout(request([[0]], **changes))


def test_another_codec_is_refused_and_a_better_decoder_is_not(folders, tmp_path):
    from physisforcing.worldmodel.model import load_world_model
    from physisforcing.worldmodel.storage import save_diffusers

    codec = load_codec(folders / "vae")
    with torch.no_grad():
        codec.decode_out.weight.add_(0.1)
    save_diffusers(codec, tmp_path / "sharper")
    sharper = load_world_model(folders / "worldmodel", codec=tmp_path / "sharper")
    plain = load_world_model(folders / "worldmodel")
    assert plain.spec.fingerprint == load_world_model(folders / "worldmodel").spec.fingerprint
    assert plain.spec.fingerprint != sharper.spec.fingerprint, "other pictures, so another fingerprint"
    assert plain.spec.fingerprint != load_world_model(folders / "worldmodel", steps=3).spec.fingerprint
    with torch.no_grad():
        codec.encode_in.weight.add_(0.1)
    save_diffusers(codec, tmp_path / "foreign")
    with pytest.raises(UserError, match="trained on"):
        load_world_model(folders / "worldmodel", codec=tmp_path / "foreign")


def test_a_codec_that_is_not_there_is_named(folders, tmp_path):
    import shutil

    from physisforcing.worldmodel import generate as module
    from physisforcing.worldmodel.storage import latents_fingerprint

    # Where training leaves a model there is no codec beside it.
    shutil.copytree(folders / "worldmodel", tmp_path / "run" / "export")
    config = module.GenerateConfig(image="x.png", instruction="click the bell", model=str(tmp_path / "run" / "export"))
    with pytest.raises(UserError, match=r"codec=<folder of the codec it was trained with>"):
        module.generate(config)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="weights"):
        latents_fingerprint(tmp_path / "empty")


def test_a_config_that_does_not_fit_its_weights_is_refused(folders, tmp_path):
    import shutil

    shutil.copytree(folders / "vae", tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(config.read_text().replace('"latent_channels": 4', '"latent_channels": 8'))
    with pytest.raises(UserError, match="do not fit"):
        load_codec(tmp_path / "vae")


def test_generate_writes_a_marked_video(folders, tmp_path, monkeypatch):
    from physisforcing.core.video import probe_mp4, write_mp4
    from physisforcing.worldmodel import generate as module
    from physisforcing.worldmodel import model as model_module

    monkeypatch.setattr(model_module, "TextEmbedder", FixedText)
    first = tmp_path / "first.mp4"
    write_mp4(first, np.full((1, 240, 320, 3), 90, np.uint8), 10)
    config = module.GenerateConfig(
        image=str(first),
        instruction="click the bell",
        out=str(tmp_path / "out.mp4"),
        seed=5,
        steps=1,
        model=str(folders / "worldmodel"),
    )
    info = probe_mp4(module.generate(config))
    assert (info.frames, info.height, info.width) == (17, 240, 320)
    comment = info.metadata["comment"]
    assert "generated" in comment and "seed 5" in comment
    with pytest.raises(UserError, match="exactly one"):
        module.generate(module.GenerateConfig(model=str(folders / "worldmodel")))
