"""One world model in one process for many simulators: a TCP server that merges what its clients ask for into common rollouts."""

from __future__ import annotations

from typing import Any

from physisforcing.core.message_server import MessageServer, MessageServerConfig
from physisforcing.core.protocols import WorldModel
from physisforcing.core.wire import WireError

from .batching import Batcher
from .model_messages import ANSWER_LIMITS, REQUEST_LIMITS, SERVICE, pack_rollout, pack_spec, unpack_request

ModelServerConfig = MessageServerConfig


class ModelServer(MessageServer):
    """Answers ``rollout`` with those of a model (see ``Batcher``). ``about``: what else clients are told of it (plain values)."""

    service, request_limits, answer_limits = SERVICE, REQUEST_LIMITS, ANSWER_LIMITS

    def __init__(
        self, world_model: WorldModel, config: ModelServerConfig | None = None, *, about: dict[str, Any] | None = None
    ) -> None:
        super().__init__(config or ModelServerConfig())
        self.batcher = Batcher(
            world_model,
            max_batch=self.config.batch or None,
            wait_s=self.config.wait_s,
            pad=self.config.pad,
            max_waiting=self.config.clients,
        )
        said = dict(about or {}) | {"batch": self.batcher.max_batch, "pad": self.config.pad}
        self._welcome: dict[str, Any] = {"ok": True, "spec": pack_spec(world_model.spec), "about": said}

    def welcome(self) -> dict[str, Any]:
        return self._welcome

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("op") != "rollout":
            raise WireError("op", got=message.get("op"), wanted="'rollout'", fix="use SocketWorldModel")
        return {"rollout": pack_rollout(self.batcher.rollout(unpack_request(message.get("request"))))}

    def finish(self, timeout_s: float) -> bool:
        return self.batcher.close(timeout_s)
