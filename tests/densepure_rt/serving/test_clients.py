"""Bodies and clients, as an ASGI server hands them on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from densepure_rt.serving.clients import body_of, unless_gone


def request_of(*messages: dict[str, Any], length: int | None = None) -> Request:
    """A request whose client sends these messages, and then is silent."""
    waiting = list(messages)

    async def receive() -> Any:
        return waiting.pop(0) if waiting else await asyncio.Future()

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    return Request({"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}, receive)


def part(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_is_all_that_came() -> None:
    request = request_of(part(b"ab"), part(b"cde", more=False))
    assert asyncio.run(body_of(request, "it", 5, 10)) == b"abcde"


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        (request_of(length=6), 413, "it has 5 bytes at most"),
        (request_of(part(b"abc"), part(b"def")), 413, "it has 5 bytes at most"),
        (request_of(part(b"abc")), 408, "it did not come within 0.05 s"),
    ],
)
def test_a_body_that_is_too_large_or_too_slow_is_refused(request_: Request, status: int, words: str) -> None:
    with pytest.raises(HTTPException) as caught:
        asyncio.run(body_of(request_, "it", 5, 0.05))
    assert caught.value.status_code == status
    assert words in caught.value.detail


def test_work_is_given_up_when_its_client_hangs_up_and_not_before() -> None:
    ended: list[str] = []

    async def work(seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
            return "done"
        finally:
            ended.append("ended")

    async def both() -> None:
        assert await unless_gone(request_of(part(b"")), work(0.01)) == "done"
        with pytest.raises(ClientDisconnect):
            await unless_gone(request_of(part(b""), {"type": "http.disconnect"}), work(3600))
        assert ended == ["ended"] * 2

    asyncio.run(both())


def test_what_goes_wrong_at_work_is_told() -> None:
    async def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(unless_gone(request_of(), work()))
