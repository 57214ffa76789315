"""The ballot: votes in, decided label out."""

from __future__ import annotations


class Ballot:
    """A plurality vote of `votes` labels, cast in order. A tie goes to the label that was seen first.

    That is the rule of DensePure's official merge script. `needed` tells when no further vote can change the winner,
    so that stopping there gives the label that all the votes would have given.
    """

    def __init__(self, votes: int) -> None:
        self.remaining = votes
        self.counts: dict[int, int] = {}  # in the order of first sight

    def cast(self, label: int) -> None:
        self.counts[label] = self.counts.get(label, 0) + 1
        self.remaining -= 1

    @property
    def needed(self) -> int:
        """The fewest further votes after which the winner can be certain; 0 when it is."""
        counts = [*self.counts.values(), 0]  # and there is always one more label that nobody has seen
        return min(self._needed_by(place, counts) for place in range(len(counts)))

    @property
    def winner(self) -> int:
        """The label that leads; certain once `needed` is 0."""
        return max(self.counts, key=self.counts.__getitem__)  # max returns the first of equals

    def _needed_by(self, place: int, counts: list[int]) -> int:
        """Votes that must go to the label at `place` before no rival can catch up with all the others that remain.

        With m more votes it has own + m, a rival at most its count + remaining - m. A rival seen earlier wins a tie.
        """
        gaps = [
            count + self.remaining - counts[place] + (rival < place)
            for rival, count in enumerate(counts)
            if rival != place or rival == len(counts) - 1
        ]
        return max(0, -(-max(gaps) // 2))
