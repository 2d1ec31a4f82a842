"""What each worker process may use of the machine: numeric threads, renderer threads, a GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def few_threads(workers: int) -> Iterator[None]:
    """Environment of the worker processes: one numeric thread each (OpenCV's too, which takes all cores otherwise), the machine's cores
    divided among software renderers."""
    numeric = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")
    wanted = dict.fromkeys(numeric, "1")
    wanted["LP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def visible_gpus(devices: Path = Path("/dev")) -> list[str]:
    """The NVIDIA GPUs this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    return [str(k) for k in range(len(list(devices.glob("nvidia[0-9]*"))))]


@contextlib.contextmanager
def one_gpu(number: int) -> Iterator[int]:
    """While active, a process that is started gets one of several GPUs, in turn by its ``number``; gives the number.

    SAPIEN draws with a GPU that CUDA sees where there is one, so this places drawing as well as torch.
    """
    gpus, before = visible_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    try:
        yield number
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif len(gpus) > 1:
            del os.environ["CUDA_VISIBLE_DEVICES"]
