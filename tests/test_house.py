"""The layout, and what may import what."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import densepure_rt
import densepure_rt.smoothing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("export", "runtime", "engines")
ENGINE_LIBRARIES = {"cuda", "cupy", "onnxruntime", "pycuda", "tensorrt", "tensorrt_rtx"}
# What drives an engine library; onnxruntime_gpu is the part of onnx_device that is for GPUs.
DEVICE_MODULES = {ROOT / "runtime" / f"{name}.py" for name in ("onnx_device", "onnxruntime_gpu", "tensorrt_device")}
SEAM = ROOT / "runtime" / "onnxruntime_api.py"  # imports it late, when it is asked for


def modules(top: str) -> Iterator[Path]:
    """Every module below a folder of the top level, each by its own path and not by a link."""
    for path, below, names in os.walk(ROOT / top):  # os.walk does not follow the links
        below[:] = [name for name in below if name != "__pycache__"]
        yield from (Path(path) / name for name in names if name.endswith(".py"))


TORCH_FREE = sorted([*modules("densepure_rt"), *modules("runtime")])


def project() -> dict[str, Any]:
    parsed: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return parsed


def dotted(folder: Path) -> str:
    """The package that a folder of the top level is: `export/zoo` -> `densepure_rt.export.zoo`."""
    name = ".".join(folder.relative_to(ROOT).parts)
    return name if name.startswith("densepure_rt") else f"densepure_rt.{name}"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> Iterator[str]:
    """The top-level name of every absolute import below `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def imports_at_load(tree: ast.AST) -> Iterator[str]:
    """As `imports`, without what stands inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports_at_load(node)


def in_fresh_python(code: str) -> str:
    """What a new interpreter in the repository prints for `code`."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pyproject_lists_every_package_folder() -> None:
    folders = {ROOT / "densepure_rt", ROOT / "engines"}
    folders |= {path.parent for top in ("densepure_rt", "export", "runtime") for path in modules(top)}
    setuptools = project()["tool"]["setuptools"]
    assert setuptools["package-dir"] == {dotted(folder): folder.relative_to(ROOT).as_posix() for folder in folders}
    assert sorted(setuptools["packages"]) == sorted(setuptools["package-dir"])


def test_the_map_of_the_house_has_every_module_in_its_room() -> None:
    rows = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("### The map of the house\n")[2]
    mapped = [
        f"{room}{module}.py"
        for room, names in re.findall(r"^\| `([a-z_/]+/)` \|[^|]*\|([^|]*)\|$", rows.partition("\n## ")[0], re.M)
        for module in re.findall(r"`(\w+)`", names)
    ]
    there = [path for top in ("densepure_rt", "export", "runtime") for path in modules(top)]
    assert sorted(mapped) == sorted(name_of(path) for path in there if path.stem != "__init__")


SOURCES = sorted(path for top in ("densepure_rt", "export", "runtime") for path in modules(top))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_that_is_long_says_why(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 450 or "is long because" in (ast.get_docstring(ast.parse(text)) or "")


def test_half_of_all_functions_have_at_most_six_lines_of_code() -> None:
    lengths = sorted(
        len({part.lineno for part in ast.walk(node) if isinstance(part, ast.stmt)}) - 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert lengths[len(lengths) // 2] <= 6


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_function_of_more_than_eight_parameters_says_why(path: Path) -> None:
    """A command is exempt, and made of groups of options besides: its parameters are options of the command line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in given)
            command = path.parent.name == "commands" and "typer.Option" in ast.unparse(node.args)
            if count > 8 and not command:
                assert "so many parameters because" in (ast.get_docstring(node) or ""), f"{node.name} has {count}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_docstring_says_what_is_done_and_begins_with_no_question(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (
            said := ast.get_docstring(node)
        ):
            first = said.split()[0].strip(".,:")
            assert first not in ("What", "Whether", "Of", "How", "One", "Where", "At"), f"{node.name}: {said}"


def test_the_public_names_are_these() -> None:
    assert densepure_rt.__all__ == sorted(densepure_rt.__all__)
    assert set(densepure_rt.__all__) == {
        *("Certificate", "Certified", "Predicted", "Settings", "Budget", "SmoothedClassifier", "load", "__version__"),
        *("DensePureError", "UsageError", "EnvironmentFault", "CheckFailed"),
        *("ImageSet", "LabelledImage", "open_images", "plot_certified_accuracy", "to_dataframe"),
    }
    assert densepure_rt.smoothing.__all__ == ["Settings", "SmoothedClassifier", "load"]
    for package in (densepure_rt, densepure_rt.smoothing):
        assert all(hasattr(package, name) for name in package.__all__)
        assert not hasattr(package, "certify")


OUTSIDE = """
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

import densepure_rt
from densepure_rt import Certificate, Certified, ImageSet, LabelledImage, Settings

def ask(images: list[Image.Image | Path | str], tensors: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    with densepure_rt.load(seed=1, key=None) as classifier:
        one: Certificate = classifier.certify(images[0], layout="HWC", sigma=0.25)
        every: list[Certified] = classifier.certify_batch(tensors, [1, None], Settings(sigma=0.25), layout="CHW")
        each: Iterator[Certified] = classifier.certify_iter("folder")
        labels: list[int | None] = classifier.predict([*images, tensors[0]])
        opened: ImageSet = densepure_rt.open_images(Path("folder"), (1, 28, 28), classifier.class_names)
        image: LabelledImage = next(iter(opened))
        told: dict[str, object] = one.to_dict() | every[0].to_dict()
    densepure_rt.to_dataframe(every)
    densepure_rt.to_dataframe(Path("run"))
    densepure_rt.plot_certified_accuracy("run", [one], each)
    print(labels, image.name, told)

classifier = densepure_rt.load("engine.onnx", sead=1)
classifier.certify_batch([5])
classifier.certify("a.png", layout="WHC")
"""


def test_the_api_is_typed_for_whoever_uses_it(tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text(OUTSIDE)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-error-summary", "outside.py"]
    env = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400)
    faults = [line.partition(": error: ")[::2] for line in done.stdout.splitlines() if ": error: " in line]
    last = len(OUTSIDE.splitlines())
    assert [where for where, _ in faults] == [f"outside.py:{last - 2 + i}" for i in range(3)], done.stdout
    assert all(word in said for word, (_, said) in zip(("sead", "List item 0", "layout"), faults, strict=True))


def test_the_version_stands_in_both_places_alike() -> None:
    assert densepure_rt.__version__ == project()["project"]["version"]


@pytest.mark.parametrize("room", ROOMS)
def test_links_are_relative_and_resolve(room: str) -> None:
    link = ROOT / "densepure_rt" / room
    assert link.readlink() == Path("..") / room
    assert link.resolve() == ROOT / room
    assert link.is_dir()


@pytest.mark.parametrize("path", TORCH_FREE, ids=name_of)
def test_torch_is_imported_in_export_only(path: Path) -> None:
    assert "torch" not in set(imports(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", TORCH_FREE, ids=name_of)
def test_engine_libraries_are_imported_by_their_device_module_and_the_seam_alone(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if path in DEVICE_MODULES:
        return
    assert not ENGINE_LIBRARIES & set(imports_at_load(tree) if path == SEAM else imports(tree))


BY_NAME = re.compile(
    r'read_text\(|read_bytes\(|\.open\("r|\.open\(newline|onnx\.load\(|fromfile\(|(?<![\w.])(?<!def )open\('
)
OWN = {  # files of this program, of the kernel, or checked by a line before
    "machine.py": {"/proc/stat", "CPUINFO", "MAPS", "MEMINFO", "MEMORY_MAX"},
    "decoder.py": {"/proc/self/statm"},
    "demo.py": {"resources.files"},
    "tensorrt_device.py": {"files("},
    "formats.py": {"np.fromfile"},
    "to_onnx.py": {"onnx.load(str(path)"},
    "train.py": {"gzip.decompress"},
}


@pytest.mark.parametrize("path", [*TORCH_FREE, *sorted(modules("export"))], ids=name_of)
def test_files_that_are_named_are_opened_by_the_module_that_refuses_pipes_and_devices(path: Path) -> None:
    found = [line.strip() for line in path.read_text().splitlines() if BY_NAME.search(line)]
    allowed = OWN.get(path.name, set())
    assert [line for line in found if not any(known in line for known in allowed)] == []


def test_everything_but_export_imports_without_torch_and_without_engine_libraries() -> None:
    names = [
        ".".join((dotted(path.parent), path.stem)).removesuffix(".__init__")
        for path in TORCH_FREE
        if path.stem != "__main__" and path not in DEVICE_MODULES
    ]
    pytest.importorskip("ray", reason="Ray is not installed")  # the cluster's modules import it
    blocked = sorted({"torch", "onnx", "diffusers", "matplotlib"} | ENGINE_LIBRARIES)
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({blocked!r}))
for name in {names!r}:
    importlib.import_module(name)
print("of export:", *sorted(name for name in sys.modules if name.startswith("densepure_rt.export.")))
"""
    options = "densepure_rt.export.models densepure_rt.export.models.model_options"  # what commands are told of models
    assert in_fresh_python(code) == f"of export: {options}\n"


def test_the_command_exists() -> None:
    module, _, function = project()["project"]["scripts"]["densepure-rt"].partition(":")
    assert in_fresh_python(f"import {module}; print(callable({module}.{function}))") == "True\n"


def test_importing_the_package_takes_under_half_a_second() -> None:
    code = "import time; start = time.perf_counter(); import densepure_rt; print(time.perf_counter() - start)"
    assert min(float(in_fresh_python(code)) for _ in range(3)) < 0.5
