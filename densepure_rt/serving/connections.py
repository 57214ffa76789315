"""HTTP/1.1 connections of clients that are slow on purpose, too many, or send what costs more to read than to send.

All of them share one event loop, so that none may hold it for long: what one sends is read a few events at a time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import resource
import selectors
import socket
import time
from collections import deque
from typing import Any

import h11
import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from densepure_rt import logs
from densepure_rt.errors import EnvironmentFault
from densepure_rt.serving.metrics import ACCEPT_ERRORS, REFUSED_CONNECTIONS, SLOW_TURNS
from densepure_rt.serving.protocol import encode_error

MOST_CONNECTIONS = 512  # at a time
RESERVE = 32  # connections beyond those, for URGENT requests alone
OTHER_FILES = 48  # descriptors for connections that come and go, the pipes of decoders, engines and logs
URGENT = re.compile("/v2/health/(live|ready)|/v2/models/[^/]+/ready|/metrics")
IDLE_SECONDS = 20.0  # in which a connection has to begin a request, from its start or its last answer
RESERVE_SECONDS = 2.0  # the same, of a connection in the reserve
CLOSE_SECONDS = 3.0  # in which connections have to close at the end
READ_BYTES = 2**14  # of an answer that does not fit the buffers, to be read in IDLE_SECONDS
MOST_HEAD = 2**14  # bytes; h11's own limit, which it does not hold a head to that comes at once
EVENTS = 64  # of a connection that are read at once; h11 takes 6 us for a chunk of one byte
CHUNK_FRAMING = 5  # bytes beside the content of the shortest chunk: RFC 9112, 7.1
FREE_FRAMING = 1000  # bytes by which framing may outweigh the content of a body
ACCEPTS = 16  # connections that are accepted at once, and that may be open beyond the reserve until others have closed
ACCEPT_PAUSE = 1.0  # seconds, after one could not be
SLOW_SECONDS = 0.05  # of a processor, for a turn of the event loop
HEAD_END = re.compile(rb"\n\r?\n")


class TimedSelector(selectors.DefaultSelector):
    """Counts the turns of an event loop that take its thread long, by the processor's time that it had."""

    _since = math.inf  # of `time.thread_time`

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if time.thread_time() - self._since > SLOW_SECONDS:
            SLOW_TURNS.inc()
        found = super().select(timeout)
        self._since = time.thread_time()
        return found


class Events(h11.Connection):
    """Parse what a client sends: no more events than its allowance, and no body that is mostly framing."""

    allowance = 0
    fault: str | None = None
    _framing = _content = 0  # bytes of a body

    def next_event(self) -> Any:
        """Return an event; NEED_DATA when the allowance is used up. Raises RemoteProtocolError; `fault` says more."""
        if not self.allowance:
            return h11.NEED_DATA
        self.allowance -= 1
        if self.their_state is h11.IDLE:
            head = self.trailing_data[0]
            if len(head) > MOST_HEAD and not HEAD_END.search(head, 0, MOST_HEAD):
                raise self._refused(f"the head of a request has {MOST_HEAD:,} bytes at most on this server")
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._framing = self._content = 0
        elif isinstance(event, h11.Data):
            self._framing += CHUNK_FRAMING * event.chunk_start
            self._content += len(event.data)
            if self._framing > self._content + FREE_FRAMING:
                raise self._refused("the body comes in chunks of a few bytes: send larger ones, or a Content-Length")
        return event

    def _refused(self, fault: str) -> h11.RemoteProtocolError:
        self.fault = fault
        return h11.RemoteProtocolError(fault)


class Flow(FlowControl):
    """uvicorn's, for a connection that may be held while it waits for its turn."""

    held = False

    def hold(self) -> None:
        self.held = True
        self.pause_reading()

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class Backlog:
    """Connections that have sent more than is read at once. One of them goes on in each turn of the event loop."""

    def __init__(self) -> None:
        self._waiting = deque[PunctualProtocol]()

    def put(self, connection: PunctualProtocol) -> None:
        if not self._waiting:
            connection.loop.call_soon(self._next)
        self._waiting.append(connection)

    def _next(self) -> None:
        connection = self._waiting.popleft()
        if self._waiting:
            connection.loop.call_soon(self._next)
        connection.go_on()


class Config(uvicorn.Config):
    """uvicorn's, for `PunctualProtocol`; and what the connections of one server share."""

    def __init__(self, app: ASGIApp, most_connections: int = MOST_CONNECTIONS) -> None:
        super().__init__(
            app,
            loop="asyncio",
            http=PunctualProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=math.ceil(IDLE_SECONDS),
            timeout_graceful_shutdown=int(CLOSE_SECONDS),
        )
        self.most_connections, self.backlog_of_input = most_connections, Backlog()
        self.reserve: dict[PunctualProtocol, None] = {}  # in the order in which they came


class PunctualProtocol(H11Protocol):
    """HTTP/1.1 for clients that may be slow on purpose, or too many.

    One that sends more before it has its answer is hung up on: what it sends would stand before its own hanging up,
    which would not be seen.
    """

    waits: asyncio.TimerHandle | None = None  # for a request, or for an answer to be read
    unread = 0  # bytes of answers, when it began to
    config: Config
    conn: Events
    flow: Flow

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.conn = Events(h11.SERVER, MOST_HEAD)
        self.seconds = IDLE_SECONDS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own does
        super().connection_made(transport)
        self.flow = Flow(transport)
        if len(self.connections) > self.config.most_connections:
            self.take_from_reserve()
        self.wait()

    def take_from_reserve(self) -> None:
        """Let it ask what is urgent. Where the reserve is full, its first connection that asks nothing gives way."""
        reserve = self.config.reserve
        self.app, self.seconds = only_urgent(self.app), min(RESERVE_SECONDS, IDLE_SECONDS)
        reserve[self] = None
        if len(reserve) > RESERVE:
            next(each for each in reserve if each is self or not each.answering).give_way()

    def give_way(self) -> None:
        self.config.reserve.pop(self, None)
        REFUSED_CONNECTIONS.inc()
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.waits is not None:
            self.waits.cancel()
        self.config.reserve.pop(self, None)
        super().connection_lost(exc)

    @property
    def answering(self) -> bool:
        """Say whether a request has begun whose answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def handle_events(self) -> None:
        self.conn.allowance = EVENTS
        super().handle_events()
        if self.answering and not self.cycle.more_body and self.conn.trailing_data[0]:
            self.transport.abort()
        elif self.conn.allowance == 0 and not self.flow.held:
            self.flow.hold()
            self.config.backlog_of_input.put(self)

    def go_on(self) -> None:
        """Read on, after its turn has come."""
        self.flow.held = False
        if self.transport.is_closing():
            return
        self.handle_events()
        if self.cycle is None or len(self.cycle.body) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or costs too much; hang up where an answer has begun."""
        if self.cycle is not None:  # whoever is about to answer is told that the client is gone
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(self.conn.fault or msg)
        else:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.wait()

    def on_response_complete(self) -> None:
        self.wait()
        super().on_response_complete()

    def wait(self) -> None:
        """uvicorn's own timer is stopped by the first byte that comes, and another may come each minute."""
        if self.waits is not None:
            self.waits.cancel()
        self.unread = self.transport.get_write_buffer_size()
        self.waits = self.loop.call_later(self.seconds, self.close_if_idle)

    def close_if_idle(self) -> None:
        if self.answering and not self.flow.write_paused:
            return
        if 0 < self.transport.get_write_buffer_size() <= self.unread - READ_BYTES:
            self.wait()
        else:
            self.transport.abort()  # to close would wait for the client to read the rest


def only_urgent(app: Any) -> Any:
    """`app` for whoever asks whether the server is well; others are told to come again."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if URGENT.fullmatch(scope["path"]):
            await app(scope, receive, send)
            return
        REFUSED_CONNECTIONS.inc()
        body = encode_error("as many connections are open as may be: try again later")
        await Response(body, 503, {"Retry-After": "1", "Connection": "close"}, "application/json")(scope, receive, send)

    return answer


def room_for_connections() -> int:
    """Count the connections that the descriptor limit leaves room for. Raises EnvironmentFault where that is none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    taken = len(os.listdir("/dev/fd")) + OTHER_FILES + RESERVE
    if soft <= taken:
        raise EnvironmentFault(
            f"this process may open {soft} files, which leaves none for connections: "
            f"run ulimit -n {taken + MOST_CONNECTIONS}"
        )
    return min(MOST_CONNECTIONS, soft - taken)


class Door:
    """Accepts the connections of a listening socket: a few at a time, and none for a second after one could not be."""

    def __init__(self, listener: socket.socket, server: uvicorn.Server) -> None:
        self._listener, self._server = listener, server
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._again: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._open()

    def _open(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        self._loop.remove_reader(self._listener)
        if self._again is not None:
            self._again.cancel()

    def _accept(self) -> None:
        config, open_ones = self._server.config, self._server.server_state.connections
        assert isinstance(config, Config)
        room = config.most_connections + RESERVE + ACCEPTS - len(open_ones) - len(self._tasks)
        for _ in range(min(ACCEPTS, room)):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                ACCEPT_ERRORS.inc()
                logs.say(f"a connection cannot be accepted ({error.strerror})", logging.ERROR, error="accept")
                self.close()
                self._again = self._loop.call_later(ACCEPT_PAUSE, self._open)
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._loop.connect_accepted_socket(self._protocol, connection))
            self._tasks.add(task)
            task.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its client was gone: looked at, it is not logged

    def _protocol(self) -> asyncio.Protocol:
        server = self._server
        return PunctualProtocol(server.config, server.server_state, server.lifespan.state, self._loop)
