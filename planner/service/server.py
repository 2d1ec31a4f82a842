"""A world-model server: uvicorn on this machine's own address, or with a token on any; and one inside a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from physisforcing.core.connection import check_token
from physisforcing.core.errors import UserError
from physisforcing.core.protocols import WorldModel

from .limits import ServiceLimits

_EXTRA = "pip install 'physisforcing[service]'"


@dataclass(slots=True, kw_only=True)
class ServeWorldModelConfig:
    """Settings of ``physis serve worldmodel`` ; its help text explains them."""

    model: str = "shipped"
    codec: str = ""
    steps: int = 0
    device: str = "cpu"
    host: str = "127.0.0.1"
    port: int = 0
    token: str = ""
    batch: int = 0
    limits: ServiceLimits = field(default_factory=ServiceLimits)

    def check(self) -> None:
        """``UserError`` for a host that needs a token, and for numbers out of range."""
        if not 0 <= self.port <= 65535:
            raise UserError("port", got=self.port, wanted="0 to 65535", fix="port=0 takes a free one")
        if self.batch < 0 or self.steps < 0:
            raise UserError("batch, steps", got=(self.batch, self.steps), wanted="0 or more", fix="leave them out")
        check_token(self.host, self.token)
        self.limits.check()


def make_server(app: Any, limits: ServiceLimits) -> Any:
    """A ``uvicorn.Server`` for ``app`` with this service's bounds on connections. It handles no signals."""
    try:
        import uvicorn

        from .connections import guarded_protocol
    except ImportError as error:
        raise UserError("uvicorn", got="not installed", wanted="the extra 'service'", fix=_EXTRA) from error

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:  # uvicorn's own end the process by the signal, with its exit code
            yield

    settings = uvicorn.Config(
        app,
        http=guarded_protocol(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(1, int(limits.header_s)),
        timeout_graceful_shutdown=max(1, round(limits.grace_s)),
    )
    return Server(settings)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ``UserError`` when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        got, wanted = f"{host}:{port} ({error.strerror or error})", "a free port of an address of this machine"
        raise UserError("port", got=got, wanted=wanted, fix="port=0 takes a free one") from error


@contextlib.contextmanager
def serving(
    world_model: WorldModel | Callable[[], WorldModel], limits: ServiceLimits | None = None, **options: Any
) -> Iterator[str]:
    """A server in a thread of this process, for notebooks and tests: gives its URL, ends with the block.

    Waits until the model is loaded; raises what its loading raised. ``options`` as for ``create_app``.
    """
    from .app import create_app

    app = create_app(world_model, limits, **options)
    server, sock = make_server(app, app.state.service.limits), listen("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True, name="uvicorn")
    thread.start()
    try:
        while not app.state.service.loaded.wait(0.1):
            assert thread.is_alive(), "the server ended before its model was loaded"
        if app.state.service.failure is not None:
            raise app.state.service.failure
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(3 * app.state.service.limits.grace_s + 5)


def run(
    config: ServeWorldModelConfig, load: Callable[[], WorldModel], announce: Callable[[dict[str, Any]], None]
) -> None:
    """Serve what ``load`` makes until SIGTERM or SIGINT; requests under way get ``limits.grace_s`` to end.

    ``announce`` is told url, pid and model_version once the model is loaded. Raises what loading it raised.
    """
    from .app import create_app

    config.check()
    on_cpu = config.device == "cpu"
    batch = config.batch or (None if on_cpu else 1)  # a GPU may round differently in a batch of another size
    sock = listen(config.host, config.port)
    app = create_app(
        load,
        config.limits,
        token=config.token,
        batch=batch,
        pad=not on_cpu,
        on_failure=lambda _: stop(),
    )
    server = make_server(app, config.limits)

    def stop(number: int = 0, _: FrameType | None = None) -> None:
        server.force_exit = server.should_exit and number == signal.SIGINT
        server.should_exit = True

    def tell() -> None:
        service = app.state.service
        service.loaded.wait()
        if service.failure is None:
            host, port = sock.getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            announce({"url": url, "pid": os.getpid(), "model_version": json.loads(service.manifest())["model_version"]})

    threading.Thread(target=tell, daemon=True, name="announce").start()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(server.serve(sockets=[sock]))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if app.state.service.failure is not None:
        raise app.state.service.failure
