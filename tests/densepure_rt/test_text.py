"""What others wrote into sidecars, manifests and names of files steers no terminal, breaks no table and fits UTF-8."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densepure_rt.runs.layout import read_manifest
from densepure_rt.runtime.bundle import shipped_engine
from densepure_rt.text import all_printable, numbered, printable, tsv_cell
from tests.support.cli import Done, in_a_process
from tests.support.cli import densepure_rt as cli

HOSTILE = ["\ud800x", "a\tb\nc", "\x1b]0;owned\x07", "\x9b31m", "\u202egnp.exe", "\u2028", "T\u00e4sche", "7", "8", "9"]
TINY = ("--max", 2, "--steps", 0, "--n", 100, "--sigma", 0.1, "--seed", 1, "--batch", 16, "--threads", 1)
STEERING = set("\x1b\x07\x9b\r\u2028\u202e\ud800\0")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("T-shirt/top", "T-shirt/top"),
        ("T\u00e4sche \u65e5\u672c \U0001f45c", "T\u00e4sche \u65e5\u672c \U0001f45c"),
        ("a\tb\nc\r\0", "a\\tb\\nc\\r\\x00"),
        ("\x1b]0;x\x07\x9b", "\\x1b]0;x\\x07\\x9b"),
        ("\ud800x", "\\ud800x"),
        ("\udcff", "\\udcff"),
        ("\u2028\u202e\u061c", "\\u2028\\u202e\\u061c"),
    ],
)
def test_what_steers_is_written_out_and_the_rest_stays(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_fits_utf_8_and_one_line_and_is_changed_once(text: str) -> None:
    shown = printable(text)
    assert shown.encode("utf-8").decode() == printable(shown) == shown
    assert len(f"{shown}.".splitlines()) == 1
    assert "\t" not in shown


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_is_one_cell_of_a_table_also_for_a_reader_of_quotes(text: str) -> None:
    for quotes in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        line = f"{tsv_cell(text)}\t1"
        assert list(csv.reader([line], delimiter="\t", quoting=quotes)) == [line.split("\t")]
    assert not set("\t\r\n\"'") & set(tsv_cell(text))


def test_an_image_is_spoken_of_by_its_number_and_its_name() -> None:
    assert (numbered(7, None), numbered(7, "a\tb.png")) == ("7", "7 (a\\tb.png)")


@given(
    st.recursive(st.none() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_all_text_in_json_is_made_printable(value: object) -> None:
    shown = json.dumps(all_printable(value), ensure_ascii=False)
    assert printable(shown) == shown


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped bundle, its classes named by an attacker. Returns the engine's path."""
    folder = tmp_path_factory.mktemp("hostile") / "bundle"
    shutil.copytree(shipped_engine().parent, folder)
    sidecar = folder / "classifier.onnx.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"class_names": HOSTILE}))
    return folder / "unet.onnx"


def fit_to_show(done: Done) -> bool:
    return not STEERING & set(done.stdout + done.stderr)


def test_class_names_break_no_table_and_steer_no_terminal(bundle: Path, tmp_path: Path) -> None:
    done = cli("predict", "--engine", bundle, *TINY, "--skip", 1)
    assert (done.returncode, fit_to_show(done)) == (0, True), done.stderr
    assert {len(row) for row in csv.reader(done.stdout.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)} == {8}
    done = cli("predict", "--engine", bundle, *TINY, "--json")
    assert fit_to_show(done)
    assert [set(json.loads(line)["votes"]) <= set(map(printable, HOSTILE)) for line in done.stdout.splitlines()] == [
        True
    ] * 2
    for command in (
        ("inspect", bundle.with_name("classifier.onnx")),
        ("inspect", bundle.with_name("classifier.onnx"), "--json"),
        ("certify", "--engine", bundle, *TINY, "--out", tmp_path / "run"),
        ("audit", tmp_path / "run"),
        ("replay", tmp_path / "run", "--image", 0, "--engine", bundle),
        ("report", tmp_path / "run", "--out", tmp_path / "r.html"),
    ):
        done = cli(*command)
        assert (done.returncode, fit_to_show(done)) == (0, True), (command, done.stderr)
    assert read_manifest(tmp_path / "run").identity.class_names == tuple(map(printable, HOSTILE))
    assert not STEERING & set((tmp_path / "r.html").read_text(encoding="utf-8"))


def test_what_a_foreign_manifest_says_steers_no_terminal(bundle: Path, tmp_path: Path) -> None:
    """Nor what its ledger says, nor the images beside it are called."""
    run = tmp_path / "run"
    assert cli("certify", *TINY, "--out", run).returncode == 0
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["identity"] |= {"processor": "\x1b]0;owned\x07", "class_names": HOSTILE[1:] + ["0"]}
    manifest["identity"] |= {"precision": "\x1b[31m\u202e", "tie_rule": "\x9b31m\u2066"}
    manifest["provenance"] |= {"host": "\x1b[2J", "argv": ["a\x9bb"]}
    manifest["identity_sha256"] = "0" * 64
    (run / "manifest.json").write_text(json.dumps(manifest))
    for command in (
        ("audit", run),
        ("replay", run, "--image", 0),
        ("compare", run, run),
        ("report", run, "--also", "svg,md", "--out", tmp_path / "r.html"),
    ):
        done = cli(*command)
        assert fit_to_show(done), (command, done)
    for name, holds in (("r.html", r"\x1b[31m\u202e"), ("r.md", r"\\x1b\[31m\\u202e"), ("r.svg", "")):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert holds in text
        assert {c for c in text if c != "\n" and printable(c) != c} == set()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode elsewhere")
def test_a_folder_whose_name_is_no_unicode_can_be_certified_into_audited_reported_and_compared(tmp_path: Path) -> None:
    """Through a pipe, which takes UTF-8 alone."""
    run = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe\x1b")
    log = tmp_path / "log"
    assert in_a_process("certify", *TINY, "--out", run, "--log-json", log).returncode == 0
    assert [json.loads(line)["level"] for line in log.read_text(encoding="utf-8").splitlines()].count("info") == 4
    for command in (
        ("audit", run),
        ("report", run, "--also", "png,svg,md", "--out", f"{run}/r.html"),
        ("compare", run, run),
        ("certify", *TINY, "--sigma", 0.2, "--out", run),
        ("reveal", run),
    ):
        done = in_a_process(*command)
        assert done.returncode == (2 if command[0] in ("certify", "reveal") else 0), (command, done.stderr)
        assert fit_to_show(done)
