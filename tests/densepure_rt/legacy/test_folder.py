from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.legacy.claims import Imported, import_folder
from densepure_rt.legacy.folder import ImportedRun, read_imported, write
from densepure_rt.legacy.label_arrays import open_folder
from densepure_rt.report.sources import read_results
from densepure_rt.runs.reader import Run
from tests.support.legacy import RADII, edited, label_arrays, log_imported
from tests.support.runs import Made, make_run


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    return label_arrays(tmp_path / "arrays")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    write(log_imported(tmp_path / "log.tsv", sigma=0.25, n=10_000), RADII, tmp_path / "kept")
    return tmp_path / "kept"


def same(read: ImportedRun, written: Imported) -> None:
    assert read.records == written.claims
    assert read.origin.flags == written.flags
    assert (read.origin.reach, read.origin.sources_sha256) == (written.reach, written.sources)
    assert read.origin.settings == written.settings


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    for name, sigma, n in (("known", 0.25, 10_000), ("unknown", None, None)):
        written = log_imported(tmp_path / "log.tsv", sigma=sigma, n=n)
        write(written, RADII, tmp_path / name)
        read = read_imported(tmp_path / name)
        same(read, written)
        assert read.origin_sha256 == hashlib.sha256((tmp_path / name / "imported.json").read_bytes()).hexdigest()


def test_label_arrays_are_read_as_they_were_written(tmp_path: Path) -> None:
    arrays = label_arrays(tmp_path / "arrays")
    written = import_folder(open_folder(arrays, None, None), 0.001, 10, None, None, RADII, lambda images, _: images)
    write(written, RADII, tmp_path / "kept")
    same(read_imported(tmp_path / "kept"), written)


def test_a_folder_is_a_run_or_imported_or_refused(kept: Path, tmp_path: Path) -> None:
    assert isinstance(read_results(make_run(tmp_path / "run", [Made(0.5)])), Run)
    assert isinstance(read_results(kept), ImportedRun)
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "log.tsv"):
        with pytest.raises(UsageError, match=r"holds no run and no imported results: .*manifest\.json.*imported\.json"):
            read_results(path)


def test_a_damaged_folder_is_one_clear_error(kept: Path) -> None:
    edited(lambda origin: origin.update(images=4), kept)
    with pytest.raises(CheckFailed, match=r"3 images where imported\.json counts 4"):
        read_results(kept)
    edited(lambda origin: origin.update(images=3, reach="far"), kept)
    with pytest.raises(CheckFailed, match=r"imported\.json is damaged, at reach"):
        read_results(kept)
    edited(lambda origin: origin.update(reach=None), kept)
    (kept / "results.jsonl").write_text('{"idx": 0}\n')
    with pytest.raises(CheckFailed, match="line 1 is damaged"):
        read_results(kept)
    (kept / "results.jsonl").unlink()
    with pytest.raises(UsageError, match=r"results\.jsonl is missing"):
        read_results(kept)
