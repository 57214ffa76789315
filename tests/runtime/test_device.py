"""What `open_device` says when ONNX Runtime is missing, or there twice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from densepure_rt.errors import EnvironmentFault
from densepure_rt.runtime.bundle import open_bundle, shipped_engine
from densepure_rt.runtime.machine import available_cores, installed_versions
from densepure_rt.runtime.onnxruntime_api import onnxruntime_conflict
from densepure_rt.runtime.open_device import open_device

ROOT = Path(__file__).resolve().parents[2]
WHEELS = {"onnxruntime": "1.20.0", "onnxruntime-gpu": "1.19.2"}


def install(site: Path, *names: str) -> Path:
    """What pip leaves of a wheel, as far as importlib.metadata is concerned."""
    for name in names:
        folder = site / f"{name.replace('-', '_')}-{WHEELS[name]}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {WHEELS[name]}\n")
    return site


@pytest.mark.parametrize("names", [(), ("onnxruntime",), ("onnxruntime-gpu",)], ids=str)
def test_one_onnxruntime_or_none_is_no_conflict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "path", [str(install(tmp_path, *names))])
    assert installed_versions(*WHEELS) == {name: WHEELS[name] for name in names}
    assert onnxruntime_conflict() is None


def test_two_onnxruntimes_are_a_conflict_that_names_both_and_the_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(install(tmp_path, *WHEELS))])
    message = onnxruntime_conflict()
    assert message is not None
    for part in ("onnxruntime 1.20.0", "onnxruntime-gpu 1.19.2", "pip uninstall -y onnxruntime onnxruntime-gpu"):
        assert part in message


def test_wheels_in_different_folders_of_the_path_collide_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = [install(tmp_path / name, name) for name in WHEELS]
    monkeypatch.setattr(sys, "path", [str(site) for site in sites])
    assert onnxruntime_conflict() is not None


def test_device_is_not_opened_on_two_onnxruntimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(shipped_engine())
    monkeypatch.syspath_prepend(install(tmp_path, *WHEELS))
    with pytest.raises(EnvironmentFault, match=r"pip uninstall -y onnxruntime onnxruntime-gpu.*pip install"):
        open_device(bundle, batch=1, threads=1)


def test_missing_onnxruntime_is_an_environment_fault_with_the_command_that_installs_it() -> None:
    code = """
import sys
sys.modules["onnxruntime"] = None
from densepure_rt.errors import EnvironmentFault
from densepure_rt.smoothing.classifier import load
try:
    load(batch=1, threads=1)
except EnvironmentFault as error:
    print(error.exit_code, error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert re.match(r"3 .*ONNX Runtime.*pip install '?densepure-rt\[cpu\]", done.stdout), done.stdout


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not say which cores a process has")
def test_available_cores_are_those_that_the_process_may_use() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from densepure_rt.runtime.machine import available_cores; print(available_cores())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "1\n", done.stderr
    assert available_cores() == len(os.sched_getaffinity(0))
