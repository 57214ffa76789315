"""What a run leaves behind, written as it goes: a manifest, a line an image in each results file, the key.

manifest.json   what was run, on what, with which engines; written before the first sample
results.tsv     idx label predict radius correct time, the field's format (-1 and 0.0 abstain; radius rounded down)
results.jsonl   the same with full precision and the counts, no times: equal for equal runs
timing.jsonl    what each image took
secret.key      what the noise was keyed with, readable by its owner alone; absent with a public seed
"""

from __future__ import annotations

import datetime
import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from densepure_rt.certification import floored
from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.smoothing import Certified

SCHEMA_VERSION = 1
TSV_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")  # locuslab/smoothing
RESULTS = ("results.tsv", "results.jsonl", "timing.jsonl")
FILES = ("manifest.json", "secret.key", *RESULTS)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
ABSTAIN = -1  # in the TSV alone, as in locuslab/smoothing


def tsv_line(result: Certified) -> str:
    image, certificate, cost = result
    columns = (
        image.idx,
        ABSTAIN if image.label is None else image.label,
        ABSTAIN if certificate.predict is None else certificate.predict,
        "0.0" if certificate.radius is None else floored(certificate.radius),
        int(certificate.covers(image.label, 0.0)),
        str(datetime.timedelta(seconds=cost.seconds)),
    )
    return "\t".join(str(column) for column in columns) + "\n"


def record(result: Certified) -> dict[str, Any]:
    """The record of one image; abstention is null, not a label."""
    image, certificate, _ = result
    return {
        "idx": image.idx,
        "label": image.label,
        "predict": certificate.predict,
        "radius": certificate.radius,
        "correct": None if image.label is None else certificate.covers(image.label, 0.0),
        "n0": certificate.n0,
        "n": certificate.n,
        "n_a": certificate.n_a,
        "alpha": certificate.alpha,
        "p_lower": certificate.p_lower,
        "stopped": certificate.stopped,
    } | ({"outcomes": [outcome._asdict() for outcome in certificate.outcomes]} if certificate.outcomes else {})


def timing(result: Certified) -> dict[str, Any]:
    return {"idx": result.image.idx} | vars(result.cost)


class RunFolder:
    """A new folder for one run: a context manager. `add` appends an image to each file and flushes.

    Raises UsageError when the folder already holds a run, EnvironmentFault when it cannot be written.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], secret: bytes | None) -> None:
        self.path = path
        self._files: dict[str, TextIO] = {}
        with writing(path), closed_on_failure(self):
            if found := [name for name in FILES if (path / name).exists()]:
                raise UsageError(
                    f"{path} already holds a run ({', '.join(found)}): choose another folder with --out, "
                    f"or move that one away"
                )
            path.mkdir(parents=True, exist_ok=True)
            if secret is not None:
                descriptor = os.open(path / "secret.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w") as key:
                    key.write(secret.hex() + "\n")
            new = path / "manifest.json.new"
            new.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            new.replace(path / "manifest.json")
            for name in RESULTS:
                self._files[name] = (path / name).open("x", encoding="utf-8", newline="\n")
            self._append("results.tsv", "\t".join(TSV_COLUMNS) + "\n")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Safe to call twice; what a full disk did not take was reported when it was written."""
        for file in self._files.values():
            with suppress(OSError):
                file.close()

    def add(self, result: Certified) -> None:
        with writing(self.path):
            self._append("results.jsonl", json.dumps(record(result)) + "\n")
            self._append("timing.jsonl", json.dumps(timing(result)) + "\n")
            self._append("results.tsv", tsv_line(result))

    def _append(self, name: str, line: str) -> None:
        self._files[name].write(line)
        self._files[name].flush()


@contextmanager
def closed_on_failure(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except BaseException:
        folder.close()
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into one clear message."""
    try:
        yield
    except OSError as error:
        repair = "free some space, or " if error.errno in NO_SPACE else ""
        raise EnvironmentFault(
            f"cannot write {error.filename or path} ({error.strerror}): {repair}choose another folder with --out; "
            f"what was written so far is kept"
        ) from error
