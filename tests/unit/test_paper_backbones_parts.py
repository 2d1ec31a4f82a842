"""What generation with the large models stands on: offloading, compiled blocks, sentences."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import tiny_paper
from physisforcing.core.errors import UserError
from physisforcing.worldmodel.backbones.protocol import call_block
from tiny_paper import our_latents

pytestmark = pytest.mark.usefixtures("own_cache")  # sentences are embedded
NAMES = ("a14b", "ti2v", "cosmos3")


@pytest.mark.parametrize("name", NAMES)
def test_offloading_changes_nothing_in_the_result(name, paper_generator):
    plain = our_latents(paper_generator(name, steps=2), [7])[0]
    for offload in ("model", "block"):
        made = paper_generator(name, steps=2, offload=offload)
        before = {key: value.clone() for key, value in made.experts.high.transformer.state_dict().items()}
        assert torch.equal(our_latents(made, [7])[0], plain), offload
        after = made.experts.high.transformer.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert made.experts.high.run_block is call_block


@pytest.mark.parametrize("order", [[0, 1, 2, 3] * 2, [2, 0, 0, 3, 1]])
def test_streamed_blocks_compute_with_copies_and_give_their_weights_back(order):
    from physisforcing.worldmodel.placement import StreamedBlocks

    class Block(torch.nn.Module):
        """Weights of several sizes and types, and buffers."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.norm = torch.nn.Linear(2, width), torch.nn.BatchNorm1d(width)
            self.last = torch.nn.Linear(width, 2, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.norm(self.first(x)).bfloat16()).float()

    blocks = torch.nn.ModuleList(Block(width) for width in (3, 5, 4, 5)).eval().requires_grad_(False)
    start = x = torch.randn(3, 2)
    plain = [x := blocks[index](x) for index in order]
    home = {name: (value.data_ptr(), value.clone()) for name, value in blocks.state_dict().items()}
    streamed, used = StreamedBlocks(blocks, torch.device("cpu")), []

    def note(module: torch.nn.Module, *_: object) -> None:
        own = list(blocks).index(module)
        away = [name for name, value in blocks.state_dict().items() if value.data_ptr() != home[name][0]]
        assert {int(name.split(".")[0]) for name in away} == {own} and len(away) == len(module.state_dict())
        used.append(away[0])

    for one in blocks:
        one.register_forward_hook(note)
    x = start
    for index, wanted in zip(order, plain, strict=True):
        x = streamed.run(blocks[index], x)
        assert torch.equal(x, wanted)
        assert list(streamed._waiting) == [(index + 1) % 4], "the next one is being copied already"
    assert len(used) == len(order)
    streamed.close()
    assert all(value.data_ptr() == home[name][0] for name, value in blocks.state_dict().items())
    assert all(torch.equal(value, home[name][1]) for name, value in blocks.state_dict().items())


def test_blocks_compile_to_one_graph_for_all_of_them(paper_generator):
    """Traced without a compiler behind it: no break inside a block, and the second block finds the first one's graph."""
    made = paper_generator("a14b", compile="blocks")
    assert all(block._compiled_call_impl is not None for block in (*made.experts.high.blocks, *made.experts.low.blocks))
    made = paper_generator("ti2v", steps=1)
    plain = our_latents(made, [7])[0]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in made.experts.high.blocks:
        block.compile(backend="eager", fullgraph=True)
    assert torch.equal(our_latents(made, [7])[0], plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_wan_text_is_the_stock_embedding_and_is_cached(paper_folders, tmp_path):
    from physisforcing.worldmodel.text_encoders import UMT5Text

    stock = tiny_paper.stock_pipeline(paper_folders["ti2v"])
    sentences = [tiny_paper.PROMPT, "", "lift"]
    options = {"do_classifier_free_guidance": False, "max_sequence_length": 512}
    # one by one: in a batch the matrix products round differently
    with torch.no_grad():
        theirs = torch.cat([stock.encode_prompt(sentence, **options)[0] for sentence in sentences])
    text = UMT5Text(paper_folders["ti2v"], cache=tmp_path)
    made = text.batch(sentences)
    assert torch.equal(made, theirs) and made.shape == (3, 512, 16)
    assert torch.equal(text.tokens("press the bell & lift   the red bottle"), text.tokens(tiny_paper.PROMPT)), "cleaned"
    written = sorted(tmp_path.iterdir())
    assert len(written) == 3

    def no_encoder(_module: Any, _call: Any) -> torch.Tensor:
        raise AssertionError("the encoder is not to be used")

    again = UMT5Text(paper_folders["ti2v"], cache=tmp_path, run=no_encoder)
    assert torch.equal(again.batch(sentences), theirs) and not again._parts, "neither loaded nor used"
    other = UMT5Text(paper_folders["ti2v"], cache=tmp_path, dtype=torch.bfloat16)
    assert other.fingerprint != text.fingerprint and sorted(tmp_path.iterdir()) == written


def test_sentences_of_strangers_are_not_written_and_memory_is_bounded(paper_folders, tmp_path, monkeypatch):
    from physisforcing.worldmodel import text_encoders

    monkeypatch.setattr(text_encoders, "MOST_REMEMBERED", 2)
    computed: list[str] = []

    def run(_module: Any, call: Any) -> torch.Tensor:
        computed.append("")
        return call()

    made = text_encoders.UMT5Text(paper_folders["ti2v"], cache=tmp_path, max_tokens=8, store=False, run=run)
    kept = text_encoders.UMT5Text(paper_folders["ti2v"], cache=tmp_path / "kept", max_tokens=8)
    for sentence in ("lift", "press", "lift", "turn", "lift"):
        assert torch.equal(made.tokens(sentence), kept.tokens(sentence))
    assert len(made._memory) == len(kept._memory) == 2 and len(computed) == 4, "lift was pushed out by turn, once"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and len(list((tmp_path / "kept").iterdir())) == 3
    for _ in range(2):
        with pytest.warns(UserWarning, match="tokens longer than the 8"):
            made.cached("press the bell " * 5)


def test_a_miss_reads_the_encoders_weights_once_for_their_digest(paper_folders, tmp_path, monkeypatch):
    from physisforcing.worldmodel.text_encoders import UMT5Text

    shutil.copytree(paper_folders["ti2v"], tmp_path / "fresh")
    read: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: (read.append(file.name), digest(file, kind))[1])
    UMT5Text(tmp_path / "fresh", cache=tmp_path / "cache").tokens("lift")
    weights = [name for name in read if name.endswith(".safetensors")]
    assert [Path(name).name for name in weights] == ["model.safetensors"] and "text_encoder" in weights[0]


def test_pictures_that_are_no_whole_latents_are_refused(paper_folders):
    from physisforcing.worldmodel.pipeline_vae import load_vae

    vae = load_vae(paper_folders["ti2v"] / "vae")
    for shape, message in (((6, 32, 48), r"frames: got 6, wanted 4k\+1. Fix: give 5"), ((5, 40, 48), "height: got 40"),
                           ((5, 32, 8), "width: got 8, wanted a multiple of 16")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            vae.encode(torch.zeros(1, 3, *shape))
    assert vae.encode(torch.zeros(1, 3, 5, 32, 48)).shape == (1, 8, 2, 2, 3)


def test_both_codecs_scale_latents_alike(paper_folders):
    from physisforcing.worldmodel.codec import load_codec
    from physisforcing.worldmodel.pipeline_vae import load_vae

    folder = paper_folders["a14b"] / "vae"
    frames = torch.randint(0, 256, (1, 5, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codec, vae = load_codec(folder), load_vae(folder)
    latents = codec.encode(frames)
    assert torch.equal(latents, vae.encode(frames.permute(0, 4, 1, 2, 3) * (2.0 / 255) - 1.0))
    assert torch.equal(codec.decode(latents), vae.decode(latents))
    mean = torch.tensor(vae.vae.config.latents_mean)
    raw = vae.vae.encode(frames.permute(0, 4, 1, 2, 3) * (2.0 / 255) - 1.0).latent_dist.mode()
    std = torch.tensor(vae.vae.config.latents_std)
    torch.testing.assert_close(latents.movedim(1, -1), (raw.movedim(1, -1) - mean) / std)


def test_an_autoencoder_without_statistics_is_refused():
    from physisforcing.worldmodel.codec import LatentScale

    config = SimpleNamespace(z_dim=4, latents_mean=[0.0] * 4, latents_std=None)
    with pytest.raises(UserError, match="vae: latents_std: got None, wanted 4, one a channel"):
        LatentScale(config)


def test_a_prompt_that_is_cut_is_said_to_be(paper_folders, tmp_path):
    from physisforcing.worldmodel.text_encoders import UMT5Text

    text = UMT5Text(paper_folders["ti2v"], cache=tmp_path, max_tokens=8)
    whole = len(text._part("tokenizer")(("press the bell " * 5).strip()).input_ids)
    for _ in range(2):  # also when it comes from the cache
        with pytest.warns(UserWarning, match=f"{whole - 8} tokens longer than the 8"):
            assert UMT5Text(paper_folders["ti2v"], cache=tmp_path, max_tokens=8).tokens(
                "press the bell " * 5
            ).shape == (
                8,
                16,
            )


def test_cosmos3_ids_are_the_stock_ones_and_need_no_weights(paper_folders, tmp_path):
    from physisforcing.worldmodel.text_encoders import CosmosText

    stock = tiny_paper.stock_pipeline(paper_folders["cosmos3"])
    size = {"height": 64, "width": 96, "fps": 12.0}
    theirs = stock.tokenize_prompt("press the bell", "blurred", num_frames=9, **size)
    light = shutil.copytree(
        paper_folders["cosmos3"], tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors")
    )
    text = CosmosText(light)
    made = text.pair("press the bell", "blurred", frames=9, **size)
    assert [ids[0].tolist() for ids in made] == list(theirs)
    rows = text.batch(["press the bell", "press"], frames=9, **size)
    assert rows[0].tolist() == theirs[0] and rows[1, -1] == -1 and (rows >= 0).sum() < rows.numel()


def test_a_text_encoder_with_a_tensor_missing_is_refused(paper_folders, tmp_path):
    """transformers would put random numbers there and go on."""
    import shutil

    from safetensors.torch import load_file, save_file

    from physisforcing.core.errors import UserError
    from physisforcing.worldmodel.text_encoders import UMT5Text

    folder = shutil.copytree(paper_folders["ti2v"], tmp_path / "folder")
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    gone = next(name for name in state if name.endswith("SelfAttention.q.weight"))
    del state[gone]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=gone.replace(".", r"\.")):
        UMT5Text(folder, cache=tmp_path / "cache").tokens("press the bell")


def test_weights_that_are_lent_to_a_device_are_not_copied_back(monkeypatch):
    """The CPU stands for the device here, with a copy of its own of everything that is sent there."""
    from physisforcing.worldmodel.placement import Placement

    part = torch.nn.BatchNorm1d(3)
    before = {name: (value.data_ptr(), value.clone()) for name, value in part.state_dict().items()}
    sent: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: sent.append(device) or self.clone())

    def turn() -> None:
        with Placement("cpu", "model").use(part):
            assert all(value.data_ptr() != before[name][0] for name, value in part.state_dict().items())
            part.weight.data.fill_(7.0)
            raise RuntimeError("amid its turn")

    with pytest.raises(RuntimeError, match="amid"):
        turn()
    for name, value in part.state_dict().items():
        pointer, values = before[name]
        assert value.data_ptr() == pointer and torch.equal(value, values), name
    assert len(sent) == len(before), "each once, on its way there"
    full = iter(range(2))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self.clone() if next(full, 2) < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError), Placement("cpu", "model").use(part):
        pass
    assert all(value.data_ptr() == before[name][0] for name, value in part.state_dict().items()), "back from half way"
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self.clone())
    with Placement("cpu").use(part):
        pass
    assert all(value.data_ptr() != before[name][0] for name, value in part.state_dict().items()), "without it they stay"


def test_a_text_to_video_folder_generates_with_a_transformer_that_was_taught_a_first_frame(tmp_path: Path, capsys):
    from diffusers import WanPipeline

    from physisforcing import cli
    from physisforcing.core.video import probe_mp4
    from physisforcing.worldmodel.backbones.folder import save_settings
    from physisforcing.worldmodel.paper_generate import PaperConfig, PaperGenerator
    from physisforcing.worldmodel.pipeline_vae import picture_tensor

    folder, taught, picture = tmp_path / "t2v", tmp_path / "export" / "transformer", tmp_path / "first.png"
    WanPipeline(
        **tiny_paper.umt5(),
        vae=tiny_paper.vae(16, 8),
        scheduler=tiny_paper.unipc(3.0),
        transformer=tiny_paper.wan_transformer(16, 16, 5),
        transformer_2=tiny_paper.wan_transformer(16, 16, 7),
        boundary_ratio=0.875,
    ).save_pretrained(folder)
    tiny_paper.wan_transformer(16, 16, 6).save_pretrained(taught)
    Image.fromarray(tiny_paper.picture()).save(picture)
    words = [f"model={folder}", f"image={picture}", "prompt=press the bell", "size=64x96", "frames=9", "steps=2"]
    words += [f"out={tmp_path / 'made.mp4'}", "experts=high"]

    def refused(*more: str) -> str:
        assert cli.main(["generate", *words, *more]) == 2
        return capsys.readouterr().err

    for more in ((), (f"transformer={taught}",)):
        assert "its transformer takes no first frame" in refused(*more)
    save_settings(taught, first_latent="pinned", tap=1)
    assert "experts=high" in refused(f"transformer={taught}", "experts=both")
    assert cli.main(["generate", *words, f"transformer={taught}"]) == 0
    assert (probe_mp4(tmp_path / "made.mp4").frames, probe_mp4(tmp_path / "made.mp4").fps) == (9, 16.0)
    settings = {"transformer": str(taught), "experts": "high", "text_cache": tmp_path, "height": 64, "width": 96}
    usual = PaperGenerator(folder, PaperConfig(**settings))
    assert (usual.kind, usual.frames, usual.fps, usual.sampler.sampler) == ("a14b_one", 81, 16.0, "euler")
    made = PaperGenerator(folder, PaperConfig(**settings, frames=9, steps=2))
    latents = our_latents(made, [3])[0]
    shown = picture_tensor(tiny_paper.picture(), tiny_paper.HEIGHT, tiny_paper.WIDTH, crop=False)
    first = made.vae.encode_first(made.experts.high, shown, made.frames)["first_BC1hw"]
    assert torch.equal(latents[:, :, :1], first) and latents[:, :, 1:].isfinite().all()
    assert "first latent pinned" in made.describe()
