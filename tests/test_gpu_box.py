"""What `make test-gpu` does on boxes that are not here: what it installs, when it fails, and how it is packed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from densepure_rt.errors import EnvironmentFault
from densepure_rt.runtime import machine
from tests import gpu_box
from tests.gpu_box import (
    INSTALLED,
    JSON_BELOW,
    NAME,
    NO_GPU,
    NO_PLAN,
    PLAN_RAN,
    ROOT,
    WRONG_BOX,
    Box,
    Step,
    arguments,
    install_command,
    misfit,
    pack,
    read_report,
    run,
    steps_for,
    tracked_files,
    venv_command,
    verdict,
    write_parts,
)
from tests.installs import extras

H100, RTX_4090 = Box("x86_64", "3.12", 13, "9.0"), Box("x86_64", "3.10", 12, "8.9")
ORIN, THOR = Box("aarch64", "3.10", 12, "8.7", True), Box("aarch64", "3.12", 13, "11.0", True)
GRACE, OLD_GRACE = Box("aarch64", "3.12", 13, "9.0"), Box("aarch64", "3.12", 12, "9.0")


@pytest.mark.parametrize(
    ("box", "needed", "tried"),
    [
        (H100, ("gpu-cu13", "tensorrt-lean-cu13", "gpu-box"), ["tensorrt-cu13"]),
        (dataclasses.replace(H100, cuda=12), ("gpu-cu12", "tensorrt-lean-cu12", "gpu-box"), ["tensorrt-cu12"]),
        (RTX_4090, ("gpu-cu12", "tensorrt-lean-cu12", "gpu-box"), ["tensorrt-cu12", "tensorrt-rtx"]),
        (ORIN, ("cpu", "tensorrt-jetpack6", "gpu-box"), []),
        (THOR, ("cpu", "tensorrt-jetpack7", "gpu-box"), []),
        (GRACE, ("gpu-cu13", "tensorrt-lean-cu13", "gpu-box"), ["tensorrt-cu13"]),
        (OLD_GRACE, ("cpu", "tensorrt-jetpack6", "gpu-box"), []),
    ],
)
def test_the_environment_fits_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, box: Box, needed: tuple[str, ...], tried: list[str]
) -> None:
    monkeypatch.setattr(machine, "TEGRA", tmp_path if box.jetson else tmp_path / "none")
    first, *others = steps_for(box)
    assert first == Step(needed, True)
    assert [extra for step in others for extra in step.extras] == tried
    assert not any(step.needed for step in others)
    assert {extra for step in steps_for(box, torch=True) for extra in step.extras} <= set(extras())
    assert steps_for(box, torch=True)[-1].extras == ("export",)


def test_a_jetson_sees_the_tensorrt_of_jetpack_and_no_pins() -> None:
    assert "--system-site-packages" in venv_command(ORIN, "python3", Path("env"))
    assert "--system-site-packages" not in venv_command(H100, "python3", Path("env"))
    assert "--constraint" not in install_command(ORIN, Step(("cpu",)), Path("env"), None, [])


def test_pins_are_those_of_the_drivers_cuda_and_packed_wheels_need_no_network() -> None:
    command = install_command(RTX_4090, Step(("gpu-cu12", "gpu-box")), Path("env"), Path("wheels"), ["--no-cache-dir"])
    assert command[command.index("--constraint") + 1] == "constraints-cuda12.txt"
    assert command[command.index("--find-links") + 1] == "wheels"
    assert {"--no-index", "--no-cache-dir"} <= set(command)
    assert command[-1] == ".[gpu-cu12,gpu-box]"


def a_report(*findings: dict[str, Any], outcomes: tuple[str, ...] = ("passed", "skipped")) -> dict[str, Any]:
    return {"findings": list(findings), "checks": [{"outcome": outcome} for outcome in outcomes]}


def test_checks_without_a_plan_fail_though_none_of_them_did() -> None:
    none = {"about": "Plans", "flavour": "tensorrt", "none": "tensorrt cannot be imported"}
    assert verdict(a_report(none), 0) == (
        NO_PLAN,
        "FAILED: there is a GPU, and no plan was run (tensorrt cannot be imported)",
    )
    assert verdict(a_report(), 0)[0] == verdict(a_report(), 1)[0] == NO_PLAN


@pytest.mark.parametrize(("tests", "word"), [(0, "passed"), (1, "FAILED")])
def test_with_a_plan_the_checks_decide(tests: int, word: str) -> None:
    ran = {"about": PLAN_RAN, "flavour": "tensorrt"}
    assert verdict(a_report(ran, outcomes=("passed", "skipped", "passed")), tests) == (
        tests,
        f"{word}: plans were run; 2 passed, 1 skipped",
    )


def test_the_report_is_one_file_that_programs_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.gpu import report

    monkeypatch.setenv(report.WHERE, str(tmp_path / "report.txt"))
    monkeypatch.setenv(INSTALLED, json.dumps({"tensorrt-cu13": "failed: no network"}))
    machine = {"findings": [{"what": "NVIDIA GPU", "found": "an H100"}]}
    done = subprocess.CompletedProcess([], 0, json.dumps(machine), "")
    monkeypatch.setattr(report, "densepure_rt", lambda *arguments: done)
    found = report.Report.begin()
    found.add(PLAN_RAN, flavour="tensorrt", equal=True)
    assert [path.name for path in tmp_path.iterdir()] == ["report.txt"]
    text, _, below = (tmp_path / "report.txt").read_text().partition(JSON_BELOW)
    assert "NVIDIA GPU: an H100" in text
    assert "[tensorrt-cu13]: failed: no network" in text
    assert read_report(tmp_path / "report.txt") == json.loads(below)
    assert read_report(tmp_path / "report.txt")["findings"] == [
        {"about": PLAN_RAN, "flavour": "tensorrt", "equal": True}
    ]
    assert read_report(tmp_path / "none.txt") == {"findings": [], "checks": []}


class Commands:
    """Stands for `subprocess.run` on a box with a GPU: `tensorrt-cu13` cannot be had, and pytest reports no plan."""

    def __init__(self, findings: list[dict[str, Any]], cannot: str = "tensorrt-cu13") -> None:
        self.findings, self.cannot = findings, cannot
        self.told: list[list[str]] = []

    def __call__(self, command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        self.told.append(command)
        failed = "install" in command and f"[{self.cannot}" in command[-1]
        if "pytest" in command:
            content = {"findings": self.findings, "checks": [{"outcome": "passed"}]}
            path = Path(more["env"]["DENSEPURE_GPU_REPORT"])
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"the findings\n{JSON_BELOW}\n{json.dumps(content)}\n")
            assert "failed: no such wheel" in more["env"]["DENSEPURE_GPU_INSTALLED"]
        return subprocess.CompletedProcess(command, int(failed), "", "a warning\nno such wheel\n" if failed else "")


@pytest.mark.parametrize(("findings", "code"), [([], NO_PLAN), ([{"about": PLAN_RAN}], 0)])
def test_where_tensorrt_cannot_be_had_the_rest_is_run_and_the_end_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, findings: list[dict[str, Any]], code: int
) -> None:
    commands = Commands(findings)
    monkeypatch.setattr(gpu_box, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_box, "box_here", lambda: H100)
    monkeypatch.setattr(subprocess, "run", commands)
    assert run(arguments(["run"])) == code
    assert [command[-1] for command in commands.told[1:3]] == [
        ".[gpu-cu13,tensorrt-lean-cu13,gpu-box]",
        ".[tensorrt-cu13]",
    ]
    assert commands.told[-1][1:4] == ["-m", "pytest", "-m"]
    first = (tmp_path / "runs" / "gpu-report.txt").read_text().splitlines()[0]
    assert first.startswith("FAILED: there is a GPU, and no plan" if code else "passed: plans were run")


def test_nothing_is_checked_where_the_first_step_cannot_be_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = Commands([], cannot="gpu-cu13")
    monkeypatch.setattr(gpu_box, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_box, "box_here", lambda: H100)
    monkeypatch.setattr(subprocess, "run", commands)
    assert run(arguments(["run"])) == 1
    assert len(commands.told) == 2


def test_without_a_gpu_nothing_is_installed_and_the_exit_code_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        gpu_box.box_here()
    except EnvironmentFault:
        assert run(arguments(["run"])) == NO_GPU
        assert "no NVIDIA GPU here" in capsys.readouterr().err
    else:
        pytest.skip("there is a GPU here")


def test_it_begins_with_nothing_but_the_standard_library() -> None:
    blocked = ("numpy", "pydantic", "pytest", "rich", "scipy", "typer")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules.update(dict.fromkeys({blocked!r}))"
    subprocess.run([sys.executable, "-I", "-c", f"{code}; import tests.gpu_box"], check=True)


def test_packed_wheels_for_another_box_are_refused_with_the_command_that_packs_the_right_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "box.json").write_text(json.dumps(dataclasses.asdict(H100)))
    assert misfit(tmp_path, dataclasses.replace(H100, capability="8.0")) is None
    monkeypatch.setattr(gpu_box, "box_here", lambda: RTX_4090)
    assert run(arguments(["run", "--wheels", str(tmp_path)])) == WRONG_BOX
    said = capsys.readouterr().err
    assert "the wheels are for python 3.12, here is 3.10; cuda 13, here is 12" in said
    assert "pack again with --python 3.10 --cuda 12 --machine x86_64" in said


def test_parts_hold_the_archive_and_no_more_than_their_size(tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "link").symlink_to("a")
    out = tmp_path / "out"
    out.mkdir()
    (out / f"{NAME}.tar.009").write_bytes(b"of an earlier archive")
    parts = write_parts({"wheels/a": tmp_path / "a", "link": tmp_path / "link"}, out, 100_000)
    assert [path.name for path in parts] == [f"{NAME}.tar.{number:03}" for number in range(1, len(parts) + 1)]
    assert sorted(path.name for path in out.iterdir()) == ["SHA256SUMS", *(path.name for path in parts)]
    assert all(path.stat().st_size == 100_000 for path in parts[:-1])
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    (tmp_path / "joined").write_bytes(b"".join(path.read_bytes() for path in parts))
    with tarfile.open(tmp_path / "joined") as archive:
        assert archive.getnames() == [f"{NAME}/link", f"{NAME}/wheels/a"]
        found = archive.extractfile(f"{NAME}/wheels/a")
        assert found is not None
        assert found.read() == content
        assert archive.getmember(f"{NAME}/link").issym()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no checkout")
def test_what_is_packed_is_the_checkout_the_wheels_and_a_script_that_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fetch(box: Box, uv: Path, wheels: Path) -> None:
        (wheels / "a-1-py3-none-any.whl").write_bytes(b"a wheel")

    monkeypatch.setattr(gpu_box, "fetch", fetch)
    words = ["pack", "--part-size", "1", "--out", str(tmp_path), "--cuda", "12", "--python", "3.10"]
    assert pack(arguments(words)) == 0
    subprocess.run(f"cat {NAME}.tar.* | tar x", shell=True, cwd=tmp_path, check=True)
    root = tmp_path / NAME
    assert set(tracked_files()) <= {path.relative_to(root).as_posix() for path in root.rglob("*")}
    assert (root / "wheels" / "a-1-py3-none-any.whl").read_bytes() == b"a wheel"
    assert json.loads((root / "wheels" / "box.json").read_text())["cuda"] == 12
    if a_gpu_is_here():
        pytest.skip("there is a GPU here: the script would install and run")
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": ""}
    done = subprocess.run(
        ["sh", str(root / "test-gpu.sh")], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, "no NVIDIA GPU here" in done.stderr) == (NO_GPU, True), done.stderr


def a_gpu_is_here() -> bool:
    try:
        gpu_box.box_here()
    except EnvironmentFault:
        return False
    return True
