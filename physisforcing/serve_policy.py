"""``physis serve policy``: one policy in one process for many simulators or a robot, with plans computed together."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from physisforcing.core.connection import TOKEN_VARIABLE, failure
from physisforcing.core.errors import UserError
from physisforcing.core.serving import own_output, stopped_by_signals, stopped_with_parent

from .serve_model import end_now

if TYPE_CHECKING:
    from physisforcing.policy.remote import PolicyServer

HELP = """Serve one policy to many environments: their requests for plans become common batches.

settings (field=value):
  policy=FOLDER          the export of physis train policy, a converted checkpoint, or the name of shipped weights
  autoencoder=FOLDER     its autoencoder or pipeline folder, where it is not the one beside the weights or the package's
  steps=10               denoising steps of the actions   video_steps=10 (of an imagined future)   mode= (first_frame or idm)
  device=cpu             or cuda   compute=auto (eager, graph, compile)   threads=2 (numeric threads)
  port=0                 0: a free one, printed   host=127.0.0.1
  token=SECRET           needed for a host that others reach; better in the variable PHYSIS_TOKEN, which other users do not see
  clients=64             connections at the same time
  batch=16               plans computed together (on a GPU always exactly so many, on a CPU one by one)
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
    batch: int = 16
    wait_s: float = 0.005
    grace_s: float = 10.0


def make_server(config: ServePolicyConfig) -> PolicyServer:
    """Load the policy and make the server; it does not listen yet."""
    import torch

    from physisforcing.core.message_server import MessageServerConfig
    from physisforcing.planner.train import choose_device
    from physisforcing.policy.planning import PlanningConfig, load_chunk_model
    from physisforcing.policy.remote import PolicyServer

    from .policies import policy_folder

    folder = policy_folder(config.policy) if config.policy else None
    if folder is None:
        wanted = "the folder of a policy, or the name of shipped weights"
        raise UserError("policy", got=config.policy, wanted=wanted, fix="policy=runs/policy/export")
    device = choose_device(config.device)
    settings = MessageServerConfig(
        host=config.host, port=config.port, token=config.token, clients=config.clients, batch=config.batch,
        pad=device != "cpu", wait_s=config.wait_s, grace_s=config.grace_s,
    )  # fmt: skip
    settings.check()
    torch.set_num_threads(config.threads)
    planning = PlanningConfig(
        device=device, compute=config.compute, batch=1 if device == "cpu" else max(1, config.batch),
        autoencoder=config.autoencoder, steps=config.steps, video_steps=config.video_steps, mode=config.mode,
    )  # fmt: skip
    chunks = load_chunk_model(folder, planning, store_sentences=False)
    about = {"device": device, "threads": config.threads, "source": folder.resolve().name}
    return PolicyServer(chunks, settings, about=about)


def main(argv: Sequence[str]) -> int:
    """``physis serve policy [field=value ...] [--json]``. Runs until interrupted or terminated, then returns 0."""
    parser = argparse.ArgumentParser(
        prog="physis serve policy", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    parser.add_argument("--json", action="store_true", help="print one line of JSON when ready")
    options = parser.parse_intermixed_args(list(argv))
    from physisforcing.core.config import compose

    config = compose("serve_policy", options.overrides, ServePolicyConfig)
    config.token = config.token or os.environ.get(TOKEN_VARIABLE, "")
    output = own_output()
    server = make_server(config)
    with stopped_by_signals(server.stop):
        ready = {"host": config.host, "port": server.open(), "policy": config.policy, "pid": os.getpid()}
        text = "serving {policy} at {host}:{port} (pid {pid}; Ctrl-C ends it)".format(**ready)
        print(json.dumps({"ok": True, **ready}) if options.json else text, file=output, flush=True)
        ended = server.run()
    if not ended:
        end_now()
    return 0


def serve_parent() -> int:
    """The server that ``envs.spawn.SpawnedServer`` starts: settings on standard input, which is its lifeline."""
    output, lifeline = own_output(), sys.stdin.buffer
    try:
        settings = json.loads(lifeline.readline())
        # Before the weights are loaded, so that a parent that is gone is noticed while they are.
        stopped_with_parent(lifeline.fileno(), lambda: os._exit(0))
        server = make_server(ServePolicyConfig(**settings))
        with stopped_by_signals(server.stop):
            print(json.dumps({"ok": True, "port": server.open()}), file=output, flush=True)
            ended = server.run()
        if not ended:
            end_now()
    except UserError as error:
        print(json.dumps(failure(error)), file=output, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(serve_parent())
