"""However a command is ended, and whenever: the same command again leaves the bytes of one that was never ended.

The commands run as processes of their own, forked from one that has imported everything, so that many fit into a test.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from densepure_rt import signals
from densepure_rt.runs.ledger import NAME, Ledger
from tests.support.cli import code_without, environment
from tests.support.cli import densepure_rt as cli

if sys.platform == "win32":
    pytest.skip("signals are others there", allow_module_level=True)

ENDS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["densepure_rt.cli", "densepure_rt.smoothing.classifier", "densepure_rt.runs.merge", "onnxruntime"]
)
# Cheap images, some of which take long: the classifier alone, at little noise.
OPTIONS = "--steps 0 --sigma 0.1 --radii 0,0.05,0.1 --n 400 --batch 8 --threads 1 --max 6 --quiet".split()


def run(arguments: list[str], said: Path) -> None:
    """`densepure-rt ARGUMENTS`, what it says in a file; the file is there once the command is about to start."""
    from densepure_rt.cli import main

    for number in signals.ASKING:
        signal.signal(number, signal.SIG_DFL)
    sys.stdout = sys.stderr = said.open("w", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    sys.argv = ["densepure-rt", *arguments]
    main()


class Started:
    """A command under way."""

    def __init__(self, arguments: list[object], said: Path) -> None:
        self.said = said
        said.unlink(missing_ok=True)
        self.process = FORKS.Process(target=run, args=(list(map(str, arguments)), said))
        self.process.start()
        self.wait_for(said.exists)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while not condition() and self.process.is_alive():
            assert time.monotonic() < until, "nothing happened"
            time.sleep(0.001)

    def send(self, number: signal.Signals) -> None:
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def end(self) -> int:
        """Wait for it to end. Returns its exit code; of a signal that ended it at once, the number below zero."""
        self.process.join(600)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"it does not end: {self.said.read_text()}")
        return self.process.exitcode


class Case(NamedTuple):
    """arguments: of the command that makes the folder; begin: what is there before; kept: what its bytes come to."""

    arguments: Callable[[Path], list[object]]
    begin: Callable[[Path], object]
    kept: Callable[[Path], object]


def files_of(folder: Path) -> dict[str, bytes]:
    found = (file for file in folder.rglob("*") if file.is_file() and not file.name.endswith(".new"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in found if ".export-" not in str(file)}


def of_a_run(*names: str) -> Callable[[Path], object]:
    """The bytes of some files of a run, and the labels and records of its ledger."""

    def kept(folder: Path) -> object:
        with Ledger(folder / NAME, read_only=True) as ledger:
            done = [(image.place, image.idx, image.labels().tolist(), image.record) for image in ledger.done()]
        return [(folder / name).read_bytes() for name in names], done

    return kept


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A keyed run, and two shards."""
    folder = tmp_path_factory.mktemp("made")
    assert Started(["--version"], folder / "said").end() == 0  # the first fork waits for imports
    assert cli("certify", *OPTIONS, "--max", 2, "--out", folder / "run").returncode == 0
    for shard in ("1/2", "2/2"):
        out = folder / f"shard-{shard[0]}"
        assert cli("certify", *OPTIONS, "--seed", 3, "--shard", shard, "--out", out).returncode == 0
    return folder


def cases(made: Path) -> dict[str, Case]:
    def nothing(folder: Path) -> None:
        pass

    of_results = of_a_run("results.jsonl", "summary.json")
    merged = of_a_run("results.tsv", "results.jsonl", "timing.jsonl", "summary.json")
    return {
        "certify": Case(lambda out: ["certify", *OPTIONS, "--seed", 3, "--out", out], nothing, of_results),
        "merge": Case(lambda out: ["merge", made / "shard-1", made / "shard-2", "--out", out], nothing, merged),
        "reveal": Case(
            lambda out: ["reveal", out],
            lambda out: shutil.copytree(made / "run", out),
            lambda out: {name: kept for name, kept in files_of(out).items() if not name.startswith(NAME)},
        ),
        "export": Case(lambda out: ["export", "--target", "triton", "--force", "--out", out], nothing, files_of),
        "export from PyTorch": Case(lambda out: ["export", "--force", "--out", out], nothing, files_of),
    }


NAMES = ("certify", "merge", "reveal", "export")
SLOW = [pytest.param(name, 20, marks=pytest.mark.slow) for name in NAMES]
SLOW.append(pytest.param("export from PyTorch", 3, marks=pytest.mark.slow))  # takes 35 s of CPU


@pytest.mark.parametrize(("name", "times"), [*((name, 3) for name in NAMES), *SLOW])
def test_whatever_ends_a_command_at_any_moment_the_same_command_leaves_the_same_bytes(
    made: Path, tmp_path: Path, name: str, times: int
) -> None:
    case, said, chance = cases(made)[name], tmp_path / "said", random.Random(times)
    folders = (tmp_path / f"{name}-{number}" for number in itertools.count())

    def fresh() -> Path:
        out = next(folders)
        case.begin(out)
        return out

    def ended(out: Path) -> int:
        return Started(case.arguments(out), said).end()

    began = time.monotonic()
    assert ended(whole := fresh()) == 0, said.read_text()
    seconds, expected = time.monotonic() - began, case.kept(whole)
    out, codes = fresh(), []
    for number in chance.sample(ENDS * times, len(ENDS) * times):
        running = Started(case.arguments(out), said)
        time.sleep(chance.random() * seconds)
        running.send(number)
        codes.append(running.end())
        assert codes[-1] in (0, -number, 128 + number), (number, said.read_text())
        assert not re.search("Traceback|Exception ignored|damaged", said.read_text()), said.read_text()
        if codes[-1] == 0:  # it was done before
            assert case.kept(out) == expected
            out = fresh()
    assert ended(out) == 0, said.read_text()
    assert case.kept(out) == expected
    assert any(codes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_that_is_asked_to_end_sums_up_what_it_has_and_exits_as_shells_expect(
    tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    arguments = ["certify", *OPTIONS, "--seed", 3, "--max", 400, "--out", out]
    running = Started(arguments, tmp_path / "said")
    table = out / "results.tsv"
    running.wait_for(lambda: table.exists() and table.read_text().count("\n") > 1)
    running.send(number)
    assert running.end() == 128 + number
    said = (tmp_path / "said").read_text()
    done = table.read_text().count("\n") - 1
    assert f"certified accuracy of {done} image" in said
    assert f"stopped after {done} of 400 images" in said
    assert '"interrupted": true' in (out / "summary.json").read_text()
    assert [file.name for file in out.glob(f"{NAME}*")] == [NAME]  # all in one file


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """Wherever it is: here it handles the first one for ever."""
    code = (
        "import time; from densepure_rt.signals import asking_to_end\n"
        "with asking_to_end():\n"
        "    try: print('ready', flush=True); time.sleep(60)\n"
        "    except KeyboardInterrupt: print('first', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "first\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT


def test_a_signal_that_compiled_code_swallows_is_heard_after_it() -> None:
    """As pydantic does: here it comes while an object is let go of, where no error can be raised."""
    code = (
        "import os, signal, time; from densepure_rt import signals\n"
        "class Last:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGTERM); [None for _ in range(9)]\n"
        "with signals.asking_to_end():\n"
        "    try: one = Last(); del one; print(signals.swallowed()); time.sleep(60)\n"
        "    except KeyboardInterrupt: print(signals.swallowed(), signals.exit_code())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\nFalse 143\n", "")


def test_a_signal_that_was_ignored_before_stays_ignored() -> None:
    """As under nohup."""
    code = (
        "import os, signal; from densepure_rt import signals\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with signals.asking_to_end():\n"
        "    signals.listen()\n"
        "    os.kill(os.getpid(), signal.SIGHUP); print('heard nothing', flush=True)\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except KeyboardInterrupt: print(signals.exit_code(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGHUP); print('nor now', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stdout) == (0, "heard nothing\n143\nnor now\n")


def test_nohup_keeps_a_command_from_hearing_that_its_terminal_is_gone(tmp_path: Path) -> None:
    command = [
        "nohup",
        sys.executable,
        "-c",
        code_without(),
        "certify",
        *OPTIONS,
        "--seed",
        "3",
        "--out",
        tmp_path / "r",
    ]
    with subprocess.Popen(list(map(str, command)), env=environment(), stdout=-3, stderr=-3) as process:
        table, until = tmp_path / "r" / "results.tsv", time.monotonic() + 60
        while not table.exists() and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGHUP)
        assert process.wait(120) == 0
    assert (tmp_path / "r" / "seal.json").exists()
