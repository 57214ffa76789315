"""`python -m tests.roofline`: what bounds a UNet call on each GPU, by calculation. Nothing of it was run on a GPU.

A call is one image of a batch. Its operations are those of `bench`: two a multiply-add, of convolutions and products.
The least that it must move is what each of these, and each normalisation, which must have seen its group before it can
begin, reads and writes once, in 16 bits, with all else fused into them; and the weights once a batch. The host is this
machine's, measured as by `bench --host`; it works while the GPU does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from densepure_rt.export.compare.host_cost import PROCEDURES, host_cost
from densepure_rt.export.models.openai_unet import PUBLISHED, unloaded
from densepure_rt.export.zoo.models import new_unet

BATCH = 512
BYTES = 2  # of a value in 16 bits
SHARE = 0.4  # of the peak that convolutions of this size ordinarily reach: an assumption
# Which arguments of an operation are activations; what else it takes is weights.
READS = {"convolution": (0,), "addmm": (1,), "mm": (0,), "bmm": (0, 1), "baddbmm": (1, 2), "native_group_norm": (0,)}


class Gpu(NamedTuple):
    """NVIDIA's datasheets, dense: TFLOP/s in 16 bits (accumulated in 32) and in float32, TB/s."""

    name: str
    half: float
    single: float
    bandwidth: float


GPUS = (
    Gpu("H100 SXM", 989, 67, 3.35),
    Gpu("A100 80 GB SXM", 312, 19.5, 2.04),
    Gpu("RTX 4090", 165, 82.6, 1.01),
    Gpu("Jetson AGX Orin 64 GB", 42, 5.3, 0.205),  # a quarter of its GPU's 170 sparse INT8 TOPS
)


class Moved(TorchDispatchMode):
    """Counts the activations that convolutions, products and normalisations read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if read := READS.get(func.overloadpacket.__name__):
            written = result[0] if isinstance(result, tuple) else result
            self.values += written.numel() + sum(args[place].numel() for place in read)
        return result


class Call(NamedTuple):
    """Of one image: GFLOP, and MB of activations; MB of weights, once a batch."""

    gflop: float
    activations: float
    weights: float

    @property
    def megabytes(self) -> float:
        return self.activations + self.weights / BATCH


def call_of(network: nn.Module, image: tuple[int, int, int]) -> Call:
    """Count on shapes alone."""
    x, t = torch.zeros(1, *image, device="meta"), torch.ones(1, device="meta")
    moved = Moved()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, moved, torch.no_grad():
        network.to("meta").eval()(x, t)
    weights = sum(parameter.numel() for parameter in network.parameters())
    return Call(counter.get_total_flops() / 1e9, moved.values * BYTES / 1e6, weights * BYTES / 1e6)


def calls() -> dict[str, Call]:
    cifar, imagenet = PUBLISHED
    networks: list[tuple[str, nn.Module, tuple[int, int, int]]] = [
        ("default", new_unet(), (1, 28, 28)),
        ("CIFAR-10", unloaded(cifar.architecture, cifar.heads), (3, 32, 32)),
        ("ImageNet-256", unloaded(imagenet.architecture, imagenet.heads), (3, 256, 256)),
    ]
    return {name: call_of(network, image) for name, network, image in networks}


def microseconds(call: Call, gpu: Gpu) -> dict[str, float]:
    """What each of the GPU's bounds takes of a call."""
    return {
        "float32": 1e3 * call.gflop / gpu.single / SHARE,
        "16 bit": 1e3 * call.gflop / gpu.half / SHARE,
        "memory": call.megabytes / gpu.bandwidth,
    }


def rows(host: float) -> list[str]:
    """The table of docs/performance.md. host: microseconds a call."""
    found = []
    for name, call in calls().items():
        for gpu in GPUS:
            times = microseconds(call, gpu) | {"host": host}
            bound = max(("16 bit", "memory", "host"), key=times.__getitem__)
            found.append(f"| {name} | {gpu.name} | {' | '.join(figure(us) for us in times.values())} | {bound} |")
    return found


def figure(microseconds: float) -> str:
    """Two digits."""
    unit, name = (1e3, "ms") if microseconds >= 1000 else (1, "us")
    return f"{float(f'{microseconds / unit:.2g}'):,.{0 if microseconds / unit >= 10 else 1}f} {name}"


def main() -> None:
    hosts = {(steps, votes): 1e6 / host_cost(BATCH, steps, votes).unet_calls for steps, votes in PROCEDURES}
    print("host:", ", ".join(f"{figure(us)} a call at (b, K) = {procedure}" for procedure, us in hosts.items()))
    for name, call in calls().items():
        print(f"{name}: {call.gflop:.3g} GFLOP and {call.megabytes:.3g} MB a call, {call.weights:,.0f} MB of weights")
    print(*rows(max(hosts.values())), sep="\n")


if __name__ == "__main__":
    main()
