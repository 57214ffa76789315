"""The load of `make load`, on a small scale."""

from __future__ import annotations

from densepure_rt.smoothing import Settings
from tests.load import run


def test_twenty_connections_get_right_answers_or_are_told_to_come_again() -> None:
    report = run(
        connections=20, seconds=4.0, settings=Settings(sigma=0.5, steps=0, votes=1, n=64), queue=12, pictures=5
    )
    assert report.wrong == []
    assert len(report.seconds["predict"]) > len(report.seconds["certify"]) > 0
    assert report.busy.total() > 0
    assert report.metrics['densepure_rt_batch_fill{kind="classify"}'] > 0.8
