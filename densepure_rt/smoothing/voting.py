"""The ballot: votes in, decided label out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from densepure_rt.runtime.reverse import UNCAST

MOST_PAIRS = 1 << 22  # of votes that are compared with each other at a time: megabytes, whatever the votes


class Ballot:
    """A plurality vote of `votes` labels, cast in order. A tie goes to the label that was seen first.

    That is the rule of DensePure's official merge script. `needed` tells when no further vote can change the winner,
    so that stopping there gives the label that all the votes would have given.
    """

    def __init__(self, votes: int) -> None:
        self.remaining = votes
        self._labels = np.full((votes, 1), UNCAST, np.int32)

    def cast(self, label: int) -> None:
        self._labels[-self.remaining] = label
        self.remaining -= 1

    @property
    def needed(self) -> int:
        """The fewest further votes after which the winner can be certain; 0 when it is."""
        return int(self.count(self._labels)[0][0])

    @property
    def winner(self) -> int:
        """The label that leads; certain once `needed` is 0."""
        return int(self.count(self._labels)[1][0])

    @staticmethod
    def count(labels: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """`needed` and `winner` of n ballots at once: labels [votes, n] in the order of casting, UNCAST behind them."""
        most = max(1, MOST_PAIRS // len(labels) ** 2)
        if labels.shape[1] <= most:
            return _count(labels)
        parts = [_count(labels[:, first : first + most]) for first in range(0, labels.shape[1], most)]
        needed, winner = zip(*parts, strict=True)
        return np.concatenate(needed), np.concatenate(winner)


def _count(labels: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """See `Ballot.count`.

    The leader is certain once no rival can catch up with all votes that remain. With m more votes it has own + m, a
    rival at most its count + remaining - m; one that was seen before the leader wins a tie, which counts for one more;
    and there is always one that nobody has seen, with a count of 0.
    """
    remaining = np.count_nonzero(labels == UNCAST, axis=0)
    labels = labels[: max(1, len(labels) - int(remaining.min()))]
    cast = labels != UNCAST
    counts = (labels[:, None] == labels).sum(axis=1, dtype=np.int16) * cast  # [cast, n]: of the label of each vote
    first = counts.argmax(axis=0)  # where the leader was seen first: argmax takes the first of equals
    every = np.arange(len(first))
    winner, own = labels[first, every], counts[first, every]
    rivals = (counts + (np.arange(len(labels))[:, None] < first)) * (cast & (labels != winner))
    return np.maximum(0, -(-(rivals.max(axis=0) + remaining - own) // 2)), winner
