"""Label arrays against numpy's own reader, the official vote in plain Python, and shuffled runs."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.legacy.label_arrays import (
    Labels,
    Reader,
    SeedAgreement,
    open_folder,
    parsed_labels,
    retake,
    take_vote,
)
from densepure_rt.smoothing.voting import Ballot

QUICK = settings(deadline=None, max_examples=300)
INTEGERS = ("<i8", ">i8", "<i4", "<u2", "|u1", "|i1")
VOTES = st.integers(1, 6).flatmap(
    lambda runs: hnp.arrays(np.int64, st.tuples(st.just(runs), st.integers(1, 8)), elements=st.integers(0, 3))
)


def saved(array: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue()


def keep(folder: Path, idx: int, seed: int, n0: Sequence[int], n: Sequence[int], sigma: str = "0.25") -> None:
    folder.mkdir(exist_ok=True)
    for part, labels in (("n0", n0), ("n", n)):
        np.save(folder / f"{sigma}-{idx}-{seed}-{part}_predictions.npy", np.array(labels, np.int64))


def official_vote(labels: Labels) -> list[int]:
    """As results/merge_results.py takes it."""
    return [max(list(sample), key=list(sample).count) for sample in labels.T]


@QUICK
@given(st.lists(st.integers(0, 120), min_size=1, max_size=50), st.sampled_from(INTEGERS))
def test_labels_are_read_as_numpy_reads_them(labels: list[int], dtype: str) -> None:
    content = saved(np.array(labels, dtype))
    found = parsed_labels(content, "file")
    assert found.dtype == np.int64
    assert found.tolist() == np.load(io.BytesIO(content), allow_pickle=False).tolist() == labels


def damaged() -> st.SearchStrategy[bytes]:
    """An array file with some bytes replaced, and its end cut off."""

    def broken(change: tuple[int, bytes], end: int) -> bytes:
        place, other = change
        content = saved([1, 2, 3])
        return (content[:place] + other + content[place + len(other) :])[:end]

    return st.builds(broken, st.tuples(st.integers(0, 152), st.binary(max_size=4)), st.integers(0, 160))


@QUICK
@given(st.one_of(st.binary(max_size=300), damaged()))
@example(b"\x93NUMPY")
@example(saved([[1, 2]]))
@example(saved([1.0]))
@example(saved(np.array(["a"])))
@example(saved(3))
def test_arbitrary_bytes_are_an_error_or_what_numpy_reads(content: bytes) -> None:
    try:
        found = parsed_labels(content, "file")
    except (UsageError, CheckFailed):
        return
    assert found.tolist() == np.load(io.BytesIO(content), allow_pickle=False).tolist()


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            # Pickle takes any arguments; typeshed's object.__reduce__ is narrower.
            return (tmp_path.joinpath("sprung").touch, ())  # type: ignore[return-value]

    file = io.BytesIO()
    np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="no array of labels"):
        parsed_labels(file.getvalue(), "file")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (saved([1, 2])[:-1], UsageError, "cut short"),
        (saved([1, 2]) + b"\0", UsageError, "cut short"),
        (saved([1, 2]).replace(b"(2,)", b"(9,)"), UsageError, "cut short"),
        (saved([[1, 2]]), UsageError, "no array of labels"),
        (saved([True]), UsageError, "no array of labels"),
        (saved(np.array([], np.int64)), CheckFailed, "holds no labels"),
        (saved([3, -1]), CheckFailed, "holds label -1"),
        (saved([3, 10]), CheckFailed, "holds label 10: labels are from 0 to 9"),
        (saved(np.array([2**63], np.uint64)), CheckFailed, "9223372036854775808"),
    ],
)
def test_what_are_no_labels_is_named(content: bytes, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        parsed_labels(content, "file", classes=10)


@QUICK
@given(VOTES)
def test_the_vote_is_the_official_one_and_the_ballots(labels: Labels) -> None:
    vote = take_vote(labels)
    assert vote.winners.tolist() == official_vote(labels)
    for sample, winner, tied in zip(labels.T, vote.winners, vote.tied, strict=True):
        ballot = Ballot(len(sample))
        for label in sample:
            ballot.cast(int(label))
        assert winner == ballot.winner
        counts = list(Counter(sample.tolist()).values())
        assert tied == (counts.count(max(counts)) > 1)


def every_tie_rule(labels: Labels) -> set[tuple[int, ...]]:
    """The winners of all samples, under every way of deciding each tie."""
    choices = []
    for sample in labels.T.tolist():
        most = max(map(sample.count, sample))
        choices.append(sorted({label for label in sample if sample.count(label) == most}))
    return set(product(*choices))


@settings(deadline=None, max_examples=100)
@given(VOTES, VOTES)
def test_an_image_that_no_tie_rule_changes_is_known_as_such(selection: Labels, estimation: Labels) -> None:
    estimation = estimation[: len(selection)]
    found = retake(selection, estimation, 0.25, 0.2)
    answers = set()
    for selected in every_tie_rule(selection):
        candidate = int(np.bincount(selected).argmax())
        for estimated in every_tie_rule(estimation):
            answers.add((candidate, estimated.count(candidate)))
    assert found.by_tie_rule or len(answers) == 1
    n0, n = (official_vote(labels) for labels in (selection, estimation))
    candidate = int(np.bincount(n0).argmax())
    assert found.certificate.n_a == n.count(candidate)
    assert (candidate, found.certificate.n_a) in answers


@pytest.mark.parametrize("agreeing", [5100, 5200, 9000, 9990, 10_000])
def test_the_certificate_is_cohens(agreeing: int) -> None:
    """scipy's beta quantile, from which the merge's statsmodels takes the bound as well."""
    estimation = np.repeat([[3], [3], [3]], 10_000, axis=1)
    estimation[:, agreeing:] = 5
    found = retake(np.full((3, 100), 3), estimation, 0.5, 0.001)
    bound = stats.beta.ppf(0.001, agreeing, 10_000 - agreeing + 1)
    assert (found.certificate.n0, found.certificate.n, found.certificate.n_a) == (100, 10_000, agreeing)
    assert found.certificate.predict == (3 if bound > 0.5 else None)
    if found.certificate.radius is not None:
        exact = 0.5 * stats.norm.ppf(bound)
        assert exact * (1 - 1e-9) <= found.certificate.radius <= exact


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2], [0, 1, 1], [0, 1, 2, 3]])
def test_agreement_by_chance_is_that_of_all_orders(labels: list[int]) -> None:
    one, other = np.array(labels), np.array(labels[::-1])
    matches = [int((one == np.array(order)).sum()) for order in permutations(other)]
    agreement = SeedAgreement()
    agreement.add(one, other)
    assert agreement.chance == pytest.approx(np.mean(matches))
    assert agreement.variance == pytest.approx(np.var(matches))
    assert agreement.most == max(matches)
    assert agreement.equal == int((one == other).sum())


def test_a_folder_is_listed_by_image_and_seed(tmp_path: Path) -> None:
    for idx, seed in product((20, 3), (10, 2)):
        keep(tmp_path, idx, seed, [seed], [1, 2])
    (tmp_path / "notes.txt").write_text("other files are passed over")
    folder = open_folder(tmp_path, None, None)
    assert (folder.sigma, folder.images, folder.seeds) == (0.25, (3, 20), (2, 10))
    assert open_folder(tmp_path, 0.25, 1).seeds == (2,)
    reader = Reader(folder)
    assert reader.labels(3, "n0").tolist() == [[2], [10]]
    assert reader.labels(3, "n").tolist() == [[1, 2], [1, 2]]
    assert reader.sizes == {"n0": 1, "n": 2}
    name = "0.25-3-2-n_predictions.npy"
    assert reader.digests[name] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_what_a_folder_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no label arrays: expected \{sigma\}"):
        open_folder(tmp_path, None, None)
    with pytest.raises(EnvironmentFault, match="cannot read"):
        open_folder(tmp_path / "absent", None, None)
    keep(tmp_path, 0, 0, [1], [1])
    with pytest.raises(UsageError, match="of sigma 0.25: choose"):
        open_folder(tmp_path, 0.5, None)
    with pytest.raises(UsageError, match="`votes` is from 1 to the 1 seeds"):
        open_folder(tmp_path, None, 2)
    keep(tmp_path, 0, 0, [1], [1], sigma="0.5")
    with pytest.raises(UsageError, match=r"of sigma 0.25, 0.5: choose"):
        open_folder(tmp_path, None, None)
    keep(tmp_path, 0, 0, [1], [1], sigma="0.50")
    with pytest.raises(UsageError, match="mean the same"):
        open_folder(tmp_path, 0.5, None)
    keep(tmp_path, 1, 3, [1], [1])
    with pytest.raises(UsageError, match=r"lacks the n0 labels of image 0, seed 3 \(and 3 files more\)"):
        open_folder(tmp_path, 0.25, None)


def test_runs_of_other_lengths_do_not_align(tmp_path: Path) -> None:
    keep(tmp_path, 0, 0, [1], [1, 2])
    keep(tmp_path, 0, 1, [1], [1, 2, 3])
    with pytest.raises(CheckFailed, match="holds 3 labels where others hold 2"):
        Reader(open_folder(tmp_path, None, None)).labels(0, "n")


def test_more_labels_than_memory_is_for_are_refused_however_small_the_file_is_for_each(tmp_path: Path) -> None:
    content = saved(np.zeros(1000, np.uint8))
    assert len(parsed_labels(content, "file", most=1000)) == 1000
    with pytest.raises(UsageError, match=r"holds 1,000 labels, and 999 of a run can be voted here"):
        parsed_labels(content, "file", most=999)
    for seed in (1, 2):
        keep(tmp_path / "labels", 0, seed, [0], [0])
        np.save(tmp_path / f"labels/0.25-0-{seed}-n_predictions.npy", np.zeros(2**24 + 1, np.uint8))
    with pytest.raises(UsageError, match="16,777,216 of a run can be voted here"):
        Reader(open_folder(tmp_path / "labels", None, None)).labels(0, "n")
