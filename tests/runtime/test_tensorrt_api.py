from __future__ import annotations

import ast
import importlib
import inspect
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import densepure_rt.export.convert.build_options
import densepure_rt.export.convert.to_tensorrt
import densepure_rt.runtime.tensorrt_api
import densepure_rt.runtime.tensorrt_device
from densepure_rt.errors import EnvironmentFault
from densepure_rt.runtime import tensorrt_api
from densepure_rt.runtime.bundle import TAGS, open_bundle, release
from densepure_rt.runtime.tensorrt_api import (
    GUARDED,
    Library,
    import_flavour,
    lean_library,
    library_for,
    library_version,
    new_logger,
    new_runtimes,
)
from densepure_rt.runtime.tensorrt_device import library_of
from tests.support.plans import a_plan, put_bundle

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

MODULES = (
    densepure_rt.export.convert.build_options,
    densepure_rt.export.convert.to_tensorrt,
    densepure_rt.runtime.tensorrt_api,
    densepure_rt.runtime.tensorrt_device,
)
# The real lean library of some versions, each in a folder of its own, which no process imports beside another.
LEAN = sorted(
    ((path.name, path) for path in (Path(sys.prefix) / "tensorrt-lean").glob("*") if (path / "tensorrt_lean").is_dir()),
    key=lambda found: release(found[0]),
)
WHEELS = sorted((Path(sys.prefix) / "tensorrt-bindings").glob("*.whl"))
VERSIONS = [version for version, _ in LEAN]
ROOT = Path(__file__).resolve().parents[2]
needs_lean = pytest.mark.skipif(not LEAN, reason="the lean library could not be downloaded")
without_driver = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
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


def signatures(documentation: str, name: str) -> list[tuple[int, int, set[str]]]:
    """Of each overload that pybind11 documents: the fewest and the most arguments beside self, and their names."""
    found = []
    for listed in re.findall(rf"\b{name}\((self: [^\n]*)\) -> ", documentation):
        parts = re.findall(r"(?:^|, )(\w+): ((?:[^,\[\]<>]|\[[^\]]*\]|<[^>]*>)+)", listed)
        names = [part for part, _ in parts[1:]]
        fewest = sum(" = " not in kind for _, kind in parts[1:])
        found.append((fewest, len(names), set(names)))
    return found


def calls_in(module: object) -> Iterator[tuple[str, int, set[str]]]:
    """Yield each call of a method: its name, its positional arguments and its keywords; none with * or **."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):  # type: ignore[arg-type]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            words = {word.arg for word in node.keywords if word.arg}
            plain = len(words) == len(node.keywords) and not any(isinstance(x, ast.Starred) for x in node.args)
            if plain:
                yield node.func.attr, len(node.args), words


NOT_TENSORRTS = {"allocate", "count", "pop"}  # these methods of TensorRT's; those that are called are of others
CALLS = sorted({(name, count, tuple(sorted(words))) for module in MODULES for name, count, words in calls_in(module)})
DOCUMENTED = """
import inspect, json, sys
from importlib import import_module
trt = import_module(sys.argv[1])
found = {}
for kind in vars(trt).values():
    if inspect.isclass(kind):
        for name in dir(kind):
            text = getattr(getattr(kind, name), "__doc__", None) or ""
            called = kind.__name__ if name == "__init__" else name
            if "(self: " in text:
                found.setdefault(called, []).append(text.replace("__init__(", called + "("))
print(json.dumps(found))
"""


def misfits(documented: dict[str, list[str]]) -> tuple[list[str], set[str]]:
    """The calls that no documented signature takes, and the methods that were compared."""
    wrong, compared = [], set()
    for name, count, words in CALLS:
        if name in NOT_TENSORRTS:
            continue
        known = [taken for text in documented.get(name, ()) for taken in signatures(text, name)]
        if known:
            compared.add(name)
            if not any(fewest <= count + len(words) <= most and set(words) <= names for fewest, most, names in known):
                wrong.append(f"{name} with {count} arguments and {words}")
    return wrong, compared


def documented(module: str, folder: Path | None = None) -> dict[str, list[str]]:
    environment = os.environ | ({"PYTHONPATH": str(folder)} if folder else {})
    command = [sys.executable, "-c", DOCUMENTED, module]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_every_call_fits_a_signature_of_tensorrt_rtx() -> None:
    wrong, compared = misfits(documented("tensorrt_rtx"))
    assert not wrong
    assert {"build_serialized_network", "create_timing_cache", "set_tensor_address", "load_runtime"} <= compared
    assert {"set_runtime_cache", "get_engine_information", "deserialize_cuda_engine", "set_shape"} <= compared
    assert {"Builder", "OnnxParser", "Runtime"} <= compared


@needs_lean
@pytest.mark.parametrize(("version", "folder"), LEAN, ids=VERSIONS)
def test_every_call_that_the_lean_library_has_fits_its_signature(version: str, folder: Path) -> None:
    wrong, compared = misfits(documented("tensorrt_lean", folder))
    assert not wrong
    runtime = {"load_runtime", "deserialize_cuda_engine", "create_execution_context", "execute_async_v3"}
    assert runtime | {"set_optimization_profile_async", "set_input_shape", "set_tensor_address"} <= compared


def test_a_call_with_one_argument_too_many_would_be_found() -> None:
    assert signatures("f(self: a.B, x: int, y: c.D = <D.E: 0>) -> None\n", "f") == [(1, 2, {"x", "y"})]
    assert signatures("f(self: a.B) -> None\n", "f") == [(0, 0, set())]
    assert misfits({"load_runtime": ["load_runtime(self: a.B) -> a.B\n"]})[0] == [
        "load_runtime with 1 arguments and ()"
    ]


# What the device calls of cuda-core, by the class it is called on; None for the module itself.
OF_CUDA = {
    None: {"launch"},
    "Device": {"set_current", "create_stream", "create_event", "allocate"},
    "LegacyPinnedMemoryResource": {"allocate"},
    "Buffer": {"from_handle", "copy_from", "copy_to"},
    "Stream": {"record", "sync", "create_graph_builder"},
    "Event": {"sync"},
    "GraphBuilder": {"begin_building", "end_building", "complete"},
    "Graph": {"launch"},
    "Program": {"compile"},
    "ObjectCode": {"get_kernel"},
}


def test_every_call_of_cuda_core_fits_its_signature() -> None:
    core = pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    graph = importlib.import_module("cuda.core.graph")
    takers: dict[str, list[inspect.Signature]] = {}
    for kind, names in OF_CUDA.items():
        owner = core if kind is None else getattr(core, kind, None) or getattr(graph, kind)
        for name in names:
            taken = inspect.signature(getattr(owner, name))
            own = "self" in taken.parameters
            takers.setdefault(name, []).append(taken.replace(parameters=list(taken.parameters.values())[own:]))
    seen = set()
    for name, count, words in calls_in(densepure_rt.runtime.tensorrt_device):
        if name in takers:
            seen.add(name)
            assert any(fits(taken, count, words) for taken in takers[name]), (name, count, words)
    assert seen == set().union(*OF_CUDA.values())
    for made, fields in (("LaunchConfig", ("grid", "block")), ("EventOptions", ("blocking_sync",))):
        assert all(f"{word}:" in getattr(core, made).__doc__ for word in fields)


def fits(taken: inspect.Signature, count: int, words: set[str]) -> bool:
    try:
        taken.bind(*range(count), **dict.fromkeys(words))
    except TypeError:
        return False
    return True


def in_lean(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own that finds this lean library."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@needs_lean
@without_driver
@pytest.mark.parametrize(("version", "folder"), LEAN, ids=VERSIONS)
def test_the_lean_library_gives_a_runtime_around_nothing_without_a_driver_and_using_it_ends_the_process(
    version: str, folder: Path
) -> None:
    """Why `new_runtimes` asks the logger first."""
    start = (
        "import tensorrt_lean as trt; runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR)); print('made', flush=True); "
    )
    for use in (
        "runtime.deserialize_cuda_engine(bytes(999))",
        "runtime.engine_host_code_allowed = False",
        "del runtime",
    ):
        done = in_lean(folder, start + use)
        assert done.returncode == -signal.SIGSEGV
        assert "made" in done.stdout


LOAD_PLAN = """
import sys
from pathlib import Path
from densepure_rt.cli import main
from densepure_rt.runtime import gpu, tensorrt_device
from tests.runtime.host_cuda import GPU, PARAMETERS, HostCuda
gpu.find = lambda: GPU
tensorrt_device.import_cuda = lambda here: HostCuda(None)
tensorrt_device.compile_kernels = lambda cuda, arch: dict.fromkeys(PARAMETERS)
sys.argv[1:] = ["predict", "--engine", sys.argv[1], "--max", "1"]
main()
"""


@needs_lean
@without_driver
@pytest.mark.parametrize(("version", "folder"), LEAN, ids=VERSIONS)
def test_a_plan_meets_the_real_lean_library_where_cuda_does_not_start_and_ends_in_one_error(
    tmp_path: Path, version: str, folder: Path
) -> None:
    """Hash, header, version, GPU and kernels first; then the library itself, up to its first call of CUDA."""
    plan = a_plan("tensorrt", version=version, compute_capabilities=("8.9",), recipe={"version_compatible": "true"})
    done = in_lean(folder, LOAD_PLAN, str(put_bundle(tmp_path, plan)))
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: tensorrt-lean {version} cannot start here (createInferRuntime: ")
    assert "CUDA initialization failure with error: 35" in line
    assert line.endswith('run "densepure-rt doctor"')


@needs_lean
@pytest.mark.parametrize(("version", "folder"), LEAN, ids=VERSIONS)
def test_a_lean_library_tells_its_version_and_is_found_by_it(
    version: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = (folder / "tensorrt_lean_libs").glob("libnvinfer_lean.so.*")
    assert library_version(str(path)) == version
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    assert lean_library(version) == str(path)
    assert lean_library("10.3.0.30") is None


@needs_lean
@pytest.mark.parametrize(("version", "folder"), LEAN, ids=VERSIONS)
def test_the_lean_library_looks_for_the_tag_that_is_asked_of_a_plan_here(version: str, folder: Path) -> None:
    """So plans that were built for later versions begin with it too; a plan of tensorrt-rtx has another."""
    (path,) = (folder / "tensorrt_lean_libs").glob("libnvinfer_lean.so.*")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        known = [flavour for tag, flavour in TAGS.items() if content.find(tag) >= 0]
    assert known == ["tensorrt"]


def test_what_is_no_library_of_tensorrt_has_no_version(tmp_path: Path) -> None:
    path = tmp_path / "libnvinfer_lean.so.10"
    assert library_version(str(path)) is None
    path.write_bytes(b"no library")
    assert library_version(str(path)) is None
    assert library_version("libc.so.6") is None


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend which versions of tensorrt, of the lean bindings and of the lean library are installed."""

    def pretend(full: str | None = None, lean: str | None = None, lean_library: str | None = None) -> None:
        versions = {"tensorrt": full, "tensorrt_lean": lean}
        modules = {name: SimpleNamespace(__version__=found) for name, found in versions.items() if found}
        monkeypatch.setattr(tensorrt_api, "find_spec", modules.get)
        monkeypatch.setattr(tensorrt_api, "import_flavour", modules.get)
        monkeypatch.setattr(importlib, "import_module", modules.__getitem__)
        monkeypatch.setattr(
            tensorrt_api, "installed_versions", lambda *names: {"tensorrt_lean_cu12": lean} if lean else {}
        )
        monkeypatch.setattr(tensorrt_api, "lean_library", {lean_library: "lean.so"}.get)

    return pretend


COMPATIBLE = {"version_compatible": "true"}


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        ({"lean": "10.16.1.11"}, ("tensorrt-lean", "10.16.1.11", None)),
        ({"lean": "10.16.1.11", "full": "11.4.0.106"}, ("tensorrt-lean", "10.16.1.11", None)),
        ({"full": "10.16.1.11"}, ("tensorrt", "10.16.1.11", None)),
        ({"full": "11.4.0.106", "lean_library": "10.16.1.11"}, ("tensorrt-lean", "10.16.1.11", "lean.so")),
        ({"lean": "11.4.0.106", "lean_library": "10.16.1.11"}, ("tensorrt-lean", "10.16.1.11", "lean.so")),
        (
            {"full": "10.3.0", "lean": "11.4.0.106", "lean_library": "10.16.1.11"},
            ("tensorrt-lean", "10.16.1.11", "lean.so"),
        ),
        ({"full": "10.16.1.11", "lean": "11.4.0.106"}, ("tensorrt", "10.16.1.11", None)),
    ],
)
def test_a_plan_for_later_versions_runs_on_the_lean_library_of_its_own(
    installed: Callable[..., None], here: dict[str, str], expected: tuple[str, str, str | None]
) -> None:
    installed(**here)
    plan = a_plan("tensorrt", version="10.16.1.11", recipe=COMPATIBLE)
    found = library_for(plan, "unet.plan", "rebuild")
    assert (found.name, found.version, found.lean) == expected


def test_a_lean_runtime_that_cannot_be_imported_is_one_error(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(lean="10.16.1.11")
    monkeypatch.setattr(importlib, "import_module", {}.__getitem__)
    plan = a_plan("tensorrt", version="10.16.1.11", recipe=COMPATIBLE)
    with pytest.raises(
        EnvironmentFault, match=r"tensorrt-lean is installed and cannot be imported .*cu12==10\.16\.1\.11"
    ):
        library_for(plan, "unet.plan", "rebuild")


@pytest.mark.parametrize(
    ("version", "recipe", "here", "words"),
    [
        (
            "10.16.1.11",
            {},
            {"full": "11.4.0.106"},
            '10.16.1.11, here is 11.4.0.106: run "rebuild"',
        ),
        ("11.4.0.106", {}, {"full": "10.3.0"}, '11.4.0.106, here is 10.3.0: run "rebuild"'),
        (
            "11.4.0.106",
            COMPATIBLE,
            {"full": "10.3.0"},
            "no plan runs on an earlier version: run .*lean-cu12==11.4.0.106",
        ),
        ("11.4.0.106", COMPATIBLE, {"lean": "10.16.1.11"}, "no plan runs on an earlier version"),
        (
            "10.16.1.11",
            COMPATIBLE,
            {"full": "10.3.0", "lean_library": "10.16.1.11"},
            "no plan runs on an earlier version",
        ),
        (
            "10.16.1.11",
            COMPATIBLE,
            {"full": "11.4.0.106"},
            "runs on the lean library of that version.*lean-cu12==10.16",
        ),
        ("10.16.1.11", COMPATIBLE, {}, "runs on the lean library of tensorrt 10.16.1.11: run .*lean-cu12==10.16.1.11"),
    ],
)
def test_a_plan_of_another_version_is_refused_with_what_to_install(
    installed: Callable[..., None], version: str, recipe: dict[str, str], here: dict[str, str], words: str
) -> None:
    installed(**here)
    with pytest.raises(EnvironmentFault, match=rf"unet\.plan .*{words}") as caught:
        library_for(a_plan("tensorrt", version=version, recipe=recipe), "unet.plan", "rebuild")
    assert caught.value.exit_code == 3


def test_the_lean_library_is_loaded_by_the_bindings_of_a_later_version() -> None:
    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.loaded = ""

        def load_runtime(self, path: str) -> Any:
            return (self, path) if path == "lean.so" else None

    logger = SimpleNamespace(errors=[], summary=lambda: "")
    bindings = SimpleNamespace(Runtime=Runtime)
    host, loaded = new_runtimes(Library("tensorrt-lean", "10.16.1.11", bindings, "lean.so"), logger)
    assert loaded == (host, "lean.so")
    with pytest.raises(EnvironmentFault, match=r"tensorrt-lean 10\.16 cannot start here \(it gives no reason\)"):
        new_runtimes(Library("tensorrt-lean", "10.16", bindings, "other.so"), logger)


def test_two_plans_that_run_on_two_libraries_are_not_joined(tmp_path: Path, installed: Callable[..., None]) -> None:
    installed(lean="11.4.0.106", lean_library="10.16.1.11")
    plans = [a_plan("tensorrt", version=version, recipe=COMPATIBLE) for version in ("11.4.0.106", "10.16.1.11")]
    bundle = open_bundle(put_bundle(tmp_path, *plans))
    contents = [
        (path, sidecar, path.read_bytes())
        for path, sidecar in ((bundle.unet_path, bundle.unet), (bundle.classifier_path, bundle.classifier))
    ]
    with pytest.raises(
        EnvironmentFault, match=r"unet.plan runs on tensorrt-lean 11.*classifier.plan on .* 10\.16\.1\.11"
    ):
        library_of(contents)


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
