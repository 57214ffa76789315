"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from densepure_rt.errors import UsageError

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
