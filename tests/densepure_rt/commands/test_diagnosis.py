from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from densepure_rt import __version__
from densepure_rt.commands.diagnosis import EXPORT_PACKAGES, Finding, diagnose, import_fault
from densepure_rt.runtime.gpu import Gpu
from tests.support.cli import densepure_rt

ROOT = Path(__file__).resolve().parents[3]
QUICK = ("torch",)  # blocked where PyTorch is not the point: it and what needs it take ten seconds to import
CODE = "from densepure_rt.cli import main; main()"


def doctor(
    *options: str, path: Path = ROOT, blocked: tuple[str, ...] = (), cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """`densepure-rt doctor` in a fresh interpreter that looks in `path` first and has no `blocked` packages."""
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); {CODE}"
    env = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "COLUMNS": "300"}
    command = [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code]
    done = subprocess.run([*command, "doctor", *options], capture_output=True, text=True, env=env, cwd=cwd, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module", autouse=True)
def packages_are_imported_once() -> Iterator[None]:
    """`diagnose` imports PyTorch and all else in another Python: ten seconds, and always the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("densepure_rt.commands.diagnosis.import_fault", functools.cache(import_fault))
        yield


def next_command(done: subprocess.CompletedProcess[str]) -> str:
    last = done.stdout.splitlines()[-1]
    assert last.startswith("next: ")
    return last.removeprefix("next: ")


def without_spaces(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def fake_distribution(folder: Path, name: str) -> None:
    """What pip leaves behind for an installed wheel, as importlib.metadata reads it."""
    info = folder / f"{name.replace('-', '_')}-1.20.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.20.0\n")


def test_a_healthy_machine_is_told_to_certify() -> None:
    done = doctor()
    assert (done.returncode, done.stderr) == (0, "")
    assert next_command(done) == "densepure-rt certify"
    assert f"{__version__} on Python {platform.python_version()}" in done.stdout
    assert metadata.version("onnxruntime") in done.stdout
    assert "hashes match" in done.stdout


def test_the_next_command_is_one_line_however_narrow_the_terminal_is() -> None:
    done = doctor(blocked=("onnxruntime", *QUICK))
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "20"}
    code = f"import sys; sys.modules['onnxruntime'] = sys.modules['torch'] = None; {CODE}"
    narrow = subprocess.run(
        [sys.executable, "-c", code, "doctor"], capture_output=True, text=True, env=env, timeout=120
    )
    assert narrow.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]


def test_json_says_the_same() -> None:
    done = densepure_rt("doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    diagnosis = diagnose()
    assert report["next_command"] == diagnosis.next_command
    assert [finding["what"] for finding in report["findings"]] == [finding.what for finding in diagnosis.findings]
    assert {finding["state"] for finding in report["findings"]} <= {"ok", "missing", "broken"}


def test_both_wheels_of_onnxruntime_exit_3_with_the_repair(tmp_path: Path) -> None:
    fake_distribution(tmp_path, "onnxruntime-gpu")
    done = doctor(path=tmp_path, blocked=QUICK)
    assert done.returncode == 3
    printed = without_spaces(done.stdout)
    assert f"onnxruntime {metadata.version('onnxruntime')} and onnxruntime-gpu 1.20.0" in printed
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in next_command(done)
    assert "pip install" in next_command(done)


def test_without_onnxruntime_the_next_command_installs_it() -> None:
    done = doctor(blocked=("onnxruntime", *QUICK))
    assert next_command(done) == "pip install 'densepure-rt[cpu]'"
    assert "missing" in done.stdout


def test_a_gpu_that_runs_plans_needs_no_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here, so its answer is put in; tensorrt-rtx is the real one."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    absent = Finding("ONNX Runtime", "missing", "not installed", needed=True)
    monkeypatch.setattr("densepure_rt.commands.diagnosis.onnxruntime_finding", lambda: absent)
    assert not diagnose().healthy
    monkeypatch.setattr("densepure_rt.commands.diagnosis.gpu_here", lambda: Gpu("NVIDIA RTX 4090", "8.9", "12.6"))
    diagnosis = diagnose()
    assert diagnosis.healthy
    assert "export --target tensorrt" in diagnosis.next_command


def test_without_torch_only_export_is_missing() -> None:
    done = doctor(blocked=("torch",))
    assert done.returncode == 0
    assert next_command(done) == "densepure-rt certify"
    (line,) = (line for line in done.stdout.splitlines() if line.split()[1] == "export")
    assert line.startswith("missing")
    assert "torch" in line
    assert "densepure-rt[export]" in line


def test_the_export_packages_are_those_that_the_extra_installs() -> None:
    extra = {
        requirement.partition(";")[0].partition(">")[0].strip()
        for requirement in metadata.requires("densepure-rt") or ()
        if 'extra == "export"' in requirement.replace("'", '"')
    }
    assert set(EXPORT_PACKAGES) <= extra


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the installed package, to be damaged."""
    ignore = shutil.ignore_patterns("__pycache__", "zoo")
    shutil.copytree(ROOT / "densepure_rt", tmp_path / "densepure_rt", ignore=ignore)
    return tmp_path


@pytest.mark.parametrize("name", ["unet.onnx", "classifier.onnx", "unet.fp16.onnx"])
def test_a_damaged_shipped_engine_exits_3_and_says_to_install_again(package: Path, name: str) -> None:
    os.truncate(package / "densepure_rt" / "engines" / name, 1000)
    done = doctor(path=package, blocked=QUICK, cwd=package)
    assert done.returncode == 3
    assert f"{package}/densepure_rt/engines/{name} does not match its sidecar" in done.stdout
    assert next_command(done).startswith("pip install --force-reinstall")


def test_a_missing_shipped_engine_exits_3(package: Path) -> None:
    (package / "densepure_rt" / "engines" / "unet.onnx").unlink()
    done = doctor(path=package, blocked=QUICK, cwd=package)
    assert done.returncode == 3
    assert "no engine at" in done.stdout
    assert next_command(done).startswith("pip install --force-reinstall")
