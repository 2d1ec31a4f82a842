"""Check a dataset completely and say what is in it."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import numpy as np

from .episodes import EpisodeSource
from .ground_truth import load as load_ground_truth
from .readers import open_dataset
from .stats import wilson


def inspect(root: str, *, check: bool = True) -> dict[str, Any]:
    """Counts, lengths and success rates by task and policy. With ``check`` every row, frame and ground-truth file is read.

    ``DatasetError`` names the first file that is missing, truncated or contradicts another.
    """
    dataset = open_dataset(root)
    with_truth = [i for i in range(len(dataset)) if dataset.ground_truth_path(i) is not None]
    if check:
        dataset.verify()
        for index in with_truth:
            _check_truth(dataset, index)
    groups: dict[str, Any] = {}
    for name, count in sorted(Counter((e.task_name, e.policy) for e in dataset.episodes).items()):
        rows = [e for e in dataset.episodes if (e.task_name, e.policy) == name]
        lengths = np.array([e.length for e in rows])
        known = [e for e in rows if e.success is not None]
        good = sum(bool(e.success) for e in known)
        groups[" ".join(part for part in name if part) or "(unnamed)"] = {
            "episodes": count,
            "successes": good if known else None,
            "success_interval": [round(x, 4) for x in wilson(good, len(known))],
            "frames": int(lengths.sum()),
            "length": {"min": int(lengths.min()), "median": float(np.median(lengths)), "max": int(lengths.max())},
            "seeds": [min(e.seed for e in rows), max(e.seed for e in rows)],
        }
    return {
        "root": str(dataset.root),
        "layout": dataset.layout,
        "episodes": len(dataset),
        "frames": dataset.num_frames,
        "fps": dataset.fps,
        "videos": {key: dataset.features[key]["shape"] for key in dataset.video_keys},
        "columns": {k: f["shape"] for k, f in dataset.features.items() if f["dtype"] != "video"},
        "ground_truth": len(with_truth),
        "assets": sorted({e.assets_version for e in dataset.episodes if e.assets_version}),
        "embodiments": sorted({e.embodiment for e in dataset.episodes if e.embodiment}),
        "instructions": len(dataset.tasks),
        "fingerprint": dataset.fingerprint(),
        "groups": groups,
        "checked": check,
    }


def _check_truth(dataset: EpisodeSource, index: int) -> None:
    path = dataset.ground_truth_path(index)
    assert path is not None
    truth = load_ground_truth(path, frames=dataset.episode(index).length)
    for frame in truth.stored_frames_D:
        for view in range(len(truth.view_names)):
            truth.depth(int(frame), view)
            truth.body_id_map(int(frame), view)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``physis data inspect`` is told about a dataset."""
    parser.add_argument("root", help="dataset folder")
    parser.add_argument("--quick", action="store_true", help="do not decode videos and ground truth")
    parser.add_argument("--json", action="store_true", help="print JSON")


def show(report: dict[str, Any]) -> None:
    """Print a report of ``inspect`` for people."""
    head = f"{report['root']}: {report['layout']}, {report['episodes']} episodes, {report['frames']} frames"
    print(f"{head} at {report['fps']:.4g} fps")
    print(f"  videos       {', '.join(f'{k} {v}' for k, v in report['videos'].items())}")
    print(f"  columns      {', '.join(f'{k} {v}' for k, v in report['columns'].items())}")
    print(f"  ground truth {report['ground_truth']} episodes; assets {', '.join(report['assets']) or 'not recorded'}")
    print(f"  fingerprint  {report['fingerprint'][:16]}; {report['instructions']} instructions")
    for name, row in report["groups"].items():
        low, high = row["success_interval"]
        length = row["length"]
        told = row["successes"] is not None
        success = f"{row['successes']} succeeded ({low:.2f}-{high:.2f})" if told else "success not recorded"
        print(
            f"  {name:30} {row['episodes']:4} episodes, {success}, "
            f"length {length['min']}-{length['max']} (median {length['median']:g}), seeds {row['seeds'][0]}-{row['seeds'][1]}"
        )
    print(
        "  every row, frame and ground-truth map was read"
        if report["checked"]
        else "  files present; contents not read"
    )
