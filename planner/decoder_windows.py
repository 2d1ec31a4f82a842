"""Windows of demonstrations with everything that the frozen world model and the decoders read of them, on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from physisforcing.core.errors import DatasetError, MissingCapabilityError, UserError
from physisforcing.core.types import DT, FeatureRequest, WorldModelSpec
from physisforcing.worldmodel.features import check_features, denoiser_features
from physisforcing.worldmodel.flow_matching import add_noise, frame_timesteps
from physisforcing.worldmodel.model import FlowWorldModel

from .feature_decoder.goal import TextEncoder, embed_goals
from .frame_store import FrameStore


@dataclass(slots=True, kw_only=True)
class DecoderWindows:
    """A store with ``frames`` pictures ``stride`` control steps apart a window. ``goal_SLD``, ``goal_keep_SL``: one row a different
    sentence, ``sentence_E`` says which an episode has. Windows are (episode, start) pairs of int64 tensors on the store's device."""

    store: FrameStore
    frames: int
    stride: int
    goal_SLD: Tensor
    goal_keep_SL: Tensor
    sentence_E: Tensor

    @classmethod
    def build(
        cls, store: FrameStore, text: TextEncoder, *, frames: int, stride: int, tokens: int, prompt: str
    ) -> DecoderWindows:
        """Embeds every sentence of the store once. Raises ``DatasetError`` for a store without instructions."""
        if len(store.instructions_E) != store.episodes:
            fix = "load it with load_frame_store"
            raise DatasetError("data", got="episodes without instructions", wanted="one an episode", fix=fix)
        sentences = sorted(set(store.instructions_E))
        place = {sentence: number for number, sentence in enumerate(sentences)}
        device = store.first_E.device
        goal, keep = embed_goals(text, sentences, prompt, tokens)
        sentence = torch.tensor([place[s] for s in store.instructions_E], device=device)
        goal, keep = goal.to(device), keep.to(device)
        return cls(store=store, frames=frames, stride=stride, goal_SLD=goal, goal_keep_SL=keep, sentence_E=sentence)

    def goal(self, episode_B: Tensor) -> tuple[Tensor, Tensor]:
        """Instruction tokens [B,L,D] and their mask."""
        sentence = self.sentence_E[episode_B]
        return self.goal_SLD[sentence], self.goal_keep_SL[sentence]

    def rows(self, episode_B: Tensor, start_B: Tensor, *, measured: bool = False) -> Tensor:
        """Targets [B,R,A] of the window's control steps from the start itself (row 0 is the pose now); past the end the last row
        repeats. ``measured``: where the joints really were at those times. ``DatasetError`` where that was not recorded."""
        store = self.store
        values = store.measured_NA if measured else store.states_NA
        if values is None:
            fix = "collect with physis data collect, which records observation.state_measured"
            raise DatasetError("data", got="no measured joints", wanted="observation.state_measured", fix=fix)
        steps = torch.arange((self.frames - 1) * self.stride + 1, device=start_B.device)
        last = store.length_E[episode_B] - 1
        at = torch.minimum(start_B[:, None] + steps, last[:, None])
        return values[store.first_E[episode_B][:, None] + at]

    def proprioception(self, episode_B: Tensor, start_B: Tensor, lags: Sequence[int]) -> Tensor:
        """Drive targets [B,K,A] so many control steps before the start, clamped to the episode's first."""
        before = torch.tensor(lags, device=start_B.device)
        at = (start_B[:, None] - before).clamp_min(0)
        return self.store.states_NA[self.store.first_E[episode_B][:, None] + at]

    def pictures(self, episode_B: Tensor, start_B: Tensor) -> Tensor:
        """uint8 [B,T,H,W,3]."""
        return self.store.windows(episode_B, start_B, frames=self.frames, stride=self.stride)[0]

    def first_pictures(self, episode_B: Tensor, start_B: Tensor) -> Tensor:
        """uint8 [B,1,H,W,3]."""
        return self.store.frames_NHWC[self.store.first_E[episode_B] + start_B][:, None]


class FrozenWorldModel:
    """What decoders are trained on, from a world model that is not trained with them. ``words`` has the instructions as the model
    itself reads them (its decoder may cut them elsewhere)."""

    def __init__(self, model: FlowWorldModel, windows: DecoderWindows) -> None:
        spec = model.spec
        if "actions" in spec.conditions:
            got, fix = "an action model", "train decoders on a text model"
            raise MissingCapabilityError("world_model", got=got, wanted="a model without actions", fix=fix)
        check_windows(windows, spec)
        self.model, self.windows, self.latents = model, windows, 1 + (windows.frames - 1) // 4
        sentences = sorted(set(windows.store.instructions_E))
        self.words_SLD = model.text.batch(sentences)[0].to(windows.sentence_E.device)

    @torch.no_grad()
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent frame, measured on one picture."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.windows.store.first_E.device)
        _, channels, _, height, width = self.model.codec.encode(self.windows.first_pictures(zero, zero)).shape
        return channels, height, width

    @property
    def text(self) -> TextEncoder:
        """What embeds instructions for the model, and for decoders that read them."""
        return self.model.text

    def feature_shape(self, request: FeatureRequest) -> tuple[int, int, int, int]:
        """(F, h, w, D) of one tap."""
        _, rows, columns = self.latent_shape()
        sizes = self.model.denoiser.transformer.config
        _, high, wide = sizes.patch_size
        return self.latents, rows // high, columns // wide, sizes.num_attention_heads * sizes.attention_head_dim

    def check_window(self, frames: int, steps_per_frame: int, *, field: str) -> None:
        """See ``check_window``."""
        check_window(self.windows, frames, steps_per_frame, field=field)

    @torch.no_grad()
    def features(
        self, episode_B: Tensor, start_B: Tensor, request: FeatureRequest, generator: torch.Generator
    ) -> Tensor:
        """Features [B,K,F,h,w,D] of the first picture of each window, with fresh noise."""
        check_features(request, self.model.spec.blocks)
        first = self.model.codec.encode(self.windows.first_pictures(episode_B, start_B))
        shape = (len(first), first.shape[1], self.latents, *first.shape[3:])
        noise = torch.randn(shape, generator=generator, device=generator.device).to(first.device)
        context = self._context(episode_B, start_B)
        return denoiser_features(self.model.denoiser.transformer, first, noise, context, request)

    @torch.no_grad()
    def one_step(
        self, latents_BCFhw: Tensor, episode_B: Tensor, start_B: Tensor, sigma_B: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Real latents made noisy at ``sigma_B`` and denoised in one step: what an imagination near them looks like."""
        noise = torch.randn(latents_BCFhw.shape, generator=generator, device=generator.device).to(latents_BCFhw.device)
        noisy = add_noise(latents_BCFhw, noise, sigma_B)
        timesteps = frame_timesteps(sigma_B, latents_BCFhw.shape[2])
        velocity = self.model.denoiser(noisy, timesteps, self._context(episode_B, start_B))[0]
        made = noisy - sigma_B.view(-1, 1, 1, 1, 1) * velocity.float()
        return torch.cat([latents_BCFhw[:, :, :1], made[:, :, 1:]], dim=2)

    def _context(self, episode_B: Tensor, start_B: Tensor) -> Tensor:
        lags = self.model.spec.proprioception_lags
        state = self.windows.proprioception(episode_B, start_B, lags)
        return self.model.denoiser.context(self.words_SLD[self.windows.sentence_E[episode_B]], state)


def check_windows(windows: DecoderWindows, spec: WorldModelSpec) -> None:
    """``MissingCapabilityError`` where the world model does not imagine windows of this length, ``UserError`` where the demonstrations'
    windows have another rate than its frames."""
    if windows.frames not in spec.horizons:
        fix = f"model.frames={spec.horizons[0]}"
        raise MissingCapabilityError("frames", got=windows.frames, wanted=f"one of {spec.horizons}", fix=fix)
    if abs(windows.stride * DT - spec.frame_dt) <= 1e-6:
        return
    whole = round(spec.frame_dt / DT)
    fits = whole >= 1 and abs(whole * DT - spec.frame_dt) <= 1e-6
    raise UserError(
        "model.steps_per_frame",
        got=f"{windows.stride}: a picture every {windows.stride * DT:.4g} s",
        wanted=f"every {spec.frame_dt:.4g} s, as {spec.name} imagines",
        fix=f"model.steps_per_frame={whole}" if fits else "use a world model with whole control steps a frame",
    )


def check_window(windows: DecoderWindows, frames: int, steps_per_frame: int, *, field: str) -> None:
    """``UserError`` where a decoder's window is another one than the demonstrations are cut to."""
    for name, got, wanted in (
        ("frames", frames, windows.frames),
        ("steps_per_frame", steps_per_frame, windows.stride),
    ):
        if got != wanted:
            fix = f"{field}.{name}={wanted}"
            raise UserError(f"{field}.{name}", got=got, wanted=f"{wanted}, as the windows have", fix=fix)
