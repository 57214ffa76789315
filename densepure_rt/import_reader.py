"""Imported results, read back from the folder that `densepure-rt import --out` made. Nothing is written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.json_files import STRICT, Count, Label, Probability, Radius, Sha256, Text, content, parsed, read_lines
from densepure_rt.run_folder import MANIFEST
from densepure_rt.run_reader import Run, read_run

ORIGIN = "imported.json"


@dataclass(frozen=True)
class ClaimRecord:
    """A line of an import's results.jsonl: see `densepure_rt.legacy_import.Claim`. correct: None without a label."""

    __pydantic_config__ = STRICT
    idx: int
    label: Label | None
    predict: Label | None
    radius: Radius | None
    printed_predict: Label | None
    printed: Text | None
    n0: Count | None
    n: Count | None
    n_a: Count | None
    alpha: Probability | None
    p_lower: Probability | None
    ties: Count | None
    correct: bool | None


@dataclass(frozen=True)
class FlagRecord:
    """See `densepure_rt.legacy_import.Flag`."""

    __pydantic_config__ = STRICT
    name: Text
    unsound: bool
    says: Text
    images: tuple[int, ...]


@dataclass(frozen=True)
class ImportSettings:
    """What the numbers were made with, as the files or the caller said; what is not known is None."""

    __pydantic_config__ = STRICT
    kind: Literal["log", "label arrays"]
    sigma: Radius | None
    n: Count | None
    alpha: Probability
    n0: Count | None = None
    printed_digits: Count | None = None
    classes: Count | None = None
    seeds: tuple[int, ...] | None = None
    tie_rule: Text | None = None
    alpha_of_merged: Probability | None = None


@dataclass(frozen=True)
class Origin:
    """imported.json: what the results were read from. reach: the largest radius that n and alpha allow, if known."""

    __pydantic_config__ = STRICT
    settings: ImportSettings
    images: Count
    abstained: Count
    reach: Radius | None
    accuracy_as_printed: Mapping[Text, Probability | None]
    accuracy: Mapping[Text, Probability | None]
    flags: tuple[FlagRecord, ...]
    sources_sha256: Mapping[Text, Sha256]


@dataclass(frozen=True)
class ImportedRun:
    """records: a claim an image on its sound reading. origin_sha256: of imported.json."""

    path: Path
    origin: Origin
    origin_sha256: str
    records: tuple[ClaimRecord, ...]


def read_results(path: Path) -> Run | ImportedRun:
    """The run or the imported results in a folder. Raises UsageError when it holds neither; else as `read_run`."""
    if os.path.exists(path / MANIFEST):
        return read_run(path)
    if os.path.exists(path / ORIGIN):
        return read_imported(path)
    raise UsageError(f"{path} holds no run and no imported results: there is no {MANIFEST} and no {ORIGIN} in it")


def read_imported(path: Path) -> ImportedRun:
    """Raises UsageError when a file is missing, CheckFailed when one is damaged or they do not belong together."""
    text = content(path / ORIGIN)
    origin = parsed(Origin, text, str(path / ORIGIN))
    records = tuple(read_lines(path / "results.jsonl", ClaimRecord))
    if not records or len(records) != origin.images:
        raise CheckFailed(f"{path}: results.jsonl holds {len(records)} images where {ORIGIN} counts {origin.images}")
    return ImportedRun(path, origin, hashlib.sha256(text).hexdigest(), records)
