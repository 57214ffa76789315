"""Whether a source is a function that can be exported, before an export of it is blamed.

A certificate is about one function of one image. So a source must give finite values, the same ones again, and to an
image in a batch the same ones as alone. What fails is named as near to its cause as can be: a module or a node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from densepure_rt.errors import CheckFailed
from densepure_rt.rounding import raised
from densepure_rt.runtime.device import Floats

SAME = 1e-4  # relative L2. Other batch sizes alone move float32 networks by some 1e-7, the faults by 1e-3 and more
TORCH_MOVES = {
    "finite": "look for a division by 0 or a logarithm there, and check that pixels are prepared as it was trained",
    "repeatable": "switch it off in evaluation: F.dropout(x, p, self.training), and no randn in forward",
    "batch": "give norms running statistics (BatchNorm with track_running_stats=True), and take no mean over a batch",
}
ONNX_MOVES = {
    "finite": "look for a division by 0 or a logarithm there, and check `pixel_range`, `mean` and `std`",
    "repeatable": "export it again in evaluation mode (model.eval()), without operators that draw random numbers",
    "batch": "export it again in evaluation mode, without operators that mix the images of a batch",
}
DYNAMIC_QUANTIZATION = (
    "its scales are taken from the whole batch: give the file from before quantize_dynamic (`precision` int8 quantizes "
    "it here), or one of quantize_static"
)


@dataclass(frozen=True)
class Part:
    """The inputs and outputs of a module or node, float arrays. name: of it, for a message."""

    name: str
    given: Sequence[Floats]
    gave: Floats


@dataclass(frozen=True)
class Source:
    """A network as a function of arrays whose first dimension is the batch.

    name: in a message. trace: the same run with what is within, inner parts before those that hold them.
    moves: what to do about each fault.
    """

    name: str
    call: Callable[[Floats], Floats]
    trace: Callable[[Floats], Iterable[Part]]
    moves: Mapping[str, str]


def torch_source(name: str, call: Callable[[Floats], Floats], module: nn.Module) -> Source:
    """Present a network in PyTorch to the checks. call: runs `module`, with whatever else it takes."""
    return Source(name, call, lambda x: torch_trace(lambda: call(x), module), TORCH_MOVES)


def torch_trace(run: Callable[[], object], module: nn.Module) -> list[Part]:
    """Record what every module within `module` is given and gives while `run` runs, in the order they end."""
    parts: list[Part] = []

    def record(name: str) -> Callable[..., None]:
        def hook(inner: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            gave = next(_floats(output), None)
            if gave is not None:
                parts.append(Part(f"module {name} ({type(inner).__name__})", list(_floats((args, kwargs))), gave))

        return hook

    hooks = [
        inner.register_forward_hook(record(name), with_kwargs=True) for name, inner in module.named_modules() if name
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return parts


def _floats(value: Any) -> Iterator[Floats]:
    """Copies of the floating tensors within arguments or results, float32."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.detach().float().numpy(force=True).copy()
    elif isinstance(value, Mapping):
        yield from _floats(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _floats(item)


def check_source(source: Source, x: Floats) -> None:
    """Raise CheckFailed unless `source` is finite, repeatable and independent of its batch on the inputs `x`."""
    refuse_not_finite(source, x)
    together, alone = source.call(x), np.concatenate([source.call(x[i : i + 1]) for i in range(len(x))])
    if distance(together, alone) > SAME:
        refuse_unrepeatable(source, x)
        _refuse_batch_dependent(source, x, distance(together, alone))


def refuse_not_finite(source: Source, x: Floats) -> None:
    output = source.call(x)
    if np.isfinite(output).all():
        return
    place = first_overflow(source.trace(x))
    raise CheckFailed(
        f"{source.name} itself gives NaN or Inf{_in(place)}, before any export: {source.moves['finite']}. Nothing was "
        f"published"
    )


def refuse_unrepeatable(source: Source, x: Floats) -> None:
    gap = distance(source.call(x), source.call(x))
    if gap <= SAME:
        return
    place = first_difference(source.trace(x), source.trace(x))
    raise CheckFailed(
        f"{source.name} gives other values when it is run again on the same input (relative L2 "
        f"{raised(gap, figures=2)}){_in(place)}: "
        f"a certificate is about one function; {source.moves['repeatable']}. Nothing was published"
    )


def _refuse_batch_dependent(source: Source, x: Floats, gap: float) -> None:
    place = first_difference(source.trace(x), source.trace(x[:1]))
    raise CheckFailed(
        f"{source.name} gives an image other values in a batch of {len(x)} than alone (relative L2 "
        f"{raised(gap, figures=2)})"
        f"{_in(place)}: the votes of one image would depend on the others; {source.moves['batch']}. Nothing was "
        f"published"
    )


def first_overflow(trace: Iterable[Part]) -> str | None:
    """Find the first part that was given finite values and gave others."""
    for part in trace:
        if not np.isfinite(part.gave).all() and all(np.isfinite(value).all() for value in part.given):
            return part.name
    return None


def first_difference(trace: Iterable[Part], other: Iterable[Part]) -> str | None:
    """Find the first part that was given the same in two runs and gave another value in the second.

    other: the same run, or that of the first images alone. Parts are matched by name, the first of a name with the
    first; those whose arrays do not begin with the images are passed over.
    """
    matches: dict[str, list[Part]] = {}
    for part in other:
        matches.setdefault(part.name, []).append(part)
    for part in trace:
        if not (found := matches.get(part.name)):
            continue
        twin = found.pop(0)
        (gave, *given) = (
            (one[: len(two)] if two.ndim else one, two)
            for one, two in zip((part.gave, *part.given), (twin.gave, *twin.given), strict=False)
        )
        if gave[0].shape == gave[1].shape and distance(*gave) > SAME and all(distance(*pair) <= SAME for pair in given):
            return part.name
    return None


def distance(one: Floats, two: Floats) -> float:
    """Return the relative L2 distance; infinite between shapes, and where some values are not finite."""
    if one.shape != two.shape:
        return np.inf
    gap = float(np.linalg.norm(one.astype(np.float64) - two))
    size = max(float(np.linalg.norm(one.astype(np.float64))), float(np.linalg.norm(two.astype(np.float64))))
    if not np.isfinite(gap + size):
        return 0.0 if np.array_equal(one, two, equal_nan=True) else np.inf
    return gap / size if size else 0.0


def _in(place: str | None) -> str:
    return f", first in {place}" if place is not None else ""


def as_function(module: nn.Module, t: float | None = None) -> Callable[[Floats], Floats]:
    """Wrap a module as a function of arrays. t: what a diffusion network is told beside x, for every image."""

    @torch.inference_mode()
    def call(x: Floats) -> Floats:
        images = torch.from_numpy(np.ascontiguousarray(x))
        told = () if t is None else (torch.full((len(x),), t),)
        found: Floats = module(images, *told).detach().float().numpy(force=True)
        return found

    return call
