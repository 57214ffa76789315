"""From when on a worker's task is late: learnt from what the tasks of other workers took."""

from __future__ import annotations

from collections import deque

SLOW = 4.0  # times the longest recent task of the others
LEAST = 3.0  # seconds that any task has: to start a worker again takes about as long
EXPECTED = 30.0  # seconds that a task has at least, while none was done and it is known what one should take
UNKNOWN = 300.0  # seconds that it has while nothing is known
RECENT = 64  # tasks that count
LATES = 5  # times in a row, each with twice the time of the one before, before there is no use in another


class Pace:
    """Learn how long tasks of one kind take.

    The first task of each worker counts apart: it may compile kernels and take memory. expected: seconds of a task by
    what was measured before the first; None where nothing was.
    """

    def __init__(self, expected: float | None = None) -> None:
        self.expected = expected
        self._first: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._later: deque[tuple[int, float]] = deque(maxlen=RECENT)

    def note(self, worker: int, seconds: float, first: bool) -> None:
        """A task was done."""
        (self._first if first else self._later).append((worker, seconds))

    def longest(self, worker: int, first: bool) -> float | None:
        """Seconds of the longest recent task of the other workers, or of this one where no other has done any."""
        known = [*self._later, *(self._first if first or not self._later else ())]
        others = [seconds for other, seconds in known if other != worker]
        return max(others or [seconds for _, seconds in known], default=None)

    def limit(self, worker: int, first: bool, doublings: int = 0) -> float:
        """Seconds after which a task of this worker is late. doublings: of them, for what was late before."""
        longest = self.longest(worker, first)
        if longest is not None:
            usual = max(LEAST, SLOW * longest)
        else:
            usual = UNKNOWN if self.expected is None else max(EXPECTED, SLOW * self.expected)
        return usual * 2.0**doublings
