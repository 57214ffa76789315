from __future__ import annotations

import ast
import inspect
import re
import sys
import zipfile
from pathlib import Path

import pytest

import densepure_rt.export.convert.to_tensorrt
import densepure_rt.runtime.tensorrt_api
import densepure_rt.runtime.tensorrt_device
from densepure_rt.errors import EnvironmentFault
from densepure_rt.runtime.tensorrt_api import GUARDED, import_flavour, new_logger

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

MODULES = (
    densepure_rt.export.convert.to_tensorrt,
    densepure_rt.runtime.tensorrt_api,
    densepure_rt.runtime.tensorrt_device,
)
WHEELS = sorted((Path(sys.prefix) / "tensorrt-bindings").glob("*.whl"))
PYTHON_NAMES = set(dir(object)) | set(dir(dict)) | set(dir(str)) | set(dir(list))


def names_in(module: object) -> set[str]:
    """Every attribute name of a module's code, and every key that it looks up among an enum's members."""
    tree = ast.parse(inspect.getsource(module))  # type: ignore[arg-type]
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return attributes | {word for word in words if re.fullmatch(r"[A-Z0-9_]{3,}", word)}


def names_of_tensorrt_rtx() -> set[str]:
    classes = [value for value in vars(trt).values() if inspect.isclass(value)]
    return set(dir(trt)).union(*map(dir, classes)) - PYTHON_NAMES


def missing_in_wheel(wheel: Path, names: set[str]) -> set[str]:
    """The names that the bindings' shared library and Python files do not hold.

    pybind11 keeps names as plain strings; the linker lets one string be the end of another.
    """
    with zipfile.ZipFile(wheel) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist() if name.endswith((".so", ".py")))
    return {name for name in names if not re.search(re.escape(name).encode() + rb"(?![A-Za-z0-9_])", content)}


USED = set().union(*map(names_in, MODULES)) & (names_of_tensorrt_rtx() | set(GUARDED))


def test_the_code_uses_dozens_of_tensorrts_names() -> None:
    assert {"build_serialized_network", "deserialize_cuda_engine", "execute_async_v3", "IProgressMonitor"} <= USED
    assert len(USED) > 50


@pytest.mark.skipif(not WHEELS, reason="the bindings of other TensorRT versions could not be downloaded")
@pytest.mark.parametrize("wheel", WHEELS, ids=lambda wheel: wheel.name.split("-")[1])
def test_every_name_that_is_used_exists_in_that_version_or_is_guarded(wheel: Path) -> None:
    assert not missing_in_wheel(wheel, USED - set(GUARDED))


@pytest.mark.skipif(not WHEELS, reason="the bindings of other TensorRT versions could not be downloaded")
def test_a_guarded_name_is_missing_somewhere() -> None:
    missing = set().union(*(missing_in_wheel(wheel, set(GUARDED)) for wheel in WHEELS))
    assert missing | (set(GUARDED) - names_of_tensorrt_rtx()) == set(GUARDED)


def test_a_flavour_that_is_not_installed_is_an_error_with_the_command_that_installs_it() -> None:
    with pytest.raises(EnvironmentFault, match=r"tensorrt cannot be imported .*pip install 'densepure-rt\[tensorrt\]'"):
        import_flavour("tensorrt")


def test_the_logger_keeps_what_tensorrt_says_and_prefers_errors() -> None:
    logger = new_logger(trt)
    logger.log(trt.ILogger.WARNING, "a warning")
    assert logger.summary() == "a warning"
    logger.log(trt.ILogger.ERROR, " the cause ")
    logger.log(trt.ILogger.ERROR, "it failed")
    logger.log(trt.ILogger.VERBOSE, "chatter")
    assert logger.summary() == "the cause; it failed"


def test_the_logger_hears_of_a_refused_plan() -> None:
    logger = new_logger(trt)
    runtime = trt.Runtime(logger)
    assert runtime.deserialize_cuda_engine(b"not a plan, but long enough to look at its first bytes") is None
    assert logger.errors
