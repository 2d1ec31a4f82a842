"""A world model in another process, behind the same protocol."""

from __future__ import annotations

from typing import Any

from physisforcing.core.message_client import MessageClient
from physisforcing.core.types import Rollout, RolloutRequest, WorldModelSpec
from physisforcing.core.wire import WireError

from .model_messages import ANSWER_LIMITS, REQUEST_LIMITS, SERVICE, pack_request, unpack_rollout, unpack_spec


class SocketWorldModel(MessageClient):
    """The ``WorldModel`` that ``ModelServer`` at ``address`` (HOST:PORT) has; see ``MessageClient`` for errors. ``about``: what the server says
    of it besides the spec."""

    service, request_limits, answer_limits = SERVICE, REQUEST_LIMITS, ANSWER_LIMITS
    what, field = "world-model server", "planner.server"

    @property
    def spec(self) -> WorldModelSpec:
        return self._spec

    def met(self, welcome: dict[str, Any]) -> str:
        spec, about = unpack_spec(welcome.get("spec")), dict(welcome.get("about") or {})
        if not hasattr(self, "_spec"):  # of the one that was met first
            self._spec, self.about = spec, about
        return spec.fingerprint

    def rollout(self, request: RolloutRequest) -> Rollout:
        """See core's ``WorldModel`` and this class."""
        answer = self.ask({"op": "rollout", "request": pack_request(request)})
        try:
            return unpack_rollout(answer.get("rollout"))
        except WireError as error:
            raise self.lost(str(error)) from error
