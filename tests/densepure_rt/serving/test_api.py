"""A real server process, asked by tritonclient, by plain HTTP, and by clients that mean no good."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from densepure_rt.errors import UsageError
from densepure_rt.images.datasets import open_images
from densepure_rt.images.uploads import MOST_BYTES
from densepure_rt.keys import seeded_secret
from densepure_rt.serving.api import BODY_SECONDS, Deadlines
from densepure_rt.serving.connections import Config
from densepure_rt.serving.metrics import REFUSED_CONNECTIONS
from densepure_rt.serving.models import MOST_IMAGES
from densepure_rt.serving.pictures import MOST_READING
from densepure_rt.serving.protocol import InferRequest, ProtocolError
from densepure_rt.serving.server import Server, listen
from densepure_rt.smoothing.classifier import Certified, Predicted, load
from densepure_rt.smoothing.settings import Settings
from tests.support.pictures import GOOD, file_of, noise, scan_bomb
from tests.support.server import QUICK, ROOT, Answer, ServerProcess, serving, until

SEED = 1
SETTINGS = Settings(sigma=0.5, steps=0, votes=1, n=160, alpha=0.05)  # as QUICK says
LONG = "--sigma 0.5 --steps 0 --n 100000 --method radius --radius-loss 0 --batch 8 --threads 2 --seed 1 --no-demo"
IMAGES = [image.pixels for image in open_images(None, (1, 28, 28), [str(i) for i in range(10)]).select(60, 6)]
JSON = {"Content_Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving(*QUICK, "--seed", SEED) as running:
        yield running


@pytest.fixture(scope="module")
def long() -> Iterator[ServerProcess]:
    """One whose certificates go on until they are stopped, and which holds three images."""
    with serving(*LONG.split(), "--queue", 3) as running:
        yield running


@pytest.fixture(scope="module")
def expected() -> tuple[list[Predicted], list[Certified]]:
    """What the classifier itself says of IMAGES, without any server."""
    from densepure_rt.images.datasets import LabelledImage

    unlabelled = [LabelledImage(idx, pixels, None) for idx, pixels in enumerate(IMAGES)]
    with load(secret=seeded_secret(SEED), batch=16, threads=1) as classifier:
        predict = Settings(sigma=0.5, steps=0, votes=1, n=1000, alpha=0.05)
        return list(classifier.predict_each(unlabelled, predict)), list(classifier.certify_each(unlabelled, SETTINGS))


def infer(
    client: InferenceServerClient,
    model: str,
    images: Any,
    binary: bool = True,
    outputs: dict[str, bool] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What tritonclient makes of the answer, as lists by name. outputs: whether each comes as raw bytes."""
    images = np.asarray(images)
    tensor = InferInput("image", list(images.shape), "UINT8" if images.dtype == np.uint8 else "FP32")
    tensor.set_data_from_numpy(images, binary_data=binary)
    asked = None if outputs is None else [InferRequestedOutput(*each) for each in outputs.items()]
    result = client.infer(model, [tensor], outputs=asked, **options)
    return {output["name"]: result.as_numpy(output["name"]).tolist() for output in result.get_response()["outputs"]}


def certify_json(images: list[Any], **parameters: Any) -> bytes:
    shape = [len(images), 1, 28, 28]
    tensor = {"name": "image", "datatype": "UINT8", "shape": shape, "data": np.asarray(images).ravel().tolist()}
    return json.dumps({"inputs": [tensor], "parameters": parameters}).encode()


# tritonclient


def test_tritonclient_finds_it_alive_ready_and_described(server: ServerProcess) -> None:
    client = server.client()
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    for model in ("predict", "certify"):
        assert client.is_model_ready(model)
        assert client.is_model_ready(model, "1")
        assert client.get_model_metadata(model) == client.get_model_metadata(model, "1")
    assert not client.is_model_ready("unet")
    assert not client.is_model_ready("predict", "2")


def test_metadata_says_what_the_answers_are(server: ServerProcess, expected: Any) -> None:
    client = server.client()
    found = client.get_model_metadata("certify")
    assert found["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 1, 28, 28]}]
    about = found["parameters"]
    assert (about["sigma"], about["steps"], about["votes"], about["alpha"], about["n"]) == (0.5, 0, 1, 0.05, 160)
    assert about["radii"] == [0.0, 0.5]
    assert len(about["class_names"]) == 10
    with load() as classifier:
        assert about["engine_sha256"] == classifier.bundle.unet.file.sha256
    for model in ("predict", "certify"):
        values = infer(client, model, IMAGES[:2])
        described = {output["name"]: output["shape"] for output in client.get_model_metadata(model)["outputs"]}
        assert list(values) == list(described)
        for name, shape in described.items():
            assert list(np.shape(values[name])) == [2, *shape[1:]]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("outputs", [None, {"label": True, "votes": False, "confidence": True}])
def test_predictions_are_the_classifiers(
    server: ServerProcess, expected: Any, binary: bool, outputs: dict[str, bool] | None
) -> None:
    found = infer(server.client(), "predict", IMAGES, binary, outputs)
    assert found["label"] == [-1 if each.label is None else each.label for each in expected[0]]
    assert found["votes"] == [each.votes.tolist() for each in expected[0]]
    bounds = [1.0 if each.error_bound is None else each.error_bound for each in expected[0]]
    assert found["confidence"] == pytest.approx([1 - bound for bound in bounds], abs=1e-12)
    if outputs is None:
        assert found["n"] == [each.n for each in expected[0]]
        assert found["abstain"] == [each.label is None for each in expected[0]]
        assert not any(found["stopped"])


@pytest.mark.parametrize("binary", [True, False])
def test_certificates_are_the_classifiers(server: ServerProcess, expected: Any, binary: bool) -> None:
    outputs = None if binary else dict.fromkeys(["label", "radius", "n", "n_a", "p_lower", "outcome"], False)
    found = infer(server.client(), "certify", IMAGES, binary, outputs)
    certificates = [each.certificate for each in expected[1]]
    assert found["label"] == [-1 if each.predict is None else each.predict for each in certificates]
    assert found["radius"] == [each.radius or 0.0 for each in certificates]
    assert (found["n"], found["n_a"]) == ([each.n for each in certificates], [each.n_a for each in certificates])
    assert found["p_lower"] == [each.p_lower for each in certificates]
    outcomes = [each.decode() if isinstance(each, bytes) else each for each in found["outcome"]]
    assert [each == "certified" for each in outcomes] == [each.predict is not None for each in certificates]
    assert len(set(outcomes)) > 1  # some abstain


def test_both_models_answer_many_clients_at_once(server: ServerProcess, expected: Any) -> None:
    def ask(number: int) -> bool:
        image = number % len(IMAGES)
        if number % 2:
            found = infer(server.client(), "predict", IMAGES[image : image + 1])
            return bool(found["votes"] == [expected[0][image].votes.tolist()])
        found = infer(server.client(), "certify", IMAGES[image : image + 1])
        return bool(found["n_a"] == [expected[1][image].certificate.n_a])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(18)))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((1, 1, 28, 27), np.uint8), "[1, 28, 28]"),
        (np.zeros((1, 28, 28), np.uint8), "1 to 16 images"),
        (np.zeros((MOST_IMAGES + 1, 1, 28, 28), np.uint8), "1 to 16 images"),
        (np.zeros((1, 1, 28, 28), np.float32), "UINT8"),
    ],
)
@pytest.mark.parametrize("model", ["predict", "certify"])
def test_an_image_that_does_not_fit_is_refused_in_words(
    server: ServerProcess, model: str, images: Any, words: str
) -> None:
    with pytest.raises(InferenceServerException) as refused:
        infer(server.client(), model, images)
    assert words in str(refused.value)
    assert refused.value.status() == "400"


def test_another_input_or_output_is_refused_in_words(server: ServerProcess) -> None:
    tensor = InferInput("pixels", [1, 1, 28, 28], "UINT8")
    tensor.set_data_from_numpy(np.asarray(IMAGES[:1]))
    with pytest.raises(InferenceServerException, match="is image, got 'pixels'"):
        server.client().infer("predict", [tensor])
    with pytest.raises(InferenceServerException, match="no output 'logits'"):
        infer(server.client(), "predict", IMAGES[:1], outputs={"logits": True})
    with pytest.raises(InferenceServerException, match="predict, certify are served"):
        infer(server.client(), "unet", IMAGES[:1])
    with pytest.raises(InferenceServerException, match="priority"):
        infer(server.client(), "predict", IMAGES[:1], priority=1)
    with pytest.raises(InferenceServerException, match="compressed"):
        infer(server.client(), "predict", IMAGES[:1], request_compression_algorithm="gzip")


def test_null_is_answered_as_if_nothing_was_said(server: ServerProcess) -> None:
    asked = json.loads(certify_json(IMAGES[:1])) | {"id": None, "parameters": None}
    asked["inputs"][0]["parameters"] = None
    asked["outputs"] = [{"name": "label", "parameters": None}]
    answer = server.ask("POST", "/v2/models/predict/infer", json.dumps(asked).encode(), **JSON)
    assert answer.status == 200, answer.json
    assert [output["name"] for output in answer.json["outputs"]] == ["label"]
    assert "id" not in answer.json
    asked["outputs"] = None
    every = server.ask("POST", "/v2/models/predict/infer", json.dumps(asked).encode(), **JSON).json["outputs"]
    assert len(every) > 1


# deadlines and queues


# pictures


def send(server: ServerProcess, content: bytes, query: str = "", model: str = "predict", **headers: str) -> Answer:
    headers = {"Content_Type": "image/png"} | headers
    return server.ask("POST", f"/v2/models/{model}/infer{query}", content, **headers)


@pytest.mark.parametrize("model", ["predict", "certify"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])  # which keep every level
def test_a_picture_is_answered_as_its_tensor_is_and_by_its_name(server: ServerProcess, model: str, kind: str) -> None:
    picture = file_of(Image.fromarray(IMAGES[1][0]), kind, **({"lossless": True} if kind == "WEBP" else {}))
    answer = send(server, picture, "?name=a%20cat%1B%3Cb%3E%22.png", model, Content_Type=f"image/{kind.lower()}")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert b"\x1b" not in answer.body
    found = answer.json
    assert found.pop("parameters") == {"name": 'a cat\x1b<b>".png', "changes": []}
    tensor = server.ask("POST", f"/v2/models/{model}/infer", certify_json(IMAGES[1:2]), **JSON)
    assert found == tensor.json
    assert "parameters" not in tensor.json


def test_what_was_done_to_a_photograph_is_told(server: ServerProcess) -> None:
    photograph = file_of(Image.fromarray(noise(60, 90, 3)), "JPEG")
    found = send(server, photograph, Content_Type="image/jpeg").json
    done = ["made grey", "cropped around its middle to 60 x 60", "scaled from 60 x 60 to 28 x 28"]
    assert found["parameters"] == {"changes": done}


def test_a_picture_has_its_deadline_without_the_demo_too(long: ServerProcess) -> None:
    began = time.monotonic()
    answer = send(long, GOOD, "?deadline_ms=500", "certify")
    assert {output["name"]: output["data"] for output in answer.json["outputs"]}["stopped"] == [True]
    assert time.monotonic() - began >= 0.5


@pytest.mark.parametrize(
    ("content", "query", "headers", "status", "words"),
    [
        (b"MZ", "", {}, 400, "the picture is not PNG, JPEG, BMP, WEBP"),
        (b"", "", {}, 400, "the picture is not PNG, JPEG, BMP, WEBP"),
        (GOOD[:-40], "", {}, 400, "the picture"),
        (scan_bomb(64, 2000), "", {"Content_Type": "image/jpeg"}, 400, "scans"),
        (file_of(Image.new("L", (6000, 6000))), "", {}, 400, "at most 25,000,000 pixels are read"),
        (bytes(MOST_BYTES + 1), "", {}, 413, "a picture has 16,777,216 bytes at most"),
        (GOOD, "", {"Content_Encoding": "gzip"}, 415, "a compressed body is not taken"),
        (GOOD, "", {"Content_Type": "text/html"}, 415, "or a picture, image/...; got 'text/html'"),
        (GOOD, "?nmae=x", {}, 400, "the address has 'nmae', which is not known here: deadline_ms, name"),
        (GOOD, f"?name={'x' * 257}", {}, 400, "name is a string of 256 characters at most, got 257"),
        (GOOD, "?deadline_ms=soon", {}, 400, "deadline_ms is a finite number of milliseconds above 0, got 'soon'"),
        (GOOD, "?deadline_ms=inf", {}, 400, "deadline_ms is a finite number of milliseconds above 0, got inf"),
        (GOOD, "?deadline_ms=400000", {}, 400, "deadline_ms is at most 300000 on this server"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_picture_that_cannot_be_taken_is_refused_in_words(
    server: ServerProcess, content: bytes, query: str, headers: dict[str, str], status: int, words: str
) -> None:
    answer = send(server, content, query, **headers)
    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/json")
    assert words in answer.json["error"]


def test_as_few_pictures_come_at_a_time_as_to_the_demo(server: ServerProcess) -> None:
    """Clients that are silent hold all the room there is; the demo's pictures and the API's are counted together."""
    head = "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\n"
    paths = ["/demo/image", "/v2/models/certify/infer"]
    with contextlib.ExitStack() as stack:
        for i in range(MOST_READING):
            silent = stack.enter_context(socket.create_connection((server.host, server.port)))
            silent.sendall(head.format(paths[i % 2]).encode())
        until(lambda: send(server, GOOD).status == 503)
        refused = send(server, GOOD)
        assert "32 pictures are on their way here" in refused.json["error"]
        assert refused.headers["Retry-After"] == "1"
        assert server.ask("POST", paths[0], GOOD).status == 503
        body = certify_json(IMAGES[:1])
        assert server.ask("POST", "/v2/models/predict/infer", body, **JSON).status == 200  # a tensor is no picture
    until(lambda: send(server, GOOD).status == 200)


def test_at_its_deadline_a_request_has_what_its_samples_bear_out(long: ServerProcess) -> None:
    started = time.monotonic()
    found = infer(long.client(), "certify", IMAGES[:1], parameters={"deadline_ms": 700})
    assert 0.6 < time.monotonic() - started < 3
    assert found["stopped"] == [True]
    assert 0 < found["n"][0] < 100_000
    assert found["outcome"] == ([b"certified"] if found["radius"][0] or not found["abstain"][0] else [b"out of time"])


@pytest.mark.parametrize("milliseconds", [0, -5, 1e400, 3e5 + 1, "soon", None])
def test_a_deadline_beyond_what_is_served_is_refused(server: ServerProcess, milliseconds: Any) -> None:
    body = certify_json(IMAGES[:1], deadline_ms=milliseconds)
    answer = server.ask("POST", "/v2/models/certify/infer", body, **JSON)
    if milliseconds is None:  # as if it were not there
        assert answer.status == 200
    else:
        assert answer.status == 400
        assert "deadline_ms" in answer.json["error"] or "no number" in answer.json["error"]


def test_what_comes_beyond_the_queue_is_told_to_come_again_while_predictions_are_fast(long: ServerProcess) -> None:
    def certify() -> Any:
        return infer(long.client(), "certify", IMAGES[:1], parameters={"deadline_ms": 4000})

    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(certify) for _ in range(2)]
        until(lambda: long.metrics()['densepure_rt_open_images{model="certify"}'] == 2)
        started = time.monotonic()
        assert infer(long.client(), "predict", IMAGES[:1])["n"][0] >= 13
        assert time.monotonic() - started < 3
        waiting.append(pool.submit(certify))
        until(lambda: long.metrics()['densepure_rt_open_images{model="certify"}'] == 3)
        answer = long.ask("POST", "/v2/models/certify/infer", certify_json(IMAGES[:1]), **JSON)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert "3 images are waiting and 3 may be" in answer.json["error"]
        assert long.client().is_server_ready()
        assert all(future.result()["stopped"] == [True] for future in waiting)
    assert long.metrics()['densepure_rt_requests_total{model="certify",outcome="full"}'] >= 1


def test_a_request_has_no_more_images_than_the_queue(long: ServerProcess) -> None:
    with pytest.raises(InferenceServerException, match="1 to 3 images"):
        infer(long.client(), "predict", IMAGES[:4])


# clients that mean no good


def test_who_hangs_up_takes_the_work_along(long: ServerProcess) -> None:
    before = long.metrics().get('densepure_rt_requests_total{model="certify",outcome="gone"}', 0)
    body = certify_json(IMAGES[:1])
    with socket.create_connection((long.host, long.port)) as connection:
        head = f"POST /v2/models/certify/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        until(lambda: long.metrics()['densepure_rt_open_images{model="certify"}'] == 1)
    until(lambda: long.metrics()['densepure_rt_open_images{model="certify"}'] == 0, seconds=3)
    until(lambda: long.metrics()['densepure_rt_requests_total{model="certify",outcome="gone"}'] == before + 1, 3)

    def no_sample_comes() -> bool:
        samples = long.metrics()["densepure_rt_samples_total"]
        time.sleep(0.3)
        return long.metrics()["densepure_rt_samples_total"] == samples

    until(no_sample_comes, 5)  # what was under way comes back first


@pytest.mark.parametrize("declared", [True, False])
def test_a_huge_body_is_refused_before_it_has_all_come(server: ServerProcess, declared: bool) -> None:
    """A terabyte is announced, or comes in chunks without end; the answer is there after a part of a megabyte."""
    kind = f"Content-Length: {2**40}" if declared else "Transfer-Encoding: chunked"
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        connection.sendall(f"POST /v2/models/predict/infer HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n\r\n".encode())
        chunk = b"x" * 10_000 if declared else b"2710\r\n" + b"x" * 10_000 + b"\r\n"
        for _ in range(1 if declared else 30):
            connection.sendall(chunk)
        answer = b""
        while b"}" not in answer:
            assert (more := connection.recv(4096))
            answer += more
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"bytes at most" in answer


def test_a_body_that_does_not_come_is_given_up(server: ServerProcess) -> None:
    started = time.monotonic()
    with socket.create_connection((server.host, server.port), timeout=BODY_SECONDS + 10) as connection:
        connection.sendall(b"POST /v2/models/predict/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n{")
        answer = connection.makefile("rb").read()  # until it is hung up
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert BODY_SECONDS - 1 < time.monotonic() - started < BODY_SECONDS + 8


@pytest.mark.parametrize("sent", ["at once", "a little later"])
def test_who_sends_more_before_the_answer_is_hung_up_on_and_takes_the_work_along(
    long: ServerProcess, sent: str
) -> None:
    """Its own hanging up would stand behind what it has sent, and be seen by nobody."""
    body = certify_json(IMAGES[:1])
    request = f"POST /v2/models/certify/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    asked = request.encode() + body
    with socket.create_connection((long.host, long.port), timeout=10) as connection:
        connection.sendall(asked + asked if sent == "at once" else asked)
        if sent != "at once":
            until(lambda: long.metrics()['densepure_rt_open_images{model="certify"}'] == 1)
            connection.sendall(asked[:30])
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        until(lambda: long.metrics()['densepure_rt_open_images{model="certify"}'] == 0, seconds=3)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, uvicorn.Server]]:
    """The port of a server of the same protocol that gives connections half a second, and answers with GET /<bytes>."""
    monkeypatch.setattr("densepure_rt.serving.connections.IDLE_SECONDS", 0.5)

    async def answer(request: Request) -> Response:
        return Response(bytes(request.path_params["size"]))

    app = Starlette(routes=[Route("/{size:int}", answer)])
    with listen("127.0.0.1", 0) as listener:
        running = Server(Config(app, most_connections=2), lambda: None)
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        until(lambda: running.started)
        yield listener.getsockname()[1], running
        running.should_exit = True
        thread.join()


@pytest.mark.parametrize("size", [100, 10**5, 10**8])
@pytest.mark.parametrize("more", ["", "Connection: close\r\n"])
def test_who_does_not_read_an_answer_holds_no_connection(
    impatient: tuple[int, uvicorn.Server], size: int, more: str
) -> None:
    """Be it in the sockets' buffers, in the transport's, or in neither yet."""
    port, running = impatient
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", port))
        connection.sendall(f"GET /{size} HTTP/1.1\r\nHost: localhost\r\n{more}\r\n".encode())
        until(lambda: running.server_state.total_requests == 1, 5)
        until(lambda: not running.server_state.connections, 5)


def refused_connections() -> float:
    return next(sample.value for family in REFUSED_CONNECTIONS.collect() for sample in family.samples)


def test_one_connection_too_many_is_told_to_come_again_and_counted(
    impatient: tuple[int, uvicorn.Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("densepure_rt.serving.connections.IDLE_SECONDS", 20)
    before = refused_connections()
    port, running = impatient
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(3)]
        until(lambda: len(running.server_state.connections) == 3)
        for connection, status in zip(connections, (b"200", b"200", b"503"), strict=True):
            connection.sendall(b"GET /1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 " + status
    assert refused_connections() == before + 1


def test_who_reads_an_answer_slowly_gets_it_whole(impatient: tuple[int, uvicorn.Server]) -> None:
    """Longer than a silent client is given in all."""
    port, _ = impatient
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"GET /20000000 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        read, started = 0, time.monotonic()
        while read < 20_000_000:
            assert (more := connection.recv(2**20))
            read += len(more)
            time.sleep(0.05)
    assert time.monotonic() - started > 0.8


@pytest.mark.slow
def test_bodies_that_are_broken_off_leave_nothing_in_memory() -> None:
    """24 clients at a time that each send nearly as much as may be, and hang up."""
    size = MOST_BYTES
    head = f"POST /demo/image HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n".encode()
    with serving(*QUICK) as running:
        before = running.memory()
        for _ in range(6):
            connections = [socket.create_connection((running.host, running.port)) for _ in range(24)]
            for connection in connections:
                connection.sendall(head + bytes(size - 10))
            for connection in connections:
                connection.close()
            time.sleep(1)
        until(lambda: running.memory() < before + 2**26)  # a sixth of what 24 bodies are


def attacked(running: ServerProcess, seconds: float, processes: int) -> tuple[list[float], Counter[int]]:
    """Measure how long health took, and what requests got, under four senders of one-byte chunks and two scan bombs."""
    kinds = ["chunks"] * 4 + ["bombs"] * 2
    command = [sys.executable, "-m", "tests.attackers", running.host, str(running.port), str(seconds)]
    attackers = [subprocess.Popen([*command, *kinds[i::processes]], cwd=ROOT) for i in range(processes)]
    took: list[float] = []
    statuses = Counter[int]()
    with contextlib.ExitStack() as stack:
        for each in attackers:
            stack.enter_context(each)
        while any(each.poll() is None for each in attackers):
            began = time.monotonic()
            assert running.ask("GET", "/v2/health/live").status == 200
            took.append(time.monotonic() - began)
            if len(took) % 10 == 0:
                statuses[running.ask("POST", "/v2/models/predict/infer", certify_json(IMAGES[:1]), **JSON).status] += 1
            time.sleep(0.02)
    return took, statuses


def test_no_turn_of_the_event_loop_takes_long_under_attack_and_good_requests_are_answered() -> None:
    with serving(*QUICK) as running:
        took, statuses = attacked(running, seconds=4, processes=1)
        assert running.metrics()["densepure_rt_slow_turns_total"] == 0
        assert set(statuses) == {200}
        assert len(took) > 20
        assert np.percentile(took, 90) < 1  # a machine under load: see the slow test for what holds
        until(lambda: running.ask("POST", "/demo/image", scan_bomb(28, 2)).status == 200)
        assert running.end() == (0, "")


@pytest.mark.slow
def test_health_takes_less_than_a_tenth_of_a_second_under_attack() -> None:
    """On two cores that nobody else uses: six attackers, a decoder and this client share them with the server."""
    with serving(*QUICK) as running:
        took, statuses = attacked(running, seconds=30, processes=6)
        assert running.metrics()["densepure_rt_slow_turns_total"] == 0
        assert set(statuses) == {200}
        assert np.percentile(took, 99) < 0.1


def test_an_error_that_nobody_expected_is_told_in_json_and_logged(tmp_path: Path) -> None:
    fault = (
        "from densepure_rt.serving import demo, service\n"
        "def broken(*_): raise RuntimeError('cannot allocate 0xdeadbeef')\n"
        "demo.replay = service.Service.meter = broken"
    )
    picture = io.BytesIO()
    Image.new("L", (28, 28)).save(picture, "PNG")
    with serving(*QUICK, "--log-json", tmp_path / "log", fault=fault) as running:
        for method, path, body in (("POST", "/demo/samples", picture.getvalue()), ("GET", "/metrics", None)):
            answer = running.ask(method, path, body)
            assert (answer.status, answer.headers["Content-Type"]) == (500, "application/json")
            assert "its log says how" in answer.json["error"]
            last = json.loads((tmp_path / "log").read_text().splitlines()[-1])
            assert (last["level"], last["error"], last["path"]) == ("error", "RuntimeError", path)
            assert "0xdeadbeef" in last["message"]
            assert "0xdeadbeef" not in answer.json["error"]  # that is for the log
        assert running.ask("GET", "/v2/health/ready").status == 200


@pytest.mark.slow
@pytest.mark.parametrize("dribble", [b"", b"X"])
def test_a_connection_that_asks_nothing_is_closed(server: ServerProcess, dribble: bytes) -> None:
    """Even when a byte of its head comes each second."""
    with socket.create_connection((server.host, server.port), timeout=2) as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        for _ in range(30):
            try:
                connection.sendall(dribble)
                if connection.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except OSError:
                return
    pytest.fail("it is still open")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/v2/models/predict/infer", {}, 405),
        ("POST", "/v2/health/live", {}, 405),
        ("GET", "/../etc/passwd", {}, 404),
        ("GET", "/v2/models/%00/ready", {}, 404),
        ("GET", "/v2/models/predict/versions/2/ready", {}, 404),
        ("POST", "/v2/models/predict/infer", {"Content_Type": "text/plain"}, 415),
        ("POST", "/v2/models/predict/infer", {"Content_Type": "multipart/form-data"}, 415),
        ("POST", "/v2/models/predict/infer", {"Content_Type": "application/json"}, 400),
        ("POST", "/v2/models/predict/infer", {"Inference_Header_Content_Length": "1"}, 400),
    ],
)
def test_every_error_is_json_with_one_message(
    server: ServerProcess, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    answer = server.ask(method, path, **headers)
    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/json")
    assert list(answer.json) == ["error"]


def test_metrics_are_read_by_prometheus_and_tell_of_the_device(server: ServerProcess) -> None:
    infer(server.client(), "predict", IMAGES[:1])
    found = server.metrics()
    assert found["densepure_rt_ready"] == 1
    assert found['densepure_rt_requests_total{model="predict",outcome="answered"}'] >= 1
    count = found['densepure_rt_request_seconds_count{model="predict"}']
    assert found['densepure_rt_request_seconds_bucket{le="+Inf",model="predict"}'] == count >= 1
    assert found["densepure_rt_classifier_calls_total"] >= 13
    assert found["densepure_rt_unet_calls_total"] == 0  # QUICK takes no steps
    assert found["densepure_rt_device_seconds_total"] > 0
    assert 0 < found['densepure_rt_batch_fill{kind="classify"}'] <= 1
    assert not any("unet" in name and "model=" in name for name in found)  # no series of models that are not there


def test_a_page_of_another_site_is_refused_and_so_is_a_name_that_is_not_the_servers(server: ServerProcess) -> None:
    """As browsers send them, the content type of a Blob among them: none."""
    own, path = f"127.0.0.1:{server.port}", "/v2/models/predict/infer"
    for host, origin, status in (
        (own, f"http://{own}", 200),
        (f"localhost:{server.port}", f"http://localhost:{server.port}", 200),
        (own, "http://example.org", 403),
        (own, "null", 403),
        (f"example.org:{server.port}", f"http://example.org:{server.port}", 403),
    ):
        answer = server.ask("POST", path, certify_json(IMAGES[:1]), Host=host, Origin=origin)
        assert (answer.status, answer.headers["Content-Type"]) == (status, "application/json")
        assert ("error" in answer.json) == (status == 403)


# its end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_it_answer_what_it_has_and_end_with_0(number: int) -> None:
    with serving(*LONG.split(), "--drain", "2s") as running:
        found: list[Any] = []
        client = running.client()
        asking = threading.Thread(target=lambda: found.append(infer(client, "certify", IMAGES[:1])))
        asking.start()
        until(lambda: running.metrics()["densepure_rt_samples_total"] > 0)
        running.process.send_signal(number)
        until(lambda: running.ask("GET", "/v2/health/ready").status == 400, 2)
        answer = running.ask("POST", "/v2/models/certify/infer", certify_json(IMAGES[:1]), **JSON)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "10")
        asking.join(timeout=20)
        assert found[0]["stopped"] == [True]
        assert running.process.wait(timeout=20) == 0


def test_a_second_signal_ends_it_at_once() -> None:
    with serving(*LONG.split(), "--drain", "10min") as running:
        asking = threading.Thread(target=lambda: infer(running.client(), "certify", IMAGES[:1]))
        asking.start()
        until(lambda: running.metrics()["densepure_rt_samples_total"] > 0)
        running.process.send_signal(signal.SIGTERM)
        until(lambda: running.ask("GET", "/v2/health/ready").status == 400, 1)
        running.process.send_signal(signal.SIGTERM)
        asking.join(timeout=10)
        assert running.process.wait(timeout=10) == 0


# parts


def test_deadlines_have_a_default_and_a_most() -> None:
    def asked(milliseconds: float | None) -> InferRequest:
        return InferRequest(None, np.zeros((1, 1, 2, 2), np.uint8), {}, milliseconds)

    deadlines = Deadlines(default=2.0, most=5.0)
    assert [deadlines.of(asked(milliseconds)) for milliseconds in (None, 1.0, 5000.0)] == [2.0, 0.001, 5.0]
    with pytest.raises(ProtocolError, match="at most 5000"):
        deadlines.of(asked(5001.0))
    with pytest.raises(UsageError, match="`most` 1 s is not less"):
        Deadlines(default=2.0, most=1.0)


def test_a_free_port_is_found_for_0() -> None:
    with listen("127.0.0.1", 0) as listener:
        assert listener.getsockname()[1] > 0
