"""`densepure-rt serve` as its user meets it: what it prints, what it refuses, and that it answers as `certify` does."""

from __future__ import annotations

import json
import signal
import socket
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from densepure_rt.images.datasets import open_images
from densepure_rt.keys import stored_key
from tests.support.cli import Done, cli, refused
from tests.support.pictures import file_of
from tests.support.server import QUICK, decoders, serving, until

IMAGES = [image.pixels for image in open_images(None, (1, 28, 28), [str(i) for i in range(10)]).select(60, 3)]


def request(image: Any) -> bytes:
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 1, 28, 28], "data": image.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def values(answer: Any) -> dict[str, Any]:
    return {output["name"]: output["data"][0] for output in answer.json["outputs"]}


@pytest.fixture
def unlabelled(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(IMAGES):
        Image.fromarray(np.asarray(image[0])).save(folder / f"{i}.png")
    return folder


def test_a_served_certificate_is_that_of_certify_with_the_same_key_and_the_key_shows_nowhere(
    tmp_path: Path, unlabelled: Path
) -> None:
    key, log = tmp_path / "server.key", tmp_path / "log"
    with serving(*QUICK, "--key", key, "--no-demo", "--verbose", "--log-json", log) as running:
        assert running.ready_line == f"serving predict and certify at http://127.0.0.1:{running.port}\n"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        seen = [running.ask("POST", "/v2/models/certify/infer", request(image)) for image in IMAGES]
        found = [values(answer) for answer in seen]
        seen += [running.ask("GET", path) for path in ("/metrics", "/v2", "/v2/models/certify", "/demo/", "/nowhere")]
        assert seen[-2].status == 404  # --no-demo
        code, said = running.end()
    assert code == 0
    secret = stored_key(key)
    assert secret is not None
    everything = b"".join(answer.body for answer in seen) + said.encode() + log.read_bytes()
    for form in (secret, secret.hex().encode(), repr(secret).encode(), str(list(secret)).encode()):
        assert form not in everything
    done = cli("certify", *QUICK, "--key", key, "--images", unlabelled, "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert [-1 if each["predict"] is None else each["predict"] for each in records] == [each["label"] for each in found]
    assert [each["radius"] or 0.0 for each in records] == [each["radius"] for each in found]
    for name in ("n", "n_a", "p_lower"):
        assert [each[name] for each in records] == [each[name] for each in found]
    assert len({each["radius"] for each in found}) > 1
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    requests = [line for line in lines if "outcome" in line]
    assert [(line["model"], line["status"]) for line in requests] == [("certify", 200)] * len(IMAGES)
    assert "certify: answered" in said


def test_a_served_prediction_is_that_of_predict_with_the_same_seed(unlabelled: Path) -> None:
    options = "--sigma 0.5 --steps 0 --alpha 0.05 --batch 8 --threads 2 --seed 1".split()
    with serving(*options) as running:
        assert running.ready_line.endswith(f", a page at http://127.0.0.1:{running.port}/demo/\n")
        answers = [running.ask("POST", "/v2/models/predict/infer", request(image)) for image in IMAGES]
        assert b"<title>" in running.ask("GET", "/demo/").body
        code, said = running.end()
    assert (code, "seed public" in said) == (0, True)
    done = cli("predict", *options, "--images", unlabelled, "--json")
    for line, answer in zip(done.stdout.splitlines(), answers, strict=True):
        told, found = json.loads(line), values(answer)
        assert (-1 if told["predict"] is None else told["predict"], told["n"]) == (found["label"], found["n"])


def test_secrets_rotate_while_it_serves(tmp_path: Path) -> None:
    key = tmp_path / "server.key"
    with serving(*QUICK, "--key", key, "--rotate", "1s", "--no-demo") as running:
        first = stored_key(key)

        def rotated() -> bool:
            assert running.ask("POST", "/v2/models/predict/infer", request(IMAGES[0])).status == 200
            return stored_key(key) != first

        until(rotated)
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_name_that_it_is_given_is_its_own() -> None:
    with serving(*QUICK, "--no-demo", "--allow-host", "certify.example.org") as running:
        for host, status in (("certify.example.org", 200), ("Certify.Example.Org:8443", 200), ("example.org", 403)):
            own = {"Host": host, "Origin": f"https://{host}"}
            assert running.ask("POST", "/v2/models/predict/infer", request(IMAGES[0]), **own).status == status


def test_it_ends_even_when_a_batch_does_not_and_says_so() -> None:
    """What was asked is answered by what is known; the exit code says that something is wrong with the device."""
    fault = (
        "import time; from densepure_rt.serving import service; "
        "service.MeteredDevice.collect = lambda self: time.sleep(3600); service.END_SECONDS = 0.5"
    )
    with serving(*QUICK, "--no-demo", "--drain", "0.5s", fault=fault) as running, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.ask, "POST", "/v2/models/certify/infer", request(IMAGES[0]))
        until(lambda: running.metrics()['densepure_rt_open_images{model="certify"}'] == 1)
        code, said = running.end()
        found = values(asked.result())
    assert (code, found["stopped"], found["n"]) == (3, True, 0)
    assert "a batch has not ended in 0.5 s" in said


CHILD_SLEEPS = """
from densepure_rt.images import decoder
fault = "import densepure_rt.images.decoder as d; d.fitted = lambda *_: d.time.sleep(3600); "
decoder.BOOT = decoder.BOOT.replace("from", fault + "from", 1)
"""


def test_who_hangs_up_takes_the_picture_along_and_the_next_one_is_read() -> None:
    picture = file_of(Image.fromarray(IMAGES[0][0]))
    head = f"POST /demo/image HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(picture)}\r\n\r\n".encode()
    with serving(*QUICK, fault=CHILD_SLEEPS) as running:
        for _ in range(2):  # the second has waited for nothing that the first left
            with socket.create_connection((running.host, running.port)) as connection:
                connection.sendall(head + picture)
                until(lambda: len(decoders(running.process.pid)) == 1)
            until(lambda: decoders(running.process.pid) == [], 5)
        assert running.end() == (0, "")


THREAD_SLEEPS = "import time; from densepure_rt.serving import demo; demo.Demo.draw = lambda *_: time.sleep(3600)"
LOOP_SLEEPS = """
import time
from densepure_rt.serving import api
async def about(*_): time.sleep(3600)
api.Api.about = about
"""


@pytest.mark.parametrize(
    ("fault", "method", "path", "code", "words"),
    [
        (CHILD_SLEEPS, "POST", "/demo/image", 0, ""),
        (THREAD_SLEEPS, "POST", "/demo/samples", 0, ""),
        (LOOP_SLEEPS, "GET", "/v2", 3, "by force"),
    ],
    ids=["a child", "a thread", "the event loop"],
)
def test_it_ends_within_its_drain_and_five_seconds_whatever_hangs(
    fault: str, method: str, path: str, code: int, words: str
) -> None:
    picture = file_of(Image.fromarray(IMAGES[0][0]))
    with serving(*QUICK, "--drain", "0.5s", fault=fault) as running, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.ask, method, path, picture if method == "POST" else None)
        time.sleep(1.5)
        left, began = decoders(running.process.pid), time.monotonic()
        found, said = running.end()
        took = time.monotonic() - began
        assert (found, words in said, took < 5.5) == (code, True, True), (found, said, took)
        assert (len(left) == 1) == (method == "POST")
        assert not any(Path(f"/proc/{pid}").exists() for pid in left)
        with suppress(OSError, HTTPException):
            assert asked.result().status == (503 if path == "/demo/image" else 500)


def test_a_signal_that_is_ignored_when_it_starts_is_not_heard() -> None:
    """As under nohup."""
    fault = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    with serving(*QUICK, "--no-demo", fault=fault) as running:
        running.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert running.ask("GET", "/v2/health/ready").status == 200
        assert running.end() == (0, "")


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "prometheus_client"])
def test_without_its_packages_it_exits_3_with_the_pip_command(package: str) -> None:
    refused(cli("serve", without=(package,)), 3, "pip install 'densepure-rt[serve]'")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ("--method fixed", 2, ["--method fixed", "sequential or radius"]),
        ("--method best", 2, ["--method best"]),
        ("--radii 0,x", 2, ["radii"]),
        ("--radii 0 --method radius", 2, ["radii"]),
        ("--queue 0", 2, ["got 0"]),
        ("--decoders 0", 2, ["--decoders", "got 0"]),
        ("--deadline soon", 2, ["--deadline soon"]),
        ("--deadline 10min", 2, ["--deadline 600 s", "--max-deadline 300 s"]),
        ("--drain 0", 2, ["--drain 0"]),
        ("--rotate 0", 2, ["--rotate 0"]),
        ("--seed 1 --rotate 24h", 2, ["--rotate"]),
        ("--seed 1 --key x", 2, ["--key"]),
        ("--key /nowhere/x", 3, ["/nowhere/x"]),
        ("--key /dev/null", 3, ["cannot read the key /dev/null", "it is a device"]),
        ("--port -1", 2, ["--port", "-1"]),
        ("--port 65536", 2, ["--port", "65536"]),
        ("--allow-host http://example.org", 2, ["--allow-host", "http://example.org"]),
        ("--host=", 2, ["--host", "0.0.0.0"]),
        ("--host 203.0.113.7", 3, ["203.0.113.7", "--host"]),
        ("--host nowhere.invalid", 3, ["nowhere.invalid", "--host"]),
        ("--engine nowhere.onnx", 2, ["nowhere.onnx"]),
        ("--n 1000000000000", 2, ["n"]),
        ("--sigma 0", 2, ["sigma"]),
        ("--log-json /nowhere/log", 3, ["/nowhere/log"]),
    ],
)
def test_what_cannot_be_served_is_refused_before_it_is(
    here: Callable[..., Done], options: str, code: int, words: list[str]
) -> None:
    done = here("serve", "--steps", 1, "--port", 0, "--batch", 4, "--threads", 1, *options.split())
    done.stderr = done.stderr.replace(
        "seed public: answers are valid only for images fixed before the seed was chosen\n", ""
    )
    refused(done, code, *words)


def test_a_port_that_is_taken_exits_3(here: Callable[..., Done]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(here("serve", "--port", taken.getsockname()[1]), 3, "cannot listen", "--port")
