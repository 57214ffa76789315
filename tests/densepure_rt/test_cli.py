from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from densepure_rt import __version__
from tests.support.bundles import ENGINES
from tests.support.cli import (
    DRY,
    ROOT,
    TINY,
    Done,
    cli,
    code_without,
    commands,
    environment,
    in_a_process,
    one_line,
    refused,
)

COMMANDS = (
    "certify",
    "predict",
    "serve",
    "export",
    "parity",
    "bench",
    "report",
    "compare",
    "merge",
    "audit",
    "replay",
    "reveal",
    "import",
    "inspect",
    "doctor",
)


# help and version


def test_the_commands_are_these() -> None:
    assert tuple(commands()) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_every_option_has_help(name: str) -> None:
    command = commands()[name]
    assert len(command.help) > 20
    for parameter in command.params:
        assert parameter.help, f"{name} {parameter.name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_on_the_help_page(
    here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    done = here(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    page = one_line(done.stdout)
    for parameter in commands()[name].params:
        assert one_line(parameter.help) in page


def test_help_needs_no_engine_library() -> None:
    assert cli("certify", "--help", without=("onnxruntime", "torch", "onnx", "scipy")).returncode == 0


def test_version_prints_the_version_alone() -> None:
    done = in_a_process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def test_without_a_command_the_commands_are_listed() -> None:
    done = in_a_process()
    for name in COMMANDS:
        assert name in done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["--nonsense"], ["nonsense"], ["certify", "--nonsense"], ["inspect"]])
def test_what_is_not_known_exits_2(arguments: list[str]) -> None:
    done = in_a_process(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage" in done.stderr


def test_the_help_of_export_names_the_extra() -> None:
    assert "densepure-rt[export]" in cli("export", "--help").stdout


# a machine that lacks something


@pytest.mark.parametrize("command", ["certify", "predict"])
def test_without_onnxruntime_the_exit_is_3_with_the_pip_command(command: str) -> None:
    refused(cli(command, *TINY, without=("onnxruntime",)), 3, "ONNX Runtime", "pip install 'densepure-rt[cpu]'")


def test_export_refuses_weights_that_a_plan_alone_would_not_use(tmp_path: Path) -> None:
    done = cli("export", "--target", "tensorrt-rtx", "--weights", tmp_path, "--out", tmp_path / "engines")
    refused(done, 2, "--weights", "add onnx to --target")


@pytest.mark.parametrize("package", ["torch", "onnx"])
def test_export_without_its_packages_exits_3_with_the_pip_command(tmp_path: Path, package: str) -> None:
    pytest.importorskip("ml_dtypes", reason="onnx is not installed, so that another package is named")
    done = cli("export", "--out", tmp_path / "engines", without=(package,))
    refused(done, 3, package, "pip install 'densepure-rt[cpu,export]'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["export", "parity", "bench"])
def test_without_any_of_its_packages_a_command_asks_for_pytorch(tmp_path: Path, command: str) -> None:
    done = cli(command, cwd=tmp_path, without=("torch", "ml_dtypes", "onnx", "diffusers"))
    refused(done, 3, f"{command} needs PyTorch, and torch is not installed", "pip install 'densepure-rt[cpu,export]'")


def test_certify_and_predict_need_neither_torch_nor_onnx() -> None:
    without = ("torch", "onnx", "diffusers", "safetensors", "matplotlib")
    assert cli(*DRY, "--max", 1, "--n", 20, without=without).returncode == 0
    assert cli("predict", *TINY, "--max", 1, without=without).returncode == 0


# output that cannot be written

FULL = Path("/dev/full")
RUN = ROOT / "tests" / "data" / "run-of-0.1.0"
SAYING = (["--help"], ["--version"], ["inspect", str(ENGINES / "unet.onnx")], ["audit", str(RUN), "--json"])


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("command", [*SAYING, ["predict", *TINY, "--max", "1"]], ids=lambda command: command[0])
def test_output_that_cannot_be_written_is_one_error_and_exit_code_3(command: list[str]) -> None:
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code_without(), *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            timeout=120,
        )
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("error: cannot write the output (No space left on device)")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="a working directory cannot be removed elsewhere")
def test_a_working_directory_that_is_gone_is_not_taken_for_output_that_cannot_be_written(tmp_path: Path) -> None:
    code = f"import os; os.chdir({str(tmp_path)!r}); os.rmdir({str(tmp_path)!r}); {code_without()}"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", "run"], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert (done.returncode, done.stderr) == (3, "error: No such file or directory\n")


def test_a_command_without_a_stderr_keeps_its_table_clean(tmp_path: Path) -> None:
    """As `densepure-rt predict 2>&-`."""
    command = [sys.executable, "-c", code_without(), "predict", *map(str, TINY), "--max", "2"]
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    done = subprocess.run(shell, stdout=subprocess.PIPE, text=True, env=environment(), timeout=120)
    assert done.returncode == 0
    assert [line.count("\t") for line in done.stdout.splitlines()] == [7, 7, 7]
