"""The load of `make load`, on a small scale."""

from __future__ import annotations

import pytest

from densepure_rt.smoothing.settings import Settings
from tests.load import run


def test_twenty_connections_get_right_answers_or_are_told_to_come_again() -> None:
    report = run(
        connections=20, seconds=4.0, settings=Settings(sigma=0.5, steps=0, votes=1, n=64), queue=12, pictures=5
    )
    assert report.wrong == []
    assert len(report.seconds["predict"]) > len(report.seconds["certify"]) > 0
    assert report.busy.total() > 0
    assert report.metrics['densepure_rt_batch_fill{kind="classify"}'] > 0.8


@pytest.mark.slow
def test_memory_stays_flat_under_two_hundred_connections() -> None:
    report = run(connections=200, seconds=40.0, settings=Settings(sigma=0.5, steps=0, votes=1, n=256), queue=180)
    assert report.wrong == []
    assert report.growth < 0.05
    assert len(report.memory) > 30
