"""Certificates and runs for whoever looks at them in Python: as a table of pandas, as a curve of matplotlib."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from densepure_rt.errors import UsageError
from densepure_rt.legacy.folder import ImportedRun
from densepure_rt.optional import optional
from densepure_rt.report.accuracy import Curve, curve_of, curve_of_imported, shares_certified
from densepure_rt.report.charts import draw_accuracy
from densepure_rt.report.sources import read_results
from densepure_rt.runs.layout import record_of
from densepure_rt.runs.reader import Run
from densepure_rt.runtime.noise import image_sha256
from densepure_rt.smoothing.answers import Certified, Predicted
from densepure_rt.smoothing.certificate import Certificate

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

Answers: TypeAlias = "Iterable[Certificate | Certified | Predicted] | Certificate | Certified | Predicted"
Results: TypeAlias = "str | os.PathLike[str] | Run | ImportedRun"  # a path: of a run's folder, or an imported one


def to_dataframe(found: Results | Answers) -> pandas.DataFrame:
    """Return a row for each image: of a run's folder, or of what `certify_batch` and `predict_each` gave.

    Columns are named as the fields of a run's results.jsonl and timing.jsonl; `outcomes` is left out.

    Raises EnvironmentFault without pandas, UsageError for what is neither.
    """
    with optional("to_dataframe", "pandas", 'run "pip install pandas"'):
        import pandas
    return pandas.DataFrame.from_records(rows_of(found))


def plot_certified_accuracy(*found: Results | Answers, axes: Axes | None = None) -> Axes:
    """Draw the certified accuracy over the radius of runs, or of what `certify_batch` gave. Returns the axes.

    Of answers without labels, and of certificates alone, it is the share that is certified for any class. axes: None
    for new ones, of `matplotlib.pyplot`.

    Raises EnvironmentFault without matplotlib, UsageError for what is neither or has no image.
    """
    with optional("plot_certified_accuracy", "matplotlib", "run \"pip install 'densepure-rt[report]'\""):
        from matplotlib import pyplot
    curves = [named_curve(each, i) for i, each in enumerate(found, start=1)]
    if not curves:
        raise UsageError("no run and no certificates were given: give one or more")
    drawn: Axes = pyplot.subplots(layout="constrained")[1] if axes is None else axes
    draw_accuracy(drawn, curves)
    return drawn


def rows_of(found: Results | Answers) -> list[dict[str, Any]]:
    source = opened(found)
    if isinstance(source, Run):
        names = source.manifest.identity.class_names
        pairs = zip(source.records, source.timings, strict=True)
        rows = [
            dataclasses.asdict(record)
            | {"class": None if record.predict is None else names[record.predict]}
            | dataclasses.asdict(timing)
            for record, timing in pairs
        ]
    elif isinstance(source, ImportedRun):
        rows = [dataclasses.asdict(record) for record in source.records]
    else:
        rows = [answer.to_dict() for answer in source]
    return [{name: value for name, value in row.items() if name != "outcomes"} for row in rows]


def named_curve(found: Results | Answers, number: int) -> tuple[str, Curve]:
    """Return a curve and what to call it. number: of answers, among all that is drawn."""
    source = opened(found)
    if isinstance(source, Run):
        return source.path.name, curve_of(source)
    if isinstance(source, ImportedRun):
        return source.path.name, curve_of_imported(source)
    return f"certificates {number}", curve_of_answers(source)


def curve_of_answers(answers: list[Certificate] | list[Certified] | list[Predicted]) -> Curve:
    """Return the curve of the labelled images, or of all where none has a label.

    Where each radius was decided by itself, it is known at these alone.
    """
    certified = [answer for answer in answers if not isinstance(answer, Predicted)]
    if len(certified) < len(answers) or not answers:
        raise UsageError("predictions and nothing have no radius: give what certify_batch returned")
    records = [
        record_of(0, "", None, answer)
        if isinstance(answer, Certificate)
        else record_of(
            answer.image.idx, image_sha256(answer.image.pixels).hex(), answer.image.label, answer.certificate
        )
        for answer in certified
    ]
    counted = [record for record in records if record.label is not None] or records
    grids = {tuple(outcome.eps for outcome in record.outcomes) for record in counted}
    asked = grids.pop() if len(grids) == 1 else ()
    grid = len(asked) > 1  # the radius rule has one outcome, of its own radius; a grid of one is drawn as if it had
    radii = asked if grid else tuple(sorted({0.0} | {found.radius for found in counted if found.radius is not None}))
    shares = shares_certified(counted, radii)
    return Curve(radii, shares, grid, len(counted), counted[0].label is not None)


def opened(found: Results | Answers) -> Run | ImportedRun | list[Any]:
    """Read a folder; make a list of answers."""
    if isinstance(found, Run | ImportedRun):
        return found
    if isinstance(found, str | os.PathLike):
        return read_results(Path(found))
    answers = list(found) if isinstance(found, Iterable) and not isinstance(found, Certified | Predicted) else [found]
    for answer in answers:
        if not isinstance(answer, Certificate | Certified | Predicted):
            kinds = "a run's folder, or certificates and predictions"
            raise UsageError(f"{type(answer).__qualname__} is no result: give {kinds}")
    return answers
