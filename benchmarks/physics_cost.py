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
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from physisforcing.core.errors import UserError
from physisforcing.planner.measurements import machine_provenance, measurement, write_measurements
from physisforcing.worldmodel.flow_matching import FlowMatchingConfig, add_noise, flow_matching_loss, frame_timesteps
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.physics.forcing import PhysisForcing
from physisforcing.worldmodel.physics.relation import token_order
from physisforcing.worldmodel.teachers.cotracker3 import CoTracker3
from physisforcing.worldmodel.teachers.depth_anything import DepthAnything
from physisforcing.worldmodel.teachers.fast_cotracker import FastCoTracker3
from physisforcing.worldmodel.teachers.fast_vjepa2 import speed_up
from physisforcing.worldmodel.teachers.online import OnlineTeachers
from physisforcing.worldmodel.teachers.vjepa2 import VJepa2

SEED = 0
FLOW = FlowMatchingConfig(train_shift=1.0, motion_weight=0.0)
#: Pixels a token, in height and width: the autoencoder's 16 times patches of 2.
PIXELS = 32
#: Repetitions between two writings of the file.
WRITE_EVERY = 3
#: Variant -> its name in claims.
NAMES = {"a": "a", "b": "b", "c": "c", "p": "c_plain"}
#: Variant with teachers -> their form.
KINDS = {"c": "fast", "p": "plain"}
PARTS = ("targets", "forward", "backward", "optimizer")
TEACHERS = ("tracker", "depth", "encoder")


@dataclass(slots=True, kw_only=True)
class Size:
    """``transformer``: arguments of WanTransformer3DModel. ``grid``: tokens (F, h, w). ``tap``: block, counted from 1."""

    transformer: dict[str, Any]
    grid: tuple[int, int, int]
    tap: int
    text: int
    queries: tuple[int, int]
    hidden: int
    teacher_dim: int
    working: tuple[int, int] | None = None

    @property
    def width(self) -> int:
        return self.transformer["num_attention_heads"] * self.transformer["attention_head_dim"]


FULL = Size(
    transformer={
        "patch_size": (1, 2, 2),
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 30,
        "in_channels": 48,
        "out_channels": 48,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 14336,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
    },
    grid=(21, 15, 20),
    tap=15,
    text=512,
    queries=(25, 25),
    hidden=2048,
    teacher_dim=1024,
)
TINY = Size(
    transformer=FULL.transformer
    | {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "num_layers": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 64,
    },
    grid=(2, 3, 4),
    tap=2,
    text=8,
    queries=(3, 4),
    hidden=32,
    teacher_dim=48,
    working=(64, 96),
)


class Clock:
    """Moments of a step on the device; ``spans`` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.moments: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """Now ends what is called ``name``; an empty name only begins something."""
        moment: Any = time.perf_counter()
        if self.cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.moments.append((name, moment))

    def spans(self) -> dict[str, float]:
        """Milliseconds from each mark to the next by name (the same name adds up), and of everything as ``step``."""
        if self.cuda:
            torch.cuda.synchronize()
        between = self._between
        spans = {"step": between(self.moments[0][1], self.moments[-1][1])}
        for (_, before), (name, after) in zip(self.moments, self.moments[1:]):
            if name:
                spans[name] = spans.get(name, 0.0) + between(before, after)
        self.moments = []
        return spans

    def _between(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) if self.cuda else 1e3 * (after - before)


class Switch:
    """State that all blocks share: whether they run compiled, and what the tapped one gave in this step."""

    def __init__(self) -> None:
        self.compiled = False
        self.wanted = False
        self.tapped: Tensor | None = None


class Block(nn.Module):
    """A stock block, plain or compiled, whose output is kept if it is the tapped one.

    The keeping stands outside of the compiled region, and only the first output of a step counts: under activation checkpointing
    the block runs again in the backward pass, where its output is another tensor.
    """

    def __init__(self, block: nn.Module, compiled: Callable[..., Tensor], switch: Switch, *, tapped: bool) -> None:
        super().__init__()
        self.block, self.compiled, self.switch, self.tapped = block, compiled, switch, tapped

    def forward(self, *inputs: Any) -> Tensor:
        out = self.compiled(self.block, *inputs) if self.switch.compiled else self.block(*inputs)
        if self.tapped and self.switch.wanted:
            self.switch.wanted, self.switch.tapped = False, out
        return out


def call_block(block: nn.Module, *inputs: Any) -> Tensor:
    return block(*inputs)


def build_transformer(size: Size, device: torch.device, backend: str) -> tuple[Any, Switch]:
    from diffusers import WanTransformer3DModel

    with device:
        model = WanTransformer3DModel(**size.transformer)
    exact = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if not exact & set(name.split(".")):
            parameter.data = parameter.data.bfloat16()
    switch, compiled = Switch(), torch.compile(call_block, dynamic=False, backend=backend)
    for number, block in enumerate(model.blocks, start=1):
        model.blocks[number - 1] = Block(block, compiled, switch, tapped=number == size.tap)
    return model.train(), switch


class Timed:
    """A teacher whose one method marks its beginning and its end on a clock."""

    def __init__(self, name: str, teacher: Any, method: str, clock: Clock) -> None:
        self._name, self._teacher, self._method, self._clock = name, teacher, method, clock

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._teacher, name)
        return self._timed(value) if name == self._method else value

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            self._clock.mark("reduction")  # what came before, between the teachers
            found = method(*inputs)
            self._clock.mark(self._name)
            return found

        return run


def build_teachers(
    kind: str, size: Size, device: torch.device, clock: Clock, options: argparse.Namespace
) -> OnlineTeachers:
    """``kind``: ``fast`` or ``plain``."""
    tiny = size is TINY
    half = getattr(torch, options.dtype if kind == "fast" else "bfloat16")
    tracker: Any = CoTracker3.with_random_weights(SEED, source=options.cotracker_source, device=device)
    if size.working:
        tracker.network.model_resolution = size.working
    encoder = VJepa2.from_config(tiny_encoder() if tiny else None, device=device, dtype=half)
    depth = DepthAnything.from_config(tiny_depth() if tiny else None, device=device, dtype=half)
    if kind == "fast":
        tracker = fast_tracker(tracker, options)
        encoder = speed_up(encoder, compiled=True, backend=options.backend)
        for part in (depth.model.neck, depth.model.head):
            part.to(memory_format=torch.channels_last)
    timed = SimpleNamespace(
        config=SimpleNamespace(**{name: SimpleNamespace(name=name) for name in TEACHERS}),
        tracker=Timed("tracker", tracker, "track", clock),
        depth=Timed("depth", depth, "depth", clock),
        encoder=Timed("encoder", encoder, "encode", clock),
    )
    return OnlineTeachers(timed, PhysicsConfig(), grid=size.queries)


def fast_tracker(tracker: CoTracker3, options: argparse.Namespace) -> Any:
    if options.tracker == "adapter":
        return tracker
    return FastCoTracker3(tracker, dtype=options.tracker, compiled=True, backend=options.backend)


def tiny_encoder() -> Any:
    from transformers import VJEPA2Config

    predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    shape = {"hidden_size": TINY.teacher_dim, "num_hidden_layers": 2, "num_attention_heads": 4}
    return VJEPA2Config(**shape, **predictor, crop_size=64, frames_per_clip=8)


def tiny_depth() -> Any:
    from transformers import DepthAnythingConfig, Dinov2Config

    shape = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 70}
    backbone = Dinov2Config(**shape, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    neck = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "head_hidden_size": 4}
    return DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=24, **neck)


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


def median_interval(values: list[float]) -> tuple[float, float]:
    """Bounds of the median at 95 % or more, from order statistics (no assumption on the distribution); few values: their range."""
    ordered, n = sorted(values), len(values)
    place = 0
    while place + 1 <= (n - 1) // 2 and 2 * sum(comb(n, k) for k in range(place + 2)) / 2**n <= 0.05:
        place += 1
    return ordered[place], ordered[n - 1 - place]


@dataclass(slots=True)
class Results:
    """Times by (mode, variant), and everything that a line of the file says besides."""

    context: dict[str, Any]
    command: str
    times: dict[tuple[str, str], list[dict[str, float]]] = field(default_factory=dict)
    memory: dict[tuple[str, str], float] = field(default_factory=dict)

    def line(self, claim: str, values: list[float], unit: str, **against: Any) -> dict[str, Any]:
        low, high = median_interval(values)
        digits = 4 if "/" in unit else 2
        return measurement(
            f"physics/cost/{claim}",
            round(statistics.median(values), digits),
            unit=unit,
            low=round(low, digits),
            high=round(high, digits),
            n=len(values),
            seeds=str(SEED),
            against=against | self.context,
            command=self.command,
            provenance=self.provenance,
        )

    @property
    def provenance(self) -> dict[str, Any]:
        if "provenance" not in _ONCE:
            _ONCE["provenance"] = machine_provenance()
        return _ONCE["provenance"]

    def lines(self) -> list[dict[str, Any]]:
        found = []
        for (mode, variant), rows in self.times.items():
            parts = {f"{name}_ms": round(statistics.median(row[name] for row in rows), 2) for name in PARTS}
            peak = {"peak_memory_gb": round(self.memory.get((mode, variant), 0.0), 2)}
            steps = [row["step"] for row in rows]
            label = NAMES[variant]
            found.append(self.line(f"{mode}/{label}_step_ms", steps, "ms", **parts, **peak))
            for base in dict.fromkeys((mode, "eager")):
                reference = [row["step"] for row in self.times.get((base, "a"), ())]
                if (variant == "a" and base == mode) or len(reference) < len(rows):
                    continue
                ratios = [a / b for a, b in zip(steps, reference)]
                name = f"{label}_over_a" if base == mode else f"{label}_over_eager_a"
                medians = {f"{base}_a_ms": round(statistics.median(reference), 2)}
                medians |= {f"{mode}_{label}_ms": round(statistics.median(steps), 2)}
                found.append(self.line(f"{mode}/{name}", ratios, "step time / step time", **medians))
            if mode == "eager" and variant in KINDS:
                found += self.teacher_lines(KINDS[variant], rows)
        return found

    def teacher_lines(self, kind: str, rows: list[dict[str, float]]) -> list[dict[str, Any]]:
        parts = (*TEACHERS, "reduction")
        total = [sum(row[name] for name in parts) for row in rows]
        lines = [self.line(f"teacher/{name}/{kind}_ms", [row[name] for row in rows], "ms") for name in parts]
        return [*lines, self.line(f"teacher/all/{kind}_ms", total, "ms")]


_ONCE: dict[str, Any] = {}


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


def random_video(size: Size, generator: torch.Generator) -> Tensor:
    frames, height, width = size.grid
    shape = (1, 1 + 4 * (frames - 1), PIXELS * height, PIXELS * width, 3)
    return torch.randint(0, 256, shape, generator=generator, device=generator.device, dtype=torch.uint8)


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
