"""Sound readings against results whose truth is known, and flags against files with one fault each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from densepure_rt.errors import UsageError
from densepure_rt.legacy.claims import Imported, flags_of_merged, import_folder, import_log
from densepure_rt.legacy.label_arrays import Retaken, open_folder
from densepure_rt.legacy.logs import Log, Row
from densepure_rt.smoothing.fixed import FixedRule
from tests.support.growth import calls

RADII = (0.0, 0.25, 0.5, 0.75, 1.0)
GOOD = (Row(0, 3, 3, "0.497", 1), Row(1, 4, None, "0.0", 0), Row(2, 5, 6, "0.25", 0), Row(3, 7, 7, "0.25", 1))
SIGMA, N0, N, RUNS = 0.25, 50, 4000, 3


def log_of(rows: Iterable[Row], unfinished: bool = False) -> Log:
    return Log("log.tsv", "0" * 64, tuple(rows), unfinished)


def flags(found: Imported) -> dict[str, tuple[bool, tuple[int, ...]]]:
    return {flag.name: (flag.unsound, flag.images) for flag in found.flags}


def read(rows: Iterable[Row], sigma: float | None = None, n: int | None = None, alpha: float = 0.001) -> Imported:
    return import_log(log_of(rows), sigma, n, alpha, RADII)


def test_a_good_log_keeps_its_claims_rounded_down() -> None:
    found = read(GOOD, 0.25, 100_000)
    assert [claim.radius for claim in found.claims] == [0.4965, None, 0.2495, 0.2495]
    assert [claim.correct for claim in found.claims] == [True, False, False, True]
    assert flags(found) == {"rounding": (False, (3,))}
    assert found.accuracy_as_printed(RADII) == [0.5, 0.5, 0, 0, 0]
    assert found.accuracy(RADII) == [0.5, 0.25, 0, 0, None]  # 1.0 is beyond 3.81 sigma


def test_a_log_takes_work_in_proportion_to_its_rows() -> None:
    few, many = ([Row(idx, 1, 1, f"{0.123 + idx % 700 / 1000:.3}", 1) for idx in range(n)] for n in (100, 800))
    assert len(read(many).claims) == 800
    assert calls(lambda: read(many, 0.25, 100_000)) < 12 * calls(lambda: read(few, 0.25, 100_000))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(0.001, 3), min_size=1, max_size=30))
def test_no_image_counts_at_a_radius_that_it_did_not_have(radii: list[float]) -> None:
    found = read(Row(idx, 1, 1, f"{radius:.3}", 1) for idx, radius in enumerate(radii))
    for claim, radius in zip(found.claims, radii, strict=True):
        assert claim.radius is not None
        assert claim.radius <= radius


@pytest.mark.parametrize(
    ("row", "name", "unsound"),
    [
        (GOOD[0]._replace(correct=0), "correct column", True),
        (GOOD[1]._replace(correct=1), "correct column", True),
        (GOOD[2]._replace(correct=1), "correct column", True),
        (GOOD[1]._replace(radius="0.3"), "abstains with a radius", True),
        (GOOD[0]._replace(radius="0.0"), "label without a radius", False),
    ],
)
def test_a_row_that_contradicts_itself_is_flagged(row: Row, name: str, unsound: bool) -> None:
    rows = [row if row.idx == good.idx else good for good in GOOD[:3]]
    found = read(rows)
    assert flags(found)[name] == (unsound, (row.idx,))
    assert found.unsound == unsound
    assert found.accuracy(RADII)[1:] <= [1 / 3, 0.0, 0.0, 0.0]  # never more than the good rows have


def test_the_running_total_of_dds_is_known_as_such() -> None:
    found = read(row._replace(correct=total) for row, total in zip(GOOD, (1, 1, 1, 2), strict=True))
    [flag] = [flag for flag in found.flags if flag.name == "correct column"]
    assert (flag.unsound, flag.images) == (True, (1, 2, 3))
    assert "running total" in flag.says
    assert found.accuracy(RADII) == read(GOOD).accuracy(RADII)


def test_a_repeated_image_and_a_cut_line_are_flagged() -> None:
    assert flags(read([*GOOD, GOOD[0]]))["repeated"] == (True, (0,))
    assert flags(import_log(log_of(GOOD, unfinished=True), None, None, 0.001, RADII))["cut short"] == (False, ())


@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
def test_the_stored_logs_of_locuslab_are_beyond_their_defaults(sigma: float) -> None:
    """They end at 3.91 sigma; alpha = 0.001 and n = 100,000 end at 3.8115 sigma, alpha = 0.01 at 3.9105."""
    row = Row(7, 1, 1, f"{3.9105 * sigma:.3}", 1)
    rows = [*GOOD, row]
    found = read(rows, sigma, 100_000)
    assert flags(found)["beyond reach"] == (True, (7,))
    assert found.claims[-1].radius is None
    assert found.reach == pytest.approx(3.8115 * sigma, rel=1e-4)
    assert "beyond reach" not in flags(read(rows, sigma, 100_000, 0.01))
    assert "beyond reach" not in flags(read(rows))


@settings(deadline=None, max_examples=100)
@given(st.floats(0.01, 2), st.integers(10, 10**6), st.floats(1e-6, 0.4))
def test_the_largest_radius_of_the_procedure_is_never_beyond_reach(sigma: float, n: int, alpha: float) -> None:
    exact = sigma * stats.norm.ppf(math.exp(math.log(alpha) / n))
    if exact < 1e-80:
        return  # certifies nothing
    three_digits = Row(1, 1, 1, "1.23e-85", 1)
    assert "beyond reach" not in flags(read([Row(0, 1, 1, f"{exact:.3}", 1), three_digits], sigma, n, alpha))
    assert "beyond reach" in flags(read([Row(0, 1, 1, f"{1.02 * exact:.3}", 1), three_digits], sigma, n, alpha))


class Arrays:
    """A folder of runs, made as DensePure makes it: equal noise, different votes. `merged`: as its merge writes it."""

    def __init__(self, folder: Path, apart: int | None = None) -> None:
        """apart: a seed that draws other noise."""
        folder.mkdir()
        self.folder, rng = folder, np.random.default_rng(3)
        rows = []
        for idx, quality in ((0, 1.8), (20, 1.0), (40, 0.0), (60, 2.5)):
            counts = []
            for part, n in (("n0", N0), ("n", N)):
                noise = rng.normal(size=n)
                runs = []
                for seed in range(RUNS):
                    drawn = rng.normal(size=n) if seed == apart else noise
                    right = rng.uniform(size=n) < stats.norm.cdf(quality + 2 * drawn)
                    runs.append(np.where(right, 1, rng.integers(2, 4, n)))
                    np.save(folder / f"{SIGMA}-{idx}-{seed}-{part}_predictions.npy", runs[-1].astype(np.int64))
                voted = [max(list(sample), key=list(sample).count) for sample in np.array(runs).T]
                counts.append(np.bincount(voted, minlength=10))
            rows.append(merged_row(idx, int(counts[0].argmax()), int(counts[1][counts[0].argmax()])))
        self.merged = log_of(rows)

    def imported(self, merged: Log | None = None, labels: Log | None = None, alpha: float = 0.001) -> Imported:
        folder = open_folder(self.folder, None, None)
        return import_folder(folder, alpha, None, labels, merged, RADII, lambda images, total: images)


def merged_row(idx: int, candidate: int, agreeing: int) -> Row:
    bound = stats.beta.ppf(0.001, agreeing, N - agreeing + 1)
    predict, radius = (None, 0.0) if bound < 0.5 else (candidate, SIGMA * stats.norm.ppf(bound))
    return Row(idx, 1, predict, f"{radius:.3}", int(predict == 1))


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    return Arrays(tmp_path_factory.mktemp("runs") / "arrays")


def changed(log: Log, idx: int, **fields: int | str) -> Log:
    # Each test knows which field takes which of the two types.
    return replace(log, rows=tuple(row._replace(**fields) if row.idx == idx else row for row in log.rows))  # type: ignore[arg-type]


def test_arrays_give_what_the_official_merge_gives(arrays: Arrays) -> None:
    found = arrays.imported(arrays.merged)
    assert not found.unsound
    assert set(flags(found)) <= {"ties", "rounding"}
    for claim, row in zip(found.claims, arrays.merged.rows, strict=True):
        assert (claim.idx, claim.label) == (row.idx, row.label)
        assert claim.predict == row.predict
        assert f"{claim.radius or 0.0:.3}" == row.radius
    assert any(claim.predict is None for claim in found.claims)
    assert found.reach == FixedRule(n0=N0, n=N, alpha=0.001, sigma=SIGMA).reach()
    assert len(found.sources) == 4 * RUNS * 2 + 1


def test_without_labels_nothing_is_said_of_accuracy(arrays: Arrays) -> None:
    found = arrays.imported()
    assert found.accuracy(RADII) == found.accuracy_as_printed(RADII) == [None] * 5
    assert any(claim.radius for claim in found.claims)


def test_another_alpha_certifies_anew_and_compares_at_the_merges_own(arrays: Arrays) -> None:
    strict, usual = arrays.imported(arrays.merged, alpha=1e-6), arrays.imported(arrays.merged)
    assert not strict.unsound
    assert (strict.claims[0].radius or 0) < (usual.claims[0].radius or 0)


@pytest.mark.parametrize(
    ("fields", "name", "unsound"),
    [
        ({"predict": 2, "correct": 0}, "predict differs", True),
        ({"predict": None, "radius": "0.0", "correct": 0}, "predict differs", True),
        ({"radius": "0.6"}, "radius overstated", True),
        ({"radius": "0.01"}, "radius understated", False),
        ({"correct": 0}, "correct column", True),
    ],
)
def test_a_merged_file_of_other_arrays_is_flagged(
    arrays: Arrays, fields: dict[str, int | str], name: str, unsound: bool
) -> None:
    found = arrays.imported(changed(arrays.merged, 20, **fields))
    assert flags(found)[name] == (unsound, (20,))
    assert found.unsound == unsound


def test_labels_taken_from_another_row_are_flagged(arrays: Arrays) -> None:
    found = arrays.imported(changed(arrays.merged, 20, label=7, correct=0), labels=arrays.merged)
    assert flags(found)["label differs"] == (True, (20,))
    assert [claim.label for claim in found.claims] == [1, 1, 1, 1]


def test_images_of_one_side_alone_are_flagged(arrays: Arrays) -> None:
    other = replace(arrays.merged, rows=(*arrays.merged.rows[1:], Row(99, 1, 1, "0.2", 1)))
    found = arrays.imported(other, labels=arrays.merged)
    assert flags(found)["in one only"] == (False, (0, 99))
    assert found.accuracy_as_printed(RADII) == [None] * 5
    with pytest.raises(UsageError, match="log.tsv has no label of image 0: `labels`"):
        arrays.imported(other)


@pytest.mark.parametrize("apart", range(RUNS))
def test_a_run_of_other_noise_voids_all_radii(tmp_path: Path, apart: int) -> None:
    arrays = Arrays(tmp_path / "apart", apart)
    found = arrays.imported(arrays.merged)
    assert flags(found)["misaligned"] == (True, ())
    assert all(claim.predict is None and claim.radius is None for claim in found.claims)
    assert found.accuracy(RADII)[0] == 0


def folder_of(path: Path, runs: Sequence[Sequence[int]]) -> Imported:
    path.mkdir()
    for seed, labels in enumerate(runs):
        for part in ("n0", "n"):
            np.save(path / f"0.5-0-{seed}-{part}_predictions.npy", np.array(labels))
    return import_folder(open_folder(path, None, None), 0.001, None, None, None, RADII, lambda images, total: images)


def test_what_too_few_or_equal_labels_cannot_tell_is_said(tmp_path: Path) -> None:
    assert set(flags(folder_of(tmp_path / "same", [[1] * 40, [1] * 40]))) == {"alignment unknown"}
    assert set(flags(folder_of(tmp_path / "few", [[1, 2, 1], [2, 2, 1]]))) == {"alignment unknown", "ties"}
    varied = np.random.default_rng(0).integers(0, 2, 20_000).tolist()
    assert set(flags(folder_of(tmp_path / "twice", [varied, varied]))) == {"equal runs"}
    assert set(flags(folder_of(tmp_path / "one", [varied]))) == set()


def test_a_merged_file_takes_work_in_proportion_to_its_rows() -> None:
    """Every row has another answer than the arrays: each is looked up among those that have."""

    class Counted(int):
        compared = 0
        __hash__ = int.__hash__

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return int(self) == other

    certificate = FixedRule(n0=4, n=20, alpha=0.001, sigma=0.25).certify(np.array([0, 4]), np.array([0, 20]))
    images: list[int] = [Counted(idx) for idx in range(400)]
    merged = log_of(Row(idx, 0, 0, "0.1", 1) for idx in images)
    retaken = dict.fromkeys(images, Retaken(certificate, certificate, 0, False))
    (flag,) = flags_of_merged(merged, retaken, dict.fromkeys(images, 0))
    assert (flag.name, len(flag.images)) == ("predict differs", 400)
    assert Counted.compared < 10 * 400
