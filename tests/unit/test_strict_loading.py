"""The strict loader of diffusers folders: what ``from_pretrained`` loads, and a named error for what it would only log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.backbones import loading
from released_checkpoints import original_transformer

NAME = "diffusion_pytorch_model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny stock transformer in diffusers' own shards."""
    transformer().save_pretrained(tmp_path / "stock", max_shard_size="30KB")
    return tmp_path / "stock"


def transformer():
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "num_layers": 2, "freq_dim": 16}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return WanTransformer3DModel(in_channels=8, out_channels=8, text_dim=16, **sizes)


def test_strict_loading_is_what_from_pretrained_loads(folder: Path) -> None:
    from diffusers import WanTransformer3DModel as Wan

    assert len(list(folder.glob("*.safetensors"))) > 2
    for dtype in (None, torch.float32, torch.bfloat16):
        ours = loading.load_transformer(folder, Wan, dtype=dtype)
        theirs = Wan.from_pretrained(folder, torch_dtype=dtype or torch.float32)
        assert {k: v.dtype for k, v in ours.state_dict().items()} == {
            k: v.dtype for k, v in theirs.state_dict().items()
        }
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
        assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
        assert all(value.requires_grad for value in ours.parameters())
    assert torch.equal(ours.rope.freqs_cos, transformer().rope.freqs_cos)


def test_weights_go_into_the_parameters_that_an_optimiser_holds(folder: Path) -> None:
    model = transformer()
    held = list(model.parameters())
    with torch.no_grad():
        for value in held:
            value.zero_()
    loading.load_weights(model, folder)
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(held, transformer().parameters(), strict=True))


def test_what_does_not_fit_leaves_the_model_as_it_was(folder: Path) -> None:
    model = transformer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shard = sorted(folder.glob("*.safetensors"))[-1]
    state = load_file(shard)
    name = next(iter(state))
    index = folder / f"{NAME}.safetensors.index.json"
    whole = index.read_text()
    for changed, words in ((state[name][:-1].clone(), "as the config says"), (state[name].int(), "float32, bfloat16")):
        save_file({**state, name: changed}, shard)
        with pytest.raises(UserError, match=words) as caught:
            loading.load_weights(model, folder)
        assert caught.value.field == f"{shard}: {name}"
    save_file({key: value for key, value in state.items() if key != name}, shard)
    listed = json.loads(whole)
    del listed["weight_map"][name]
    index.write_text(json.dumps(listed))
    with pytest.raises(UserError, match=f"no {name}"):
        loading.load_weights(model, folder)
    save_file({**state, "extra": torch.zeros(1)}, shard)
    listed = json.loads(whole)
    listed["weight_map"]["extra"] = shard.name
    index.write_text(json.dumps(listed))
    with pytest.raises(UserError, match="extra too many"):
        loading.load_weights(model, folder)
    shard.unlink()
    with pytest.raises(UserError, match=f"no {shard.name}"):
        loading.load_weights(model, folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_configs_of_other_models_are_refused(folder: Path, tmp_path: Path) -> None:
    from diffusers import Cosmos3OmniTransformer, WanTransformer3DModel

    with pytest.raises(UserError, match="wanted Cosmos3OmniTransformer"):
        loading.read_transformer(folder, Cosmos3OmniTransformer)
    with pytest.raises(UserError, match=r"config\.json"):
        loading.read_transformer(tmp_path, WanTransformer3DModel)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"num_layer": 2}))
    with pytest.raises(UserError, match="did you mean 'num_layers'"):
        loading.read_transformer(folder, WanTransformer3DModel)


def test_a_folder_without_weights_and_one_with_two_kinds(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        loading.folder_entries(tmp_path / "nowhere")
    save_file(original_transformer(transformer().state_dict()), folder / f"{NAME}.safetensors")
    with pytest.raises(UserError, match="one of them"):
        loading.folder_entries(folder)


def test_weights_keep_the_memory_format_of_their_module() -> None:
    """The codec's convolutions are channels last: in another layout they round differently, and take longer."""
    from physisforcing.core.paths import weights_root
    from physisforcing.worldmodel.autoencoder import CausalVideoAutoencoder
    from physisforcing.worldmodel.storage import load_diffusers

    folder = weights_root() / "vae"
    kept = load_diffusers(CausalVideoAutoencoder, folder)
    made = CausalVideoAutoencoder.from_config(CausalVideoAutoencoder.load_config(folder))
    strides = {name: value.stride() for name, value in made.named_parameters()}
    assert {name: value.stride() for name, value in kept.named_parameters()} == strides
    four = [value for value in kept.parameters() if value.ndim == 4 and value.shape[2] > 1]
    assert four and all(value.is_contiguous(memory_format=torch.channels_last) for value in four)
