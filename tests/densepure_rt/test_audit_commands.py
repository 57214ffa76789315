"""`replay` and `reveal` as a user meets them; `audit` has its own tests, and replayed samples have theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from densepure_rt.errors import UsageError
from densepure_rt.keys import new_secret, store_key
from densepure_rt.run_folder import RunFolder
from tests.densepure_rt.command_line import densepure_rt as cli
from tests.densepure_rt.test_run_folder import SECRET, manifest, result


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
