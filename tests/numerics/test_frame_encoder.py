"""EfficientNet-Lite0: our network against an independent reconstruction from the published tensors, and against a photograph."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.teachers import frame_encoder
from physisforcing.worldmodel.teachers.frame_encoder import EfficientNetLite0, FrameEncoder, load_network


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    try:
        path = frame_encoder.packaged_weights()
    except UserError as error:
        pytest.skip(str(error))
    return {k: v.double() for k, v in torch.load(path, map_location="cpu", weights_only=True).items()}


def _conv(state: dict, name: str, x: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
    """TensorFlow's "same": output ceil(n / stride), the odd pixel of padding behind."""
    weight = state[f"{name}.weight"]
    kernel = weight.shape[-1]
    pads = []
    for n in (x.shape[3], x.shape[2]):
        need = max((math.ceil(n / stride) - 1) * stride + kernel - n, 0)
        pads += [need // 2, need - need // 2]
    return nnf.conv2d(nnf.pad(x, pads), weight, stride=stride, groups=groups)


def _norm(state: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    scale = state[f"{name}.weight"] / torch.sqrt(state[f"{name}.running_var"] + 1e-3)
    shift = state[f"{name}.bias"] - state[f"{name}.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def reconstruction(state: dict, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(stride-16 features, logits), reading the architecture off the published names and shapes."""
    x = _norm(state, "_bn0", _conv(state, "_conv_stem", x, 2)).clamp(0, 6)
    strided = {1, 3, 5, 11}  # first blocks of the stages with stride 2
    features = x
    for block in range(16):
        unit, entered = f"_blocks.{block}", x
        if f"{unit}._expand_conv.weight" in state:
            x = _norm(state, f"{unit}._bn0", _conv(state, f"{unit}._expand_conv", x)).clamp(0, 6)
        x = _conv(state, f"{unit}._depthwise_conv", x, 2 if block in strided else 1, groups=x.shape[1])
        x = _norm(state, f"{unit}._bn1", x).clamp(0, 6)
        x = _norm(state, f"{unit}._bn2", _conv(state, f"{unit}._project_conv", x))
        if x.shape == entered.shape:
            x = x + entered
        if block == 10:
            features = x
    x = _norm(state, "_bn1", _conv(state, "_conv_head", x)).clamp(0, 6).mean((2, 3))
    return features, x @ state["_fc.weight"].T + state["_fc.bias"]


@pytest.mark.parametrize("size", [(240, 320), (96, 64)])
def test_against_an_independent_reconstruction(published: dict, size: tuple[int, int]) -> None:
    frames = torch.randint(0, 256, (1, *size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    picture = ((frames.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    features, logits = reconstruction(published, picture)
    ours = FrameEncoder()(frames)
    assert ours.shape == (1, 112, size[0] // 16, size[1] // 16)
    assert (ours - features).abs().max() < 1e-4 * features.abs().max()
    with torch.no_grad():
        assert (load_network()(picture.float()) - logits).abs().max() < 1e-3


def test_every_published_tensor_is_used_once(published: dict) -> None:
    state = frame_encoder.renamed(published)
    assert len(state) == len(published)
    assert set(state) == set(EfficientNetLite0().state_dict())
    with pytest.raises(KeyError):
        frame_encoder.renamed({**published, "extra": torch.zeros(1)})
    with pytest.raises(KeyError):
        frame_encoder.renamed({k: v for k, v in published.items() if k != "_fc.bias"})


def test_it_recognises_a_photograph() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from PIL import Image

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not path.is_file():
        pytest.skip("matplotlib's sample pictures are not installed")
    picture = np.asarray(Image.open(path).convert("RGB").crop((0, 0, 512, 512)).resize((224, 224)), np.float32) / 255
    picture = (picture - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        probability = load_network()(torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None]).softmax(-1)[0]
    assert probability.argmax() == 652, "ImageNet class 652: military uniform"
    assert probability[652] > 0.3


def test_conversion_checks_the_checksum(tmp_path: Path) -> None:
    wrong = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, wrong)
    with pytest.raises(UserError, match="checksum"):
        frame_encoder.convert(wrong, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_teacher_is_frozen() -> None:
    encoder = FrameEncoder()
    encoder.train()
    assert not encoder.training and not encoder.network.training
    assert not any(p.requires_grad for p in encoder.parameters())
    with pytest.raises(UserError, match="multiples of 16"):
        encoder(torch.zeros(1, 100, 320, 3, dtype=torch.uint8))
