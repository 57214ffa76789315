"""The scheduler against judging each image alone, whatever the order and the number of samples under way."""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densepure_rt.errors import CheckFailed
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.runtime.device import NOT_FINITE
from densepure_rt.runtime.reverse import Outcome
from densepure_rt.smoothing.fixed import FixedDecider, FixedRule
from densepure_rt.smoothing.scheduling import ImageProgress, LostSample, SavedLabels, Scheduler
from tests.support.deciders import Patient, alone, label_of
from tests.support.journals import Notebook

CLASSES = 4


def image(idx: int) -> LabelledImage:
    return LabelledImage(idx, np.zeros((1, 2, 2), np.uint8), None)


def under_way(handle: int, decider: Patient, deadline: float = math.inf) -> ImageProgress[Patient]:
    return ImageProgress(image(handle), decider, lambda phases: [handle], deadline)


def run(
    patients: list[Patient],
    most_open: int,
    room: int,
    take: Callable[[int], int],
    pick: Callable[[int], int] = lambda waiting: 0,
) -> tuple[list[ImageProgress[Patient]], int]:
    """Draw up to `room` samples ahead; `take(waiting)` of them come back at a time, each the `pick(waiting)`-th."""
    scheduler = Scheduler((under_way(i, patient) for i, patient in enumerate(patients)), most_open)
    work, waiting, drawn = iter(scheduler), deque[tuple[int, int]](), 0
    finished: list[ImageProgress[Patient]] = []
    while not scheduler.done:
        while len(waiting) < room:
            item = next(work, None)
            if item is None:
                break
            waiting.append(item)
            drawn += 1
        assert waiting or scheduler.done or list(scheduler.finished()) == [], (
            "nothing is under way, and nothing decided"
        )
        if not waiting:
            break
        for _ in range(max(1, min(len(waiting), take(len(waiting))))):
            waiting.rotate(-pick(len(waiting)))
            handle, sample = waiting.popleft()
            label = label_of(handle, sample)
            for closed in scheduler.add(Outcome(handle, sample, label, 1, 1)):
                assert closed.returned == closed.drawn
        finished += scheduler.finished()
    return finished, drawn


PATIENTS = st.lists(st.builds(Patient, st.integers(1, 9), st.integers(1, 6), st.integers(1, 12)), max_size=9)


@settings(deadline=None, max_examples=200)
@given(PATIENTS, st.integers(1, 5), st.integers(1, 40), st.randoms(use_true_random=False))
def test_every_image_is_judged_as_if_it_were_alone_in_whatever_order_outcomes_come(
    patients: list[Patient], most_open: int, room: int, chance: random.Random
) -> None:
    expected = [alone(i, Patient(p.look, p.last, p.enough)) for i, p in enumerate(patients)]
    finished, _ = run(patients, most_open, room, lambda waiting: chance.randint(1, waiting), chance.randrange)
    assert [each.image.idx for each in finished] == list(range(len(patients)))
    assert [each.decider.seen for each in finished] == expected
    assert [each.cost.samples for each in finished] == [len(seen) for seen in expected]
    assert [each.cost.not_finite for each in finished] == [seen.count(NOT_FINITE) for seen in expected]


def test_nothing_is_drawn_in_vain_while_images_are_left() -> None:
    """With enough images open, every sample but the last images' is one that a look was waiting for."""
    patients = [Patient(look=8, last=1 + i % 5, enough=99) for i in range(40)]
    finished, drawn = run(patients, most_open=40, room=24, take=lambda waiting: 8)
    needed = sum(each.cost.samples for each in finished)
    assert needed == sum(8 * patient.last for patient in patients)
    assert needed <= drawn <= needed + 24


def test_no_more_images_are_held_than_may_be() -> None:
    """One that takes long holds back those behind it; then its own samples fill the room."""
    patients = [Patient(look=4, last=30, enough=999), *(Patient(look=4, last=1, enough=999) for _ in range(50))]
    read = 0

    def images() -> Iterator[ImageProgress[Patient]]:
        nonlocal read
        for read, patient in enumerate(patients, start=1):
            yield under_way(read, patient)

    scheduler = Scheduler(images(), most_open=6)
    work, left = iter(scheduler), 0
    while not scheduler.done:
        for handle, sample in filter(None, itertools.islice(work, 8)):
            list(scheduler.add(Outcome(handle, sample, label_of(handle, sample), 1, 1)))
        assert read - left <= 6
        left += len(list(scheduler.finished()))
    assert left == 51


def test_late_images_are_decided_by_what_they_have() -> None:
    """The first one is late with two samples back and two under way, the second is not late."""
    late, other = (under_way(i, Patient(look=4, last=2, enough=99), deadline) for i, deadline in enumerate((5.0, 9.0)))
    scheduler = Scheduler(iter([late, other]))
    drawn = list(itertools.islice(scheduler, 6))
    assert drawn == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    for sample in range(2):
        assert list(scheduler.add(Outcome(0, sample, 1, 1, 1))) == []
    assert list(scheduler.stop_late(4.9)) == []
    assert list(scheduler.finished()) == []
    assert list(scheduler.stop_late(5.0)) == []  # two of its samples are under way: its handle stays
    assert list(scheduler.finished()) == [late]
    assert (late.stopped, late.decider.seen, late.cost.samples) == (True, [1, 1], 2)
    assert list(scheduler.add(Outcome(0, 2, 1, 1, 1))) == []
    assert list(scheduler.add(Outcome(0, 3, 1, 1, 1))) == [late]
    assert late.decider.seen == [1, 1]
    assert scheduler.open == {other}


def test_a_late_image_with_nothing_under_way_is_closed_at_once() -> None:
    only = under_way(0, Patient(look=2, last=2, enough=99), deadline=1.0)
    scheduler = Scheduler(iter([only]))
    drawn = list(itertools.islice(scheduler, 2))
    for handle, sample in filter(None, drawn):
        assert list(scheduler.add(Outcome(handle, sample, 1, 1, 1))) == []
    assert list(scheduler.stop_late(2.0)) == [only]
    assert list(scheduler.finished()) == [only]
    assert scheduler.done is False  # whether there are more images is not known yet
    assert next(iter(scheduler), None) is None
    assert scheduler.done


def test_one_image_alone_fills_batches_with_samples_that_it_may_need() -> None:
    scheduler = Scheduler(iter([under_way(0, Patient(look=4, last=5, enough=99))]), most_open=3)
    work = iter(scheduler)
    assert [next(work) for _ in range(20)] == [(0, sample) for sample in range(20)]
    assert next(work) is None  # no more than it can ever need
    for sample in range(20):
        list(scheduler.add(Outcome(0, sample, 1, 1, 1)))
    assert [each.image.idx for each in scheduler.finished()] == [0]
    assert scheduler.done
    with pytest.raises(StopIteration):
        next(work)


def test_phases_follow_each_other_with_indices_of_their_own() -> None:
    decider = fixed(2, 3)
    found = ImageProgress(image(0), decider, lambda phases: [5, 6])
    found.open()
    assert [found.draw() for _ in range(5)] == [(5, 0), (5, 1), (6, 0), (6, 1), (6, 2)]
    for label in (3, 3, 1, NOT_FINITE, 1):
        assert decider.needed > 0
        decider.add(label)
    assert decider.needed == 0
    assert [count.tolist() for count in decider.counts] == [[0, 0, 0, 2], [0, 2, 0, 0]]
    assert decider.n - sum(int(count.sum()) for count in decider.counts) == 1  # not finite


@given(st.permutations([(5, 0), (5, 1), (6, 0), (6, 1), (6, 2)]))
def test_a_sample_is_counted_for_its_own_phase_whenever_it_comes(order: list[tuple[int, int]]) -> None:
    label = {(5, 0): 3, (5, 1): 3, (6, 0): 1, (6, 1): NOT_FINITE, (6, 2): 1}
    decider = fixed(2, 3)
    found = ImageProgress(image(0), decider, lambda phases: [5, 6])
    found.open()
    assert {found.draw() for _ in range(5)} == set(order)
    for handle, sample in order:
        assert not found.decided
        found.add(Outcome(handle, sample, label[handle, sample], 1, 1))
    assert found.decided
    assert [count.tolist() for count in decider.counts] == [[0, 0, 0, 2], [0, 2, 0, 0]]


def test_an_image_of_which_a_sample_is_lost_has_failed_and_its_others_change_nothing() -> None:
    kept = Notebook()
    decider = fixed(1, 4)
    found = ImageProgress(image(0), decider, lambda phases: [5, 6], journal=kept)
    found.open()
    drawn = [found.draw() for _ in range(4)]
    for sample, label in ((0, 3), (2, 1), (1, None), (3, 1)):
        found.add(LostSample(*drawn[sample]) if label is None else Outcome(*drawn[sample], label, 1, 1))
    assert found.failed
    assert found.decided
    assert found.idle
    assert kept.labels == {0: [3]}
    assert [int(count.sum()) for count in decider.counts] == [1, 0]


def fixed(n0: int, n: int) -> FixedDecider:
    return FixedRule(n0=n0, n=n, alpha=0.05, sigma=1.0).start()


@pytest.mark.parametrize("label", [CLASSES, NOT_FINITE - 1])
def test_a_label_that_is_none_of_the_classes_is_not_taken_from_a_journal(label: int) -> None:
    class Damaged:
        def saved(self, idx: int) -> SavedLabels:
            return SavedLabels(np.array([0, label], np.int32), 0, 0)

        def add(self, idx: int, outcome: Outcome) -> None:
            raise AssertionError

    with pytest.raises(CheckFailed, match=f"label {label} is none of the {CLASSES} classes"):
        ImageProgress(image(0), Patient(4, 2, 9), lambda phases: [5], journal=Damaged(), classes=CLASSES)
