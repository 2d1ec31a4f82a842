"""Is the task done at the end of this video? A small network on the first, middle and last picture, one answer a task."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.worldmodel.storage import read_json, save_tensors

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"


@dataclass(slots=True, kw_only=True)
class SuccessConfig:
    """``tasks``: which have a head, in order. Pictures of ``height`` x ``width``; ``channels`` of the three halvings."""

    tasks: tuple[str, ...] = ()
    height: int = 120
    width: int = 160
    channels: tuple[int, int, int] = (24, 48, 96)
    hidden: int = 96


def _block(inside: int, outside: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, kernel, stride=2, padding=kernel // 2), nn.GroupNorm(8, outside), nn.SiLU()
    )


class SuccessClassifier(nn.Module):
    """``forward(pictures_B3HWC uint8, task_B)`` gives one logit an entry; ``probability`` is the calibrated answer.

    The three pictures and the difference of last and first are looked at together, so that a change is seen where it happens.
    ``temperature`` belongs to the weights: it is fitted on held-out episodes.
    """

    temperature: Tensor

    def __init__(self, config: SuccessConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third = config.channels
        self.body = nn.Sequential(_block(12, first, 5), _block(first, second, 3), _block(second, third, 3))
        self.mix = nn.Sequential(nn.Conv2d(third, third, 3, padding=1), nn.GroupNorm(8, third), nn.SiLU())
        self.head = nn.Sequential(
            nn.Linear(2 * third, config.hidden), nn.SiLU(), nn.Linear(config.hidden, len(config.tasks))
        )
        self.register_buffer("temperature", torch.ones(()))
        self.fingerprint = "untrained"

    def forward(self, pictures_B3HWC: Tensor, task_B: Tensor) -> Tensor:
        x = pictures_B3HWC.float().permute(0, 1, 4, 2, 3) / 127.5 - 1.0
        both = torch.cat([x.flatten(1, 2), x[:, 2] - x[:, 0]], dim=1)
        seen = self.body(both.contiguous(memory_format=torch.channels_last))
        seen = seen + self.mix(seen)
        pooled = torch.cat([seen.mean((2, 3)), seen.amax((2, 3))], dim=1)
        logit: Tensor = self.head(pooled).gather(1, task_B[:, None])[:, 0]
        return logit

    def task_numbers(self, tasks: Sequence[str]) -> Tensor:
        """Which head each task has. ``MissingCapabilityError`` for a task it was not trained on."""
        known = {name: number for number, name in enumerate(self.config.tasks)}
        for name in tasks:
            if name not in known:
                fix = "train it on demonstrations of this task: physis train success data=[FOLDER]"
                wanted = f"one of {', '.join(self.config.tasks)}"
                raise MissingCapabilityError("success classifier", got=name, wanted=wanted, fix=fix)
        return torch.tensor([known[name] for name in tasks], device=self.temperature.device)

    @torch.inference_mode()
    def probability(self, frames_BTHWC: NDArray[np.uint8], tasks: Sequence[str]) -> NDArray[np.float32]:
        """Videos uint8 [B,T,H,W,3] (T at least 2, the first picture is now; other sizes are resized by area) and the task of each ->
        calibrated probability [B] that the task is done at their end."""
        if frames_BTHWC.dtype != np.uint8 or frames_BTHWC.ndim != 5 or frames_BTHWC.shape[-1] != 3:
            got = f"{frames_BTHWC.dtype} {frames_BTHWC.shape}"
            raise UserError("frames", got=got, wanted="uint8 [B,T,H,W,3]", fix="give imagined pictures as they are")
        last = frames_BTHWC.shape[1] - 1
        pictures = torch.from_numpy(np.ascontiguousarray(frames_BTHWC[:, [0, (last + 1) // 2, last]]))
        pictures = fitted(pictures.to(self.temperature.device), self.config.height, self.config.width)
        logit = self(pictures, self.task_numbers(tasks))
        return (logit / self.temperature).sigmoid().float().cpu().numpy()


def fitted(pictures_B3HWC: Tensor, height: int, width: int) -> Tensor:
    """uint8 pictures of this size, averaged by area."""
    if pictures_B3HWC.shape[2:4] == (height, width):
        return pictures_B3HWC
    planes = pictures_B3HWC.flatten(0, 1).permute(0, 3, 1, 2).float()
    resized = F.interpolate(planes, (height, width), mode="area").round().to(torch.uint8)
    return resized.permute(0, 2, 3, 1).unflatten(0, pictures_B3HWC.shape[:2])


def save_success_classifier(model: SuccessClassifier, folder: str | Path, *, card: str | None = None) -> Path:
    """Write ``model.safetensors`` (float16, the temperature float32), ``config.json`` and, if given, the model card."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().cpu().to(torch.float32 if name == "temperature" else torch.float16).contiguous()
        for name, value in model.state_dict().items()
    }
    # The weights come last: a folder with weights has the configuration they belong to.
    (folder / CONFIG_NAME).write_text(json.dumps(dataclasses.asdict(model.config), indent=2) + "\n")
    save_tensors(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def load_success_classifier(folder: str | Path, device: str = "cpu") -> SuccessClassifier:
    """Read a folder that ``save_success_classifier`` wrote. Any missing or surplus file, setting or key is a ``UserError``."""
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            fix = "train one: physis train success data=[FOLDER]"
            raise UserError("planner.success", got=str(folder), wanted=f"a folder with {name}", fix=fix)
    raw = read_json(folder / CONFIG_NAME)
    known = {field.name for field in dataclasses.fields(SuccessConfig)}
    if set(raw) != known:
        got = sorted(set(raw) ^ known)
        raise UserError("success config", got=got, wanted=f"exactly {sorted(known)}", fix="use matching versions")
    settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items()}
    model = SuccessClassifier(SuccessConfig(**settings))
    tensors, wanted = load_file(folder / WEIGHTS_NAME), set(model.state_dict())
    if set(tensors) != wanted:
        got = sorted(set(tensors) ^ wanted)[:4]
        fix = "train it again: physis train success"
        raise UserError("success weights", got=got, wanted="exactly the keys of the configuration", fix=fix)
    model.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=True)
    model.fingerprint = hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()[:16]
    return model.eval().to(device)
