"""The checks on a GPU, in an environment that fits the driver found there: `make test-gpu`, and `make pack-gpu`.

`run` installs, checks, and leaves one report to send back. It fails where nothing could be installed, where a check
fails, and where there is a GPU and no plan was run. `pack` writes what it needs in parts, for a machine that has no
network.
Uses the standard library; `pack` also uv, as tests/installs.py does.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from densepure_rt.errors import EnvironmentFault
from densepure_rt.runtime import gpu
from densepure_rt.runtime.machine import TEGRA, tensorrt_extra

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ".venv-gpu"
REPORT = Path("runs") / "gpu-report.txt"
NO_GPU, NO_PLAN, WRONG_BOX = 3, 4, 5  # exit codes beside pytest's
TESTS = ("tests/gpu", "tests/runtime/test_gpu.py")
PINS = {12: "constraints-cuda12.txt", 13: "constraints.txt"}
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # what TensorRT-RTX 1.7 builds for
JSON_BELOW = "---- the same for programs ----"  # in the report
PLAN_RAN = "Counts of two runs"  # a finding that only a plan that was executed leaves
INSTALLED = "DENSEPURE_GPU_INSTALLED"  # the environment variable that tells the report what could be installed
NAME = "densepure-rt-gpu"
SCRIPT = """#!/bin/sh
# On the machine with the GPU:  cat {name}.tar.* | tar x && sh {name}/test-gpu.sh
# It needs {python} with venv, and no network. It ends in {name}/{report}: send that back.
cd "$(dirname "$0")" && exec "${{PYTHON:-{python}}}" -m tests.gpu_box run --wheels wheels "$@"
"""


@dataclass(frozen=True)
class Box:
    """What an environment has to fit: machine, Python such as "3.12", CUDA of the driver, compute capability."""

    machine: str
    python: str
    cuda: int
    capability: str
    jetson: bool = False


@dataclass(frozen=True)
class Step:
    """Extras that are installed together; nothing works without one that is `needed`."""

    extras: tuple[str, ...]
    needed: bool = False


def box_here() -> Box:
    """Return what this machine is. Raises EnvironmentFault without a GPU."""
    here = gpu.find()
    python = "{}.{}".format(*sys.version_info)
    return Box(platform.machine(), python, min(13, here.cuda_major), here.compute_capability, TEGRA.exists())


def steps_for(box: Box, torch: bool = False) -> tuple[Step, ...]:
    """Return what is installed on a box, in this order. torch: PyTorch too, as a baseline: gigabytes."""
    baseline = (Step(("export",)),) if torch else ()
    if box.jetson:  # JetPack has TensorRT; ONNX Runtime for its GPU is not on PyPI
        return (Step(("cpu", tensorrt_extra(box.cuda), "gpu-box"), True), *baseline)
    if box.machine != "x86_64" and box.cuda < 13:  # no TensorRT, lean or not, and no ONNX Runtime for the GPU
        return (Step(("cpu", "tensorrt-jetpack6", "gpu-box"), True), *baseline)
    runtime = "cpu" if (box.machine, box.python) == ("aarch64", "3.10") else f"gpu-cu{box.cuda}"
    first = Step((runtime, f"tensorrt-lean-cu{box.cuda}", "gpu-box"), True)
    others = [Step((f"tensorrt-cu{box.cuda}",))]
    if box.machine == "x86_64" and box.capability in RTX_CAPABILITIES:
        others.append(Step(("tensorrt-rtx",)))
    return (first, *others, *baseline)


def venv_command(box: Box, python: str, environment: Path) -> list[str]:
    return [python, "-m", "venv", *(["--system-site-packages"] if box.jetson else []), str(environment)]


def install_command(box: Box, step: Step, environment: Path, wheels: Path | None, flags: Sequence[str]) -> list[str]:
    """Return pip's command for a step, with the pins of the driver's CUDA. A Jetson's TensorRT fits no pins."""
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", *flags]
    if wheels is not None:
        command += ["--no-index", "--find-links", str(wheels)]
    pins = [] if box.jetson else ["--constraint", PINS[box.cuda]]
    return [*command, *pins, "--editable", f".[{','.join(step.extras)}]"]


def install(box: Box, options: argparse.Namespace, environment: Path) -> dict[str, str] | None:
    """Make the environment; return what came of each step, or None where one that is needed failed."""
    subprocess.run(venv_command(box, options.python, environment), check=True)
    found = {}
    for step in steps_for(box, options.torch):
        flags = options.pip_flags.split()
        done = subprocess.run(
            install_command(box, step, environment, options.wheels, flags), cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        name = ", ".join(step.extras)
        said = done.stderr.strip().splitlines()
        found[name] = "installed" if done.returncode == 0 else f"failed: {said[-1] if said else 'no message'}"
        print(f"[{name}]: {found[name]}", flush=True)
        if done.returncode and step.needed:
            print(done.stderr, file=sys.stderr)
            return None
    return found


def verdict(report: Mapping[str, Any], tests: int) -> tuple[int, str]:
    """Return the exit code and the last line, of a report and pytest's exit code."""
    if not any(finding["about"] == PLAN_RAN for finding in report["findings"]):
        none = [finding["none"] for finding in report["findings"] if finding["about"] == "Plans" and "none" in finding]
        why = next(iter(dict.fromkeys(none)), "none was asked for")
        return NO_PLAN, f"FAILED: there is a GPU, and no plan was run ({why})"
    outcomes = [check["outcome"] for check in report["checks"]]
    counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in dict.fromkeys(outcomes))
    return tests, f"{'FAILED' if tests else 'passed'}: plans were run; {counts}"


def read_report(path: Path) -> dict[str, Any]:
    """Return what a report says; nothing where it was not written."""
    found: dict[str, Any] = {"findings": [], "checks": []}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found |= json.loads(text.partition(JSON_BELOW)[2] or "{}")
    return found


def run(options: argparse.Namespace) -> int:
    """Install, check and report."""
    try:
        box = box_here()
    except EnvironmentFault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return NO_GPU
    if options.wheels is not None and (reason := misfit(options.wheels, box)):
        print(f"error: {reason}", file=sys.stderr)
        return WRONG_BOX
    environment, report = ROOT / ENVIRONMENT, ROOT / REPORT
    installed = install(box, options, environment)
    if installed is None:
        return 1
    report.unlink(missing_ok=True)
    told = {INSTALLED: json.dumps(installed), "DENSEPURE_GPU_REPORT": str(report)}
    command = [str(environment / "bin" / "python"), "-m", "pytest", "-m", "gpu", "-rs", *options.pytest_args.split()]
    done = subprocess.run([*command, *TESTS], cwd=ROOT, env=os.environ | told)
    code, line = verdict(read_report(report), done.returncode)
    if report.exists():
        report.write_text(f"{line}\n\n" + report.read_text(encoding="utf-8"), encoding="utf-8")
        print(f"wrote {REPORT}: please send it back", flush=True)
    print(line, file=sys.stderr if code else sys.stdout)
    return code


def misfit(wheels: Path, box: Box) -> str | None:
    """Say why packed wheels do not fit this box, or None."""
    packed = Box(**json.loads((wheels / "box.json").read_text(encoding="utf-8")))
    differ = [
        f"{name} {getattr(packed, name)}, here is {getattr(box, name)}"
        for name in ("machine", "python", "cuda")
        if getattr(packed, name) != getattr(box, name)
    ]
    move = f"pack again with --python {box.python} --cuda {box.cuda} --machine {box.machine}"
    return f"the wheels are for {'; '.join(differ)}: {move}" if differ else None


class Parts(io.RawIOBase):
    """A file that is written in parts of a size: NAME.001, NAME.002 and so on."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size, self.left = path, size, 0
        self.paths: list[Path] = []
        self.hashes: list[Any] = []
        self.part: io.BufferedWriter | None = None

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        rest = memoryview(content).cast("B")
        total = len(rest)
        while rest:
            if not self.left:
                self.next_part()
            assert self.part is not None
            taken = rest[: self.left]
            self.part.write(taken)
            self.hashes[-1].update(taken)
            self.left -= len(taken)
            rest = rest[len(taken) :]
        return total

    def next_part(self) -> None:
        if self.part is not None:
            self.part.close()
        self.paths.append(self.path.with_name(f"{self.path.name}.{len(self.paths) + 1:03}"))
        self.hashes.append(hashlib.sha256())
        self.part, self.left = self.paths[-1].open("wb"), self.size

    def close(self) -> None:
        if self.part is not None and not self.closed:
            self.part.close()
            sums = [f"{each.hexdigest()}  {path.name}\n" for path, each in zip(self.paths, self.hashes, strict=True)]
            self.path.with_name("SHA256SUMS").write_text("".join(sums), encoding="ascii")
        super().close()


def write_parts(files: Mapping[str, Path], out: Path, part_size: int) -> list[Path]:
    """Write files, by their names in the archive, as parts of a tar. part_size: bytes."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"{NAME}.tar.*"):
        old.unlink()
    parts = Parts(out / f"{NAME}.tar", part_size)
    # Wheels are compressed already.
    with parts, tarfile.open(fileobj=parts, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(files):
            archive.add(files[name], f"{NAME}/{name}", recursive=False)
    return parts.paths


def tracked_files() -> list[str]:
    """Return the files of the checkout that git does not ignore, without the data of tests that need no GPU."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = (name for name in done.stdout.split("\0") if name and not name.startswith("tests/data/"))
    return [name for name in names if os.path.lexists(ROOT / name)]


def pack(options: argparse.Namespace) -> int:
    """Fetch the wheels of a box, and write them with the checkout and a script in parts."""
    box = Box(options.machine, options.python_version, options.cuda, options.capability)
    files = {name: ROOT / name for name in tracked_files()}
    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder) / "wheels"
        wheels.mkdir()
        fetch(box, options.uv, wheels)
        (wheels / "box.json").write_text(json.dumps(asdict(box)), encoding="utf-8")
        script = Path(folder) / "test-gpu.sh"
        script.write_text(SCRIPT.format(name=NAME, python=f"python{box.python}", report=REPORT), encoding="utf-8")
        files |= {f"wheels/{path.name}": path for path in wheels.iterdir()} | {script.name: script}
        parts = write_parts(files, options.out, options.part_size * 2**20)
    size = sum(path.stat().st_size for path in parts)
    print(f"wrote {len(parts)} parts, {size / 2**20:.0f} MiB, to {options.out}; on the machine with the GPU:")
    print(f"cat {NAME}.tar.* | tar x && sh {NAME}/test-gpu.sh")
    return 0


def fetch(box: Box, uv: Path, wheels: Path) -> None:
    """Download the wheels of the steps that are needed; TensorRT itself comes from NVIDIA's index alone."""
    from tests.installs import PLATFORMS, SOURCE_ALONE, compile_command, wheels_only

    extras = [
        extra for step in steps_for(box) if step.needed or step.extras == ("tensorrt-rtx",) for extra in step.extras
    ]
    command = compile_command(str(uv), extras, ROOT / PINS[box.cuda])
    command += [*wheels_only(), "--python-version", box.python, "--python-platform", PLATFORMS[box.machine]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    pins = [line for line in done.stdout.splitlines() if line]
    own = [pin for pin in pins if pin.partition("==")[0] in SOURCE_ALONE]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    tags = [f"manylinux_2_{glibc}_{box.machine}" for glibc in (35, 34, 28, 27, 24, 17, 12, 5)]
    others = ["--python-version", box.python, *(word for tag in tags for word in ("--platform", tag))]
    binary = ["download", "--no-deps", "--only-binary", ":all:", *others, "--dest", str(wheels)]
    subprocess.run([*pip, *binary, *(pin for pin in pins if pin not in own), "setuptools>=77", "wheel"], check=True)
    if own:  # packages without code, which name the others
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), *own], check=True)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_box", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ran = commands.add_parser("run")
    ran.add_argument("--python", default=sys.executable, help="for the environment")
    ran.add_argument("--wheels", type=Path, help="a folder of wheels in place of the network")
    ran.add_argument("--torch", action="store_true", help="PyTorch as a baseline: gigabytes")
    ran.add_argument("--pip-flags", default="")
    ran.add_argument("--pytest-args", default="")
    packed = commands.add_parser("pack")
    packed.add_argument("--part-size", type=int, default=1000, help="MiB")
    packed.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-pack")
    packed.add_argument("--cuda", type=int, choices=sorted(PINS), default=13, help="of the driver there")
    packed.add_argument("--python", dest="python_version", default="{}.{}".format(*sys.version_info), help="there")
    packed.add_argument("--machine", choices=("x86_64", "aarch64"), default="x86_64")
    packed.add_argument("--capability", default="8.9", help="of the GPU there: RTX is packed for those that it knows")
    packed.add_argument("--uv", type=Path, default=Path(shutil.which("uv") or "uv"))
    return parser.parse_args(words)


def main() -> int:
    options = arguments()
    return run(options) if options.command == "run" else pack(options)


if __name__ == "__main__":
    raise SystemExit(main())
