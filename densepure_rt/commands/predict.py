"""`densepure-rt predict`: the smoothed prediction of images, without a certificate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from densepure_rt import logs
from densepure_rt.commands.certify import notes_on
from densepure_rt.commands.console import in_options, rows, stderr, track
from densepure_rt.commands.options import (
    Alpha,
    BatchSize,
    ClassifierFile,
    Engine,
    EngineHash,
    Images,
    Key,
    Max,
    ProviderName,
    Rule,
    Seed,
    Sigma,
    Skip,
    Steps,
    Threads,
    Trust,
    Votes,
    make_settings,
    none_as,
    open_classifier,
    open_image_set,
    secret_of,
)
from densepure_rt.rounding import raised

if TYPE_CHECKING:
    from densepure_rt.smoothing.classifier import Predicted


def predict(
    context: typer.Context,
    images: Images = None,
    engine: Engine = None,
    classifier: ClassifierFile = None,
    sigma: Sigma = 0.5,
    steps: Steps = 2,
    votes: Votes = 5,
    n: Annotated[int, typer.Option(help="Noise samples an image at most; 13 that agree are enough.")] = 1000,
    alpha: Alpha = 0.001,
    timestep_rule: Rule = None,
    batch: BatchSize = None,
    threads: Threads = None,
    provider: ProviderName = "cpu",
    skip: Skip = 1,
    limit: Max = None,
    seed: Seed = None,
    key: Key = None,
    engine_sha256: EngineHash = None,
    trust: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")] = False,
) -> None:
    """Label images with the smoothed classifier, or abstain (-1). Without --seed every call draws new noise.

    An image is sampled until one class has more than half of all votes but for probability alpha, or n are taken.
    """
    logs.set_up(verbose=False, log_json=None, word=in_options)
    settings = make_settings(
        context, sigma=sigma, steps=steps, votes=votes, n=n, alpha=alpha, timestep_rule=timestep_rule
    )
    secret = secret_of(seed, key)
    with open_classifier(engine, classifier, batch, threads, provider, engine_sha256, trust, seed, secret) as smoothed:
        chosen = open_image_set(images, smoothed, skip, limit)
        if notes := notes_on(chosen):
            rows(stderr, notes.items())
        if not as_json:
            print("idx\tlabel\tpredict\tcorrect\tname\tvotes\terror_bound")
        for found in track(smoothed.predict_each(chosen, settings), len(chosen)):
            print_prediction(found, smoothed.class_names, as_json)


def print_prediction(found: Predicted, names: Sequence[str], as_json: bool) -> None:
    image, label = found.image, found.label
    if as_json:
        votes = {name: int(count) for name, count in zip(names, found.votes, strict=True) if count}
        line = {"idx": image.idx, "label": image.label, "predict": label, "error_bound": found.error_bound}
        print(json.dumps(line | {"n": found.n, "votes": votes}), flush=True)
        return
    columns = (
        image.idx,
        none_as(-1, image.label),
        none_as(-1, label),
        int(label is not None and label == image.label),
        "abstain" if label is None else names[label],
        f"{found.votes.max()}/{found.n}",
        "-" if found.error_bound is None else raised(found.error_bound, figures=2),
    )
    print(*columns, sep="\t", flush=True)
