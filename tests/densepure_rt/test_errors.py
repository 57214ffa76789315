"""The library speaks of parameters, and the command line of options."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from densepure_rt.commands.console import OPTIONS, in_options, known_options
from densepure_rt.errors import PARAMETER, DensePureError, UsageError
from densepure_rt.smoothing.settings import Settings

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND_LINE = ("densepure_rt/cli.py", "densepure_rt/commands/", "export/models/model_options.py")
LIBRARY = sorted(
    path
    for room in ("densepure_rt", "export", "runtime")
    for path in (ROOT / room).rglob("*.py")
    if not path.relative_to(ROOT)
    .as_posix()
    .startswith((*COMMAND_LINE, *(f"densepure_rt/{link}/" for link in ("export", "runtime"))))
)
OPTION = re.compile(r"(?<![-\w])--(?:[a-z][a-z-]*|$)")  # an f-string may end one part with "--"
TYPED = re.compile(r"densepure-rt \w+( --[a-z-]+( [\w,]+)?)*")  # a whole command, to be typed as it stands
OTHERS = {
    "export/compare/denoising.py": {
        *("--attention-order", "--beta-end", "--beta-start", "--num-head-channels", "--num-heads"),
        *("--prediction", "--schedule", "--timestep-scale"),
    },  # sidecars hold these so: it is a file format
    "densepure_rt/legacy/claims.py": {"--labels"},  # imported.json holds it so
    "densepure_rt/legacy/label_arrays.py": {"--save"},  # of the official code
    "densepure_rt/serving/origins.py": {"--allow-host"},  # a client reads it, of the command that it asks
    "export/compare/machine.py": {"--format", "--id", "--query-gpu"},  # of nvidia-smi
    "export/models/checkpoints.py": {"--local-dir"},  # of hf
    "export/models/onnx_classifiers.py": {"--inputs-as-nchw"},  # of tf2onnx
    "runtime/bundle.py": {
        "--",
        "--batch",
        "--compute-capability",
        "--out",
        "--precision",
    },  # parts of a command to be typed
    "runtime/tensorrt_api.py": {"--system-site-packages"},  # of venv
}


PYTHON_ALONE = {"secret", "layout"}  # no command passes them


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def texts(path: Path) -> Iterator[str]:
    """Each string of a module but its docstrings, the parts of an f-string apart."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    said = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.value


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_no_text_of_the_library_names_an_option(path: Path) -> None:
    found = {option for text in texts(path) for option in OPTION.findall(TYPED.sub("", text))}
    assert found == OTHERS.get(name_of(path), set())


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_each_parameter_that_a_text_names_is_an_option_of_some_command(path: Path) -> None:
    for text in texts(path):
        for found in PARAMETER.finditer(text):
            assert in_options(found[0]) != found[0] or found[1] in PYTHON_ALONE


def test_the_names_that_differ_are_those_of_options() -> None:
    assert {f"--{option}" for option in OPTIONS.values()} <= known_options()


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("`engine_sha256` pins 0, see `engine`", "--engine-sha256 pins 0, see --engine"),
        ("leave `antialias`=False out", "leave --no-antialias out"),
        ("`clip`=-1,1", "--clip=-1,1"),
        ("`limit` 0", "--max 0"),
        ("sigma, and `sigmas` of others, and `a b`", "sigma, and `sigmas` of others, and `a b`"),
    ],
)
def test_the_command_line_says_options_for_parameters_alone(message: str, typed: str) -> None:
    assert in_options(message) == typed


def test_an_error_lists_the_parameters_that_it_names_also_within_another() -> None:
    with pytest.raises(UsageError) as refused:
        Settings(method="x")  # type: ignore[arg-type]
    assert str(refused.value).startswith("`method` x is not known")
    assert refused.value.parameters == ("method",)
    assert DensePureError(f"here: {refused.value}, `n` and `n`").parameters == ("method", "n")
