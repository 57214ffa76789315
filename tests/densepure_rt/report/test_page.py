"""The page as a browser sees it: names that are attacks, and what it asks of the network."""

from __future__ import annotations

import http.server
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from densepure_rt.report.gallery import Shown
from densepure_rt.report.page import page
from densepure_rt.report.summary import report_of
from densepure_rt.runs.reader import read_run
from densepure_rt.runs.records import ImagesIdentity
from densepure_rt.smoothing.replay import Replayed
from tests.support.html import Seen, attacks, inert
from tests.support.runs import SEQUENTIAL, Made, make_run, record_of

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()


class Listener(NamedTuple):
    """A server on this machine, and the paths that it was asked for."""

    address: str
    asked: list[str]


@pytest.fixture
def listener() -> Iterator[Listener]:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Listener(f"http://127.0.0.1:{server.server_address[1]}", asked)
        server.shutdown()


def hostile_page(tmp_path: Path, address: str) -> tuple[str, tuple[str, ...]]:
    names = attacks(address)
    run = make_run(
        tmp_path / "run",
        (Made(0.3), Made(0.3, predict=1), Made(None), Made(0.5, label=2, predict=2)),
        rule=SEQUENTIAL,
        argv=names,
        class_names=names,
        precision=names[0],
        tie_rule=names[1],
        images=ImagesIdentity(9, "b" * 64),
    )
    read = read_run(run)
    return page([report_of(read, name) for name in names]), names


def browsed(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    profile = path.parent / "profile"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *arguments, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_names_are_text(tmp_path: Path) -> None:
    text, names = hostile_page(tmp_path, "http://example.invalid")
    seen = inert(text)
    for name in names:
        assert seen.text.count(name) > 1


def test_names_in_a_gallery_are_text(tmp_path: Path) -> None:
    names = attacks("http://example.invalid")
    pixels = np.zeros((1, 2, 2), np.uint8)
    made = [Made(0.3, label=i, predict=i) for i in range(len(names))]
    report = report_of(read_run(make_run(tmp_path / "run", made, class_names=names)), names[0])
    gallery = [
        Shown(record_of(i, each), pixels, Replayed(pixels, (pixels,), (i,), 1, i)) for i, each in enumerate(made)
    ]
    text = page([report], gallery)
    seen = Seen(text)
    pictures = [attributes for tag, attributes in seen.tags if tag == "img"]
    assert [each["alt"] for each in pictures] == [word for name in names for word in (name, "with noise", name)]
    assert all(set(each) == {"src", "alt"} and str(each["src"]).startswith("data:image/png;") for each in pictures)
    assert {tag for tag, _ in seen.tags}.isdisjoint({"script", "iframe", "image", "link", "object", "embed"})
    for i, name in enumerate(names):
        assert f"Image {i}: certified {name} within 0.299. Ballot: {name} 1; decided: {name}." in seen.text


def test_the_page_forbids_itself_scripts_and_the_network(tmp_path: Path) -> None:
    text, _ = hostile_page(tmp_path, "http://example.invalid")
    policies = [attributes for tag, attributes in Seen(text).tags if tag == "meta" and "http-equiv" in attributes]
    assert policies == [
        {
            "http-equiv": "Content-Security-Policy",
            "content": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        }
    ]


@BROWSER
def test_a_browser_runs_nothing_and_asks_for_nothing(tmp_path: Path, listener: Listener) -> None:
    """Without the page's own policy too, so that escaping alone is what holds."""
    text, names = hostile_page(tmp_path, listener.address)
    unguarded = re.sub('<meta http-equiv="Content-Security-Policy".*?>', "", text)
    assert unguarded != text
    for version in (text, unguarded):
        path = tmp_path / "report.html"
        path.write_text(version)
        done = browsed(path, "--dump-dom", "--enable-logging=stderr", "--virtual-time-budget=2000")
        seen = Seen(done.stdout)
        assert seen.text.lstrip().startswith(f"Certified robustness: {', '.join(names)}\n")  # the title
        assert "CONSOLE" not in done.stderr
    assert listener.asked == []


@BROWSER
def test_the_listener_would_have_noticed(tmp_path: Path, listener: Listener) -> None:
    path = tmp_path / "report.html"
    path.write_text("".join(attacks(listener.address)[:2]))
    browsed(path, "--dump-dom", "--virtual-time-budget=2000")
    assert "/script" in listener.asked


@BROWSER
@pytest.mark.parametrize("flags", [(), ("--force-dark-mode",)], ids=["light", "dark"])
def test_a_page_is_light_or_dark_as_its_reader_likes(tmp_path: Path, flags: tuple[str, ...]) -> None:
    path = tmp_path / "report.html"
    path.write_text(page([report_of(read_run(make_run(tmp_path / "a", [Made(0.5), Made(None)])), "a")]))
    browsed(path, f"--screenshot={tmp_path / 'x.png'}", "--window-size=700,900", *flags)
    with Image.open(tmp_path / "x.png") as picture:
        red, green, blue = picture.convert("RGB").getpixel((5, 5))
    assert (red, green, blue) == ((0x14, 0x19, 0x1F) if flags else (255, 255, 255))
