"""The nano policies of docs/results/policy.md from their dataset: a backbone, policies with and without the video's loss, closed loop.

    physis data nano output=runs/nano workers=16 pictures=240x320 crf=18 ground_truth=sparse train=100 validation=0 noise=0
    python benchmarks/nano_policies.py --data runs/nano/train --work runs/nano_policies --seeds 0,1 --gpus 2 --workers 28 --json nano.json
    python benchmarks/nano_policies.py --data runs/bell --work runs/tiny --tiny          # all of it on a CPU, in minutes

1. `physis data targets`: what the physics losses need of the clips, once.
2. `physis train worldmodel experiment=nano`: the backbone, with both physics losses.
3. `physis train policy experiment=policy_nano` from it, for each recipe and seed; at once as many as there are GPUs (times --together).
4. `physis eval policy` of all of them on the same frozen scenes, and with --planner the planner of the backbone on its decoder's tasks.

What is there already is kept: the same command again goes on where it stopped. Lines (--json): how long each training took and what its held-out
loss became; successes are in the evaluation's own ``measurements.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements

#: Recipe -> weight of the video's loss.
RECIPES = {"joint": 1, "actions": 0}
TASKS = (
    "handover_block,press_stapler,grab_roller,click_bell,adjust_bottle,place_empty_cup,shake_bottle,stack_blocks_two"
)
#: Those of the nano tasks that the packaged decoder of six tasks knows.
PLANNED = "stack_blocks_two,grab_roller,click_bell,adjust_bottle,place_empty_cup"
DECODER = "physisforcing/weights/idm_six_tasks"


class Nano:
    """The parts, each a command of its own with its log in ``work``."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, Path(options.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.backbone = self.work / f"backbone_{options.backbone_seed}"
        self.lines: list[dict[str, Any]] = []
        self.provenance = machine_provenance()
        self.common = [f"codec={options.codec}", f"data.roots=[{options.data}]", f"data.workers={options.readers}"]
        self.common += ["run.device=cpu", "run.compile=none", "data.heldout=1", "data.limit=3"] if options.tiny else []

    def physis(self, name: str, words: list[str], gpu: int = 0) -> None:
        """One command; ``RuntimeError`` with the end of its log where it fails."""
        begun, log = time.monotonic(), self.work / f"{name}.log"
        print(f"{name}: physis {shlex.join(words)}", flush=True)
        known = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        one = known[gpu] if len(known) > gpu and known[gpu] else str(gpu)
        environment = os.environ if self.options.tiny else os.environ | {"CUDA_VISIBLE_DEVICES": one}
        with log.open("a") as file:
            command = [sys.executable, "-m", "physisforcing", *words]
            done = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False)
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}:\n{log.read_text()[-2000:]}")

    def train(self, name: str, words: list[str], out: Path, gpu: int = 0) -> None:
        """A training that is continued where it was begun, and not made again; and its lines."""
        begun = time.monotonic()
        if not (out / "heldout.json").is_file():
            resume = ["run.resume=true"] if (out / "checkpoints").is_dir() else []
            self.physis(name, ["train", *words, *self.common, f"run.out={out}", *resume], gpu)
            (out / "seconds").write_text(f"{time.monotonic() - begun:.1f}")
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        times = [line["step_ms"] for line in metrics if "step_ms" in line][1:]  # the first ones compile
        after = json.loads((out / "heldout.json").read_text())["after"]
        kept = {key.removeprefix("heldout_"): round(value, 5) for key, value in after.items()}
        seconds = out / "seconds"
        about = {"update_ms": round(statistics.median(times), 1) if times else None, "heldout": kept}
        self.note(f"{name}/training_s", float(seconds.read_text()) if seconds.is_file() else None, "s", about)

    def note(self, claim: str, value: float | None, unit: str, against: dict[str, Any]) -> None:
        command = placeless("python benchmarks/nano_policies.py " + shlex.join(sys.argv[1:]))
        line = measurement(
            f"policy/nano/{claim}", value, unit=unit, n=1, against=against, command=command, provenance=self.provenance  # type: ignore[arg-type]
        )  # fmt: skip
        self.lines.append(line)
        print(f"{claim}: {value} {unit} {against}", flush=True)
        if self.options.json:
            write_measurements(self.options.json, sorted(self.lines, key=lambda line: line["claim"]))

    def targets(self) -> None:
        """Part 1."""
        device, processes = ("cpu", 1) if self.options.tiny else ("cuda", self.options.workers or 1)
        self.physis(
            "targets",
            ["data", "targets", f"data=[{self.options.data}]", f"device={device}", f"processes={processes}", "workers=1"],
        )  # fmt: skip

    def world_model(self) -> None:
        """Part 2."""
        options = self.options
        words = ["worldmodel", "experiment=nano", f"run.seed={options.backbone_seed}", f"run.steps={options.steps[0]}"]
        words += ["run.batch=2", "run.micro=2", "backbone=pico"] if options.tiny else []
        self.train(f"backbone_{options.backbone_seed}", words, self.backbone)

    def policies(self) -> None:
        """Part 3."""
        options = self.options
        with ThreadPoolExecutor(options.gpus * options.together) as pool:
            some = [pool.submit(self.policy, name, k % options.gpus) for k, name in enumerate(self.names())]
            for one in some:
                one.result()

    def policy(self, name: str, gpu: int) -> None:
        recipe, _, seed = name.partition("_")
        words = ["policy", "experiment=policy_nano", f"run.init={self.backbone / 'export'}", f"run.seed={seed}"]
        words += [f"video_weight={RECIPES[recipe]}", f"run.steps={self.options.steps[1]}", "run.batch=128"]
        words += ["run.batch=2", "run.micro=2"] if self.options.tiny else []
        self.train(name, words + self.options.more, self.work / name, gpu)

    def names(self) -> list[str]:
        return [f"{recipe}_{seed}" for seed in self.options.seeds for recipe in self.options.recipes]

    def evaluation(self) -> None:
        """Part 4: all policies in one table."""
        options = self.options
        some = ",".join(
            f"{name}:{{source:{self.work / name / 'export'},recipe:{name.partition('_')[0]},training_seed:{name.partition('_')[2]}}}"
            for name in self.names()
        )
        self._evaluate(
            "evaluation", f"policies={{{some}}}", options.tasks, [f"paired_seeds={str(len(options.seeds) > 1).lower()}"]
        )

    def planner(self) -> None:
        """Part 4: the planner of the backbone."""
        words = [f"planner.world_model={self.backbone / 'export'}", f"planner.decoder={DECODER}"]
        words += [] if self.options.tiny else ["planner.device=cuda", "planner.server=auto"]
        self._evaluate("planner", "policies=[planner]", self.options.planned, words)

    def _evaluate(self, name: str, policies: str, tasks: str, more: list[str]) -> None:
        options = self.options
        words = [
            "eval",
            "policy",
            policies,
            f"tasks=[{tasks}]",
            f"episodes={options.episodes}",
            "threads=1",
            "videos=0",
        ]
        words += ["policy.server=auto", "policy.device=cuda", "policy.compute=graph"] if not options.tiny else []
        words += [f"workers={options.workers}", "baselines=[]", f"output={self.work / name}", *more]
        self.physis(name, words)
        print((self.work / name / "summary.md").read_text(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="recordings with the simulator's truth and pictures of 240x320")
    parser.add_argument("--work", required=True)
    parser.add_argument("--codec", default="physisforcing/weights/vae")
    parser.add_argument("--seeds", default="0,1", type=lambda text: text.split(","), help="of the policies")
    parser.add_argument("--recipes", default=",".join(RECIPES), type=lambda text: text.split(","))
    parser.add_argument("--backbone-seed", type=int, default=0)
    parser.add_argument("--steps", default="1200,2500", type=lambda text: text.split(","), help="updates of each model")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--together", type=int, default=2, help="policies that a GPU trains at once")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--planned", default=PLANNED, help="the planner's tasks")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--workers", type=int, default=14, help="simulators at once")
    parser.add_argument("--readers", type=int, default=8, help="threads that decode the recordings")
    parser.add_argument("--more", nargs="*", default=[], help="further overrides of the policies")
    parser.add_argument("--parts", default="targets,world_model,policies,evaluation,planner")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on a CPU")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.tiny:
        options.steps, options.episodes, options.workers, options.together = ["1", "1"], 1, 0, 1
        options.tasks = options.planned = "click_bell"
    nano = Nano(options)
    for part in options.parts.split(","):
        getattr(nano, part)()


if __name__ == "__main__":
    main()
