"""`replay` and `reveal` as a user meets them; `audit` has its own tests, and replayed samples have theirs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from densepure_rt.errors import UsageError
from densepure_rt.keys import new_secret, store_key
from densepure_rt.records import ArithmeticIdentity, page
from densepure_rt.run_folder import RunFolder, read_manifest
from densepure_rt.smoothing import load
from tests.densepure_rt.command_line import densepure_rt as cli
from tests.densepure_rt.test_run_folder import OLD_RUN, SECRET, manifest, result


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
