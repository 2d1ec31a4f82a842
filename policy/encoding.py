"""What a policy's transformer reads of the world: the first latent frame of a canvas, and token embeddings of a sentence."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.paths import weights_root
from physisforcing.worldmodel.codec import load_codec
from physisforcing.worldmodel.data.batches import bank_latents
from physisforcing.worldmodel.first_frame import FirstFrameEncoder
from physisforcing.worldmodel.pipeline_vae import PipelineVae, load_vae
from physisforcing.worldmodel.storage import latents_fingerprint
from physisforcing.worldmodel.text import ENCODER, TextEmbedder

from .backbone import autoencoder_in
from .checkpoint import INSTRUCTION, PolicyInfo

#: Sentences whose embeddings stay on the device.
MOST_SENTENCES = 256
TEXT_ENCODERS = (ENCODER, "umt5-xxl")

#: Canvas [B,H,W,3] uint8 on the device -> normalised latents [B,C,1,h,w] float32.
FirstFrame = Callable[[Tensor], Tensor]


def autoencoder_folder(info: PolicyInfo, source: str, policy: Path) -> Path:
    """Where the policy's autoencoder lies: ``source`` (its folder, or a pipeline folder with ``vae/``), else ``vae/`` in the policy's own folder,
    else the one in the package. ``UserError`` unless its latents are those that the policy was trained on."""
    folder = autoencoder_in(Path(source) if source else policy)
    if not source and folder == policy:
        folder = weights_root() / "vae"
    found = latents_fingerprint(folder)
    if found != info.latents:
        got = f"latents {found} of {folder.parent.name}/{folder.name}"
        fix = f"policy.autoencoder=<the folder of the autoencoder it was trained with, {info.autoencoder}>"
        raise UserError("policy.autoencoder", got=got, wanted=f"latents {info.latents}", fix=fix)
    return folder


def open_first_frame(
    folder: Path,
    device: torch.device,
    *,
    small: bool,
    stored: torch.dtype | None = None,
    fast: bool = False,
    half: bool = False,
) -> FirstFrame:
    """The encoder of single pictures, as the latents of the training were made. ``small``: of a model that was trained on a ``WindowBank``, which
    has one way only; otherwise see ``first_frame_by``. ``UserError`` for ``half`` of a small model's."""
    if small:
        if half:
            wanted = "false: the small models' autoencoder computes on a GPU in bfloat16 as it is"
            raise UserError("policy.autoencoder_half", got=True, wanted=wanted, fix="leave it out")
        codec = load_codec(folder, device)
        return lambda canvas_BHWC: bank_latents(codec, canvas_BHWC.unsqueeze(1)).float()
    return first_frame_by(load_vae(folder), device, stored, fast=fast, half=half)


def first_frame_by(
    vae: PipelineVae,
    device: torch.device,
    stored: torch.dtype | None = None,
    *,
    fast: bool = False,
    half: bool = False,
) -> FirstFrame:
    """The same of an autoencoder of a large pipeline, which goes to the device: in its own precision, as ``physis data latents`` makes them.
    ``stored``: the type in which the windows of the training were stored; None where nothing says it. ``fast``: without what meets
    no picture (``worldmodel.first_frame``), compiled on a GPU; otherwise as a video of one. ``half``: in bfloat16, to which ``vae`` changes."""
    if half:
        vae.vae.to(torch.bfloat16)
    vae.vae.to(device)
    vae.scale.to(device)
    single = FirstFrameEncoder(vae, compiled=device.type == "cuda") if fast else None

    def encode(canvas_BHWC: Tensor) -> Tensor:
        picture = canvas_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        made = vae.encode(picture.unsqueeze(2)) if single is None else single(picture)
        return made if stored is None else made.to(stored).float()

    return encode


class Sentences:
    """Token embeddings on the device, zeros behind the sentence; each sentence is embedded once.

    A policy that was trained here says what its sentences were made by: the encoder, its precision, and how far they were padded, on which the
    last bits depend. ``source``: for UMT5, a pipeline folder with ``tokenizer/`` and ``text_encoder/``. ``store=False``: no files are written,
    for sentences of strangers. ``UserError`` for an encoder that is not known, makes another width or is not the one
    of the training, and for a sentence that is longer than those of the training could be. A released policy's encoder cuts it with a warning,
    as does that of the small models.

    ``small``: the sentences are those of the small models. ``stored``: the type in which the windows of a large one were stored, if known.
    """

    def __init__(self, info: PolicyInfo, source: str, width: int, device: torch.device, *, store: bool = True) -> None:
        name = str(info.text.get("encoder", ENCODER))
        if name not in TEXT_ENCODERS:
            raise unknown_name("policy.json: text.encoder", name, TEXT_ENCODERS, see="docs/policy.md")
        if int(info.text.get("width", width)) != width:
            fix = "export or convert the policy again"
            raise UserError("policy.json: text.width", got=info.text["width"], wanted=width, fix=fix)
        self._template = str(info.text.get("template", INSTRUCTION))
        self._device, self._kept = device, dict[str, Tensor]()
        self._lock = threading.Lock()  # of the encoder, which may take seconds
        self._embed: Any
        self._tokens: int | None = None
        self.small = name == ENCODER
        self.stored: torch.dtype | None = None
        if self.small:
            self._embed = TextEmbedder(store=store)
            return
        if not source:
            fix = "policy.autoencoder=<the Wan pipeline folder, with vae, tokenizer and text_encoder>"
            raise UserError("policy.autoencoder", got="", wanted="the folder of the UMT5 encoder", fix=fix)
        self._tokens = int(info.text["tokens"])
        self._embed = _like_in_training(source, info.text, store)
        self.stored = self._embed.dtype if "fingerprint" in info.text else None

    def prepare(self, instructions: Sequence[str]) -> None:
        """Embed those that are new, on the CPU; the device is left alone, on which another thread may be capturing."""
        for sentence in dict.fromkeys(instructions):
            if sentence not in self._kept:
                with self._lock:
                    self._check(sentence)

    def batch(self, instructions: Sequence[str]) -> Tensor:
        """[B,L,D] float32 on the device. One call at a time."""
        return torch.stack([self._one(sentence) for sentence in instructions])

    def _check(self, sentence: str) -> None:
        """Embed it. ``UserError`` where it is too long."""
        length = len(self._embed.tokens(self._worded(sentence)))
        if self._tokens is not None and length > self._tokens:
            got, wanted = f"{sentence[:60]!r}... of {length} tokens", f"at most {self._tokens}, as in its training"
            fix = "say it in fewer words, or train a policy with a larger text_tokens"
            raise UserError("instruction", got=got, wanted=wanted, fix=fix)

    def _worded(self, sentence: str) -> str:
        return self._template.replace(INSTRUCTION, sentence)

    def _one(self, sentence: str) -> Tensor:
        if sentence not in self._kept:
            if len(self._kept) >= MOST_SENTENCES:
                del self._kept[next(iter(self._kept))]
            with self._lock:
                self._check(sentence)
                made = self._embed.batch([self._worded(sentence)])
            tokens = (made[0] if isinstance(made, tuple) else made)[0]
            self._kept[sentence] = tokens[: self._tokens].float().to(self._device)
        return self._kept[sentence]


def _like_in_training(source: str, text: Mapping[str, Any], store: bool) -> Any:
    """The UMT5 encoder as the windows' sentences were made by it. A released policy says no ``fingerprint``: it has bfloat16 ones."""
    from physisforcing.worldmodel.text_encoders import UMT5Text

    length, wanted = int(text.get("padded", text["tokens"])), text.get("fingerprint")
    made = [UMT5Text(source, max_tokens=length, dtype=dtype, store=store) for dtype in (torch.bfloat16, torch.float32)]
    if wanted is None:
        return made[0]
    for one in made:
        if one.fingerprint == wanted:
            return one
    got = f"{Path(source).name}, with the text encoder {made[0].fingerprint}"
    fix = "policy.autoencoder=<the pipeline folder that the policy was trained with>"
    raise UserError("policy.autoencoder", got=got, wanted=f"the text encoder {wanted}", fix=fix)
