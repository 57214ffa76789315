"""Pipes, devices and huge files in place of each file that is read by its name: refused, and never waited for."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from densepure_rt.files import MOST_BYTES, Kind, UnfitFile, check, content, opened, sha256_of, text
from densepure_rt.runtime.bundle import shipped_engine
from tests.support.cli import densepure_rt as cli

TINY = ("--max", 1, "--steps", 0, "--n", 100, "--sigma", 0.1, "--batch", 16, "--threads", 1)
SECONDS = 60  # after which a test counts as hung
UNFIT = re.compile("a named pipe|a device")


@pytest.fixture(autouse=True)
def not_for_ever() -> Iterator[None]:
    """Ends what waits for a pipe, with an error."""

    def hung(number: int, frame: object) -> None:
        raise AssertionError(f"it hangs: {SECONDS} s have passed")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**43)  # bytes, all of them a hole


def test_a_regular_file_is_read_whole_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("ä\r\n".encode())
    (tmp_path / "b").symlink_to("a")
    assert content(tmp_path / "b", "key") == "ä\r\n".encode()
    assert text(tmp_path / "a", "key") == "ä\r\n"
    digest = "5ad159cc49cbfe06591e21ee69ed64a5490544ab8d0f7afe8afe06ff88a4d4b6"  # printf 'ä\r\n' | sha256sum
    assert sha256_of(tmp_path / "a", "key") == digest


@pytest.mark.parametrize(
    ("make", "why"), [(fifo, "a named pipe"), (endless, "a device"), (Path.mkdir, "a folder"), (huge, "more than any")]
)
@pytest.mark.parametrize("kind", MOST_BYTES)
def test_what_is_no_regular_file_or_larger_than_its_kind_is_refused_unread(
    tmp_path: Path, kind: Kind, make: Callable[[Path], None], why: str
) -> None:
    try:
        make(tmp_path / "f")
    except OSError:
        pytest.skip("this file system holds no such file")
    for read in (check, opened, content, text, sha256_of):
        with pytest.raises(UnfitFile, match=why):
            read(tmp_path / "f", kind)


def test_a_file_that_holds_more_than_it_says_is_read_whole() -> None:
    """A file of /proc says that it is empty."""
    listed = Path("/proc/self/environ")
    if not listed.exists():
        pytest.skip("there is no /proc")
    assert content(listed, "sidecar") == listed.read_bytes() != b""


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("certified") / "run"
    assert cli("certify", *TINY, "--quiet", "--out", out).returncode == 0
    return out


@pytest.mark.parametrize("make", [fifo, endless])
def test_no_file_of_a_run_folder_is_waited_for(certified: Path, tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Whatever a command needs of it is one error; what it does not, it leaves alone."""
    for name in sorted(file.name for file in certified.iterdir()):
        run = Path(shutil.copytree(certified, tmp_path / name))
        (run / name).unlink()
        make(run / name)
        of_a_report = ("manifest.json", "results.jsonl", "timing.jsonl", "summary.json")
        for command, needed in (
            (["audit", run], name != "secret.key"),
            (["report", run, "--out", tmp_path / "r.html"], name in of_a_report),
            (["replay", run, "--image", 0], name in (*of_a_report, "ledger.sqlite", "secret.key")),
            (["certify", *TINY, "--quiet", "--out", run], True),
        )[: None if make is fifo else 1]:
            done = cli(*command)
            refused = done.returncode != 0 and UNFIT.search(done.stdout + done.stderr) is not None
            assert refused == needed, (name, command, done)


@pytest.mark.parametrize("make", [fifo, endless])
def test_no_file_that_is_named_or_found_in_a_folder_is_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    for folder in ("labels", "classes/3", "sets", "arrays"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copytree(shipped_engine().parent, tmp_path / "bundle")
    (tmp_path / "bundle" / "unet.onnx.json").unlink()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "classes" / "3" / "good.png")
    np.save(tmp_path / "arrays" / "0.5-0-0-n0_predictions.npy", np.zeros(4, np.int64))
    pictures = ("images", "images.npz", "train-images-idx3-ubyte", "a.bin", "a.png", "classes/3/bad.png")
    tables = ("labels/labels.csv", "sets/x.dat", "arrays/0.5-0-0-n_predictions.npy", "log.tsv")
    for name in (*pictures, *tables, "key", "bundle/unet.onnx.json"):
        make(tmp_path / name)
    named = [tmp_path / name for name in (*pictures[:5], "labels", "classes", "sets")]
    commands: list[tuple[Any, ...]] = [
        ("certify", *TINY, "--out", tmp_path / "out", "--key", tmp_path / "key"),
        *(("predict", *TINY, "--images", images) for images in named),
        ("predict", "--engine", tmp_path / "bundle" / "unet.onnx"),
        ("inspect", tmp_path / "bundle" / "unet.onnx"),
        ("import", tmp_path / "log.tsv"),
        ("import", tmp_path / "arrays"),
    ]
    for command in commands:
        done = cli(*command)
        # One picture of several that cannot be read fails alone.
        assert done.returncode in (2, 3) or "1 image of" in done.stderr, (command, done)
        assert UNFIT.search(done.stderr), (command, done.stderr)
        assert done.stderr.count("error:") == 1, (command, done.stderr)


def test_nothing_is_written_through_a_link_of_a_foreign_folder(certified: Path, tmp_path: Path) -> None:
    """As a name that a run writes next, or a picture of a replay."""
    run, kept = Path(shutil.copytree(certified, tmp_path / "run")), tmp_path / "kept"
    kept.write_text("mine")
    names = ["results.tsv", "results.jsonl", "timing.jsonl", "summary.json", "seal.json"]
    (run / "replay-0-0").mkdir()
    for link in (*(run / f"{name}.new" for name in names), run / "replay-0-0" / "noisy.png"):
        link.symlink_to(kept)
    assert cli("certify", *TINY, "--quiet", "--out", run).returncode == 0
    assert cli("replay", run, "--image", 0).returncode == 0
    assert kept.read_text() == "mine"
    assert cli("audit", run).returncode == 0
