"""The denoising check, on the shipped UNet under right and wrong declarations, and on denoisers that are exact."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from densepure_rt.export.denoising import IMAGES, denoised_errors, judge, shrinkage_error, spread, verdict
from densepure_rt.export.openai_unet import Architecture, Heads, OpenAIUNet, openai_schedule
from densepure_rt.export.sources import made_up, pixels_of, shipped_images
from densepure_rt.export.unets import DiffusionModel, no_unet, zoo_unet
from densepure_rt.runtime.bundle import Denoising, Prediction
from densepure_rt.runtime.schedule import Schedule

IMAGE = (1, 4, 4)
Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def shipped() -> DiffusionModel:
    return zoo_unet()


@pytest.fixture(scope="module")
def pictures() -> Pixels:
    return pixels_of(shipped_images(16))


def judged(model: DiffusionModel, pixels: Pixels, **declared: object) -> Denoising:
    found = judge(dataclasses.replace(model, **declared), pixels, made_up=False)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_the_shipped_unet_is_as_declared(shipped: DiffusionModel, pictures: Pixels) -> None:
    found = judged(shipped, pictures)
    assert found.verdict == "as declared"
    assert found.images == IMAGES
    assert found.error["0.5"] < 0.1 < found.shrinkage["0.5"]


@pytest.mark.parametrize(
    ("declared", "better"),
    [
        ({"prediction": "v"}, "--prediction epsilon"),
        ({"prediction": "x0"}, "--prediction epsilon"),
        ({"schedule": Schedule("cosine", 1000)}, "--schedule linear"),
        ({"schedule": Schedule("scaled_linear", 1000, 0.00085, 0.012)}, "--schedule linear"),
        ({"schedule": Schedule("cosine", 1000), "prediction": "v"}, "--prediction epsilon --schedule linear"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_a_wrong_declaration_of_the_shipped_unet_is_doubted_and_the_right_one_named(
    shipped: DiffusionModel, pictures: Pixels, declared: dict[str, object], better: str
) -> None:
    found = judged(shipped, pictures, **declared)
    assert found.verdict == "doubted"
    assert found.other == better
    assert all(found.other_error[sigma] < found.error[sigma] for sigma in found.other_error)


class Exact(nn.Module):
    """The posterior mean of images that are drawn evenly from a few: the best denoiser there is, in closed form.

    Of x = signal * image + noise * n, the weight of image k is a softmax of -|x - signal image_k|^2 / (2 noise^2).
    """

    def __init__(self, clean: Tensor) -> None:
        super().__init__()
        self.register_buffer("clean", clean)

    def x0(self, x: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        clean: Tensor = self.get_buffer("clean")
        away = x[:, None] - signal[:, None, None, None, None] * clean[None]
        weights = torch.softmax(-away.flatten(2).square().sum(2) / (2 * noise[:, None] ** 2), dim=1)
        return torch.einsum("bk,kchw->bchw", weights, clean)


class Discrete(Exact):
    """As a network of timesteps that predicts epsilon, v or x0 (Salimans & Ho 2022, section 4)."""

    def __init__(self, clean: Tensor, schedule: Schedule, prediction: Prediction) -> None:
        super().__init__(clean)
        self.bars, self.prediction = torch.from_numpy(schedule.alpha_bar()).float(), prediction

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        bar = self.bars[t.round().long()]
        signal, noise = bar.sqrt(), (1 - bar).sqrt()
        x0 = self.x0(x, signal, noise)
        signal, noise = signal[:, None, None, None], noise[:, None, None, None]
        eps = (x - signal * x0) / noise
        return {"x0": x0, "epsilon": eps, "v": signal * eps - noise * x0}[self.prediction]


class Continuous(Exact):
    """As Karras et al. 2022 precondition a network: D(x, sigma)."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.x0(x, torch.ones_like(t), t)


@pytest.fixture(scope="module")
def few() -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (256, *IMAGE), np.uint8)


def clean_of(pixels: Pixels) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)


SCHEDULES = (Schedule("linear", 1000), Schedule("cosine", 1000))


def discrete(few: Pixels, schedule: Schedule, prediction: Prediction) -> DiffusionModel:
    network = Discrete(clean_of(few), schedule, prediction).eval()
    return DiffusionModel(network, IMAGE, schedule, "fixed_small", prediction, (-1.0, 1.0), "0" * 64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_an_exact_denoiser_is_as_declared_however_it_says_what_it_knows(
    few: Pixels, schedule: Schedule, prediction: Prediction
) -> None:
    assert judged(discrete(few, schedule, prediction), few).verdict == "as declared"


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("declared", ["epsilon", "v", "x0"])
def test_what_an_exact_denoiser_predicts_is_found_out(
    few: Pixels, prediction: Prediction, declared: Prediction
) -> None:
    found = judged(discrete(few, SCHEDULES[0], prediction), few, prediction=declared)
    assert found.verdict == ("as declared" if declared == prediction else "doubted")
    if declared != prediction:
        assert found.other == f"--prediction {prediction}"


def test_a_denoiser_of_noise_levels_is_compared_with_shrinkage_alone(few: Pixels) -> None:
    model = DiffusionModel(
        Continuous(clean_of(few)).eval(), IMAGE, Schedule("continuous", 1), "fixed_small", "denoiser", None, "0" * 64
    )
    found = judged(model, few)
    assert (found.verdict, found.other) == ("as declared", "")
    assert judged(dataclasses.replace(model, network=Nothing()), few).verdict == "not judged"


class Nothing(nn.Module):
    """An untrained network: noise goes through it as it came."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


def test_an_untrained_network_is_not_judged(few: Pixels) -> None:
    model = dataclasses.replace(discrete(few, SCHEDULES[0], "x0"), network=Nothing())
    assert judged(model, few).verdict == "not judged"


def test_pictures_that_are_made_up_raise_no_false_alarm(shipped: DiffusionModel) -> None:
    found = judge(shipped, made_up((1, 28, 28), 8), made_up=True)
    assert found is not None
    assert found.verdict in ("as declared", "not judged")


def test_without_a_network_there_is_nothing_to_judge(few: Pixels) -> None:
    assert judge(no_unet(IMAGE), few, made_up=False) is None


def test_the_order_of_attention_and_other_heads_are_tried() -> None:
    """An exact denoiser cannot be had here, so the orders are told apart by their errors alone."""
    torch.manual_seed(0)
    architecture = Architecture(3, 32, (32, 64), 1, (False, True), "resblock", True, True)
    network = OpenAIUNet(architecture, Heads(number=4)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = DiffusionModel(
        network, (3, 16, 16), openai_schedule("linear", 1000), "learned_range", "epsilon", (-1.0, 1.0), "0" * 64
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), np.uint8)
    other = dataclasses.replace(model, network=_in_order(network, "new"))
    first, second = (denoised_errors(one, pixels, [0.5])["epsilon"][0.5] for one in (model, other))
    assert first != pytest.approx(second, rel=1e-6)


def _in_order(network: OpenAIUNet, order: str) -> OpenAIUNet:
    from densepure_rt.export.openai_unet import resplit

    return resplit(network, dataclasses.replace(network.heads, order=order))  # type: ignore[arg-type]


@pytest.mark.parametrize(("variance", "noise"), [(0.3, 1.0), (0.05, 0.25), (1.0, 1e-3), (1e-3, 4.0)])
def test_shrinkage_is_the_best_affine_estimate(variance: float, noise: float) -> None:
    """Its weight and offset are found here by least squares on drawn values."""
    draw = np.random.default_rng(3)
    x = 0.2 + math.sqrt(variance) * draw.standard_normal(200_000)
    y = x + math.sqrt(noise) * draw.standard_normal(len(x))
    _, residual, *_ = np.linalg.lstsq(np.stack([y, np.ones_like(y)], 1), x, rcond=None)
    assert residual[0] / len(x) == pytest.approx(shrinkage_error(variance, noise), rel=0.02)


@pytest.mark.parametrize(
    ("declared", "others", "expected"),
    [
        (0.1, [0.2, 0.3], ("as declared", 0)),
        (0.2, [0.3, 0.1], ("doubted", 1)),
        (0.2, [0.199], ("as declared", 0)),  # within the margin
        (0.5, [0.45], ("not judged", 0)),  # better, and worse than shrinkage
        (0.39, [], ("not judged", None)),
        (0.5, [0.1], ("doubted", 0)),
    ],
)
def test_the_verdict_asks_for_the_best_and_for_better_than_shrinkage(
    declared: float, others: list[float], expected: tuple[str, int | None]
) -> None:
    assert verdict({0.5: declared}, [{0.5: other} for other in others], {0.5: 0.4}) == expected


@pytest.mark.parametrize(("there", "asked", "found"), [(16, 4, [0, 4, 8, 12]), (3, 8, [0, 1, 2])])
def test_images_are_spread_over_those_that_are_there(there: int, asked: int, found: list[int]) -> None:
    pixels = np.arange(there, dtype=np.uint8).reshape(-1, 1, 1, 1)
    assert spread(pixels, asked).ravel().tolist() == found
