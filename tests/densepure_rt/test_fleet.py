"""What a fleet is without its workers; with them, see test_cluster.py."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from densepure_rt.fleet import Engines, InOrder
from densepure_rt.runtime.bundle import open_bundle
from densepure_rt.runtime.reverse import Outcome
from densepure_rt.smoothing import shipped_engine


def engines(kind: str) -> Engines:
    return Engines(open_bundle(shipped_engine()), {"processor": kind}, "1", 8, "node", 0)


def test_what_a_label_cannot_depend_on_makes_no_other_group() -> None:
    one = engines("a")
    same = replace(one, batch=64, node="elsewhere", pid=7, description={**one.description, "threads": 9, "batch": 64})
    assert same.sha256 == one.sha256
    assert replace(one, version="2").sha256 != one.sha256
    assert replace(one, bundle=replace(one.bundle, sidecars=("0" * 64, None))).sha256 != one.sha256


def cut(drawn: st.DrawFn, samples: int) -> list[tuple[int, int]]:
    """0..samples in pieces: (first, how many)."""
    edges = sorted({0, samples, *drawn(st.lists(st.integers(0, samples), max_size=6))})
    return [(first, end - first) for first, end in zip(edges, edges[1:], strict=False)]


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[dict[int, tuple[int, int]], list[tuple[int, int, int]]]:
    """Images by their handle, (first sample, samples), and their pieces in any order."""
    images = draw(st.dictionaries(st.integers(0, 4), st.tuples(st.integers(0, 9), st.integers(1, 30)), min_size=1))
    pieces = [
        (handle, first + start, count)
        for handle, (first, samples) in images.items()
        for start, count in cut(draw, samples)
    ]
    return images, draw(st.permutations(pieces))


@given(arrivals())
def test_outcomes_leave_in_the_order_of_the_samples_of_each_image_however_they_come(
    arrived: tuple[dict[int, tuple[int, int]], list[tuple[int, int, int]]],
) -> None:
    images, pieces = arrived
    order, left = InOrder(), list[Outcome]()
    for handle, first, count in sorted(pieces):
        for sample in range(first, first + count):
            order.expect(handle, sample)
    for handle, first, count in pieces:
        left += order.add(handle, first, [Outcome(handle, first + i, 0, 1, 1) for i in range(count)])
    for handle, (first, samples) in images.items():
        assert [outcome.sample for outcome in left if outcome.image == handle] == list(range(first, first + samples))


@given(arrivals(), st.data())
def test_what_is_held_of_an_image_is_given_up_whole(
    arrived: tuple[dict[int, tuple[int, int]], list[tuple[int, int, int]]], data: st.DataObject
) -> None:
    images, pieces = arrived
    order, left = InOrder(), list[Outcome]()
    for handle, (first, _) in images.items():
        order.expect(handle, first)
    come = pieces[: data.draw(st.integers(0, len(pieces)))]
    for handle, first, count in come:
        left += order.add(handle, first, [Outcome(handle, first + i, 0, 1, 1) for i in range(count)])
    for handle in images:
        left += order.flush(handle)
    expected = sorted((handle, first + i) for handle, first, count in come for i in range(count))
    assert sorted((outcome.image, outcome.sample) for outcome in left) == expected
