"""What every test can rely on, and what makes none of them wait for the same thing twice."""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from densepure_rt.runtime.bundle import Bundle
    from densepure_rt.runtime.host_device import HostDevice
    from densepure_rt.runtime.probe import Probed
    from tests.support.cli import Done

ASKED_TO_END = [getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM") if hasattr(signal, name)]

# Before torch is imported: on a machine that runs several test files, threads that wait for each other burn processors.
os.environ.setdefault("OMP_NUM_THREADS", "1")

hypothesis.settings.register_profile("no clock", deadline=None)  # a machine under load is no failure
hypothesis.settings.load_profile("no clock")


def pytest_configure() -> None:
    """Let the processes that tests start hear signals that pytest ignores, as it does under nohup or `make test &`.

    An ignored signal is ignored in every child, a handled one is not: exec resets handlers alone. pytest stays deaf.
    """
    for number in ASKED_TO_END:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_collection_finish() -> None:
    """Spare the garbage collector the millions of objects of torch and of other modules, which stay anyway."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def signals_of_before() -> Iterator[None]:
    """A command that is run in this process takes the signals for itself: give them back."""
    handlers = {number: signal.getsignal(number) for number in ASKED_TO_END}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def one_table_of_operators() -> None:
    """torch's ONNX exporter makes the same table of operators for every export, half a second each time: keep it."""
    if "torch" not in sys.modules:
        return
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # another version of torch: it is slower without, no more
        return
    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]


@pytest.fixture(scope="session", autouse=True)
def engines_are_probed_once() -> None:
    """Keep what the probe has found of an engine at a batch: it runs 68 items at the default batch, for each test.

    What a test puts in an engine's place (another sidecar or file, a network of its own) is probed anew, and so is all
    that another process opens.
    """
    from onnxruntime import InferenceSession

    from densepure_rt.runtime import host_device, onnx_device

    found: dict[tuple[object, ...], Probed] = {}
    network = onnx_device.Network

    def remembered(device: HostDevice, bundle: Bundle, any_batch: bool) -> Probed:
        networks = (device.networks.step, device.networks.classify)
        if not all(type(each) is network and type(each.session) is InferenceSession for each in networks):
            return host_device.HostDevice._probe(device, bundle, any_batch)
        key = (repr(bundle.unet), repr(bundle.classifier), device.batch, device.facts["provider"], any_batch)
        if key not in found:
            found[key] = host_device.HostDevice._probe(device, bundle, any_batch)
        return found[key]

    # mypy takes no function in the place of a method.
    onnx_device.OnnxDevice._probe = remembered  # type: ignore[assignment, method-assign]


# `--light`: where heavy packages are not installed, the test files that import them are skipped instead of failing.
HEAVY = {
    "aiohttp",
    "cuda",
    "diffusers",
    "ml_dtypes",
    "onnx",
    "polygraphy",
    "ray",
    "safetensors",
    "tensorrt_rtx",
    "torch",
    "tritonclient",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--light", action="store_true", help="skip test files whose heavy packages are not installed")


class LightModule(pytest.Module):
    """A test file that is skipped as a whole when a heavy package that it imports is not there."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            cause = error.__cause__
            while cause is not None and not isinstance(cause, ModuleNotFoundError):
                cause = cause.__cause__
            name = (cause.name or "").partition(".")[0] if cause is not None else ""
            if name in HEAVY:
                pytest.skip(f"needs {name}", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if not parent.config.getoption("--light"):
        return None
    module: pytest.Module = LightModule.from_parent(parent, path=module_path)
    return module


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """As `cli`, in this process: for the long tables of what is refused. Anything but an exit fails the test."""

    from densepure_rt.cli import main
    from tests.support.cli import Done

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["densepure-rt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return Done(sys.argv, int(ended.value.code or 0), printed.out, printed.err)

    return call
