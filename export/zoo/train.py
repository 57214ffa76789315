"""Train the default model on Fashion-MNIST: `python -m densepure_rt.export.zoo.train --out runs/zoo`.

Resumable and seeded: every random number of step s comes from a generator seeded with (seed, s), so a run that was
stopped and started again walks the same path as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from densepure_rt.export.zoo.models import Classifier, load_weights, new_unet
from densepure_rt.rounding import floored_share

IDX_IMAGE_HEADER, IDX_LABEL_HEADER = 16, 8  # bytes; the IDX format of MNIST
T_MAX = 420  # sigma <= 1.0 starts at timestep 396 of the linear 1000-step schedule
CHECKPOINT_EVERY = 200  # steps
EMA_DECAY = 0.999
BATCH = 64
PURIFY_SIGMA = (0.1, 1.0)  # noise levels, in [0, 1] pixel units, that the classifier sees the purified images of

CONSISTENCY, ENTROPY = 10.0, 0.5  # lambda and eta of Jeong & Shin 2020, section 3

# Steps and learning rate of each stage; the classifier that ships is BLEND of the way from the clean to the purified.
RECIPE = {"unet": (8800, 5e-4), "clean-classifier": (14_000, 2e-3), "purified-classifier": (5200, 1e-3)}
BLEND = 0.65  # keeps 93 % on clean images; weights along a fine-tuning path mix well (Wortsman et al. 2022)

app = typer.Typer(add_completion=False)


def read_idx(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images float32 [n, 1, 28, 28] in [-1, 1] and labels int64 [n] of `split` ("train" or "t10k")."""
    import gzip

    pixels = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())[IDX_IMAGE_HEADER:]
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())[IDX_LABEL_HEADER:]
    x = torch.from_numpy(np.frombuffer(pixels, np.uint8).reshape(-1, 1, 28, 28).astype(np.float32))
    return x / 127.5 - 1, torch.from_numpy(np.frombuffer(labels, np.uint8).astype(np.int64))


def generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def batch_indices(n: int, size: int, step: int, seed: int) -> Tensor:
    """The indices of batch `step` when `n` images are shuffled anew each epoch."""
    per_epoch = n // size
    order = torch.randperm(n, generator=generator(seed + 1, step // per_epoch))
    start = (step % per_epoch) * size
    return order[start : start + size]


def one_cycle(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Learning rate: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def alpha_bar(steps: int = 1000) -> Tensor:
    """The linear schedule of DDPM (Ho et al. 2020, section 4)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0).float()


def diffusion_loss(unet: nn.Module, x0: Tensor, draw: torch.Generator) -> Tensor:
    """Mean squared error of the predicted noise (Ho et al. 2020, eq. 14) at timesteps uniform on [0, T_MAX)."""
    t = torch.randint(0, T_MAX, (len(x0),), generator=draw)
    eps = torch.randn(x0.shape, generator=draw)
    ab = alpha_bar()[t][:, None, None, None]
    return F.mse_loss(unet(ab.sqrt() * x0 + (1 - ab).sqrt() * eps, t).sample.float(), eps)


def random_flip(x: Tensor, draw: torch.Generator) -> Tensor:
    """Each image mirrored left to right or not, with equal odds."""
    return torch.where(torch.rand(len(x), 1, 1, 1, generator=draw) < 0.5, x.flip(3), x)


def augment(x: Tensor, draw: torch.Generator) -> Tensor:
    """Shift by up to two pixels, flip, blend with a blurred copy, erase a square: each image with its own draws."""
    n = len(x)
    x = random_flip(x, draw)
    dy, dx = torch.randint(0, 5, (2, n), generator=draw)
    padded = F.pad(x, (2, 2, 2, 2), value=-1.0)
    rows = (torch.arange(28)[None] + dy[:, None])[:, None, :, None]
    cols = (torch.arange(28)[None] + dx[:, None])[:, None, None, :]
    x = padded[torch.arange(n)[:, None, None, None], 0, rows, cols]
    blur = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    weight = torch.rand(n, 1, 1, 1, generator=draw) * (torch.rand(n, 1, 1, 1, generator=draw) < 0.5)
    x = x + weight * (blur - x)
    cy, cx = torch.randint(0, 28, (2, n, 1, 1, 1), generator=draw)
    erased = ((torch.arange(28)[:, None] - cy).abs() < 4) & ((torch.arange(28)[None] - cx).abs() < 4)
    erased &= torch.rand(n, 1, 1, 1, generator=draw) < 0.5
    return torch.where(erased, torch.tensor(-1.0), x)


def classification_loss(classifier: nn.Module, x: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
    return F.cross_entropy(classifier(augment(x, draw)).float(), y, label_smoothing=0.1)


@torch.no_grad()
def purify(unet: nn.Module, x0: Tensor, sigma: Tensor, two_steps: int, draw: torch.Generator) -> Tensor:
    """Images [n, 1, 28, 28] noised at `sigma` [n] and denoised: the first `two_steps` of them in two steps, not one."""
    schedule = alpha_bar()
    t = (schedule[None] - 1 / (1 + 4 * sigma[:, None] ** 2)).abs().argmin(1)

    def draws_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=draw)

    def denoised(x: Tensor, t: Tensor) -> Tensor:
        ab = schedule[t][:, None, None, None]
        eps: Tensor = unet(x, t).sample.float()
        return ((x - (1 - ab).sqrt() * eps) / ab.sqrt()).clip(-1, 1)

    ab = schedule[t][:, None, None, None]
    x = ab.sqrt() * x0 + (1 - ab).sqrt() * draws_like(x0)
    once, two = denoised(x, t), two_steps
    if not two:
        return once
    next_t, ab = t[:two] // 2, ab[:two]
    ab_next = schedule[next_t][:, None, None, None]
    beta = 1 - ab / ab_next  # of the respaced step; its posterior is eq. 6-7 of Ho et al. 2020
    mean = (ab_next.sqrt() * beta * once[:two] + (1 - beta).sqrt() * (1 - ab_next) * x[:two]) / (1 - ab)
    std = (beta * (1 - ab_next) / (1 - ab)).sqrt()
    return torch.cat([denoised(mean + std * draws_like(mean), next_t), once[two:]])


def purified_loss(classifier: nn.Module, unet: nn.Module, x: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
    """A quarter of the batch clean and augmented, the rest purified twice, each time from noise of its own.

    The two predictions of an image are pulled together: consistency regularisation (Jeong & Shin 2020, eq. 7 and 8),
    which puts more images above the vote share that a certificate needs.
    """
    quarter = len(x) // 4
    low, high = PURIFY_SIGMA
    x0 = random_flip(x[quarter:], draw)
    sigma = low + (high - low) * torch.rand(len(x0), generator=draw) ** 1.5  # median 0.42
    pair = [purify(unet, x0, sigma, len(x0) // 4, draw) for _ in range(2)]
    logits = classifier(torch.cat([augment(x[:quarter], draw), *pair])).float()
    clean, first, second = logits.split([quarter, len(x0), len(x0)])
    log_p = torch.stack([first, second]).log_softmax(2)
    log_mean = log_p.logsumexp(0) - math.log(2)
    mean = log_mean.exp()
    consistency = (mean * (log_mean - log_p)).sum(2).mean()
    entropy = -(mean * log_mean).sum(1).mean()
    likelihood = F.nll_loss(log_p.flatten(0, 1), y[quarter:].repeat(2))
    purified = likelihood + CONSISTENCY * consistency + ENTROPY * entropy
    return 0.25 * F.cross_entropy(clean, y[:quarter], label_smoothing=0.1) + 0.75 * purified


def ema_update(average: dict[str, Tensor], model: nn.Module, step: int) -> None:
    decay = min(EMA_DECAY, (1 + step) / (10 + step))  # a short memory while the weights still move fast
    for name, value in model.state_dict().items():
        if value.dtype.is_floating_point:
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


def fit(kind: str, data: Path, out: Path, steps: int, peak: float, seed: int, progress: Progress) -> Path:
    """Train `kind`, a key of RECIPE, for `steps` steps, going on from its checkpoint; returns its weights.

    The purified classifier starts from the clean one and sees purified images too; it needs the other two.
    """
    torch.manual_seed(seed)
    x, y = read_idx(data, "train")
    model: nn.Module = new_unet() if kind == "unet" else Classifier()
    if kind == "purified-classifier":
        load_weights(model, out / "clean-classifier.safetensors")
        unet = load_weights(new_unet(), out / "unet.safetensors")
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.0 if kind == "unet" else 0.05)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoint, first = out / f"{kind}.checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, first = saved["average"], saved["step"]

    task = progress.add_task(kind, total=steps, completed=first, loss=float("nan"))
    model.train()
    smooth_loss = float("nan")
    for step in range(first, steps):
        torch.manual_seed(seed * 7_368_787 + step)  # dropout
        draw, chosen = generator(seed, step), batch_indices(len(x), BATCH, step, seed)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, peak)
        with torch.autocast("cpu", torch.bfloat16):
            if kind == "unet":
                loss = diffusion_loss(model, x[chosen], draw)
            elif kind == "clean-classifier":
                loss = classification_loss(model, x[chosen], y[chosen], draw)
            else:
                loss = purified_loss(model, unet, x[chosen], y[chosen], draw)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema_update(average, model, step)
        smooth_loss = loss.item() if math.isnan(smooth_loss) else 0.98 * smooth_loss + 0.02 * loss.item()
        progress.update(task, completed=step + 1, loss=smooth_loss)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_file(average, out / f"{kind}.safetensors")  # before the checkpoint, so that no resume lacks it
            torch.save(state | {"average": average, "step": step + 1}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            if not progress.console.is_terminal:
                progress.console.print(f"{kind}: step {step + 1} of {steps}, loss {smooth_loss:.4f}")
    return out / f"{kind}.safetensors"


def blend(clean: Path, purified: Path, share: float, out: Path) -> Path:
    """Write the weights that lie `share` of the way from one classifier to the other."""
    start, end = load_file(clean), load_file(purified)
    mixed = {
        name: torch.lerp(start[name], value, share) if value.is_floating_point() else value
        for name, value in end.items()
    }
    save_file(mixed, out)
    return out


def batches(x: Tensor, size: int = 500) -> Iterator[Tensor]:
    return iter(x.split(size))


@torch.inference_mode()
def accuracy(weights: Path, data: Path) -> float:
    """Clean accuracy of a classifier on the 10,000 test images."""
    model = load_weights(Classifier(), weights)
    x, y = read_idx(data, "t10k")
    return float((torch.cat([model(part).argmax(1) for part in batches(x)]) == y).float().mean())


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder of the four Fashion-MNIST IDX files.")] = Path(
        "/usr/share/datasets/fashion-mnist"
    ),
    out: Annotated[Path, typer.Option(help="Checkpoints and final weights go here.")] = Path("runs/zoo"),
    seed: int = 1,
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 0,
) -> None:
    """Train the UNet and the classifier of the default model, or go on where an earlier run stopped."""
    if threads:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    counter = TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.4f}")
    with Progress(TextColumn("{task.description}"), BarColumn(), counter, TimeRemainingColumn()) as progress:
        for kind, (steps, peak) in RECIPE.items():
            fit(kind, data, out, steps, peak, seed, progress)
        clean, purified = (out / f"{kind}-classifier.safetensors" for kind in ("clean", "purified"))
        blend(clean, purified, BLEND, out / "classifier.safetensors")
        for kind in ("clean-classifier", "purified-classifier", "classifier"):
            share = accuracy(out / f"{kind}.safetensors", data)
            progress.console.print(f"{kind}: {floored_share(share, 2)} of 10,000 test images")


if __name__ == "__main__":
    app()
