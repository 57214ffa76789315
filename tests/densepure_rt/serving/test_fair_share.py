"""Shares against judging each image alone, whatever comes when; and who waits for whom."""

from __future__ import annotations

import itertools
import random
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densepure_rt.images.datasets import LabelledImage
from densepure_rt.runtime.reverse import Outcome
from densepure_rt.serving.fair_share import FairShare, QueuedImage
from densepure_rt.smoothing.decider import LOOK, Phases
from tests.support.deciders import Patient, alone, label_of

PIXELS = np.zeros((1, 2, 2), np.uint8)


def asked(handle: int, decider: Patient, urgent: bool = False) -> QueuedImage[Patient]:
    return QueuedImage(LabelledImage(handle, PIXELS, None), decider, urgent, lambda phases: [handle])


def back(share: FairShare[Patient], drawn: tuple[int, int]) -> QueuedImage[Patient] | None:
    return share.add(Outcome(*drawn, label_of(*drawn), 1, 1))


def draws(share: FairShare[Patient], count: int) -> list[int]:
    """Whose the next samples are."""
    return [drawn[0] for drawn in (share.draw() for _ in range(count)) if drawn is not None]


PATIENTS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 12), st.booleans()), max_size=9)


@settings(deadline=None, max_examples=200)
@given(PATIENTS, st.integers(0, 40), st.integers(1, 60), st.randoms(use_true_random=False))
def test_every_image_is_judged_as_if_it_were_alone_whatever_comes_and_goes_meanwhile(
    patients: list[tuple[int, int, int, bool]], ahead: int, room: int, chance: random.Random
) -> None:
    share = FairShare[Patient](ahead)
    coming = [asked(i, Patient(look, last, enough), urgent) for i, (look, last, enough, urgent) in enumerate(patients)]
    everyone, waiting = list(coming), deque[tuple[int, int]]()
    answered, stopped, closed = list[int](), set[int](), list[int]()
    while coming or share.undecided or waiting:
        if coming and chance.random() < 0.3:
            share.put(coming.pop(0))
        if share.undecided and chance.random() < 0.05:
            given_up = chance.choice(share.undecided)
            share.stop(given_up)
            stopped.add(given_up.image.idx)
        while len(waiting) < room and (drawn := share.draw()) is not None:
            waiting.append(drawn)
        assert waiting or not share.undecided, "images wait, and nothing is under way"
        assert share.under_way == bool(waiting)
        for _ in range(min(len(waiting), chance.randint(1, room))):
            if (decided := back(share, waiting.popleft())) is not None:
                answered.append(decided.image.idx)
            closed += share.settled()
    closed += share.settled()
    assert sorted([*answered, *stopped]) == list(range(len(everyone)))
    assert sorted(closed) == [each.image.idx for each in everyone if each.drawn]
    assert share.handles == []
    for each in everyone:
        expected = alone(each.image.idx, Patient(each.decider.look, each.decider.last, each.decider.enough))
        assert each.decider.seen == (expected[: len(each.decider.seen)] if each.image.idx in stopped else expected)


def test_an_urgent_image_comes_before_all_others_and_in_the_midst_of_them() -> None:
    share = FairShare[Patient](ahead=0)
    share.put(asked(0, Patient(look=LOOK, last=9)))
    assert draws(share, 5) == [0] * 5
    share.put(asked(1, Patient(look=13, last=1), urgent=True))
    share.put(asked(2, Patient(look=13, last=1), urgent=True))
    assert draws(share, 30) == [1] * 13 + [2] * 13 + [0] * 4


def test_urgent_images_without_end_leave_a_look_in_four_to_the_others() -> None:
    share = FairShare[Patient](ahead=0)
    share.put(asked(0, Patient(look=9 * LOOK, last=1)))
    owners = []
    for handle in range(1, 60):
        share.put(asked(handle, Patient(look=13, last=1), urgent=True))
        owners += draws(share, 13)
    turns = [len(list(run)) for owner, run in itertools.groupby(owners) if owner == 0]
    assert turns[:-1] == [LOOK] * (len(turns) - 1)
    assert owners.count(0) == pytest.approx(len(owners) / 4, abs=LOOK)


def test_those_who_have_had_the_least_come_first_a_look_at_a_time() -> None:
    """A long certificate that is far ahead waits for newcomers until they have had as many looks."""
    share = FairShare[Patient](ahead=0)
    long = asked(0, Patient(look=2 * LOOK, last=9))
    share.put(long)
    for drawn in [share.draw() for _ in range(2 * LOOK)]:
        assert drawn is not None
        back(share, drawn)
    for handle in (1, 2):
        share.put(asked(handle, Patient(look=4 * LOOK, last=1)))
    assert draws(share, 5 * LOOK) == [1] * LOOK + [2] * LOOK + [1] * LOOK + [2] * LOOK + [0] * LOOK


def test_a_sample_that_may_be_needed_waits_for_all_that_are_and_no_image_has_many() -> None:
    share = FairShare[Patient](ahead=3)
    for handle in (0, 1):
        share.put(asked(handle, Patient(look=4, last=9), urgent=handle == 0))
    assert draws(share, 20) == [0] * 4 + [1] * 4 + [0] * 3 + [1] * 3
    assert share.draw() is None


def test_an_image_is_opened_with_its_first_sample_and_closed_after_its_last() -> None:
    opened: list[Phases] = []

    def open_handles(phases: Phases) -> list[int]:
        opened.append(phases)
        return [7]

    share = FairShare[Patient](ahead=0)
    only = QueuedImage(LabelledImage(0, PIXELS, None), Patient(look=2, last=1), False, open_handles)
    share.put(only)
    assert (opened, share.handles, share.under_way) == ([], [], False)
    assert [share.draw(), share.draw(), share.draw()] == [(7, 0), (7, 1), None]
    assert (len(opened), share.handles) == (1, [7])
    assert back(share, (7, 0)) is None
    share.stop(only)
    assert list(share.settled()) == []  # one is under way
    assert back(share, (7, 1)) is None  # nobody waits for it any more
    assert list(share.settled()) == [7]
    assert (list(share.settled()), share.handles, share.undecided) == ([], [], [])
    assert only.decider.seen == [label_of(7, 0)]


def test_an_image_that_is_stopped_before_its_first_sample_was_never_opened() -> None:
    share = FairShare[Patient](ahead=0)
    only = asked(0, Patient(look=2, last=1))
    share.put(only)
    share.stop(only)
    assert (share.draw(), list(share.settled()), share.under_way) == (None, [], False)
    with pytest.raises(ValueError, match="not in list"):
        share.stop(only)
