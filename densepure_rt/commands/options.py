"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from densepure_rt.commands.console import stderr
from densepure_rt.errors import UsageError
from densepure_rt.export.models.model_options import ModelOptions

if TYPE_CHECKING:
    from densepure_rt.images.datasets import ImageSet
    from densepure_rt.smoothing.classifier import SmoothedClassifier
    from densepure_rt.smoothing.settings import Settings

Engine = Annotated[
    Path | None, typer.Option(help="Step engine, such as engines/unet.onnx; default: the one that ships.")
]
ClassifierFile = Annotated[
    Path | None, typer.Option("--classifier", help="Classifier engine; default: the one that the sidecar names.")
]
ProviderName = Annotated[
    str, typer.Option("--provider", help="What ONNX Runtime runs .onnx engines on: cpu, cuda or tensorrt.")
]
Sigma = Annotated[float, typer.Option(help="Standard deviation of the smoothing noise, in [0, 1] pixel units.")]
Steps = Annotated[
    int, typer.Option(help="Reverse steps (b). 1: one-shot denoising; 0: the classifier alone, plain smoothing.")
]
Votes = Annotated[int, typer.Option(help="Votes a noise sample (K).")]
Rule = Annotated[
    str | None,
    typer.Option(
        "--timestep-rule",
        help="Which timestep belongs to sigma: nearest, or as published: densepure, carlini; default: the engine's.",
    ),
]
Alpha = Annotated[float, typer.Option(help="Probability, at most, that an image gets a wrong answer.")]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch",
        help="Items in one call of the engine. Part of the run's identity where a result's bits depend on it. "
        "Default: 32, or what a plan was built for.",
    ),
]
Trust = Annotated[bool, typer.Option("--trust", help="Take a plan without a sidecar for what its name says.")]
Threads = Annotated[int | None, typer.Option(help="Callers of the engine; default: one for each core.")]
Seed = Annotated[
    int | None, typer.Option(help="A public seed, for reproduction; default: a new secret from the system.")
]
EngineHash = Annotated[
    str | None, typer.Option("--engine-sha256", help="Refuse the engine unless its SHA-256 is this one.")
]
RunImages = Annotated[
    Path | None, typer.Option(help="What was certified; default: the shipped images, where it was those.")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
SHIPPED_MAX = 25  # of the 500 shipped images, so that a plain `certify` ends within 10 minutes on 2 cores
Images = Annotated[
    Path | None,
    typer.Option(
        help="One split: folder of class folders, folder with labels.csv (file,label), images, .npz (x, y), IDX or "
        "CIFAR-10 .bin; default: the shipped Fashion-MNIST test images."
    ),
]
Skip = Annotated[int, typer.Option(help="Take every SKIP-th image.")]
Max = Annotated[
    int | None, typer.Option("--max", help=f"How many images; default: all, {SHIPPED_MAX} of the shipped ones.")
]
Key = Annotated[
    Path | None,
    typer.Option(
        help="Regular file, no pipe, with the secret that keys all noise, made where there is none; not with --seed. "
        "To reveal one run makes public what all runs of its key file are keyed with."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]  # of every command
EngineFile = Annotated[
    Path | None, typer.Option("--engine", help="Step engine, ONNX file or plan; default: the one that ships.")
]


def folder_of(text: str) -> Path:
    """A folder's path. The empty name, such as that of a shell variable that is not set, would be the folder here."""
    if not text:
        raise UsageError("it is empty, and names no folder")
    return Path(text)


def radii_of(radii: str | None, radii_sigma: str | None, sigma: float) -> tuple[float, ...] | None:
    """The grid of --radii or of --radii-sigma, in pixel units; None for neither."""
    if radii is not None and radii_sigma is not None:
        raise UsageError("--radii and --radii-sigma are two ways to say the same: give one")
    text = radii if radii is not None else radii_sigma
    if text is None:
        return None
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"radii are numbers with commas between, such as 0,0.25,0.5; got {text!r}") from None
    return numbers if radii is not None else tuple(sigma * number for number in numbers)


def seconds_of(text: str | None, option: str) -> float:
    """The seconds of 30s, 5min, 1.5h or 90; endless for None."""
    if text is None:
        return math.inf
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = {"": 1, "s": 1, "min": 60, "h": 3600}.get(text.strip()[len(number) :].strip())
    try:
        seconds = float(number) * (unit or 0)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise UsageError(f"{option} {text}: a time is a number above 0 with s, min or h behind it, such as 30s")
    return seconds


def make_settings(context: typer.Context, preset: str | None = None, **values: Any) -> Settings:
    """The settings that the options ask for. A preset gives way to options that were typed."""
    from densepure_rt.smoothing.settings import PAPER, Settings

    if preset not in (None, "paper"):
        raise UsageError(f"--preset {preset} is not known: paper is the only one")
    if preset == "paper":
        said = {name: value for name, value in values.items() if was_typed(context, name)}
        values = said | ({} if values.get("radii") is None else {"radii": values["radii"]})  # of two options
        settings = dataclasses.replace(PAPER, **values)
    else:
        settings = Settings(**values)
    if settings.effective.votes < settings.votes:
        stderr.print(f"with --steps {settings.steps} nothing is random after the smoothing noise: votes set to 1")
    return settings


def secret_of(seed: int | None, key: Path | None, out: Path | None = None) -> bytes | None:
    """What the noise is keyed with, where there is no public seed; None for a new secret."""
    from densepure_rt.runs.secret import agreed_secret

    if seed is not None and key is not None:
        raise UsageError("--seed and --key are two ways to say what keys the noise: give one")
    return agreed_secret(out, key) if seed is None else None


def was_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def open_classifier(
    engine: Path | None,
    classifier: Path | None,
    batch: int | None,
    threads: int | None,
    provider: str,
    sha256: str | None,
    trust: bool,
    seed: int | None,
    secret: bytes | None = None,
) -> SmoothedClassifier:
    """secret: where there is no public seed; None for a new one."""
    from densepure_rt.keys import seeded_secret
    from densepure_rt.smoothing.classifier import load

    say_precision(engine, provider)
    return load(
        engine,
        classifier,
        secret=secret if seed is None else seeded_secret(seed),
        batch=batch,
        threads=threads,
        provider=provider,
        engine_sha256=sha256,
        trust=trust,
    )


def say_precision(engine: Path | None, provider: str) -> None:
    """Say that the model that ships is no float32 one on a GPU."""
    from densepure_rt.runtime.bundle import ON_GPU, shipped_engine
    from densepure_rt.runtime.open_device import provider_of

    if engine is None and provider_of(provider) != "cpu":
        stderr.print(
            f"with --provider {provider} the model that ships runs in {ON_GPU}: --engine {shipped_engine()} is float32"
        )


def open_image_set(path: Path | None, smoothed: SmoothedClassifier, skip: int, limit: int | None) -> ImageSet:
    from densepure_rt.images.datasets import open_images

    limit = SHIPPED_MAX if path is None and limit is None else limit
    return open_images(path, smoothed.bundle.unet.image, smoothed.class_names).select(skip, limit)


def none_as(default: int, value: int | None) -> int:
    return default if value is None else value


def words(value: str, option: str, known: Sequence[str]) -> list[str]:
    """A comma list, each word known."""
    found = [word.strip() for word in value.split(",")]
    for word in found:
        if word not in known:
            raise UsageError(f"{option} {word} is not known: {', '.join(known)}")
    return found


def number(word: str, option: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise UsageError(f"{option} takes whole numbers with commas between, found {word!r}") from None


def with_models(command: Callable[..., None]) -> Callable[..., None]:
    """`command(models=ModelOptions, ...)` as a Typer command that has each field as an option of its own."""
    hints = get_type_hints(ModelOptions, include_extras=True)
    names = [option.name for option in fields(ModelOptions)]

    @wraps(command)
    def run(**options: Any) -> None:
        models = ModelOptions(**{name: options.pop(name) for name in names})
        command(models=models, **options)

    own = inspect.signature(command, eval_str=True).parameters
    shared = [
        inspect.Parameter(
            option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=hints[option.name]
        )
        for option in fields(ModelOptions)
    ]
    kept = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, parameter in own.items() if name != "models"
    ]
    # Typer reads both of these. A function may have a signature, which typeshed does not say.
    run.__signature__ = inspect.Signature([*shared, *kept])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*shared, *kept]}
    return run
