"""`densepure-rt` in this process, for tests of what a command says and leaves: a process of its own costs a second.

Where the process is what is tested (exit codes, pipes, packages that are missing), `in_a_process` starts one.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from densepure_rt.cli import app, main

ROOT = Path(__file__).resolve().parents[2]
DRY = "certify --dry-run --steps 1 --batch 4 --threads 1".split()
TINY = "--n 6 --alpha 0.2 --steps 1 --batch 4 --threads 1".split()
Done = subprocess.CompletedProcess[str]


def densepure_rt(*arguments: object, cwd: Path | None = None) -> Done:
    """What `densepure-rt ARGUMENTS` does. Raises what it would show a traceback of."""
    out, err = io.StringIO(), io.StringIO()
    code: str | int | None = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["densepure-rt", *map(str, arguments)])
        patch.setenv("COLUMNS", "300")
        if cwd is not None:
            patch.chdir(cwd)
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return Done(list(map(str, arguments)), int(code or 0), out.getvalue(), err.getvalue())


def in_a_process(*arguments: object, cwd: Path | None = None, without: tuple[str, ...] = ()) -> Done:
    """The same in a fresh interpreter that cannot import the packages `without`."""
    command = [sys.executable, "-c", code_without(*without), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=cwd, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command under way; it is killed when the block ends, however that comes about."""
    command = [sys.executable, "-u", "-c", code_without(), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment(), **pipes) as running:  # type: ignore[call-overload]
        try:
            yield running
        finally:
            running.kill()


def code_without(*packages: str) -> str:
    return f"import sys; sys.modules.update(dict.fromkeys({packages!r})); from densepure_rt.cli import main; main()"


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}


def cli(*arguments: object, cwd: Path | None = None, without: tuple[str, ...] = ()) -> Done:
    """`densepure-rt ARGUMENTS`; in a fresh interpreter only when that cannot import the packages `without`."""
    return in_a_process(*arguments, cwd=cwd, without=without) if without else densepure_rt(*arguments, cwd=cwd)


def refused(done: Done, code: int, *words: str) -> None:
    """One error message that holds `words`, nothing on stdout, and this exit code."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == errors[0]
    for word in words:
        assert word in errors[0]


def commands() -> dict[str, Any]:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return dict(group.commands)


def one_line(text: str) -> str:
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def edit_sidecar(engine: Path, **fields: object) -> None:
    sidecar = Path(f"{engine}.json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | fields))
