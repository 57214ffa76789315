"""`densepure-rt import` as a user calls it."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from densepure_rt.cli import main
from densepure_rt.legacy.folder import FILES
from tests.support.cli import cli, one_line
from tests.support.legacy import DDS, GOOD, label_arrays

Called = tuple[int, str, str]
Call = Callable[..., Called]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`densepure-rt import ARGUMENTS` in this process: exit code, stdout, stderr."""

    def called(*arguments: object) -> Called:
        monkeypatch.setattr(sys, "argv", ["densepure-rt", "import", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return called


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    return label_arrays(tmp_path / "arrays")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.tsv"
    path.write_text(GOOD)
    return path


def test_a_log_is_shown_as_printed_and_as_sound(call: Call, log: Path) -> None:
    code, out, err = call(log, "--sigma", 0.25, "--n", 10_000)
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert lines["as"] == "as printed 66.6 % 66.6 % 66.6 % 0.0 % 0.0 %".split()
    assert lines["sound"] == "sound 66.6 % 66.6 % 33.3 % 0.0 % -".split()
    assert "no radius beyond 0.7997 can be certified" in out
    assert "note    rounding: 1 image (0): certified at 0.5 only if" in out


def test_what_is_unsound_ends_with_1_and_its_name(call: Call, log: Path) -> None:
    log.write_text(DDS)
    code, out, err = call(log)
    assert (code, err) == (1, f"error: {log} claims what it does not bear out: correct column\n")
    assert "running total" in out
    assert "reach           not checked: give --sigma and --n" in out
    code, _, err = call(log, "--sigma", 0.12, "--n", 100_000)
    assert (code, err.rpartition(": ")[2]) == (1, "correct column, beyond reach\n")


def test_json_is_one_object_beside_the_exit_code(call: Call, log: Path) -> None:
    log.write_text(DDS)
    code, out, _ = call(log, "--json", "--radii", "0,0.5")
    found = json.loads(out)
    assert code == 1
    assert found["accuracy"] == {"0": pytest.approx(2 / 3), "0.5": pytest.approx(1 / 3)}
    assert found["accuracy_as_printed"] == {"0": pytest.approx(2 / 3), "0.5": pytest.approx(2 / 3)}
    assert [flag["name"] for flag in found["flags"]] == ["correct column", "rounding"]
    assert (found["images"], found["abstained"], found["reach"], found["out"]) == (3, 1, None, None)


def test_what_is_written_is_read_again_by_analyze_and_by_import(call: Call, log: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "imported"
    assert call(log, "--out", out)[0] == 0
    with (out / "results.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["radius"] for row in rows] == ["0.499", "0.0", "0.730"]  # 0.4995 and 0.7305, rounded down
    assert [int(row["correct"]) for row in rows] == [1, 0, 1]
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(record["idx"], record["predict"], record["radius"], record["printed"]) for record in records] == [
        (0, 3, pytest.approx(0.4995), "0.5"),
        (20, None, None, "0.0"),
        (40, 5, pytest.approx(0.7305), "0.731"),
    ]
    origin = json.loads((out / "imported.json").read_text())
    assert origin["sources_sha256"] == {str(log): hashlib.sha256(log.read_bytes()).hexdigest()}
    assert origin["settings"]["kind"] == "log"
    assert call(out / "results.tsv")[0] == 0
    code, _, err = call(log, "--out", out)
    assert code == 2
    assert "already holds results.tsv, results.jsonl, imported.json: choose another folder" in err


def test_a_folder_is_voted_again_and_held_against_its_own_results(call: Call, arrays: Path, tmp_path: Path) -> None:
    code, out, _ = call(arrays, "--out", tmp_path / "one")
    assert code == 0
    assert "3, 0 abstained" in out
    records = [json.loads(line) for line in (tmp_path / "one" / "results.jsonl").read_text().splitlines()]
    assert all((record["predict"], record["n0"], record["n"]) == (5, 20, 400) for record in records)
    merged = tmp_path / "merged.txt"
    lines = ["{}\t5\t5\t{:.3}\t1".format(record["idx"], record["radius"]) for record in records]
    merged.write_text("idx\tlabel\tpredict\tradius\tcorrect\n" + "\n".join(lines) + "\n")
    code, out, _ = call(arrays, "--merged", merged, "--votes", 2, "--classes", 10, "--json")
    assert json.loads(out)["settings"]["seeds"] == [0, 1]
    code, out, _ = call(arrays, "--merged", merged, "--json")
    assert (code, json.loads(out)["accuracy"]["0.25"]) == (0, 1.0)
    merged.write_text(merged.read_text().replace("20\t5\t5\t0.", "20\t5\t5\t1."))
    code, _, err = call(arrays, "--merged", merged)
    assert code == 1
    assert "radius overstated" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["absent.tsv"], "absent.tsv does not exist"),
        (["LOG", "--sigma", "0.25"], "both --sigma and --n"),
        (["LOG", "--n", "100"], "both --sigma and --n"),
        (["LOG", "--sigma", "0", "--n", "100"], "sigma is a number above 0"),
        (["LOG", "--sigma", "nan", "--n", "100"], "sigma is a number above 0"),
        (["LOG", "--sigma", "1", "--n", "0"], "at least 1"),
        (["LOG", "--alpha", "0.6"], "alpha is a probability"),
        (["LOG", "--radii", "0,a"], "--radii are numbers"),
        (["LOG", "--radii", "-1"], "--radii are numbers"),
        (["LOG", "--merged", "LOG", "--votes", "3"], "--merged, --votes: for folders of label arrays"),
        (["ARRAYS", "--n", "400"], "--n is for logs"),
        (["ARRAYS", "--classes", "0"], "--classes is a count"),
        (["ARRAYS", "--votes", "9"], "--votes is from 1 to the 3 seeds"),
        (["ARRAYS", "--sigma", "0.25"], "of sigma 0.5: choose"),
        (["ARRAYS", "--merged", "absent.txt"], "absent.txt does not exist"),
        (["."], "no label arrays"),
        (["LOG", "--out", "LOG"], "cannot write"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    call: Call, log: Path, arrays: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(arrays.parent)
    code, out, err = call(*({"LOG": log, "ARRAYS": arrays}.get(word, word) for word in arguments))
    assert (code, out) == (3 if "write" in says else 2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_labels_out_of_range_are_a_failed_check(call: Call, arrays: Path) -> None:
    code, _, err = call(arrays, "--classes", 5)
    assert code == 1
    assert "holds label 5: labels are from 0 to 4" in err


def test_it_needs_no_engine_library(log: Path) -> None:
    code = "import sys; sys.modules.update(dict.fromkeys(('onnxruntime', 'torch', 'onnx'))); "
    code += "from densepure_rt.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "import", log], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_help_names_the_files_that_it_writes() -> None:
    text = one_line(cli("import", "--help").stdout)
    assert all(name in text for name in FILES)
