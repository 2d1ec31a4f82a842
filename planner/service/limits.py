"""Bounds of the world-model service, and the two checks that stand before any parsing: bytes of a body, values in its JSON."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from physisforcing.core.errors import UserError

from .faults import ServiceFault, invalid


@dataclass(slots=True, kw_only=True)
class ServiceLimits:
    """``max_concurrency``: requests that are computed or wait for the model; one more gets 429. ``deadline_s``: from the whole request
    to its answer. ``body_s``, ``header_s``: seconds in which a body, the head of a request, must have come. ``answer_bytes``,
    ``answer_ttl_s``, ``request_ids``: what is remembered of answered requests, for retries. ``buffered_bytes``: bodies of all
    requests together. ``json_values``: commas and brackets of a body. ``grace_s``: for requests under way when the server ends."""

    max_request_bytes: int = 32 * 2**20
    max_batch_size: int = 8
    max_concurrency: int = 8
    max_connections: int = 128
    buffered_bytes: int = 256 * 2**20
    json_values: int = 200_000
    instruction_chars: int = 1000
    deadline_s: float = 600.0
    body_s: float = 60.0
    header_s: float = 30.0
    grace_s: float = 10.0
    answer_bytes: int = 256 * 2**20
    answer_ttl_s: float = 600.0
    request_ids: int = 10_000

    def check(self) -> None:
        """``UserError`` for a bound that is not above 0."""
        for name in self.__slots__:
            if not 0 < getattr(self, name) < 1e15:
                raise UserError(
                    f"limits.{name}", got=getattr(self, name), wanted="a number above 0", fix=f"leave limits.{name} out"
                )


class ByteBudget:
    """Bytes of request bodies in memory, all requests together. For one event loop."""

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0

    def take(self, count: int) -> None:
        """``OVERLOADED`` where they would be too many."""
        if self.used + count > self.most:
            raise ServiceFault("OVERLOADED", "too many bytes of other requests are in memory", retry_after_s=1)
        self.used += count

    def give_back(self, count: int) -> None:
        self.used -= count


async def read_body(
    chunks: AsyncIterator[bytes], announced: str | None, limits: ServiceLimits, budget: ByteBudget
) -> bytes:
    """The whole body; its bytes are taken from ``budget``, where the caller gives them back.

    Raises ``PAYLOAD_TOO_LARGE`` at the announced length or at the first chunk too many, ``DEADLINE_EXCEEDED`` when the body takes
    longer than ``limits.body_s``, ``OVERLOADED`` without budget.
    """
    most = limits.max_request_bytes
    too_large = ServiceFault("PAYLOAD_TOO_LARGE", f"the request is larger than {most} bytes")
    if announced is not None and announced.isdecimal() and int(announced[:20]) > most:
        raise too_large
    body, taken = bytearray(), 0
    try:
        async with asyncio.timeout(limits.body_s):
            async for chunk in chunks:
                if len(body) + len(chunk) > most:
                    raise too_large
                budget.take(len(chunk))
                taken += len(chunk)
                body += chunk
    except BaseException as error:
        budget.give_back(taken)
        if isinstance(error, TimeoutError):
            raise ServiceFault("DEADLINE_EXCEEDED", f"the body did not arrive within {limits.body_s:g} s") from None
        raise
    return bytes(body)


def check_json_size(body: bytes, limits: ServiceLimits) -> None:
    """``INVALID_ARGUMENT`` for a body with more commas and brackets than a request has values: an empty list takes two bytes on the
    wire and sixty in memory. Base64 has none of these characters."""
    count = sum(body.count(mark) for mark in (b",", b"[", b"{"))
    if count > limits.json_values:
        raise invalid(f"request: {count} commas and brackets, at most {limits.json_values} are read")
