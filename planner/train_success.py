"""``physis train success``: train the classifier that tells from a video whether the task is done at its end."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .success_training import SuccessTrainConfig, train_success_classifier

USAGE = """usage: physis train success data=[FOLDER,...] [field=value ...]

Trains a classifier that says how probable it is that the task is done at the end of a video, from its first, middle and last
picture. Its use: planner.verifier=success. Positive are recorded windows in which the success comes, negative are windows that
end before it and those of episodes without one, so give it failures, too. A fifth of the seeds calibrates, a fifth tests.

examples:
  physis data collect tasks=[click_bell] episodes=40 output=runs/bell
  physis data collect tasks=[click_bell] policy=random episodes=20 output=runs/bell_random
  physis train success data=[runs/bell,runs/bell_random] output=runs/success
  physis eval plan planner.candidates=4 planner.verifier=success planner.success=runs/success/model output=runs/plan

fields: data, output, device (auto, cpu, cuda), threads, train.* (steps, time_limit_s, batch, lr, seed, spans, ...)"""


@dataclass(slots=True, kw_only=True)
class TrainSuccessCommand:
    """Settings of ``physis train success``."""

    data: list[str]
    output: str = "runs/success"
    device: str = "auto"
    threads: int = 0
    train: SuccessTrainConfig = field(default_factory=SuccessTrainConfig)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    from physisforcing.core.config import compose

    run(compose("train_success", list(argv), TrainSuccessCommand))
    return 0


def run(command: TrainSuccessCommand) -> dict[str, Any]:
    """Load, train, calibrate, measure on held-out seeds, save. Returns what ``metrics.json`` holds."""
    import torch

    from .idm_training import print_row
    from .success_classifier import save_success_classifier
    from .success_data import load_success_store
    from .train import choose_device

    if command.threads:
        torch.set_num_threads(command.threads)
    device, began = choose_device(command.device), time.perf_counter()
    size = command.train.model
    store = load_success_store(command.data, height=size.height, width=size.width)
    successes, episodes = int((store.done_E >= 0).sum()), len(store.done_E)
    loaded = {"event": "loaded", "episodes": episodes, "successes": successes, "pictures": len(store.frames_NHWC)}
    print_row(loaded | {"seconds": time.perf_counter() - began})
    output = Path(command.output)
    output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with (output / "train.jsonl").open("w") as lines:

        def log(row: dict[str, Any]) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            print_row(row)

        model, metrics = train_success_classifier(command.train, store, device=device, log=log)
    metrics["train_seconds"] = time.perf_counter() - began
    metrics["successes"] = successes
    metrics["hardware"] = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (output / "config.json").write_text(json.dumps(dataclasses.asdict(command), indent=2) + "\n")
    save_success_classifier(model, output / "model", card=model_card(metrics))
    for task, row in metrics["held_out"].items():
        print_row({"event": "held_out", "task": task, **row})
    return metrics


def model_card(metrics: dict[str, Any]) -> str:
    """README.md of the weights folder, every figure from this run's held-out evaluation."""
    rows = []
    for task, row in metrics["held_out"].items():
        accuracy, ece = row["balanced_accuracy_interval"], row["ece_interval"]
        rows.append(
            f"| {task} | {100 * row['balanced_accuracy']:.1f} % ({100 * accuracy[0]:.1f} to {100 * accuracy[1]:.1f}) "
            f"| {row['ece']:.3f} ({ece[0]:.3f} to {ece[1]:.3f}) | {row['ece_before']:.3f} "
            f"| {row['windows']} | {row['episodes']} |"
        )
    parts = metrics["episodes"]
    return "\n".join(
        [
            "---",
            "license: mit",
            "tags: [robotics, success-detection, robotwin]",
            "---",
            "# Success classifier",
            "",
            "Says how probable it is that the task is done at the end of a head-camera video, from its first, middle and last picture",
            f"(120x160). {metrics['parameters'] / 1e6:.2f} M parameters, float16 on disk.",
            "",
            f"Trained on {parts['train']} recorded episodes, temperature {metrics['temperature']:.2f} fitted on {parts['calibration']}",
            f"others, tested on {parts['test']} of unseen seeds; {metrics['successes']} of all episodes succeed. Recorded pictures only:",
            "how well it judges imagined ones depends on the world model.",
            "",
            "Held-out windows, both classes in equal shares, 95 % intervals from resampled episodes:",
            "",
            "| task | balanced accuracy | calibration error | before the temperature | windows | episodes |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"{metrics['steps']} steps, {metrics['train_seconds']:.0f} s on {metrics['hardware']}.",
            "",
        ]
    )
