from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densepure_rt.report.compare import AtRadius, Comparison, compare, mcnemar
from densepure_rt.runs.reader import read_run
from densepure_rt.runs.records import NamedFile
from tests.support.cli import Done, refused
from tests.support.runs import SEQUENTIAL, Made, make_run


def both(tmp_path: Path, a: Sequence[Made], b: Sequence[Made], radius: float | None = None) -> Comparison:
    return compare(read_run(make_run(tmp_path / "a", a)), read_run(make_run(tmp_path / "b", b)), radius)


# McNemar


@pytest.mark.parametrize("discordant", range(11))
def test_mcnemar_is_the_share_of_coin_tosses_that_are_no_less_uneven(discordant: int) -> None:
    """Against counting all 2^discordant outcomes."""
    tosses = [sum(outcome) for outcome in itertools.product((0, 1), repeat=discordant)]
    for heads in range(discordant + 1):
        as_uneven = sum(abs(2 * toss - discordant) >= abs(2 * heads - discordant) for toss in tosses)
        assert mcnemar(heads, discordant - heads) == pytest.approx(as_uneven / len(tosses))


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_twice_the_smaller_tail(a: int, b: int) -> None:
    tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1)) / 2 ** (a + b)
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


@pytest.mark.parametrize("level", [0.05, 0.01])
@pytest.mark.parametrize("discordant", [0, 1, 5, 6, 11, 60])
def test_a_run_that_is_no_worse_is_called_worse_at_one_radius_in_half_the_level_at_most(
    discordant: int, level: float
) -> None:
    chance = Fraction(0)
    for only_a in range(discordant + 1):
        only_b = discordant - only_a
        found = AtRadius(0.5, 0.0, 0.0, only_a, only_b, mcnemar(only_a, only_b))
        chance += Fraction(found.b_is_worse(level) * math.comb(discordant, only_a), 2**discordant)
    assert chance <= Fraction(level) / 2


# pairing


def test_images_are_paired_by_their_pixels_and_not_by_their_numbers(tmp_path: Path) -> None:
    a = [Made(0.3, pixels="x"), Made(0.4, pixels="y"), Made(0.5, pixels="only in a")]
    b = [Made(0.4, pixels="y"), Made(0.1, pixels="x"), Made(0.9, pixels="p"), Made(0.9, pixels="q")]
    found = both(tmp_path, a, b)
    assert (found.pairs, found.unpaired_a, found.unpaired_b, found.same) == (2, 1, 2, 1)
    (lost,) = found.lost
    assert (lost.idx_a, lost.idx_b, lost.a, lost.b) == (0, 1, 0.3, 0.1)
    assert not found.gained


def test_equal_images_count_once(tmp_path: Path) -> None:
    """They share their noise: a second one is no further evidence."""
    found = both(tmp_path, [Made(0.3, pixels="x")] * 9, [Made(None, pixels="x")] * 9)
    assert (found.pairs, found.radii[0].only_a, found.radii[0].p_value) == (1, 1, 1.0)


def test_nothing_in_common_and_two_labels_are_refused(here: Callable[..., Done], tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", [Made(0.3, pixels="x")]), make_run(tmp_path / "b", [Made(0.3, pixels="y")])
    c = make_run(tmp_path / "c", [Made(0.3, pixels="x", label=4)])
    empty = make_run(tmp_path / "empty", [], asked=3)
    refused(here("compare", a, b), 2, "no image in common", "SHA-256")
    refused(here("compare", a, empty), 2, "no image in common")
    refused(here("compare", a, c), 2, "label 3", "4")
    refused(here("compare", a, tmp_path), 2, "holds no run")


# radii


def test_accuracies_and_changes_are_those_of_the_pairs(tmp_path: Path) -> None:
    a = [Made(0.6), Made(0.3), Made(None), Made(0.3, predict=1), Made(0.8), Made(0.0)]
    b = [Made(0.3), Made(0.3), Made(0.5), Made(0.4), Made(None), Made(0.1)]
    found = both(tmp_path, a, b)
    assert [each.radius for each in found.radii] == [0.0, 0.25, 0.5, 0.75]
    assert [each.a for each in found.radii] == pytest.approx([4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert [each.b for each in found.radii] == pytest.approx([5 / 6, 4 / 6, 1 / 6, 0])
    assert [(each.only_a, each.only_b) for each in found.radii] == [(1, 2), (1, 2), (2, 1), (1, 0)]
    assert [change.idx_a for change in found.lost] == [4, 0]  # a lost certificate is worse than a smaller one
    assert [change.idx_a for change in found.gained] == [2, 3, 5]


def test_only_radii_that_both_were_asked_count(tmp_path: Path) -> None:
    """A measured radius is rounded down to the other run's grid: between its radii that one knows nothing."""
    a = make_run(tmp_path / "a", [Made(0.49), Made(0.7), Made(0.2)])
    b = make_run(tmp_path / "b", [Made(0.25), Made(0.25), Made(0.0)], rule=SEQUENTIAL)
    found = compare(read_run(a), read_run(b))
    assert [each.radius for each in found.radii] == [0.0, 0.25, 0.5]
    assert [(change.idx_a, change.a, change.b) for change in found.lost] == [(1, 0.5, 0.25)]


def test_a_radius_that_was_not_asked_is_refused(here: Callable[..., Done], tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", [Made(0.5)], rule=SEQUENTIAL)
    b = make_run(tmp_path / "b", [Made(0.5)], rule=replace(SEQUENTIAL, radii=(0.1, 0.5)))
    c = make_run(tmp_path / "c", [Made(0.5)], rule=replace(SEQUENTIAL, radii=(0.1, 0.2)))
    assert json.loads(here("compare", a, b, "--radius", 0.5, "--json").stdout)["radii"][0]["a"] == 1.0
    refused(here("compare", a, b, "--radius", 0.25), 2, "the radius 0.25", "both know 0.5")
    refused(here("compare", a, a, "--radius", "nan"), 2, "the radius nan")
    refused(here("compare", a, c), 2, "no radius in common")


def test_without_labels_a_change_of_class_is_said(tmp_path: Path) -> None:
    found = both(tmp_path, [Made(0.3, label=None)], [Made(0.3, label=None, predict=1)])
    assert (found.labelled, found.other_class, found.same) == (False, 1, 1)


def test_what_differs_is_named(here: Callable[..., Done], tmp_path: Path) -> None:
    other = NamedFile("int8.onnx", "f" * 64, None)
    a, b = make_run(tmp_path / "a", [Made(0.5)]), make_run(tmp_path / "b", [Made(0.5)], engine=other, precision="int8")
    printed = here("compare", a, b).stdout
    assert '"fp32" in A, "int8" in B' in printed
    assert "engine.sha256" in printed
    assert "sigma" not in printed
    assert "one identity" in here("compare", a, a).stdout


# the gate


def gate(tmp_path: Path, lost: int, gained: int) -> tuple[Path, Path]:
    a = [Made(0.3)] * lost + [Made(None)] * gained + [Made(0.3)] * 5
    b = [Made(None)] * lost + [Made(0.3)] * gained + [Made(0.3)] * 5
    return make_run(tmp_path / "a", a), make_run(tmp_path / "b", b)


def test_b_that_is_significantly_worse_fails(here: Callable[..., Done], tmp_path: Path) -> None:
    """Six images lost and none gained have p = 2 / 64."""
    a, b = gate(tmp_path, lost=6, gained=0)
    done = here("compare", a, b)
    assert done.returncode == 1
    assert (
        done.stderr == f"error: {b} certifies significantly fewer images than {a} at radius 0 (p = 0.032), 0.25 "
        "(p = 0.032), level 0.05; over 4 comparisons a false alarm has probability 0.1 at most\n"
    )
    assert "images that lost radius" in done.stdout
    assert here("compare", a, b, "--level", 0.03).returncode == 0
    assert here("compare", b, a).returncode == 0  # better is not worse
    assert here("compare", a, b, "--radius", 0.5).returncode == 0  # none had it


def test_a_loss_that_may_be_chance_passes_unless_it_is_capped(here: Callable[..., Done], tmp_path: Path) -> None:
    a, b = gate(tmp_path, lost=5, gained=1)
    assert here("compare", a, b).returncode == 0
    assert here("compare", a, b, "--max-lost", 5).returncode == 0
    done = here("compare", a, b, "--max-lost", 4)
    assert done.returncode == 1
    assert "5 images lost radius" in done.stderr


def test_the_json_says_the_same(here: Callable[..., Done], tmp_path: Path) -> None:
    a, b = gate(tmp_path, lost=6, gained=0)
    done = here("compare", a, b, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert found["worse_at"] == [0.0, 0.25]
    assert found["radii"][0] == {
        "radius": 0.0,
        "a": 1.0,
        "b": pytest.approx(5 / 11),
        "only_a": 6,
        "only_b": 0,
        "p_value": pytest.approx(2 / 64),
    }
    assert [change["idx_a"] for change in found["lost"]] == [0, 1, 2, 3, 4, 5]
    assert found["differs"] == []


def test_a_level_is_a_probability(here: Callable[..., Done], tmp_path: Path) -> None:
    a, b = gate(tmp_path, lost=1, gained=0)
    refused(here("compare", a, b, "--level", 1.5), 2, "--level")


def test_of_images_without_labels_is_said_so_and_none_counts_as_wrong(
    here: Callable[..., Done], tmp_path: Path
) -> None:
    a = make_run(tmp_path / "a", [Made(0.5, label=None), Made(0.5, label=None)])
    b = make_run(tmp_path / "b", [Made(0.5, label=None), Made(0.25, label=None)])
    done = here("compare", a, b)
    assert done.returncode == 0, done.stderr
    assert "share certified" in done.stdout
    (row,) = (line.split() for line in done.stdout.splitlines() if "no label" in line)
    assert row == ["1", "no", "label", "0.500", "0.250"]
    out = tmp_path / "page.html"
    assert here("report", a, "--out", out).returncode == 0
    assert "2 certified" in (text := out.read_text())
    assert "no label" in text
    assert "which is not its label" not in text
    assert "2 certified for another class" not in text
