"""The paper's recipes at full architecture size with random weights: what a user's commands do, from recordings to a stock pipeline.

    python benchmarks/paper_recipes.py 5b --data runs/blocks --work /dev/shm/5b --json recipes.json
    python benchmarks/paper_recipes.py a14b --data runs/blocks --work /dev/shm/a14b --steps 40 --json recipes.json
    python benchmarks/paper_recipes.py 5b --tiny --data runs/blocks --work runs/tiny      # all of it on a CPU, in minutes

1. A pipeline folder with random weights of the published sizes (the text encoder has one layer: nothing of it is measured).
2. `physis data latents`: one window of one episode, its truth by the simulator. The autoencoder's latents are standardised.
3. `physis train worldmodel experiment=pf_...` with LoRA on that one window; what is measured as held out is the same window at eight
   noise levels. Beside the adapters the first and last layer are trained: those of random weights say nothing yet.
4. The run is killed with -9 in its second half and continued; the updates that were made twice are compared bit by bit.
5. The export in stock diffusers: a few steps to latents that must be finite, beside our own generation's of the same noise; with --clip-steps a
   whole clip by our own generation.
   --parts prepare,videos: instead of 3 to 5, what held-out videos (`large.videos=1`) cost a run in memory.
   --parts prepare,resume: instead of them, whether the last checkpoint of a run that was killed and continued is that of one left alone.

Lines are written after each part; a part that fails says so and ends the script with exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paper_pipelines import build, use_tiny_sizes
from paper_scaling import part_of_claim
from paper_whole_clip import PROMPT, compiling_clip, timed_clip

from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
from physisforcing.worldmodel.paper_generate import PaperConfig, PaperGenerator

#: Kind -> experiment, what is trained beside adapters, their rank, updates and rate.
KINDS: dict[str, dict[str, Any]] = {
    "5b": {"experiment": "pf_wan_5b", "also": ["patch_embedding", "proj_out"], "rank": 32, "steps": 200, "lr": 3e-4},
    "a14b": {"experiment": "pf_wan_a14b", "also": ["patch_embedding", "proj_out"], "rank": 32, "steps": 40, "lr": 2e-4},
    "cosmos3": {"experiment": "pf_cosmos3_nano", "also": ["proj_in", "proj_out"], "rank": 16, "steps": 200, "lr": 3e-4},
}
#: Frames, rows and columns that the paper trains with; rows of another size have it in their names.
BUCKET = "81x480x640"
#: What latents of stock diffusers and of our own generation may differ by in bfloat16, relative norm: a few steps' rounding, not other pictures.
APART = 0.1


class Recipe:
    """One recipe on one machine; ``lines`` are written after each part."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.kind = options, options.kind
        self.work, self.model = Path(options.work), Path(options.work) / "model"
        self.device = torch.device("cpu" if options.tiny else "cuda")
        self.settings = KINDS[self.kind]
        self.steps = options.steps or self.settings["steps"]
        options.lr = options.lr or (2e-3 if options.tiny else self.settings["lr"])
        self.bucket = "9x96x128" if options.tiny else options.bucket
        self.lines: list[dict[str, Any]] = []
        self.provenance = machine_provenance()
        self.command = placeless("python benchmarks/paper_recipes.py " + shlex.join(sys.argv[1:]))

    def note(self, name: str, value: float, unit: str, n: int = 1, **more: Any) -> None:
        size = "" if self.bucket == BUCKET else f"_{self.bucket}"
        claim = f"training/{self.settings['experiment']}{size}/{name}"
        line = measurement(
            claim,
            round(value, 5),
            unit=unit,
            n=n,
            seeds="0",
            against=more,
            command=self.command,
            provenance=self.provenance,
        )
        self.lines.append(line)
        print(f"{claim}: {value:.5g} {unit} {more}", flush=True)
        if self.options.json:
            write_measurements(self.options.json, self.lines)

    def physis(self, *words: str) -> None:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "physisforcing", *words], check=True)
        print(f"{' '.join(words[:2])}: {time.perf_counter() - begun:.1f} s", flush=True)

    def prepare(self) -> None:
        """Parts 1 and 2."""
        from physisforcing.core.lerobot import LeRobotDataset
        from physisforcing.worldmodel.data.clips.decode import cover

        frames, rows, columns = (int(side) for side in self.bucket.split("x"))
        recorded = LeRobotDataset(self.options.data).frames(0, range(frames))
        clip = np.stack([cover(frame, (rows, columns)) for frame in recorded])
        begun = time.perf_counter()
        if not (self.model / "model_index.json").is_file():
            build(self.kind, self.model, clip, self.device)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the commands that follow are processes of their own, on the same card
        print(f"pipeline: {time.perf_counter() - begun:.1f} s", flush=True)
        words = [
            f"data=[{self.options.data}]",
            f"model={self.model}",
            f"out={self.work / 'store'}",
            f"buckets=[{self.bucket}]",
        ]
        words += [
            "limit=1",
            "teacher.encoder.name=none",
            f"text_cache={self.work / 'text'}",
            f"device={self.device.type}",
        ]
        self.physis("data", "latents", *words, "--json")
        self._stores()

    def _stores(self) -> None:
        """The first window in a store of its own, and in another one eight times, as an episode that is held out."""
        source = self.work / "store"
        first = json.loads((source / "windows.jsonl").read_text().splitlines()[0])
        for name, count in (("one", 1), ("eight", 8)):
            target = self.work / name
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
            copies = [{**first, "episode": count, "start": 0, "content": f"{name}{k}"} for k in range(count)]
            (target / "windows.jsonl").write_text("".join(json.dumps(copy) + "\n" for copy in copies))

    def words(self, out: str, steps: int) -> list[str]:
        """Overrides of the training."""
        options, chosen = self.options, self.settings
        found = [f"experiment={chosen['experiment']}", f"model={self.model}", f"run.out={self.work / out}"]
        found += [f"data.latents=[{self.work / 'one'},{self.work / 'eight'}]", "data.heldout=1", "heldout_windows=8"]
        found += [f"lora.rank={4 if options.tiny else chosen['rank']}", f"lora.alpha={options.alpha:g}"]
        found += [f"lora.also=[{','.join(chosen['also'])}]", "physics.relations=rigid", "large.videos=0"]
        found += [
            f"run.steps={steps}",
            f"run.batch={options.batch}",
            "run.micro=1",
            "run.log_every=1",
            f"run.save_every={max(1, steps // 2)}",
        ]
        found += [f"run.eval_every={steps}", f"optim.lr={options.lr:g}", "optim.final_lr=0.05", "optim.warmup=10"]
        found += ["optim.weight_decay=0", "optim.clip=1.0", f"run.device={self.device.type}"]
        found += [f"run.checkpointing={options.checkpointing}"] if options.checkpointing else []
        found += [f"run.compile={options.compile}"] if options.compile else ["run.compile=none"] * options.tiny
        return found + options.more

    def train(self) -> None:
        """Parts 3 and 4: the run, killed once in its second half."""
        run, words = self.work / "run", self.words("run", self.steps)
        begun = time.perf_counter()
        before = self._killed(run, words)
        self.physis("train", "worldmodel", *words, "run.resume=true")
        after = {line["step"]: line for line in _lines(run)}
        self._compare(before, after)
        losses = json.loads((run / "heldout.json").read_text())
        steps = [line["step_ms"] for line in after.values()][3:]
        waits = [line["data_wait_pct"] for line in after.values()][3:]
        more = {
            "before": round(losses["before"]["heldout_fm"], 4), "after": round(losses["after"]["heldout_fm"], 4),
            "steps": self.steps, "seconds": round(time.perf_counter() - begun, 1), "learning_rate": self.options.lr, "batch": self.options.batch, "alpha": self.options.alpha,
        }  # fmt: skip
        self.note("overfit_ratio", more["after"] / more["before"], "loss / initial loss", n=8, **more)
        last = after[max(after)]
        self.note(
            "lora_step_ms", statistics.median(steps), "ms", n=len(steps), memory_gib=round(last["memory_gib"], 2),
            mfu_pct=round(last.get("mfu_pct", float("nan")), 2), data_wait_pct=round(statistics.median(waits), 3),
            bucket=self.bucket, checkpointing=self.options.checkpointing or "the recipe's",
        )  # fmt: skip

    def resume(self) -> None:
        """Two runs of the same settings, one of them killed once and continued, and every tensor of their last checkpoints: weights, heads, optimiser,
        average, random numbers."""
        from physisforcing.worldmodel.training.checkpoint import is_complete, load_training

        runs = [self.work / out for out in ("straight", "killed")]
        last = [run / f"step-{self.steps:06d}" for run in runs]
        for run in runs:
            shutil.rmtree(run, ignore_errors=True)  # what an earlier call left would be compared at once
        for run, place in zip(runs, last, strict=True):
            words = self.words(run.name, self.steps)
            if run.name == "killed":
                self._killed(run, words)
                words.append("run.resume=true")
            if not self._run_until(words, functools.partial(is_complete, place)):
                raise RuntimeError(f"{run} ended by itself before its last checkpoint")
        one, other = (load_training(place)[0] for place in last)
        pairs = {
            f"{group}/{key}": (value, other[group][key])
            for group, values in one.items()
            for key, value in values.items()
        }
        if sum(map(len, other.values())) != len(pairs):
            raise RuntimeError(f"{self.work}: the two checkpoints have other tensors")
        differing = {
            key: float((a.double() - b.double()).abs().max()) for key, (a, b) in pairs.items() if not torch.equal(a, b)
        }
        self.note(
            "resume_tensors_equal" + "".join(map(part_of_claim, self.options.more)), 1 - len(differing) / len(pairs), "tensors with equal bits / tensors", n=len(pairs), steps=self.steps,
            groups={group: len(values) for group, values in one.items()}, largest_difference=max(differing.values(), default=0.0),
            first_differing=sorted(differing)[:3],
        )  # fmt: skip

    def _killed(self, run: Path, words: list[str]) -> dict[int, dict[str, Any]]:
        """Start the run and kill it a few updates after its first checkpoint; the lines it wrote."""
        enough = self.steps // 2 + max(2, self.steps // 20)
        self._run_until(words, lambda: any(line["step"] >= enough for line in _lines(run)), killed=True)
        return {line["step"]: line for line in _lines(run)}

    def _run_until(self, words: list[str], reached: Callable[[], bool], *, killed: bool = False) -> bool:
        """Start the training and kill it once ``reached``; whether that is so. ``killed``: ``RuntimeError`` where it ends by itself."""
        process = subprocess.Popen([sys.executable, "-m", "physisforcing", "train", "worldmodel", *words])
        try:
            while process.poll() is None and not reached():
                time.sleep(0.05)
            ended = process.poll() is not None
        finally:
            process.kill()
            process.wait()
        if ended and killed:
            raise RuntimeError(f"the run ended by itself with {process.returncode}")
        return reached()

    def _compare(self, before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]]) -> None:
        names = ("loss", "fm", "pix", "sem", "grad_norm")
        twice = [step for step in before if step > self.steps // 2 and step in after]
        apart = [
            abs(before[step][name] / after[step][name] - 1) if after[step][name] else 0.0
            for step in twice
            for name in names
        ]
        equal = sum(all(before[step][name] == after[step][name] for name in names) for step in twice)
        self.note(
            "resume_equal", equal / max(1, len(twice)), "updates with equal bits / updates made twice", n=len(twice),
            largest_relative_difference=max(apart, default=float("nan")), terms=", ".join(names),
        )  # fmt: skip

    def videos(self) -> None:
        """Memory of a run that imagines and decodes a held-out window before, amid and after four updates, beside one that does not. ``card_gib``: the most
        that the run had of a card that nobody else uses, its context and what the allocator keeps included, asked ten times a second."""
        peaks, used = {}, {}
        for count in (0, 1):
            out = f"videos_{count}"
            words = self.words(out, 4) + [f"large.videos={count}", "run.eval_every=2"]
            with _watched(self.device) as most:
                self.physis("train", "worldmodel", *words)
            run = self.work / out
            peaks[count] = max(line["memory_gib"] for line in _lines(run))
            used[count] = most[0]
            made = len(list((run / "videos").glob("*.mp4")))
            if bool(made) != bool(count):
                raise RuntimeError(f"{run} has {made} videos with large.videos={count}")
        if self.device.type != "cuda":
            print("videos: memory needs a GPU; the runs ended as they should", flush=True)
            return
        chosen = self.options.checkpointing and f"_{self.options.checkpointing}"
        self.note(
            f"videos_memory{chosen}_gib", peaks[1], "GiB", without_videos_gib=round(peaks[0], 2), card_gib=used[1], card_without_videos_gib=used[0],
            bucket=self.bucket, checkpointing=self.options.checkpointing or "the recipe's",
        )  # fmt: skip

    def generate(self) -> None:
        """Part 5."""
        from PIL import Image

        from physisforcing.core.lerobot import LeRobotDataset

        frames, rows, columns = (int(side) for side in self.bucket.split("x"))
        picture = Image.fromarray(LeRobotDataset(self.options.data).frames(0, [0])[0]).resize((columns, rows))
        export = self.work / "run" / "export" / "transformer"
        begun = time.perf_counter()
        latents = _stock(
            self.kind, self.model, export, picture, (frames, rows, columns), self.device, self.options.generate_steps
        )
        finite = bool(latents.isfinite().all())
        self.note(
            "stock_generation", float(finite), "1: finite latents", steps=self.options.generate_steps,
            seconds=round(time.perf_counter() - begun, 1), std=round(float(latents.float().std()), 3),
        )  # fmt: skip
        if not finite:
            raise RuntimeError("latents of the export in stock diffusers are not finite")
        _free()
        apart = self._apart_from(latents, export, np.asarray(picture), (frames, rows, columns))
        self.note("stock_apart_from_ours", apart, "relative norm", steps=self.options.generate_steps)
        if not apart < (1e-5 if self.options.tiny else APART):
            raise RuntimeError(f"our latents of the export differ from stock diffusers' by {apart}")
        _free()
        if self.options.clip_steps:
            self._clip(picture, export, (frames, rows, columns))

    def _apart_from(
        self, latents: torch.Tensor, export: Path, picture_HWC: np.ndarray, size: tuple[int, int, int]
    ) -> float:
        """Relative norm of what our own generation, with what the stock pipeline does, makes otherwise than ``latents``."""
        like_stock: dict[str, dict[str, Any]] = {
            "5b": {"shift": 5.0},
            "a14b": {"shift": 5.0, "first_latent": "mask"},
            "cosmos3": {"shift": 10.0, "fps": 24.0},
        }
        maker = self._generator(
            export, size, steps=self.options.generate_steps, sampler="unipc", guidance=1.0, exact_times=True, **like_stock[self.kind]
        )  # fmt: skip
        with torch.no_grad():
            ours = next(maker.latents(picture_HWC, PROMPT, [0]))[1].to(latents).float()
        return float((ours - latents.float()).norm() / latents.float().norm())

    def _clip(self, picture: Any, export: Path, size: tuple[int, int, int]) -> None:
        """Seconds of a whole clip by our generation: denoising with guidance, and the decoder."""
        compile_blocks = "none" if self.options.tiny else "blocks"
        maker = self._generator(export, size, steps=self.options.clip_steps, compile=compile_blocks)
        compiling_clip(maker, np.asarray(picture))
        seconds, more = timed_clip(maker, np.asarray(picture), 1)
        self.note("clip_seconds", seconds, "s a clip", **more)

    def _generator(self, export: Path, size: tuple[int, int, int], **settings: Any) -> PaperGenerator:
        config = PaperConfig(
            transformer=str(export), device=self.device.type, dtype="fp32" if self.options.tiny else "bf16", frames=size[0],
            height=size[1], width=size[2], text_cache=self.work / "text", **settings,
        )  # fmt: skip
        return PaperGenerator(self.model, config)


def _stock(
    kind: str, model: Path, export: Path, picture: Any, size: tuple[int, int, int], device: torch.device, steps: int
) -> torch.Tensor:
    """Latents of diffusers' own pipeline with the exported transformer."""
    import diffusers

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cosmos = kind == "cosmos3"
    name = "Cosmos3OmniTransformer" if cosmos else "WanTransformer3DModel"
    transformer = getattr(diffusers, name).from_pretrained(export, dtype=dtype, local_files_only=True)
    pipeline_class = diffusers.Cosmos3OmniPipeline if cosmos else diffusers.WanImageToVideoPipeline
    options = {"enable_safety_checker": False} if cosmos else {}
    vae = diffusers.AutoencoderKLWan.from_pretrained(model / "vae", dtype=torch.float32, local_files_only=True)
    pipeline = pipeline_class.from_pretrained(
        model, transformer=transformer, vae=vae, dtype=dtype, local_files_only=True, **options
    )
    pipeline.to(device)
    made = pipeline(
        image=picture, prompt=PROMPT, height=size[1], width=size[2], num_frames=size[0], num_inference_steps=steps,
        guidance_scale=1.0, generator=torch.Generator().manual_seed(0), output_type="latent",
    )  # fmt: skip
    return made.video if hasattr(made, "video") else made.frames


def _free() -> None:
    """Models that nothing refers to any more leave the GPU's memory; some hold themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _watched(device: torch.device) -> Iterator[list[float]]:
    """[GiB that others, such as a command that runs meanwhile, had on the card at most beyond what is there now]; [0.0] on a CPU."""
    most, ended = [0.0], threading.Event()

    def used() -> float:
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30

    def watch(before: float) -> None:
        while not ended.wait(0.1):
            most[0] = max(most[0], round(used() - before, 2))

    watcher = threading.Thread(target=watch, args=(used() if device.type == "cuda" else 0.0,))
    if device.type == "cuda":
        watcher.start()
    try:
        yield most
    finally:
        ended.set()
        if device.type == "cuda":
            watcher.join()


def _lines(run: Path) -> list[dict[str, Any]]:
    """The lines of updates in a run's log; a line that is being written is left out."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    found = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in found if "grad_norm" in line]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--data", required=True, help="a dataset with the simulator's truth")
    parser.add_argument("--work", required=True)
    parser.add_argument("--json")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--bucket", default=BUCKET)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float, help="falls with the width of the model where none is given")
    parser.add_argument("--batch", type=int, default=1, help="noise levels of the window in an update, one at a time")
    parser.add_argument("--alpha", type=float, default=64.0)
    parser.add_argument("--checkpointing", default="")
    parser.add_argument("--compile", default="")
    parser.add_argument("--more", nargs="*", default=[], help="further overrides, such as run.deterministic=true")
    parser.add_argument("--generate-steps", type=int, default=4)
    parser.add_argument("--clip-steps", type=int, default=0, help="denoising steps of the timed clip; 0 times none")
    parser.add_argument("--parts", default="prepare,train,generate")
    options = parser.parse_args()
    if options.tiny:
        use_tiny_sizes()
    recipe = Recipe(options)
    for part in options.parts.split(","):
        getattr(recipe, part)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
