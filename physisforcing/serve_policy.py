"""``physis serve policy``: one policy in one process for many simulators or a robot, with plans computed together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from physisforcing.core.errors import UserError
from physisforcing.core.serving import serve_command, serve_for_parent

if TYPE_CHECKING:
    from physisforcing.policy.remote import PolicyServer

HELP = """Serve one policy to many environments: their requests for plans become common batches.

settings (field=value):
  policy=FOLDER          the export of physis train policy, a converted checkpoint, or the name of shipped weights
  autoencoder=FOLDER     its autoencoder or pipeline folder, where it is not the one beside the weights or the package's
  steps=10               denoising steps of the actions   video_steps=10 (of an imagined future)   mode= (first_frame or idm)
  device=cpu             or cuda   compute=auto (eager, graph, compile, fused)   threads=2 (numeric threads)
  port=0                 0: a free one, printed   host=127.0.0.1
  token=SECRET           needed for a host that others reach; better in the variable PHYSIS_TOKEN, which other users do not see
  clients=64             connections at the same time
  batch=0                plans computed together (0: 16 on a GPU, always exactly so many; a CPU computes one by one whatever this says)
  wait_s=0.005           how long a request may wait for company
  grace_s=10             seconds for the plans under way when the server is told to end
  --json                 the first and only line of the output is JSON with the port

examples:
  physis serve policy policy=runs/policy/export device=cuda port=7100
  python -c "from physisforcing.policy.remote import remote_policy; print(remote_policy('127.0.0.1:7100').fingerprint)\""""


@dataclass(slots=True, kw_only=True)
class ServePolicyConfig:
    """Settings of ``physis serve policy`` (see ``HELP``)."""

    policy: str = ""
    autoencoder: str = ""
    steps: int = 10
    video_steps: int = 10
    mode: str = ""
    device: str = "cpu"
    compute: str = "auto"
    threads: int = 2
    host: str = "127.0.0.1"
    port: int = 0
    token: str = field(default="", repr=False)
    clients: int = 64
    batch: int = 0
    wait_s: float = 0.005
    grace_s: float = 10.0


def make_server(config: ServePolicyConfig) -> PolicyServer:
    """Load the policy and make the server; it does not listen yet."""
    from physisforcing.core.message_server import MessageServerConfig
    from physisforcing.planner.train import choose_device
    from physisforcing.policy.planning import PlanningConfig, load_chunk_model
    from physisforcing.policy.remote import PolicyServer

    from .model_process import GPU_BATCH, compute_repeatably
    from .policies import policy_folder

    folder = policy_folder(config.policy) if config.policy else None
    if folder is None:
        wanted = "the folder of a policy, or the name of shipped weights"
        raise UserError("policy", got=config.policy, wanted=wanted, fix="policy=runs/policy/export")
    device = choose_device(config.device)
    batch = 1 if device == "cpu" else config.batch or GPU_BATCH
    settings = MessageServerConfig(
        host=config.host, port=config.port, token=config.token, clients=config.clients, batch=batch,
        wait_s=config.wait_s, grace_s=config.grace_s,
    )  # fmt: skip
    settings.check()
    compute_repeatably(config.threads)
    planning = PlanningConfig(
        device=device, compute=config.compute, batch=batch,
        autoencoder=config.autoencoder, steps=config.steps, video_steps=config.video_steps, mode=config.mode,
    )  # fmt: skip
    chunks = load_chunk_model(folder, planning, store_sentences=False)
    about = {"device": device, "compute": planning.kind, "threads": config.threads, "source": folder.resolve().name}
    return PolicyServer(chunks, settings, about=about)


def main(argv: Sequence[str]) -> int:
    """``physis serve policy [field=value ...] [--json]``; see ``serve_command``."""
    return serve_command(argv, verb="policy", text=HELP, schema=ServePolicyConfig, make=make_server, what="policy")


if __name__ == "__main__":  # as model_process.ModelProcess starts it
    sys.exit(serve_for_parent(lambda settings: make_server(ServePolicyConfig(**settings))))
