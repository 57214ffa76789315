"""A folder of downloaded data may hold files that are named like modules: no command imports from it."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import code_without, environment
from tests.test_house import imports

ROOT = Path(__file__).resolve().parent.parent
OLD_RUN = ROOT / "tests" / "data" / "run-of-0.1.0"
RUN = Path("run-of-0.1.0")
TINY = ("--steps", 0, "--max", 1, "--n", 32, "--threads", 1)
COMMANDS: dict[str, tuple[object, ...]] = {
    "certify": ("certify", *TINY, "--seed", 1, "--out", "run"),
    "predict": ("predict", *TINY),
    "audit": ("audit", RUN),
    "report": ("report", RUN, "--also", "png,svg,md", "--out", "r.html"),
    "compare": ("compare", RUN, RUN),
    "replay": ("replay", RUN, "--image", 0, "--out", "replayed"),
    "reveal": ("reveal", RUN),
    "merge": ("merge", RUN, "--out", "merged"),
    "import": ("import", RUN / "results.tsv"),
    "inspect": ("inspect", ROOT / "engines" / "unet.onnx"),
    "doctor": ("doctor",),
    "export": ("export", "--unet", "nowhere", "--out", "exported"),
    "parity": ("parity", "--engine", "nowhere.onnx"),
    "bench": ("bench", "--engine", "nowhere.onnx"),
    "serve": ("serve", "--engine", "nowhere.onnx"),
}


QUICK = ("certify", "report", "export", "serve")  # each has imports that others lack


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module of each name that the project imports; each of them says that it was imported."""
    folder = tmp_path_factory.mktemp("planted")
    sources = [file for room in ("densepure_rt", "runtime", "export") for file in (ROOT / room).glob("**/*.py")]
    names = {name for file in sources for name in imports(ast.parse(file.read_text()))}
    assert {"pydantic", "numpy", "onnxruntime", "torch", "ray", "json"} <= names
    for name in names | {"sitecustomize", "usercustomize"}:
        (folder / f"{name}.py").write_text(f"raise SystemExit('planted {name} was imported')\n")
    shutil.copytree(OLD_RUN, folder / RUN)  # a command may write to it
    return folder


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=() if name in QUICK else pytest.mark.slow, id=name)
        for name, command in COMMANDS.items()
    ],
)
def test_no_command_imports_from_the_working_directory(planted: Path, command: tuple[object, ...]) -> None:
    """As its script starts: with the script's folder on the path, not the working directory."""
    script = planted.parent / "scripts" / "densepure-rt"
    script.parent.mkdir(exist_ok=True)
    script.write_text(code_without())
    done = subprocess.run(
        [sys.executable, script, *map(str, command)],
        cwd=planted,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "planted" not in (done.stdout + done.stderr).replace(str(planted), "")
    assert "Traceback" not in done.stderr
