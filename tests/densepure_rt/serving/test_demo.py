"""The demo page as a browser shows it, and what serves it: against the command line, the API and the noise itself."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import http.client
import io
import json
import math
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import uvicorn
from numpy.typing import NDArray
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Message

from densepure_rt.errors import EnvironmentFault
from densepure_rt.images.datasets import LabelledImage, open_images
from densepure_rt.images.uploads import MOST_BYTES
from densepure_rt.keys import seeded_secret
from densepure_rt.rounding import floored, raised
from densepure_rt.runtime.bundle import Plan
from densepure_rt.runtime.noise import image_key, smoothing_law, smoothing_noise
from densepure_rt.serving.api import Deadlines, make_app
from densepure_rt.serving.decoders import Decoders
from densepure_rt.serving.demo import Demo, answered, facts, smallest_batch
from densepure_rt.serving.origins import LOOPBACK
from densepure_rt.serving.pictures import MOST_READING, MOST_WAITING, Busy, Pictures, Turns, body
from densepure_rt.serving.service import Service
from densepure_rt.smoothing.classifier import SmoothedClassifier, load
from densepure_rt.smoothing.settings import Settings
from tests.support.browser import CHROMIUM, Tab, browser
from tests.support.cli import cli
from tests.support.html import attacks
from tests.support.pictures import file_of, noise

BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
SEED, SIGMA, N = 7, 0.25, 100
SETTINGS = Settings(sigma=SIGMA, n=N, method="radius")
BOOT = 9  # of the pictures to begin with: the first of class 9
HOSTILE = (*attacks("http://example.invalid"), "x\u202e", "", "</script>", "__proto__")
FAULTS = {400: "cannot take this", 413: "Too large for the server", 500: "has failed", 503: "is busy"}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    content: Any


class Site(NamedTuple):
    address: str
    service: Service


def ask(address: str, content: bytes | None = None, kind: str = "application/octet-stream") -> Answer:
    request = urllib.request.Request(address, content, {"Content-Type": kind} if content is not None else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return Answer(answer.status, dict(answer.headers), json.loads(answer.read()))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, dict(error.headers), json.loads(error.read()))


def failing(status: int) -> Route:
    """A model that always answers so."""

    async def infer(_: Request) -> Response:
        return JSONResponse({"error": "<b>its words</b>."}, status, {"Retry-After": "7"})

    return Route("/v2/models/{model}/infer", infer, methods=["POST"])


@pytest.fixture(scope="module")
def classifier() -> Iterator[SmoothedClassifier]:
    with load(secret=seeded_secret(SEED), batch=16, threads=1) as found:
        yield found


@pytest.fixture(scope="module")
def image() -> LabelledImage:
    images = open_images(None, (1, 28, 28), [str(label) for label in range(10)])
    return next(image for image in images if image.label == BOOT)


@pytest.fixture(scope="module")
def site(classifier: SmoothedClassifier) -> Iterator[Site]:
    """The server; at /hostile one whose classes have hostile names, at /503 and so on one whose models fail so."""
    bundle, decoders = classifier.bundle, Decoders()
    hostile = dataclasses.replace(bundle, classifier=dataclasses.replace(bundle.classifier, class_names=HOSTILE))
    with (
        load(batch=8, threads=1) as other,
        Service(classifier, SETTINGS, lambda: seeded_secret(SEED)) as service,
        Service(
            SmoothedClassifier(hostile, other.sampler), Settings(sigma=SIGMA, steps=1), lambda: other.secret
        ) as named,
    ):
        app = make_app(service, Deadlines(), True, names=LOOPBACK, decoders=decoders)
        pages = [route for route in app.routes if isinstance(route, Route) and route.path.startswith("/demo")]
        mounts = [
            Mount("/hostile", make_app(named, Deadlines(), True, decoders=decoders)),
            *(Mount(f"/{status}", routes=[failing(status), *pages]) for status in FAULTS),
            Mount("/", app),
        ]
        server = uvicorn.Server(uvicorn.Config(Starlette(routes=mounts), port=0, log_level="error", ws="none"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            assert thread.is_alive()
        yield Site(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", service)
        server.should_exit = True
        thread.join()
        decoders.close()


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A file of one grey image [1, H, W]."""
    return file_of(Image.fromarray(pixels[0]))


def pixels_of(address: str) -> NDArray[np.uint8]:
    """The grey picture in a data: address, [1, H, W]."""
    content = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)[None]


# the server


def test_the_tensor_is_the_picture_and_may_be_sent_to_the_api(site: Site, image: LabelledImage) -> None:
    found = ask(f"{site.address}/demo/image", png(image.pixels)).content
    assert found["changes"] == []
    tensor = found["input"]
    assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("image", "UINT8", [1, 1, 28, 28])
    np.testing.assert_array_equal(np.reshape(tensor["data"], (1, 28, 28)), image.pixels)
    np.testing.assert_array_equal(pixels_of(found["picture"]), image.pixels)
    body = json.dumps({"inputs": [tensor]}).encode()
    assert ask(f"{site.address}/v2/models/predict/infer", body, "application/json").status == 200


def test_what_was_done_to_a_photograph_is_said(site: Site) -> None:
    found = ask(f"{site.address}/demo/image", file_of(Image.fromarray(noise(60, 90, 3)), "JPEG"), "image/jpeg").content
    words = ["made grey", "cropped around its middle to 60 x 60", "scaled from 60 x 60 to 28 x 28"]
    assert found["changes"] == words


def test_the_samples_are_those_that_predict_counts(site: Site) -> None:
    """Their labels, tallied, are the votes of the model's answer, drawn by another device in batches of 16."""
    images = open_images(None, (1, 28, 28), [str(label) for label in range(10)])
    hard = png(next(image for image in images if image.idx == 960).pixels)  # its votes are divided
    body = json.dumps({"inputs": [ask(f"{site.address}/demo/image", hard).content["input"]]}).encode()
    outputs = ask(f"{site.address}/v2/models/predict/infer", body, "application/json").content["outputs"]
    answer = {output["name"]: output["data"] for output in outputs}
    (n,) = answer["n"]
    drawn = [
        sample
        for first in range(0, n, 10)
        for sample in ask(f"{site.address}/demo/samples?first={first}&count=10", hard).content["samples"]
    ][:n]
    assert [sample["sample"] for sample in drawn] == list(range(n))
    assert np.bincount([sample["label"] for sample in drawn], minlength=10).tolist() == answer["votes"]
    assert sum(count > 0 for count in answer["votes"]) > 1
    for sample in drawn:
        labels = [vote["label"] for vote in sample["votes"]]
        needed = sum(vote["needed"] for vote in sample["votes"])
        assert [vote["needed"] for vote in sample["votes"]] == [i < needed for i in range(5)]
        assert Counter(labels).most_common(1)[0] == (sample["label"], labels.count(sample["label"]))
        assert (needed == 3) == (len(set(labels[:3])) == 1)


def test_the_noisy_picture_is_of_the_noise_of_predict(site: Site, image: LabelledImage) -> None:
    (sample,) = ask(f"{site.address}/demo/samples?first=3&count=1", png(image.pixels)).content["samples"]
    key = image_key(seeded_secret(SEED), "predict", SIGMA, image.pixels)
    levels = image.pixels + smoothing_noise(smoothing_law(SIGMA), key, 3, image.pixels.shape)
    np.testing.assert_array_equal(pixels_of(sample["noisy"]), np.clip(levels, 0, 255))
    away = [
        np.abs(pixels_of(picture).astype(float) - image.pixels).mean()
        for picture in (sample["noisy"], *(vote["picture"] for vote in sample["votes"]))
    ]
    assert max(away[1:]) < away[0] / 2  # purification brings it back towards the picture


@pytest.mark.parametrize(
    ("path", "content", "kind", "status", "words"),
    [
        ("image", b"MZ", "", 400, "the picture is not PNG, JPEG, BMP, WEBP"),
        ("samples", b"<svg/>", "image/svg+xml", 400, "the picture is not PNG, JPEG, BMP, WEBP"),
        ("image", b"a=b", "application/x-www-form-urlencoded", 415, "application/octet-stream"),
        ("image", b"x", "multipart/form-data; boundary=x", 415, "multipart/form-data"),
        ("image", b"x", "text/plain", 415, "text/plain"),
        ("samples?count=0", b"", "", 400, "count is a number from 1 to 16, got '0'"),
        ("samples?count=17", b"", "", 400, "count is a number from 1 to 16, got '17'"),
        ("samples?count=1e3", b"", "", 400, "got '1e3'"),
        ("samples?first=-1", b"", "", 400, "first is a number from 0 to 999"),
        ("samples?first=" + "9" * 5000, b"", "", 400, "first is a number from 0 to 999"),
        ("samples?first=%F0%9F%98%80%00", b"", "", 400, "first is a number"),
    ],
)
def test_what_cannot_be_done_is_said(site: Site, path: str, content: bytes, kind: str, status: int, words: str) -> None:
    answer = ask(f"{site.address}/demo/{path}", content, kind)
    assert answer.status == status
    assert words in answer.content["error"]


@pytest.mark.parametrize("declared", [True, False])
def test_no_more_is_read_than_may_be_sent(site: Site, declared: bool) -> None:
    host, port = site.address.removeprefix("http://").split(":")
    with closing(http.client.HTTPConnection(host, int(port), timeout=60)) as connection:
        headers = {"Content-Type": "image/png", **({"Content-Length": f"{10**12}"} if declared else {})}
        parts = iter([]) if declared else iter([bytes(MOST_BYTES), b"1"])  # chunked, its end not known before
        connection.request("POST", "/demo/image", parts, headers, encode_chunked=not declared)
        answer = connection.getresponse()
        assert answer.status == 413
        assert "16,777,216 bytes" in json.loads(answer.read())["error"]


def request_of(*messages: dict[str, Any], query: str = "") -> Request:
    """A request whose client sends these messages, and then is silent."""
    waiting = list(messages)

    async def receive() -> Message:
        return waiting.pop(0) if waiting else await asyncio.Future()

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": query.encode(), "headers": []}
    return Request(scope, receive)


def demo_of(site: Site) -> Demo:
    return Demo(site.service.served, "cpu", Pictures((1, 28, 28), Decoders()))


def test_a_client_that_does_not_go_on_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("densepure_rt.serving.pictures.BODY_SECONDS", 0.05)
    slow = request_of({"type": "http.request", "body": b"a bit", "more_body": True})
    with pytest.raises(HTTPException, match="did not come within 0.05 s") as caught:
        asyncio.run(body(slow))
    assert caught.value.status_code == 408


def test_nothing_more_is_drawn_for_a_client_that_is_gone(
    site: Site, image: LabelledImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = {"type": "http.request", "body": png(image.pixels), "more_body": False}
    demo = demo_of(site)
    drawn: list[int] = []

    def draw(pixels: Any, sample: int) -> dict[str, Any]:
        time.sleep(0.2)
        drawn.append(sample)
        return {}

    monkeypatch.setattr(demo, "draw", draw)

    async def ask(*messages: dict[str, Any]) -> Response:
        return await demo.samples(request_of(*messages, query="count=3"))

    async def ask_twice() -> None:
        assert len(json.loads(bytes((await ask(sent)).body))["samples"]) == len(drawn) == 3
        with pytest.raises(ClientDisconnect):
            await ask(sent, {"type": "http.disconnect"})
        await asyncio.sleep(0.5)
        demo.pictures.decoders.close()

    asyncio.run(ask_twice())
    assert len(drawn) <= 4  # one may have been under way


def test_the_samples_become_json_off_the_event_loop(
    site: Site, image: LabelledImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo, rendered = demo_of(site), []

    class Recording(JSONResponse):
        def render(self, content: Any) -> bytes:
            rendered.append(threading.current_thread())
            return super().render(content)

    async def ask() -> Response:
        try:
            sent = {"type": "http.request", "body": png(image.pixels), "more_body": False}
            return await demo.samples(request_of(sent, query="count=1"))
        finally:
            demo.pictures.decoders.close()

    monkeypatch.setattr("densepure_rt.serving.demo.JSONResponse", Recording)
    answer = asyncio.run(ask())
    assert len(json.loads(bytes(answer.body))["samples"]) == len(rendered) == 1
    assert rendered[0] is not threading.current_thread()


def test_few_pictures_come_at_a_time(site: Site, image: LabelledImage) -> None:
    demo, sent = demo_of(site), png(image.pixels)

    async def many() -> None:
        silent = [asyncio.ensure_future(demo.image(request_of())) for _ in range(MOST_READING)]
        await asyncio.sleep(0.01)
        for handler in (demo.image, demo.samples):
            with pytest.raises(Busy, match=f"{MOST_READING} pictures are on their way"):
                await handler(request_of({"type": "http.request", "body": sent, "more_body": False}))
        for task in silent:
            task.cancel()
        await asyncio.wait(silent)
        answer = await demo.image(request_of({"type": "http.request", "body": sent, "more_body": False}))
        assert answer.status_code == 200
        demo.pictures.decoders.close()

    asyncio.run(many())


def test_a_fault_of_the_server_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(_: Request) -> Response:
        raise EnvironmentFault("no memory on the device")

    async def answer_of() -> Response:
        return await answered(handler)(request_of())

    answer = asyncio.run(answer_of())
    assert (answer.status_code, json.loads(bytes(answer.body))) == (500, {"error": "no memory on the device"})
    assert "no memory on the device" in caplog.text


def test_one_request_is_drawn_at_a_time_and_few_wait() -> None:
    async def many() -> tuple[list[int], int]:
        turns, at_work, most, order = Turns(), 0, 0, []

        async def one(i: int) -> None:
            nonlocal at_work, most
            async with turns.mine():
                at_work += 1
                most = max(most, at_work)
                await asyncio.sleep(0.001)
                order.append(i)
                at_work -= 1

        waiting = [asyncio.ensure_future(one(i)) for i in range(MOST_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match=f"{MOST_WAITING} requests for pictures are waiting"):
            await one(-1)
        await asyncio.gather(*waiting)
        await one(MOST_WAITING)  # there is room again
        return order, most

    assert asyncio.run(many()) == (list(range(MOST_WAITING + 1)), 1)


def test_a_request_too_many_is_told_when_to_come_back(site: Site, image: LabelledImage) -> None:
    def draw(_: int) -> Answer:
        return ask(f"{site.address}/demo/samples?count=8", png(image.pixels))

    with ThreadPoolExecutor(3 * MOST_WAITING) as pool:
        answers = list(pool.map(draw, range(3 * MOST_WAITING)))
    assert {answer.status for answer in answers} == {200, 503}
    assert sum(answer.status == 200 for answer in answers) >= MOST_WAITING
    refused = next(answer for answer in answers if answer.status == 503)
    assert refused.headers["retry-after"] == "2"
    assert "are waiting" in refused.content["error"]
    whole = [answer.content for answer in answers if answer.status == 200]
    assert all(content == whole[0] for content in whole)


def test_pictures_to_begin_with_are_of_the_models_classes(site: Site) -> None:
    mine, other = (ask(f"{site.address}{path}/demo/model").content for path in ("", "/hostile"))
    assert [example["name"].partition(" (")[0] for example in mine["examples"]] == mine["classes"]
    assert other["examples"] == []


@pytest.mark.parametrize(
    ("settings", "radii"),
    [
        (Settings(radii=(0.0, 0.25, 0.5)), [0.0, 0.25, 0.5]),
        (Settings(radii=(0.0, 0.25, 9.0)), [0.0, 0.25]),  # no n reaches 9
    ],
)
def test_the_page_knows_which_radii_are_asked_about(site: Site, settings: Settings, radii: list[float]) -> None:
    assert facts(dataclasses.replace(site.service.served, settings=settings))["radii"] == radii


@pytest.mark.parametrize(
    ("unet", "labels", "batch"), [((64, 8, 16), (16, 64), 16), ((), (), None), ((8,), (64,), None), (None, None, 1)]
)
def test_pictures_are_drawn_in_the_smallest_batch_that_both_engines_take(
    classifier: SmoothedClassifier, unet: tuple[int, ...] | None, labels: tuple[int, ...] | None, batch: int | None
) -> None:
    bundle = classifier.bundle

    def plan(batches: tuple[int, ...] | None) -> Plan | None:
        built = Plan("tensorrt", "10.3", (), ("8.7",), None, bundle.unet.file, {}, {})
        return None if batches is None else dataclasses.replace(built, batches=batches)

    planned = dataclasses.replace(
        bundle,
        unet=dataclasses.replace(bundle.unet, plan=plan(unet)),
        classifier=dataclasses.replace(bundle.classifier, plan=plan(labels)),
    )
    assert smallest_batch(planned) == batch


# the page in a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as tab:
        yield tab


@pytest.fixture
def tab(chromium: Tab) -> Iterator[Tab]:
    """An empty page of a desktop's size, that has complained of nothing yet."""
    chromium.open("about:blank")
    chromium.looks(1200, 900)
    chromium.console.clear()
    chromium.asked.clear()
    yield chromium
    chromium.command(
        "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
    )


def text(tab: Tab, name: str) -> str:
    return str(tab.value(f"document.getElementById('{name}').innerText"))


def opened(tab: Tab, site: Site, path: str = "") -> None:
    tab.open(f"{site.address}{path}/demo/")
    tab.wait_for("document.getElementById('status')?.textContent == 'Choose a picture.'")
    tab.value("by('deadline').value = 120")  # nothing is cut short on a slow machine


def finished(tab: Tab) -> None:
    tab.wait_for("by('meaning').textContent && document.querySelectorAll('#samples > li').length == SAMPLES")


@BROWSER
def test_the_page_says_what_the_command_line_says(
    tab: Tab, site: Site, image: LabelledImage, classifier: SmoothedClassifier, tmp_path: Path
) -> None:
    (tmp_path / "x.png").write_bytes(png(image.pixels))
    same = ("--images", tmp_path / "x.png", "--sigma", SIGMA, "--seed", SEED, "--threads", 1)
    predicted = json.loads(cli("predict", *same, "--json").stdout)
    cli("certify", *same, "--method", "radius", "--n", N, "--out", tmp_path / "run")
    certified = json.loads((tmp_path / "run" / "results.jsonl").read_text())
    opened(tab, site)
    tab.value(f"document.querySelectorAll('#examples button')[{BOOT}].click()")
    finished(tab)
    label = classifier.class_names[predicted["predict"]]
    assert text(tab, "label") == label
    assert f"from {predicted['n']} samples" in text(tab, "confidence")
    assert text(tab, "ballot").split("\n")[:2] == [label, str(predicted["votes"][label])]
    assert certified["radius"] > 0.3
    assert text(tab, "radius") == f"Radius {floored(certified['radius'])}"
    assert f"below {floored(certified['radius'])}, in [0, 1] pixel units" in text(tab, "meaning")
    assert f"{certified['n']} samples. {certified['n_a']} of them for {label}" in text(tab, "counts")
    shares = re.findall(r"at least ([0-9.]+) %", text(tab, "counts"))
    assert [float(share) for share in shares] == [pytest.approx(100 * certified["p_lower"], abs=0.01)]
    votes = tab.value("[...document.querySelectorAll('#samples figcaption')].map(words => words.textContent)")
    assert len(votes) == 4 * 6
    assert votes[0] == "with noise"
    assert {words.removesuffix(", not needed") for words in votes} - {"with noise"} == {label}
    assert tab.console == []
    assert {address.split("/")[2] for address in tab.asked if not address.startswith("data:")} == {
        site.address.removeprefix("http://")
    }


@BROWSER
def test_a_picture_is_chosen_by_the_keyboard_alone(tab: Tab, site: Site) -> None:
    opened(tab, site)
    reached = []
    for _ in range(2):
        tab.press("Tab", windowsVirtualKeyCode=9)
        reached.append(tab.value("document.activeElement.id || document.activeElement.title"))
    assert reached[0] == "file"
    assert reached[1].startswith("T-shirt/top")
    tab.press("Enter", windowsVirtualKeyCode=13, text="\r")
    tab.wait_for("by('label').textContent.length > 1")
    assert tab.value("document.activeElement.ariaPressed") == "true"


@BROWSER
def test_of_pictures_chosen_in_haste_the_last_one_counts(tab: Tab, site: Site) -> None:
    opened(tab, site)
    for place, pause in ((0, 0), (1, 0.05), (2, 0.2), (3, 0.4), (BOOT, 0)):
        tab.value(f"location.hash = '#example={place}'")
        time.sleep(pause)
    finished(tab)
    assert text(tab, "label") == "Ankle boot"
    assert text(tab, "changes").startswith("Ankle boot")
    assert tab.value("document.querySelectorAll('#examples [aria-pressed=true]').length") == 1
    assert tab.value("document.querySelectorAll('.error').length") == 0
    assert tab.console == []


@BROWSER
def test_every_picture_and_every_control_has_a_name(tab: Tab, site: Site) -> None:
    opened(tab, site)
    tab.value("location.hash = '#example=0'")
    finished(tab)
    tab.command("Accessibility.enable")
    nodes = tab.command("Accessibility.getFullAXTree")["nodes"]
    named = [
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if not node["ignored"]
        and node["role"]["value"] in ("button", "combobox", "image", "progressbar", "Canvas", "status")
    ]
    assert len(named) > 4 * 6 + 10
    assert [role for role, name in named if not name and role != "status"] == []
    assert tab.value("document.querySelectorAll('[aria-live=polite], [role=alert]').length") >= 3


@BROWSER
@pytest.mark.parametrize("way", ["choose", "drop"])
def test_names_are_text_wherever_they_come_from(tab: Tab, site: Site, tmp_path: Path, way: str) -> None:
    """With attacks for the names of the file and of every class; the page's own policy would only be a second line."""
    file = tmp_path / "<img src=x onerror=document.title='owned'>&amp;.jpg"
    file.write_bytes(file_of(Image.fromarray(noise(60, 90, 3)), "JPEG"))
    opened(tab, site, "/hostile")
    title = tab.value("document.title")
    tab.choose_file("#file", file) if way == "choose" else tab.drop_file(file, 300, 300)
    finished(tab)
    assert text(tab, "changes").startswith(f"{file.name}: made grey, cropped around its middle to 60 x 60")
    shown = tab.value("[...document.querySelectorAll('#ballot li span:first-child')].map(name => name.textContent)")
    assert sorted(shown) == sorted(HOSTILE)
    assert tab.value("document.title") == title
    assert (
        tab.value(
            "document.querySelectorAll('#results script, iframe, link:not([rel=icon]), img:not([src^=data])').length"
        )
        == 0
    )
    assert tab.console == []
    assert not any("example.invalid" in address for address in tab.asked)


@BROWSER
def test_a_file_that_is_no_picture_is_said_to_be_none(tab: Tab, site: Site, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    opened(tab, site)
    tab.choose_file("#file", tmp_path / "notes.txt")
    said = tab.wait_for("by('picture-error').innerText")
    assert "The server cannot take this: the picture is not PNG, JPEG, BMP, WEBP" in said
    assert not tab.value("by('results').checkVisibility()")
    tab.value("location.hash = '#example=1'")  # and the page goes on
    tab.wait_for("by('label').textContent.length > 1")
    assert text(tab, "picture-error") == ""


@BROWSER
def test_a_file_that_is_too_large_is_not_sent(tab: Tab, site: Site, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(bytes(MOST_BYTES + 1))
    opened(tab, site)
    tab.choose_file("#file", tmp_path / "x.png")
    assert "x.png is too large: save it as no more than 16,777,216 bytes" in tab.wait_for(
        "by('picture-error').innerText"
    )
    assert not any(address.endswith("/demo/image") for address in tab.asked)


@BROWSER
@pytest.mark.parametrize("status", FAULTS)
def test_errors_of_the_server_are_said_in_words(tab: Tab, site: Site, status: int) -> None:
    opened(tab, site, f"/{status}")
    tab.value("location.hash = '#example=2'")
    for name in ("answer", "certificate"):
        said = tab.wait_for(f"by('{name}-error').innerText")
        assert f"{FAULTS[status]}: <b>its words</b>." in said
        assert ("It asks for 7 s of patience." in said) == (status == 503)
        assert said.endswith("Try again") == (status >= 500)  # the same request would be refused again
    tab.wait_for("document.querySelectorAll('#samples > li').length == SAMPLES")  # what can be had is shown
    assert tab.value("by('waiting').hidden")


@BROWSER
def test_a_lost_connection_is_said_and_can_be_tried_again(tab: Tab, site: Site) -> None:
    opened(tab, site)
    cut = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    tab.command("Network.emulateNetworkConditions", offline=True, **cut)
    tab.value("location.hash = '#example=3'")
    assert "The server does not answer" in tab.wait_for("by('picture-error').innerText")
    tab.command("Network.emulateNetworkConditions", offline=False, **cut)
    tab.value("document.querySelector('#picture-error button').click()")
    finished(tab)
    assert text(tab, "label") == "Dress"
    assert text(tab, "picture-error") == ""


@BROWSER
def test_the_page_forbids_itself_what_it_does_not_need(tab: Tab, site: Site) -> None:
    """Should a name become markup all the same: no script that is not its own, no markup from text, no other server."""
    opened(tab, site)
    for attempt in (
        "document.body.innerHTML = '<b>x</b>'",
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.owned = 1'}))",
        "document.body.setAttribute('onclick', 'window.owned = 1') || document.body.click()",
        "fetch('http://example.invalid/').catch(() => {})",
        "document.body.append(Object.assign(document.createElement('img'), {src: 'http://example.invalid/'}))",
    ):
        tab.console.clear()
        tab.value(f"(() => {{ try {{ {attempt} }} catch {{}} }})()")
        tab.value("new Promise(done => setTimeout(done, 50))")  # complaints come a little later
        assert re.search("Content Security Policy|'Trusted(HTML|Script)' assignment", "\n".join(tab.console)), attempt
    assert tab.value("window.owned") is None
    assert tab.value("document.querySelector('main') !== null")


@BROWSER
def test_pages_of_other_sites_have_nothing_done_here(tab: Tab, site: Site, image: LabelledImage) -> None:
    """What a browser sends without asking: a Blob has no content type. The same request of its own page is taken."""
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 1, 28, 28], "data": image.pixels.ravel().tolist()}
    body, path = json.dumps({"inputs": [tensor]}), "/v2/models/predict/infer"
    other = site.address.replace("127.0.0.1", "localhost")  # another site to a browser, and the same server

    def settled() -> int:
        """The samples so far, those drawn in vain among them, which come back a little later."""
        samples = -1
        while samples != (samples := site.service.meter().samples):
            time.sleep(0.3)
        return samples

    def sent_from(page: str, address: str, mode: str) -> int:
        """The samples that a request of `page` costs."""
        tab.open(page)
        tab.wait_for(f"location.href == '{page}' && document.readyState == 'complete'")
        before = settled()
        options = f"{{method: 'POST', mode: '{mode}', body: new Blob([{json.dumps(body)}])}}"
        tab.value(f"fetch('{address}{path}', {options}).then(answer => answer.text())")
        assert f"{address}{path}" in tab.asked
        return settled() - before

    assert sent_from(f"{site.address}/demo/model", site.address, "cors") > 0
    assert sent_from(f"{other}/demo/model", site.address, "no-cors") == 0
    rebound = site.address.replace("127.0.0.1", "attacker.localhost")  # Chromium finds it at 127.0.0.1, as rebound
    assert sent_from(f"{rebound}/demo/model", rebound, "cors") == 0
    assert "is not called 'attacker.localhost:" in tab.value("document.body.innerText")


@BROWSER
def test_of_many_classes_the_first_are_shown_and_the_others_counted(tab: Tab, site: Site) -> None:
    opened(tab, site)
    votes = [*range(1, 26), 0]
    tab.value(f"(model.classes = Array.from({{length: 26}}, (_, i) => `class ${{i}}`), ballot({votes}, {sum(votes)}))")
    cells = tab.value("[...document.querySelectorAll('#ballot span')].map(cell => cell.textContent)")
    rows = [cells[i : i + 2] for i in range(0, len(cells), 2)]
    assert rows[0] == ["class 24", "25"]
    assert [int(cast) for _, cast in rows[:10]] == sorted(votes, reverse=True)[:10]
    assert rows[10:] == [["15 other classes", str(sum(range(1, 16)))]]


@BROWSER
def test_radii_are_rounded_down_as_everywhere(tab: Tab, site: Site) -> None:
    opened(tab, site)
    draw = np.random.default_rng(0)
    radii = [0.29, 0.57, 0.5, 1.005, 1e-7, 0.1 + 0.2, *draw.uniform(0, 4, 200), *draw.integers(0, 4000, 200) / 1000]
    assert tab.value(f"{json.dumps(radii)}.map(radius => floored(radius, 3))") == [floored(radius) for radius in radii]
    shares = [0.0, 0.00005, 0.29, 0.999, 0.99959, 0.9999999, math.nextafter(1, 0), 1.0]
    assert tab.value(f"{json.dumps(shares)}.map(percent)") == [floored(share, 2, percent=True) for share in shares]
    left = [raised(1 - Fraction(share), 2, percent=True) for share in shares]
    assert tab.value(f"{json.dumps(shares)}.map(rest)") == left


@BROWSER
@pytest.mark.parametrize("radius", [0.01, 0.25, 1.5, 20.0])
def test_the_change_that_is_shown_is_within_the_radius(tab: Tab, site: Site, radius: float) -> None:
    opened(tab, site)
    pixels = noise(784).astype(int)
    changed = np.array(tab.value(f"perturbed({pixels.tolist()}, {radius})"))
    assert changed.min() >= 0
    assert changed.max() <= 255
    assert np.array_equal(changed, np.rint(changed))
    assert np.linalg.norm((changed - pixels) / 255) <= radius
    assert (changed != pixels).any() == (radius > 0.01)  # a level is 1/255; so little is lost in rounding


@BROWSER
def test_the_page_fits_its_reader(tab: Tab, site: Site) -> None:
    opened(tab, site)
    tab.value("location.hash = '#example=9'")
    finished(tab)
    for width, dark in ((320, False), (320, True), (1200, False), (1200, True)):
        tab.looks(width, 900, dark)
        assert tab.value("document.documentElement.scrollWidth") <= width
        ground = tab.value("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(20, 25, 31)" if dark else "rgb(255, 255, 255)")
