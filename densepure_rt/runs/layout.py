"""The files of a run folder and the lines in them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from densepure_rt import files
from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.json_files import line, parsed
from densepure_rt.rounding import floored
from densepure_rt.runs.records import ImageRecord, Manifest, TimingRecord
from densepure_rt.smoothing.certificate import Certificate
from densepure_rt.text import printable, tsv_cell

MANIFEST, SUMMARY, SEAL, KEY, REVEALED = "manifest.json", "summary.json", "seal.json", "secret.key", "secret.revealed"
TSV_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")  # locuslab/smoothing
RESULTS = ("results.tsv", "results.jsonl", "timing.jsonl")
ATTACKS = "falsify.jsonl"
SEALED = (MANIFEST, *RESULTS, SUMMARY)  # and the ledger's content; and ATTACKS, where there is one
ABSTAIN = -1  # in the TSV alone, as in locuslab/smoothing


class Lines(NamedTuple):
    """The lines that one image adds to each of RESULTS."""

    tsv: str
    record: str
    timing: str


def record_of(
    idx: int, image_sha256: str, label: int | None, certificate: Certificate, name: str | None = None
) -> ImageRecord:
    """The record of one image; abstention is null, not a label. name: as others wrote it."""
    return ImageRecord(
        idx=idx,
        image_sha256=image_sha256,
        label=label,
        correct=None if label is None else certificate.covers(label, 0.0),
        name=None if name is None else printable(name),
        **vars(certificate),
    )


def tsv_line(record: ImageRecord, seconds: float, named: bool = False) -> str:
    """named: whether the table has a column for names."""
    columns = tsv_columns(record.idx, record.label, record.predict, record.radius, record.correct)
    name = f"\t{tsv_cell(record.name or '')}" if named else ""
    return f"{columns}\t{datetime.timedelta(seconds=seconds)}{name}\n"


def tsv_columns(idx: int, label: int | None, predict: int | None, radius: float | None, correct: bool | None) -> str:
    """Write the columns of the field's format that say what came of an image."""
    labels = (ABSTAIN if each is None else each for each in (label, predict))
    return "\t".join(map(str, (idx, *labels, "0.0" if radius is None else floored(radius), int(correct or False))))


def record_line(record: ImageRecord) -> str:
    """Write a record; a name alone is left out where there is none, as it was before images had one."""
    fields = asdict(record)
    if record.name is None:
        del fields["name"]
    return json.dumps(fields, ensure_ascii=False) + "\n"


def lines_of(record: ImageRecord, timing: TimingRecord, named: bool) -> Lines:
    """named: whether the run names its images."""
    return Lines(tsv_line(record, timing.seconds, named), record_line(record), line(timing))


def results_of(done: Iterable[tuple[ImageRecord, TimingRecord]], named: bool) -> Lines:
    """The whole content of each of RESULTS."""
    head = Lines("\t".join((*TSV_COLUMNS, *(["name"] if named else []))) + "\n", "", "")
    return Lines(*map("".join, zip(head, *(lines_of(record, timing, named) for record, timing in done), strict=True)))


def broken_picture(idx: int) -> str:
    """The file that keeps what has broken an image's certificate."""
    return f"broken-{idx}.png"


def shard_of(manifest: Manifest) -> str:
    return "the whole run" if manifest.provenance.shard is None else f"shard {manifest.provenance.shard}"


def read_manifest(path: Path) -> Manifest:
    """The manifest of a run folder. Raises UsageError when there is none, CheckFailed when it is damaged."""
    try:
        return parsed(Manifest, files.content(path / MANIFEST, "run file"), str(path / MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} holds no run: there is no {MANIFEST} in it") from None
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path / MANIFEST} ({error.strerror})") from error
