"""Environments as Ray actors (extra ``ray``): one process each, anywhere in a cluster, behind the same interface.

Ray carries messages in its own format, between machines that its cluster trusts; the limits and tokens of ``serve.py`` do
not apply here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from physisforcing.core.connection import raise_failure
from physisforcing.core.errors import UserError
from physisforcing.core.message_client import ServerLostError

from .host import EnvHost, make_robotwin
from .remote import ClientEnv


def env_actor(**resources: Any) -> Any:
    """The actor class, with Ray's options for it (``num_cpus=1`` unless given, ``num_gpus=...``).

    ``env_actor().remote(task, options)`` makes one; its ``answer(message)`` takes what ``EnvHost`` takes. ``UserError``
    naming the extra without Ray.
    """
    return _ray().remote(**{"num_cpus": 1, **resources})(_HostActor)


class _HostActor:
    def __init__(self, task: str, options: dict[str, Any]) -> None:
        self._host = EnvHost(partial(make_robotwin, task, options))

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        return self._host.answer(message)

    def close(self) -> None:
        self._host.close()


class RayEnv(ClientEnv):
    """A RoboTwin environment in a Ray actor of its own. ``options``: what ``RoboTwinEnv`` takes.

    Call ``ray.init`` first, with the cluster's address if there is one. ``resources``: Ray's options for the actor. Raises
    ``UserError`` as the environment does, ``ServerLostError`` when the actor died or did not answer in time.
    """

    def __init__(
        self, task: str, *, resources: dict[str, Any] | None = None, reply_timeout_s: float = 600.0, **options: Any
    ) -> None:
        self.reply_timeout_s = reply_timeout_s
        self._actor = env_actor(**(resources or {})).remote(task, options)
        self._name = f"Ray actor for {task}"
        try:
            self._introduce(self._call("describe"))
        except BaseException:
            self.close()
            raise

    def _call(self, op: str, **arguments: Any) -> dict[str, Any]:
        ray = _ray()
        if self.lost:
            raise ServerLostError(f"{self._name}: lost before; make a new RayEnv")
        if self._actor is None:
            raise UserError("env", got="a closed environment", wanted="an open one", fix="make a new RayEnv")
        try:
            answer = ray.get(self._actor.answer.remote({"op": op, **arguments}), timeout=self.reply_timeout_s)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            self.lost = True
            self.close()
            raise ServerLostError(f"{self._name}: {error}") from error
        raise_failure(answer, peer=self._name)
        return _writable(answer)

    def close(self) -> None:
        """End the actor's process."""
        actor, self._actor = self._actor, None
        if actor is not None:
            _ray().kill(actor)


def _writable(value: Any) -> Any:
    """Ray hands out arrays in shared memory, read-only; the environment's own are the caller's to change."""
    if isinstance(value, dict):
        return {key: _writable(entry) for key, entry in value.items()}
    return value.copy() if getattr(value, "flags", None) is not None and not value.flags.writeable else value


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "ray",
            got="no module named 'ray'",
            wanted="Ray, for environments as actors",
            fix="pip install 'physisforcing[ray]'",
        ) from error
    return ray
