"""What a wheel holds, and that it works where no checkout is."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_house import ROOMS, ROOT, project

LITTLE = "--max 2 --sigma 0.25 --steps 0 --method fixed --n0 4 --n 20 --alpha 0.1 --seed 1".split()


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist, built from a copy of the tree in which somebody has built a plan."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("densepure_rt", *ROOMS):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in ("engines", "densepure_rt/data"):
        (tree / folder / "unet.plan").write_bytes(b"built here")
        (tree / folder / "unet.plan.json").write_text("{}")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(wheel_file) as archive:
        yield archive


def test_the_wheel_holds_every_module_under_one_name(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    info = f"densepure_rt-{project()['project']['version']}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"densepure_rt", info}
    for package, folder in project()["tool"]["setuptools"]["package-dir"].items():
        for path in (ROOT / folder).glob("*.py"):
            assert f"{package.replace('.', '/')}/{path.name}" in names
    assert "densepure_rt/py.typed" in names


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [
        ("densepure_rt/engines", "*.onnx"),
        ("densepure_rt/engines", "*.onnx.json"),
        ("densepure_rt/data", "*.npz"),
        ("densepure_rt/export/zoo", "*.safetensors"),
    ],
)
def test_the_wheel_holds_the_default_model_and_its_images(wheel: zipfile.ZipFile, folder: str, pattern: str) -> None:
    files = [path.name for path in (ROOT / folder).glob(pattern)]
    assert files
    assert {f"{folder}/{name}" for name in files} <= set(wheel.namelist())


def test_the_wheel_holds_the_default_model_in_fp16(wheel: zipfile.ZipFile) -> None:
    names = [f"densepure_rt/engines/{part}.fp16.onnx{end}" for part in ("unet", "classifier") for end in ("", ".json")]
    assert set(names) <= set(wheel.namelist())
    assert sum(wheel.getinfo(name).compress_size for name in names) < 5 << 20


def test_the_wheel_holds_every_file_that_the_runtime_reads(wheel: zipfile.ZipFile) -> None:
    kernels = {f"densepure_rt/runtime/{path.name}" for path in ROOT.glob("runtime/*.cu")}
    data = {f"densepure_rt/data/{path.name}" for path in ROOT.glob("densepure_rt/data/*") if ".plan" not in path.name}
    assert kernels | data <= set(wheel.namelist())


def test_the_wheel_holds_no_plan(wheel: zipfile.ZipFile) -> None:
    assert [name for name in wheel.namelist() if ".plan" in name] == []


def test_the_wheel_carries_both_licences(wheel: zipfile.ZipFile) -> None:
    licences = {name.partition("/licenses/")[2] for name in wheel.namelist() if "/licenses/" in name}
    assert licences == {"LICENSE", "densepure_rt/data/FASHION_MNIST_LICENSE.txt"}
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert "License-Expression: Apache-2.0" in wheel.read(metadata).decode()


@dataclass(frozen=True)
class Stranger:
    """Somebody who installed the wheel and has no checkout: an environment and an empty working folder."""

    environment: Path
    folder: Path

    def __call__(self, *command: object) -> str:
        """Run a program of the environment; it must end well.

        Returns:
            What it printed.
        """
        program, *arguments = map(str, command)
        done = subprocess.run(
            [self.environment / "bin" / program, *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def stranger(wheel_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Stranger:
    """The wheel in a fresh environment, which sees this one's packages, but not its editable install."""
    place = tmp_path_factory.mktemp("stranger")
    venv.create(place / "venv", with_pip=False, symlinks=True)
    python = place / "venv" / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel_file)]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True, timeout=300)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    # A folder named in a .pth file is searched, the .pth files in that folder are not read.
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib"))
    (place / "work").mkdir()
    return Stranger(place / "venv", place / "work")


def test_an_installed_wheel_is_what_is_imported(stranger: Stranger) -> None:
    where = stranger("python", "-c", "import densepure_rt; print(densepure_rt.__file__)")
    assert Path(where.strip()).is_relative_to(stranger.environment)


def test_a_newcomer_certifies_predicts_and_reports_from_a_wheel(stranger: Stranger) -> None:
    assert "engines" in stranger("densepure-rt", "doctor")
    stranger("densepure-rt", "certify", *LITTLE, "--out", "run", "--quiet")
    with (stranger.folder / "run" / "results.tsv").open() as table:
        assert len(list(csv.DictReader(table, delimiter="\t"))) == 2
    stranger("densepure-rt", "audit", "run")
    stranger("densepure-rt", "report", "run", "--out", "report.html")
    assert (stranger.folder / "report.html").stat().st_size > 10_000
    assert stranger("densepure-rt", "predict", "--max", "1", "--sigma", "0.25", "--steps", "0", "--seed", "1")


def test_a_newcomer_exports_from_a_wheel_and_certifies_on_what_came_out(stranger: Stranger) -> None:
    """The weights, the images and the reference that the export is compared with are in the wheel."""
    pytest.importorskip("torch", reason="torch is not installed")
    stranger("densepure-rt", "export", "--out", "own", "--parity-images", "2", "--parity-samples", "2")
    assert {"unet.onnx", "unet.onnx.json", "classifier.onnx"} <= {
        path.name for path in (stranger.folder / "own").iterdir()
    }
    stranger("densepure-rt", "certify", "--engine", "own/unet.onnx", *LITTLE, "--out", "own-run", "--quiet")
    assert (stranger.folder / "own-run" / "seal.json").is_file()
