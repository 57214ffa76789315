"""Several children at a time, and callers that go."""

from __future__ import annotations

import asyncio
import time

import pytest

from densepure_rt.errors import UsageError
from densepure_rt.images import decoder
from densepure_rt.serving.decoders import Decoders
from densepure_rt.serving.service import Draining
from tests.support.pictures import GOOD, GREY
from tests.support.server import decoders, until

NAP = (
    "import densepure_rt.images.decoder as d\nfitted = d.fitted\n"
    "d.fitted = lambda c, s: d.time.sleep({}) or fitted(c, s)\n"
)


def sleepy(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    boot = decoder.BOOT.replace("from", NAP.format(seconds) + "from", 1)
    monkeypatch.setattr(decoder, "BOOT", boot)


def test_as_many_work_at_a_time_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    sleepy(monkeypatch, 1.0)

    async def both() -> float:
        pool = Decoders(2)
        await asyncio.gather(*(pool.fitted(GOOD, GREY) for _ in range(2)))  # which starts them
        began = time.monotonic()
        found = await asyncio.gather(*(pool.fitted(GOOD, GREY) for _ in range(2)))
        assert [each.changes for each in found] == [(), ()]
        assert len(decoders()) == 2
        pool.close()
        return time.monotonic() - began

    assert asyncio.run(both()) < 1.9
    until(lambda: decoders() == [], 5)


def test_the_picture_of_a_caller_that_goes_is_given_up_and_the_next_one_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Decoders()

    async def gone() -> None:
        sleepy(monkeypatch, 3600)
        asking = asyncio.ensure_future(pool.fitted(GOOD, GREY))
        await asyncio.sleep(0.5)
        assert len(decoders()) == 1
        asking.cancel()
        await asyncio.wait([asking])
        await asyncio.to_thread(until, lambda: decoders() == [], 5)
        monkeypatch.undo()
        assert (await pool.fitted(GOOD, GREY)).changes == ()
        pool.close()

    asyncio.run(gone())


def test_a_picture_has_so_long_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    sleepy(monkeypatch, 3600)
    monkeypatch.setattr("densepure_rt.serving.decoders.DECODE_SECONDS", 0.7)

    async def late() -> None:
        pool = Decoders()
        with pytest.raises(UsageError, match="takes more than 0.7 s to decode"):
            await pool.fitted(GOOD, GREY)
        pool.close()

    asyncio.run(late())
    until(lambda: decoders() == [], 5)


def test_when_the_server_ends_nothing_is_left_and_whoever_waits_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sleepy(monkeypatch, 3600)

    async def ended() -> None:
        pool = Decoders()
        asking = asyncio.ensure_future(pool.fitted(GOOD, GREY))
        await asyncio.sleep(0.5)
        pool.close()
        for each in (asking, pool.fitted(GOOD, GREY)):
            with pytest.raises(Draining, match="ask another"):
                await asyncio.wait_for(each, 5)

    asyncio.run(ended())
    until(lambda: decoders() == [], 5)


def test_there_is_one_or_more() -> None:
    with pytest.raises(UsageError, match="`decoders` is 1 or more, got 0"):
        Decoders(0)
