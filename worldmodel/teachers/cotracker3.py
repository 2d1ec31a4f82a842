"""CoTracker3 (offline) as point tracker: the user's own copy of the code and of the checkpoint, checked and run unmodified.

Neither code nor weights are part of this package: both are CC-BY-NC-4.0 (https://github.com/facebookresearch/co-tracker,
https://huggingface.co/facebook/cotracker3), and nothing is ever downloaded. The code comes from an installed package ``cotracker`` or
from a folder; the inner model is called instead of the public predictor, because that one drops the confidence.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn

from physisforcing.core.errors import UserError

from .classical import check_request
from .protocols import TeacherInfo, Tracks

#: Part of every cache key: raise it when tracks of the same weights change.
VERSION = "1"
LICENCE = "CC-BY-NC-4.0"
#: SHA-256 of ``scaled_offline.pth``, as its page in the authors' repository facebook/cotracker3 on the Hugging Face hub states it.
PUBLISHED_SHA256 = "2670d4562ed69326dda775a26e54883925cd11b6fc9b24cb7aa9f8078bce7834"
#: Frames of the temporal embedding that the checkpoint was trained with; the model interpolates it to any other length.
WINDOW = 60
ITERATIONS = 6
#: The public offline predictor calls a point visible above this probability, without regard to the confidence (its online
#: sibling takes the product of the two and 0.6).
VISIBLE_ABOVE = 0.9
#: The public predictor adds a regular grid of 6x6 points of its own to queries, which the attention across tracks sees.
SUPPORT = 6

_PACKAGE = "cotracker"
_MODULE = "cotracker.models.core.cotracker.cotracker3_offline"
_MODULE_FILE = Path(*_MODULE.split(".")).with_suffix(".py")
_WHERE = "git clone https://github.com/facebookresearch/co-tracker and give that folder as source"


class CoTracker3:
    """``PointTracker`` around ``CoTrackerThreeOffline``.

    ``checkpoint``: the authors' ``scaled_offline.pth`` or another one of the same architecture, with its ``sha256`` (default: that
    of the published file). ``source``: folder that contains the package ``cotracker``; None takes the installed one. In float32;
    ``fast_cotracker.FastCoTracker3`` runs the same weights in half precision.

    Raises ``UserError`` for a missing or other file, another checksum, weights that do not fit, a missing or other source.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        sha256: str = PUBLISHED_SHA256,
        *,
        source: str | Path | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        network_class = import_model(source)
        state = read_checkpoint(Path(checkpoint), sha256)
        network = _build(network_class, seed=0)
        try:
            network.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise UserError(
                "checkpoint",
                got=f"{checkpoint}: {str(error).splitlines()[-1].strip()}",
                wanted=f"the parameters of CoTracker3 offline with window {WINDOW}",
                fix="use scaled_offline.pth",
            ) from error
        info = TeacherInfo(name="cotracker3", version=VERSION, licence=LICENCE, checksum=sha256.lower())
        self._set(network, info, device)

    @classmethod
    def with_random_weights(
        cls,
        seed: int = 0,
        *,
        source: str | Path | None = None,
        device: str | torch.device = "cpu",
    ) -> CoTracker3:
        """The real architecture with fresh weights, which tracks nothing: for tests and for timing."""
        tracker = cls.__new__(cls)
        info = TeacherInfo(name="cotracker3_random", version=f"{VERSION}-seed{seed}", licence=LICENCE)
        tracker._set(_build(import_model(source), seed), info, device)
        return tracker

    def _set(self, network: nn.Module, info: TeacherInfo, device: str | torch.device) -> None:
        self._info, self._device = info, torch.device(device)
        self.network = network.requires_grad_(False).eval().to(self._device)

    @property
    def info(self) -> TeacherInfo:
        return self._info

    def track(self, video_BTHWC: Tensor, queries_BN2: Tensor) -> Tracks:
        """``PointTracker.track`` for any number of frames, all at once; the answer is on the video's device.

        A point is visible where the model's visibility is above 0.9. That is what the public offline predictor does: it drops the
        confidence, which is handed out beside it here, the model's probability that the place is right (the public online predictor
        takes the product of the two, above 0.6). As there, queries are tracked together with a support grid, frame 0 gets its
        queries back, and is visible; here its confidence is 1 too. Raises ``UserError`` for another dtype or shape.
        """
        return track_clips(self._track, video_BTHWC, queries_BN2)

    def _track(self, frames_THWC: Tensor, queries_N2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> points [T,N,2] in the pixels of the frames, visibility and confidence [T,N] in [0,1]; float32."""
        working = tuple(int(side) for side in self.network.model_resolution)
        height, width = frames_THWC.shape[1:3]
        # Corners go to corners (align_corners=True), in the points as in the pictures.
        ratio = torch.tensor([(working[1] - 1) / (width - 1), (working[0] - 1) / (height - 1)], device=self._device)
        places = torch.cat([queries_N2.to(self._device) * ratio, support_grid(working, self._device)])
        queries = nnf.pad(places, (1, 0))  # all of frame 0
        points, visible, confidence, _ = self.network(
            video=self._resized(frames_THWC, working)[None], queries=queries[None], iters=ITERATIONS
        )
        count = len(queries_N2)
        points = points[0, :, :count].float() / ratio
        return points, visible[0, :, :count].float(), confidence[0, :, :count].float()

    def _resized(self, frames_THWC: Tensor, working: tuple[int, ...]) -> Tensor:
        """float32 [T,3,384,512] in 0-255, which the network normalises itself."""
        frames_TCHW = rearrange(frames_THWC.to(self._device), "t h w c -> t c h w").float()
        return nnf.interpolate(frames_TCHW, working, mode="bilinear", align_corners=True)


@torch.no_grad()
def track_clips(
    track: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], video_BTHWC: Tensor, queries_BN2: Tensor
) -> Tracks:
    """``PointTracker.track`` of CoTracker3, plain or fast. ``track``: frames [T,H,W,3] and queries [N,2] of one clip -> points [T,N,2],
    visibility and confidence [T,N]. One clip at a time: the published model views an expanded tensor, which torch refuses for more."""
    check_request(video_BTHWC, queries_BN2)
    size = (int(video_BTHWC.shape[2]), int(video_BTHWC.shape[3]))
    if min(size) < 2:
        raise UserError("video", got=f"{size[0]}x{size[1]}", wanted="2 pixels or more a side", fix="check the crop")
    with torch.autocast(video_BTHWC.device.type, enabled=False):
        clips = [track(frames, queries) for frames, queries in zip(video_BTHWC, queries_BN2, strict=True)]
    points, visible, confidence = (torch.stack(part).to(video_BTHWC.device) for part in zip(*clips, strict=True))
    points[:, 0], visible[:, 0], confidence[:, 0] = queries_BN2.to(points), 1.0, 1.0
    return Tracks(points_BTN2=points, visible_BTN=visible > VISIBLE_ABOVE, confidence_BTN=confidence)


def support_grid(size: tuple[int, ...], device: torch.device) -> Tensor:
    """The public predictor's extra queries: 6x6 points [36,2] from margin to margin (a 64th of the width), row order."""
    margin = size[1] / 64
    y, x = (torch.linspace(margin, side - margin, SUPPORT, device=device) for side in size[:2])
    return torch.stack([x.repeat(SUPPORT), y.repeat_interleave(SUPPORT)], -1)


def read_checkpoint(path: Path, sha256: str) -> dict[str, Tensor]:
    """State dict of a checkpoint whose bytes have this SHA-256."""
    sha256 = sha256.lower()
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise UserError("sha256", got=sha256, wanted="64 hexadecimal digits", fix=f"run sha256sum {path.name}")
    if not path.is_file():
        raise UserError(
            "checkpoint",
            got=str(path),
            wanted="a CoTracker3 offline checkpoint on this disk",
            fix="get scaled_offline.pth from https://huggingface.co/facebook/cotracker3 (CC-BY-NC-4.0)",
        )
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        fix = f"get {path.name} again, or give the sha256 of the checkpoint that you mean"
        raise UserError("checksum", got=digest, wanted=sha256, fix=fix)
    return convert(content, path)


def convert(content: bytes, path: Path) -> dict[str, Tensor]:
    """The bytes of a published checkpoint, whose checksum was compared -> its state dict, by torch's restricted unpickler. Nothing is
    kept on disk: a converted copy would have to be trusted. ``path``: for messages."""
    try:
        # the bytes that were checked, not the file again
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of the unpickler, whose module is not imported here, or of the archive
        got = f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise UserError("checkpoint", got=got, wanted="a PyTorch state dict", fix="use scaled_offline.pth") from error
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError("checkpoint", got=str(path), wanted="a PyTorch state dict", fix="use scaled_offline.pth")
    return state


def import_model(source: str | Path | None = None) -> type[nn.Module]:
    """``CoTrackerThreeOffline`` of the installed package, or of the package in folder ``source``, without touching ``sys.path``.

    A process has one ``cotracker``: a second folder is a ``UserError``, as are a missing package and a folder of something else.
    """
    folder = None if source is None else Path(source).expanduser().resolve()
    if folder is not None and not (folder / _MODULE_FILE).is_file():
        raise UserError("source", got=str(folder), wanted=f"a folder with {_MODULE_FILE}", fix=_WHERE)
    loaded = sys.modules.get(_PACKAGE)
    if loaded is not None and folder is not None and folder / _PACKAGE != _home(loaded):
        fix = "use one copy of CoTracker a process"
        raise UserError("source", got=str(folder), wanted=f"the copy that is loaded, {_home(loaded)}", fix=fix)
    if loaded is None and folder is None and importlib.util.find_spec(_PACKAGE) is None:
        raise UserError("CoTracker", got="no package cotracker", wanted="an installed one or its source", fix=_WHERE)
    if _MODULE not in sys.modules:
        _import(folder / _PACKAGE if loaded is None and folder is not None else None)
    network_class: type[nn.Module] = sys.modules[_MODULE].CoTrackerThreeOffline
    return network_class


def _import(folder: Path | None) -> None:
    """Import the model's module, with its package from ``folder`` if one is given. A failure leaves ``sys.modules`` as it was."""
    before = set(sys.modules)
    try:
        with _random_state_kept():
            if folder is not None:
                _load_package(folder)
            importlib.import_module(_MODULE).CoTrackerThreeOffline  # noqa: B018  (another package of that name lacks it)
    except (ImportError, AttributeError) as error:
        for name in set(sys.modules) - before:
            if name.split(".")[0] == _PACKAGE:
                del sys.modules[name]
        raise UserError("CoTracker", got=str(error), wanted="the code of CoTracker3", fix=_WHERE) from error


def _load_package(folder: Path) -> None:
    """Put the package of this folder in ``sys.modules``; its modules import each other by absolute names."""
    spec = importlib.util.spec_from_file_location(
        _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = package
    try:
        spec.loader.exec_module(package)
    except OSError as error:
        raise ImportError(f"{folder / '__init__.py'}: {error.strerror}") from error


def _home(package: ModuleType) -> Path:
    return Path(next(iter(getattr(package, "__path__", ())), package.__file__ or "")).resolve()


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """CoTracker's modules seed torch's global generators with 0 when they are imported; nobody should notice."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield
    if not torch.cuda.is_initialized():
        # A GPU that starts later would run the seeding that was put off; this puts the caller's seed after it.
        torch.cuda.manual_seed_all(torch.initial_seed())


def _build(network_class: type[nn.Module], seed: int) -> nn.Module:
    """The published hyperparameters, with weights drawn from ``seed``."""
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        return network_class(stride=4, corr_radius=3, window_len=WINDOW)
