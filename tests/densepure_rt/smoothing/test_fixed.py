"""The decider of the fixed rule against CERTIFY on the counts of the whole labels."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from densepure_rt.runtime.device import NOT_FINITE
from densepure_rt.smoothing.fixed import FixedRule

CLASSES = 4
RULE = FixedRule(n0=5, n=20, alpha=0.05, sigma=0.5)


@given(st.lists(st.integers(NOT_FINITE, CLASSES - 1) | st.just(2), min_size=30, max_size=30))
def test_labels_that_come_one_by_one_are_certified_as_their_counts_are(labels: list[int]) -> None:
    """Of 25 samples; those beyond them change nothing."""
    decider = RULE.start(label=3)
    ended = [decider.add(label) for label in labels]
    assert ended == [False] * 24 + [True] * 6
    assert (decider.n, decider.needed) == (25, 0)
    every = np.array(labels)
    selection, estimation = (
        np.bincount(part[part != NOT_FINITE], minlength=CLASSES) for part in (every[:5], every[5:25])
    )
    assert decider.certificate() == RULE.certify(selection, estimation)


def test_a_fixed_rule_that_is_stopped_abstains_by_the_samples_that_it_has() -> None:
    decider = RULE.start()
    for taken in range(25):
        found = decider.certificate(stopped=True)
        assert (found.predict, found.radius, found.p_lower, found.stopped) == (None, None, 0.0, True)
        assert (found.n0, found.n, found.n_a) == (min(taken, 5), max(0, taken - 5), max(0, taken - 5))
        decider.add(2)
    assert decider.certificate().predict == 2
