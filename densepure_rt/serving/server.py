"""The server's process: sockets, signals, draining."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette

from densepure_rt import logs
from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.serving.connections import MOST_CONNECTIONS, Config, Door, TimedSelector, room_for_connections
from densepure_rt.serving.decoders import Decoders
from densepure_rt.serving.ending import LastResort
from densepure_rt.serving.service import Service

FORCE_SECONDS = 4.5  # after the drain, in which the server has to end; less than 5 s with the end of its process
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LEFT_SECONDS = 0.5  # in which threads have to end that nobody waits for any more


# from its start to its end


class Server(uvicorn.Server):
    """uvicorn, without its signal handlers and with doors of ours, that says when it has started."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self.say_started = started
        self.doors: list[Door] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        self.doors += [Door(listener, self) for listener in sockets or []]
        self.say_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for door in self.doors:
            door.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address of this machine; port 0: any that is free. Raises UsageError or EnvironmentFault."""
    if not host:
        raise UsageError("`host` is an address or a name of this machine, 0.0.0.0 for all of its addresses, got ''")
    if not 0 <= port < 2**16:
        raise UsageError(f"`port` is a number from 0 to {2**16 - 1}, got {port}")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=MOST_CONNECTIONS)
    except (OSError, UnicodeError) as error:
        why = str(getattr(error, "strerror", error)).partition(" (while")[0]  # which names the address again
        raise EnvironmentFault(
            f"cannot listen at {host} port {port} ({why}): choose another address with `host` and `port`"
        ) from error


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    app: Starlette,
    service: Service,
    listener: socket.socket,
    drain_seconds: float,
    started: Callable[[], None],
    decoders: Decoders,
) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP, then answer what is under way, within `drain_seconds`.

    A second signal answers it at once, by what its samples bear out. A signal that is ignored stays so. The process
    ends FORCE_SECONDS after the drain at the latest; once all is answered, LEFT_SECONDS after this returns.

    Raises:
        EnvironmentFault: When the process may not open enough files.
    """
    gc.collect()
    gc.freeze()  # what is there stays: to look through it again would hold the event loop up
    server, force = Server(Config(app, room_for_connections()), started), LastResort()
    loop, exit_code = asyncio.SelectorEventLoop(TimedSelector()), EnvironmentFault.exit_code
    try:
        loop.run_until_complete(until_told(server, service, listener, drain_seconds, decoders, force))
        exit_code = exit_code if service.stuck else 0
    finally:
        force.within(LEFT_SECONDS, exit_code, "")
        loop.close()  # waits for no thread


async def until_told(
    server: Server,
    service: Service,
    listener: socket.socket,
    drain_seconds: float,
    decoders: Decoders,
    force: LastResort,
) -> None:
    ending: list[asyncio.Task[None]] = []

    async def drained() -> None:
        await asyncio.to_thread(service.answer_all, drain_seconds)
        server.should_exit = True
        await asyncio.to_thread(service.end)  # while connections close

    def told_to_end() -> None:
        if ending:
            service.stop_all()
        else:
            logs.say("ending: no more requests are taken, those that are there are answered")
            decoders.close()
            ending.append(asyncio.ensure_future(drained()))

    def hear(*_: object) -> None:  # even while the event loop is held up
        if not force.set:
            why = f"the server has not ended {FORCE_SECONDS:g} s after its drain: it is ended by force"
            force.within(drain_seconds + FORCE_SECONDS, EnvironmentFault.exit_code, why)
        loop.call_soon_threadsafe(told_to_end)

    loop = asyncio.get_running_loop()
    with heard_by(hear):
        await server.serve(sockets=[listener])
        await asyncio.gather(*ending)
        if left := asyncio.all_tasks() - {asyncio.current_task()}:  # of clients that are gone
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=LEFT_SECONDS)


@contextlib.contextmanager
def heard_by(handler: Callable[..., None]) -> Iterator[None]:
    """Have ENDING signals handled so, and ignored afterwards. One that is ignored before, as by nohup, stays so."""
    heard = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
    for number in heard:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_IGN)
