"""How long a plan of the policy takes, from the cameras' pictures to joint targets: stage by stage, kernel by kernel and as CUDA graphs, in one run.

    python benchmarks/policy_latency.py --json policy_latency.json                            # full size on a GPU, random weights
    python benchmarks/policy_latency.py --pico --threads 2 --json policy_latency_pico.json    # the small models' size on a CPU
    python benchmarks/policy_latency.py --tiny                                                # the full-size path rehearsed on a CPU

Full size is Wan2.2-TI2V-5B's transformer with the 1.02 B action expert, a canvas of three cameras (384x320), bfloat16, ten steps, a chunk of 32
actions of 14 numbers. A plan is `WorldActionPolicy.act`: `canvas` makes one picture of three, `encode` is the autoencoder, `prefill` the keys of
the first frame and of the text, `steps` the ten action steps, `total` all of it by the wall clock, copies and denormalisation included. The
sentence's embedding is cached, as it is within an episode. `cold` is the first plan of an arm, with its captures and compilation. Actions are
compared in z-scores, before they are denormalised. Of arms that are CUDA graphs every stage is also told apart by kinds of kernels.

eager         kernel by kernel                        graph         as CUDA graphs
compile       blocks compiled, in CUDA graphs         fused         fewer kernels, and the encoder of one picture compiled
fused_half    and the autoencoder in bfloat16
"""

from __future__ import annotations

import argparse
import copy
import gc
import shlex
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paper_pipelines
import torch
from cost_results import median_interval
from kernel_times import KernelTimes, kernel_times

from physisforcing.core.types import Observation
from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
from physisforcing.policy.act import ExecutionConfig, WorldActionPolicy
from physisforcing.policy.checkpoint import PolicyInfo
from physisforcing.policy.config import PolicyModelConfig
from physisforcing.policy.encoding import first_frame_by
from physisforcing.policy.graphs import Graphs
from physisforcing.policy.model import WorldActionModel
from physisforcing.policy.normalization import ActionStatistics
from physisforcing.policy.planning import ChunkModel, PlanningConfig, load_chunk_model
from physisforcing.policy.requests import PlanRequest
from physisforcing.worldmodel.data.canvas import CANVASES
from physisforcing.worldmodel.pipeline_vae import PipelineVae

HELPERS = Path(__file__).resolve().parents[1] / "tests" / "helpers"
STAGES = ("canvas", "encode", "prefill", "steps")
STATES = 14
#: Plans whose actions are compared between arms, and by how many standard deviations they may differ: with more it ends with exit code 1.
COMPARED, TOLERANCE = 8, 0.002
#: Arm -> policy.compute.
ARMS = {"eager": "eager", "graph": "graph", "compile": "compile", "fused": "fused", "fused_half": "fused"}


class FixedText:
    """Embeddings that are there already, as those of an episode's sentence."""

    def __init__(self, tokens: int, width: int, device: torch.device) -> None:
        drawn = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(2))
        self.text = (0.1 * drawn).to(device)

    def prepare(self, instructions: list[str]) -> None:
        """They are there."""

    def batch(self, instructions: list[str]) -> torch.Tensor:
        return self.text.expand(len(instructions), -1, -1).contiguous()


@dataclass(slots=True)
class Arm:
    """Milliseconds of the warm plans by stage, of the first one, actions of the compared ones, GiB at most, kernels by stage."""

    cold_ms: float = 0.0
    ms: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in (*STAGES, "total")})
    actions_BPA: torch.Tensor | None = None
    memory_gib: float = 0.0
    kernels: dict[str, KernelTimes] = field(default_factory=dict)


def full_size(options: argparse.Namespace, device: torch.device) -> tuple[Any, ...]:
    """-> (model, what belongs to it, autoencoder, sentences) with random weights, the last layer's too."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    torch.manual_seed(0)
    shape, sizes = paper_pipelines.TRANSFORMERS["5b"], {"width": 1024, "ffn_dim": 4096}
    if options.tiny:
        shape = shape | {"num_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "text_dim": 16, "freq_dim": 32}
        sizes = {"width": 32, "ffn_dim": 48}
    config = PolicyModelConfig(action_dim=STATES, state_dim=STATES, initial="random", **sizes)
    channels = int(shape["in_channels"])
    with device:
        model = WorldActionModel(WanTransformer3DModel(**shape), config)
        torch.nn.init.normal_(model.expert.proj_out.weight, std=0.02)
        sys.path.insert(0, str(HELPERS))
        neutral = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
        if options.tiny:
            import tiny_paper

            vae = tiny_paper.vae(channels, 16)
        else:
            vae = AutoencoderKLWan(**paper_pipelines.VAES[channels], **neutral)
    layout = CANVASES["robotwin"]
    info = PolicyInfo(canvas="robotwin", size=(layout.height, layout.width), frames=9, frame_stride=4)
    return model, info, PipelineVae(vae), FixedText(options.tokens, int(shape["text_dim"]), device)


def statistics() -> ActionStatistics:
    draw = np.random.default_rng(0)
    return ActionStatistics.of([draw.normal(size=(64, STATES))], [draw.normal(size=(64, STATES))])


def observations(count: int, cameras: tuple[str, ...]) -> list[Observation]:
    """Smooth pictures of three cameras as the simulator draws them, 240x320."""
    found = []
    for number in range(count):
        draw = np.random.default_rng(number)
        images = {
            name: np.kron(draw.integers(0, 256, (15, 20, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
            for name in cameras
        }
        state = draw.normal(size=STATES).astype(np.float32)
        found.append(Observation(images=images, state_A=state, measured_A=state, instruction="press", step=0))
    return found


def measure(chunks: ChunkModel, options: argparse.Namespace) -> Arm:
    """The first plan, the warm ones, and those that are compared."""
    arm, device = Arm(), chunks.device
    policy = WorldActionPolicy(chunks, ExecutionConfig())
    seen = observations(min(options.plans, 16), CANVASES[chunks.info.canvas].names)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for number in range(1 + options.warm + options.plans):
        policy.reset(task="", seed=number, instruction="press the bell")
        begun = time.perf_counter()
        policy.act(seen[number % len(seen)])
        spent = 1e3 * (time.perf_counter() - begun)
        if number == 0:
            arm.cold_ms = spent
        elif number > options.warm:
            told = policy.telemetry()
            for stage in STAGES:
                arm.ms[stage].append(1e3 * told[f"{stage}_s"])
            arm.ms["total"].append(spent)
    if device.type == "cuda":
        arm.memory_gib = torch.cuda.max_memory_allocated(device) / 2**30
    made = [chunks.normalised(a_request(chunks, number))[0] for number in range(COMPARED)]
    arm.actions_BPA = torch.cat(made)
    return arm


def stage_kernels(chunks: ChunkModel) -> dict[str, KernelTimes]:
    """Kernels of each stage of an arm that is CUDA graphs."""
    if not isinstance(chunks.stages, Graphs):
        return {}
    found = {name: kernel_times(replay) for name, replay in chunks.stages.alone().items()}
    for stage, kernels in found.items():
        for kernel, ms, count in kernels.dearest:
            print(f"  {stage:8} {ms:8.3f} ms  {count:6.0f}  {kernel}", flush=True)
    return found


def a_request(chunks: ChunkModel, number: int) -> PlanRequest:
    draw = np.random.default_rng(1000 + number)
    lags = len(chunks.spec.lags)
    return PlanRequest(
        canvas_BHWC=draw.integers(0, 256, (1, *chunks.spec.size, 3), dtype=np.uint8),
        instructions=["press the bell"],
        state_BKA=draw.normal(size=(1, lags, STATES)).astype(np.float32),
        seeds_B=np.array([number], np.int64),
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Arm], int, int]:
    """-> (arms by name, parameters of the video backbone, of the action expert and proprioception)."""
    device = torch.device("cpu" if options.tiny or options.pico else "cuda")
    arms: dict[str, Arm] = {}
    with tempfile.TemporaryDirectory() as place:
        if options.pico:
            sys.path.insert(0, str(HELPERS))
            from pico_policy import write_pico_policy

            folder = Path(options.policy or write_pico_policy(Path(place) / "pico"))
        else:
            parts = full_size(options, device)
        for name in options.arms:
            try:
                chunks = load_arm(folder, name, options) if options.pico else full_arm(parts, name, options, device)
                expert = sum(p.numel() for _, p in chunks.model.action_parameters())
                sizes = sum(p.numel() for p in chunks.model.parameters()) - expert, expert
                arms[name] = measure(chunks, options)
                told = {stage: f"{np.median(times):.2f}" for stage, times in arms[name].ms.items()}
                print(f"{name:16} cold {arms[name].cold_ms:.0f} ms, warm {told}", flush=True)
                arms[name].kernels = stage_kernels(chunks)
                if options.json:  # what is measured is there, whatever ends a later arm
                    write_measurements(options.json, lines(arms, options, sizes))
            except RuntimeError:  # a capture, compilation or profile that fails must not take the other arms with it
                print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
            chunks = None  # its graphs and their memory, before the next arm has its own
            gc.collect()  # its stages refer to it
    if not arms:
        raise SystemExit("no arm could be measured")
    return arms, *sizes


def load_arm(folder: Path, name: str, options: argparse.Namespace) -> ChunkModel:
    return load_chunk_model(folder, PlanningConfig(device="cpu", compute=ARMS[name], steps=options.steps))


def full_arm(parts: tuple[Any, ...], name: str, options: argparse.Namespace, device: torch.device) -> ChunkModel:
    """One model in turn: what is compiled or joined stays so, so that `eager` and `graph` come first."""
    model, info, vae, sentences = parts
    compute, half = ARMS[name], name == "fused_half"
    config = PlanningConfig(device=device.type, compute=compute, steps=options.steps, autoencoder_half=half)
    first_frame = first_frame_by(
        PipelineVae(copy.deepcopy(vae.vae)) if half else vae, device, fast=compute == "fused", half=half
    )
    return ChunkModel(model, info, statistics(), first_frame, sentences, config)


def lines(arms: dict[str, Arm], options: argparse.Namespace, sizes: tuple[int, int]) -> list[dict[str, Any]]:
    """Milliseconds of every stage and arm, differences from eager, memory. Value and interval are of the median; the 5th and 95th percentile of
    single plans are beside them, in ``against``."""
    size = "pico" if options.pico else "tiny" if options.tiny else "full"
    shared: dict[str, Any] = {
        "command": placeless(shlex.join(["python", *sys.argv])),
        "provenance": machine_provenance(),
    }
    shown = {"video_parameters": sizes[0], "action_parameters": sizes[1], "steps": options.steps}
    first, found = next(iter(arms)), []
    for name, arm in arms.items():
        claim = f"policy/latency/{size}/{name}"
        about = shown | ({} if options.pico else {"vae": "bf16" if name == "fused_half" else "fp32"})
        for stage, times in arm.ms.items():
            p5, value, p95 = (float(one) for one in np.percentile(times, [5, 50, 95]))
            low, high = median_interval(times)
            against = about | {"p5": p5, "p95": p95, f"{first}_ms": float(np.median(arms[first].ms[stage]))}
            found.append(
                measurement(
                    f"{claim}/{stage}_ms", value, unit="ms", low=low, high=high, n=len(times), against=against, **shared
                )
            )  # fmt: skip
        found.append(measurement(f"{claim}/cold_ms", arm.cold_ms, unit="ms", n=1, against=about, **shared))
        rate = 1e3 / float(np.median(arm.ms["total"]))
        found.append(
            measurement(f"{claim}/plans_per_s", rate, unit="1/s", n=len(arm.ms["total"]), against=about, **shared)
        )
        assert arm.actions_BPA is not None and arms[first].actions_BPA is not None
        gap = float((arm.actions_BPA - arms[first].actions_BPA).abs().max())
        found.append(
            measurement(
                f"{claim}/largest_difference", gap, unit="z", n=COMPARED,
                against={"arm": first, "largest_action": float(arms[first].actions_BPA.abs().max())}, **shared,
            )
        )  # fmt: skip
        for stage, kernels in arm.kernels.items():
            spent = kernels.ms | {"between": kernels.between_ms}
            for kind, ms in spent.items():
                against = {"whole_ms": kernels.whole_ms, "kernels": kernels.counts.get(kind)}
                found.append(
                    measurement(f"{claim}/kernels/{stage}/{kind}_ms", ms, unit="ms", n=3, against=against, **shared)
                )
        if arm.memory_gib:
            found.append(measurement(f"{claim}/memory_gib", arm.memory_gib, unit="GiB", n=1, against=about, **shared))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pico", action="store_true", help="the small models' size, on a CPU")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal of the full size, on a CPU")
    parser.add_argument("--policy", default="", help="with --pico: a policy's folder instead of a drawn one")
    parser.add_argument(
        "--arms", nargs="*", default=[], choices=tuple(ARMS), help="the first one is what is compared with"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=128, help="of a sentence")
    parser.add_argument("--plans", type=int, default=100, help="that are timed")
    parser.add_argument("--warm", type=int, default=5, help="plans before those")
    parser.add_argument("--threads", type=int, default=0, help="numeric threads on a CPU")
    parser.add_argument("--json")
    options = parser.parse_args()
    options.arms = options.arms or (["eager"] if options.pico or options.tiny else list(ARMS))
    if options.pico and "fused_half" in options.arms:
        parser.error("--arms fused_half: the small models' autoencoder has one precision")
    if options.threads:
        torch.set_num_threads(options.threads)
    arms, *sizes = run(options)
    found = lines(arms, options, (sizes[0], sizes[1]))
    for line in found:
        span = "" if line["low"] is None else f"  [{line['low']:.2f}, {line['high']:.2f}]"
        if "p95" in (line["against"] or {}):
            span += f", single plans {line['against']['p5']:.2f} to {line['against']['p95']:.2f}"
        print(f"{line['claim']}: {line['value']:.4g} {line['unit']}{span}")
    if options.json:
        write_measurements(options.json, found)
    apart = {line["claim"]: line["value"] for line in found if line["claim"].endswith("/largest_difference")}
    if far := [name for name, value in apart.items() if not value <= TOLERANCE]:
        parser.exit(1, f"{', '.join(far)}: actions differ by more than {TOLERANCE} standard deviations\n")


if __name__ == "__main__":
    main()
