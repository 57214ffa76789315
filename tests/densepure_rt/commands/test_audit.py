"""`replay` and `reveal` as a user meets them; `audit` has its own tests, and replayed samples have theirs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from densepure_rt.errors import UsageError
from densepure_rt.json_files import page
from densepure_rt.keys import new_secret, store_key
from densepure_rt.runs.folder import RunFolder
from densepure_rt.runs.layout import read_manifest
from densepure_rt.runs.records import ArithmeticIdentity
from densepure_rt.smoothing.classifier import load
from tests.support.cli import densepure_rt as cli
from tests.support.cli import environment
from tests.support.runs import OLD_RUN, SECRET, manifest, result


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of one image so far, keyed by SECRET."""
    with RunFolder(tmp_path / "run", manifest(SECRET), SECRET) as folder:
        folder.add(result())
    return tmp_path / "run"


def test_revealing_says_what_else_holds_the_secret_and_retires_the_key_that_is_named(run: Path, tmp_path: Path) -> None:
    key, other = tmp_path / "noise.key", tmp_path / "other.key"
    store_key(key, SECRET)
    store_key(other, new_secret())
    done = cli("reveal", run, "--key", other)
    assert (done.returncode, done.stdout) == (2, "")
    assert "does not hold the secret of this run" in done.stderr
    assert (run / "secret.key").exists()
    for _ in range(2):
        done = cli("reveal", run, "--key", key)
        assert (done.returncode, done.stdout) == (0, f"{SECRET.hex()}\n")
        assert "noise.key.revealed now" in done.stderr
        assert "remove every other key file that holds this secret" in done.stderr
        assert not key.exists()
    done = cli("certify", "--steps", 0, "--max", 1, "--key", key, "--out", tmp_path / "more")
    assert done.returncode == 2
    assert "has been revealed" in done.stderr
    assert not (tmp_path / "more").exists()


def test_a_run_that_is_revealed_by_its_own_key_file_draws_no_more_noise(run: Path) -> None:
    key = run / "secret.key"
    for _ in range(2):
        assert cli("reveal", run, "--key", key).returncode == 0
        assert not key.exists()
    with pytest.raises(UsageError, match="has been revealed"):
        RunFolder(run, manifest(SECRET), SECRET)


def told_of(run: Path, fingerprint: str | None) -> str:
    """What `replay` says on stderr of a run with this fingerprint."""
    there = read_manifest(run)
    arithmetic = None if fingerprint is None else ArithmeticIdentity(fingerprint)
    identity = dataclasses.replace(there.identity, arithmetic=arithmetic)
    (run / "manifest.json").write_text(page(dataclasses.replace(there, identity=identity)))
    done = cli("replay", run, "--image", 0)
    assert done.returncode == 0
    assert "label     9" in done.stdout
    return done.stderr


def test_replay_warns_and_goes_on_where_the_engines_compute_otherwise_than_in_the_run(tmp_path: Path) -> None:
    shutil.copytree(OLD_RUN, tmp_path / "run")
    with load(batch=32, threads=1) as here:
        fingerprint = str(here.device.describe()["fingerprint"])
    assert told_of(tmp_path / "run", fingerprint) == ""
    assert "compute otherwise here than in the run" in told_of(tmp_path / "run", "f" * 64)
    assert "does not say how its machine computed" in told_of(tmp_path / "run", None)


def test_revealing_a_run_whose_seed_is_public_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(OLD_RUN, run)
    done = cli("reveal", run)
    assert done.returncode == 2
    assert "its seed is public already" in done.stderr
    assert {file.name: file.read_bytes() for file in run.iterdir()} == {
        file.name: file.read_bytes() for file in OLD_RUN.iterdir()
    }


@pytest.mark.parametrize("secret", ["zz", "ab", "00" * 31 + "0", "\n"])
def test_a_revealed_secret_that_is_none_is_one_error(run: Path, secret: str) -> None:
    there = json.loads((run / "manifest.json").read_text())
    there["provenance"]["revealed_secret"] = secret
    (run / "manifest.json").write_text(json.dumps(there))
    (run / "secret.key").unlink()
    for command in (("replay", run, "--image", 0), ("audit", run)):
        done = cli(*command)
        assert done.returncode == 1
        assert "provenance.revealed_secret" in done.stdout + done.stderr
        assert len(done.stderr.splitlines()) == 1


VIEW = """
    alter table images rename to t;
    create view images as with recursive c(x) as (select 1 union all select x + 1 from c)
        select x place, x idx, labels, record, timing from c, t;
"""
TRIGGER = "create trigger u after insert on images begin delete from images; end;"
BOMB = f"update images set labels = x'{zlib.compress(bytes(4 * 10**8), 9).hex()}'"  # 389 KB
CLAIMED = f"{BOMB}; update images set timing = json_set(timing, '$.samples', 100000000)"
HOSTILE = {
    "a view without an end": VIEW,
    "a trigger": TRIGGER,
    "a blob of 100 million labels": BOMB,
    "a blob of 100 million labels, which the timing claims": CLAIMED,
}
TINY = ("--max", 1, "--steps", 0, "--n", 100, "--sigma", 0.1, "--seed", 1, "--batch", 16, "--threads", 1, "--quiet")


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("certified") / "run"
    assert cli("certify", *TINY, "--out", out).returncode == 0
    return out


def hostile(certified: Path, folder: Path, statements: str) -> Path:
    """A copy of a run, with a ledger that these statements were run on."""
    shutil.copytree(certified, folder)
    with contextlib.closing(sqlite3.connect(folder / "ledger.sqlite")) as database:
        database.executescript(statements)
    return folder


@pytest.mark.parametrize("statements", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_ledger_is_one_error_before_two_seconds_of_work(
    certified: Path, tmp_path: Path, statements: str
) -> None:
    """And a report, which reads no ledger, is made."""
    run = hostile(certified, tmp_path / "run", statements)
    commands = [("audit", run), ("replay", run, "--image", 0), ("certify", *TINY, "--out", run)]
    for command, code in [*((command, 1) for command in commands), (("report", run, "--out", tmp_path / "r.html"), 0)]:
        started = time.process_time()
        done = cli(*command)
        assert (done.returncode, time.process_time() - started < 2) == (code, True), (command, done)
        assert done.stderr.count("error:") == code


PROC = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not say what a process held")


def most_mib_and_exit_code(*command: object) -> tuple[int, int]:
    """Of a command in a process of its own: what it held in memory at most, and how it ended."""
    code = (
        f"import sys; sys.argv = {['densepure-rt', *map(str, command)]!r}\n"
        "from densepure_rt.cli import main\n"
        "ended = None\n"
        "try: main()\n"
        "except SystemExit as error: ended = error\n"
        "held = open('/proc/self/status').read().split('VmHWM:')[1].split()[0]\n"
        "print(held, (ended and ended.code) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60)
    most_kib, exit_code = map(int, done.stdout.splitlines()[-1].split())
    return most_kib // 2**10, exit_code


@PROC
@pytest.mark.parametrize("statements", [VIEW, BOMB, CLAIMED], ids=["view", "bomb", "claimed bomb"])
def test_an_audit_of_a_hostile_ledger_stays_below_300_mib(certified: Path, tmp_path: Path, statements: str) -> None:
    run = hostile(certified, tmp_path / "run", statements)
    most_mib, exit_code = most_mib_and_exit_code("audit", run)
    assert exit_code == 1
    assert most_mib < 300


@PROC
@pytest.mark.parametrize("name", ["results.jsonl", "falsify.jsonl"])
def test_a_sparse_results_file_of_half_a_gibibyte_is_one_error_below_300_mib(
    certified: Path, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(certified, run)
    (run / name).touch()
    os.truncate(run / name, 2**29)
    most_mib, exit_code = most_mib_and_exit_code("audit", run)
    assert exit_code == 1
    assert most_mib < 300
    if name == "results.jsonl":
        most_mib, exit_code = most_mib_and_exit_code("report", run, "--out", tmp_path / "r.html")
        assert exit_code == 3
        assert most_mib < 300
