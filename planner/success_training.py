"""Training of the success classifier: windows of both classes in equal shares, a fitted temperature, errors on unseen scenes.

A run takes one or two minutes on a CPU; it is repeated rather than resumed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.errors import UserError

from .calibration import balanced_accuracy, expected_calibration_error, fit_temperature
from .idm_training import augment
from .success_classifier import SuccessClassifier, SuccessConfig
from .success_data import CALIBRATION, TEST, TRAIN, SuccessStore, draw

#: Windows that the temperature is fitted on, and that the errors are measured on.
CALIBRATION_WINDOWS, TEST_WINDOWS = 1024, 2048
#: Resamples of the test episodes for intervals.
RESAMPLES = 1000


@dataclass(slots=True, kw_only=True)
class SuccessTrainConfig:
    """``spans``: lengths of the windows in control steps, one of them a window (32: a rollout of the shipped model).
    ``augment_share``: windows with other brightness, blur and noise. ``shift``: largest displacement of a window in pixels.
    ``time_limit_s``: end after so many seconds of steps (0: none); the learning rate then falls with time."""

    model: SuccessConfig = field(default_factory=SuccessConfig)
    spans: tuple[int, ...] = (32, 64)
    steps: int = 300
    time_limit_s: float = 0.0
    batch: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.02
    augment_share: float = 0.5
    shift: int = 4
    seed: int = 0
    log_every: int = 50


def train_success_classifier(
    config: SuccessTrainConfig, store: SuccessStore, *, device: str = "cpu", log: Callable[[dict[str, Any]], None]
) -> tuple[SuccessClassifier, dict[str, Any]]:
    """Train on ``store``; returns the calibrated model and what was measured on held-out seeds (see ``evaluate``)."""
    parts = store.parts()
    _check(config, store, parts)
    torch.manual_seed(config.seed)
    settings = config.model
    settings.tasks = store.tasks
    model = SuccessClassifier(settings).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = _fit(config, model, store, parts[TRAIN], device, log)
    spans = _rows(config, store)
    generator = np.random.default_rng([config.seed, 1])
    pictures, tasks, labels = draw(store, parts[CALIBRATION], CALIBRATION_WINDOWS, spans=spans, generator=generator)
    model.temperature.fill_(fit_temperature(logits(model, pictures, tasks), labels))
    metrics = evaluate(model, store, parts[TEST], spans=spans, seed=config.seed)
    metrics |= {"steps": steps, "temperature": float(model.temperature)}
    metrics["episodes"] = {name: len(episodes) for name, episodes in parts.items()}
    metrics["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return model, metrics


def _fit(
    config: SuccessTrainConfig,
    model: SuccessClassifier,
    store: SuccessStore,
    episodes: NDArray[np.int64],
    device: str,
    log: Callable[[dict[str, Any]], None],
) -> int:
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    windows, noise = np.random.default_rng(config.seed), torch.Generator(device).manual_seed(config.seed)
    began, step, done = time.perf_counter(), 0, 0.0
    model.train()
    while done < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * done))
        pictures, tasks, labels = draw(store, episodes, config.batch, spans=_rows(config, store), generator=windows)
        pictures = _shifted(pictures.to(device), config.shift, windows)
        changed = torch.from_numpy(windows.random(len(pictures)) < config.augment_share).to(device)
        if changed.any():
            pictures[changed] = augment(pictures[changed], share=1.0, generator=noise)
        truth = torch.from_numpy(labels.astype(np.float32)).to(device)
        loss = F.binary_cross_entropy_with_logits(model(pictures, torch.from_numpy(tasks).to(device)), truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        elapsed, step = time.perf_counter() - began, step + 1
        done = step / config.steps
        if config.time_limit_s:
            done = max(done, elapsed / config.time_limit_s)
        if step % config.log_every == 0 or step == 1 or done >= 1.0:
            row = {"step": step, "loss": loss.item(), "grad_norm": norm.item(), "step_ms": 1e3 * elapsed / step}
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(f"the loss is not finite at step {step}")
            log(row | {"eta_s": elapsed * (1 - done) / done})
    model.eval()
    return step


@torch.inference_mode()
def logits(model: SuccessClassifier, pictures_N3HWC: Tensor, tasks_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logits [N] before the temperature."""
    device, parts = model.temperature.device, []
    for rows in torch.arange(len(pictures_N3HWC)).split(64):
        parts.append(model(pictures_N3HWC[rows].to(device), torch.from_numpy(tasks_N[rows.numpy()]).to(device)))
    return torch.cat(parts).double().cpu().numpy()


def evaluate(
    model: SuccessClassifier, store: SuccessStore, episodes: NDArray[np.int64], *, spans: tuple[int, ...], seed: int
) -> dict[str, Any]:
    """Balanced accuracy and expected calibration error on windows of these episodes, both classes in equal shares.

    ``all`` and every task: ``balanced_accuracy``, ``ece``, ``ece_before`` (without the temperature), ``windows``, ``episodes``, and
    95 % intervals of the first two from resampled episodes.
    """
    table: dict[str, Any] = {}
    for number, task in enumerate(("all", *store.tasks)):
        mine = episodes if task == "all" else episodes[store.task_E[episodes] == number - 1]
        if len(mine):
            table[task] = _measured(model, store, mine, spans, seed)
    return {"held_out": table}


def _measured(
    model: SuccessClassifier, store: SuccessStore, episodes: NDArray[np.int64], spans: tuple[int, ...], seed: int
) -> dict[str, Any]:
    generator = np.random.default_rng([seed, 2])
    owner, pictures, tasks, labels = [], [], [], []
    # Episode by episode, so that intervals can resample scenes and not windows.
    each = max(2, TEST_WINDOWS // len(episodes) // 2 * 2)
    for place, episode in enumerate(episodes):
        part = draw(store, np.array([episode]), each, spans=spans, generator=generator)
        pictures.append(logits(model, part[0], part[1]))
        tasks.append(part[1])
        labels.append(part[2])
        owner.append(np.full(each, place))
    logit, truth, whose = np.concatenate(pictures), np.concatenate(labels), np.concatenate(owner)
    calibrated, raw = _sigmoid(logit / float(model.temperature)), _sigmoid(logit)
    draws = [_figures(calibrated, truth, whose, len(episodes), generator) for _ in range(RESAMPLES)]
    low, high = np.nanquantile(np.array(draws), [0.025, 0.975], axis=0)
    return {
        "balanced_accuracy": balanced_accuracy(calibrated, truth),
        "balanced_accuracy_interval": [float(low[0]), float(high[0])],
        "ece": _balanced_ece(calibrated, truth),
        "ece_interval": [float(low[1]), float(high[1])],
        "ece_before": _balanced_ece(raw, truth),
        "windows": len(truth),
        "positive": int(truth.sum()),
        "episodes": len(episodes),
    }


def _figures(
    probability: NDArray[np.float64],
    truth: NDArray[np.bool_],
    whose: NDArray[np.int64],
    episodes: int,
    generator: np.random.Generator,
) -> tuple[float, float]:
    weight = np.bincount(generator.integers(0, episodes, episodes), minlength=episodes)
    rows = np.repeat(np.arange(len(truth)), weight[whose])
    return balanced_accuracy(probability[rows], truth[rows]), _balanced_ece(probability[rows], truth[rows])


def _balanced_ece(probability: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """The calibration error at equal shares of both classes, which is what the probabilities are for: the scarcer class is repeated."""
    classes = [np.flatnonzero(truth), np.flatnonzero(~truth)]
    if not all(map(len, classes)):
        return float("nan")
    most = max(map(len, classes))
    rows = np.concatenate([np.resize(part, most) for part in classes])
    return expected_calibration_error(probability[rows], truth[rows])


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0.0, -x))


def _rows(config: SuccessTrainConfig, store: SuccessStore) -> tuple[int, ...]:
    """The spans in rows of the store."""
    return tuple(max(1, span // store.stride) for span in config.spans)


def _shifted(pictures_B3HWC: Tensor, most: int, generator: np.random.Generator) -> Tensor:
    """Each window displaced by up to ``most`` pixels; what comes in at the border repeats it."""
    if most == 0:
        return pictures_B3HWC
    height, width = pictures_B3HWC.shape[2:4]
    device = pictures_B3HWC.device
    moved = []
    for window, (dy, dx) in zip(
        pictures_B3HWC, generator.integers(-most, most + 1, (len(pictures_B3HWC), 2)), strict=True
    ):
        rows = (torch.arange(height, device=device) + int(dy)).clamp(0, height - 1)
        columns = (torch.arange(width, device=device) + int(dx)).clamp(0, width - 1)
        moved.append(window[:, rows][:, :, columns])
    return torch.stack(moved)


def _check(config: SuccessTrainConfig, store: SuccessStore, parts: dict[str, NDArray[np.int64]]) -> None:
    if config.model.tasks:
        fix = "leave it out"
        raise UserError("train.model.tasks", got=config.model.tasks, wanted="what the data have", fix=fix)
    if not config.spans or min(config.spans) < store.stride:
        raise UserError("train.spans", got=config.spans, wanted=f"at least {store.stride} steps each", fix="spans=[32]")
    for name, episodes in parts.items():
        for number, task in enumerate(store.tasks):
            mine = episodes[store.task_E[episodes] == number]
            successes = int((store.done_E[mine] >= 0).sum())
            if not successes:
                got = f"{len(mine)} episodes of {task} for {name}, {successes} of them successful"
                fix = "collect more episodes (five scenes a task or more), some of them with policy=expert"
                raise UserError("data", got=got, wanted="at least one success of every task in each part", fix=fix)
