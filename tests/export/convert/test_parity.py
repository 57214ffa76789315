from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from densepure_rt.errors import CheckFailed
from densepure_rt.export.convert import parity
from densepure_rt.export.convert.parity import Difference
from densepure_rt.export.convert.to_onnx import classifier_onnx, step_onnx
from densepure_rt.export.models.classifiers import ClassifierModel
from densepure_rt.export.models.reference import TorchReference
from densepure_rt.export.models.source_check import as_function
from densepure_rt.export.models.unets import DiffusionModel
from densepure_rt.runtime.schedule import Schedule

IMAGE = (1, 6, 6)


class ToyUnet(nn.Module):
    """One convolution for eps and one for v; `error` scales what the variance logits are off by."""

    def __init__(self, seed: int, error: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.eps, self.v = (nn.Conv2d(1, 1, 3, padding=1) for _ in range(2))
        self.error = error

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        v = torch.tanh(self.v(x)) + self.error
        return torch.cat([torch.tanh(self.eps(x)) + t[:, None, None, None] / 1000, v], 1)


class ToyClassifier(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1))
        return logits


def diffusion(network: nn.Module) -> DiffusionModel:
    return DiffusionModel(network, IMAGE, Schedule("linear", 1000), "learned_range", "epsilon", (-1.0, 1.0), "0" * 64)


def classifier(seed: int) -> ClassifierModel:
    return ClassifierModel(ToyClassifier(seed), IMAGE, ("a", "b", "c"), "1" * 64)


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (5, *IMAGE), dtype=np.uint8)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity") / "toy.onnx"
    path.write_bytes(step_onnx(diffusion(ToyUnet(1))))
    return path


def test_difference_is_the_largest_and_the_relative_distance() -> None:
    found = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    expected = np.array([[3.0, 4.5], [0.0, -1.2]], np.float32)
    result = parity.difference("x", 2, found, expected)
    assert (result.what, result.batch) == ("x", 2)
    assert result.max_abs == pytest.approx(1.2, rel=1e-6)
    assert result.relative_l2 == pytest.approx(math.hypot(0.5, 1.2) / math.sqrt(9 + 4.5**2 + 1.2**2), rel=1e-6)


@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_noisy_states_have_the_law_of_the_smoothed_image(sigma: float) -> None:
    """N(2 x - 1, (2 sigma)^2), scaled; x = k / 255. A clip to [0, 1] would show at sigma = 1."""
    images = np.full((40, 1, 28, 28), 255, np.uint8)
    images[20:] = 51
    scale = 1 / math.sqrt(1 + 4 * sigma**2)
    states = parity.noisy_states(images, sigma, scale)
    assert states.dtype == np.float32
    for part, mean in ((states[:20], 1.0), (states[20:], -0.6)):
        error = 2 * sigma * scale / math.sqrt(part.size)
        assert abs(part.mean(dtype=np.float64) - scale * mean) < 4 * error
        assert part.std(dtype=np.float64) == pytest.approx(2 * sigma * scale, rel=4 / math.sqrt(2 * part.size))


def test_every_step_of_every_chain_is_compared_at_batch_one_and_n(engine: Path, pixels: NDArray[np.uint8]) -> None:
    found = list(parity.step_differences(engine, TorchReference(diffusion(ToyUnet(1))), pixels))
    steps = 3 * (1 + 2 + 10)  # noise levels, times the steps of the chains
    assert len([d for d in found if d.what.startswith("mean") and d.batch == 5]) == steps
    assert len([d for d in found if d.what.startswith("mean") and d.batch == 1]) == steps
    assert len([d for d in found if d.what.startswith("std")]) == steps - 9  # a last step has no spread
    assert len({d.what for d in found if d.what.startswith("mean")}) == steps
    for start in (144, 258, 396):  # where sigma 0.25, 0.5 and 1.0 begin on the linear schedule
        assert any(f"t = {start} " in d.what for d in found)
    assert parity.check(found, "fp32").relative_l2 < 1e-6


def test_engine_of_other_weights_is_found(engine: Path, pixels: NDArray[np.uint8]) -> None:
    with pytest.raises(CheckFailed, match="not what PyTorch computes"):
        parity.check(list(parity.step_differences(engine, TorchReference(diffusion(ToyUnet(2))), pixels)), "fp32")


def test_engine_that_errs_in_its_variance_alone_is_found(engine: Path, pixels: NDArray[np.uint8]) -> None:
    found = list(parity.step_differences(engine, TorchReference(diffusion(ToyUnet(1, error=0.01))), pixels))
    assert max(d.relative_l2 for d in found if d.what.startswith("mean")) < 1e-6
    with pytest.raises(CheckFailed, match=r"std, step at t = \d+"):
        parity.check(found, "fp32")


def test_engine_that_gives_nan_is_found(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    network = ToyUnet(1)
    with torch.no_grad():
        network.eps.weight[0, 0, 1, 1] = math.nan
    path = tmp_path / "nan.onnx"
    path.write_bytes(step_onnx(diffusion(network)))
    with pytest.raises(CheckFailed, match=r"nan\.onnx gives NaN or Inf at t = 144"):
        list(parity.step_differences(path, TorchReference(diffusion(network)), pixels))


def test_classifier_is_compared_at_batch_one_and_n(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    path = tmp_path / "toy.onnx"
    path.write_bytes(classifier_onnx(classifier(1)))
    same = list(parity.classifier_differences(path, as_function(classifier(1).network), pixels))
    assert sorted(d.batch for d in same) == [1, 5]
    assert parity.check(same, "fp32").relative_l2 < 1e-6
    with pytest.raises(CheckFailed, match="logits"):
        parity.check(list(parity.classifier_differences(path, as_function(classifier(2).network), pixels)), "fp32")


def test_check_returns_the_worst_and_names_it_when_it_is_too_much() -> None:
    fine, worse = Difference("mean", 1, 1e-6, 1e-7), Difference("std", 4, 1e-6, 9e-6)
    assert parity.check([fine, worse, fine], "fp32") is worse
    with pytest.raises(CheckFailed) as caught:
        parity.check([fine, Difference("std at t = 9", 4, 0.5, 2e-5), worse], "fp32")
    assert "std at t = 9 at batch 4 differs by 2.1e-5" in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "place",
    [0, 1],
)
def test_check_refuses_a_difference_that_is_not_a_number(place: int) -> None:
    differences = [Difference("mean", 1, 1e-6, 1e-7)]
    differences.insert(place, Difference("std", 1, math.nan, math.nan))
    with pytest.raises(CheckFailed):
        parity.check(differences, "fp32")
