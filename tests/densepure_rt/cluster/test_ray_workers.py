"""Against real Ray clusters of this machine, whose workers are processes with the shipped engines."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import ray

from densepure_rt import __version__
from densepure_rt.cluster.fleet import DEATHS, FAILURES, Fleet, Member
from densepure_rt.cluster.ray_workers import Worker, WorkerEngines, chosen, connect, open_fleet
from densepure_rt.cluster.tasks import Engines, Task, TaskResult
from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.images.datasets import ImageSet, open_images
from densepure_rt.keys import seeded_secret
from densepure_rt.runs import audit
from densepure_rt.runs.certify import RunRequest, certify_images
from densepure_rt.runs.records import Summary
from densepure_rt.runtime.bundle import open_bundle, shipped_engine
from densepure_rt.runtime.machine import available_cores
from densepure_rt.smoothing.classifier import SmoothedClassifier, load
from densepure_rt.smoothing.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
SEED = 1
SHIPPED = WorkerEngines(None, None, 8, 1, "cpu", None, False)
SETTINGS = Settings(sigma=0.25, steps=2, votes=3, n=200, radii=(0.0, 0.25))
IMAGES = 8
POISON = 3  # the place of the image that workers die of
COST = ("unet_calls", "classifier_calls", "seconds")  # of timing.jsonl: what was drawn in vain is different each time


@pytest.fixture(autouse=True)
def workers_find_the_actors_of_this_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def some_images(count: int = IMAGES) -> ImageSet:
    bundle = open_bundle(shipped_engine())
    return open_images(None, bundle.unet.image, bundle.classifier.class_names).select(7, count)


def certified(classifier: SmoothedClassifier, out: Path, images: ImageSet, settings: Settings = SETTINGS) -> Summary:
    summary, _ = certify_images(classifier, RunRequest(images, settings, out, SEED))
    return summary


def contents(folder: Path) -> dict[str, object]:
    """What a run leaves but its times: results, the table without its times, timings without COST, labels."""
    timings = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in timing.items() if name not in COST} for timing in timings]
    rows = [line.split("\t") for line in (folder / "results.tsv").read_text().splitlines()]
    table = [row[:5] + row[6:] for row in rows]
    summary = json.loads((folder / "summary.json").read_text()) | {"unet_calls": None}
    identity = json.loads((folder / "manifest.json").read_text())["identity_sha256"]
    return {
        "results": (folder / "results.jsonl").read_bytes(),
        "table": table,
        "timings": kept,
        "summary": summary,
        "identity": identity,
    }


@contextmanager
def cluster(actor: type[Worker] = Worker, workers: int = 2) -> Iterator[tuple[Fleet, SmoothedClassifier]]:
    fleet = open_fleet("ray", SHIPPED, workers, actor=actor)
    with SmoothedClassifier(fleet.engines.bundle, fleet, seeded_secret(SEED)) as classifier:
        yield fleet, classifier


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the run of a single process leaves."""
    out = tmp_path_factory.mktemp("alone") / "run"
    with load(secret=seeded_secret(SEED), threads=1, batch=8) as classifier:
        certified(classifier, out, some_images())
    return contents(out)


def at_work(fleet: Fleet) -> list[Member]:
    """The workers with tasks that none has died of, nor three were late with: else their images might fail.

    They have done some before, so that it is known how long one may take.
    """
    known = [member for member in list(fleet.members) if member.engines and member.samples]
    busy = [(member, list(member.tasks.values())) for member in known]
    return [member for member, tasks in busy if tasks and not any(p.deaths or p.late > 2 for p in tasks)]


KINDS = ("killed", "stopped", "continued", "slowed")


class Chaos:
    """Workers are killed, stopped for good or for a while, and slowed down ten times, one at a time, at random.

    kinds: of KINDS, those that may come. every: seconds between them, at least and at most. most: of them. done: what
    was done, and how often.
    """

    def __init__(
        self, fleet: Fleet, seed: int, kinds: Sequence[str], every: tuple[float, float], most: float = math.inf
    ) -> None:
        self.fleet, self.draw, self.kinds, self.every, self.most = fleet, random.Random(seed), kinds, every, most
        self.done = Counter[str]()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def __enter__(self) -> Chaos:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def run(self) -> None:
        gone = set[int]()
        while self.done.total() < self.most and not self.over.wait(self.draw.uniform(*self.every)):
            there = {member.engines.pid for member in at_work(self.fleet) if member.engines}
            if self.fleet.started and (left := sorted(there - gone)):
                pid, kind = self.draw.choice(left), self.draw.choice(self.kinds)
                self.done[kind] += 1
                gone |= {pid} if kind in ("killed", "stopped") else set()
                with contextlib.suppress(ProcessLookupError):  # it was given up a moment ago
                    getattr(self, kind)(pid)

    def killed(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def stopped(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)

    def continued(self, pid: int) -> None:
        """Stopped, and continued as soon as it is given up, so that it answers late."""
        late = self.fleet.late
        os.kill(pid, signal.SIGSTOP)
        while self.fleet.late == late and not self.over.wait(0.01):
            pass
        os.kill(pid, signal.SIGCONT)

    def slowed(self, pid: int) -> None:
        for _ in range(100):
            os.kill(pid, signal.SIGSTOP)
            self.over.wait(0.09)
            os.kill(pid, signal.SIGCONT)
            self.over.wait(0.01)


@pytest.mark.parametrize("seconds", [25, pytest.param(600, marks=pytest.mark.slow)])
def test_whatever_happens_to_workers_the_results_are_those_of_one_process(
    tmp_path: Path, alone: dict[str, object], capsys: pytest.CaptureFixture[str], seconds: float
) -> None:
    images, runs, started = some_images(), 0, time.monotonic()
    with cluster() as (fleet, classifier):
        with Chaos(fleet, seed=1, kinds=KINDS, every=(0.5, 4.0)) as chaos:
            while time.monotonic() - started < seconds:
                runs += 1
                certified(classifier, tmp_path / f"run{runs}", images)
                assert contents(tmp_path / f"run{runs}") == alone
        with capsys.disabled():
            what = ", ".join(f"{count} {kind}" for kind, count in sorted(chaos.done.items()))
            print(f"\n{runs} runs with workers {what}: {fleet.lost} were lost and {fleet.late} late")
        assert fleet.lost <= chaos.done["killed"]  # one that was killed as a run ended is not missed
        assert fleet.lost + fleet.late >= 1
    assert not any(finding.faults for finding in audit.audit(tmp_path / "run1"))


@pytest.mark.parametrize("workers", [2, 1])
def test_a_worker_that_is_stopped_is_named_its_work_is_drawn_elsewhere_and_its_late_answer_is_not_heard(
    tmp_path: Path, alone: dict[str, object], caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    with cluster(workers=workers) as (fleet, classifier):
        with Chaos(fleet, seed=1, kinds=["continued"], every=(1.0, 1.0), most=1) as chaos:
            certified(classifier, tmp_path / "run", some_images())
        assert (chaos.done.total(), fleet.lost, fleet.late) == (1, 0, 1)
        assert "1 late so far" in fleet.status()
    assert contents(tmp_path / "run") == alone
    [late] = [said for said in caplog.messages if "is late" in said]
    [worker] = [word for word in ("worker 1", "worker 2") if word in late]
    assert "another is started in its place" in late
    assert f"workers that were late, and how often: {worker} on" in caplog.messages[-1]


def has_poison(task: Task) -> bool:
    poison = next(image.pixels for place, image in enumerate(some_images()) if place == POISON)
    return any((image.pixels == poison).all() for image in task.images.values())


class DiesOfOne(Worker):
    """Its process ends when it is to draw one of the images, as it would of a fault in native code."""

    def draw(self, task: Task) -> TaskResult:
        if has_poison(task):
            os._exit(1)
        return super().draw(task)


class RefusesOne(Worker):
    """Raises for one of the images, as an engine may."""

    def draw(self, task: Task) -> TaskResult:
        if has_poison(task):
            raise ValueError("not this one")
        return super().draw(task)


class DiesOfAll(Worker):
    def draw(self, task: Task) -> TaskResult:
        os._exit(1)


class Sick(Worker):
    """The first that is made raises at every task, as one does whose GPU has faulted; the one in its place is well."""

    def draw(self, task: Task) -> TaskResult:
        if first_of_all(self):
            raise ValueError("an illegal memory access was encountered")
        return super().draw(task)


def first_of_all(worker: Worker) -> bool:
    """Whether no other was made before it, wherever."""
    first = Path(os.environ["DENSEPURE_TEST_FIRST"])
    with contextlib.suppress(FileExistsError), first.open("x") as file:
        file.write(str(os.getpid()))
    return first.read_text() == str(os.getpid())


class SlowAtFirst(Worker):
    """The first that is made takes ten times as long as the others."""

    def draw(self, task: Task) -> TaskResult:
        started = time.monotonic()
        drawn = super().draw(task)
        if first_of_all(self):
            time.sleep(9 * max(0.5, time.monotonic() - started))
        return drawn


class HangsOnOne(Worker):
    """Does not come back from one of the images, as of a kernel that is deadlocked."""

    def draw(self, task: Task) -> TaskResult:
        while has_poison(task):
            time.sleep(1)
        return super().draw(task)


class Hangs(Worker):
    def draw(self, task: Task) -> TaskResult:
        time.sleep(1000)
        return super().draw(task)


@pytest.mark.parametrize("actor", [DiesOfOne, pytest.param(RefusesOne, marks=pytest.mark.slow)])
def test_an_image_that_workers_die_of_has_failed_and_the_others_are_as_ever(
    tmp_path: Path, alone: dict[str, object], actor: type[Worker]
) -> None:
    images = some_images()
    failed = images.order[POISON]
    with cluster(actor) as (fleet, classifier):
        found = certified(classifier, tmp_path / "run", images)
        assert DEATHS <= fleet.lost <= DEATHS + 2  # at first both may draw it, beside other images
    assert (found.failed, found.done, found.asked) == ((failed,), IMAGES - 1, IMAGES)
    assert not (tmp_path / "run" / "seal.json").exists()
    results = alone["results"]
    assert isinstance(results, bytes)
    others = [line for line in results.splitlines() if json.loads(line)["idx"] != failed]
    certified_others = sum(json.loads(line)["correct"] for line in others)
    assert found.accuracy[0] == certified_others / IMAGES  # what failed counts as uncertified
    assert (tmp_path / "run" / "results.jsonl").read_bytes().splitlines() == others
    assert not any(finding.faults for finding in audit.audit(tmp_path / "run"))
    with load(secret=seeded_secret(SEED), threads=1, batch=8) as classifier:  # where nothing dies of it
        certified(classifier, tmp_path / "run", images)
    assert contents(tmp_path / "run") == alone


@pytest.mark.slow  # and only on a machine that does nothing else
def test_two_workers_are_as_much_faster_than_one_as_two_callers_in_one_process_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if available_cores() < 2:
        pytest.skip("there is one core")
    images, settings = some_images(64), Settings(sigma=0.25, steps=2, votes=5, n=1000, radii=(0.0, 0.25))
    recipe = replace(SHIPPED, batch=None)

    def seconds(classifier: SmoothedClassifier) -> tuple[float, float]:
        """Wall and of this process's CPU, once all is warm."""
        list(classifier.certify_each(some_images(2), settings))
        started, cpu = time.perf_counter(), time.process_time()
        list(classifier.certify_each(images, settings))
        return time.perf_counter() - started, time.process_time() - cpu

    wall, driver = dict[str, float](), 0.0
    for count in (1, 2):
        with load(secret=seeded_secret(SEED), threads=count) as classifier:
            wall[f"callers {count}"], _ = seconds(classifier)
        fleet = open_fleet("ray", recipe, count)
        with SmoothedClassifier(fleet.engines.bundle, fleet, seeded_secret(SEED)) as classifier:
            wall[f"workers {count}"], driver = seconds(classifier)
    callers, workers = (wall[f"{what} 1"] / wall[f"{what} 2"] for what in ("callers", "workers"))
    with capsys.disabled():
        each = ", ".join(f"{name}: {took:.1f} s" for name, took in wall.items())
        print(f"\n{len(images)} images; {each}; two callers {callers:.2f} x one, two workers {workers:.2f} x one")
        print(f"the driver of two workers takes {1000 * driver / len(images):.1f} ms of CPU an image")
    assert workers >= 1.5
    assert workers >= 0.9 * callers


def test_a_sick_worker_is_replaced_and_no_image_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: dict[str, object]
) -> None:
    monkeypatch.setenv("DENSEPURE_TEST_FIRST", str(tmp_path / "first"))
    with cluster(Sick) as (fleet, classifier):
        certified(classifier, tmp_path / "run", some_images())
        assert fleet.lost == 1
    assert contents(tmp_path / "run") == alone


def test_the_fixed_rule_on_workers_that_are_all_killed_at_once_counts_each_phase_as_one_process_does(
    tmp_path: Path,
) -> None:
    settings = Settings(sigma=1.0, steps=1, votes=1, n0=60, n=300, method="fixed")  # tasks end within a phase
    images = some_images(6)
    with load(secret=seeded_secret(SEED), threads=1, batch=8) as classifier:
        certified(classifier, tmp_path / "alone", images, settings)
    with cluster() as (fleet, classifier):
        each = classifier.certify_each(images, settings)
        found = [next(each)]
        for member in fleet.there:
            assert member.engines is not None
            os.kill(member.engines.pid, signal.SIGKILL)
        found += each
        certified(classifier, tmp_path / "run", images, settings)
        assert fleet.lost == 2
    assert contents(tmp_path / "run") == contents(tmp_path / "alone")
    records = [json.loads(line) for line in (tmp_path / "alone" / "results.jsonl").read_text().splitlines()]
    assert [one.certificate.n_a for one in found] == [record["n_a"] for record in records]


def test_when_workers_die_of_every_image_the_run_ends_and_says_that_it_is_not_the_images(tmp_path: Path) -> None:
    with cluster(DiesOfAll) as (_, classifier), pytest.raises(EnvironmentFault, match=f"{FAILURES} images in a row"):
        list(classifier.certify_each(some_images(), SETTINGS))


def test_a_worker_ten_times_slower_than_its_peer_is_replaced_and_no_image_is_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: dict[str, object]
) -> None:
    monkeypatch.setenv("DENSEPURE_TEST_FIRST", str(tmp_path / "first"))
    with cluster(SlowAtFirst) as (fleet, classifier):
        certified(classifier, tmp_path / "run", some_images())
        assert (fleet.lost, fleet.late) == (0, 1)
    assert contents(tmp_path / "run") == alone


def test_an_image_that_no_worker_comes_back_from_has_failed_once_each_had_twice_the_time_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("densepure_rt.cluster.fleet.LATES", 3)
    monkeypatch.setattr("densepure_rt.cluster.pace.LEAST", 1.0)
    images = some_images()
    with cluster(HangsOnOne) as (fleet, classifier):
        found = certified(classifier, tmp_path / "run", images)
        assert fleet.lost == 0
        assert fleet.late >= 3
    assert (found.failed, found.done) == ((images.order[POISON],), IMAGES - 1)


def test_when_no_worker_ends_a_task_the_run_ends_and_blames_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("densepure_rt.cluster.fleet.LATES", 2)
    monkeypatch.setattr("densepure_rt.cluster.pace.UNKNOWN", 1.0)
    with (
        cluster(Hangs) as (_, classifier),
        pytest.raises(EnvironmentFault, match="no worker ends a task any more .*same command again"),
    ):
        list(classifier.certify_each(some_images(), SETTINGS))
    assert classifier.failed == []


class OtherElsewhere(Worker):
    """The first that is made is on another kind of machine."""

    def engines(self) -> Engines:
        own = super().engines()
        return replace(own, description={**own.description, "processor": "another"}) if first_of_all(self) else own


def test_the_samples_of_a_run_are_drawn_by_one_kind_of_workers_and_the_others_are_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DENSEPURE_TEST_FIRST", str(tmp_path / "first"))
    own = load(secret=seeded_secret(SEED), threads=1, batch=8)
    device = dict(own.device.describe())
    own.close()
    kind = Engines(own.bundle, device, __version__, 8, "here", "", 0).sha256
    fleet = open_fleet("ray", SHIPPED, 2, kind[:12], OtherElsewhere)
    with SmoothedClassifier(fleet.engines.bundle, fleet, seeded_secret(SEED)) as classifier:
        assert len(fleet.members) == 1
        assert fleet.engines.sha256 == kind
        certified(classifier, tmp_path / "run", some_images())
    assert contents(tmp_path / "run") == alone
    assert "workers that are not used: 1 of group" in caplog.text


def test_workers_import_nothing_from_the_working_directory(tmp_path: Path) -> None:
    """Not under "uv run" either, which Ray takes as a wish for it, nor with an empty entry in PYTHONPATH.

    The driver goes there late, so that its own PYTHONPATH does not lead there.
    """
    planted, elsewhere, ran = tmp_path / "planted", tmp_path / "elsewhere", tmp_path / "ran"
    for folder in (planted, elsewhere):
        folder.mkdir()
    names = {"densepure_rt", "sitecustomize", *sys.stdlib_module_names, *packages_distributions()} - {"run"}
    hijack = f"import sys; print(__name__, sys.argv, file=open({str(ran)!r}, 'a')); raise ImportError('hijacked')\n"
    for name in names:
        (planted / f"{name}.py").write_text(hijack)
    assert {"numpy", "pydantic", "ray", "onnxruntime", "json"} <= names
    driver = "import os, sys; from densepure_rt.cli import main; os.chdir(sys.argv.pop(1)); main()\n"
    (elsewhere / "driver.py").write_text(driver)
    uv_run = f"import subprocess, sys; sys.exit(subprocess.call([{sys.executable!r}, *sys.argv[1:]]))\n"
    (elsewhere / "run").write_text(uv_run)
    certify = f"certify --cluster ray --workers 1 --max 1 --steps 0 --n 60 --seed 1 --out {tmp_path / 'out'}"
    done = subprocess.run(
        ["uv", "run", "driver.py", str(planted), *certify.split()],
        executable=sys.executable,
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": f"{ROOT}::"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not ran.exists(), ran.read_text()


def test_a_cluster_that_is_started_here_asks_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    import grpc  # Ray's

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    connect("ray")
    try:
        channel = grpc.insecure_channel(ray.get_runtime_context().gcs_address)
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        with pytest.raises(grpc.RpcError) as refused:
            ask(b"", timeout=10)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        channel.close()
    finally:
        ray.shutdown()


def engines(kind: str) -> Engines:
    return Engines(open_bundle(shipped_engine()), {"processor": kind}, __version__, 8, "node", "", 0)


def test_the_largest_group_is_chosen_unless_another_is_named() -> None:
    opened = [engines(kind) for kind in ("b", "a", "b", "c")]
    assert chosen(opened, None).description["processor"] == "b"
    assert chosen(opened, engines("c").sha256[:8]).description["processor"] == "c"
    with pytest.raises(UsageError, match="the groups are") as raised:
        chosen(opened, "no such hash")
    assert all(engines(kind).sha256[:8] in str(raised.value) for kind in "abc")


def test_workers_of_another_version_are_no_workers() -> None:
    with pytest.raises(EnvironmentFault, match="the workers have densepure-rt 0.0.1 on node"):
        chosen([replace(engines("a"), version="0.0.1")], None)


def test_a_worker_refuses_samples_that_are_for_other_engines() -> None:
    worker = Worker(SHIPPED)
    with pytest.raises(CheckFailed, match="has engines"):
        worker.draw(Task((), {}, worker.classifier.chain(SETTINGS), 1, "0" * 64))
    worker.classifier.close()


@pytest.mark.parametrize(
    ("address", "fault"),
    [("dask", UsageError), ("ray://", UsageError), ("ray://host", UsageError), ("ray://127.0.0.1:9", EnvironmentFault)],
)
def test_a_cluster_that_is_not_to_be_had_is_said_at_once(address: str, fault: type[Exception]) -> None:
    started = time.monotonic()
    with pytest.raises(fault, match=address.removeprefix("ray://") or address):
        connect(address)
    assert time.monotonic() - started < 10
    assert not ray.is_initialized()


def test_a_head_in_the_environment_that_does_not_answer_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(EnvironmentFault, match="cannot be reached at 127.0.0.1:9"):
        connect("ray")


HEAD = """
import sys
import ray
from ray.util.client.server.server import serve

ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=128 << 20)
server = serve("127.0.0.1", int(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
server.stop(0)
"""
OUTSIDE = """
import sys
from densepure_rt.cluster.ray_workers import WorkerEngines, open_fleet

fleet = open_fleet(sys.argv[1], WorkerEngines(None, None, 8, 1, "cpu", None, False), 1)
print(len(fleet.members), fleet.heads)
fleet.close()
"""


def test_the_environment_may_name_a_cluster_that_is_asked_from_outside() -> None:
    """Its head's internal ports are not watched then: they may not be reached from there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "disabled"}  # Ray's own default, which other tests here change
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HEAD, str(port)], env=environment, **pipes) as head:
        assert head.stdin is not None
        assert head.stdout is not None
        assert "ready\n" in iter(head.stdout.readline, "")
        remote = f"ray://127.0.0.1:{port}"
        outside, named = [sys.executable, "-c", OUTSIDE, "ray"], {"RAY_ADDRESS": remote}
        try:
            done = subprocess.run(outside, env=environment | named, text=True, capture_output=True, timeout=60)
        finally:
            head.stdin.close()
        assert done.stdout == f"1 [('127.0.0.1', {port})]\n", done.stderr


def test_more_workers_than_there_is_room_for_and_engines_that_are_not_there_are_refused() -> None:
    with pytest.raises(UsageError, match="a worker needs 1000 CPU on one machine; the cluster has"):
        open_fleet("ray", replace(SHIPPED, threads=1000))
    with pytest.raises(UsageError, match="run an .onnx engine on CPUs"):
        open_fleet("ray", replace(SHIPPED, engine=Path("unet.plan")))
    with pytest.raises(EnvironmentFault, match="9 workers were asked for and not all there after 1 s"):
        open_fleet("ray", SHIPPED, 9, timeout=1)
    with pytest.raises(UsageError, match="a worker could not open the engines on .*: no engine at"):
        open_fleet("ray", replace(SHIPPED, engine=Path("/no/such/unet.onnx")), 1)
    with pytest.raises(UsageError, match="`workers` 0: it is a count"):
        open_fleet("ray", SHIPPED, 0)
    assert not ray.is_initialized()


def command(*arguments: object) -> list[str]:
    code = "from densepure_rt.cli import main; main()"
    return [sys.executable, "-c", code, "certify", *map(str, arguments)]


OPTIONS = (
    f"--cluster ray --sigma 0.25 --steps 2 --votes 3 --n 200 --radii 0,0.25 --batch 8 --seed {SEED} --skip 7".split()
)


def processes_of(driver: int, name: str) -> list[int]:
    """The processes of a name that a driver has started, or that these have."""
    parents: dict[int, int] = {}
    named: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            called, _, rest = (folder / "stat").read_text().partition(" (")[2].rpartition(") ")
            parents[int(folder.name)] = int(rest.split()[1])
            named += [int(folder.name)] if called.startswith(name) else []

    def line(pid: int) -> Iterator[int]:
        while (pid := parents.get(pid, 0)) != 0:
            yield pid

    return [pid for pid in named if driver in line(pid)]


def lose(driver: int, head: str) -> list[int]:
    """Kill what the cluster of a driver ends with, and stop its workers: else the run may end in the meantime."""
    workers = processes_of(driver, "ray::Worker")
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    for pid in processes_of(driver, head):
        os.kill(pid, signal.SIGKILL)
    return workers


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "ends",
    [
        ["SIGTERM", "gcs_server", "SIGKILL"],
        pytest.param(["SIGHUP", "raylet", "group SIGINT", "group SIGTERM", "early SIGTERM"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_however_a_driver_ends_it_says_so_and_goes_on_to_what_one_process_gives(
    tmp_path: Path, alone: dict[str, object], ends: list[str]
) -> None:
    out, environment = tmp_path / "run", os.environ | {"PYTHONPATH": str(ROOT)}
    asked = command(*OPTIONS, "--seed", SEED, "--max", IMAGES, "--out", out)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for end in ends:
        before, left = done(out), []
        with subprocess.Popen(asked, text=True, env=environment, start_new_session=True, **pipes) as running:  # type: ignore[call-overload]
            early = end.startswith("early ")  # while Ray starts
            while running.poll() is None and not (processes_of(running.pid, "gcs") if early else done(out) > before):
                time.sleep(0.02)
            began = time.monotonic()
            if end.startswith("group "):
                os.killpg(running.pid, signal.Signals[end.removeprefix("group ")])
            elif "SIG" in end:
                running.send_signal(signal.Signals[end.removeprefix("early ")])
            else:
                left = lose(running.pid, end)
            _, said = running.communicate(timeout=120)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        number = signal.Signals[end.split()[-1]] if "SIG" in end else None
        expected = EnvironmentFault.exit_code if number is None else 128 + number
        assert running.returncode == (-number if number == signal.SIGKILL else expected), said
        assert 0 < done(out) < IMAGES
        assert time.monotonic() - began < 30
        assert not [word for word in ("Traceback", "stack trace", "***") if word in said], said
        if number is None:
            assert "the cluster's head is gone" in said
        elif number != signal.SIGKILL:
            assert json.loads((out / "summary.json").read_text())["interrupted"], said
    again = subprocess.run(asked, text=True, env=environment, capture_output=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert contents(out) == alone


def done(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return len((folder / "results.jsonl").read_bytes().splitlines())
    return 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workers", "2"], "--workers and --group are of --cluster"),
        (["--cluster", "ray", "--falsify", "0.5"], "--falsify needs an engine here"),
        (["--cluster", "slurm"], "--cluster slurm is not known"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], said: str) -> None:
    done = subprocess.run(command(*options), text=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == UsageError.exit_code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_without_ray_the_command_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('no ray')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command("--cluster", "ray"), text=True, capture_output=True, env=environment)
    assert done.returncode == EnvironmentFault.exit_code
    assert "pip install 'densepure-rt[cluster]'" in done.stderr
