"""An update on windows that are encoded while the run trains, beside the same update on a store that was made of them before.

    python benchmarks/paper_live.py --data runs/blocks --work /dev/shm/live --model /dev/shm/5b/model --json live.json
    python benchmarks/paper_live.py --data runs/blocks --work runs/live --tiny                # all of it on a CPU

``--model`` is a pipeline folder as benchmarks/paper_pipelines.py builds it (with --tiny it is built where it is missing). The store is made with
`physis data latents`; one trainer then makes its updates with windows of the store and of the dataset in turn, the same windows in the same
order, with the simulator's targets from a cache in both. Batches are compared bit by bit before anything is timed. An update is all of
`Trainer.step`: the batch, forward, backward, optimiser.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import paper_pipelines
import torch

from physisforcing.core.config import compose
from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
from physisforcing.worldmodel.data.latent_bank import LatentBank
from physisforcing.worldmodel.data.latent_maker import as_in_commands
from physisforcing.worldmodel.data.latents import LatentsCommand, make_latents
from physisforcing.worldmodel.data.live_bank import LiveBank
from physisforcing.worldmodel.training.banks import open_datasets, open_stores
from physisforcing.worldmodel.training.config import TrainWorldModelConfig
from physisforcing.worldmodel.training.initial import adopt_model
from physisforcing.worldmodel.training.runtime import choose_kernels
from physisforcing.worldmodel.training.worldmodel import Trainer

ARMS = ("store", "live")


def settings(options: argparse.Namespace) -> TrainWorldModelConfig:
    """The recipe, with datasets."""
    work, device = Path(options.work), "cpu" if options.tiny else "cuda"
    words = [
        f"experiment={options.experiment}",
        f"model={options.model}",
        f"data.roots=[{options.data}]",
        "data.heldout=0",
    ]
    words += [f"data.live.buckets=[{options.bucket}]", f"data.live.limit={options.limit}", "teacher.encoder.name=none"]
    words += [f"data.text_cache={work / 'text'}", f"data.targets_cache={work / 'store' / 'targets'}"]
    words += ["physics.relations=rigid", f"lora.rank={options.rank}", f"run.batch={options.batch}", "run.micro=1"]
    words += [f"run.device={device}", f"run.out={work / 'run'}", "run.log_every=1000000", "run.steps=1000000"]
    words += ["run.compile=none"] if options.tiny else []
    return compose("train_worldmodel", [*words, *options.more], TrainWorldModelConfig)


def banks(config: TrainWorldModelConfig, work: Path, device: torch.device) -> dict[str, LatentBank]:
    """The same windows from a store, which is made first, and from the dataset."""
    data = config.data
    make_latents(
        LatentsCommand(
            **asdict(data.live), data=data.roots, model=config.model, out=str(work / "store"), teacher=config.teacher,
            text_cache=data.text_cache, device=device.type,
        ),
        progress=True,
    )  # fmt: skip
    store = open_stores([work / "store"], 0, device, config.physics, ahead=data.workers)[0]
    fly = open_datasets(config, device, config.physics)[0]
    if store.fingerprint != fly.fingerprint:
        raise RuntimeError("the store has other windows than the dataset: name an empty --work")
    return {"store": store, "live": fly}


def equal_batches(found: dict[str, LatentBank], rows: int) -> float:
    """Share of the first windows whose latents, sentences and targets have equal bits."""
    same = 0
    for row in range(rows):
        one, other = (_flat(found[arm].batch(torch.tensor([row]))) for arm in ARMS)
        same += one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    return same / rows


def _flat(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    values = {name: value for name, value in batch.items() if name != "targets"}
    return values | {f"targets.{name}": value for name, value in batch["targets"].items()}


def encode_ms(bank: LiveBank, tries: int) -> float:
    """The autoencoder alone on one window of pictures."""
    times = []
    for _ in range(tries + 1):
        frames = bank._read(0)["frames_THWC"]
        _wait(bank.device)
        begun = time.perf_counter()
        with as_in_commands(bank.device):
            bank.live.maker.encode(frames)
        _wait(bank.device)
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def updates(trainer: Trainer, bank: LatentBank, first: int, count: int) -> tuple[list[float], list[float], float]:
    """Make ``count`` updates -> (ms of each but the first two, percent of it that the batch took on the host, GiB at most)."""
    device, times, waits = trainer.device, [], []
    trainer.bank = bank
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(first, first + count):
        _wait(device)
        begun = time.perf_counter()
        trainer.step(step)
        _wait(device)
        seconds = time.perf_counter() - begun
        times.append(1e3 * seconds)
        waits.append(100 * trainer.wait_s / seconds)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return times[2:], waits[2:], memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a dataset with the simulator's truth")
    parser.add_argument("--work", required=True)
    parser.add_argument("--model", help="a pipeline folder; with --tiny WORK/model where it is left out")
    parser.add_argument("--experiment", default="pf_wan_5b")
    parser.add_argument("--bucket", default="", help="81x480x640; 9x96x128 with --tiny")
    parser.add_argument("--limit", type=int, default=2, help="windows of an episode")
    parser.add_argument("--rank", type=int, default=32, help="of the adapters; 0 trains all weights")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--updates", type=int, default=12, help="of each arm and turn; the first two of them are not counted"
    )
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--more", nargs="*", default=[], help="further overrides")
    parser.add_argument("--json")
    options = parser.parse_args()
    options.bucket = options.bucket or ("9x96x128" if options.tiny else "81x480x640")
    if options.tiny:
        options.rank, options.model = min(options.rank, 4), options.model or str(Path(options.work) / "model")
        build_tiny(options)
    if not options.model:
        parser.error("--model is the pipeline folder; only --tiny builds one")
    config, device = settings(options), torch.device("cpu" if options.tiny else "cuda")
    adopt_model(config)
    found = banks(config, Path(options.work), device)
    choose_kernels(device, config.run.deterministic)  # after the store, which is made by a command of its own otherwise
    report(options, measure(options, config, found, device))


def build_tiny(options: argparse.Namespace) -> None:
    """A pipeline folder that a CPU trains, where there is none."""
    from physisforcing.core.lerobot import LeRobotDataset
    from physisforcing.worldmodel.data.clips.decode import cover

    if (Path(options.model) / "model_index.json").is_file():
        return
    paper_pipelines.use_tiny_sizes()
    frames, rows, columns = (int(side) for side in options.bucket.split("x"))
    recorded = LeRobotDataset(options.data).frames(0, range(frames))
    clip = np.stack([cover(frame, (rows, columns)) for frame in recorded])
    paper_pipelines.build("5b", Path(options.model), clip, torch.device("cpu"))


def measure(
    options: argparse.Namespace, config: TrainWorldModelConfig, found: dict[str, LatentBank], device: torch.device
) -> dict[str, dict[str, Any]]:
    """Arm -> times, waits, memory, and what both arms share."""
    rows = min(4, len(found["store"]))
    shared: dict[str, Any] = {
        "equal_batches": equal_batches(found, rows),
        "batch": options.batch,
        "bucket": options.bucket,
    }
    shared["encode_ms_a_window"] = round(encode_ms(found["live"], 5), 2)  # type: ignore[arg-type]
    trainer = Trainer(config, found["store"], device)
    made: dict[str, dict[str, Any]] = {arm: {"times": [], "waits": [], "memory": 0.0, **shared} for arm in ARMS}
    step = 0
    for turn in range(options.turns):
        for arm in ARMS if turn % 2 == 0 else ARMS[::-1]:
            times, waits, memory = updates(trainer, found[arm], step, options.updates)
            step += options.updates
            made[arm]["times"] += times
            made[arm]["waits"] += waits
            made[arm]["memory"] = max(memory, made[arm]["memory"])
    for bank in found.values():
        bank.close()
    return made


def report(options: argparse.Namespace, made: dict[str, dict[str, Any]]) -> None:
    lines, provenance = [], machine_provenance()
    command = placeless("python benchmarks/paper_live.py " + shlex.join(sys.argv[1:]))
    store = statistics.median(made["store"]["times"])
    for arm, values in made.items():
        times, waits, memory = values.pop("times"), values.pop("waits"), values.pop("memory")
        value = statistics.median(times)
        against = values | {
            "lora_rank": options.rank,
            "memory_gib": round(memory, 2),
            "over_store": round(value / store, 4),
        }
        against["data_wait_pct"] = round(statistics.median(waits), 2)
        claim = f"training/{options.experiment}/{arm}_step_ms"
        lines.append(
            measurement(
                claim, round(value, 2), unit="ms", low=min(times), high=max(times), n=len(times), seeds="0",
                against=against, command=command, provenance=provenance,
            )
        )  # fmt: skip
        print(f"{claim}: {value:.1f} ms {against}", flush=True)
    if options.json:
        write_measurements(options.json, lines)


if __name__ == "__main__":
    main()
