"""The nano policies of docs/results/policy.md from their dataset: a backbone, policies with and without the video's loss, closed loop.

    physis data nano output=runs/nano workers=16 pictures=240x320 crf=18 ground_truth=sparse train=100 validation=0 noise=0
    python benchmarks/nano_policies.py --data runs/nano/train --work runs/nano_policies --seeds 0,1 --gpus 2 --workers 28 --json nano.json
    python benchmarks/nano_policies.py --data runs/nano/train --work runs/tiny --tiny          # all of it on a CPU, in minutes

targets       `physis data targets`: what the physics losses need of the clips, once
world_model   `physis train worldmodel experiment=nano`: the backbone, with both physics losses
policies      `physis train policy experiment=policy_nano` from it, for each recipe and seed, at most --together on a GPU
evaluation    `physis eval policy` of all of them on the same frozen scenes
planner       the same with the planner of the backbone, on the tasks that its decoder knows

Run it from the repository. What is there already is kept: the same command again goes on where it stopped, a training from its last checkpoint (every 200
updates). Ctrl-C and SIGTERM let the trainings save first. Lines (--json): how long each training took, in all its parts, and its held-out losses;
successes are in each evaluation's ``measurements.json``. Exit code 1: a command failed, 3: episodes ended in errors (they are in the summary).
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from physisforcing.envs.nano import TASKS
from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements

PARTS = ("targets", "world_model", "policies", "evaluation", "planner")
#: Recipe -> weight of the video's loss.
RECIPES = {"joint": 1, "actions": 0}
#: Those of the nano tasks that the packaged decoder of six tasks knows.
PLANNED = "stack_blocks_two,grab_roller,click_bell,adjust_bottle,place_empty_cup"
CODEC, DECODER = "physisforcing/weights/vae", "physisforcing/weights/idm_six_tasks"
#: `physis` ends with it where a training was told to stop, and where episodes of an evaluation ended in errors.
INCOMPLETE = 3


class Stopped(Exception):
    """Ctrl-C or SIGTERM; commands that ran have ended, trainings with a checkpoint."""


class Nano:
    """The parts, each made of `physis` commands with a log in ``work``."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, Path(options.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.backbone = self.work / f"backbone_{options.backbone_seed}"
        self.trained: dict[str, tuple[float, int]] = {}  # whole ones: name -> seconds, parts
        self.incomplete, self.stopped = False, threading.Event()
        self.running: set[subprocess.Popen[bytes]] = set()
        self.common = [f"codec={CODEC}", f"data.roots=['{options.data}']", f"data.workers={options.readers}"]
        self.common += ["run.device=cpu", "run.compile=none", "data.heldout=1", "data.limit=3"] if options.tiny else []

    def stop(self, *_: Any) -> None:
        """Tell what runs to end as Ctrl-C would; trainings save first."""
        self.stopped.set()
        for process in list(self.running):
            process.send_signal(signal.SIGINT)

    def physis(self, name: str, words: list[str], gpus: str = "") -> int:
        """One command, on ``gpus`` or on all: its exit code, 0 or 3. ``RuntimeError`` with the end of its log where it fails, ``Stopped`` where it was told to end."""
        if self.stopped.is_set():
            raise Stopped
        begun, log = time.monotonic(), self.work / f"{name}.log"
        print(f"{name}: physis {shlex.join(words)}", flush=True)
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
        command = [sys.executable, "-m", "physisforcing", *words]
        with log.open("a") as file:  # a session of its own: Ctrl-C reaches it once, through ``stop``
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
            self.running.add(process)
            if self.stopped.is_set():
                process.send_signal(signal.SIGINT)
            code = process.wait()
            self.running.discard(process)
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
        if self.stopped.is_set() and code:
            raise Stopped
        if code not in (0, INCOMPLETE):
            raise RuntimeError(f"{name} ended with {code}:\n{log.read_text()[-2000:]}")
        return code

    def train(self, name: str, words: list[str], out: Path, gpus: str = "") -> None:
        """A training that goes on from its last checkpoint, and is not made again where it is whole. ``RuntimeError`` where ``out`` is that of other words."""
        told = self.work / f"{name}.json"
        words = ["train", *words, *self.common, "run.save_every=200", f"run.out={out}", "run.resume=true"]
        known = json.loads(told.read_text()) if told.is_file() else {"words": words, "seconds": []}
        if known["words"] != words:
            raise RuntimeError(
                f"{told} has other settings: physis {shlex.join(known['words'])}\nuse another --work, or delete {out} and it"
            )
        if not whole(out):
            begun = time.monotonic()
            try:
                self.physis(name, words, gpus)
            finally:
                known["seconds"].append(round(time.monotonic() - begun, 1))
                told.write_text(json.dumps(known))
            if not whole(out):
                raise RuntimeError(f"{name} ended before its last update; the same command goes on")
        self.trained[name] = (sum(known["seconds"]), len(known["seconds"]))

    def lines(self) -> list[dict[str, Any]]:
        """One for each training that is whole."""
        command = placeless("python benchmarks/nano_policies.py " + shlex.join(sys.argv[1:]))
        found, provenance = [], machine_provenance()
        for name, (seconds, parts) in sorted(self.trained.items()):
            out = self.work / name
            logged = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            times = [line["step_ms"] for line in logged if "step_ms" in line][1:]  # the first ones compile
            after = json.loads((out / "heldout.json").read_text())["after"]
            about = {"update_ms": round(statistics.median(times), 1) if times else None, "parts": parts}
            about |= {"on_a_gpu": self.options.together if name != self.backbone.name else 1}
            about |= {key: round(value, 5) for key, value in after.items()}
            line = measurement(
                f"policy/nano/{name}/training_s", round(seconds, 1), unit="s", n=1, seeds=name.rpartition("_")[2], against=about,
                command=command, provenance=provenance,
            )  # fmt: skip
            print(f"{line['claim']}: {line['value']} s {about}", flush=True)
            found.append(line)
        return found

    def targets(self) -> None:
        device, processes = ("cpu", 1) if self.options.tiny else ("cuda", self.options.workers or 1)
        words = [f"data=['{self.options.data}']", f"device={device}", f"processes={processes}", "workers=1"]
        self.physis("targets", ["data", "targets", *words])

    def world_model(self) -> None:
        options = self.options
        words = ["worldmodel", "experiment=nano", f"run.seed={options.backbone_seed}", f"run.steps={options.steps[0]}"]
        words += ["run.batch=2", "run.micro=2", "backbone=pico"] if options.tiny else []
        self.train(self.backbone.name, words, self.backbone)

    def policies(self) -> None:
        options = self.options
        slots: queue.Queue[str] = queue.Queue()
        for _ in range(options.together):
            for gpu in options.gpus:
                slots.put(gpu)

        def one(name: str) -> None:
            gpu = slots.get()
            try:
                self.policy(name, gpu)
            finally:
                slots.put(gpu)

        with ThreadPoolExecutor(slots.qsize()) as pool:
            some = {name: pool.submit(one, name) for name in self.names()}
        errors = {name: error for name, future in some.items() if (error := future.exception()) is not None}
        for error in errors.values():
            if not isinstance(error, RuntimeError):
                raise error
        if errors:
            raise RuntimeError("\n".join(map(str, errors.values())))

    def policy(self, name: str, gpu: str) -> None:
        recipe, _, seed = name.partition("_")
        words = ["policy", "experiment=policy_nano", f"run.init={self.backbone / 'export'}", f"run.seed={seed}"]
        words += [f"video_weight={RECIPES[recipe]}", f"run.steps={self.options.steps[1]}"]
        words += ["run.batch=2", "run.micro=2"] if self.options.tiny else ["run.batch=128"]
        self.train(name, words + self.options.more, self.work / name, gpu)

    def names(self) -> list[str]:
        return [f"{recipe}_{seed}" for seed in self.options.seeds for recipe in self.options.recipes]

    def evaluation(self) -> None:
        some = []
        for name in self.names():
            recipe, _, seed = name.partition("_")
            some.append(f"{name}:{{source:'{self.work / name / 'export'}',recipe:{recipe},training_seed:{seed}}}")
        words = [f"policies={{{','.join(some)}}}", f"paired_seeds={str(len(self.options.seeds) > 1).lower()}"]
        words += [] if self.options.tiny else ["policy.server=auto", "policy.device=cuda", "policy.compute=graph"]
        self._evaluate("evaluation", self.options.tasks, words)

    def planner(self) -> None:
        words = [
            "policies=[planner]",
            f"planner.world_model={self.backbone / 'export'}",
            f"planner.decoder={self.options.decoder}",
        ]
        words += [] if self.options.tiny else ["planner.device=cuda", "planner.server=auto"]
        self._evaluate("planner", self.options.planned, words)

    def _evaluate(self, name: str, tasks: str, words: list[str]) -> None:
        options = self.options
        words = [*words, f"tasks=[{tasks}]", f"episodes={options.episodes}", "threads=1", "videos=0", "baselines=[]"]
        words += [f"workers={options.workers}", "retry_errors=true", f"output={self.work / name}"]
        self.incomplete |= self.physis(name, ["eval", "policy", *words]) == INCOMPLETE
        print((self.work / name / "summary.md").read_text(), flush=True)


def whole(out: Path) -> bool:
    """Whether a training has made its last update and its export."""
    report = out / "heldout.json"
    return (out / "export").is_dir() and report.is_file() and "after" in json.loads(report.read_text())


def visible(count: int) -> list[str]:
    """The first ``count`` GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES gives them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(k) for k in range(torch.cuda.device_count())]
    return names[:count] if torch.cuda.device_count() >= count else []


def read_options(words: list[str] | None = None) -> argparse.Namespace:
    def some_of(known: Any) -> Any:
        def read(text: str) -> list[str]:
            if unknown := [part for part in text.split(",") if part not in known]:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {', '.join(known)}")
            return text.split(",")

        return read

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="recordings with the simulator's truth and pictures of 240x320")
    parser.add_argument("--work", required=True)
    parser.add_argument("--seeds", default="0,1", type=lambda text: text.split(","), help="of the policies")
    parser.add_argument("--recipes", default=",".join(RECIPES), type=some_of(RECIPES))
    parser.add_argument("--backbone-seed", type=int, default=0)
    parser.add_argument("--steps", default="1200,2500", type=lambda text: text.split(","), help="updates of each model")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--together", type=int, default=1, help="policies that a GPU trains at once")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--planned", default=PLANNED, help="the planner's tasks")
    parser.add_argument(
        "--decoder", default=DECODER, help="the planner's; one that `physis train idm` made knows other tasks"
    )
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--workers", type=int, default=14, help="simulators at once")
    parser.add_argument("--readers", type=int, default=8, help="threads that decode the recordings")
    parser.add_argument("--more", nargs="*", default=[], help="further overrides of the policies")
    parser.add_argument("--parts", default=",".join(PARTS), type=some_of(PARTS))
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on a CPU")
    parser.add_argument("--json")
    options = parser.parse_args(words)
    for name, marks in (("data", "'\"\\$"), ("work", "'\"\\$,[]{}()="), ("decoder", "'\"\\$,[]{}()=")):
        if set(marks) & set(getattr(options, name)):
            parser.error(f"--{name}: {' '.join(marks)} have a meaning in overrides; name the folder without them")
    if options.tiny:
        options.steps, options.episodes, options.workers = ["1", "1"], 1, 0
        options.tasks = options.planned = "click_bell"
        options.gpus = [""]
    elif not (found := visible(options.gpus)):
        parser.error(f"--gpus {options.gpus}: so many are not visible here")
    else:
        options.gpus = found
    return options


def main() -> int:
    options = read_options()
    nano = Nano(options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, nano.stop)
    try:
        for part in options.parts:
            getattr(nano, part)()
    except Stopped:
        print("stopped; the same command goes on", flush=True)
        return 1
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    finally:
        if options.json and nano.trained:
            write_measurements(options.json, nano.lines())
    return INCOMPLETE if nano.incomplete else 0


if __name__ == "__main__":
    sys.exit(main())
