"""Preprocessing against Pillow, torch's own interpolation and numpy."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Literal

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from densepure_rt.errors import UsageError
from densepure_rt.export.convert.to_onnx import to_onnx
from densepure_rt.export.models.preprocessing import (
    Interpolation,
    Preprocess,
    Preprocessing,
    described,
    output_shape,
    resize_matrix,
)
from densepure_rt.runtime.noise import first_state
from densepure_rt.runtime.onnx_device import open_session

RGB, GREY = (3, 32, 24), (1, 28, 28)
SIZES = [(32, 224), (256, 224), (28, 32), (64, 20), (33, 8), (256, 512), (7, 3), (5, 1), (1, 5), (9, 9)]
FILTERS: list[Interpolation] = ["bicubic", "bilinear"]
IMAGENET = Preprocessing((0, 1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def levels(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def fed(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """What the runtime feeds for clean images [n, C, H, W]."""
    return torch.from_numpy(first_state(pixels.astype(np.int32), 1.0))


def pillow(image: NDArray[np.float32], height: int, width: int, interpolation: Interpolation) -> NDArray[np.float32]:
    """Pillow's resize of an image [C, H, W] of floats, which it neither rounds nor clips."""
    method = Image.Resampling[interpolation.upper()]
    return np.stack([np.asarray(Image.fromarray(plane).resize((width, height), method)) for plane in image])


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("size", "target"), SIZES)
def test_resizing_is_torch_s(size: int, target: int, interpolation: Interpolation, antialias: bool) -> None:
    x = np.random.default_rng(1).standard_normal((size, size))
    matrix = resize_matrix(size, target, interpolation, antialias)
    expected = F.interpolate(
        torch.from_numpy(x)[None, None], (target, target), mode=interpolation, antialias=antialias, align_corners=False
    )
    np.testing.assert_allclose(matrix @ x @ matrix.T, expected[0, 0].numpy(), atol=1e-12)


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_nearest_is_torch_s_exact_one(size: int, target: int) -> None:
    x = np.random.default_rng(1).standard_normal((size, size))
    matrix = resize_matrix(size, target, "nearest", True)
    expected = F.interpolate(torch.from_numpy(x)[None, None], (target, target), mode="nearest-exact")
    np.testing.assert_array_equal(matrix @ x @ matrix.T, expected[0, 0].numpy())


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("size", "target"), SIZES)
def test_antialiased_resizing_is_pillow_s(size: int, target: int, interpolation: Interpolation) -> None:
    x = np.random.default_rng(2).standard_normal((1, size, size)).astype(np.float32)
    matrix = resize_matrix(size, target, interpolation, antialias=True)
    expected = pillow(x, target, target, interpolation)[0]
    np.testing.assert_allclose(matrix @ x[0] @ matrix.T, expected, atol=1e-6)  # Pillow gives float32


@settings(deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 70), st.sampled_from(["bicubic", "bilinear", "nearest"]), st.sampled_from([0, 1])
)
def test_a_flat_image_stays_flat(size: int, target: int, interpolation: Interpolation, antialias: int) -> None:
    matrix = resize_matrix(size, target, interpolation, bool(antialias))
    assert matrix.shape == (target, size)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)


@pytest.mark.parametrize("resize", [None, (48, 40), (16, 40)])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_pixels_are_what_pillow_and_numpy_make_of_the_levels(
    resize: tuple[int, int] | None, channels: Literal["RGB", "BGR"]
) -> None:
    """ImageNet's normalisation, written as torchvision does: resize, levels / 255, minus mean, over std."""
    pixels = levels((2, *RGB))
    ours = Preprocess(dataclasses.replace(IMAGENET, resize=resize, channels=channels), RGB)(fed(pixels)).numpy()
    mean, std = (np.reshape(v, (3, 1, 1)) for v in (IMAGENET.mean, IMAGENET.std))
    for image, found in zip(pixels.astype(np.float32), ours, strict=True):
        resized = image if resize is None else pillow(image, *resize, "bicubic")
        ordered = resized if channels == "RGB" else resized[::-1]
        np.testing.assert_allclose(found, (ordered / 255 - mean) / std, atol=3e-6)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)])
def test_scale_is_the_range_of_the_pixels(scale: tuple[float, float]) -> None:
    pixels = np.array([0, 255], np.uint8).reshape(1, 1, 1, 2).repeat(3, axis=1)
    found = Preprocess(Preprocessing(scale), (3, 1, 2))(fed(pixels))
    assert found.flatten(1)[0].tolist() == pytest.approx([*scale] * 3)


def test_pixels_of_the_runtime_s_own_range_pass_as_they_are() -> None:
    x = fed(levels((2, *RGB)))
    assert torch.equal(Preprocess(Preprocessing((-1, 1)), RGB)(x), x)


def test_nothing_is_rounded_and_nothing_is_clipped() -> None:
    """The official code's round trip through uint8 would lose all three."""
    preprocess = Preprocess(Preprocessing((0, 255), resize=(48, 36)), RGB)
    x = torch.full((1, *RGB), 0.1)
    assert preprocess(x + 1e-4).mean() - preprocess(x).mean() == pytest.approx(1e-4 * 127.5, rel=0.05)
    assert preprocess(x + 1).mean() == pytest.approx(255 * 1.05, rel=1e-5)
    assert preprocess(x - 2).mean() == pytest.approx(-255 * 0.45, rel=1e-5)


def test_crop_takes_the_middle() -> None:
    pixels = levels((1, 3, 9, 10))
    found = Preprocess(Preprocessing((0, 255), crop=(4, 6)), (3, 9, 10))(fed(pixels))
    np.testing.assert_allclose(found.numpy(), pixels[:, :, 2:6, 2:8], atol=1e-4)


def test_crop_comes_after_the_resize() -> None:
    x = fed(levels((1, *RGB)))
    whole = Preprocess(dataclasses.replace(IMAGENET, resize=(40, 40)), RGB)(x)
    found = Preprocess(dataclasses.replace(IMAGENET, resize=(40, 40), crop=(32, 30)), RGB)(x)
    assert torch.equal(found, whole[:, :, 4:36, 5:35])


def test_a_grey_image_is_repeated_where_three_channels_are_wanted() -> None:
    pixels = levels((2, *GREY))
    found = Preprocess(IMAGENET, GREY)(fed(pixels))
    expected = Preprocess(IMAGENET, (3, 28, 28))(fed(pixels.repeat(3, axis=1)))
    torch.testing.assert_close(found, expected)


def test_colour_becomes_pillow_s_luma_where_grey_is_wanted() -> None:
    pixels = levels((1, *RGB))
    found = Preprocess(Preprocessing((0, 255), channels="grey"), RGB)(fed(pixels))
    expected = np.asarray(Image.fromarray(pixels[0].transpose(1, 2, 0)).convert("L"), np.float32)
    assert found.shape == (1, 1, 32, 24)
    assert np.abs(found[0, 0].numpy() - expected).max() <= 0.51  # Pillow rounds


@pytest.mark.parametrize("channels", ["RGB", "BGR", "grey"])
def test_the_exported_graph_computes_the_same_and_holds_no_resize(
    channels: Literal["RGB", "BGR", "grey"],
) -> None:
    wanted = Preprocessing((0, 1), (0.4,), (0.2,), channels, resize=(40, 48), crop=(32, 32))
    preprocess = Preprocess(wanted, RGB).eval()
    content = to_onnx(preprocess, (torch.zeros(2, *RGB),), ["mean"], ["pixels"])
    ops = {node.op_type for node in onnx.load_model_from_string(content).graph.node}
    assert "Resize" not in ops
    assert "MatMul" in ops
    x = fed(levels((3, *RGB)))
    (found,) = open_session(content, "preprocess", ["mean"], ["pixels"]).run(["pixels"], {"mean": x.numpy()})
    np.testing.assert_allclose(found, preprocess(x).numpy(), atol=2e-5)


def test_module_has_no_weights_and_its_shape_is_the_declared_one() -> None:
    preprocess = Preprocess(dataclasses.replace(IMAGENET, resize=(40, 40), crop=(32, 30)), GREY)
    assert not preprocess.state_dict()
    assert preprocess(torch.zeros(2, *GREY)).shape[1:] == preprocess.shape == (3, 32, 30)


def test_it_is_data_that_json_holds() -> None:
    wanted = dataclasses.replace(IMAGENET, resize=(40, 40))
    assert json.loads(json.dumps(dataclasses.asdict(wanted)))["resize"] == [40, 40]


def test_it_can_be_said_in_a_line() -> None:
    wanted = dataclasses.replace(IMAGENET, resize=(256, 200), crop=(224, 200))
    assert described(wanted) == (
        "RGB, resized to 256x200 (bicubic, antialiased), centre-cropped to 224x200, pixels in [0, 1], "
        "minus (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225)"
    )
    assert described(Preprocessing((-1, 1), channels="BGR")) == "BGR, pixels in [-1, 1]"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crop": (33, 24)}, "crop of 33x24 does not fit in 32x24"),
        ({"resize": (20, 20), "crop": (21, 20)}, "crop of 21x20 does not fit in 20x20"),
        ({"resize": (0, 20)}, "resize to 0x20"),
        ({"crop": (0, 20)}, "crop to 0x20"),
        ({"mean": (0.5, 0.5)}, "mean has 2 numbers, the classifier takes RGB: give one, or 3"),
        ({"std": (1.0,) * 4}, "std has 4 numbers"),
        ({"channels": "grey", "mean": (0.1, 0.2, 0.3)}, "mean has 3 numbers, the classifier takes grey"),
        ({"std": (0.0,)}, "std is 0.0.*above 0"),
        ({"std": (-1.0,)}, "std is -1.0"),
        ({"std": (math.inf,)}, "std is inf"),
        ({"mean": (math.nan,)}, "mean is nan"),
        ({"scale": (0, math.inf)}, "pixels from 0 to inf"),
        ({"scale": (1, 1)}, "pixels from 1 to 1"),
        ({"mean": (103.9,)}, r"mean 103.9 lies outside the pixels' range, 0 to 1"),
        ({"interpolation": "lanczos"}, "RGB and lanczos"),
        ({"channels": "CMYK"}, "CMYK and bicubic"),
    ],
)
def test_what_is_impossible_is_refused(change: dict[str, object], said: str) -> None:
    wanted = dataclasses.replace(IMAGENET, **change)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=said):
        output_shape(wanted, RGB)


def test_images_of_two_channels_are_refused() -> None:
    with pytest.raises(UsageError, match="takes RGB, the images have 2 channels"):
        Preprocess(IMAGENET, (2, 6, 5))
