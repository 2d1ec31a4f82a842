"""The process that holds a world model or a policy for the simulators of an evaluation: started, watched, started again when it dies."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from physisforcing.core.connection import TOKEN_VARIABLE

if TYPE_CHECKING:
    from physisforcing.envs.spawn import SpawnedServer

    from .episode_settings import EpisodeSettings

#: Loading a large model from a slow disk takes its time.
START_S = 600.0
#: How often a server that died is started again in one evaluation.
RESTARTS = 3
#: Samples or plans that a server on a GPU computes together, always exactly so many; on a CPU one by one.
GPU_BATCH = 16


@dataclass(slots=True, kw_only=True, frozen=True)
class ServerAddress:
    """Where a server listens. ``connect_s``: how long a client waits for one that is being started again."""

    address: str
    token: str = field(default="", repr=False)
    connect_s: float = 10.0


def given_server(address: str) -> ServerAddress:
    """A server that somebody else started at HOST:PORT; ``PHYSIS_TOKEN`` holds its token."""
    return ServerAddress(address=address, token=os.environ.get(TOKEN_VARIABLE, ""))


def meant_device(device: str) -> str:
    """What ``auto`` is on this machine. A named device is taken at its word: results of a GPU can be read, and reported, where there is none."""
    from physisforcing.planner.train import choose_device

    return choose_device("auto") if device == "auto" else device


def about_server(server: ServerAddress, client: Callable[..., Any]) -> dict[str, Any]:
    """What the server at this address says of itself. ``client``: the class of its clients."""
    with client(server.address, token=server.token, connect_s=server.connect_s) as found:
        return dict(found.about)


def computed_by(about: Mapping[str, Any] | None, device: str, threads: int) -> str:
    """How a server computes where that is not how a process with this ``device`` and these ``threads`` would on a CPU; empty where it is the same.

    ``about``: what it says of itself; None: of one that is going to be started with the same settings.
    """
    device = meant_device(device)
    if about is None:
        about = {"device": device, "batch": GPU_BATCH, "threads": threads}
    place, batch, others = str(about.get("device")), int(about.get("batch") or 0), int(about.get("threads") or 0)
    if place == "cpu":
        return "" if (device, threads) == ("cpu", others) else f"cpu with {others} threads"
    return f"{place.partition(':')[0]} in batches of {batch}"


def compute_repeatably(threads: int) -> None:
    """Numeric threads of this process, and the same result of the same request every time: what a GPU can only compute in changing order is an
    error. To be called before torch starts CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    import torch

    torch.set_num_threads(threads)
    # What use_deterministic_algorithms sets, without importing torch's compiler (seconds of every process).
    torch.set_deterministic_debug_mode("error")


class ModelProcess:
    """``module`` (a server that its parent starts) with ``settings`` in a process of its own; ``what`` it is in messages.

    A thread watches it: when it dies it is started again at the same address, at most ``restarts`` times. Clients ask the new one
    again; after that their episodes end in errors.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        restarts: int = RESTARTS,
        module: str = "physisforcing.serve_model",
        what: str = "the world-model server",
    ) -> None:
        self._left, self._stopped = restarts, threading.Event()
        self._module, self.what = module, what
        self._process: SpawnedServer
        port = self._start(settings)
        self._again = {**settings, "port": port, "token": self._process.token}
        self.address = ServerAddress(address=f"127.0.0.1:{port}", token=self._process.token, connect_s=120.0)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="model process")
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _start(self, settings: dict[str, Any]) -> int:
        """The port, once the process listens."""
        from physisforcing.envs.spawn import SpawnedServer

        self._process = SpawnedServer(self._module, settings, what=self.what)
        try:
            return self._process.wait_until_ready(START_S)
        except BaseException:
            self._process.stop()
            raise

    def _watch(self) -> None:
        while not self._stopped.wait(0.5):
            if self._process.alive:
                continue
            print(f"{self.what} died{self._process.post_mortem()}", file=sys.stderr)
            self._process.stop()
            if not self._left or self._stopped.is_set():
                return
            self._left -= 1
            try:
                self._start(self._again)
            except Exception as error:
                print(f"it could not be started again: {error}", file=sys.stderr)
                return

    def stop(self) -> None:
        """End the process. Again is harmless."""
        self._stopped.set()
        self._process.stop()
        self._thread.join()
        self._process.stop()


@contextlib.contextmanager
def served_at(server: str, settings: Callable[[], dict[str, Any]], **process: Any) -> Iterator[ServerAddress | None]:
    """Where a model is served while something runs. ``server``: empty (None: nowhere), HOST:PORT, or ``auto``: a ``ModelProcess`` of these settings,
    which are made only then, and of what else it takes."""
    if server != "auto":
        yield given_server(server) if server else None
        return
    own = ModelProcess(settings(), **process)
    try:
        yield own.address
    finally:
        own.stop()


def model_server(config: EpisodeSettings) -> contextlib.AbstractContextManager[ServerAddress | None]:
    """Where the world model of an evaluation is served while it runs: None where every process loads its own."""
    from .plan_episodes import weight_folders

    planner = config.planner

    def settings() -> dict[str, Any]:
        folders = weight_folders(config)
        return {
            "model": str(folders.get("world_model", planner.world_model)),
            "codec": str(folders.get("codec", "")),
            "steps": planner.denoising_steps,
            "device": planner.device,
            "threads": config.threads,
            "clients": max(64, config.workers + 1),
        }

    return served_at("" if config.oracle else planner.server, settings)
