"""What the trainer asks of the network that it trains: our small models and the large backbones look alike to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ..backbones.protocol import VideoBackbone, first_predicted
from ..flow_matching import add_noise


class Denoiser(Protocol):
    """A velocity predictor over a stock diffusers transformer; an ``nn.Module`` too.

    ``tap``, ``width``: block (counted from 1) whose output the physics losses read, and its width. ``patch``: latent frames, rows and
    columns of a token. ``first_predicted``: first latent frame that is not given. ``run_block(block, *inputs)`` calls a block; the trainer
    puts something else there to recompute activations.
    """

    transformer: Any
    tap: int
    first_predicted: int
    lora_targets: tuple[str, ...]
    run_block: Callable[..., Any]

    @property
    def blocks(self) -> nn.ModuleList: ...

    @property
    def width(self) -> int: ...

    @property
    def patch(self) -> tuple[int, int, int]: ...

    def whole_parts(self) -> list[nn.Module]:
        """Trained modules that every process keeps whole."""
        ...

    def compile_blocks(self) -> None:
        """Compile the blocks."""
        ...

    def predict(
        self, batch: Mapping[str, Any], noise_BCFhw: Tensor, sigma_B: Tensor, *, need_tap: bool
    ) -> tuple[Tensor, Tensor | None]:
        """-> (velocity like the batch's ``latents_BCFhw``, output of block ``tap`` [B,L,D] or None) at noise levels ``sigma_B``."""
        ...


class BackboneDenoiser(nn.Module):
    """A ``VideoBackbone`` as the trainer and the sampler see it: called, it is the backbone.

    A batch has ``latents_BCFhw``, ``text`` (embeddings [B,L,D] or ids [B,L]) and, for a backbone with conditioning channels,
    ``condition_BCFhw``.
    """

    def __init__(self, backbone: VideoBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.first_predicted = first_predicted(backbone)

    def __getattr__(self, name: str) -> Any:
        # what the backbone has and the module has not: its protocol's attributes
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("backbone"), name)

    @property
    def run_block(self) -> Callable[..., Any]:
        return self.backbone.run_block

    @run_block.setter
    def run_block(self, run: Callable[..., Any]) -> None:
        self.backbone.run_block = run

    def whole_parts(self) -> list[nn.Module]:
        return []

    def compile_blocks(self) -> None:
        for block in self.backbone.blocks:
            block.compile(dynamic=False)

    def predict(
        self, batch: Mapping[str, Any], noise_BCFhw: Tensor, sigma_B: Tensor, *, need_tap: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See ``Denoiser``."""
        x0, text = batch["latents_BCFhw"], batch["text"]
        shown = self.backbone.conditions(x0[:, :, :1], text, x0.shape[2], condition_BCFhw=batch.get("condition_BCFhw"))
        noisy = add_noise(x0, noise_BCFhw, sigma_B, first=self.first_predicted)
        return self(noisy, sigma_B, text, shown, need_tap=need_tap)

    def forward(self, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """See ``VideoBackbone``. Sharded weights outside the blocks are put together by this call."""
        return self.backbone(*inputs, **options)
