"""The calculated table of docs/performance.md, calculated again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.roofline import GPUS, calls, figure, microseconds, rows

PERFORMANCE = (Path(__file__).resolve().parent.parent / "docs" / "performance.md").read_text(encoding="utf-8")


def test_every_row_is_what_the_calculation_gives() -> None:
    printed = [line for line in PERFORMANCE.splitlines() if line.endswith(("| 16 bit |", "| memory |", "| host |"))]
    host = {line.split(" | ")[5] for line in printed}
    assert len(host) == 1
    assert printed == rows(float(host.pop().removesuffix(" us")))


def test_the_bytes_are_those_that_the_page_names() -> None:
    default, cifar, imagenet = calls().values()
    assert [f"{default.megabytes:.1f}", f"{cifar.megabytes:.0f}", f"{imagenet.megabytes:,.0f}"] == [
        "4.4",
        "61",
        "3,776",
    ]
    assert "It is 4.4, 61 and\n3,776 MB a call." in PERFORMANCE
    assert [f"{call.weights:,.0f}" for call in (default, cifar, imagenet)] == ["3", "105", "1,106"]


def test_a_host_that_is_slower_than_the_gpu_is_the_bound() -> None:
    assert {row.split(" | ")[-1] for row in rows(1e9)} == {"host |"}
    call = calls()["CIFAR-10"]
    assert microseconds(call, GPUS[0])["16 bit"] == pytest.approx(1e3 * call.gflop / 989 / 0.4)


@pytest.mark.parametrize(
    ("us", "printed"), [(0.873, "0.9 us"), (1.31, "1.3 us"), (42.4, "42 us"), (998, "1,000 us"), (5660, "5.7 ms")]
)
def test_figures_have_two_digits(us: float, printed: str) -> None:
    assert figure(us) == printed
