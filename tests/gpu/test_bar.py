"""Why the float32 bar of `test_on_gpu` stands where it does, calculated without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from densepure_rt.images.datasets import open_images
from densepure_rt.runtime.bundle import open_bundle, shipped_engine
from tests.gpu.test_on_gpu import RELATIVE_L2, SIGMA, cycled, feeds, relative_l2

torch = pytest.importorskip("torch", reason="torch is not installed")

# F(4x4, 3x3) of Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", section 4.1: tiles of 6 x 6.
INPUT = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
FILTER = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
DIRECT: Callable[..., Any] = torch.nn.functional.conv2d
TF32_BITS = 10  # of the mantissa that it keeps


def winograd(x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, *rest: Any) -> Any:
    """A convolution of 3 x 3 by Winograd's products, all in float32; any other as it is."""
    if weight.shape[2:] != (3, 3) or stride not in (1, (1, 1)) or padding not in (1, (1, 1)):
        return DIRECT(x, weight, bias, stride, padding, *rest)
    to_input, to_filter, to_output = (torch.tensor(rows, dtype=torch.float32) for rows in (INPUT, FILTER, OUTPUT))
    height, width = x.shape[2:]
    padded = torch.nn.functional.pad(x, (1, 1 + -width % 4, 1, 1 + -height % 4))
    tiles = to_input @ padded.unfold(2, 6, 4).unfold(3, 6, 4) @ to_input.T  # [n, channel, row, column, 6, 6]
    products = torch.einsum("nctuij,kcij->nktuij", tiles, to_filter @ weight @ to_filter.T)
    found = (to_output @ products @ to_output.T).permute(0, 1, 2, 4, 3, 5)
    whole = found.reshape(len(x), len(weight), height + -height % 4, width + -width % 4)[:, :, :height, :width]
    return whole if bias is None else whole + bias[:, None, None]


def tf32(x: Any, weight: Any, *rest: Any) -> Any:
    """A convolution of factors that are rounded to TensorFloat-32."""

    def rounded(values: Any) -> Any:
        mantissa, exponent = torch.frexp(values)
        return torch.ldexp(torch.round(mantissa * 2 ** (TF32_BITS + 1)) / 2 ** (TF32_BITS + 1), exponent)

    return DIRECT(rounded(x), rounded(weight), *rest)


@contextmanager
def convolving(by: Callable[..., Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", by)
        yield


def test_the_float32_bar_lets_winograds_convolutions_pass_by_far_and_tensorfloat_32_by_none() -> None:
    """One call of the default UNet, on states of a real chain, is off by 7e-7 and by 5e-4; the bar is 2e-5."""
    from densepure_rt.export.models.unets import zoo_unet

    shipped, network = open_bundle(shipped_engine()), zoo_unet().network.eval()
    images = list(open_images(None, shipped.unet.image, shipped.classifier.class_names).select(500, 4))
    *_, feed = feeds(shipped, cycled(images, 4), SIGMA, 2)
    x, t = torch.from_numpy(feed["mean"] + feed["std"] * feed["noise"]), torch.from_numpy(feed["t"])

    def run(by: Callable[..., Any]) -> Any:
        with torch.inference_mode(), convolving(by):
            return np.asarray(network(x, t))

    expected, bar = run(DIRECT), RELATIVE_L2["fp32"]
    assert 0 < relative_l2(run(winograd), expected) < bar / 10
    assert relative_l2(run(tf32), expected) > 10 * bar
