"""The ballot against casting every vote, and `needed` against every continuation."""

from __future__ import annotations

import itertools
from functools import cache
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from densepure_rt.smoothing.voting import Ballot

QUICK = settings(deadline=None, max_examples=300)
LABELS = range(4)  # histories below use the first three: there is always a label that nobody has seen


def plurality(labels: list[int]) -> int:
    """The winner once all are cast; a tie goes to the label seen first."""
    return max(labels, key=labels.count)


def ballot_after(votes: int, labels: tuple[int, ...] | list[int]) -> Ballot:
    ballot = Ballot(votes)
    for label in labels:
        ballot.cast(label)
    return ballot


@cache
def possible_winners(labels: tuple[int, ...], remaining: int) -> frozenset[int]:
    if remaining == 0:
        return frozenset({plurality(list(labels))})
    return frozenset().union(*(possible_winners((*labels, label), remaining - 1) for label in LABELS))


@cache
def fewest_until_certain(labels: tuple[int, ...], remaining: int) -> int:
    """The fewest further votes after which, if they fall well, one winner is left; by trying all of them."""
    if len(possible_winners(labels, remaining)) == 1:
        return 0
    return 1 + min(fewest_until_certain((*labels, label), remaining - 1) for label in LABELS)


@pytest.mark.parametrize("votes", [1, 2, 3, 4, 5, 6])
def test_needed_is_the_fewest_votes_that_can_decide_by_trying_every_continuation(votes: int) -> None:
    for cast in range(votes + 1):
        for labels in product(LABELS[:3], repeat=cast):
            ballot = ballot_after(votes, labels)
            assert ballot.needed == fewest_until_certain(labels, votes - cast), labels


@pytest.mark.parametrize("votes", [1, 2, 3, 4, 5, 6])
def test_winner_cannot_change_once_no_vote_is_needed(votes: int) -> None:
    decided_early = 0
    for cast in range(1, votes + 1):
        for labels in product(LABELS[:3], repeat=cast):
            ballot = ballot_after(votes, labels)
            if ballot.needed == 0:
                assert possible_winners(labels, votes - cast) == {ballot.winner}, labels
                decided_early += cast < votes
    assert decided_early or votes < 2


@QUICK
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
@example([0, 1])
@example([1, 0, 0, 1])
@example([2, 1, 0, 0, 1, 2])
def test_winner_of_a_full_ballot_is_the_plurality_and_ties_go_to_the_first_seen(labels: list[int]) -> None:
    ballot = ballot_after(len(labels), labels)
    assert ballot.needed == 0
    assert ballot.winner == plurality(labels)


@QUICK
@given(st.lists(st.integers(0, 3), min_size=1, max_size=41))
@example([0, 0, 0, 1, 1])
@example([0, 1, 1, 0])
def test_stopping_when_none_is_needed_gives_the_label_of_all_the_votes(labels: list[int]) -> None:
    ballot, uncast = Ballot(len(labels)), list(labels)
    while ballot.needed:
        for _ in range(ballot.needed):  # in rounds, as the reverse loop does
            ballot.cast(uncast.pop(0))
    assert ballot.winner == plurality(labels)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=41), st.lists(st.integers(1, 9), max_size=41))
def test_rounds_of_any_size_give_the_label_of_all_the_votes(labels: list[int], sizes: list[int]) -> None:
    """Fewer than can decide, more than are needed, one at a time: the winner is that of the whole ballot."""
    ballot, cast = Ballot(len(labels)), 0
    for size in itertools.chain(sizes, itertools.repeat(1)):
        if ballot.needed == 0:
            break
        for label in labels[cast : cast + size]:
            ballot.cast(label)
        cast = min(len(labels), cast + size)
    assert ballot.winner == max(labels, key=labels.count)  # max returns the first of equals: the one seen first


@QUICK
@given(st.lists(st.integers(0, 3), min_size=1, max_size=41))
def test_needed_never_exceeds_what_remains_nor_falls_by_more_than_one_a_vote(labels: list[int]) -> None:
    ballot = Ballot(len(labels))
    for cast, label in enumerate(labels):
        before = ballot.needed
        assert before <= len(labels) - cast
        ballot.cast(label)
        assert ballot.needed >= before - 1


@pytest.mark.parametrize(("votes", "needed"), [(1, 1), (2, 1), (3, 2), (5, 3), (8, 4), (40, 20), (41, 21)])
def test_a_fresh_ballot_needs_half_of_its_votes_since_a_tie_goes_to_the_first_seen(votes: int, needed: int) -> None:
    ballot = Ballot(votes)
    assert ballot.needed == needed
    for _ in range(needed):
        assert ballot.needed > 0
        ballot.cast(7)
    assert (ballot.needed, ballot.winner) == (0, 7)
