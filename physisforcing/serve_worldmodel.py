"""`physis serve worldmodel`: any world model behind WorldArena 2.0's v1 contract."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from physisforcing.core.protocols import WorldModel
    from physisforcing.planner.service.server import ServeWorldModelConfig

HELP = """usage: physis serve worldmodel [field=value ...] [--json]

Serve a world model by WorldArena 2.0's v1 contract: GET /v1/health, GET /v1/capabilities, POST /v1/predict.

settings (field=value):
  model=shipped          the weights in this package, a world-model folder, a diffusers pipeline, module:function (it makes a
                         WorldModel), or the URL of another service; see physis check worldmodel --help. Not recorded videos: they
                         are looked up by episode and plan, which v1 requests do not name
  codec=FOLDER           of a world-model folder; by default vae beside it
  port=0                 0: a free one, printed         host=127.0.0.1
  token=SECRET           needed for a host that others reach; better in the variable PHYSIS_TOKEN, which other users do not see
  steps=0                denoising steps (0: the model's own)   device=cpu
  batch=0                samples computed together (0: the model's bound on a CPU, 1 on a GPU; there always exactly so many, filled
                         up with copies, because pictures may depend on the number)
  limits.NAME=NUMBER     max_request_bytes, max_batch_size, max_concurrency, deadline_s, ... (docs/service.md)
  --json                 the first and only line of the output is JSON with the address, once the model is loaded

examples:
  physis serve worldmodel port=8080
  physis serve worldmodel model=runs/nano/model codec=runs/vae/codec device=cuda steps=4 --json
  physis serve worldmodel model=my_package.models:make_model
  PHYSIS_TOKEN=$(openssl rand -hex 16) physis serve worldmodel host=0.0.0.0 port=8080"""


def loader(config: ServeWorldModelConfig) -> Callable[[], WorldModel]:
    """What makes the model that ``config.model`` names. The name is checked here: ``UserError`` where there is none."""
    from physisforcing.world_models import find_loader

    find = find_loader(config.model, config.device, codec=config.codec or None, steps=config.steps or None)

    def load() -> WorldModel:
        model = find()
        recorded = sys.modules.get("physisforcing.worldmodel.adapters.video_folder")
        if recorded is not None and isinstance(model, recorded.VideoFolderWorldModel):
            from physisforcing.core.errors import MissingCapabilityError

            raise MissingCapabilityError(
                "model",
                got=f"recorded videos ({config.model})",
                wanted="a model that imagines from what a request holds: v1 carries no (task, seed, plan) to look videos up by",
                fix="plan with the folder itself (physis eval plan, physis compare), or serve the model that made the videos",
            )
        ours = sys.modules.get("physisforcing.worldmodel.model")  # a model of somebody else's may not need torch
        if ours is not None and isinstance(model, ours.FlowWorldModel):
            from physisforcing.worldmodel.text import TextEmbedder

            model.text = TextEmbedder(store=False)  # clients' sentences are not to fill this machine's cache
        return model

    return load


def main(argv: Sequence[str]) -> int:
    """``physis serve worldmodel [field=value ...] [--json]``. Runs until interrupted or terminated, then returns 0."""
    parser = argparse.ArgumentParser(prog="physis serve worldmodel", usage=argparse.SUPPRESS, add_help=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    options = parser.parse_intermixed_args(list(argv))
    if options.help:
        print(HELP)
        return 0
    from physisforcing.core.config import compose
    from physisforcing.core.connection import TOKEN_VARIABLE
    from physisforcing.planner.service.server import ServeWorldModelConfig, run

    config = compose("serve_worldmodel", options.overrides, ServeWorldModelConfig)
    config.token = config.token or os.environ.get(TOKEN_VARIABLE, "")
    config.check()

    def announce(ready: dict[str, Any]) -> None:
        text = "serving {model_version} at {url} (pid {pid}; Ctrl-C ends it)".format(**ready)
        print(json.dumps({"ok": True, **ready}) if options.json else text, flush=True)

    run(config, loader(config), announce)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
