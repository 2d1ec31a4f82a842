"""``physis serve model``: one world model in one process for the simulators of ``physis eval plan planner.server=HOST:PORT``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.serving import serve_command, serve_for_parent

from .model_process import GPU_BATCH, compute_repeatably
from .planners import source_name

if TYPE_CHECKING:
    from physisforcing.planner.model_server import ModelServer

HELP = """Serve one world model to many simulators: their requests become common rollouts.

settings (field=value):
  model=shipped          the weights in this package, a world-model folder, or anything that physis check worldmodel takes
  codec=FOLDER           of a world-model folder; by default vae beside it
  steps=0                denoising steps (0: the model's own)   device=cpu   threads=2 (numeric threads)
  port=0                 0: a free one, printed   host=127.0.0.1
  token=SECRET           needed for a host that others reach; better in the variable PHYSIS_TOKEN, which other users do not see
  clients=64             connections at the same time
  batch=0                samples computed together (0: 16 on a GPU, always exactly so many; the model's bound on a CPU)
  wait_s=0.005           how long a request may wait for company
  grace_s=10             seconds for the rollout under way when the server is told to end
  --json                 the first and only line of the output is JSON with the port

examples:
  physis serve model device=cuda port=7000
  physis eval plan planner.server=127.0.0.1:7000 planner.device=cuda workers=8 output=runs/plan
  physis eval plan planner.server=auto planner.device=cuda workers=8 output=runs/plan     starts and stops one itself"""


@dataclass(slots=True, kw_only=True)
class ServeModelConfig:
    """Settings of ``physis serve model`` (see ``HELP``)."""

    model: str = "shipped"
    codec: str = ""
    steps: int = 0
    device: str = "cpu"
    threads: int = 2
    host: str = "127.0.0.1"
    port: int = 0
    token: str = field(default="", repr=False)
    clients: int = 64
    batch: int = 0
    wait_s: float = 0.005
    grace_s: float = 10.0


def make_server(config: ServeModelConfig) -> ModelServer:
    """Load the model and make the server; it does not listen yet."""
    from physisforcing.planner.model_server import ModelServer, ModelServerConfig
    from physisforcing.planner.train import choose_device

    from .world_models import load_any

    device = choose_device(config.device)
    gpu = device != "cpu"
    settings = ModelServerConfig(
        host=config.host,
        port=config.port,
        token=config.token,
        clients=config.clients,
        batch=config.batch or (GPU_BATCH if gpu else 0),
        pad=gpu,
        wait_s=config.wait_s,
        grace_s=config.grace_s,
    )
    settings.check()
    compute_repeatably(config.threads)
    model = load_any(config.model, device, codec=config.codec or None, steps=config.steps or None)
    return ModelServer(model, settings, about=_about(config, device, model))


def _about(config: ServeModelConfig, device: str, model: Any) -> dict[str, Any]:
    """What clients compare with their own settings."""
    about: dict[str, Any] = {"device": device, "threads": config.threads, "source": source_name(config.model)}
    if hasattr(model, "denoiser"):  # one of our folders
        from physisforcing.core.paths import weights_root
        from physisforcing.worldmodel.storage import fingerprint

        from .world_models import codec_folder

        folder = weights_root() / "worldmodel" if config.model == "shipped" else Path(config.model)
        codec = fingerprint(codec_folder(folder, config.codec))
        about |= {"world_model": fingerprint(folder), "codec": codec, "denoising_steps": model.steps}
        about["state_dim"] = model.denoiser.conditioner.config.state_dim
    return about


def main(argv: Sequence[str]) -> int:
    """``physis serve model [field=value ...] [--json]``; see ``serve_command``."""
    return serve_command(argv, verb="model", text=HELP, schema=ServeModelConfig, make=make_server, what="model")


if __name__ == "__main__":  # as model_process.ModelProcess starts it
    sys.exit(serve_for_parent(lambda settings: make_server(ServeModelConfig(**settings))))
