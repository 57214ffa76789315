"""Runs on a Ray cluster: actors that open engines and draw samples; the driver alone judges, and keeps the ledger."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray._private import ray_constants
from ray._raylet import Config  # type: ignore[attr-defined]  # compiled, and without types
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as NodeAffinity

from densepure_rt import logs, signals
from densepure_rt._version import __version__
from densepure_rt.cluster.fleet import WAIT, Fleet, Member, cause_of
from densepure_rt.cluster.tasks import Engines, Task, TaskResult
from densepure_rt.errors import CheckFailed, DensePureError, EnvironmentFault, UsageError
from densepure_rt.runtime.device import Kind
from densepure_rt.runtime.machine import available_cores
from densepure_rt.runtime.reverse import decide
from densepure_rt.runtime.schedule import Chain
from densepure_rt.smoothing.voting import Ballot
from densepure_rt.text import plural

if TYPE_CHECKING:
    from densepure_rt.smoothing.classifier import SmoothedClassifier

REACHED = 10.0  # seconds for the head of a cluster to answer in
STORE_BYTES = 128 << 20  # of Ray's object store on one machine; a task and its result are a few hundred kilobytes
LOCAL, REMOTE = "ray", "ray://"


@dataclass(frozen=True)
class WorkerEngines:
    """The engines of a worker and how it opens them; see `smoothing.load`."""

    engine: Path | None
    classifier: Path | None
    batch: int | None
    threads: int
    provider: str
    engine_sha256: str | None
    trust: bool


class Worker:
    """The actor: engines that are opened once, and nothing else that lasts."""

    def __init__(self, recipe: WorkerEngines) -> None:
        from densepure_rt.smoothing.classifier import load

        self.opened: SmoothedClassifier | Exception
        try:
            self.opened = load(**vars(recipe))
        except Exception as error:  # raised where it is read: an actor that dies as it is made says less
            self.opened = error

    @property
    def classifier(self) -> SmoothedClassifier:
        if isinstance(self.opened, DensePureError):
            raise type(self.opened)(f"on {platform.node()}: {self.opened}")
        if isinstance(self.opened, Exception):
            raise EnvironmentFault(f"on {platform.node()}: {type(self.opened).__name__}: {self.opened}")
        return self.opened

    def engines(self) -> Engines:
        bundle, device = self.classifier.bundle, self.classifier.device
        node_id = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        return Engines(
            bundle, dict(device.describe()), __version__, device.batch, platform.node(), node_id, os.getpid()
        )

    def seconds_per_item(self, chain: Chain, kind: Kind) -> float:
        return self.classifier.sampler.seconds_per_item(chain, kind)

    def draw(self, task: Task) -> TaskResult:
        if (found := self.engines().sha256) != task.engines:
            raise CheckFailed(f"the worker has engines {found[:16]}, and the samples are for {task.engines[:16]}")
        device = self.classifier.device
        opened = {
            handle: device.open_image(image.pixels, image.key, image.sigma, image.scale)
            for handle, image in task.images.items()
        }
        work = [(opened[handle], first + i) for handle, first, samples in task.strips for i in range(samples)]
        try:
            outcomes = list(decide(device, task.chain, work, lambda: Ballot(task.votes)))
        finally:
            for handle in opened.values():
                device.close_image(handle)
        columns = zip(*((outcome.label, outcome.votes, outcome.unet_calls) for outcome in outcomes), strict=True)
        return TaskResult(*(np.array(column, np.int32) for column in columns))


class Job(JobConfig):
    """A job whose workers import what is installed: Ray would put the driver's working directory on their path."""

    def _serialize(self) -> str:
        self._py_driver_sys_path = []
        return super()._serialize()


def connect(address: str) -> str:
    """Join the cluster that is named, or start one on this machine.

    Returns the address that was taken: RAY_ADDRESS where it begins with ray:// and `LOCAL` was asked for. Raises
    UsageError or EnvironmentFault.
    """
    asked = f"`address` {address}"
    if address == LOCAL and (named := os.environ.get("RAY_ADDRESS", "")).startswith(REMOTE):
        address, asked = named, f"RAY_ADDRESS={named}"
    if address != LOCAL and not re.fullmatch(f"{REMOTE}.+:[0-9]+", address):
        raise UsageError(f"{asked} is not known: ray, or ray://HOST:PORT")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent home
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False  # under "uv run" workers import a copy of the working directory
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "ignore_reinit_error": True}
    head = address.removeprefix(REMOTE) if address != LOCAL else os.environ.get("RAY_ADDRESS")
    if head is None:
        os.environ["RAY_AUTH_MODE"] = "token"  # its ports are open to the network
        Config.initialize("")  # Ray has read its environment when it was imported
        os.environ["PYTHONPATH"] = without_empty(os.environ.get("PYTHONPATH", ""))
        address, here = "local", {"num_cpus": available_cores(), "object_store_memory": STORE_BYTES}
        quiet |= here | {"include_dashboard": False}
    if not address.startswith(REMOTE):
        quiet["job_config"] = Job()
    try:
        if head is not None and ":" in head:  # else one of Ray's own words, such as auto
            await_port(head)
        with keeping_signals():
            ray.init(head if address == LOCAL else address, **quiet)
    except Exception as error:  # Ray raises what it likes, ConnectionError, RuntimeError and others
        why = next(iter(str(error).splitlines()), type(error).__name__)
        if head is None:
            raise EnvironmentFault(f"Ray cannot be started here ({why})") from error
        raise EnvironmentFault(
            f"Ray cannot be reached at {head} ({why}): name the port that its head listens at; a cluster that asks for "
            f"a token needs RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    return address


@contextlib.contextmanager
def keeping_signals() -> Iterator[None]:
    """Take signals as before, also afterwards: Ray takes SIGTERM, and exits with 15 or a stack trace of C++."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in signals.ASKING}
    asked = False
    try:
        yield
    except SystemExit as ended:
        asked = ended.code == signal.SIGTERM
        if not asked:
            raise
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
    if asked:
        ray.shutdown()
        signal.raise_signal(signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM)  # it was to be ignored, and Ray has not started for it


def without_empty(python_path: str) -> str:
    """Drop the empty entries of PYTHONPATH: each process takes them for its working directory."""
    return os.pathsep.join(filter(None, python_path.split(os.pathsep)))


def await_port(head: str) -> None:
    """Raise OSError or ValueError unless something listens there: Ray would try for ever."""
    with socket.create_connection(host_and_port(head), timeout=REACHED):
        pass


def host_and_port(head: str) -> tuple[str, int]:
    """Parse HOST:PORT, also after ray://."""
    host, _, port = head.removeprefix(REMOTE).rpartition(":")
    return host.strip("[]"), int(port)


def heads_of(address: str) -> list[tuple[str, int]]:
    """Return host and port of the cluster's head, and of its part on this machine where the driver is inside it."""
    if address.startswith(REMOTE):
        return [host_and_port(address)]
    context = ray.get_runtime_context()
    here = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return [host_and_port(context.gcs_address), (here["NodeManagerAddress"], here["NodeManagerPort"])]


def open_fleet(
    address: str,
    recipe: WorkerEngines,
    workers: int | None = None,
    group: str | None = None,
    actor: type[Worker] = Worker,
    timeout: float = WAIT,
) -> Fleet:
    """Workers all over a cluster that have the same engines. To be closed.

    workers: how many; None for one a GPU where a GPU runs the engines, else one for each `recipe.threads` CPUs, of what
    is free. group: how the hash of the engines begins; None for the largest group. Raises what opening the engines
    raises, UsageError where that is not to be had, or EnvironmentFault.
    """
    for parameter, count in (("threads", recipe.threads), ("workers", workers)):
        if count is not None and count < 1:
            raise UsageError(f"`{parameter}` {count}: it is a count from 1 up")
    address = connect(address)
    try:
        needs = {"GPU": 1.0, "CPU": 1.0} if needs_gpu(recipe) else {"CPU": float(recipe.threads)}
        count = workers or room_for(needs)
        remote = ray.remote(actor)

        def spawn(member: Member) -> None:
            dismiss(member)
            member.actor = remote.options(
                num_cpus=needs["CPU"],
                num_gpus=needs.get("GPU", 0),
                max_restarts=0,
                scheduling_strategy="DEFAULT" if member.home is None else NodeAffinity(member.home, soft=True),
            ).remote(recipe)
            member.opening = member.actor.engines.remote()

        members = [Member(number, None, None) for number in range(1, count + 1)]
        for member in members:
            spawn(member)
        opened = opened_by(members, timeout)
        engines = chosen(opened, group)
        others = [member for member in members if member.engines and member.engines.sha256 != engines.sha256]
        if others:
            warn_of_others(others)
        for member in others:
            dismiss(member)  # what they held is free for another run
        fleet = [member for member in members if member not in others]
        return Fleet(fleet, engines, spawn, dismiss, heads_of(address))
    except BaseException:
        ray.shutdown()
        raise


def room_for(needs: Mapping[str, float]) -> int:
    """Count the workers that fit, machine by machine, into what is free. Raises UsageError where none does."""
    machines: list[Mapping[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    each = [min(int(machine.get(name, 0) // amount) for name, amount in needs.items()) for machine in machines]
    free: Mapping[str, float] = ray.available_resources()
    if room := min(sum(each), *(int(free.get(name, 0) // amount) for name, amount in needs.items())):
        return room
    total = {name: sum(machine.get(name, 0) for machine in machines) for name in needs}
    asked, found, left = (", ".join(f"{some.get(name, 0):g} {name}" for name in needs) for some in (needs, total, free))
    move = "run an .onnx engine on CPUs" if "GPU" in needs else "ask for fewer `threads`"
    raise UsageError(
        f"a worker needs {asked} on one machine; the cluster has {found}, of which {left} free: {move}, or wait until "
        f"others are done"
    )


def chosen(opened: Sequence[Engines], group: str | None) -> Engines:
    """The engines of the largest group, or of the one that is asked for, of this version of the package.

    Raises UsageError where the group is not there, EnvironmentFault where another version is.
    """
    ours = [engines for engines in opened if engines.version == __version__]
    if not ours:
        found = ", ".join(sorted({f"{engines.version} on {engines.node}" for engines in opened}))
        raise EnvironmentFault(
            f"the workers have densepure-rt {found}, and this is {__version__}: install the same one"
        )
    groups = Counter(engines.sha256 for engines in ours if engines.sha256.startswith(group or ""))
    if not groups:
        found = ", ".join(sorted({engines.sha256[:8] for engines in ours}))
        raise UsageError(f"`group` {group}: no worker has such engines; the groups are {found}")
    largest, _ = groups.most_common(1)[0]
    return next(engines for engines in ours if engines.sha256 == largest)


def warn_of_others(members: Sequence[Member]) -> None:
    """Warn of workers that draw nothing, because their labels would be those of another classifier."""
    groups = Counter((member.engines.sha256[:8], member.engines.node) for member in members if member.engines)
    found = ", ".join(f"{count} of group {group} on {node}" for (group, node), count in sorted(groups.items()))
    said = "they have another engine, version or arithmetic, and one kind draws all samples of a run: `group` names it"
    logs.say(f"workers that are not used: {found}; {said}", logging.WARNING)


def dismiss(member: Member) -> None:
    """End its process, if there is one."""
    if member.actor is not None:
        with contextlib.suppress(Exception):  # it has ended already
            ray.kill(member.actor)


def opened_by(members: Sequence[Member], timeout: float) -> list[Engines]:
    """Return what each member has opened. Raises the error of the first that could not."""
    try:
        found: list[Engines] = ray.get([member.opening for member in members], timeout=timeout)
    except ray.exceptions.GetTimeoutError:
        raise EnvironmentFault(
            f"{plural(len(members), 'worker')} were asked for and not all there after {timeout:.0f} s: ask for fewer "
            f"with `workers`"
        ) from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DensePureError):
            raise type(error.cause)(f"a worker could not open the engines {error.cause}") from None
        raise EnvironmentFault(f"a worker could not open the engines ({cause_of(error)})") from error
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise EnvironmentFault(f"a worker could not be started ({cause_of(error)})") from error
    for member, engines in zip(members, found, strict=True):
        member.engines, member.home, member.opening = engines, engines.node_id, None
    return found


def open_on_cluster(
    address: str, recipe: WorkerEngines, workers: int | None, group: str | None, secret: bytes | None
) -> SmoothedClassifier:
    """A classifier whose samples a cluster draws; see `open_fleet`."""
    from densepure_rt.smoothing.classifier import SmoothedClassifier

    fleet = open_fleet(address, recipe, workers, group)
    try:
        return SmoothedClassifier(fleet.engines.bundle, fleet, secret)
    except BaseException:
        fleet.close()
        raise


def needs_gpu(recipe: WorkerEngines) -> bool:
    return recipe.provider != "cpu" or (recipe.engine is not None and recipe.engine.suffix == ".plan")
