from __future__ import annotations

import gzip
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.progress import Progress, TaskID
from safetensors.torch import load_file
from torch import Tensor, nn

from densepure_rt.errors import UsageError
from densepure_rt.export.zoo import train
from densepure_rt.export.zoo.models import ZOO, Classifier, load_weights, new_unet

IMAGES = 12
BATCH = 4


def write_idx(folder: Path, split: str, pixels: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
    """The IDX format: magic 0x803 or 0x801, the sizes, big-endian, then the bytes."""
    n, rows, columns = pixels.shape
    images = struct.pack(">4i", 0x803, n, rows, columns) + pixels.tobytes()
    (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    names = struct.pack(">2i", 0x801, n) + labels.tobytes()
    (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(names))


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    draw = np.random.default_rng(5)
    pixels = draw.integers(0, 256, (IMAGES, 28, 28), dtype=np.uint8)
    write_idx(folder, "train", pixels, np.arange(IMAGES, dtype=np.uint8) % 10)
    write_idx(folder, "t10k", pixels[:5], np.arange(5, dtype=np.uint8))
    return folder


def test_idx_files_are_read_to_pixels_in_minus_one_to_one(tmp_path: Path) -> None:
    pixels = np.arange(3 * 28 * 28, dtype=np.int64).reshape(3, 28, 28).astype(np.uint8)
    write_idx(tmp_path, "train", pixels, np.array([9, 0, 4], np.uint8))
    x, y = train.read_idx(tmp_path, "train")
    assert (x.shape, x.dtype) == ((3, 1, 28, 28), torch.float32)
    np.testing.assert_allclose(x[:, 0].numpy(), pixels / 255 * 2 - 1, rtol=0, atol=1e-6)
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    assert (y.tolist(), y.dtype) == ([9, 0, 4], torch.int64)


@pytest.mark.parametrize(("n", "size"), [(12, 4), (13, 4), (7, 7)])
def test_an_epoch_shows_every_image_at_most_once_and_is_shuffled_anew(n: int, size: int) -> None:
    per_epoch = n // size
    epochs = []
    for epoch in range(3):
        shown = [train.batch_indices(n, size, epoch * per_epoch + i, seed=1).tolist() for i in range(per_epoch)]
        assert all(len(batch) == size for batch in shown)
        flat = sum(shown, [])
        assert len(set(flat)) == len(flat) == per_epoch * size
        assert set(flat) <= set(range(n))
        epochs.append(flat)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_follow_from_seed_and_step_alone() -> None:
    first = train.batch_indices(100, 10, 23, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, train.batch_indices(100, 10, 23, seed=1))
    assert not torch.equal(first, train.batch_indices(100, 10, 23, seed=2))


def test_learning_rate_warms_up_and_falls_to_zero_along_a_cosine() -> None:
    rates = [train.one_cycle(step, 1000, 0.5, warmup=200) for step in range(1000)]
    assert rates[0] == pytest.approx(0.5 / 200)
    assert rates[199] == rates[200] == max(rates) == 0.5
    assert rates[600] == pytest.approx(0.25)
    assert rates[400] == pytest.approx(0.5 * math.cos(math.pi / 8) ** 2)
    assert 0 < rates[999] < 1e-5
    assert all(a < b for a, b in zip(rates[:199], rates[1:200], strict=True))
    assert all(a > b for a, b in zip(rates[200:], rates[201:], strict=False))


def test_alpha_bar_is_that_of_the_linear_schedule() -> None:
    expected = np.multiply.accumulate([1 - (1e-4 + i / 999 * (0.02 - 1e-4)) for i in range(1000)])
    np.testing.assert_allclose(train.alpha_bar().numpy(), expected, rtol=1e-6)


class Oracle(nn.Module):
    """A UNet that knows the clean image, and so the noise; it notes the timesteps that it was asked about."""

    def __init__(self, clean: Tensor, error: float) -> None:
        super().__init__()
        self.clean, self.error = clean, error
        self.asked: list[int] = []

    def forward(self, x: Tensor, t: Tensor) -> Any:
        self.asked += t.tolist()
        bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t.numpy()]
        bar = torch.from_numpy(bars)[:, None, None, None]
        self.sample = (x - bar.sqrt() * self.clean) / (1 - bar).sqrt() + self.error
        return self


@pytest.mark.parametrize("error", [0.0, 0.3])
def test_diffusion_loss_is_the_squared_error_of_the_noise(error: float) -> None:
    clean = torch.linspace(-1, 1, 400 * 64).reshape(400, 1, 8, 8)
    oracle = Oracle(clean, error)
    loss = train.diffusion_loss(oracle, clean, train.generator(1, 2))
    assert float(loss) == pytest.approx(error**2, abs=1e-5, rel=1e-3)
    assert 0 <= min(oracle.asked) < 20
    assert train.T_MAX - 20 <= max(oracle.asked) < train.T_MAX


def test_augmentation_keeps_shape_and_range_and_follows_from_its_generator() -> None:
    x = torch.rand(32, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = x.clone()
    found = train.augment(x, train.generator(1, 5))
    assert torch.equal(x, before)
    assert found.shape == x.shape
    assert float(found.min()) >= -1
    assert float(found.max()) <= 1
    assert torch.equal(found, train.augment(x, train.generator(1, 5)))
    assert not torch.equal(found, train.augment(x, train.generator(1, 6)))


def test_augmentation_moves_a_dot_by_at_most_two_pixels_or_flips_it() -> None:
    x = torch.full((200, 1, 28, 28), -1.0)
    x[:, 0, 10, 6] = 1.0
    places = set()
    for image in train.augment(x, train.generator(1, 7))[:, 0]:
        if float(image.max()) > -0.5:  # else it was erased
            places.add(divmod(int(image.argmax()), 28))
    rows, columns = {row for row, _ in places}, {column for _, column in places}
    assert rows == set(range(8, 13))
    assert columns == set(range(4, 9)) | {27 - column for column in range(4, 9)}


def test_average_of_weights_is_exponential_and_starts_with_a_short_memory() -> None:
    model = nn.BatchNorm1d(1)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    expected = 1.0
    for step in range(30):
        with torch.no_grad():
            model.weight.fill_(float(step))
        model.num_batches_tracked = torch.tensor(step + 1)
        train.ema_update(average, model, step)
        decay = min(0.999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert float(average["weight"]) == pytest.approx(expected, rel=1e-5)
        assert int(average["num_batches_tracked"]) == step + 1


class Stopped(Progress):
    """Ctrl-C once `after` steps are done."""

    def __init__(self, after: int | None) -> None:
        super().__init__(disable=True)
        self.after = after

    def update(self, task_id: TaskID, *args: Any, **kwargs: Any) -> None:
        super().update(task_id, *args, **kwargs)
        if kwargs.get("completed") == self.after:
            raise KeyboardInterrupt


def state_of(out: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return torch.load(out / f"{kind}.checkpoint.pt", weights_only=True), load_file(out / f"{kind}.safetensors")


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flatten(item, f"{path}/{key}")
    else:
        yield path, value


def assert_same(found: Any, expected: Any) -> None:
    ours, theirs = dict(flatten(found)), dict(flatten(expected))
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        same = torch.equal(ours[path], value) if isinstance(value, Tensor) else ours[path] == value
        assert same, path


class ExactNoise(nn.Module):
    """A network that knows the clean images, and so the exact noise in any state of theirs."""

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0 = x0

    def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        ab = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[t][:, None, None, None]
        return SimpleNamespace(sample=(x - ab.sqrt() * self.x0[: len(x)]) / (1 - ab).sqrt())


def test_purifying_with_an_exact_network_gives_the_clean_image_back() -> None:
    x0 = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(3)) * 2 - 1
    purified = train.purify(ExactNoise(x0), x0, torch.linspace(0.1, 1, 8), 4, torch.Generator().manual_seed(4))
    torch.testing.assert_close(purified, x0, atol=1e-4, rtol=0)


def test_purifying_with_a_blind_network_leaves_the_noise_in() -> None:
    """A network that predicts no noise hands back x / sqrt(alpha-bar): the image and noise of 2 sigma, clipped."""
    x0 = torch.zeros(200, 1, 28, 28)

    class Blind(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=torch.zeros_like(x))

    sigma = torch.linspace(*train.PURIFY_SIGMA, 200)
    once = train.purify(Blind(), x0, sigma, 0, torch.Generator().manual_seed(5))
    spread = once.abs().flatten(1).median(dim=1).values / 0.6745  # the median of |N(0, 1)|; clipping leaves it alone
    small = sigma < 0.7
    torch.testing.assert_close(spread[small], 2 * sigma[small], rtol=0.15, atol=0)


class Answers(nn.Module):
    """A classifier with its logits written down: one row for clean images, then one for each of the two draws."""

    def __init__(self, *rows: list[float]) -> None:
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, x: Tensor) -> Tensor:
        clean = 4
        counts = [clean, (len(x) - clean) // 2, (len(x) - clean) // 2]
        return self.rows.repeat_interleave(torch.tensor(counts), dim=0)


def test_the_purified_loss_is_likelihood_consistency_and_entropy_by_hand() -> None:
    """16 images, 4 of them clean. Two draws that see class 0 at 0.9 and at 0.5: Jeong & Shin 2020, eq. 7 and 8."""
    p, q = np.array([0.9, 0.1]), np.array([0.5, 0.5])
    mean = (p + q) / 2
    kl = sum((mean * np.log(mean / r)).sum() for r in (p, q)) / 2
    likelihood = -(math.log(0.9) + math.log(0.5)) / 2
    purified = likelihood + train.CONSISTENCY * kl - train.ENTROPY * (mean * np.log(mean)).sum()
    smoothed = 0.95 * -math.log(0.8) + 0.05 * -math.log(0.2)  # label smoothing 0.1 over two classes
    model = Answers(*(np.log(row).tolist() for row in ([0.8, 0.2], p, q)))
    x0 = torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(3)) * 2 - 1
    loss = train.purified_loss(
        model, ExactNoise(x0[4:]), x0, torch.zeros(16, dtype=torch.int64), torch.Generator().manual_seed(4)
    )
    assert loss.item() == pytest.approx(0.25 * smoothed + 0.75 * purified, rel=1e-5)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["unet", "clean-classifier", "purified-classifier"])
def test_training_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(
    kind: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps over two epochs. The stop after step 3 loses that step: the checkpoint is of step 2."""
    monkeypatch.setattr(train, "BATCH", BATCH)
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    whole, parts, other = (tmp_path / name for name in ("whole", "parts", "other"))
    for folder in (whole, parts, other):
        folder.mkdir()
        if kind == "purified-classifier":  # starts from the clean one, and sees what the UNet purifies
            shutil.copy(ZOO / "unet.safetensors", folder / "unet.safetensors")
            shutil.copy(ZOO / "classifier.safetensors", folder / "clean-classifier.safetensors")
    weights = train.fit(kind, data, whole, 5, 1e-2, 1, Stopped(None))
    assert weights == whole / f"{kind}.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train.fit(kind, data, parts, 5, 1e-2, 1, Stopped(3))
    assert state_of(parts, kind)[0]["step"] == 2
    torch.manual_seed(12345)  # nothing may hang on what was drawn in between
    train.fit(kind, data, parts, 5, 1e-2, 1, Stopped(None))
    assert state_of(whole, kind)[0]["step"] == 5
    assert_same(state_of(parts, kind), state_of(whole, kind))
    written = sorted(path.name for path in parts.iterdir() if path.name.startswith(f"{kind}."))
    assert written == [f"{kind}.checkpoint.pt", f"{kind}.safetensors"]

    train.fit(kind, data, other, 5, 1e-2, 2, Stopped(None))
    differs = [
        not torch.equal(a, b)
        for a, b in zip(load_file(weights).values(), state_of(other, kind)[1].values(), strict=True)
    ]
    assert any(differs)
    load_weights(new_unet() if kind == "unet" else Classifier(), weights)


def test_a_blend_lies_between_its_two_ends(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(3)}, tmp_path / "a")
    save_file({"w": torch.tensor([1.0, 4.0]), "n": torch.tensor(5)}, tmp_path / "b")
    mixed = load_file(train.blend(tmp_path / "a", tmp_path / "b", 0.25, tmp_path / "c"))
    assert mixed["w"].tolist() == [0.25, 2.5]
    assert mixed["n"].item() == 5  # a count of batches, not a weight


def test_accuracy_is_the_share_of_right_labels(data: Path, tmp_path: Path) -> None:
    """A classifier that answers 2 to everything is right on one of the five images with labels 0 to 4."""
    from safetensors.torch import save_file

    model = Classifier()
    head = model.head[1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[2] = 1
    save_file(model.state_dict(), tmp_path / "two.safetensors")
    assert train.accuracy(tmp_path / "two.safetensors", data) == pytest.approx(0.2)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", bytes(64)])
def test_weights_that_are_none_are_a_usage_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "classifier.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="classifier.safetensors"):
        load_weights(Classifier(), path)


def test_weights_of_another_network_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="weights of a Classifier"):
        load_weights(Classifier(), ZOO / "unet.safetensors")
