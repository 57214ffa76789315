from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import densepure_rt
from densepure_rt import Certificate, Certified, EnvironmentFault, LabelledImage, Predicted, UsageError
from densepure_rt.report.notebook import curve_of_answers, rows_of
from densepure_rt.smoothing.certificate import EpsOutcome
from densepure_rt.smoothing.scheduling import Cost

PIXELS = np.zeros((1, 2, 2), np.uint8)


def certificate(radius: float | None, *reached: bool) -> Certificate:
    outcomes = tuple(EpsOutcome(i / 4, "certified" if held else "gave up", 9, 9) for i, held in enumerate(reached))
    return Certificate(None if radius is None else 1, radius, 0, 9, 9, 0.001, 0.8, outcomes)


def certified(idx: int, label: int | None, found: Certificate) -> Certified:
    return Certified(LabelledImage(idx, PIXELS, label), found, Cost(9, 18, 45, 0, 0.5))


GRID = [
    certified(0, 1, certificate(0.25, True, True)),
    certified(1, 1, certificate(0.0, True, False)),
    certified(2, 0, certificate(0.25, True, True)),
    certified(3, None, certificate(0.25, True, True)),
]


def test_a_curve_of_answers_is_the_share_of_the_labelled_ones_at_what_was_asked() -> None:
    curve = curve_of_answers(GRID)
    assert (curve.radii, curve.accuracy) == ((0.0, 0.25), (2 / 3, 1 / 3))
    assert (curve.grid, curve.images, curve.labelled) == (True, 3, True)


def test_a_curve_of_certificates_alone_counts_any_class_and_falls_where_a_radius_ends() -> None:
    curve = curve_of_answers([certificate(0.3), certificate(None), certificate(0.1)])
    assert curve.radii == (0.0, 0.1, 0.3)
    assert curve.accuracy == (2 / 3, 2 / 3, 1 / 3)
    assert (curve.grid, curve.labelled) == (False, False)


def test_rows_hold_the_label_the_answer_and_the_cost() -> None:
    rows = rows_of(GRID)
    assert [row["correct"] for row in rows] == [True, True, False, None]
    assert {(row["predict"], row["samples"]) for row in rows} == {(1, 9)}
    assert not any("outcomes" in row for row in rows)
    assert rows_of([certificate(None)])[0]["radius"] is None
    one = Predicted(LabelledImage(5, PIXELS, 0), 1, 13, np.array([0, 13]), 0.001, Cost())
    assert rows_of([one])[0]["idx"] == 5
    assert rows_of(one) == rows_of([one])


def test_a_frame_has_a_row_for_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = SimpleNamespace(from_records=lambda rows: rows)
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=frame))
    assert densepure_rt.to_dataframe(GRID) == rows_of(GRID)


def test_a_frame_of_the_real_pandas() -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    frame = densepure_rt.to_dataframe(GRID)
    assert list(frame["radius"]) == [0.25, 0.0, 0.25, 0.25]


@pytest.mark.parametrize(
    ("package", "call"),
    [("pandas", densepure_rt.to_dataframe), ("matplotlib", densepure_rt.plot_certified_accuracy)],
)
def test_without_its_package_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, package: str, call: Any) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.pyplot", raising=False)
    with pytest.raises(EnvironmentFault, match=f"needs {package}.*pip install"):
        call(GRID)


@pytest.mark.parametrize("given", [[1], 1, [GRID[0].certificate, "x"]])
def test_what_is_no_result_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match="is no result: give a run's folder"):
        rows_of(given)
    with pytest.raises(UsageError, match="holds no run"):
        rows_of(Path("nowhere"))


def test_a_plot_draws_each_curve_by_its_name() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = densepure_rt.plot_certified_accuracy(iter(GRID), [certificate(0.3), certificate(None)])
    assert axes.get_ylabel() == "share certified"
    legend = axes.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {"certificates 1", "certificates 2"}
    assert densepure_rt.plot_certified_accuracy(GRID, axes=axes) is axes
    assert axes.get_ylabel() == "certified accuracy"
    with pytest.raises(UsageError, match="no run"):
        densepure_rt.plot_certified_accuracy()
    one = Predicted(LabelledImage(5, PIXELS, 0), 1, 13, np.array([0, 13]), 0.001, Cost())
    for nothing in ([one], []):
        with pytest.raises(UsageError, match="no radius"):
            densepure_rt.plot_certified_accuracy(nothing)
