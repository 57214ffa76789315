"""Clients that may send too much, too slowly, or be gone before they have their answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")


async def body_of(request: Request, what: str, most: int, seconds: float) -> bytes:
    """Read all of a request's body.

    Args:
        what: The body in words, such as "a picture".
        most: Bytes; what says that it has more is refused before it is sent, when that can still be heard.
        seconds: In which it has to come.

    Raises:
        HTTPException: For one that is too large or too slow.
    """
    too_large = HTTPException(413, f"{what} has {most:,} bytes at most on this server")
    if int(request.headers.get("content-length", "0")) > most:
        raise too_large
    try:
        return await asyncio.wait_for(bounded(request, most, too_large), seconds)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"{what} did not come within {seconds:g} s", {"Connection": "close"}) from None


async def bounded(request: Request, most: int, too_large: HTTPException) -> bytes:
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise too_large
        return bytes(body)
    finally:
        body.clear()  # an error holds this frame, and wait_for the error, until the garbage is collected


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`. When the client hangs up, cancel it and raise ClientDisconnect."""
    answer, gone = asyncio.ensure_future(work), asyncio.ensure_future(hung_up(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ClientDisconnect
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.wait({answer, gone})


async def hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
