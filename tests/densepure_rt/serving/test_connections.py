"""What a connection may send, and how many there may be: against h11, real sockets and a server's own descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import h11
import pytest
from prometheus_client import Counter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from densepure_rt.serving.connections import EVENTS, MOST_HEAD, RESERVE, Config, Events, TimedSelector
from densepure_rt.serving.metrics import REFUSED_CONNECTIONS, SLOW_TURNS
from densepure_rt.serving.server import Server, listen
from tests.support.server import QUICK, ServerProcess, serving, until

HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
ONE_BYTE = b"1\r\nx\r\n"
MOST = 3


def total(counter: Counter) -> float:
    return next(sample.value for family in counter.collect() for sample in family.samples)


@contextlib.contextmanager
def answering() -> Iterator[tuple[int, Server]]:
    """The port of a server in this process, of MOST connections: POST /size says how much came."""

    async def size(request: Request) -> Response:
        return Response(str(len(await request.body())))

    async def well(_: Request) -> Response:
        return Response("well")

    app = Starlette(routes=[Route("/size", size, methods=["POST"]), Route("/v2/health/live", well)])
    with listen("127.0.0.1", 0) as listener:
        server = Server(Config(app, MOST), lambda: None)

        def run() -> None:
            loop = asyncio.SelectorEventLoop(TimedSelector())
            loop.run_until_complete(server.serve([listener]))
            loop.close()

        thread = threading.Thread(target=run)
        thread.start()
        until(lambda: server.started)
        port = listener.getsockname()[1]
        try:
            yield port, server
        finally:
            server.should_exit = True
            thread.join()


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def answer_to(port: int, *parts: bytes) -> bytes:
    with connected(port) as connection:
        with contextlib.suppress(OSError):  # it has been hung up
            for part in parts:
                connection.sendall(part)
        found = b""
        with contextlib.suppress(OSError):
            while more := connection.recv(2**16):
                found += more
                if re.search(b"(?s)\r\n\r\n.+", found) and b"connection: close" not in found.lower():
                    break
        return found


def get(port: int, path: str) -> bytes:
    return answer_to(port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


# what one sends


def test_no_more_events_are_read_than_the_allowance_and_none_is_lost() -> None:
    ours, plain = Events(h11.SERVER), h11.Connection(h11.SERVER)
    for connection in (ours, plain):
        connection.receive_data(HEAD % b"/" + b"".join(chunk(b"x" * size) for size in range(5, 105)) + b"0\r\n\r\n")

    def read() -> list[Any]:
        ours.allowance = 7
        return list(iter(ours.next_event, h11.NEED_DATA))

    expected: list[Any] = []
    while not expected or not isinstance(expected[-1], h11.EndOfMessage):
        expected.append(plain.next_event())
    found: list[Any] = []
    while len(found) < len(expected):
        assert 0 < len(batch := read()) <= 7
        found += batch
    assert found == expected


def test_a_body_in_chunks_is_whole_however_it_is_cut() -> None:
    """More chunks than are read in ten turns, of sizes that bring their framing."""
    content = bytes(range(256)) * 40
    pieces = [content[at : at + 7] for at in range(0, len(content), 7)]
    assert len(pieces) > 10 * EVENTS
    sent = HEAD % b"/size" + b"".join(map(chunk, pieces)) + b"0\r\n\r\n"
    with answering() as (port, _):
        assert answer_to(port, sent).endswith(b"\r\n\r\n10240")
        assert answer_to(port, sent[:5000], sent[5000:5001], sent[5001:]).endswith(b"\r\n\r\n10240")
        few = HEAD % b"/size" + 50 * ONE_BYTE + b"0\r\n\r\n"
        assert answer_to(port, few).endswith(b"\r\n\r\n50")  # a little of anything is taken
        assert answer_to(port, HEAD % b"/size" + chunk(bytes(2**20)) + b"0\r\n\r\n").endswith(b"\r\n\r\n1048576")


@pytest.mark.parametrize("path", [b"/size", b"/nowhere"])
def test_a_body_that_is_mostly_framing_is_hung_up_on(path: bytes) -> None:
    with answering() as (port, server):
        found = answer_to(port, HEAD % path, *[ONE_BYTE * 5000] * 20)
        assert found.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404", b""))
        until(lambda: not server.server_state.connections, 5)
        alone = answer_to(port, HEAD % b"/size" + ONE_BYTE * 300)
        assert alone.startswith(b"HTTP/1.1 400 ")
        assert b"the body comes in chunks of a few bytes: send larger ones, or a Content-Length" in alone


def test_a_head_has_one_limit_whether_it_comes_at_once_or_not() -> None:
    head = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (MOST_HEAD - 100) + b"\r\n\r\n"
    with answering() as (port, _):
        assert answer_to(port, head).startswith(b"HTTP/1.1 200 ")
        for parts in (
            [head.replace(b"X:", b"X: " + b"x" * 200)],
            [b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 50_000 + b"\r\n"],
        ):
            assert answer_to(port, *parts).startswith(b"HTTP/1.1 400 ")


def test_what_is_no_http_after_an_answer_is_hung_up_on_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with answering() as (port, server):
        with connected(port) as connection:
            connection.sendall(HEAD % b"/nowhere")
            found = b""
            while not found.endswith(b"\r\n\r\nNot Found"):
                found += connection.recv(2**16)
            connection.sendall(b"no chunk\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        until(lambda: not server.server_state.connections, 5)
    assert caplog.messages == []


def test_turns_that_take_long_are_counted_by_the_processors_time() -> None:
    def busy() -> None:
        end = time.thread_time() + 0.08
        while time.thread_time() < end:
            pass

    async def turns() -> None:
        before = total(SLOW_TURNS)
        for work, slow in ((busy, 1), (lambda: time.sleep(0.1), 0), (lambda: None, 0)):
            asyncio.get_running_loop().call_soon(work)
            await asyncio.sleep(0.01)
            assert total(SLOW_TURNS) == before + slow
            before += slow

    loop = asyncio.SelectorEventLoop(TimedSelector())
    loop.run_until_complete(turns())
    loop.close()


# how many there are


def test_beyond_the_limit_what_is_urgent_is_answered_and_the_rest_is_told_to_come_again() -> None:
    with answering() as (port, server), contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connected(port)) for _ in range(MOST)]
        until(lambda: len(server.server_state.connections) == MOST)
        before = total(REFUSED_CONNECTIONS)
        assert get(port, "/v2/health/live").startswith(b"HTTP/1.1 200 ")
        for path in ("/v2", "/size", "/v2/health/live/x"):
            refused = get(port, path)
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1" in refused.lower()
        assert total(REFUSED_CONNECTIONS) == before + 3
        idle[0].sendall(b"POST /size HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        assert idle[0].recv(2**16).startswith(b"HTTP/1.1 200 ")


def test_connections_that_ask_nothing_keep_nobody_out() -> None:
    """There are never more than the limit and its reserve; the first that asks nothing gives way, none that asks."""
    with answering() as (port, server), contextlib.ExitStack() as stack:
        for _ in range(MOST + RESERVE):
            stack.enter_context(connected(port))
        until(lambda: len(server.server_state.connections) == MOST + RESERVE)
        asks = stack.enter_context(connected(port))
        asks.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: ")
        for _ in range(20):
            began = time.monotonic()
            assert get(port, "/v2/health/live").startswith(b"HTTP/1.1 200 ")
            assert time.monotonic() - began < 1
            stack.enter_context(connected(port))
        until(lambda: len(server.server_state.connections) <= MOST + RESERVE)


def idle_at(server: ServerProcess, count: int, stack: contextlib.ExitStack) -> None:
    for _ in range(count):
        connection = stack.enter_context(socket.socket())
        connection.setblocking(False)
        connection.connect_ex((server.host, server.port))


def limit_of(files: int) -> str:
    return f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))"


def test_the_limit_follows_the_descriptors_of_the_process() -> None:
    with serving(*QUICK, "--no-demo", fault=limit_of(128)) as running, contextlib.ExitStack() as stack:
        idle_at(running, 250, stack)
        for _ in range(5):
            began = time.monotonic()
            assert running.ask("GET", "/v2/health/ready").status == 200
            assert time.monotonic() - began < 2
            time.sleep(0.2)
        assert running.metrics()["densepure_rt_accept_errors_total"] == 0
        code, said = running.end()
    assert (code, said) == (0, "")


def test_too_few_descriptors_are_said_at_the_start() -> None:
    with pytest.raises(AssertionError, match=r"this process may open 70 files, (.|\n)*ulimit -n"):  # noqa: SIM117
        with serving(*QUICK, "--no-demo", fault=limit_of(70)):
            pass


def test_a_connection_that_cannot_be_accepted_is_said_once_a_second_and_counted() -> None:
    """The limit is lied about, so that the system itself refuses."""
    fault = "from densepure_rt.serving import server; server.room_for_connections = lambda: 512"
    with serving(*QUICK, "--no-demo", fault=f"{limit_of(64)}\n{fault}") as running:
        with contextlib.ExitStack() as stack:
            idle_at(running, 100, stack)
            time.sleep(2.5)
        until(lambda: running.ask("GET", "/v2/health/live").status == 200, 10)
        counted = running.metrics()["densepure_rt_accept_errors_total"]
        code, said = running.end()
    assert code == 0
    assert 1 <= counted <= 6
    lines = said.splitlines()
    assert len(lines) == counted
    assert all(line == "ERROR: a connection cannot be accepted (Too many open files)" for line in lines)
