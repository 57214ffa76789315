"""Shards into one run: byte for byte the folder of a run that one process made, but for times and provenance.

An image's place in the run stands beside it in the ledger, so that shards of different n go together as well: what
counts is that each place is taken once. Labels go from ledger to ledger in one transaction, and the seal comes last: a
merge that is cut short leaves a folder that is empty, or without a seal, and the same merge again makes it whole.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.json_files import content, parsed, writing
from densepure_rt.keys import commitment
from densepure_rt.runs.falsifier import Falsification
from densepure_rt.runs.folder import RunFolder
from densepure_rt.runs.identity import differences, refuse_unrecorded_arithmetic, settings_of
from densepure_rt.runs.layout import ATTACKS, MANIFEST, REVEALED, SEAL, SUMMARY, broken_picture, read_manifest
from densepure_rt.runs.ledger import NAME as LEDGER
from densepure_rt.runs.ledger import DoneImage, Ledger
from densepure_rt.runs.reader import read_attacks
from densepure_rt.runs.records import ImageRecord, Manifest, MergedShard, Provenance, Summary, TimingRecord
from densepure_rt.runs.seal import refuse_broken_seal
from densepure_rt.runs.secret import kept_secret, reveal
from densepure_rt.runs.shards import Shard
from densepure_rt.runs.summary import radii_of, summarize
from densepure_rt.smoothing.forecast import reach_of
from densepure_rt.text import plural, printable

MOST_NAMED = 8  # images, shards or folders in one message


@dataclass(frozen=True)
class Part:
    """A shard's folder, complete and as it was sealed. images: the idx of each, by its place in the run.

    attacks: None where none were asked for. secret: None where it is neither there to read nor revealed.
    """

    path: Path
    manifest: Manifest
    images: Mapping[int, int]
    attacks: tuple[Falsification, ...] | None
    secret: bytes | None
    revealed: bool
    seal_sha256: str


def merge(paths: Sequence[Path], out: Path) -> Summary:
    """Make one run of its shards, in the folder `out`. What an equal merge has made before is checked and left alone.

    Raises UsageError when they are no shards of one run, when an image is in two of them or in none, or when `out`
    holds something else; CheckFailed when a shard is not complete, or not what was sealed.
    """
    parts = sorted(read_parts(paths), key=lambda part: part.manifest.shard.number)
    refuse_overlaps(parts)
    refuse_gaps(parts)
    manifest = replace(parts[0].manifest, provenance=provenance_of(parts))
    secret = next((part.secret for part in parts if part.secret is not None), None)
    if not merged_before(out, manifest):
        write_run(out, manifest, secret, parts)
    if secret is not None and any(part.revealed for part in parts):
        reveal(out)
    with Ledger(out / LEDGER, read_only=True) as ledger:
        refuse_unsealed(out, ledger)
    return parsed(Summary, content(out / SUMMARY), str(out / SUMMARY))


def read_parts(paths: Sequence[Path]) -> list[Part]:
    """The shards in these folders: of one run, complete, and as they were sealed."""
    manifests = {path: read_manifest(path) for path in paths}
    refuse_other_runs(manifests)
    refuse_incomplete(manifests)
    return [read_part(path, manifests[path]) for path in paths]


def read_part(path: Path, manifest: Manifest) -> Part:
    """A complete shard. Raises CheckFailed when it is not what was sealed, or when that could be no shard."""
    images, most = {}, manifest.identity.rule.most_samples
    with Ledger(path / LEDGER, read_only=True, most_labels=most) as ledger:
        refuse_unsealed(path, ledger)
        for image in ledger.done():
            check_image(image, manifest, path / LEDGER)
            images[image.place] = image.idx
    attacks = read_attacks(path)
    if strange := {attack.idx for attack in attacks or ()}.difference(images.values()):
        raise CheckFailed(f"{path / ATTACKS} names images that the shard does not hold: {named(sorted(strange))}")
    secret = kept_secret(path, manifest, all_readable=False)
    if secret is not None and commitment(secret) != manifest.identity.secret_commitment:
        raise CheckFailed(f"the key in {path} is not the one that the run committed itself to")
    revealed = manifest.provenance.revealed_secret is not None or (path / REVEALED).exists()
    seal_sha256 = hashlib.sha256(content(path / SEAL)).hexdigest()
    return Part(path, manifest, images, attacks, secret, revealed, seal_sha256)


def check_image(image: DoneImage, manifest: Manifest, ledger: Path) -> None:
    """Raise CheckFailed unless it is an image, at a place that is the shard's."""
    what = f"{ledger}, image {image.idx},"
    record, timing = parsed(ImageRecord, image.record, what), parsed(TimingRecord, image.timing, what)
    image.labels()  # which raises where they are none
    if not image.idx == record.idx == timing.idx:
        raise CheckFailed(f"{what} is damaged: its record is of image {record.idx}, its timing of {timing.idx}")
    if image.place not in manifest.shard.places(manifest.identity.images.count):
        raise CheckFailed(f"{what} has place {image.place} in the run, which is none of shard {manifest.shard}")


def refuse_other_runs(manifests: Mapping[Path, Manifest]) -> None:
    """Raise UsageError when these are not shards, or not of one run; CheckFailed when one is not what it claims."""
    (first, expected), *_ = manifests.items()
    for path, manifest in manifests.items():
        if manifest.provenance.shard is None:
            raise UsageError(f"{path} holds a whole run: merge the folders of certify `shard`")
        refuse_unrecorded_arithmetic(manifest.identity, path)
        if manifest.identity.sha256 != manifest.identity_sha256:
            raise CheckFailed(f"{path / MANIFEST} has not the identity that it claims: see densepure-rt audit")
        if differs := differences(expected, manifest, f"in {first}", f"in {path}"):
            raise UsageError(
                f"{path} is of another run than {first} ({differs}): certify all shards with the same options, the "
                f"same `key` or `seed`, and on machines that compute alike"
            )


def refuse_incomplete(manifests: Mapping[Path, Manifest]) -> None:
    """Raise CheckFailed with all shards that have images left to do."""
    short = []
    for path, manifest in manifests.items():
        if not (path / LEDGER).exists():
            raise UsageError(f"{path} holds no whole run: {LEDGER} is missing")
        with Ledger(path / LEDGER, read_only=True) as ledger:
            left = manifest.asked - ledger.count
        if left:
            short.append(f"{path} (shard {manifest.shard}: {left:,} of {plural(manifest.asked, 'image')} missing)")
    if short:
        raise CheckFailed(f"not complete: {named(short)}; the same certify into the same `out` goes on there")


def refuse_unsealed(path: Path, ledger: Ledger) -> None:
    """Raise CheckFailed when a complete run is not what was sealed."""
    if not (path / SEAL).exists():
        raise CheckFailed(f"{path} is complete, and was not sealed: the same certify into it seals it")
    try:
        refuse_broken_seal(path, ledger)
    except OSError as error:
        raise CheckFailed(
            f"{path} is not what was sealed: {error.filename} cannot be read ({error.strerror})"
        ) from None


def refuse_overlaps(parts: Sequence[Part]) -> None:
    """Raise UsageError when an image, by its place or by its idx, is in two shards."""
    by_place: dict[int, Part] = {}
    by_idx: dict[int, Part] = {}
    for part in parts:
        for place, idx in part.images.items():
            if other := by_place.get(place) or by_idx.get(idx):
                both = [i for p, i in part.images.items() if by_place.get(p) is other or by_idx.get(i) is other]
                raise UsageError(
                    f"{other.path} and {part.path}, shards {other.manifest.shard} and {part.manifest.shard}, overlap "
                    f"in {plural(len(both), 'image')}, idx {named(both)}: leave one of the two out"
                )
        by_place |= dict.fromkeys(part.images, part)
        by_idx |= dict.fromkeys(part.images.values(), part)


def refuse_gaps(parts: Sequence[Part]) -> None:
    """Raise UsageError when an image is in no shard.

    All shards are unions of those of their n's least common multiple. So is what is missing: each begins below that.
    """
    count = parts[0].manifest.identity.images.count
    taken = {place for part in parts for place in part.images}
    if left := count - len(taken):
        of = math.lcm(*(part.manifest.shard.of for part in parts))
        places = (place for place in range(count) if place not in taken)
        shards = (Shard(place + 1, of) for place in range(min(of, count)) if place not in taken)
        raise UsageError(
            f"{plural(left, 'image')} of {count:,} missing, at the places {named(places)} of the set, from 0: name the "
            f"folder of shard {named(shards)} too"
        )


def named(things: Iterable[object]) -> str:
    """The first few of them."""
    first = list(islice(map(str, things), MOST_NAMED + 1))
    return ", ".join([*first[:MOST_NAMED], *(["..."] if len(first) > MOST_NAMED else [])])


def provenance_of(parts: Sequence[Part]) -> Provenance:
    """Who merged them, where and when, and from what; the rest is the first shard's."""
    merged_from, options = [], parts[0].manifest.provenance.options
    for part in parts:
        shard, provenance = str(part.manifest.shard), part.manifest.provenance
        merged_from.append(MergedShard(shard, provenance.started, provenance.host, part.seal_sha256))
    return replace(
        parts[0].manifest.provenance,
        argv=tuple(map(printable, sys.argv)),
        started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        host=platform.node(),
        python=platform.python_version(),
        platform=platform.platform(),
        shard=None,
        revealed_secret=None,
        merged_from=tuple(merged_from),
        options=None if options is None else {name: options[name] for name in options if name != "shard"},
        images_named=any(part.manifest.provenance.images_named for part in parts),
    )


def merged_before(out: Path, manifest: Manifest) -> bool:
    """Return whether `out` is the whole run already. Raises UsageError when it is another run's, or of other shards."""
    if not (out / MANIFEST).exists():
        return False
    there = read_manifest(out)
    same = (there.identity, there.provenance.merged_from) == (manifest.identity, manifest.provenance.merged_from)
    if not same:
        raise UsageError(f"{out} already holds a run that was not merged from these shards: name another `out`")
    return (out / SEAL).exists()


def write_run(out: Path, manifest: Manifest, secret: bytes | None, parts: Sequence[Part]) -> None:
    identity = manifest.identity
    settings = settings_of(identity)
    reach = reach_of(settings, math.prod(identity.image))
    with RunFolder(out, manifest, secret) as folder:
        if not folder.done:
            folder.ledger.take_over(image for part in parts for image in images_of(part))
            folder.read_done()
        keep_attacks(folder, parts)
        folder.finish(summarize(folder.done, identity.images.count, False, radii_of(settings), reach))


def images_of(part: Part) -> Iterator[DoneImage]:
    most = part.manifest.identity.rule.most_samples
    with Ledger(part.path / LEDGER, read_only=True, most_labels=most) as ledger:
        for image in ledger.done():
            if part.images.get(image.place) != image.idx:
                raise CheckFailed(f"{part.path} was written to while it was merged: merge again")
            yield image


def keep_attacks(folder: RunFolder, parts: Sequence[Part]) -> None:
    """Those of all shards, in the order of the images, with the pictures that have broken a certificate."""
    if all(part.attacks is None for part in parts):
        return
    place = {idx: place for part in parts for place, idx in part.images.items()}
    attacks = [attack for part in parts for attack in part.attacks or ()]
    folder.keep_attacks(sorted(attacks, key=lambda attack: place[attack.idx]))
    for part in parts:
        for attack in part.attacks or ():
            picture = broken_picture(attack.idx)
            if attack.broken and (part.path / picture).is_file():
                with writing(folder.path):
                    (folder.path / picture).unlink(missing_ok=True)
                    shutil.copyfile(part.path / picture, folder.path / picture)
