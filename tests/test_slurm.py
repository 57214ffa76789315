"""The scripts of docs/guides/slurm.md: their bash, their commands, and what they come to on one machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.support.cli import commands

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)


def scripts() -> list[str]:
    """Those of the section: the job array, the merge, and how they are submitted."""
    text = (ROOT / "docs" / "guides" / "slurm.md").read_text(encoding="utf-8")
    section = re.search(r"^## Slurm\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert section
    return FENCE.findall(section[1])


def test_there_are_two_scripts_and_how_to_submit_them() -> None:
    certify, merge, submit = scripts()
    assert "#SBATCH --array=1-" in certify
    assert "densepure-rt merge" in merge
    assert "--dependency=afterok" in submit


@pytest.mark.parametrize("place", range(3))
def test_their_bash_parses(place: int) -> None:
    done = subprocess.run(["bash", "-n"], input=scripts()[place], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_their_commands_parse() -> None:
    lines = [line for script in scripts() for line in script.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line)[1:] for line in lines if line.startswith("densepure-rt ")]
    assert [name for name, *_ in found] == ["certify", "merge", "audit"]
    for name, *arguments in found:
        commands()[name].make_context(name, arguments)


def ran(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment: Mapping[str, str] = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path} | variables
    return subprocess.run(
        ["bash"], input=script, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with `densepure-rt` on its path and three images."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "densepure-rt"
    run = "from densepure_rt.cli import main; main()"
    command.write_text(f"#!{sys.executable}\nimport sys\nsys.argv[0] = 'densepure-rt'\n{run}\n")
    command.chmod(0o755)
    shipped = np.load(ROOT / "densepure_rt" / "data" / "fashion_mnist_test.npz")
    (tmp_path / "images").mkdir()
    rows = ["file,label"]
    for i in (0, 3, 4):  # clear ones, so that it is soon over
        write_png(tmp_path / "images" / f"{i}.png", shipped["x"][i])
        rows.append(f"{i}.png,{shipped['y'][i]}")
    (tmp_path / "images" / "labels.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def write_png(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(pixels.reshape(28, 28)).save(path)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no bash there")
def test_with_slurms_variables_set_by_hand_they_end_in_one_run_of_all_images(site: Path) -> None:
    certify, merge, _ = scripts()
    for task in ("2", "1", "2"):  # the last as if it were requeued: it is done
        done = ran(certify, site, SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_COUNT="2")
        assert done.returncode == 0, done.stderr
    other = ran(certify, site, SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_TASK_COUNT="3")
    assert other.returncode == 2
    assert "already holds shard 1/2, and shard 1/3 was asked for" in other.stderr
    done = ran(merge, site)
    assert done.returncode == 0, done.stderr
    assert "2 shards merged: 3 images" in done.stdout
    summary = json.loads((site / "runs" / "whole" / "summary.json").read_text())
    assert (summary["done"], summary["asked"]) == (3, 3)
    assert (site / "runs" / "whole" / "secret.key").read_text() == (site / "noise.key").read_text()
