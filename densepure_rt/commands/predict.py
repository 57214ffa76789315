"""`densepure-rt predict`: the smoothed prediction of images, without a certificate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from densepure_rt.commands.certify import notes_on
from densepure_rt.commands.console import rows, stderr, track
from densepure_rt.commands.groups import with_options
from densepure_rt.commands.image_options import ImageOptions
from densepure_rt.commands.options import EngineOptions, MessageOptions, PredictionOptions, SecretOptions
from densepure_rt.commands.values import none_as
from densepure_rt.errors import CheckFailed
from densepure_rt.rounding import raised
from densepure_rt.text import plural, tsv_cell

if TYPE_CHECKING:
    from densepure_rt.smoothing.classifier import Predicted


@with_options
def predict(
    source: ImageOptions,
    asked: PredictionOptions,
    engines: EngineOptions,
    noise: SecretOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line on stdout.")] = False,
) -> None:
    """Label images with the smoothed classifier, or abstain (-1). Without --seed every call draws new noise.

    An image is sampled until one class has more than half of all votes, except with probability alpha, or until n
    samples are taken.
    Without a label, label and correct are -. Exit code 1 when an image could not be read.
    """
    MessageOptions().set_up()
    settings = asked.settings()
    with engines.open(noise.secret()) as smoothed:
        chosen = source.open(smoothed)
        if notes := notes_on(chosen):
            rows(stderr, notes.items())
        if not as_json:
            print("idx\tlabel\tpredict\tcorrect\tname\tvotes\terror_bound\tfile")
        for found in track(smoothed.predict_each(chosen.readable(), settings), len(chosen)):
            print_prediction(found, smoothed.class_names, as_json)
    if chosen.unreadable:
        stderr.print(f"error: {plural(len(chosen.unreadable), 'image')} of {len(chosen)} could not be read")
        raise typer.Exit(CheckFailed.exit_code)


def print_prediction(found: Predicted, names: Sequence[str], as_json: bool) -> None:
    image, label = found.image, found.label
    if as_json:
        votes = {name: int(count) for name, count in zip(names, found.votes, strict=True) if count}
        line = {"idx": image.idx, "label": image.label, "predict": label, "error_bound": found.error_bound}
        print(json.dumps(line | {"n": found.n, "votes": votes, "file": image.name}), flush=True)
        return
    columns = (
        image.idx,
        "-" if image.label is None else image.label,
        none_as(-1, label),
        "-" if image.label is None else int(label == image.label),
        "abstain" if label is None else names[label],
        f"{found.votes.max()}/{found.n}",
        "-" if found.error_bound is None else raised(found.error_bound, figures=2),
        "-" if image.name is None else tsv_cell(image.name),
    )
    print(*columns, sep="\t", flush=True)
