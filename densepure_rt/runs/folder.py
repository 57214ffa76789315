"""What a run leaves behind, and how it goes on after it was cut short.

manifest.json   what was run, on what, with which engines; written before the first sample
ledger.sqlite   the truth while the run goes on: every label, and every certificate
results.tsv     idx label predict radius correct time, the field's format (-1 and 0.0 abstain; radius rounded down;
                without a label, label is -1 and correct 0), then the name, of runs that name their images
results.jsonl   the same with full precision and the counts, no times: equal for equal runs
timing.jsonl    what each image took
summary.json    the run in numbers; written when it ends
falsify.jsonl   attacks on the certificates, where `--falsify` asked for them
seal.json       SHA-256 of all these, written when the run is complete: what `densepure-rt audit` holds them against
secret.key      what the noise was keyed with, readable by its owner alone; absent with a public seed

The results are appended to as images are done. They are written anew from the ledger, in the order of the images, when
a run goes on and when it ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TextIO

from PIL import Image

from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.json_files import line, page, parsed, replaced, writing
from densepure_rt.keys import store_key, stored_key
from densepure_rt.runs.falsifier import Falsification
from densepure_rt.runs.identity import differences, refuse_unrecorded_arithmetic
from densepure_rt.runs.layout import (
    ATTACKS,
    KEY,
    MANIFEST,
    RESULTS,
    REVEALED,
    SEAL,
    SUMMARY,
    lines_of,
    read_manifest,
    record_of,
    results_of,
    shard_of,
)
from densepure_rt.runs.ledger import NAME as LEDGER
from densepure_rt.runs.ledger import Ledger
from densepure_rt.runs.records import ImageRecord, Manifest, Summary, TimingRecord
from densepure_rt.runs.seal import refuse_broken_seal, seal
from densepure_rt.runtime.noise import image_sha256
from densepure_rt.smoothing.classifier import Certified


class RunFolder(AbstractContextManager["RunFolder"]):
    """The folder of a run, new or continued: a context manager. `add` is durable when it returns.

    done: (record, timing) of the images that were finished before, in their order.

    Raises UsageError when the folder holds a run of another identity, or files of no run that can go on;
    EnvironmentFault when it cannot be written or another process works on it.
    """

    def __init__(self, path: Path, manifest: Manifest, secret: bytes | None) -> None:
        self.path, self.manifest = path, manifest
        self._files: dict[str, TextIO] = {}
        self._ledger: Ledger | None = None
        self.done: list[tuple[ImageRecord, TimingRecord]] = []
        with writing(path), closed_on_failure(self):
            if not (path / LEDGER).exists() and (found := [name for name in RESULTS if (path / name).exists()]):
                raise UsageError(
                    f"{path} holds {', '.join(found)} of a run that cannot go on: choose another folder with `out`, or "
                    f"move that one away"
                )
            path.mkdir(parents=True, exist_ok=True)
            most = manifest.identity.rule.most_samples
            self.ledger = self._ledger = Ledger(
                path / LEDGER, most_labels=most
            )  # from here on the folder is this process's
            if (path / MANIFEST).exists() and not self.ledger.empty:
                self._go_on(secret)
            elif self.ledger.empty:
                self._found(secret)
            else:
                raise UsageError(f"{path} holds samples of a run without its {MANIFEST}, which cannot go on")
            self.read_done()
            (path / SEAL).unlink(missing_ok=True)
            self._write_results()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Safe to call twice; what a full disk did not take was reported when it was written."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        if self._ledger is not None:
            self._ledger.close()

    @property
    def named(self) -> bool:
        """Return whether the run names its images: a continued run keeps the columns that it began with."""
        return bool(self.manifest.provenance.images_named)

    def add(self, result: Certified, place: int | None = None) -> None:
        """Keep an image. place: among the run's images; None for the next one."""
        image, certificate, cost = result
        name = image.name if self.named else None
        record = record_of(image.idx, image_sha256(image.pixels).hex(), image.label, certificate, name)
        timing = TimingRecord(image.idx, **vars(cost))
        lines = lines_of(record, timing, self.named)
        with writing(self.path):
            place = len(self.done) if place is None else place
            self.ledger.finish(place, record.idx, timing.samples, lines.record, lines.timing)
            self.done.append((record, timing))
            for name, text in zip(RESULTS, lines, strict=True):
                self._files[name].write(text)
                self._files[name].flush()

    def keep_picture(self, name: str, picture: Image.Image) -> None:
        with writing(self.path):
            (self.path / name).unlink(missing_ok=True)  # a link, in a foreign folder, may lead anywhere
            picture.save(self.path / name)

    def keep_attacks(self, attacks: Iterable[Falsification]) -> None:
        """In place of those of an earlier end of the run."""
        with writing(self.path):
            replaced(self.path / ATTACKS, "".join(map(line, attacks)))

    def finish(self, summary: Summary) -> None:
        """Write the results anew, the summary and, of a complete run, the seal.

        Raises CheckFailed when the ledger is not there any more, or does not hold all that was done.
        """
        with writing(self.path):
            kept = self.done
            self.ledger.settle()
            self.read_done()
            if self.done != kept:
                raise CheckFailed(
                    f"{self.path / LEDGER} does not hold what was written to it ({len(self.done)} images, not "
                    f"{len(kept)}): something else has written to it; certify again, into another folder with `out`"
                )
            self._write_results()
            replaced(self.path / SUMMARY, page(summary))
            if summary.done == summary.asked:
                seal(self.path, self.ledger)

    def _go_on(self, secret: bytes | None) -> None:
        """Take over the manifest that is there, unless it is that of another run, or of one that must not go on."""
        there = read_manifest(self.path)
        refuse_unrecorded_arithmetic(there.identity, self.path)
        if differs := differences(there, self.manifest, "there", "now"):
            raise UsageError(
                f"{self.path} already holds a run of another identity ({differs}): choose another folder with "
                f"`out`, or ask for what that run was started with"
            )
        if (held := shard_of(there)) != (asked := shard_of(self.manifest)):
            raise UsageError(
                f"{self.path} already holds {held}, and {asked} was asked for: choose another folder with `out`, or "
                f"ask for what it holds"
            )
        if there.provenance.revealed_secret is not None or (self.path / REVEALED).exists():
            raise UsageError(f"the secret of the run in {self.path} has been revealed meanwhile: start a new run")
        if (self.path / SEAL).exists():
            refuse_broken_seal(self.path, self.ledger)
        self.manifest = there

    def _found(self, secret: bytes | None) -> None:
        """A new folder, or one in which nothing was sampled: the key, then the manifest, which commits to it."""
        if secret is not None and stored_key(self.path / KEY) != secret:
            store_key(self.path / KEY, secret)
        replaced(self.path / MANIFEST, page(self.manifest))
        self.ledger.set_value("identity_sha256", self.manifest.identity_sha256)

    def read_done(self) -> None:
        """Read the images that are done from the ledger."""
        if (owner := self.ledger.value("identity_sha256")) != self.manifest.identity_sha256:
            raise CheckFailed(f"{self.path / LEDGER} belongs to a run of another identity ({owner})")
        done = []
        for image in self.ledger.done():
            what = f"{self.path / LEDGER}, image {image.idx},"
            done.append((parsed(ImageRecord, image.record, what), parsed(TimingRecord, image.timing, what)))
            image.labels()  # which raises where they are none
        self.done = done

    def _write_results(self) -> None:
        for file in self._files.values():
            file.close()
        for name, text in zip(RESULTS, results_of(self.done, self.named), strict=True):
            replaced(self.path / name, text)
            self._files[name] = (self.path / name).open("a", encoding="utf-8", newline="\n")


@contextmanager
def closed_on_failure(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except BaseException:
        folder.close()
        raise
