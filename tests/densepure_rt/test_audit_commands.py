"""`replay` and `reveal` as a user meets them; `audit` has its own tests, and replayed samples have theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from densepure_rt.run_folder import RunFolder
from tests.densepure_rt.test_merge import cli
from tests.densepure_rt.test_run_folder import SECRET, manifest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has sampled nothing yet, keyed by SECRET."""
    RunFolder(tmp_path / "run", manifest(SECRET), SECRET).close()
    return tmp_path / "run"


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
