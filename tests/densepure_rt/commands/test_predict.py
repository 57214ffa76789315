from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, stats

from tests.support.bundles import ENGINES
from tests.support.cli import ROOT, TINY, Done, cli, code_without, environment, started


def predicted(*options: object) -> list[list[str]]:
    done = cli("predict", *TINY, *options)
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert header == "idx\tlabel\tpredict\tcorrect\tname\tvotes\terror_bound\tfile"
    return [line.split("\t") for line in lines]


def test_predict_prints_a_table_of_labels() -> None:
    names = json.loads((ENGINES / "classifier.onnx.json").read_text())["class_names"]
    shipped = np.load(ROOT / "densepure_rt" / "data" / "fashion_mnist_test.npz")
    rows = predicted("--max", 3, "--skip", 2)
    assert [int(row[0]) for row in rows] == shipped["index"][:6:2].tolist()
    assert [int(row[1]) for row in rows] == shipped["y"][:6:2].tolist()
    for _, label, predict, correct, name, *_ in rows:
        assert name == ("abstain" if predict == "-1" else names[int(predict)])
        assert correct == str(int(label == predict))


def test_predict_answers_the_same_for_the_same_seed() -> None:
    options = ("predict", *TINY, "--n", 12, "--max", 2, "--json", "--seed")
    first, second = (cli(*options, 5).stdout for _ in range(2))
    assert first == second
    assert len(first.splitlines()) == 2


def evidence(votes: int, n: int) -> float:
    prior = stats.beta(0.5, 0.5)
    mean, _ = integrate.quad(lambda p: prior.pdf(p) * (2 * p) ** votes * (2 * (1 - p)) ** (n - votes), 0.5, 1)
    return float(mean / prior.sf(0.5))


def test_predict_as_json_says_how_sure_it_is_and_the_test_can_be_repeated() -> None:
    """The bound against the definition of the evidence: the likelihood ratio to 1/2, averaged over Beta(1/2, 1/2)."""
    done = cli("predict", *TINY, "--n", 40, "--max", 3, "--json", "--sigma", 1.0)
    assert done.returncode == 0
    names = json.loads((ENGINES / "classifier.onnx.json").read_text())["class_names"]
    for line in done.stdout.splitlines():
        found = json.loads(line)
        assert list(found) == ["idx", "label", "predict", "error_bound", "n", "votes", "file"]
        assert sum(found["votes"].values()) == found["n"] <= 40
        if found["predict"] is None:
            assert found["error_bound"] is None
            continue
        most = found["votes"][names[found["predict"]]]
        assert most == max(found["votes"].values())
        assert found["error_bound"] == pytest.approx(2 / evidence(most, found["n"]), rel=1e-4)
        assert found["error_bound"] <= 0.2


def test_predict_abstains_with_minus_1_where_n_leaves_it_open() -> None:
    """Two votes can never give a class more than half of all at 0.001."""
    for row in predicted("--n", 2, "--alpha", 0.001, "--max", 2):
        assert row[2:5] == ["-1", "0", "abstain"]
        assert row[6] == "-"


def test_thirteen_votes_that_agree_are_a_prediction() -> None:
    (row,) = predicted("--n", 100, "--alpha", 0.001, "--max", 1, "--sigma", 0.1, "--seed", 1)
    assert row[5:] == [
        "13/13",
        "0.00079",
        "fashion_mnist_test.npz:0",
    ]  # 2 / E, with E = 2540 by the closed form for 13 of 13


def test_an_image_without_a_label_is_predicted_neither_right_nor_wrong(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1), dtype=np.uint8)
    np.savez(tmp_path / "grey.npz", x=grey)
    for n, alpha in ((2, 0.001), (6, 0.49)):  # all abstained, and most answered
        for row in predicted("--images", tmp_path / "grey.npz", "--n", n, "--alpha", alpha):
            assert row[1] == "-"
            assert row[3] == "-"


# options


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--n", "0"], "n"), (["--alpha", "2"], "alpha"), (["--alpha=-1"], "alpha"), (["--sigma", "0"], "sigma")],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_an_impossible_option_of_predict_exits_2(here: Callable[..., Done], options: list[str], word: str) -> None:
    done = here("predict", *TINY, "--max", 1, *options)
    assert done.returncode == 2, done.stdout
    assert word in done.stderr


# signals and pipes


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is sent in another way there")
def test_ctrl_c_ends_predict_with_a_message_and_130() -> None:
    with started("predict", *TINY, "--max", 400) as running:
        assert running.stdout
        running.stdout.readline()
        running.stdout.readline()
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=180)
    assert running.returncode == 130
    assert "Traceback" not in stderr
    assert "stopped" in stderr or "interrupted" in stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end in another way there")
def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    """As `densepure-rt predict | head -1`."""
    with started("predict", *TINY, "--max", 20) as running:
        assert running.stdout
        assert running.stderr
        assert running.stdout.readline().startswith("idx")
        running.stdout.close()
        stderr = running.stderr.read()
        running.wait(180)
    assert running.returncode == 141  # 128 + SIGPIPE, as of other programs
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr


def test_labels_reach_a_file_while_a_terminal_shows_the_bar(tmp_path: Path) -> None:
    """As `densepure-rt predict > labels.tsv`, typed at a terminal."""
    pty = pytest.importorskip("pty", reason="pseudo-terminals are a POSIX matter")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", code_without(), "predict", *TINY, "--max", "2"]
    with (tmp_path / "labels.tsv").open("w") as out:
        subprocess.run(
            command, stdout=out, stderr=theirs, env=environment() | {"TERM": "xterm"}, check=True, timeout=60
        )
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert len((tmp_path / "labels.tsv").read_text().splitlines()) == 3
    assert "2/2" in shown
