from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from densepure_rt.report.accuracy import RHO, band_half_width, curve_of, reach, right_of_these
from densepure_rt.runs.reader import read_run
from densepure_rt.runs.records import RuleIdentity
from tests.support.growth import calls
from tests.support.runs import ALPHA, GRID, SEQUENTIAL, SIGMA, Made, N, make_run

IMAGES = (Made(0.1), Made(0.4), Made(0.4, predict=2), Made(None), Made(0.0), Made(0.7), Made(0.7, label=None))
FIXED_REACH = SIGMA * stats.norm.ppf(ALPHA ** (1 / N))  # all n agree: p_lower^n = alpha


def test_a_curve_is_the_share_of_labelled_images_certified_for_their_label(tmp_path: Path) -> None:
    curve = curve_of(read_run(make_run(tmp_path / "a", IMAGES)))
    radii = np.array([made.radius for made in IMAGES if made.label is not None], dtype=float)  # NaN: abstained
    right = np.array([made.predict == made.label for made in IMAGES if made.label is not None])
    for radius in (0.0, 0.05, 0.1, np.nextafter(0.1, 1), 0.3, 0.4, 0.41, 0.7, 0.71, FIXED_REACH - 1e-6):
        assert curve.at(radius) == pytest.approx(np.mean(right & (radii >= radius)))
    assert curve.images == 6


def test_a_curve_ends_where_n_samples_end(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", IMAGES))
    assert reach(run.manifest.identity) == pytest.approx(FIXED_REACH, abs=1e-9)
    assert [curve_of(run).at(radius) for radius in (FIXED_REACH + 1e-6, -0.1, math.nan)] == [None] * 3


def test_a_sequential_run_knows_the_radii_of_its_grid_alone(tmp_path: Path) -> None:
    images = (Made(0.0), Made(0.25), Made(0.5), Made(None))
    curve = curve_of(read_run(make_run(tmp_path / "a", images, rule=SEQUENTIAL)))
    assert [curve.at(radius) for radius in GRID] == [0.75, 0.5, 0.25, None]
    assert curve.at(0.1) is None


def test_a_radius_run_is_not_blamed_for_the_radius_it_gave_up(tmp_path: Path) -> None:
    """All its samples agreed, and it stopped at 95 % of what n would have given: beyond that nothing is known."""
    rule = RuleIdentity("radius", N, ALPHA, 0.0, "", radius_loss=0.05, look=32)
    best = 0.96 * FIXED_REACH
    curve = curve_of(read_run(make_run(tmp_path / "a", [Made(best)], rule=rule)))
    assert curve.at(best) == 1.0
    assert curve.at(0.99 * FIXED_REACH) is None


def test_without_labels_every_certificate_counts(tmp_path: Path) -> None:
    images = (Made(0.4, label=None), Made(None, label=None), Made(0.1, label=None, predict=1))
    curve = curve_of(read_run(make_run(tmp_path / "a", images)))
    assert [curve.at(radius) for radius in (0.0, 0.2)] == pytest.approx([2 / 3, 1 / 3])
    assert not curve.labelled


def test_a_curve_takes_work_in_proportion_to_its_images(tmp_path: Path) -> None:
    """Each image has a radius of its own, as in runs that measure radii."""
    few, many = (read_run(make_run(tmp_path / str(n), [Made(0.1 + i / 1e5) for i in range(n)])) for n in (100, 800))
    assert len(curve_of(many).radii) == 802
    assert calls(lambda: curve_of(many)) < 12 * calls(lambda: curve_of(few))


def test_without_images_there_is_no_curve(tmp_path: Path) -> None:
    curve = curve_of(read_run(make_run(tmp_path / "a", [], asked=5)))
    assert (curve.radii, curve.at(0.0)) == ((), None)


@given(st.integers(1, 20_000), st.sampled_from([0.9, 0.95, 0.99]))
def test_the_band_holds_at_least_as_often_as_it_says(images: int, confidence: float) -> None:
    """Against the exact distribution of Kolmogorov's statistic, the worst case of a continuous source."""
    assert stats.kstwo.sf(band_half_width(images, confidence), images) <= (1 - confidence) * (1 + 1e-9)


@pytest.mark.parametrize(("images", "less"), [(500, 0.005444), (1000, 0.003729), (10_000, 0.001647)])
def test_the_bound_on_the_test_set_is_that_of_the_published_code(images: int, less: float) -> None:
    assert 0.8 - right_of_these(0.8, images, 0.001) == pytest.approx(less, abs=5e-7)


@given(st.integers(1, 100_000), st.sampled_from([1e-5, 1e-4, 0.001, 0.01, 0.05]))
def test_the_bound_on_the_test_set_holds_against_the_exact_binomial(images: int, alpha: float) -> None:
    """More wrong certificates than it takes off have a probability of at most rho."""
    wrong = images * (1 - right_of_these(1.0, images, alpha))
    if right_of_these(1.0, images, alpha) > 0:
        assert stats.binom.sf(math.floor(wrong + 1e-9), images, alpha) <= RHO
