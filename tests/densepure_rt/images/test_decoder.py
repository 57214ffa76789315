"""A real child process, given pictures, bombs, and a decoder that misbehaves."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from PIL import Image

from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.images import decoder
from densepure_rt.images.decoder import Decoder
from densepure_rt.images.formats import Shape
from densepure_rt.images.uploads import fitted
from tests.support.pictures import COLOUR, GOOD, GREY, file_of, noise, scan_bomb


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Decoder]]:
    """Makes a decoder; fault: Python that is run in it first, with its module as `d`."""
    made: list[Decoder] = []

    def make(fault: str = "") -> Decoder:
        boot = decoder.BOOT.replace("from", f"import densepure_rt.images.decoder as d\n{fault}\nfrom", 1)
        monkeypatch.setattr(decoder, "BOOT", boot)
        made.append(Decoder())
        return made[-1]

    yield make
    for each in made:
        each.end()


def pid_of(each: Decoder) -> int:
    assert each._child is not None
    return each._child.pid


def test_pixels_and_words_are_those_of_this_process(child: Callable[..., Decoder]) -> None:
    each = child()
    pictures = [
        GOOD,
        file_of(Image.fromarray(noise(60, 90, 3)), "JPEG"),
        file_of(Image.fromarray(np.arange(2**16, dtype=np.uint16).reshape(256, 256))),
    ]
    for content in pictures:
        for shape in (GREY, COLOUR):
            found, expected = each.fitted(content, shape), fitted(content, shape)
            np.testing.assert_array_equal(found.pixels, expected.pixels)
            assert found.changes == expected.changes
    with pytest.raises(UsageError, match="the picture is not PNG, JPEG, BMP, WEBP"):
        each.fitted(b"<svg/>", GREY)
    assert each.fitted(GOOD, GREY).changes == ()  # by the same child
    assert each.usable


def test_a_picture_that_takes_too_long_ends_its_decoder_and_each_picture_has_all_of_the_time(
    child: Callable[..., Decoder],
) -> None:
    each = child("d.CPU_SECONDS = 1; import densepure_rt.images.formats as i; i.MOST_SCANS = 10**9")
    slow = scan_bomb(4000, 70)
    began, took = os.times().children_user, 0.0
    for _ in range(3):
        each.fitted(slow, GREY)
    with pytest.raises(UsageError, match="takes more than 10 s of a processor to decode"):
        each.fitted(scan_bomb(5000, 2000), GREY)
    took = os.times().children_user - began
    assert 1.5 < took < 6  # the child's, which has been waited for: more than one picture's time, and far from 40 s
    assert not each.usable


def test_a_picture_that_takes_too_much_memory_is_refused_and_the_decoder_goes_on(
    child: Callable[..., Decoder],
) -> None:
    each = child("d.MEMORY = 64 * 2**20")
    with pytest.raises(UsageError, match="takes more than 768 MiB of memory to decode: save it smaller"):
        each.fitted(file_of(Image.new("RGBA", (5000, 5000))), GREY)
    assert each.fitted(GOOD, GREY).changes == ()


@pytest.mark.parametrize("idle", [True, False])
def test_it_can_be_killed_whatever_it_does(child: Callable[..., Decoder], idle: bool) -> None:
    each = child("d.fitted = lambda *_: d.time.sleep(3600)" if not idle else "")
    said: list[Any] = []

    def ask() -> None:
        with pytest.raises(UsageError, match="its decoder ended") as caught:
            each.fitted(GOOD, GREY)
        said.append(caught.value)

    if idle:
        each.fitted(GOOD, GREY)
    asking = threading.Thread(target=ask)
    if not idle:
        asking.start()
        while each._child is None:
            time.sleep(0.01)
        time.sleep(0.3)
    began = time.monotonic()
    each.kill()
    if idle:
        asking.start()
    asking.join(10)
    assert len(said) == 1
    assert time.monotonic() - began < 5
    with pytest.raises(ProcessLookupError):
        os.kill(pid_of(each), 0)


def test_it_outlives_a_ctrl_c_in_its_terminal_and_not_its_server(child: Callable[..., Decoder]) -> None:
    each = child()
    each.fitted(GOOD, GREY)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid_of(each), number)
    each.fitted(GOOD, GREY)
    assert os.getpgid(pid_of(each)) != os.getpgid(0)
    assert each._child is not None
    assert each._child.stdin is not None
    with closing(each._child.stdin):
        pass
    assert each._child.wait(timeout=10) == 0  # as when a server is killed: its end of the pipe is closed


@pytest.mark.parametrize(
    "fault",
    [
        "d.packed = lambda *_: d.ANSWER.pack(b'p', 2**31) + bytes(100)",
        "d.packed = lambda *_: d.ANSWER.pack(b'p', 9) + b'not JSON.'",
        "d.answer = lambda *_: d.os._exit(7)",
        "d.answer = lambda *_: d.os.kill(d.os.getpid(), d.signal.SIGSEGV)",
    ],
)
def test_a_decoder_that_is_broken_into_can_say_nothing_but_pixels(child: Callable[..., Decoder], fault: str) -> None:
    each = child(fault)
    with pytest.raises(UsageError, match="the picture cannot be decoded: its decoder ended"):
        each.fitted(GOOD, GREY)
    assert not each.usable


def test_one_that_cannot_be_started_is_this_machines_fault(child: Callable[..., Decoder]) -> None:
    with pytest.raises(EnvironmentFault, match="ended when it was started: look at the memory"):
        child("raise MemoryError").fitted(GOOD, GREY)


def test_it_imports_nothing_from_the_working_directory(
    child: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for name in ("numpy", "PIL", "json", "densepure_rt"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    shape: Shape = GREY
    assert child().fitted(GOOD, shape).changes == ()
