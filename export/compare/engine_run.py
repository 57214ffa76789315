"""An engine as a benchmark runs it, beside PyTorch on as many threads, and what a report says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.runtime.bundle import Bundle
from densepure_rt.runtime.device import MAX_BATCH, MAX_THREADS, Device, Provider
from densepure_rt.runtime.open_device import default_threads, open_device

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class EngineRun:
    """A bundle, and how its engines are run; PyTorch gets as many threads.

    batch: None for what `certify` would take. threads: None for `default_threads`. With a plan, or another provider
    than "cpu", PyTorch runs on the GPU too: not run on a GPU yet.
    """

    bundle: Bundle
    batch: int | None = None
    threads: int | None = None
    provider: Provider = "cpu"

    @property
    def cores(self) -> int:
        return default_threads(self.provider) if self.threads is None else self.threads

    def refuse_impossible(self) -> None:
        if self.batch is not None and not 1 <= self.batch <= MAX_BATCH:
            raise UsageError(f"`batch` {self.batch}: between 1 and {MAX_BATCH}")
        if not 1 <= self.cores <= MAX_THREADS:
            raise UsageError(f"`threads` {self.cores}: between 1 and {MAX_THREADS}")

    def on_gpu(self) -> bool:
        """Return whether the engine runs on the GPU. Raises EnvironmentFault when PyTorch could not run beside it."""
        on_gpu = self.bundle.unet.plan is not None or self.provider != "cpu"
        if on_gpu and not torch.cuda.is_available():
            raise EnvironmentFault(
                f"the engine runs on the GPU, but this PyTorch ({torch.__version__}) cannot use one: install one that "
                f"was built for CUDA, or compare an .onnx engine with PyTorch on the CPU"
            )
        return on_gpu

    @contextmanager
    def opened(self, say: Callable[[str], None]) -> Iterator[Device]:
        """The engine's device, while PyTorch is set to as many threads and keeps no gradients."""
        say(f"opening {self.bundle.unet_path.name}")
        how = self.batch, self.cores, self.provider
        with torch.inference_mode(), torch_settings(self.cores), closing(open_device(self.bundle, *how)) as device:
            yield device


@contextmanager
def torch_settings(threads: int) -> Iterator[None]:
    """PyTorch on so many threads; on a GPU without TensorFloat-32 and with cuDNN's fastest kernels. Then as before."""
    places = [
        (torch.backends.cuda.matmul, "allow_tf32", False),
        (torch.backends.cudnn, "allow_tf32", False),
        (torch.backends.cudnn, "benchmark", True),
    ]
    before = torch.get_num_threads(), [getattr(place, name) for place, name, _ in places]
    torch.set_num_threads(threads)
    for place, name, value in places:
        setattr(place, name, value)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        for (place, name, _), value in zip(places, before[1], strict=True):
            setattr(place, name, value)


@dataclass(frozen=True)
class Subject:
    """The engine that was run. device: what that says of itself."""

    engine: str
    engine_sha256: str
    classifier_sha256: str
    precision: str
    image: tuple[int, int, int]
    device: Mapping[str, str | int | bool]

    @classmethod
    def of(cls, bundle: Bundle, device: Device) -> Subject:
        unet, classifier = bundle.unet, bundle.classifier
        hashes = unet.file.sha256, classifier.file.sha256
        return cls(str(bundle.unet_path), *hashes, unet.precision, unet.image, dict(device.describe()))


def flat(found: DataclassInstance) -> dict[str, Any]:
    """A benchmark as its report holds it: what engine and machine are stands among the rest."""
    report: dict[str, Any] = {}
    for name, value in dataclasses.asdict(found).items():
        report |= value if name in ("subject", "machine") else {name: value}
    return report
