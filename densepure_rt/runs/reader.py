"""A finished or unfinished run, read back from its folder: for reports, comparisons and audits. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from densepure_rt.errors import CheckFailed
from densepure_rt.json_files import content, parsed, read_lines
from densepure_rt.runs.falsifier import Falsification
from densepure_rt.runs.layout import ATTACKS, SUMMARY, read_manifest
from densepure_rt.runs.records import ImageRecord, Manifest, Summary, TimingRecord


@dataclass(frozen=True)
class Run:
    """records, timings: of the images that are done, in their order. summary: None until a run has ended once."""

    path: Path
    manifest: Manifest
    records: tuple[ImageRecord, ...]
    timings: tuple[TimingRecord, ...]
    summary: Summary | None

    @property
    def complete(self) -> bool:
        return len(self.records) == self.manifest.asked

    @property
    def names(self) -> dict[int, str]:
        """The name of each image that is done and has one, by its idx."""
        return {record.idx: record.name for record in self.records if record.name is not None}


def read_run(path: Path) -> Run:
    """The run in a folder. Raises UsageError when there is none, CheckFailed when a file of it is damaged.

    A last line without its end was being written when the run was killed: it is left out.
    """
    manifest = read_manifest(path)
    records, timings = read_lines(path / "results.jsonl", ImageRecord), read_lines(path / "timing.jsonl", TimingRecord)
    done = min(len(records), len(timings))
    for record, timing in zip(records, timings, strict=False):
        if record.idx != timing.idx:
            raise CheckFailed(f"{path}: results.jsonl names image {record.idx} where timing.jsonl names {timing.idx}")
    summary = parsed(Summary, content(path / SUMMARY), str(path / SUMMARY)) if (path / SUMMARY).exists() else None
    return Run(path, manifest, tuple(records[:done]), tuple(timings[:done]), summary)


def read_attacks(path: Path) -> tuple[Falsification, ...] | None:
    """The attacks on a run's certificates; None where none were asked for."""
    return tuple(read_lines(path / ATTACKS, Falsification)) if (path / ATTACKS).exists() else None
