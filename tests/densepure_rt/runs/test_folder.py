from __future__ import annotations

import csv
import datetime
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.keys import store_key, stored_key
from densepure_rt.runs.folder import RunFolder
from densepure_rt.runs.layout import read_manifest, record_of, tsv_line
from densepure_rt.runs.ledger import Ledger
from densepure_rt.runs.records import (
    ArithmeticIdentity,
    ImageRecord,
    ImagesIdentity,
    Manifest,
    Provenance,
    Summary,
)
from densepure_rt.runs.secret import agreed_secret, reveal, secret_to_go_on
from densepure_rt.runtime.reverse import Outcome
from densepure_rt.smoothing.classifier import Certified
from tests.support.runs import OLD_RUN, SECRET, manifest, result

ROOT = Path(__file__).resolve().parents[3]
HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"  # locuslab/smoothing, code/certify.py
RESULTS = ("results.tsv", "results.jsonl", "timing.jsonl")


def record(result: Certified) -> ImageRecord:
    return record_of(result.image.idx, "e" * 64, result.image.label, result.certificate)


def printed(result: Certified) -> dict[str, str]:
    """The columns of its line in results.tsv."""
    return columns(tsv_line(record(result), result.cost.seconds))


def columns(line: str) -> dict[str, str]:
    (row,) = csv.DictReader([HEADER, line], delimiter="\t")
    return row


def finished(path: Path) -> None:
    """A whole run of four images, sealed."""
    with RunFolder(path, manifest(SECRET), SECRET) as folder:
        for idx in range(4):
            folder.add(result(idx=idx))
        folder.finish(replace(SUMMARY, done=4))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_folder_holds_the_manifest_and_the_header_before_any_result(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a" / "run", manifest(SECRET), SECRET):
        found = contents(tmp_path / "a" / "run")
    assert {"manifest.json", "ledger.sqlite", "secret.key", *RESULTS} <= set(found)
    assert json.loads(found["manifest.json"])["identity"]["sigma"] == 0.5
    assert found["results.tsv"].decode() == HEADER
    assert found["results.jsonl"] == found["timing.jsonl"] == b""


def test_each_result_is_on_disk_as_soon_as_it_is_added(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", manifest(), None) as folder:
        for done in (1, 2, 3):
            folder.add(result(idx=done))
            lines = [(tmp_path / "run" / name).read_text().splitlines() for name in RESULTS]
            assert [len(found) for found in lines] == [done + 1, done, done]


def test_the_key_can_be_read_by_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)  # the most generous: the mode must not come from the umask
    try:
        RunFolder(tmp_path / "run", manifest(SECRET), SECRET).close()
    finally:
        os.umask(before)
    key = tmp_path / "run" / "secret.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert bytes.fromhex(key.read_text()) == SECRET
    assert secret_to_go_on(tmp_path / "run") == SECRET


def test_without_a_secret_there_is_no_key(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", manifest(), None).close()
    assert not (tmp_path / "run" / "secret.key").exists()
    assert secret_to_go_on(tmp_path / "run") is None
    assert secret_to_go_on(tmp_path / "nowhere") is None


def test_a_folder_and_a_key_file_must_agree_on_the_secret(tmp_path: Path) -> None:
    run, key, other = tmp_path / "run", tmp_path / "noise.key", tmp_path / "other.key"
    assert agreed_secret(None, None) is agreed_secret(run, None) is None
    made = agreed_secret(run, key)
    assert made == stored_key(key) == agreed_secret(None, key)
    RunFolder(run, manifest(SECRET), SECRET).close()
    assert agreed_secret(run, None) == SECRET
    with pytest.raises(UsageError, match=r"noise\.key holds another secret"):
        agreed_secret(run, key)
    with pytest.raises(UsageError, match=r"other\.key is not there"):
        agreed_secret(run, other)
    assert not other.exists()
    store_key(other, SECRET)
    assert agreed_secret(run, other) == SECRET


def test_a_folder_of_another_shard_is_refused(tmp_path: Path) -> None:
    def of(shard: str | None) -> Manifest:
        return replace(manifest(), provenance=replace(manifest().provenance, shard=shard))

    with RunFolder(tmp_path / "run", of("1/2"), None) as folder:
        folder.add(result(), 0)
    for asked, words in (("2/2", "shard 2/2 was"), (None, "the whole run was")):
        with pytest.raises(UsageError, match=f"already holds shard 1/2, and {words} asked for"):
            RunFolder(tmp_path / "run", of(asked), None)
    with RunFolder(tmp_path / "run", of("1/2"), None) as folder:
        assert len(folder.done) == 1


def test_an_empty_folder_is_used_and_other_files_in_it_are_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path, manifest(), None).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "results.tsv").read_text() == HEADER


def test_a_run_goes_on_where_it_was_cut_short(tmp_path: Path) -> None:
    """Half a line in every results file, as a killed process leaves it, and a label of the image that was under way."""
    with RunFolder(tmp_path, manifest(), None) as folder:
        for idx in (7, 3):
            folder.add(result(idx=idx))
        folder.ledger.add(9, Outcome(0, 0, 3, 1, 1))  # as one that is under way
    whole = contents(tmp_path)
    for name in RESULTS:
        (tmp_path / name).write_bytes(whole[name][:-5])
    with RunFolder(tmp_path, manifest(), None) as again:
        assert [record.idx for record, _ in again.done] == [7, 3]
        assert {name: (tmp_path / name).read_bytes() for name in RESULTS} == {name: whole[name] for name in RESULTS}
        assert again.ledger.saved(9).labels.tolist() == [3]
        again.add(result(idx=8))
    assert [json.loads(line)["idx"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == [7, 3, 8]


def test_a_run_of_another_identity_is_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    with RunFolder(tmp_path, manifest(), None) as folder:
        folder.add(result())
    before = contents(tmp_path) | {"ledger.sqlite": b""}  # whose pages may differ
    other = manifest(sigma=0.25, images=ImagesIdentity(5, "b" * 64))
    with pytest.raises(
        UsageError, match=r"another identity \(`sigma` 0.5 there, 0.25 now; images.count: 4 there, 5 now\)"
    ):
        RunFolder(tmp_path, other, None)
    assert contents(tmp_path) | {"ledger.sqlite": b""} == before


def test_a_run_does_not_go_on_where_the_engines_compute_otherwise(tmp_path: Path) -> None:
    with RunFolder(tmp_path, manifest(), None) as folder:
        folder.add(result())
    other = manifest(arithmetic=ArithmeticIdentity("e" * 64, instruction_sets=("avx2",)))
    with pytest.raises(UsageError, match=r"arithmetic.fingerprint: .f+\.\.\. there, .e+\.\.\. now; arithmetic.instr"):
        RunFolder(tmp_path, other, None)


def test_a_run_that_does_not_say_how_its_machine_computed_is_read_and_not_gone_on_with(tmp_path: Path) -> None:
    shutil.copytree(OLD_RUN, tmp_path / "run")
    there = read_manifest(tmp_path / "run")
    assert there.identity.arithmetic is None
    assert there.identity.sha256 == there.identity_sha256  # as it was hashed then
    for now in (there, replace(there, identity=replace(there.identity, arithmetic=ArithmeticIdentity("f" * 64)))):
        with pytest.raises(UsageError, match="does not say how its machine computed.*new folder with `out`"):
            RunFolder(tmp_path / "run", now, None)
    assert contents(tmp_path / "run") | {"ledger.sqlite": b""} == contents(OLD_RUN) | {"ledger.sqlite": b""}


def test_what_is_no_part_of_the_identity_may_differ(tmp_path: Path) -> None:
    with RunFolder(tmp_path, manifest(), None) as folder:
        folder.add(result())
    elsewhere = replace(
        manifest(), provenance=Provenance(("x",), {"threads": 2}, "then", "there", "four", "3", "L", {}, {}, None)
    )
    with RunFolder(tmp_path, elsewhere, None) as folder:
        assert folder.manifest.provenance.host == "here"


@pytest.mark.parametrize("left", ["results.tsv", "results.jsonl", "timing.jsonl", "ledger.sqlite"])
def test_what_no_run_can_go_on_from_is_never_written_over(tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_text("precious")
    said = "damaged" if left == "ledger.sqlite" else f"holds {left} of a run that cannot go on.*`out`"
    with pytest.raises((UsageError, CheckFailed), match=said):
        RunFolder(tmp_path, manifest(), None)
    assert contents(tmp_path) == {left: b"precious"}


def test_one_process_at_a_time_works_on_a_run(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from densepure_rt.runs.ledger import Ledger\n"
        "try: Ledger(Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    with RunFolder(tmp_path, manifest(), None):
        command = [sys.executable, "-c", code, str(tmp_path / "ledger.sqlite")]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=True)
    assert done.stdout.startswith("EnvironmentFault")
    assert "in use by another process" in done.stdout


SUMMARY = Summary(1, 4, False, (0.0,), (1.0,), 0, {}, 24.0, 7, 0, 0)


def test_a_complete_run_is_sealed_and_a_run_that_goes_on_is_not(tmp_path: Path) -> None:
    with RunFolder(tmp_path, manifest(), None) as folder:
        folder.add(result(idx=0))
        folder.finish(SUMMARY)
        assert not (tmp_path / "seal.json").exists()
        for idx in (1, 2, 3):
            folder.add(result(idx=idx))
        folder.finish(replace(SUMMARY, done=4))
    sealed = json.loads((tmp_path / "seal.json").read_text())["sha256"]
    assert set(sealed) == {"manifest.json", "ledger.sqlite", "summary.json", *RESULTS}
    for name in set(sealed) - {"ledger.sqlite"}:
        assert sealed[name] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    RunFolder(tmp_path, manifest(), None).close()
    assert not (tmp_path / "seal.json").exists()


def removed(ledger: Path) -> None:
    for file in ledger.parent.glob(f"{ledger.name}*"):
        file.unlink()


def replaced_by_another(ledger: Path) -> None:
    removed(ledger)
    Ledger(ledger).close()


def replaced_by_a_copy(ledger: Path) -> None:
    shutil.copy(ledger, ledger.with_name("copy"))
    ledger.with_name("copy").replace(ledger)


def emptied(ledger: Path) -> None:
    with ledger.open("r+b") as file:
        file.truncate(0)


def overwritten(ledger: Path) -> None:
    with ledger.open("r+b") as file:
        file.write(bytes(ledger.stat().st_size))


@pytest.mark.parametrize("change", [removed, replaced_by_another, replaced_by_a_copy, emptied, overwritten])
def test_a_run_whose_ledger_is_not_the_file_that_is_there_does_not_end_well(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    with RunFolder(tmp_path / "run", manifest(), None) as folder:
        for idx in range(4):
            folder.add(result(idx=idx))
        if change in (emptied, overwritten):
            folder.ledger.settle()  # else all is in the log that SQLite keeps beside it, and is written again
        change(tmp_path / "run" / "ledger.sqlite")
        with pytest.raises((CheckFailed, EnvironmentFault), match="ledger.sqlite"):
            folder.finish(replace(SUMMARY, done=4))
        assert not (tmp_path / "run" / "seal.json").exists()
        assert not (tmp_path / "run" / "summary.json").exists()


def test_a_revealed_secret_is_in_the_manifest_and_draws_no_more_noise(tmp_path: Path) -> None:
    RunFolder(tmp_path, manifest(SECRET), SECRET).close()
    assert reveal(tmp_path) == reveal(tmp_path) == SECRET.hex()  # twice is once
    assert json.loads((tmp_path / "manifest.json").read_text())["provenance"]["revealed_secret"] == SECRET.hex()
    assert not (tmp_path / "secret.key").exists()
    with pytest.raises(UsageError, match="has been revealed"):
        secret_to_go_on(tmp_path)


@pytest.mark.parametrize("killed_after", ["the key has its new name", "the manifest is written"])
def test_a_reveal_that_was_cut_short_is_completed_by_another(tmp_path: Path, killed_after: str) -> None:
    finished(tmp_path)
    sealed = (tmp_path / "seal.json").read_bytes()
    before = (tmp_path / "manifest.json").read_bytes()
    reveal(tmp_path)
    (tmp_path / "seal.json").write_bytes(sealed)
    if killed_after == "the key has its new name":
        (tmp_path / "manifest.json").write_bytes(before)
    assert reveal(tmp_path) == SECRET.hex()
    hashes = json.loads((tmp_path / "seal.json").read_text())["sha256"]
    assert hashes["manifest.json"] == hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()


def test_what_was_changed_after_the_seal_is_not_sealed_again(tmp_path: Path) -> None:
    finished(tmp_path)
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"here"', '"elsewhere"'))
    for again in (lambda: reveal(tmp_path), lambda: RunFolder(tmp_path, manifest(SECRET), SECRET)):
        with pytest.raises(CheckFailed, match="manifest.json in .* was changed after the run was sealed"):
            again()


def test_a_ledger_of_another_run_is_not_adopted(tmp_path: Path) -> None:
    with RunFolder(tmp_path, manifest(), None) as folder:
        folder.add(result())
        folder.ledger.set_value("identity_sha256", "f" * 64)
    with pytest.raises(CheckFailed, match="belongs to a run of another identity"):
        RunFolder(tmp_path, manifest(), None)


def test_a_key_that_came_back_after_it_was_revealed_draws_nothing(tmp_path: Path) -> None:
    """As from a backup, or when a run was started before its secret was revealed."""
    with RunFolder(tmp_path, manifest(SECRET), SECRET) as folder:
        folder.add(result())
    reveal(tmp_path)
    (tmp_path / "secret.revealed").rename(tmp_path / "secret.key")
    assert secret_to_go_on(tmp_path) == SECRET
    with pytest.raises(UsageError, match="has been revealed"):
        RunFolder(tmp_path, manifest(SECRET), SECRET)


def test_what_cannot_be_revealed_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        reveal(tmp_path)
    RunFolder(tmp_path / "public", manifest(), None).close()
    with pytest.raises(UsageError, match="its seed is public already"):
        reveal(tmp_path / "public")
    RunFolder(tmp_path / "run", manifest(SECRET), SECRET).close()
    (tmp_path / "run" / "secret.key").write_text("ff" * 32)
    with pytest.raises(CheckFailed, match="not the key that the run committed itself to"):
        reveal(tmp_path / "run")


@pytest.mark.parametrize("content", ["", "secret", "ff" * 31, "f" * 65, "fg" * 32])
def test_a_file_that_is_no_key_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "secret.key").write_text(content)
    with pytest.raises(UsageError, match="is no key"):
        secret_to_go_on(tmp_path)


@pytest.mark.parametrize("below", ["", "run", "run/deeper"])
def test_a_folder_that_cannot_be_made_is_an_environment_fault(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(EnvironmentFault, match=r"cannot write .*file.*`out`"):
        RunFolder(tmp_path / "file" / below, manifest(), None)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_name_that_is_too_long_is_an_environment_fault(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="`out`"):
        RunFolder(tmp_path / ("x" * 300), manifest(), None)


def test_the_columns_are_those_of_the_field() -> None:
    line = printed(result(idx=40, label=9, predict=9, radius=0.15591893, seconds=1.171169))
    assert line == {
        "idx": "40",
        "label": "9",
        "predict": "9",
        "radius": "0.155",
        "correct": "1",
        "time": "0:00:01.171169",
    }


def test_an_abstention_is_minus_one_with_radius_zero_in_the_tsv_and_null_in_the_record() -> None:
    abstained = result(predict=None, radius=None)
    line = printed(abstained)
    assert (line["predict"], line["radius"], line["correct"]) == ("-1", "0.0", "0")
    written = record(abstained)
    assert (written.predict, written.radius, written.correct) == (None, None, False)


@pytest.mark.parametrize("predict", [None, 3])
def test_an_image_without_a_label_is_never_correct(predict: int | None) -> None:
    unlabelled = result(label=None, predict=predict, radius=None if predict is None else 0.25)
    line = printed(unlabelled)
    assert (line["label"], line["correct"]) == ("-1", "0")
    written = record(unlabelled)
    assert (written.label, written.correct) == (None, None)


def test_a_wrong_label_is_not_correct() -> None:
    assert printed(result(label=3, predict=4))["correct"] == "0"
    assert record(result(label=3, predict=4)).correct is False


def test_the_record_has_these_keys_in_this_order_and_no_times() -> None:
    names = "idx image_sha256 label predict radius correct n0 n n_a alpha p_lower stopped outcomes name"
    assert list(asdict(record(result()))) == names.split()


@given(st.floats(0, 10, allow_subnormal=False))
def test_the_radius_of_the_tsv_is_rounded_down_to_three_decimals(radius: float) -> None:
    shown = printed(result(radius=radius))["radius"]
    assert len(shown.partition(".")[2]) == 3
    assert 0 <= Decimal(radius) - Decimal(shown) < Decimal("0.001")
    assert record(result(radius=radius)).radius == radius


@given(st.floats(0, 1e6))
def test_the_time_reads_back_as_a_timedelta(seconds: float) -> None:
    shown = printed(result(seconds=seconds))["time"]
    days, _, clock = shown.rpartition(", ")
    hours, minutes, rest = clock.split(":")
    found = datetime.timedelta(
        days=int(days.split()[0]) if days else 0, hours=int(hours), minutes=int(minutes), seconds=float(rest)
    )
    assert found.total_seconds() == pytest.approx(seconds, abs=2e-6)


def complete_lines(path: Path) -> list[str]:
    """The lines of a file up to its last line end."""
    return path.read_text().rpartition("\n")[0].splitlines()


def certify_into(out: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """A run of many cheap images, after the statements `before`."""
    code = f"{before}\nfrom densepure_rt.cli import main; main()"
    options = "certify --method fixed --steps 0 --n 10 --n0 1 --max 300 --batch 8 --threads 1 --seed 1 --out".split()
    command = [sys.executable, "-c", code, *options, str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def check_that_a_full_disk_loses_nothing(done: subprocess.CompletedProcess[str], out: Path) -> None:
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "cannot write" in done.stderr
    assert str(out) in done.stderr
    assert "--out" in done.stderr
    assert json.loads((out / "manifest.json").read_text())["identity"]["images"]["count"] == 300
    table = complete_lines(out / "results.tsv")
    assert table[0] + "\n" == HEADER.replace("time", "time\tname")
    kept = [json.loads(line)["idx"] for line in complete_lines(out / "results.jsonl")]
    assert 0 < len(kept) < 300
    assert kept == sorted(kept)
    assert len(table) - 1 in (len(kept), len(kept) - 1)  # the line that did not fit is at most one behind


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `certify_into` that was never cut short."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert certify_into(out).returncode == 0
    return out


def check_that_it_goes_on(out: Path, whole: Path) -> None:
    """With space again it ends as a run that was never cut short."""
    assert certify_into(out).returncode == 0
    assert (out / "results.jsonl").read_bytes() == (whole / "results.jsonl").read_bytes()


def test_a_file_that_can_grow_no_further_exits_3_and_keeps_what_was_written(whole: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk where none can be mounted."""
    pytest.importorskip("resource", reason="limits on file sizes are a POSIX matter")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))"
    check_that_a_full_disk_loses_nothing(certify_into(tmp_path / "run", limit), tmp_path / "run")
    check_that_it_goes_on(tmp_path / "run", whole)


def test_a_full_disk_exits_3_and_keeps_what_was_written(whole: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, timeout=30)
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        check_that_a_full_disk_loses_nothing(certify_into(disk / "run"), disk / "run")
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True, timeout=30)
        check_that_it_goes_on(disk / "run", whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=30)
