"""An environment in another process or on another machine, behind the same gymnasium interface.

``RemoteEnv`` talks to ``physis serve env`` (``serve.py``) in msgpack frames (``core/wire.py``); ``RemoteEnv.spawn`` also
starts that server, if need be with another Python, and stops it. ``RemoteEpisodes`` runs closed-loop episodes and survives
a server that dies.
"""

from __future__ import annotations

import abc
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
from numpy.typing import NDArray

from physisforcing.core.connection import TOKEN_VARIABLE, Connection, hello, raise_failure
from physisforcing.core.errors import UserError
from physisforcing.core.message_client import ServerLostError
from physisforcing.core.protocols import Policy
from physisforcing.core.types import DT, ActionSpec
from physisforcing.core.wire import WireError

from .rollout import EpisodeResult, run_episode
from .spaces import build_space
from .spawn import ServerProcess

SERVICE = "physis env"


@dataclass(slots=True, kw_only=True, frozen=True)
class RemoteFork:
    """A moment of an episode that the other side keeps, for ``restore`` in the same session."""

    session: str
    handle: int


class ClientEnv(gymnasium.Env, abc.ABC):
    """``RoboTwinEnv``'s interface, answered elsewhere: same spaces, observations, infos and errors.

    A subclass provides ``_call(op, **arguments)``. ``lost`` is True once the other side is gone for good.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "render_fps": 1 / DT}
    lost = False

    def _introduce(self, description: dict[str, Any]) -> None:
        """Take over what ``EnvHost`` answers to ``describe``."""
        self.task_name: str = description["task"]
        self.control: str = description["control"]
        self.camera_names: tuple[str, ...] = tuple(description["cameras"])
        self.step_limit: int = description["step_limit"]
        self.action_spec = ActionSpec(**description["action_spec"])
        self.action_space = build_space(description["action_space"])
        self.observation_space = build_space(description["observation_space"])
        self.session: str = description["session"]
        self.expert_failure = ""

    @abc.abstractmethod
    def _call(self, op: str, **arguments: Any) -> dict[str, Any]:
        """What ``EnvHost`` answers to the operation ``op``; its errors are raised as the same errors."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """As ``RoboTwinEnv.reset``, with its errors; without a seed the server draws one."""
        super().reset(seed=seed)
        answer = self._call("reset", seed=None if seed is None else int(seed), options=options)
        return answer["observation"], answer["info"]

    def step(self, action: NDArray[np.float32]) -> tuple[dict, float, bool, bool, dict]:
        """As ``RoboTwinEnv.step``."""
        return self._step(action, pictures=True)

    def step_blind(self, action: NDArray[np.float32]) -> tuple[dict, float, bool, bool, dict]:
        """``step`` without drawing: the observation has only state and instruction."""
        return self._step(action, pictures=False)

    def _step(self, action: Any, *, pictures: bool) -> tuple[dict, float, bool, bool, dict]:
        sent = action if isinstance(action, list | np.ndarray) else np.asarray(action)
        answer = self._call("step", action=sent, pictures=pictures)
        keys = ("observation", "reward", "terminated", "truncated", "info")
        return tuple(answer[key] for key in keys)  # type: ignore[return-value]

    def observe(self, *, pictures: bool = True) -> dict[str, Any]:
        """The observation of this moment."""
        return self._call("observe", pictures=pictures)["observation"]

    def play_expert(self) -> bool:
        """Run the task's expert from the scene just reset; ``expert_failure`` says why it failed."""
        answer = self._call("play_expert")
        self.expert_failure = answer["failure"]
        return answer["succeeded"]

    def fork(self) -> RemoteFork:
        """As ``RoboTwinEnv.fork``; the other side keeps the state until the session ends."""
        return RemoteFork(session=self.session, handle=self._call("fork")["handle"])

    def restore(self, state: RemoteFork) -> None:
        """As ``RoboTwinEnv.restore``; ``UserError`` for a fork of another session."""
        if state.session != self.session:
            fix = "restore forks in the session that made them"
            raise UserError("state", got="a fork of another session", wanted="one of this session", fix=fix)
        self._call("restore", handle=state.handle)

    def body_poses(self) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
        """Ids [K] and world poses [K,7] (xyz metres, wxyz) of every rigid body."""
        answer = self._call("body_poses")
        return answer["ids"], answer["poses"]

    def body_names(self) -> dict[int, str]:
        """Body id -> name in the scene."""
        return dict(self._call("body_names")["names"])

    def contacts(self) -> list[tuple[int, int, float]]:
        """(lower id, higher id, impulse in N*s) of each pair that touched during the last control step."""
        return self._call("contacts")["pairs"]


class RemoteEnv(ClientEnv):
    """The environment that ``physis serve env`` serves at ``host:port``.

    ``token``: the server's; default: the variable PHYSIS_TOKEN. ``reply_timeout_s``: how long one answer may take before the
    server counts as lost. ``UserError`` for a refused connection (wrong token or protocol, or another client is
    connected), ``ServerLostError`` when nothing answers.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        token: str | None = None,
        connect_timeout_s: float = 10.0,
        reply_timeout_s: float = 600.0,
        process: ServerProcess | None = None,
    ) -> None:
        self.address, self.reply_timeout_s, self.process = f"{host}:{port}", reply_timeout_s, process
        self._connection: Connection | None = None
        try:
            sock = socket.create_connection((host, port), timeout=connect_timeout_s)
        except OSError as error:
            raise self._loss(f"nothing answers ({error}); start it with `physis serve env`") from error
        self._connection = Connection(sock, peer=self.address)
        secret = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
        try:
            self._introduce(self._exchange(hello(SERVICE, secret)))
        except BaseException:
            self._disconnect()
            raise

    @classmethod
    def spawn(
        cls,
        task: str,
        *,
        python: str | None = None,
        env: dict[str, str] | None = None,
        start_timeout_s: float = 180.0,
        reply_timeout_s: float = 600.0,
        **options: Any,
    ) -> RemoteEnv:
        """Start a server for ``task`` on this machine and connect to it; ``close`` stops it again.

        ``python``: the interpreter (default: this one; it needs physisforcing installed). ``env``: environment variables to
        add, for instance ``{"ROBOTWIN_ROOT": ...}``. ``options``: what ``RoboTwinEnv`` takes. The server ends with this
        process, however it ends. Raises what the server raised while it started, as the same ``UserError``.
        """
        process = ServerProcess(task, python=python, variables=env or {}, options=options)
        try:
            port = process.wait_until_ready(start_timeout_s)
            return cls("127.0.0.1", port, token=process.token, reply_timeout_s=reply_timeout_s, process=process)
        except BaseException:
            process.stop(grace_s=0)
            raise

    def _call(self, op: str, **arguments: Any) -> dict[str, Any]:
        if self.lost:
            raise self._loss("lost before; make a new RemoteEnv")
        if self._connection is None:
            fix = "make a new RemoteEnv"
            raise UserError("env", got="a closed environment", wanted="an open one", fix=fix)
        return self._exchange({"op": op, **arguments})

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        connection = self._connection
        assert connection is not None
        try:
            connection.send(message)  # a WireError from here is the caller's: nothing was sent
        except OSError as error:
            raise self._loss(str(error)) from error
        try:
            answer = connection.receive(idle_s=self.reply_timeout_s)
        except TimeoutError as error:
            raise self._loss(f"no answer in {self.reply_timeout_s:g} s") from error
        except (OSError, WireError) as error:
            raise self._loss(str(error)) from error
        raise_failure(answer, peer=self.address)
        return answer

    def _loss(self, why: str) -> ServerLostError:
        self.lost = True
        self._disconnect()
        ended = self.process.post_mortem() if self.process is not None else ""
        return ServerLostError(f"environment server at {self.address}: {why}{ended}")

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """End the session; a server that was spawned for it stops, another one waits for its next client."""
        if self._connection is not None:
            try:
                self._connection.send({"op": "close"}, timeout_s=5.0)
                self._connection.receive(idle_s=10.0)
            except (OSError, WireError):
                pass  # it is gone already, which is what was asked for
            self._disconnect()
        if self.process is not None:
            self.process.stop()


class RemoteEpisodes:
    """Closed-loop episodes on environments that ``make_env`` makes; one that dies is replaced.

    An episode whose server is lost is run once more, from its start, on a new one; lost again it is reported with status
    ``error``. ``telemetry["server_losses"]`` counts the losses of an episode. Only the very first environment's failure to
    start is raised: then the set-up is wrong, not an episode.
    """

    def __init__(self, make_env: Callable[[], ClientEnv]) -> None:
        self._make_env = make_env
        self._env: ClientEnv | None = None
        self._task = ""

    def run(self, policy: Policy, *, seed: int, **arguments: Any) -> EpisodeResult:
        """``rollout.run_episode`` with these arguments (all but ``recorder``, which would see an episode twice)."""
        assert "recorder" not in arguments, "an episode that is run again would be recorded twice"
        result, lost = self._attempt(policy, seed, arguments)
        losses = int(lost)
        if lost:
            self.close()
            result, lost = self._attempt(policy, seed, arguments)
            losses += lost
        if lost:
            self.close()
        if losses:
            result.telemetry = {**result.telemetry, "server_losses": float(losses)}
        return result

    def _attempt(self, policy: Policy, seed: int, arguments: dict[str, Any]) -> tuple[EpisodeResult, bool]:
        try:
            env = self.environment()
            result = run_episode(env, policy, seed=seed, **arguments)
        except ServerLostError as error:
            if not self._task:
                raise
            return EpisodeResult(task=self._task, seed=seed, status="error", error=f"ServerLostError: {error}"), True
        if env.lost:
            result.status = "error"
        return result, env.lost

    def environment(self) -> ClientEnv:
        """The environment in use, made if there is none."""
        if self._env is None:
            self._env = self._make_env()
            self._task = self._env.task_name
        return self._env

    def close(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            env.close()
