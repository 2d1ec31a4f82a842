"""What PhysisForcing costs in a training step of Wan2.2-TI2V-5B: with cached targets, and with teachers on the fly.

    python benchmarks/physics_cost.py --cotracker-source FOLDER --json cost.json --minutes 8
    python benchmarks/physics_cost.py --cotracker-source FOLDER --teachers-only --profile --repetitions 10
    python benchmarks/physics_cost.py --tiny --cotracker-source FOLDER     # every line of it on a CPU, in a minute

One process builds diffusers' transformer of the real architecture with random weights in bfloat16 (what diffusers keeps in float32
stays so) and repeats, in an order drawn anew each time, at 480x640x81 (6,300 tokens), batch 1:

a   flow matching only
b   a, and both physics losses with the paper's heads, targets cached on the device
c   b, with targets computed in the step from the uint8 video by three teachers in their fast form
p   c, with the teachers in their plain form (CoTracker3 in float32, the encoders in bfloat16, nothing compiled)

A step is: targets (c, p), noise, forward, losses, backward, fused AdamW (bfloat16 moments), gradients set to None; no gradient
clipping; the video lies on the device. Nothing overlaps between steps: each is timed with CUDA events and waited for.
``--checkpointing auto`` tries without activation checkpointing and takes diffusers' own where memory runs out. Teachers have their
real architectures and random weights (CoTracker3 offline from the user's copy, Depth-Anything-V2 ViT-L on frame 0, V-JEPA 2 ViT-L
on 42 frames of 240x320), 25x25 queries; targets go through ``OnlineTeachers``. Times do not depend on what the weights are:
all shapes are static.

``eager`` and ``compiled`` (blocks compiled, one graph for all) are interleaved too. Ratios are medians of the ratios within a
repetition; intervals are of the median, from order statistics, 95 %. The file is written again every few repetitions.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import shlex
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cost_networks import FULL, TINY, Size, build_transformer, random_video
from cost_results import KINDS, Results
from cost_teachers import SEED, Clock, build_teachers

from physisforcing.core.errors import UserError
from physisforcing.planner.measurements import write_measurements
from physisforcing.worldmodel.flow_matching import FlowMatchingConfig, add_noise, flow_matching_loss, frame_timesteps
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.physics.forcing import PhysisForcing
from physisforcing.worldmodel.physics.relation import token_order
from physisforcing.worldmodel.teachers.online import OnlineTeachers

FLOW = FlowMatchingConfig(train_shift=1.0, motion_weight=0.0)
#: Repetitions between two writings of the file.
WRITE_EVERY = 3


class Training:
    """Everything that a step needs, and the step."""

    def __init__(self, size: Size, options: argparse.Namespace) -> None:
        self.size, self.device = size, torch.device(options.device)
        self.clock = Clock(self.device)
        torch.manual_seed(SEED)
        self.model, self.switch = build_transformer(size, self.device, options.backend)
        physics = PhysicsConfig(phi_hidden=size.hidden, psi_hidden=size.hidden)
        self.forcing = PhysisForcing(physics, width=size.width, teacher_dim=size.teacher_dim).to(self.device)
        self.optimizer = None
        if options.optimizer:
            parameters = [*self.model.parameters(), *self.forcing.parameters()]
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=self.device.type == "cuda")
        self.generator = torch.Generator(self.device).manual_seed(SEED)
        self.online: dict[str, OnlineTeachers] = {}
        self._batch()

    def _batch(self) -> None:
        frames, height, width = self.size.grid
        shape, generator, device = self.size.transformer, self.generator, self.device
        draw = partial(torch.rand, generator=generator, device=device)
        self.latents = torch.randn(
            1, shape["in_channels"], frames, 2 * height, 2 * width, generator=generator, device=device
        )
        text = torch.randn(1, self.size.text, shape["text_dim"], generator=generator, device=device)
        self.text = text.bfloat16()
        self.video = random_video(self.size, generator)
        points = self.size.queries[0] * self.size.queries[1]
        # A quarter of the points and of the tokens is physics-informative, as on real windows; times do not depend on it.
        self.cached = {
            "points_BFN2": draw(1, frames, points, 2),
            "visible_BFN": draw(1, frames, points) > 0.1,
            "select_BN": draw(1, points) > 0.75,
            "token_mask_BFhw": draw(1, frames, height, width) > 0.75,
            "teacher_BFhwC": draw(1, frames, height, width, self.size.teacher_dim),
        }

    def step(self, variant: str, *, compiled: bool = False) -> dict[str, float]:
        """One step; milliseconds of its parts, without those of the teachers in ``targets``."""
        frames, height, width = self.size.grid
        clock, switch = self.clock, self.switch
        switch.compiled, switch.wanted, switch.tapped = compiled, variant != "a", None
        clock.mark("")
        targets = None if variant == "a" else self.cached
        if variant in self.online:
            targets = self.online[variant](self.video, self.size.grid)
            clock.mark("reduction")
        clock.mark("targets")
        noise = torch.randn(self.latents.shape, generator=self.generator, device=self.device)
        sigma = torch.rand(1, generator=self.generator, device=self.device)
        timesteps = frame_timesteps(sigma, frames).repeat_interleave(height * width, 1)
        noisy = add_noise(self.latents, noise, sigma).bfloat16()
        velocity = self.model(noisy, timesteps, self.text, return_dict=False)[0]
        loss = flow_matching_loss(velocity, self.latents, noise, FLOW)
        if targets is not None:
            assert switch.tapped is not None and switch.tapped.requires_grad
            order = token_order(1, frames * height * width, self.generator)
            loss = loss + self.forcing(switch.tapped, self.size.grid, targets, order, sigma_B=sigma).loss
        switch.tapped = None
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.forcing.zero_grad(set_to_none=True)
        clock.mark("optimizer")
        spans = clock.spans()
        spans["loss"] = float(loss.detach())
        return spans

    def choose_checkpointing(self, wanted: str, variant: str) -> bool:
        """Whether diffusers' activation checkpointing is on, after a step (two, so that the optimiser's moments exist)."""
        for checkpointing in {"auto": (False, True), "on": (True,), "off": (False,)}[wanted]:
            (self.model.enable_gradient_checkpointing if checkpointing else self.model.disable_gradient_checkpointing)()
            if self._fits(variant, last=checkpointing or wanted == "off"):
                return checkpointing
            self.forget()
        raise AssertionError(wanted)

    def forget(self) -> None:
        """Free what a step that ran out of memory left behind."""
        self.switch.tapped, self.clock.moments = None, []
        self.model.zero_grad(set_to_none=True)
        self.forcing.zero_grad(set_to_none=True)
        if self.optimizer is not None:
            self.optimizer.state.clear()  # which may have been half made
        gc.collect()
        torch.cuda.empty_cache()

    def _fits(self, variant: str, *, last: bool) -> bool:
        try:
            for _ in range(2):
                self.step(variant)
        except torch.cuda.OutOfMemoryError:
            if last:
                raise
            return False
        return True


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    say(f"{what}: {time.perf_counter() - begun:.1f} s")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cotracker-source", help="folder with the package cotracker; none: the installed one")
    parser.add_argument("--json", type=Path, help="write measurements here")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="stop repeating after this long, counted from the start"
    )
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--variants", default="a,b,c,p", help="of a, b, c, p; p runs in eager mode only")
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--checkpointing", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--no-optimizer", dest="optimizer", action="store_false")
    parser.add_argument(
        "--tracker", choices=("fp16", "bf16", "fp32", "adapter"), default="fp16", help="CoTracker3 in c"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="float16", help="encoder and depth in c")
    parser.add_argument("--matmul", choices=("high", "highest"), default="high", help="of float32: high is TF32")
    parser.add_argument("--teachers-only", action="store_true", help="no transformer: time the teachers alone, c and p")
    parser.add_argument(
        "--profile", action="store_true", help="with --teachers-only: where the fast ones spend their time"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small networks: a rehearsal")
    options = parser.parse_args(arguments)
    options.backend = "aot_eager" if options.tiny and options.device == "cpu" else "inductor"
    if options.tiny:  # half precision is slow on a CPU
        options.repetitions, options.tracker = min(options.repetitions, 2), "fp32"
    options.variants, options.modes = options.variants.split(","), options.modes.split(",")
    if set(options.variants) - set("abcp") or set(options.modes) - {"eager", "compiled"}:
        parser.error("variants are a, b, c, p; modes are eager, compiled")
    return options


def main(arguments: list[str] | None = None) -> None:
    begun = time.perf_counter()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    torch.set_float32_matmul_precision(options.matmul)
    torch.backends.cudnn.benchmark = True
    size = TINY if options.tiny else FULL
    if options.teachers_only:
        teachers_alone(size, options, command(arguments), begun + 60 * options.minutes)
        return
    with told("transformer"):
        training = Training(size, options)
    count = sum(parameter.numel() for parameter in training.model.parameters())
    say(f"{count / 1e9:.3f} billion parameters, {size.grid} tokens, tap {size.tap}, {torch.__version__}")
    for variant, kind in KINDS.items():
        if variant in options.variants:
            with told(f"{kind} teachers"):
                training.online[variant] = build_teachers(kind, size, training.device, training.clock, options)
    cases = [
        (mode, variant)
        for mode in options.modes
        for variant in options.variants
        if (mode, variant) != ("compiled", "p")
    ]
    with told("first steps"):
        checkpointing = training.choose_checkpointing(
            options.checkpointing, options.variants[min(1, len(options.variants) - 1)]
        )
    say(f"activation checkpointing {'on' if checkpointing else 'off'}")
    results = Results(context(options, checkpointing, count), command(arguments))
    for mode, variant in cases:
        with told(f"warm-up of {mode} {variant}"):
            for _ in range(2):
                _reset_peak(training.device)
                spans = training.step(variant, compiled=mode == "compiled")
        results.memory[mode, variant] = _peak(training.device)
        say(f"  {results.memory[mode, variant]:.1f} GB, " + ", ".join(f"{k} {v:.1f}" for k, v in spans.items()))
    repeat(training, cases, results, options, begun + 60 * options.minutes)


def repeat(
    training: Training, cases: list[tuple[str, str]], results: Results, options: argparse.Namespace, end: float
) -> None:
    draw, longest = random.Random(SEED), 0.0
    for repetition in range(1, options.repetitions + 1):
        begun = time.perf_counter()
        if begun + 1.2 * longest > end:
            say("time is up")
            break
        rows = {}
        for mode, variant in draw.sample(cases, len(cases)):
            rows[mode, variant] = training.step(variant, compiled=mode == "compiled")
        for case in cases:  # whole repetitions only, so that ratios are of the same one
            results.times.setdefault(case, []).append(rows[case])
        longest = max(longest, time.perf_counter() - begun)
        say(
            f"{repetition}: "
            + ", ".join(f"{mode} {variant} {rows[mode, variant]['step']:.1f}" for mode, variant in cases)
        )
        if options.json and repetition % WRITE_EVERY == 0:
            write_measurements(options.json, results.lines())
    if not results.times:
        raise SystemExit("no repetition fitted into the time; give more --minutes")
    show(results.lines(), options.json)


def teachers_alone(size: Size, options: argparse.Namespace, said: str, end: float) -> None:
    device = torch.device(options.device)
    clock, generator = Clock(device), torch.Generator(device).manual_seed(SEED)
    video = random_video(size, generator)
    rows: dict[str, list[dict[str, float]]] = {}
    online = {}
    for kind in (KINDS[variant] for variant in options.variants if variant in KINDS):
        with told(f"{kind} teachers"):
            online[kind] = build_teachers(kind, size, device, clock, options)
            _reset_peak(device)
            for _ in range(2):
                online[kind](video, size.grid)
            clock.moments = []
        say(f"{kind} teachers: peak {_peak(device):.1f} GB")
    for repetition in range(options.repetitions):
        for kind in random.Random(repetition).sample(list(online), len(online)):
            clock.mark("")
            online[kind](video, size.grid)
            clock.mark("reduction")
            rows.setdefault(kind, []).append(clock.spans())
            say(f"{repetition + 1} {kind}: " + ", ".join(f"{k} {v:.1f}" for k, v in rows[kind][-1].items()))
        if time.perf_counter() > end:
            break
    results = Results(context(options, False, 0), said)
    show([line for kind, found in rows.items() for line in results.teacher_lines(kind, found)], options.json)
    if options.profile and "fast" in online:
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
        with torch.profiler.profile(activities=activities) as profile:
            online["fast"](video, size.grid)
            clock.spans()
        order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=order, row_limit=45, max_name_column_width=90), flush=True)


def show(lines: list[dict[str, Any]], file: Path | None) -> None:
    for line in lines:
        print(f"{line['claim']:44} {line['value']:>10} [{line['low']}, {line['high']}] {line['unit']}, n {line['n']}")
    if file:
        write_measurements(file, lines)


def context(options: argparse.Namespace, checkpointing: bool, count: int) -> dict[str, Any]:
    """What every line says of the run."""
    return {
        "model": "tiny" if options.tiny else "Wan2.2-TI2V-5B, random weights, bfloat16",
        "parameters": count,
        "video": "480x640x81, batch 1" if not options.tiny else "tiny",
        "activation_checkpointing": checkpointing,
        "optimizer": "fused AdamW, bfloat16 moments" if options.optimizer else "none",
        "float32_matmul": options.matmul,
        "teachers_fast": f"CoTracker3 {options.tracker}, V-JEPA 2 and depth {options.dtype}",
    }


def command(arguments: list[str]) -> str:
    """The command without the machine's folders."""
    kept, hide = [], False
    for argument in arguments:
        kept.append(Path(argument).name if hide else argument)
        hide = argument in ("--cotracker-source", "--json")
    return shlex.join(["python", "benchmarks/physics_cost.py", *kept])


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
