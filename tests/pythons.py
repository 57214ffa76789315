"""`make test-pythons`: the demo and the default tests, without the heavy packages, on every Python that is found.

Each has a virtual environment of its own, without torch, onnx and Ray. Test files that import what is not there are
skipped and counted; fewer tests than a floor are a failure.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("python3.10", "python3.11", "python3.12", "python3.13", "python3.14")
EXTRAS = "cpu,report,serve"
TOOLS = (
    "build",
    "hypothesis",
    "jsonschema",
    "mpmath",
    "pytest",
    "pytest-xdist",
    "setuptools",
    "tomli; python_version < '3.11'",
    "tritonclient[http]; python_version >= '3.11' or platform_machine != 'aarch64'",
)
FLOOR = 1800  # tests that pass on each, of the 2,100 that are collected


def interpreters() -> dict[str, Path]:
    """By name, the Pythons on the path, and those that pyenv keeps."""
    found: dict[str, Path] = {}
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for name in NAMES:
        here = shutil.which(name)
        beside = sorted(kept.glob(f"{name.removeprefix('python')}.*/bin/{name}"))
        for path in ([Path(here)] if here else []) + beside:
            # pyenv's shims stand for versions that are not chosen, too
            if not subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True).returncode:
                found[name] = path
                break
    return found


def installed(name: str, python: Path, pip_flags: Sequence[str]) -> Path:
    """The interpreter of this Python's environment, made where it is not there."""
    venv = ROOT / ".venv-pythons" / name
    run([python, "-m", "venv", venv])
    pip: list[str | Path] = [
        venv / "bin" / "python",
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "-qq",
        *pip_flags,
    ]
    run([*pip, "--constraint", ROOT / "constraints.txt", "--editable", f"{ROOT}[{EXTRAS}]", *TOOLS])
    return venv / "bin" / "python"


def run(command: Sequence[str | Path]) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


def demo(python: Path, out: Path) -> bool:
    """`make demo` with this Python."""
    shutil.rmtree(out, ignore_errors=True)
    words = ["certify", "--max", "10", "--sigma", "0.25", "--seed", "1", "--out", str(out), "--quiet"]
    return subprocess.run([python.parent / "densepure-rt", *words], cwd=ROOT).returncode == 0


def suite(python: Path, jobs: int, extra: Sequence[str]) -> tuple[bool, str]:
    """The default tests: whether they passed, and in what numbers."""
    spread = ["-n", str(jobs), "--dist", "loadfile", "--no-loadscope-reorder"]
    command: list[str | Path] = [python, "-m", "pytest", "--light", "-q", *spread, *extra]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    *_, last = done.stdout.splitlines() or [""]
    passed = re.search(r"(\d+) passed", last)
    if done.returncode:
        print(done.stdout)
    if not passed or int(passed[1]) < FLOOR:
        return False, f"{last}: fewer than {FLOOR} passed"
    return done.returncode == 0, last


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.pythons", description=__doc__)
    parser.add_argument("--demo-only", action="store_true", help="not the tests")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--pip-flags", default="")
    parser.add_argument("--only", default="", help="names such as python3.10, with commas between")
    options, extra = parser.parse_known_args()
    found = interpreters()
    if options.only:
        found = {name: found[name] for name in options.only.split(",")}
    if not found:
        print(f"none of {', '.join(NAMES)} is on the path or in pyenv: install one", file=sys.stderr)
        return 1
    lines, passed = [], True
    for name, interpreter in found.items():
        python = installed(name, interpreter, options.pip_flags.split())
        ran = demo(python, ROOT / "runs" / "pythons" / name)
        lines.append(f"{name}: demo {'ok' if ran else 'FAILS'}")
        if not options.demo_only:
            well, numbers = suite(python, options.jobs, extra)
            ran &= well
            lines[-1] += f"; tests {'ok' if well else 'FAIL'}, {numbers}"
        passed &= ran
    print("\n".join(lines))
    missing = [name for name in NAMES if name not in found]
    print(f"not found here: {', '.join(missing) or 'none'}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
