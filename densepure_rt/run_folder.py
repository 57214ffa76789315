"""What a run leaves behind, and how it goes on after it was cut short.

manifest.json   what was run, on what, with which engines; written before the first sample
ledger.sqlite   the truth while the run goes on: every label, and every certificate
results.tsv     idx label predict radius correct time, the field's format (-1 and 0.0 abstain; radius rounded down)
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
import datetime
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

from PIL import Image

from densepure_rt import files
from densepure_rt.certification import Certificate
from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.falsifier import Falsification
from densepure_rt.json_files import line, page, parsed, replaced, writing
from densepure_rt.keys import retire, shared_key, store_key, stored_key
from densepure_rt.ledger import NAME as LEDGER
from densepure_rt.ledger import Ledger
from densepure_rt.records import Identity, ImageRecord, Manifest, Seal, Summary, TimingRecord
from densepure_rt.rounding import floored
from densepure_rt.runtime.noise import image_sha256
from densepure_rt.smoothing import Certified
from densepure_rt.text import printable

MANIFEST, SUMMARY, SEAL, KEY, REVEALED = "manifest.json", "summary.json", "seal.json", "secret.key", "secret.revealed"
TSV_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")  # locuslab/smoothing
RESULTS = ("results.tsv", "results.jsonl", "timing.jsonl")
ATTACKS = "falsify.jsonl"
SEALED = (MANIFEST, *RESULTS, SUMMARY)  # and the ledger's content; and ATTACKS, where there is one
MOST_FIELDS = 4  # that a message names of those in which two identities differ
ABSTAIN = -1  # in the TSV alone, as in locuslab/smoothing


class Lines(NamedTuple):
    """What one image adds to each of RESULTS."""

    tsv: str
    record: str
    timing: str


def record_of(idx: int, image_sha256: str, label: int | None, certificate: Certificate) -> ImageRecord:
    """The record of one image; abstention is null, not a label."""
    return ImageRecord(
        idx=idx,
        image_sha256=image_sha256,
        label=label,
        predict=certificate.predict,
        radius=certificate.radius,
        correct=None if label is None else certificate.covers(label, 0.0),
        n0=certificate.n0,
        n=certificate.n,
        n_a=certificate.n_a,
        alpha=certificate.alpha,
        p_lower=certificate.p_lower,
        stopped=certificate.stopped,
        outcomes=certificate.outcomes,
    )


def tsv_line(record: ImageRecord, seconds: float) -> str:
    columns = (
        record.idx,
        ABSTAIN if record.label is None else record.label,
        ABSTAIN if record.predict is None else record.predict,
        "0.0" if record.radius is None else floored(record.radius),
        int(record.correct or False),
        str(datetime.timedelta(seconds=seconds)),
    )
    return "\t".join(str(column) for column in columns) + "\n"


def lines_of(record: ImageRecord, timing: TimingRecord) -> Lines:
    return Lines(tsv_line(record, timing.seconds), line(record), line(timing))


def results_of(done: Iterable[tuple[ImageRecord, TimingRecord]]) -> Lines:
    """The whole content of each of RESULTS."""
    head = Lines("\t".join(TSV_COLUMNS) + "\n", "", "")
    return Lines(*map("".join, zip(head, *(lines_of(record, timing) for record, timing in done), strict=True)))


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields, by dotted names, in which two identities differ."""
    for name in sorted({*ours, *theirs}):
        one, other = ours.get(name), theirs.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differing(one, other, f"{prefix}{name}.")
        elif json.dumps(one) != json.dumps(other):
            yield prefix + name, one, other


def differences(one: Identity, other: Identity, where_one: str, where_other: str) -> str:
    """The first fields in which two identities differ, as a message names them; nothing when they are equal."""
    fields = list(differing(asdict(one), asdict(other)))
    shown = (f"{name}: {brief(a)} {where_one}, {brief(b)} {where_other}" for name, a, b in fields[:MOST_FIELDS])
    more = (f"and {len(fields) - MOST_FIELDS} more",) if len(fields) > MOST_FIELDS else ()
    return "; ".join((*shown, *more))


def refuse_unrecorded_arithmetic(identity: Identity, path: Path) -> None:
    """Raise UsageError for a run that does not say how its machine computed: no other samples can be put beside its."""
    if identity.arithmetic is None:
        raise UsageError(
            f"{path} holds an old run, whose manifest does not say how its machine computed, so nothing shows that "
            f"more samples would be of the same classifier. It can still be audited, reported and replayed: certify "
            f"into a new folder with --out"
        )


def broken_picture(idx: int) -> str:
    """The file that keeps what has broken an image's certificate."""
    return f"broken-{idx}.png"


def shard_of(manifest: Manifest) -> str:
    return "the whole run" if manifest.provenance.shard is None else f"shard {manifest.provenance.shard}"


def agreed_secret(path: Path | None, key: Path | None) -> bytes | None:
    """The secret of the run in this folder, or of a key file, which is made where there is none; None for neither.

    Raises UsageError when both are named and do not agree, and else as `secret_to_go_on` and `shared_key` do.
    """
    there = None if path is None else secret_to_go_on(path)
    if there is None:
        return None if key is None else shared_key(key)
    if key is not None and (named := stored_key(key)) != there:
        found = "is not there" if named is None else "holds another secret"
        raise UsageError(
            f"the key {key} {found}, and the run in {path} goes on with its own alone: leave --key out, or choose "
            f"another folder with --out"
        )
    return there


def secret_to_go_on(path: Path) -> bytes | None:
    """The secret of the run in this folder, or None where there is no such run or its seed is public.

    Raises UsageError when it was revealed, for then no new noise may be drawn with it, or when the file is no key.
    """
    with writing(path):
        revealed = (path / REVEALED).exists()
    if revealed:
        raise UsageError(
            f"the secret of the run in {path} has been revealed, so that no more noise may be drawn with it: start a "
            f"new run with another --out"
        )
    return stored_key(path / KEY)


def reveal(path: Path, key: Path | None = None) -> str:
    """Make the secret of a run public: into its manifest, and the key file takes another name. The secret, hex.

    From then on anybody can draw the run's noise again, and no new noise is drawn with it. key: the file that the run
    was keyed with, which takes another name too. To be repeated when it was cut short.

    Raises UsageError where there is no secret to reveal, or `key` holds another one; CheckFailed when the folder was
    tampered with.
    """
    secret_to_reveal(path)  # before the ledger is opened, which writes to it
    with writing(path), Ledger(path / LEDGER) as ledger:
        manifest, secret = secret_to_reveal(path)
        if hashlib.sha256(secret).hexdigest() != manifest.identity.secret_commitment:
            raise CheckFailed(f"{path / KEY} is not the key that the run committed itself to")
        sealed = (path / SEAL).exists()
        if sealed and manifest.provenance.revealed_secret is None:
            refuse_broken_seal(path, ledger)
        if key is not None:
            retire(key, secret)  # first, as below: what may be public is never drawn with again
        if (path / KEY).exists():
            (path / KEY).replace(path / REVEALED)
        provenance = replace(manifest.provenance, revealed_secret=secret.hex())
        replaced(path / MANIFEST, page(replace(manifest, provenance=provenance)))
        if sealed:
            seal(path, ledger)
    return secret.hex()


def secret_to_reveal(path: Path) -> tuple[Manifest, bytes]:
    """Return the manifest of a run and its secret. Raises UsageError where there is no secret to reveal."""
    manifest = read_manifest(path)
    secret = stored_key(path / KEY) or stored_key(path / REVEALED)
    if secret is None and (revealed := manifest.provenance.revealed_secret) is not None:
        secret = bytes.fromhex(revealed)
    if secret is None:
        public = manifest.identity.public_seed is not None
        why = "its seed is public already" if public else f"{KEY} is missing"
        raise UsageError(f"the run in {path} has no secret to reveal: {why}")
    return manifest, secret


class RunFolder:
    """One run's folder, new or gone on with: a context manager. `add` is durable when it returns.

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
                    f"{path} holds {', '.join(found)} of a run that cannot go on: choose another folder with --out, or "
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

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Safe to call twice; what a full disk did not take was reported when it was written."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        if self._ledger is not None:
            self._ledger.close()

    def add(self, result: Certified, place: int | None = None) -> None:
        """Keep an image. place: among the run's images; None for the next one."""
        image, certificate, cost = result
        record = record_of(image.idx, image_sha256(image.pixels).hex(), image.label, certificate)
        timing = TimingRecord(image.idx, **vars(cost))
        lines = lines_of(record, timing)
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
                    f"{len(kept)}): something else has written to it; certify again, into another folder with --out"
                )
            self._write_results()
            replaced(self.path / SUMMARY, page(summary))
            if summary.done == summary.asked:
                seal(self.path, self.ledger)

    def _go_on(self, secret: bytes | None) -> None:
        """Take over the manifest that is there, unless it is that of another run, or of one that must not go on."""
        there = read_manifest(self.path)
        refuse_unrecorded_arithmetic(there.identity, self.path)
        if differs := differences(there.identity, self.manifest.identity, "there", "now"):
            raise UsageError(
                f"{self.path} already holds a run of another identity ({differs}): choose another folder with "
                f"--out, or ask for what that run was started with"
            )
        if (held := shard_of(there)) != (asked := shard_of(self.manifest)):
            raise UsageError(
                f"{self.path} already holds {held}, and {asked} was asked for: choose another folder with --out, or "
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
        """What is done, from the ledger."""
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
        for name, text in zip(RESULTS, results_of(self.done), strict=True):
            replaced(self.path / name, text)
            self._files[name] = (self.path / name).open("a", encoding="utf-8", newline="\n")


def read_manifest(path: Path) -> Manifest:
    """The manifest of a run folder. Raises UsageError when there is none, CheckFailed when it is damaged."""
    try:
        return parsed(Manifest, files.content(path / MANIFEST, "run file"), str(path / MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} holds no run: there is no {MANIFEST} in it") from None
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path / MANIFEST} ({error.strerror})") from error


def seal(path: Path, ledger: Ledger) -> None:
    """Write down what the files of a complete run hash to."""
    replaced(path / SEAL, page(Seal(hashes(path, ledger))))


def refuse_broken_seal(path: Path, ledger: Ledger) -> None:
    """Raise CheckFailed when the folder is not what was sealed."""
    claimed, found = parsed(Seal, files.content(path / SEAL, "run file"), str(path / SEAL)).sha256, hashes(path, ledger)
    if changed := [name for name in found if claimed.get(name) != found[name]]:
        raise CheckFailed(
            f"{', '.join(changed)} in {path} was changed after the run was sealed: see densepure-rt audit"
        )


def hashes(path: Path, ledger: Ledger) -> dict[str, str]:
    """What a seal holds: the SHA-256 of each file of a run."""
    names = (*SEALED, *((ATTACKS,) if (path / ATTACKS).exists() else ()))
    found = {name: files.sha256_of(path / name, "results file") for name in names}
    return found | {LEDGER: ledger.content_sha256()}


def brief(value: Any) -> str:
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 40 else f"{text[:37]}..."


@contextmanager
def closed_on_failure(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except BaseException:
        folder.close()
        raise
