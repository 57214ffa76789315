"""Every field of a run folder is changed in turn: each change must be found."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from densepure_rt.images.datasets import ImageSet, open_images
from densepure_rt.runs.audit import Finding, audit
from densepure_rt.runs.certify import RunRequest, certify_images
from densepure_rt.runs.ledger import packed, unpacked
from densepure_rt.runs.merge import merge
from densepure_rt.runs.secret import reveal
from densepure_rt.runs.shards import Shard
from densepure_rt.smoothing.classifier import load
from densepure_rt.smoothing.settings import Budget, Settings
from tests.support.runs import OLD_RUN

SHAPE, NAMES = (1, 28, 28), [str(label) for label in range(10)]
SEQUENTIAL = Settings(sigma=0.1, steps=0, n=200, alpha=0.01, radii=(0.0, 0.05, 0.1, 0.6))
FIXED = Settings(sigma=0.1, steps=0, n0=5, n=40, alpha=0.01, method="fixed")
SECRET = bytes(range(32))
RADIUS = Settings(sigma=0.1, steps=0, n=200, alpha=0.01, method="radius", radius_loss=0.2)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return open_images(None, SHAPE, NAMES).select(60, 5)


def certified(
    out: Path, images: ImageSet, settings: Settings, budget: Budget | None = None, shard: Shard | None = None
) -> Path:
    with load(secret=SECRET, batch=16, threads=1) as classifier:
        certify_images(classifier, RunRequest(images, settings, out, None, budget or Budget(), shard))
    return out


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, images: ImageSet) -> Path:
    return certified(tmp_path_factory.mktemp("sound") / "run", images, SEQUENTIAL)


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "run"))


def failed(findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings if not finding.holds]


@pytest.mark.parametrize("settings", [SEQUENTIAL, FIXED, RADIUS], ids=lambda settings: settings.method)
def test_a_run_that_was_left_alone_holds(tmp_path: Path, images: ImageSet, settings: Settings) -> None:
    findings = audit(certified(tmp_path / "run", images, settings), images)
    assert failed(findings) == []
    assert {
        "identity",
        "derived values",
        "arithmetic",
        "secret",
        "ledger",
        "records",
        "results",
        "summary",
        "seal",
        "images",
    } == {finding.what for finding in findings}


def test_a_run_of_before_the_arithmetic_was_recorded_holds_and_that_is_said() -> None:
    findings = {finding.what: finding for finding in audit(OLD_RUN)}
    assert all(finding.holds for finding in findings.values())
    assert findings["arithmetic"].said.startswith("not recorded by this old run")


@pytest.mark.parametrize("settings", [SEQUENTIAL, FIXED], ids=lambda settings: settings.method)
def test_images_that_time_cut_short_hold_too(tmp_path: Path, images: ImageSet, settings: Settings) -> None:
    out = certified(tmp_path / "run", images, settings, Budget(image=1e-6))
    assert any(json.loads(line)["stopped"] for line in (out / "results.jsonl").read_text().splitlines())
    assert failed(audit(out)) == []


def test_a_revealed_secret_holds(copy: Path) -> None:
    reveal(copy)
    assert failed(audit(copy)) == []


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list) and value:
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))
    else:
        yield path


def other(value: Any) -> Any:
    """A value of the same type that is not the same: the last digit of a number, another letter of a word."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return float(f"{value:.12g}") * (1 + 1e-9) + 1e-12
    if isinstance(value, str):
        return ("0" if not value.startswith("0") else "1") + value[1:]
    return 1 if value is None else None


def changed(document: Any, path: tuple[Any, ...]) -> Any:
    copied = json.loads(json.dumps(document))
    holder = copied
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = other(holder[path[-1]])
    return copied


@pytest.mark.parametrize("idx", [0, 10**6])
def test_an_image_that_is_done_and_one_too_many_cannot_have_failed(copy: Path, idx: int) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    idx = json.loads((copy / "results.jsonl").read_text().splitlines()[0])["idx"] if idx == 0 else idx
    (copy / "summary.json").write_text(json.dumps(summary | {"failed": [idx]}, indent=2, ensure_ascii=False) + "\n")
    (finding,) = (finding for finding in audit(copy) if finding.what == "summary")
    assert any("failed names 1 images" in fault for fault in finding.faults)


@pytest.mark.parametrize("name", ["manifest.json", "summary.json", "seal.json"])
def test_every_field_of_a_file_that_is_changed_is_found(copy: Path, name: str) -> None:
    document = json.loads((copy / name).read_text())
    paths = list(leaves(document))
    assert len(paths) >= 6
    for path in paths:
        (copy / name).write_text(json.dumps(changed(document, path), indent=2) + "\n")
        assert failed(audit(copy)), path


@pytest.mark.parametrize("name", ["results.jsonl", "timing.jsonl"])
def test_every_field_of_a_line_that_is_changed_is_found(copy: Path, name: str) -> None:
    lines = (copy / name).read_text().splitlines(keepends=True)
    document = json.loads(lines[2])
    for path in leaves(document):
        (copy / name).write_text("".join([*lines[:2], json.dumps(changed(document, path)) + "\n", *lines[3:]]))
        assert {"results", "seal"} <= set(failed(audit(copy))), path


def test_every_cell_of_the_table_that_is_changed_is_found(copy: Path) -> None:
    table = copy / "results.tsv"
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            edited = [*rows[:number], [*row[:column], other(cell), *row[column + 1 :]], *rows[number + 1 :]]
            table.write_text("".join("\t".join(each) + "\n" for each in edited))
            assert "results" in failed(audit(copy)), (number, column)


def resealed(folder: Path) -> None:
    """As a forger would who knows of the seal."""
    from densepure_rt.runs.ledger import Ledger
    from densepure_rt.runs.seal import seal

    with Ledger(folder / "ledger.sqlite") as ledger:
        seal(folder, ledger)


def edit_ledger(folder: Path, statement: str, *values: Any) -> None:
    with sqlite3.connect(folder / "ledger.sqlite") as database:
        database.execute(statement, values)
    database.close()


def radius_raised(line: str) -> str:
    record = json.loads(line)
    return json.dumps(record | {"radius": (record["radius"] or 0.0) + 0.001}) + "\n"


EDITS: list[tuple[str, Callable[[Path, dict[str, Any]], None], str]] = [
    (
        "a label",
        lambda folder, row: edit_ledger(
            folder, "update images set labels = ? where place = 1", packed([*unpacked(row["labels"])[:-1], 9])
        ),
        "records",
    ),
    (
        "a label that is left out",
        lambda folder, row: edit_ledger(
            folder, "update images set labels = ? where place = 1", packed(unpacked(row["labels"])[:-1])
        ),
        "records",
    ),
    (
        "a label more",
        lambda folder, row: edit_ledger(
            folder, "update images set labels = ? where place = 1", packed([*unpacked(row["labels"]), 0])
        ),
        "records",
    ),
    (
        "a radius",
        lambda folder, row: edit_ledger(
            folder, "update images set record = ? where place = 1", radius_raised(row["record"])
        ),
        "records",
    ),
    ("a place", lambda folder, row: edit_ledger(folder, "update images set place = 17 where place = 4"), "records"),
    ("an image", lambda folder, row: edit_ledger(folder, "update images set idx = 5 where place = 1"), "records"),
    ("whose it is", lambda folder, row: edit_ledger(folder, "update run set value = 'x'"), "ledger"),
]


@pytest.mark.parametrize(("edit", "check"), [edit[1:] for edit in EDITS], ids=[edit[0] for edit in EDITS])
def test_what_is_changed_in_the_ledger_is_found_even_when_it_is_sealed_anew(
    copy: Path, edit: Callable[[Path, dict[str, Any]], None], check: str
) -> None:
    database = sqlite3.connect(copy / "ledger.sqlite")
    database.row_factory = sqlite3.Row
    row = dict(database.execute("select * from images where place = 1").fetchone())
    database.close()
    edit(copy, row)
    assert {check, "seal"} <= set(failed(audit(copy)))
    resealed(copy)
    assert check in failed(audit(copy))


@pytest.mark.parametrize("name", ["manifest.json", "ledger.sqlite", "results.tsv", "summary.json", "seal.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\x00\xff" * 40])
def test_a_file_of_garbage_is_a_finding_and_no_traceback(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    assert failed(audit(copy))


def test_a_missing_file_is_found(copy: Path) -> None:
    for name in ("seal.json", "results.jsonl", "timing.jsonl", "results.tsv"):
        kept = (copy / name).read_bytes()
        (copy / name).unlink()
        assert failed(audit(copy)), name
        (copy / name).write_bytes(kept)
    assert failed(audit(copy)) == []


def test_other_images_are_found(copy: Path) -> None:
    assert failed(audit(copy, open_images(None, SHAPE, NAMES).select(60, 4))) == ["images"]


# shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, images: ImageSet) -> Path:
    """Shards 1/2 and 2/2 of five images in `1` and `2`, merged in `merged`."""
    folder = tmp_path_factory.mktemp("shards")
    parts = [certified(folder / str(i), images, SEQUENTIAL, shard=Shard(i, 2)) for i in (1, 2)]
    merge(parts, folder / "merged")
    return folder


@pytest.fixture
def parts(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def test_shards_and_what_is_merged_of_them_hold(shards: Path, images: ImageSet) -> None:
    for name in ("1", "2", "merged"):
        findings = {finding.what: finding for finding in audit(shards / name, images)}
        assert failed(list(findings.values())) == []
        assert {"shard", "images"} <= findings.keys()


@pytest.mark.parametrize("name", ["2", "merged"])
def test_every_field_of_the_manifest_of_shards_that_is_changed_is_found(parts: Path, name: str) -> None:
    document = json.loads((parts / name / "manifest.json").read_text())
    paths = [("provenance", *path) for path in leaves(document["provenance"])]
    assert ("provenance", "shard") in paths
    for path in paths:
        (parts / name / "manifest.json").write_text(json.dumps(changed(document, path), indent=2) + "\n")
        assert failed(audit(parts / name)), path


@pytest.mark.parametrize(
    ("name", "claim", "check"),
    [
        ("1", {"shard": "2/2"}, "records"),
        ("1", {"shard": "1/3"}, "records"),
        ("1", {"shard": "1/1"}, "summary"),
        ("1", {"shard": None}, "summary"),
        ("1", {"shard": "1/4"}, "records"),
        ("1", {"merged_from": []}, "shard"),
        ("merged", {"shard": "1/2"}, "records"),
        ("merged", {"shard": "1/1"}, "shard"),
        ("merged", {"merged_from": []}, "shard"),
    ],
)
def test_a_claim_that_does_not_fit_the_images_is_found_even_when_it_is_sealed_anew(
    parts: Path, name: str, claim: dict[str, Any], check: str
) -> None:
    document = json.loads((parts / name / "manifest.json").read_text())
    document["provenance"] |= claim
    (parts / name / "manifest.json").write_text(json.dumps(document))
    resealed(parts / name)
    assert check in failed(audit(parts / name))


@pytest.mark.parametrize("shards_of", [["1/2"], ["1/2", "1/2"], ["1/2", "2/3", "2/2"], ["1/2", "2/4", "3/4"]])
def test_shards_that_do_not_hold_each_image_once_make_no_run(parts: Path, shards_of: list[str]) -> None:
    document = json.loads((parts / "merged" / "manifest.json").read_text())
    one = document["provenance"]["merged_from"][0]
    document["provenance"]["merged_from"] = [one | {"shard": shard} for shard in shards_of]
    (parts / "merged" / "manifest.json").write_text(json.dumps(document))
    resealed(parts / "merged")
    assert failed(audit(parts / "merged")) == ["shard"]


def test_images_of_a_shard_that_changed_places_are_found_with_the_images(parts: Path, images: ImageSet) -> None:
    edit_ledger(parts / "1", "update images set place = 10 where place = 0")
    edit_ledger(parts / "1", "update images set place = 0 where place = 2")
    edit_ledger(parts / "1", "update images set place = 2 where place = 10")
    resealed(parts / "1")
    assert {"results", "images"} <= set(failed(audit(parts / "1", images)))
