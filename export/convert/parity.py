"""How far a bundle is from its float32 source: numbers at real images and timesteps, and labels on equal noise.

The source is PyTorch where it is exported, or a float32 bundle where it is lowered, which needs no PyTorch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from densepure_rt import files
from densepure_rt.errors import CheckFailed
from densepure_rt.export.convert.precision import SIGMAS, STEPS
from densepure_rt.export.models.check_images import LARGE_IMAGE
from densepure_rt.export.models.pair import Pair, Trained
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.rounding import exact, floored, raised, typed
from densepure_rt.runtime.bundle import Denoising
from densepure_rt.runtime.device import CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, STEP_INPUTS, STEP_OUTPUTS, Floats
from densepure_rt.runtime.machine import installed_versions
from densepure_rt.runtime.noise import first_state, image_key, smoothing_law, smoothing_noise, vote_noise
from densepure_rt.runtime.onnx_device import open_session, run_session
from densepure_rt.runtime.reverse import walk_graph
from densepure_rt.runtime.schedule import Chain, Coefficients
from densepure_rt.smoothing.bounds import clopper_pearson_lower
from densepure_rt.smoothing.certificate import certified_accuracy
from densepure_rt.smoothing.fixed import FixedRule

# What a precision may lose, in relative L2 of eps, mean, std and logits. The worst that `densepure-rt export` found:
# fp32 4.9e-7, fp16 5.7e-4, bf16 9.1e-3 of the default model; fp32 1.5e-6 and 8.0e-6 of CIFAR-10 and ImageNet-256 UNets
# of random weights.
RELATIVE_L2 = {"fp32": 1e-5, "fp16": 3e-3, "bf16": 2e-2}
# The share of labels that a precision may change; measured on the default model by `densepure-rt export --precision`:
# int8 295 of 20,000 (100 images x 200 samples), fp8 22 of 400 (20 x 20), fp16 0 of 400. bf16 is held to what int8 is.
LABELS = {"fp16": 0.05, "bf16": 0.05, "int8": 0.05, "int8-cpu": 0.05, "fp8": 0.1}
ALPHA = 0.001  # of the bounds on that share
KEY = (0, 0)
SECRET = b"densepure-rt parity"  # public: nothing is certified with it
EPS_ALONE = Coefficients(1.0, 1e3, 1.0, 0.0, -1000.0, -1000.0)  # mean_next = (x - eps) / 1000
EPS_REACH = 0.05  # of that; a clip beyond it changes nothing
BATCH = 32
LARGE_NETWORK = 40 << 20  # bytes of weights from which a call of it for one image takes a tenth of a second

Run = Callable[[Mapping[str, Floats]], Sequence[Floats]]
Labeller = Callable[[Floats, Chain], NDArray[np.int64]]  # first states [n, C, H, W] of a chain of one step -> [n]

# What evaluates a file here. onnxruntime's CPU has no bf16 kernels. Its optimiser moves the quantization of fp8 graphs
# so that their results are garbage (1.32, the classifier off by twice its norm); without it they are exact.
EVALUATORS = {"bf16": "onnx.reference", "fp8": "ONNX Runtime on the CPU, not optimised"}


def evaluator(precision: str) -> str:
    return EVALUATORS.get(precision, "ONNX Runtime on the CPU")


def runner(
    content: bytes,
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    precision: str,
    folder: Path | None = None,
) -> Run:
    """A function that evaluates an ONNX graph in its own precision; see EVALUATORS.

    folder: where the weights lie that a large graph names.
    """
    if precision == "bf16":
        from onnx.reference import ReferenceEvaluator

        model = onnx.load_model_from_string(content)
        if folder is not None:
            onnx.load_external_data_for_model(model, str(folder))
        by_the_standard = ReferenceEvaluator(model)
        return lambda feed: list(by_the_standard.run(list(outputs), dict(feed)))
    session = open_session(content, name, inputs, outputs, folder=folder, optimised=precision != "fp8")
    return partial(run_session, session, list(outputs))


def step_runner(engine: Path, precision: str) -> Run:
    return runner(files.content(engine, "model"), engine.name, STEP_INPUTS, STEP_OUTPUTS, precision, engine.parent)


def classify_runner(engine: Path, precision: str) -> Run:
    return runner(
        files.content(engine, "model"), engine.name, CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, precision, engine.parent
    )


class Reference(Protocol):
    """The reference of an engine: a diffusion network in float32, and how it was trained.

    x: [n, C, H, W]; t: what the network is told of all of them. step: mean and std of the next state. eps: the noise
    that the network predicts, asked of those that do.
    """

    @property
    def model(self) -> Trained: ...
    def step(self, x: Floats, t: np.float32, step: Coefficients) -> tuple[Floats, Floats]: ...
    def eps(self, x: Floats, t: np.float32) -> Floats: ...


@dataclass(frozen=True)
class EngineReference:
    """A float32 step engine as a `Reference`."""

    run: Run
    model: Trained

    def step(self, x: Floats, t: np.float32, step: Coefficients) -> tuple[Floats, Floats]:
        mean, std, _ = self.run(fed(x, t, step))
        return mean, std

    def eps(self, x: Floats, t: np.float32) -> Floats:
        return eps_of(self.run, x, t)


def fed(x: Floats, t: np.float32, step: Coefficients) -> dict[str, Floats]:
    """Return what a step graph takes of states x [n, C, H, W] that have no spread."""
    zeros, coef = np.zeros_like(x), np.tile(np.array(step, np.float32), (len(x), 1))
    return {"mean": x, "std": zeros, "noise": zeros, "t": np.repeat(t, len(x)), "coef": coef}


class NotFinite(CheckFailed):
    """A file gives NaN or Inf where it was compared. inputs: what its network was given there, x and t or pixels.

    feed: what the file was given, by input.
    """

    def __init__(self, message: str, inputs: tuple[Floats, ...], feed: Mapping[str, Floats]) -> None:
        super().__init__(message)
        self.inputs, self.feed = inputs, feed


@dataclass(frozen=True)
class Difference:
    """A comparison: what, at which batch, the largest absolute difference and the relative L2 distance."""

    what: str
    batch: int
    max_abs: float
    relative_l2: float


def difference(what: str, batch: int, found: Floats, expected: Floats) -> Difference:
    gap = found.astype(np.float64) - expected
    norm = float(np.linalg.norm(gap))
    # A network that is to begin with zeros, as many are, may give nothing else.
    return Difference(what, batch, float(np.abs(gap).max()), norm and float(norm / np.linalg.norm(expected)))


@dataclass(frozen=True)
class Exported:
    """The paths of a bundle, and its worst difference from its float32 sources.

    by: what evaluated the files. types: of the operands of Conv, MatMul and Gemm, as `onnx_graph.types_of` counts them.
    labels: how many labels change on equal noise; None for fp32. against: what the files were compared with.
    denoising: what `denoising.judge` found.
    """

    unet: Path
    classifier: Path
    precision: str
    by: str
    worst_step: Difference
    worst_logits: Difference
    comparisons: int
    types: dict[str, dict[str, dict[str, int]]]
    labels: LabelParity | None
    against: str = "PyTorch"
    denoising: Denoising | None = None


def comparable(pixels: NDArray[np.uint8], kind: str, weights: int) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    """The images and the numbers of steps that numbers are compared on: fewer where a call takes long.

    weights: bytes of the network's.
    """
    if pixels[0].size > LARGE_IMAGE:
        return pixels[:1], STEPS[:1]
    if kind in EVALUATORS:
        return pixels[:2], STEPS[:2]
    return (pixels[:2] if weights > LARGE_NETWORK else pixels), STEPS


def noisy_states(pixels: NDArray[np.uint8], sigma: float, scale: float) -> Floats:
    """The first states of real images [n, C, H, W] under smoothing noise."""
    law = smoothing_law(sigma)
    levels = [image + smoothing_noise(law, KEY, i, image.shape) for i, image in enumerate(pixels)]
    return first_state(np.stack(levels), scale)


def step_differences(
    engine: Path,
    reference: Reference,
    pixels: NDArray[np.uint8],
    precision: str = "fp32",
    counts: Sequence[int] = STEPS,
    run: Run | None = None,
) -> Iterator[Difference]:
    """Walk whole chains with the engine, comparing every step with the reference, from the same state and noise.

    counts: the numbers of steps of the chains. Compared are mean and std, and eps itself, read through the step graph.
    run: what evaluates the engine, if `step_runner` does not.
    """
    run, model = run or step_runner(engine, precision), reference.model

    def draw(step: int) -> Floats:
        return np.stack([vote_noise(KEY, i, 0, step, image.shape) for i, image in enumerate(pixels)])

    for sigma in SIGMAS:
        for steps in counts:
            chain = model.chain(sigma, steps)
            walked = walk_graph(run, chain, noisy_states(pixels, sigma, chain.scale), draw)
            for step, (feed, (mean, std, finite)) in enumerate(walked):
                x, t, coef = feed["mean"] + feed["std"] * feed["noise"], chain.t[step], chain.coef[step]
                wanted = reference.step(x, t, Coefficients(*coef.tolist()))
                at = f"t = {chain.timesteps[step]}" if chain.timesteps else f"noise {coef[0] / coef[1]:.3g}"
                if not (finite > 0).all():
                    inputs = network_inputs(model, x, t, Coefficients(*coef.tolist()))
                    raise NotFinite(f"{engine.name} gives NaN or Inf at {at}", inputs, feed)
                where = f"step at {at} (sigma {sigma:g}, {steps} steps)"
                yield difference(f"mean, {where}", len(x), mean, wanted[0])
                if step + 1 < steps:
                    yield difference(f"std, {where}", len(x), std, wanted[1])
                if len(x) > 1:
                    (alone, *_) = run({name: value[:1] for name, value in feed.items()})
                    yield difference(f"mean, {where}", 1, alone, wanted[0][:1])
                if model.prediction == "epsilon" and (model.clip is None or min(map(abs, model.clip)) > EPS_REACH):
                    yield difference(f"eps, {where}", len(x), eps_of(run, x, t), reference.eps(x, t))


def network_inputs(model: Trained, x: Floats, t: np.float32, step: Coefficients) -> tuple[Floats, Floats]:
    """Return what the network is given for states x [n, C, H, W] at t: a denoiser is told sigma in place of t."""
    if model.prediction == "denoiser":
        return x / np.float32(step.signal), np.full(len(x), step.sigma / step.signal, np.float32)
    return x, np.full(len(x), t, np.float32)


def first_inputs(model: Trained, pixels: NDArray[np.uint8], sigma: float = 0.5) -> tuple[Floats, Floats]:
    """Return what a network is given first on a chain of one step from images [n, C, H, W] under noise sigma."""
    chain = model.chain(sigma, 1)
    x = noisy_states(pixels, sigma, chain.scale)
    return network_inputs(model, x, chain.t[0], Coefficients(*chain.coef[0].tolist()))


def eps_of(run: Run, x: Floats, t: np.float32) -> Floats:
    """The noise that an engine predicts in x [n, C, H, W] at t, read through its step graph."""
    mean, *_ = run(fed(x, t, EPS_ALONE))
    eps: Floats = x - np.float32(EPS_ALONE.signal) * mean
    return eps


def classifier_differences(
    engine: Path,
    reference: Callable[[Floats], Floats],
    pixels: NDArray[np.uint8],
    precision: str = "fp32",
    run: Run | None = None,
) -> Iterator[Difference]:
    """Compare an engine's logits with those of a reference. pixels: uint8 [n, C, H, W]. run: see `step_differences`."""
    run = run or classify_runner(engine, precision)
    x = first_state(pixels.astype(np.int32), 1.0)
    expected = reference(x)
    for batch in sorted({len(x), 1}, reverse=True):
        (logits,) = run({"mean": x[:batch]})
        if not np.isfinite(logits).all():
            raise NotFinite(f"{engine.name} gives NaN or Inf as logits", (x[:batch],), {"mean": x[:batch]})
        yield difference("logits", batch, logits, expected[:batch])


def logits_of(run: Run) -> Callable[[Floats], Floats]:
    """Wrap a classify engine as a function of pixels."""
    return lambda x: run({"mean": x})[0]


@dataclass(frozen=True)
class LabelParity:
    """The share of noisy images, denoised in one step, for which two engines name another class.

    by: what gave the second engine's labels. sigma: of the noise, in [0, 1] pixel units. upper: the disagreeing share
    is below it with probability 1 - ALPHA over the noise, for these images. radii: l2. accuracy: certified at each of
    them, a tenth of the samples selecting, of the two engines; None where so few samples certify nothing, or where no
    image has a label.
    """

    by: str
    sigma: float
    images: int
    samples: int
    disagreements: int
    upper: float
    radii: tuple[float, ...]
    accuracy: tuple[tuple[float | None, ...], tuple[float | None, ...]]

    @property
    def total(self) -> int:
        return self.images * self.samples


def file_labels(unet: Path, classifier: Path, precision: str) -> Labeller:
    """Return a labeller of a bundle's files. Not for bf16, which nothing here evaluates fast enough."""
    step, classify = step_runner(unet, precision), classify_runner(classifier, precision)
    return labeller(lambda *state: step(fed(*state)), logits_of(classify))


def labeller(
    step: Callable[[Floats, np.float32, Coefficients], Sequence[Floats]], classify: Callable[[Floats], Floats]
) -> Labeller:
    """Return a labeller of a step of a diffusion network, see `Reference`, and a classifier."""

    def labels(mean: Floats, chain: Chain) -> NDArray[np.int64]:
        denoised, *_ = step(mean, chain.t[0], Coefficients(*chain.coef[0].tolist()))
        found: NDArray[np.int64] = classify(denoised).argmax(axis=1)
        return found

    return labels


def noisy_labels(label: Labeller, chain: Chain, images: Sequence[NDArray[np.uint8]], samples: int) -> NDArray[np.int64]:
    """The labels of noisy copies of images [C, H, W] after a chain of one step, int64 [images, samples]."""
    law, found = smoothing_law(chain.sigma), np.empty((len(images), samples), np.int64)
    for row, image in zip(found, images, strict=True):
        key = image_key(SECRET, "calibrate", chain.sigma, image)
        for start in range(0, samples, BATCH):
            chosen = range(start, min(start + BATCH, samples))
            levels = np.stack([image + smoothing_noise(law, key, sample, image.shape) for sample in chosen])
            row[start : chosen.stop] = label(first_state(levels, chain.scale), chain)
    return found


def compare_labels(
    engines: tuple[Labeller, Labeller],
    by: str,
    models: Pair,
    images: Sequence[LabelledImage],
    samples: int,
    sigma: float = 0.5,
) -> LabelParity:
    """Both engines on the same noise. by: what gave the second one's labels. samples: of each image."""
    chain = models.unet.chain(sigma, 1)
    labels = [noisy_labels(label, chain, [image.pixels for image in images], samples) for label in engines]
    truth, classes = [image.label for image in images], len(models.classifier.class_names)
    wrong, total = int((labels[0] != labels[1]).sum()), labels[0].size
    selecting = max(1, samples // 10)
    rule = FixedRule(n0=selecting, n=max(1, samples - selecting), alpha=ALPHA, sigma=sigma)
    radii = tuple(sigma * quarter / 2 for quarter in range(4))

    def accuracy(rows: NDArray[np.int64]) -> tuple[float | None, ...]:
        if all(label is None for label in truth):
            return (None,) * len(radii)
        counts = [[np.bincount(part, minlength=classes) for part in np.split(row, [selecting])] for row in rows]
        certificates = [rule.certify(selection, estimation) for selection, estimation in counts]
        return tuple(certified_accuracy(list(zip(truth, certificates, strict=True)), radii, rule.reach()))

    return LabelParity(
        by=by,
        sigma=sigma,
        images=len(images),
        samples=samples,
        disagreements=wrong,
        upper=1 - clopper_pearson_lower(total - wrong, total, ALPHA),
        radii=radii,
        accuracy=(accuracy(labels[0]), accuracy(labels[1])),
    )


def check_labels(found: LabelParity, precision: str) -> None:
    """Raise CheckFailed when it is all but certain that more labels change than LABELS allows."""
    lower, allowed = clopper_pearson_lower(found.disagreements, found.total, ALPHA), LABELS[precision]
    if lower > allowed:
        raise CheckFailed(
            f"the {precision} engine is not the float32 one: {found.disagreements} of {found.total} labels differ on "
            f"equal noise, so at least {floored(lower, 1, percent=True)} do; "
            f"{floored(typed(allowed), 1, percent=True)} are allowed. Nothing was published"
        )


def check(
    differences: list[Difference], precision: str, against: str = "PyTorch", advice: str | None = None
) -> Difference:
    """Return the worst difference from `against`. Raises CheckFailed when it is more than this precision may lose.

    A quantized precision may lose anything finite here: it is judged by its labels. advice: what to do about it.
    """
    worst = max(differences, key=lambda d: math.inf if math.isnan(d.relative_l2) else d.relative_l2)
    limit = RELATIVE_L2.get(precision, sys.float_info.max)
    if not worst.relative_l2 <= limit:
        versions = {"onnxruntime": onnxruntime.__version__} | installed_versions("torch")
        here = " and ".join(f"{name} {version}" for name, version in versions.items())
        cure = advice or f"its export is at fault: try other versions than {here}"
        raise CheckFailed(
            f"the engine is not what {against} computes: {worst.what} at batch {worst.batch} differs by "
            f"{raised(worst.relative_l2, figures=2)} relative L2 ({raised(worst.max_abs, figures=2)} at most); "
            f"{precision} allows {exact(limit)}. The source is repeatable and finite, so {cure}. Nothing was published"
        )
    return worst
