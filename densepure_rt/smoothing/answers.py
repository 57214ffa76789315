"""Show an image, a certificate or a prediction with its cost: as a dict, as one line, or in a notebook."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from densepure_rt.images.datasets import LabelledImage
from densepure_rt.images.pictures import data_address
from densepure_rt.rounding import raised
from densepure_rt.smoothing.bounds import error_at_most
from densepure_rt.smoothing.certificate import Certificate, html_rows
from densepure_rt.smoothing.decider import Decider
from densepure_rt.smoothing.scheduling import Cost
from densepure_rt.text import printable


class Certified(NamedTuple):
    image: LabelledImage
    certificate: Certificate
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON holds of it: which image, whether it is right, the certificate, the cost; no pixels.

        correct: None without a label, as in a run's records.
        """
        label = self.image.label
        correct = None if label is None else self.certificate.covers(label, 0.0)
        return asked(self.image) | {"correct": correct} | self.certificate.to_dict() | dataclasses.asdict(self.cost)

    def __repr__(self) -> str:
        return f"Certified({self.image!r}, {self.certificate!r})"

    def _repr_html_(self) -> str:
        return with_picture(self.image, self.certificate.told())


class Predicted(NamedTuple):
    """label: None where n samples leave it open. votes: how many of the n samples taken chose each class.

    error_bound: over the sampling, a label other than the smoothed classifier's comes with a bound of b or less with
    probability at most b, for every b. It is not the probability that this label is wrong. None without a label.
    stopped: time was up before it was decided.
    """

    image: LabelledImage
    label: int | None
    n: int
    votes: NDArray[np.int64]
    error_bound: float | None
    cost: Cost
    stopped: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON holds of it: which image, whether it is right, its label, the cost; no pixels.

        correct: None without a label.
        """
        label = self.image.label
        found: dict[str, Any] = {
            "correct": None if label is None else self.label == label,
            "predict": self.label,
            "n": self.n,
        }
        found |= {"votes": self.votes.tolist(), "error_bound": self.error_bound, "stopped": self.stopped}
        return asked(self.image) | found | dataclasses.asdict(self.cost)

    def told(self) -> dict[str, str]:
        """Return what a person reads of it."""
        if self.label is None:
            return {"label": "abstains", "samples": f"{self.n:,}"}
        bound = "-" if self.error_bound is None else raised(self.error_bound, figures=2)
        votes = f"{self.votes[self.label]:,} of {self.n:,}"
        return {"label": str(self.label), "votes": votes, "error bound": bound}

    def __repr__(self) -> str:
        said = ", ".join(f"{name} {value}" for name, value in self.told().items())
        return f"Predicted({self.image!r}, {said})"

    def _repr_html_(self) -> str:
        return with_picture(self.image, self.told())


def asked(image: LabelledImage) -> dict[str, Any]:
    return {"idx": image.idx, "name": image.name, "label": image.label}


def with_picture(image: LabelledImage, told: Mapping[str, str]) -> str:
    """Show an image beside what is said of it. Its name is untrusted, and escaped."""
    known = {"image": str(image.idx) if image.name is None else f"{image.idx}, {printable(image.name)}"}
    known |= {} if image.label is None else {"its label": str(image.label)}
    picture = Markup('<img src="{}" alt="" style="height: 7em; image-rendering: pixelated">')
    shown = picture.format(data_address(image.pixels)) if len(image.pixels) != 2 else Markup()
    rows = html_rows({**known, **told})
    return Markup('<div style="display: flex; gap: 1em; align-items: center">{}{}</div>').format(shown, rows)


def prediction_of(
    image: LabelledImage, decider: Decider, charge: float, classes: int, cost: Cost, stopped: bool = False
) -> Predicted:
    """Return the prediction of a decider by `prediction_rule`, which took `charge` off its alpha."""
    found, counts = decider.certificate(stopped), decider.votes
    votes = np.array([counts.get(label, 0) for label in range(classes)])
    bound = None if found.predict is None else error_at_most(found.n_a, found.n) + charge
    return Predicted(image, found.predict, found.n, votes, bound, cost, stopped)
