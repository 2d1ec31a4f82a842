"""One environment in a spawned process, asked and answered over a pipe."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from physisforcing.core.errors import UnstableSceneError, UserError, VulkanUnavailableError

#: Errors of an environment that the asking side raises; others mean that the environment is broken.
PASSED_ON = (UserError, UnstableSceneError, VulkanUnavailableError)


class Died(RuntimeError):
    """The process ended, hung, or its environment raised what nobody expects."""

    def __init__(self, message: str, exit_code: int | None) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EnvProcess:
    """``ask`` sends a question, ``answer`` waits for its answer; one question at a time."""

    def __init__(self, make_env: Any, body: Callable[[Any, Any], None] | None = None) -> None:
        """``body(pipe, make_env)``: what the process does instead of answering with an environment."""
        self._number = 0
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # daemon: never outlives this process; without it an exception in the caller would leave simulators behind
        self._process = context.Process(target=body or _body, args=(theirs, make_env), daemon=True)
        try:
            with _ordinary():
                self._process.start()
        except (AttributeError, TypeError) as error:
            self._pipe.close()
            fix = "define it at the top of a module; functools.partial adds arguments"
            raise UserError(
                "env_fns", got=str(error), wanted="a function that can be sent to a process", fix=fix
            ) from error
        finally:
            theirs.close()
        self.ask("spaces")

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def spaces(self, timeout_s: float) -> Any:
        """(observation space, action space): the answer to the question that the process starts with."""
        return self.answer(timeout_s)

    def ask(self, operation: str, *arguments: Any) -> None:
        self._number += 1
        with contextlib.suppress(OSError):  # a process that died meanwhile is noticed by ``answer``
            self._pipe.send((self._number, operation, arguments))

    def answer(self, timeout_s: float) -> Any:
        """The value; raises what the environment refused with, or ``Died``."""
        deadline = time.monotonic() + timeout_s
        number = 0
        try:
            while number != self._number:  # answers to questions that the asking side gave up on are thrown away
                if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise Died(f"no answer in {timeout_s:g} s", None)
                number, kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)
            code = self._process.exitcode
            raise Died(f"process {self.pid} ended with exit code {code}", code) from error
        if kind == "refused":
            raise value
        if kind == "raised":
            raise Died(value, None)
        return value

    def leave(self) -> None:
        """Let the process end by itself: it does when its pipe closes."""
        self._pipe.close()

    def end(self) -> None:
        """Wait a moment for the process to end, then kill it. Again is harmless."""
        self._pipe.close()
        if self._process.pid is None:
            return
        self._process.join(3)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _ordinary() -> Iterator[None]:
    """multiprocessing lets no daemon start processes, since they could outlive it. Ours end by themselves when their pipe closes, so a
    worker that is a daemon may have them.
    """
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    daemon = config.get("daemon")
    config["daemon"] = False
    try:
        yield
    finally:
        config["daemon"] = daemon


def _body(pipe: Any, make_env: Any) -> None:
    """Life of the process: the environment, then one answer a question until the other side closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which closes the pipe
    env = None
    try:
        while True:
            number, operation, arguments = pipe.recv()
            try:
                env = make_env() if env is None else env
                reply = "done", _do(env, operation, arguments)
            except PASSED_ON as error:
                reply = "refused", error
            except Exception:
                reply = "raised", traceback.format_exc(limit=12)
            pipe.send((number, *reply))
    except (EOFError, OSError):
        pass
    finally:
        if env is not None:
            env.close()


def _do(env: Any, operation: str, arguments: tuple[Any, ...]) -> Any:
    if operation == "spaces":
        return env.observation_space, env.action_space
    if operation == "reset":
        seed, options = arguments
        return env.reset(seed=seed, options=options)
    if operation == "step":
        action_A, pictures = arguments
        return env.step(action_A) if pictures else env.unwrapped.step_blind(action_A)
    assert operation == "call", operation
    name, args, kwargs = arguments
    found = getattr(env.unwrapped, name)
    return found(*args, **kwargs) if callable(found) else found
