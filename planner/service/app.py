"""The routes of the v1 contract: FastAPI over ``WorldModelService``. Every answer that is not 200 has a typed JSON body."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from physisforcing.core.protocols import WorldModel

from .faults import ServiceFault, invalid
from .limits import ServiceLimits, read_body
from .service import WorldModelService

LOG = logging.getLogger("physisforcing.service")


def create_app(
    world_model: WorldModel | Callable[[], WorldModel] | WorldModelService,
    limits: ServiceLimits | None = None,
    *,
    token: str = "",
    **options: Any,
) -> FastAPI:
    """An ASGI application that serves a world model, or what a callable makes of it after the start.

    ``options`` go to ``WorldModelService``. The service is ``app.state.service``. The bound on connections and the deadlines for
    slow headers are not the application's: ``server.py`` adds them.
    """
    if isinstance(world_model, WorldModelService):
        service = world_model
    else:
        model = world_model
        load = (lambda: model) if isinstance(model, WorldModel) else model
        service = WorldModelService(load, limits, token=token, **options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.service = service
    app.add_exception_handler(HTTPException, _no_such_route)
    app.add_api_route("/v1/health", _guarded(_health), methods=["GET"])
    app.add_api_route("/v1/capabilities", _guarded(_capabilities), methods=["GET"])
    app.add_api_route("/v1/predict", _guarded(_predict), methods=["POST"])
    return app


def _guarded(handler: Callable[[WorldModelService, Request], Any]) -> Callable[[Request], Any]:
    async def guarded(request: Request) -> Response:
        service: WorldModelService = request.app.state.service
        try:
            return _json(await handler(service, request))
        except ServiceFault as fault:
            return _fault(fault)
        except ClientDisconnect:
            return _fault(invalid("request: the client left before its end"))  # nobody reads this
        except asyncio.CancelledError:  # the server ends and this request had its time
            return _fault(ServiceFault("NOT_READY", "the service is going down", retry_after_s=5))
        except Exception:
            LOG.exception("%s failed", request.url.path)
            return _fault(ServiceFault("INTERNAL", "the service failed"))

    return guarded


async def _health(service: WorldModelService, request: Request) -> bytes:
    return json.dumps(service.health()).encode()


async def _capabilities(service: WorldModelService, request: Request) -> bytes:
    service.authorize(request.headers.get("authorization"), request.headers.get("host"))
    return service.manifest()


async def _predict(service: WorldModelService, request: Request) -> bytes:
    headers = request.headers
    service.authorize(headers.get("authorization"), headers.get("host"))
    if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise invalid("content-type: wanted application/json")
    body = await read_body(request.stream(), headers.get("content-length"), service.limits, service.budget)
    try:
        return await service.predict(body)
    finally:
        service.budget.give_back(len(body))


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return _fault(ServiceFault("METHOD_NOT_ALLOWED", "GET /v1/health, GET /v1/capabilities, POST /v1/predict"))
    if error.status_code == 404:
        return _fault(ServiceFault("NOT_FOUND", "there are /v1/health, /v1/capabilities and /v1/predict"))
    return _fault(invalid("request: not understood"))


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json", headers={"cache-control": "no-store"})


def _fault(fault: ServiceFault) -> Response:
    return Response(fault.body(), status_code=fault.status, headers=fault.headers())
