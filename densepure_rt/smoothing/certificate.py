"""Counts in, bound and radius out (Cohen, Rosenfeld & Kolter 2019). Nothing here samples.

The bounded quantity is p_A = P(voted label = A) over the smoothing noise and all vote noise, jointly. Everything that
is reported is rounded towards the weaker claim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from densepure_rt.json_files import Count, Radius
from densepure_rt.rounding import exact, floored

Counts = NDArray[np.int64]  # [classes]: samples whose voted label was each class
Method = Literal["fixed", "sequential", "radius"]
Abstention = Literal["gave up", "at n", "out of reach", "out of time"]
Result = Literal["certified", "gave up", "abstained", "skipped", "not reached", "undecided"]


@dataclass(frozen=True)
class EpsOutcome:
    """The result of the test of one eps: after n samples, n_a of them for the class. None: its test had no such moment.

    "gave up": more samples were thought futile; "abstained": all n_max were taken. "skipped": n_max agreeing samples
    would not do. "not reached": a smaller eps failed. "undecided": sampling was stopped from outside.
    """

    eps: Radius
    result: Result
    n: Count | None
    n_a: Count | None


@dataclass(frozen=True, repr=False)
class Certificate:
    """With probability at least 1 - alpha over the sampling, the smoothed classifier answers `predict` on the whole
    open l2 ball of `radius` around the image ([0, 1] pixel units). None, None: the procedure abstains.

    n_a: of the n estimation samples, those that voted for the class that n0 others selected. p_lower: the bound on its
    probability, at alpha less what the noise's finite precision is charged. An anytime rule selects nothing: n0 is 0, n
    what it took, and outcomes what came of each radius. stopped: time was up before the rule had decided.
    """

    predict: int | None
    radius: float | None
    n0: int
    n: int
    n_a: int
    alpha: float
    p_lower: float
    outcomes: tuple[EpsOutcome, ...] = ()
    stopped: bool = False

    def covers(self, label: int | None, radius: float) -> bool:
        """Return whether `label` is certified at `radius`."""
        return self.predict is not None and self.predict == label and self.radius is not None and self.radius >= radius

    def to_dict(self) -> dict[str, Any]:
        """Return its fields, in full precision, as JSON holds them."""
        return asdict(self) | {"outcomes": [asdict(outcome) for outcome in self.outcomes]}

    def told(self) -> dict[str, str]:
        """Return what a person reads of it; the radius is rounded down."""
        if self.radius is None:
            said = {"certificate": f"abstains: {abstention(self)}"}
        else:
            said = {"certified": f"class {self.predict}", "radius": floored(self.radius)}
        return said | {"samples": f"{self.n_a:,} of {self.n:,}", "alpha": exact(self.alpha)}

    def __repr__(self) -> str:
        return f"Certificate({', '.join(f'{name} {value}' for name, value in self.told().items())})"

    def _repr_html_(self) -> str:
        return html_rows(self.told())


def html_rows(told: Mapping[str, str]) -> Markup:
    """Write names and values as a table; what is HTML in them is shown as it stands."""
    row = Markup('<tr><th style="text-align: left">{}</th><td style="text-align: left">{}</td></tr>')
    return Markup("<table>{}</table>").format(Markup().join(row.format(*pair) for pair in told.items()))


def certified_accuracy(
    certificates: Sequence[tuple[int | None, Certificate]], radii: Sequence[float], reach: float | None
) -> list[float | None]:
    """The share of (label, certificate) pairs that are right at each radius; None where n cannot reach the radius."""
    return [
        None
        if radius > (reach or 0.0)
        else sum(certificate.covers(label, radius) for label, certificate in certificates) / max(1, len(certificates))
        for radius in radii
    ]


class Decided(Protocol):
    """The fields that `abstention` reads: a certificate, or its line in a run."""

    @property
    def predict(self) -> int | None: ...
    @property
    def stopped(self) -> bool: ...
    @property
    def outcomes(self) -> Sequence[EpsOutcome]: ...


def abstention(record: Decided) -> Abstention | None:
    """Why nothing was certified; None when something was."""
    if record.predict is not None:
        return None
    if record.stopped:
        return "out of time"
    result = record.outcomes[0].result if record.outcomes else "abstained"
    if result == "gave up":
        return "gave up"
    return "out of reach" if result == "skipped" else "at n"
