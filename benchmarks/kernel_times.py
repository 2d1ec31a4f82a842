"""Where the time of something that runs on a GPU goes, by kinds of kernels, as torch's profiler sees them (also inside of CUDA graphs)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

#: What a kernel's name says that it does, once it is none of inductor's; the first that fits counts.
KERNELS = {
    "copies": ("memcpy", "memset", "catarray", "copy_kernel", "nchwtonhwc", "nhwctonchw"),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "matrix_products": (
        "gemm",
        "gemv",
        "nvjet",
        "cutlass",
        "xmma",
        "splitk",
        "convolve",
        "conv2d",
        "conv3d",
        "fprop",
        "mm_",
    ),
}
#: How names of inductor's kernels begin, whose rest lists the operations before and after them: templates are matrix products.
INDUCTOR = {"triton_tem_": "matrix_products", "triton_": "fused"}
KINDS = ("attention", "matrix_products", "fused", "copies", "other")


@dataclass(slots=True)
class KernelTimes:
    """Of one call: milliseconds by the clock, and of each kind of kernel (``KINDS``) milliseconds and how many there are. ``dearest``: name,
    milliseconds and number of the kernels that take most."""

    whole_ms: float
    ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    dearest: list[tuple[str, float, float]] = field(default_factory=list)

    @property
    def between_ms(self) -> float:
        """Time in which no kernel ran; of streams beside each other 0."""
        return max(0.0, self.whole_ms - sum(self.ms.values()))


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name: one of ``KINDS``."""
    name = kernel.lower()
    for begin, kind in INDUCTOR.items():
        if name.startswith(begin):
            return kind
    return next((kind for kind, words in KERNELS.items() if any(word in name for word in words)), "other")


def kernel_times(step: Callable[[], Any], steps: int = 3) -> KernelTimes:
    """Of one call of ``step``, the mean of ``steps``: the clock without the profiler, kernels with it."""
    step()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    whole = 1e3 * (time.perf_counter() - begun) / steps
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return counted(whole, profile.key_averages(), steps)


def counted(whole_ms: float, events: Any, steps: int) -> KernelTimes:
    """What the profiler's ``events`` of ``steps`` calls say of one."""
    found = KernelTimes(whole_ms)
    events = [event for event in events if event.self_device_time_total > 0]
    for event in events:
        kind = kind_of(event.key)
        found.ms[kind] += event.self_device_time_total / 1e3 / steps
        found.counts[kind] += event.count / steps
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:8]:
        found.dearest.append((event.key[:100], event.self_device_time_total / 1e3 / steps, event.count / steps))
    return found


def kernel_shares(step: Callable[[], Any], steps: int = 3) -> dict[str, float]:
    """Milliseconds of a step in each kind of kernel and between kernels; prints the dearest kernels."""
    found = kernel_times(step, steps)
    for name, ms, count in found.dearest:
        print(f"  {ms:8.2f} ms  {count:6.0f}  {name}")
    spent = found.ms | {"between": found.between_ms}
    return {name: round(value, 2) for name, value in spent.items()}
