from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from densepure_rt.export.compare.denoising import (
    BETAS,
    MADE_UP_MARGIN,
    PERFECT,
    PREDICTIONS,
    Errors,
    denoised_errors,
    judge,
    relative,
    shrinkage_error,
    spread,
    verdict,
    within_reach,
)
from densepure_rt.export.convert.parity import noisy_states
from densepure_rt.export.convert.precision import SIGMAS
from densepure_rt.export.models.check_images import LARGE_IMAGE, made_up
from densepure_rt.export.models.openai_unet import Architecture, Heads, OpenAIUNet, openai_schedule, resplit
from densepure_rt.export.models.unets import DiffusersNetwork, DiffusionModel, no_unet, zoo_unet
from densepure_rt.export.zoo.make_data import CLASS_NAMES
from densepure_rt.export.zoo.models import new_unet
from densepure_rt.images.datasets import SHIPPED_SHAPE, open_images
from densepure_rt.runtime.bundle import Denoising, Prediction
from densepure_rt.runtime.noise import first_state
from densepure_rt.runtime.schedule import Schedule, ScheduleName, TimestepRule, make_chain

SIDE = 8
IMAGE = (1, SIDE, SIDE)
Pixels = NDArray[np.uint8]
SCHEDULES: dict[ScheduleName, Schedule] = {
    "linear": Schedule("linear", 1000),
    "scaled_linear": Schedule("scaled_linear", 1000, *BETAS["scaled_linear"]),
    "cosine": Schedule("cosine", 1000),
}


def model(
    network: nn.Module,
    prediction: Prediction = "epsilon",
    schedule: Schedule = SCHEDULES["linear"],
    image: tuple[int, int, int] = IMAGE,
) -> DiffusionModel:
    return DiffusionModel(network.eval(), image, schedule, "fixed_small", prediction, (-1.0, 1.0), "0" * 64)


def judged(network: DiffusionModel, pixels: Pixels, synthetic: bool = False) -> Denoising:
    found = judge(network, pixels, synthetic)
    assert found is not None
    return found


# A family of images of which the best denoiser is known in closed form: a Gaussian that is smooth.


def covariance() -> Tensor:
    """Make the covariance of pixels, float32 [64, 64]: near ones vary together."""
    place = torch.arange(SIDE, dtype=torch.float32)
    along = torch.exp(-((place[:, None] - place) ** 2) / (2 * 2.0**2))
    return 0.16 * torch.kron(along, along)


def smooth_images(count: int, seed: int = 0) -> Pixels:
    root = np.linalg.cholesky(covariance().double().numpy() + 1e-6 * np.eye(SIDE * SIDE))
    x = np.random.default_rng(seed).standard_normal((count, SIDE * SIDE)) @ root.T
    levels: Pixels = np.rint((np.clip(x, -1, 1) + 1) / 2 * 255).astype(np.uint8).reshape(count, *IMAGE)
    return levels


class BestDenoiser(nn.Module):
    """E[x | x + s n] of the smooth Gaussian, C (C + s^2)^-1 y, as a function of (y, s)."""

    def __init__(self) -> None:
        super().__init__()
        values, vectors = torch.linalg.eigh(covariance())
        self.values, self.vectors = values.clamp(min=0), vectors

    def forward(self, y: Tensor, s: Tensor) -> Tensor:
        along = y.flatten(1) @ self.vectors
        weights = self.values / (self.values + s[:, None] ** 2)
        x: Tensor = ((weights * along) @ self.vectors.T).reshape(y.shape)
        return x


class Timed(nn.Module):
    """The best denoiser as a network of timesteps would be trained: told t of its schedule, it gives its kind."""

    def __init__(self, prediction: Prediction, schedule: Schedule, learned: bool = False) -> None:
        super().__init__()
        self.prediction, self.learned = prediction, learned
        self.alpha_bar, self.scale = torch.from_numpy(schedule.alpha_bar()).float(), schedule.timestep_scale
        self.best = BestDenoiser()
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        ab = self.alpha_bar[(t / self.scale).round().long().clamp(0, len(self.alpha_bar) - 1)][:, None, None, None]
        signal, sigma = ab.sqrt(), (1 - ab).sqrt()
        x0 = self.best(x / signal, (sigma / signal).flatten())
        noise = (x - signal * x0) / sigma
        output = {"epsilon": noise, "v": signal * noise - sigma * x0, "x0": x0}[self.prediction]
        return torch.cat([output, torch.zeros_like(output)], 1) if self.learned else output


# Linear shrinkage


@given(st.floats(1e-3, 1), st.floats(1e-3, 20), st.floats(-1, 1))
def test_shrinkage_is_the_best_affine_estimate(variance: float, noise: float, mean: float) -> None:
    """Compute the error of any w y + b, which is (w - 1)^2 variance + w^2 noise + (b - (1 - w) mean)^2."""
    found = shrinkage_error(variance, noise)

    def error(w: float, b: float) -> float:
        return (w - 1) ** 2 * variance + w**2 * noise + (b - (1 - w) * mean) ** 2

    grid = [error(w, (1 - w) * mean + shift) for w in np.linspace(0, 1, 401) for shift in (-0.1, 0.0, 0.1)]
    assert found <= min(grid) * (1 + 1e-9)
    assert found >= min(grid) - (variance + noise) / 400**2  # and it is attained


def test_shrinkage_is_what_regression_comes_to() -> None:
    draw = np.random.default_rng(0)
    x = draw.choice([-1.0, -1.0, 0.5], 400_000)
    y = x + draw.standard_normal(x.size)
    design = np.stack([y, np.ones_like(y)], 1)
    fit, *_ = np.linalg.lstsq(design, x, rcond=None)
    assert shrinkage_error(float(x.var()), 1.0) == pytest.approx(float(((design @ fit - x) ** 2).mean()), rel=0.01)


# The verdict

LEVELS = (0.25, 0.5, 1.0)
ERRORS = st.fixed_dictionaries({sigma: st.floats(1e-3, 1) for sigma in LEVELS})


def scaled(errors: Errors, factor: float) -> dict[float, float]:
    return {sigma: factor * error for sigma, error in errors.items()}


@given(ERRORS, st.lists(ERRORS, max_size=4), ERRORS)
@example(
    {0.25: 1.0, 0.5: 0.5, 1.0: 1 / 64},
    [dict.fromkeys(LEVELS, 1.0), {0.25: 1.0, 0.5: 1.0, 1.0: 1 / 256}],
    dict.fromkeys(LEVELS, 1.0),
)
def test_verdict_follows_from_the_order_of_the_errors(
    declared: Errors, others: list[Errors], shrinkage: Errors
) -> None:
    said, best = verdict(declared, others, shrinkage)
    perfect = scaled(shrinkage, PERFECT)  # errors below these count as these
    ours, *theirs = ({sigma: max(one[sigma], perfect[sigma]) for sigma in one} for one in (declared, *others))
    if said == "doubted":
        assert best is not None
        assert max(relative(theirs[best], base) for base in (ours, shrinkage)) <= 1 + 1e-9
    elif said == "as declared":
        assert relative(ours, shrinkage) < 1
        rivals = [other for other in theirs if relative(other, shrinkage) < 0.95]
        assert all(relative(other, ours) > 0.95 for other in rivals)
    else:
        assert relative(ours, shrinkage) > 0.95
    assert (best is None) == (not others)


@given(ERRORS)
def test_verdict_has_a_margin_on_both_sides(shrinkage: Errors) -> None:
    good, near, better = (scaled(shrinkage, factor) for factor in (0.5, 0.49, 0.3))
    assert verdict(good, [near], shrinkage) == ("as declared", 0)
    assert verdict(good, [near, better], shrinkage) == ("doubted", 1)
    assert verdict(good, [better], shrinkage, MADE_UP_MARGIN)[0] == "as declared"
    assert verdict(good, [scaled(shrinkage, 0.2)], shrinkage, MADE_UP_MARGIN)[0] == "doubted"
    assert verdict(scaled(shrinkage, 0.97), [], shrinkage) == ("not judged", None)
    assert verdict(scaled(shrinkage, 3), [scaled(shrinkage, 1.2)], shrinkage)[0] == "not judged"
    assert verdict(scaled(shrinkage, 3), [scaled(shrinkage, 0.6)], shrinkage)[0] == "doubted"


def test_of_equally_good_explanations_the_first_is_named() -> None:
    shrinkage = dict.fromkeys(LEVELS, 1.0)
    others = [scaled(shrinkage, factor) for factor in (0.2, 0.102, 0.1)]
    assert verdict(scaled(shrinkage, 0.5), others, shrinkage) == ("doubted", 1)


def test_of_two_that_hardly_err_neither_is_called_better() -> None:
    """As of images that are so far apart that noise confuses none: both errors are rounding."""
    shrinkage = dict.fromkeys(LEVELS, 1.0)
    assert verdict(scaled(shrinkage, 1e-4), [scaled(shrinkage, 1e-9)], shrinkage) == ("as declared", 0)


def test_errors_are_compared_at_the_sigmas_that_both_have() -> None:
    assert relative({0.25: 2.0, 1.0: 8.0}, {0.25: 1.0, 0.5: 9.0, 1.0: 1.0}) == pytest.approx(4)
    assert relative({0.5: 2.0}, {0.25: 1.0}) == math.inf


def test_images_are_spread() -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(16, 1, 1, 1)
    assert spread(pixels, 8).ravel().tolist() == list(range(0, 16, 2))
    assert spread(pixels, 1).ravel().tolist() == [0]
    assert spread(pixels[:3], 8).ravel().tolist() == [0, 1, 2]


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), Schedule("linear", 100), Schedule("linear", 30)])
def test_sigmas_are_within_the_schedule(schedule: Schedule) -> None:
    sigmas = within_reach(schedule)
    assert len(sigmas) == 3
    for sigma in sigmas:
        make_chain(schedule, "fixed_small", sigma, 1)


def test_a_schedule_that_reaches_hardly_any_noise_is_not_judged() -> None:
    schedule = Schedule("linear", 2, 1e-5, 2e-5)
    assert within_reach(schedule) == ()
    found = judged(model(Timed("epsilon", schedule), "epsilon", schedule), smooth_images(4))
    assert found.verdict == "not judged"


# Networks that are known


@pytest.mark.parametrize("rule", ["nearest", "densepure", "carlini"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_best_denoiser_as_it_is_declared_is_no_cause_for_doubt(
    prediction: Prediction, name: ScheduleName, rule: TimestepRule
) -> None:
    right = dataclasses.replace(
        model(Timed(prediction, SCHEDULES[name]), prediction, SCHEDULES[name]), timestep_rule=rule
    )
    found = judged(right, smooth_images(8))
    assert found.verdict == "as declared", found
    assert (found.images, found.made_up, list(found.error)) == (8, False, ["0.25", "0.5", "1"])
    for sigma, error in found.error.items():
        s = 2 * float(sigma)
        values = BestDenoiser().values
        assert error == pytest.approx(float((values * s**2 / (values + s**2)).mean()), rel=0.35)  # of 8 images


@pytest.mark.parametrize(("trained", "declared"), [(a, b) for a in PREDICTIONS for b in PREDICTIONS if a != b], ids=str)
def test_another_prediction_is_found(trained: Prediction, declared: Prediction) -> None:
    found = judged(model(Timed(trained, SCHEDULES["linear"]), declared), smooth_images(8))
    assert (found.verdict, found.other, found.instead_of) == ("doubted", f"--prediction {trained}", declared)


@pytest.mark.parametrize(("trained", "declared"), [(a, b) for a in SCHEDULES for b in SCHEDULES if a != b], ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_another_schedule_is_found(prediction: Prediction, trained: ScheduleName, declared: ScheduleName) -> None:
    wrong = model(Timed(prediction, SCHEDULES[trained]), prediction, SCHEDULES[declared])
    found = judged(wrong, smooth_images(8))
    assert (found.verdict, found.instead_of) == ("doubted", f"{declared} schedule")
    assert found.other.startswith(f"--schedule {trained}")
    assert found.other.endswith("--beta-start 0.00085 --beta-end 0.012") == (trained == "scaled_linear")


def test_prediction_and_schedule_may_both_be_others() -> None:
    found = judged(model(Timed("v", SCHEDULES["cosine"]), "epsilon"), smooth_images(8))
    assert (found.verdict, found.other) == ("doubted", "--prediction v --schedule cosine")


def test_another_way_to_tell_timesteps_is_found() -> None:
    trained = dataclasses.replace(Schedule("linear", 4000, 2.5e-5, 0.005), timestep_scale=0.25)
    network = Timed("epsilon", trained)
    right = judged(model(network, "epsilon", trained), smooth_images(8))
    wrong = judged(model(network, "epsilon", dataclasses.replace(trained, timestep_scale=1.0)), smooth_images(8))
    assert right.verdict == "as declared"
    assert (wrong.verdict, wrong.other) == ("doubted", "--timestep-scale 0.25")


def test_learned_variances_are_left_aside() -> None:
    learned, plain = (Timed("v", SCHEDULES["cosine"], learned) for learned in (True, False))
    pair = [model(network, "v", SCHEDULES["cosine"]) for network in (learned, plain)]
    pair[0] = dataclasses.replace(pair[0], variance="learned_range")
    assert judged(pair[0], smooth_images(8)) == judged(pair[1], smooth_images(8))


def test_a_call_of_the_network_serves_all_predictions() -> None:
    network = Timed("epsilon", SCHEDULES["linear"])
    found = denoised_errors(model(network), smooth_images(4), SIGMAS)
    assert set(found) == set(PREDICTIONS)
    assert network.calls == len(SIGMAS)


def test_large_images_take_few_calls_of_one_image_and_all_three_sigmas() -> None:
    class Large(nn.Module):
        seen: list[tuple[int, float]] = []

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.seen.append((len(x), float(t[0])))
            return x - F.avg_pool2d(x, 5, 1, 2)

    image = (3, 160, 160)
    assert math.prod(image) > LARGE_IMAGE
    found = judged(model(Large(), image=image), made_up(image, 4), True)
    assert (found.images, len(found.error), len(found.other_error)) == (1, 3, 1)
    assert len(Large.seen) == 3 + 2
    assert {images for images, _ in Large.seen} == {1}


def test_denoiser_is_compared_with_shrinkage_alone() -> None:
    continuous = Schedule("continuous", 1)
    found = judged(model(BestDenoiser(), "denoiser", continuous), smooth_images(8))
    assert (found.verdict, found.other, found.other_error) == ("as declared", "", {})

    class Noise(BestDenoiser):  # it gives the noise and not the image
        def forward(self, y: Tensor, s: Tensor) -> Tensor:
            return (y - super().forward(y, s)) / s[:, None, None, None]

    wrong = judged(model(Noise(), "denoiser", continuous), smooth_images(8))
    assert wrong.verdict == "not judged"


def test_trained_denoiser_of_karras_is_as_declared() -> None:
    """c_skip y + c_out F(c_in y, ln(s) / 4), Karras et al. 2022, table 1, trained here for a second or two."""

    class Edm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(2, 24, 3, padding=1), nn.SiLU(), nn.Conv2d(24, 24, 3, padding=1), nn.SiLU(),
                nn.Conv2d(24, 1, 3, padding=1),
            )  # fmt: skip

        def forward(self, y: Tensor, sigma: Tensor) -> Tensor:
            s = sigma[:, None, None, None]
            total = s**2 + 0.4**2
            told = (s.log() / 4).expand(-1, 1, SIDE, SIDE)
            output: Tensor = 0.16 / total * y + s * 0.4 / total.sqrt() * self.net(
                torch.cat([y / total.sqrt(), told], 1)
            )
            return output

    torch.manual_seed(0)
    network = Edm()
    images = torch.from_numpy(first_state(smooth_images(512, 1).astype(np.int32), 1.0))
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(150):
        x = images[torch.randint(0, len(images), (64,))]
        s = torch.exp(torch.empty(64).uniform_(math.log(0.3), math.log(2.5)))
        y = x + s[:, None, None, None] * torch.randn_like(x)
        loss = ((network(y, s) - x) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = judged(model(network, "denoiser", Schedule("continuous", 1)), smooth_images(8))
    assert found.verdict == "as declared", found


# The default model


@pytest.fixture(scope="module")
def shipped() -> Pixels:
    images = list(open_images(None, SHIPPED_SHAPE, CLASS_NAMES))
    return np.stack([image.pixels for image in images[::5]])


def test_errors_of_the_default_model_are_far_apart(shipped: Pixels) -> None:
    """100 images at sigma 0.5: what goes in, shrinkage, as declared, v and cosine."""
    unet = zoo_unet()
    clean = first_state(shipped.astype(np.int32), 1.0)
    assert float(((noisy_states(shipped, 0.5, 1.0) - clean) ** 2).mean()) == pytest.approx(1.0, abs=0.02)
    assert shrinkage_error(float(clean.var()), 1.0) == pytest.approx(0.34, abs=0.02)
    read = denoised_errors(unet, shipped, [0.5])
    assert read["epsilon"][0.5] == pytest.approx(0.040, abs=0.004)
    assert read["v"][0.5] == pytest.approx(0.25, abs=0.02)
    cosine = dataclasses.replace(unet, schedule=SCHEDULES["cosine"])
    assert denoised_errors(cosine, shipped, [0.5])["epsilon"][0.5] == pytest.approx(0.063, abs=0.005)


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({}, None),
        ({"prediction": "v"}, "--prediction epsilon"),
        ({"prediction": "x0"}, "--prediction epsilon"),
        ({"schedule": SCHEDULES["cosine"]}, "--schedule linear"),
        ({"schedule": SCHEDULES["scaled_linear"]}, "--schedule linear"),
        ({"clip": None}, None),
    ],
    ids=str,
)
def test_default_model_is_doubted_where_it_is_declared_wrong(
    shipped: Pixels, changes: dict[str, Any], other: str | None
) -> None:
    found = judged(dataclasses.replace(zoo_unet(), **changes), shipped, False)
    assert found.verdict == ("as declared" if other is None else "doubted"), found
    if other is not None:
        assert found.other == other


# Where nothing can be said


UNLIKE_TRAINING: dict[str, Pixels] = {
    "made up": made_up(SHIPPED_SHAPE, 8),
    "grey": np.full((8, *SHIPPED_SHAPE), 128, np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (8, *SHIPPED_SHAPE)).astype(np.uint8),
}


@pytest.mark.parametrize("name", UNLIKE_TRAINING)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_images_unlike_those_of_training_are_no_evidence(name: str, prediction: Prediction) -> None:
    found = judged(dataclasses.replace(zoo_unet(), prediction=prediction), UNLIKE_TRAINING[name], name == "made up")
    assert found.verdict == "not judged", found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_random_weights_are_not_judged(shipped: Pixels, prediction: Prediction, seed: int) -> None:
    torch.manual_seed(seed)
    found = judged(model(DiffusersNetwork(new_unet()), prediction, image=SHIPPED_SHAPE), shipped)
    assert found.verdict == "not judged", found


def test_without_a_network_there_is_nothing_to_judge() -> None:
    assert judge(no_unet(IMAGE), smooth_images(2), False) is None


# How attention is split


def blocks(count: int, seed: int) -> Pixels:
    """Four squares each, dark or bright."""
    squares = np.random.default_rng(seed).choice([13, 242], (count, 1, 2, 2)).astype(np.uint8)
    return squares.repeat(4, axis=2).repeat(4, axis=3)


@torch.no_grad()
def fitted(heads: Heads) -> DiffusionModel:
    """A network of random weights whose last convolution is fitted by least squares to give clean images."""
    torch.manual_seed(0)
    network = OpenAIUNet(Architecture(1, 64, (64,), 1, (True,), "conv", True, False), heads).eval()
    for name, weights in network.named_parameters():
        if name.endswith(("proj_out.weight", "qkv.weight")):
            weights.mul_(2.5)  # so that attention matters
    schedule, pixels = openai_schedule("linear", 1000), blocks(300, 1)
    last, network.out[2] = network.out[2], nn.Identity()
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    rows = []
    for sigma in SIGMAS:
        chain = make_chain(schedule, "fixed_large", sigma, 1)
        x = torch.from_numpy(noisy_states(pixels, sigma, chain.scale))
        windows = F.unfold(network(x, torch.full((len(x),), float(chain.t[0]))), 3, padding=1)
        rows.append(F.pad(windows.transpose(1, 2).flatten(0, 1), (0, 1), value=1.0))
    design = torch.cat(rows).double()
    wanted = torch.from_numpy(first_state(pixels.astype(np.int32), 1.0)).flatten().repeat(len(SIGMAS)).double()
    fit = torch.linalg.solve(design.T @ design + 0.1 * torch.eye(design.shape[1]), design.T @ wanted)
    last.weight.copy_(fit[:-1].reshape(last.weight.shape))
    last.bias.fill_(fit[-1])
    network.out[2] = last
    return dataclasses.replace(model(network, "x0", schedule), variance="fixed_large")


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_another_order_of_attention_and_other_heads_are_found(order: str) -> None:
    heads = Heads(number=4, order="new" if order == "new" else "legacy")
    right = fitted(heads)
    network = right.network
    assert isinstance(network, OpenAIUNet)

    def split(other: Heads) -> tuple[str, str, str]:
        found = judged(dataclasses.replace(right, network=resplit(network, other)), blocks(8, 2))
        return found.verdict, found.other, found.instead_of

    assert split(heads)[0] == "as declared"
    swapped = dataclasses.replace(heads, order="legacy" if order == "new" else "new")
    assert split(swapped) == ("doubted", f"--attention-order {order}", f"{swapped.order} order")
    fewer = dataclasses.replace(heads, number=2)
    assert split(fewer) == ("doubted", "--num-heads 4", "heads (2 at every width)")


def test_splitting_otherwise_copies_no_weights() -> None:
    network = OpenAIUNet(Architecture(1, 32, (32,), 1, (True,), "conv", True, False), Heads(number=2))
    other = resplit(network, Heads(channels=8, order="new"))
    assert (other.heads, network.heads) == (Heads(channels=8, order="new"), Heads(number=2))
    pairs = zip(network.parameters(), other.parameters(), strict=True)
    assert all(one.data_ptr() == two.data_ptr() for one, two in pairs)
