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
from densepure_rt.commands.diagnosis import (
    EXPORT_PACKAGES,
    Finding,
    diagnose,
    gpu_finding,
    import_fault,
    lean_finding,
    next_command,
    providers_finding,
    tensorrt_finding,
)
from densepure_rt.errors import EnvironmentFault
from densepure_rt.runtime import machine
from densepure_rt.runtime.gpu import Gpu
from tests.runtime.stand_in_cuda import make_stand_in, needs_stand_in, with_stand_in
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


def last_command(done: subprocess.CompletedProcess[str]) -> str:
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
    assert last_command(done) == "densepure-rt certify"
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
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in last_command(done)
    assert "pip install" in last_command(done)


def test_without_onnxruntime_the_next_command_installs_it() -> None:
    done = doctor(blocked=("onnxruntime", *QUICK))
    assert last_command(done) == "pip install 'densepure-rt[cpu]'"
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
    assert last_command(done) == "densepure-rt certify"
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
    assert last_command(done).startswith("pip install --force-reinstall")


def test_a_missing_shipped_engine_exits_3(package: Path) -> None:
    (package / "densepure_rt" / "engines" / "unet.onnx").unlink()
    done = doctor(path=package, blocked=QUICK, cwd=package)
    assert done.returncode == 3
    assert "no engine at" in done.stdout
    assert last_command(done).startswith("pip install --force-reinstall")


LEAN = sorted((Path(sys.prefix) / "tensorrt-lean").glob("*/tensorrt_lean"))  # of several versions; `make test` has them
H100, RTX_4090 = Gpu("NVIDIA H100", "9.0", "13.0"), Gpu("NVIDIA RTX 4090", "8.9", "12.4")
NO_GPU = EnvironmentFault("no NVIDIA GPU here")
OK, MISSING = Finding("x", "ok", ""), Finding("x", "missing", "")


@pytest.mark.parametrize(
    ("here", "jetson", "extra"),
    [
        (H100, False, "tensorrt-cu13"),
        (RTX_4090, False, "tensorrt-cu12"),
        (Gpu("NVIDIA H100", "9.0", "14.1"), False, "tensorrt-cu13"),
        (Gpu("Orin", "8.7", "12.6"), True, "tensorrt-jetpack6"),
        (Gpu("Thor", "11.0", "13.0"), True, "tensorrt-jetpack7"),
    ],
)
def test_the_extra_that_fits_the_driver_is_named_and_is_the_next_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: Gpu, jetson: bool, extra: str
) -> None:
    monkeypatch.setattr(machine, "TEGRA", tmp_path if jetson else tmp_path / "none")
    assert gpu_finding(here).found.endswith(f"driver for CUDA {here.driver}; plans: densepure-rt[{extra}]")
    plans = {"tensorrt": MISSING, "tensorrt-rtx": MISSING}
    assert next_command(OK, OK, plans, here) == f"pip install 'densepure-rt[{extra}]'"  # type: ignore[arg-type]


def test_a_driver_that_no_tensorrt_is_for_is_broken() -> None:
    finding = gpu_finding(Gpu("NVIDIA T4", "7.5", "11.8"))
    assert (finding.state, "plans need a driver for CUDA 12 or later" in finding.found) == ("broken", True)


@pytest.mark.skipif(not LEAN, reason="the lean library could not be downloaded")
@pytest.mark.parametrize("library", LEAN, ids=lambda path: path.parent.name)
def test_a_real_lean_library_that_cannot_start_is_not_said_to_work(
    monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    """It imports without a driver, and 11.4 even makes a runtime: its log alone tells that nothing is behind it."""
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU here")
    code = """
from densepure_rt.commands.diagnosis import lean_finding
from densepure_rt.errors import EnvironmentFault
from densepure_rt.runtime.gpu import Gpu
for here in (Gpu("NVIDIA H100", "9.0", "12.4"), EnvironmentFault("none")):
    print(lean_finding(here))
"""
    monkeypatch.setenv("PYTHONPATH", f"{library.parent}{os.pathsep}{ROOT}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    with_gpu, without = done.stdout.splitlines()
    assert "state='broken'" in with_gpu
    assert f"{library.parent.name} does not start (" in with_gpu
    assert "35" in with_gpu  # cudaErrorInsufficientDriver
    assert "the driver runs CUDA 12.4: pip install 'densepure-rt[tensorrt-lean-cu12]'" in with_gpu
    assert "state='missing'" in without
    assert "runs plans on a GPU only" in without


def test_a_library_whose_builder_ends_in_a_crash_is_not_said_to_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tensorrt.py").write_text("""
import os, signal
__version__ = "11.4.0"
class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)
def Builder(logger):
    os.kill(os.getpid(), signal.SIGSEGV)
""")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    finding = tensorrt_finding("tensorrt", H100)
    sys.modules.pop("tensorrt", None)
    assert finding.state == "broken"
    assert "11.4.0 does not start (Python ends with signal 11); the driver runs CUDA 13.0" in finding.found


def test_a_real_builder_is_made_before_rtx_is_said_to_work_and_never_for_a_gpu_that_it_lacks() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    assert tensorrt_finding("tensorrt-rtx", RTX_4090).found.endswith("a builder was made")
    hopper = tensorrt_finding("tensorrt-rtx", H100)
    assert (hopper.state, "builds nothing for 9.0" in hopper.found) == ("missing", True)


@needs_stand_in
@pytest.mark.parametrize("missing", [None, "libcudnn"])
def test_the_cuda_provider_is_well_once_its_libraries_load(tmp_path: Path, missing: str | None) -> None:
    make_stand_in(tmp_path)
    for library in tmp_path.glob(f"{missing}*"):
        library.unlink()
    code = """
from densepure_rt.commands.diagnosis import gpu_here, providers_finding
from densepure_rt.runtime import onnxruntime_api
onnxruntime_api.onnxruntime_conflict = lambda: None  # with the one of the tests, which is hidden by this one
finding = providers_finding(gpu_here())
print(finding.state, finding.found)
"""
    said = with_stand_in(code, tmp_path)
    if missing is None:
        assert said.startswith("ok built with ")
        assert "CUDA's libraries load" in said
    else:
        assert said.startswith("broken built with ")
        assert "libcudnn.so.9" in said
        assert "pip install 'densepure-rt[gpu-cu13]'" in said


def test_an_onnx_runtime_for_cpus_names_what_would_run_on_the_gpu() -> None:
    assert "pip install 'densepure-rt[gpu-cu13]'" in providers_finding(NO_GPU).found
    assert lean_finding(NO_GPU).what == "tensorrt-lean"
