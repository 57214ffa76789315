from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from densepure_rt.commands.diagnosis import import_fault, imported
from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.optional import optional

ROOT = Path(__file__).resolve().parents[2]
CURE = "run \"pip install 'densepure-rt[export]'\""
# What torchvision of another build of torch ends with.
NMS = "raise RuntimeError('operator torchvision::nms does not exist\\nmore lines')"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of packages on the path."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
    return folder


def fault_of(name: str) -> str:
    """What the user is told when importing `name` fails."""
    with pytest.raises(EnvironmentFault) as raised, optional("export", "PyTorch", CURE):
        import_module(name)
    return str(raised.value)


def test_a_package_that_is_missing_is_named_with_the_cure() -> None:
    assert fault_of("no_such_package_1") == f"export needs PyTorch, and no_such_package_1 is not installed: {CURE}"
    assert fault_of("json.no_such_1") == f"export needs PyTorch (No module named 'json.no_such_1'): {CURE}"


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "OSError: libcudart.so.13: cannot open"),
        ("raise AttributeError('_ARRAY_API not found')", "AttributeError: _ARRAY_API not found"),
        ("raise RuntimeError('first\\nsecond')", "RuntimeError: first)"),
        ("raise ValueError", "ValueError)"),
    ],
)
def test_a_package_that_breaks_when_imported_is_named_with_its_cause_in_one_line(
    packages: Path, line: str, cause: str
) -> None:
    name = f"broken_{abs(hash(line))}"
    (packages / f"{name}.py").write_text(line)
    found = fault_of(name)
    assert f"{name} fails when it is imported ({cause}" in found
    assert found.endswith(CURE)
    assert "\n" not in found


def test_a_torchvision_of_another_torch_is_named_under_what_imports_it(packages: Path) -> None:
    (packages / "torchvision").mkdir()
    (packages / "torchvision" / "__init__.py").write_text(NMS)
    lazy = "try:\n    import torchvision\nexcept Exception as e:\n    raise ImportError('no PreTrainedModel') from e\n"
    (packages / "imports_torchvision.py").write_text(lazy)
    found = fault_of("imports_torchvision")
    assert "operator torchvision::nms does not exist" in found
    assert "pip uninstall torchvision" in found
    assert "PreTrainedModel" not in found


def test_a_torchvision_that_is_missing_is_what_is_asked_for_and_not_the_package_that_is_there(packages: Path) -> None:
    (packages / "needs_vision.py").write_text("raise ModuleNotFoundError('No module', name='torchvision')")
    found = fault_of("needs_vision")
    assert found.startswith("export needs torchvision, which is not installed")
    assert "pip install" not in found


def test_an_error_of_our_own_passes_unchanged() -> None:
    with pytest.raises(UsageError, match="asked for nothing"), optional("export", "PyTorch", CURE):
        raise UsageError("asked for nothing")


def test_export_beside_a_torchvision_of_another_torch_ends_in_one_error(packages: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    (packages / "torchvision").mkdir()
    (packages / "torchvision" / "__init__.py").write_text(NMS)
    (packages / "torchvision-0.28.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"
    (packages / "torchvision-0.28.0.dist-info" / "METADATA").write_text(metadata)
    code = "from densepure_rt.cli import main; main()"
    command = [sys.executable, "-c", code, "export", "--out", str(tmp_path / "engines")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert "torchvision 0.28.0 cannot be imported beside torch" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "engines").exists()


def test_doctor_calls_broken_what_is_installed_and_does_not_import(packages: Path) -> None:
    (packages / "half_there.py").write_text("raise OSError('libhalf.so is missing')")
    found = imported("extra", {"pip": "import pip", "half-there": "import half_there"})
    assert found.state == "broken"
    assert found.found == "half-there cannot be imported: OSError: libhalf.so is missing"


def test_doctor_outlives_a_package_that_crashes_or_hangs(packages: Path) -> None:
    (packages / "crashes.py").write_text("import os; os.abort()")
    (packages / "hangs.py").write_text("import time; time.sleep(60)")
    assert import_fault("import crashes") == "Python ends with signal 6"
    assert import_fault("import hangs", seconds=1.0) == "it takes more than 1 s"
    assert import_fault("import json") is None


def test_ctrl_c_during_an_import_is_no_missing_package() -> None:
    """pybind11 turns what ends the initialisation of a module into an ImportError with it as the cause."""
    failed = ImportError("initialization failed")
    failed.__cause__ = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), optional("export", "PyTorch", "install it"):
        raise failed
