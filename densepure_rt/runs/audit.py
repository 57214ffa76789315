"""Checks a run folder offline, without an engine: everything that follows from something else is computed again.

What the labels in the ledger decide is decided anew and compared with the records, digit by digit; the tables are
written anew from the records; noise, chain and charge follow from the identity; hashes bind the rest. It shows that a
folder is whole and consistent, not that its labels came from the engine that it names: for that, `densepure-rt replay`
draws a sample again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from densepure_rt import files
from densepure_rt.errors import CheckFailed, DensePureError, EnvironmentFault
from densepure_rt.files import Kind
from densepure_rt.images.datasets import ImageSet
from densepure_rt.json_files import page, parsed, read_lines
from densepure_rt.keys import commitment, seeded_secret, stored_key
from densepure_rt.rounding import exact
from densepure_rt.runs.falsifier import Falsification
from densepure_rt.runs.identity import differing, rule_of, settings_of
from densepure_rt.runs.layout import (
    ATTACKS,
    KEY,
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
from densepure_rt.runs.ledger import DoneImage, Labels, Ledger
from densepure_rt.runs.records import (
    BudgetIdentity,
    Identity,
    ImageRecord,
    Manifest,
    NoiseIdentity,
    Seal,
    Summary,
    TimingRecord,
)
from densepure_rt.runs.seal import hashes
from densepure_rt.runs.shards import Shard
from densepure_rt.runs.summary import radii_of, summarize
from densepure_rt.runtime.bundle import MAX_STEPS
from densepure_rt.runtime.device import NOT_FINITE
from densepure_rt.runtime.noise import NOISE_LAW, image_sha256, smoothing_law, vote_law
from densepure_rt.runtime.schedule import Coefficients, make_chain
from densepure_rt.smoothing.certificate import Certificate
from densepure_rt.smoothing.forecast import reach_of
from densepure_rt.smoothing.settings import Settings
from densepure_rt.text import numbered


@dataclass(frozen=True)
class Finding:
    """The result of one check. faults: what does not hold, each in a line; none when it does."""

    what: str
    said: str
    faults: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return not self.faults


def audit(path: Path, images: ImageSet | None = None) -> list[Finding]:
    """All checks of a run folder. images: what was certified, to check its hashes too.

    Raises UsageError when there is no run in the folder, EnvironmentFault when it cannot be read. What is damaged is a
    finding, and what cannot be checked then is left out.
    """
    try:
        manifest = read_manifest(path)
    except CheckFailed as fault:
        return [Finding("manifest", "unreadable", (str(fault),))]
    checks: list[Callable[[], Finding]] = [
        lambda: check_identity(manifest.identity, manifest.identity_sha256),
        lambda: check_derived(manifest.identity),
        lambda: check_arithmetic(manifest),
        lambda: check_secret(path, manifest),
    ]
    if images is not None:
        checks.append(lambda: check_images(images, manifest, done))
    done: list[DoneImage] = []
    findings = []
    try:
        if not (path / LEDGER).exists():
            raise CheckFailed(f"{LEDGER} is missing")
        most = manifest.identity.rule.most_samples
        with Ledger(path / LEDGER, read_only=True, most_labels=most) as ledger:
            findings.append(check_ledger(ledger, manifest))
            done = list(ledger.done())
            checks += [
                lambda: check_records(done, manifest),
                *([lambda: check_shards(done, manifest)] if manifest.provenance.of_shards else []),
                lambda: check_tables(path, done, bool(manifest.provenance.images_named)),
                lambda: check_summary(path, done, manifest),
                *([lambda: check_attacks(path, records_of(done))] if (path / ATTACKS).exists() else []),
                lambda: check_seal(path, ledger, complete=len(done) == manifest.asked),
            ]
            findings += [run(check) for check in checks]
    except CheckFailed as fault:
        findings += [Finding("ledger", "unreadable", (str(fault),)), *(run(check) for check in checks[:4])]
    return findings


def run(check: Callable[[], Finding]) -> Finding:
    """The finding of a check, also where what it reads is damaged."""
    try:
        return check()
    except DensePureError as fault:
        return Finding("content", "damaged", (str(fault),))


def check_identity(identity: Identity, claimed: str) -> Finding:
    found = identity.sha256
    faults = () if found == claimed else (f"identity_sha256 is {claimed}, of what stands there it is {found}",)
    return Finding("identity", f"sha256 {found[:16]}", faults)


def check_derived(identity: Identity) -> Finding:
    """Check what of the identity follows from the rest: timesteps, coefficients, noise tables, the charge on alpha."""
    if identity.schedule.steps > MAX_STEPS:
        return Finding("derived values", "not computed", (f"a schedule of {identity.schedule.steps} steps is none",))
    settings, pixels = settings_of(identity), math.prod(identity.image)
    chain = make_chain(identity.schedule, identity.variance, identity.sigma, identity.steps, identity.timestep_rule)
    derived: dict[str, Any] = {
        "sigma_in_network_units": 2 * identity.sigma,
        "timesteps": chain.timesteps,
        "conditioning": tuple(chain.t.tolist()),
        "coefficients": tuple(Coefficients(*row)._asdict() for row in chain.coef.tolist()),
        "alpha_bar": chain.scale**2,
        "votes": settings.effective.votes,
        "noise": asdict(NoiseIdentity(NOISE_LAW, smoothing_law(identity.sigma).sha256, vote_law().sha256)),
        "rule": asdict(rule_of(settings, pixels)),
    }
    stated = {name: value for name, value in asdict(identity).items() if name in derived}
    faults = tuple(
        f"{name} is {one}, and {other} follows from the rest" for name, one, other in differing(stated, derived)
    )
    return Finding("derived values", f"{len(derived)} computed again", faults)


def check_arithmetic(manifest: Manifest) -> Finding:
    """Check that the identity and the device described beside it have one fingerprint."""
    arithmetic, device = manifest.identity.arithmetic, manifest.provenance.device
    if arithmetic is None:
        return Finding("arithmetic", "not recorded by this old run: nothing shows that one kind of machine drew it all")
    told = device.get("fingerprint")
    faults = () if told == arithmetic.fingerprint else (f"the device is described with the fingerprint {told}",)
    return Finding("arithmetic", f"fingerprint {arithmetic.fingerprint[:16]}, of {manifest.identity.processor}", faults)


def check_secret(path: Path, manifest: Manifest) -> Finding:
    identity, revealed = manifest.identity, manifest.provenance.revealed_secret
    secrets: dict[str, bytes | None] = {}
    for name in (KEY, REVEALED):
        with contextlib.suppress(EnvironmentFault):  # its owner's alone to read: that is as it should be
            secrets[name] = stored_key(path / name)
    if revealed is not None:
        secrets["revealed_secret"] = bytes.fromhex(revealed)
    if identity.public_seed is not None:
        secrets["public_seed"] = seeded_secret(identity.public_seed)
    known = {name: secret for name, secret in secrets.items() if secret is not None}
    faults = tuple(
        f"{name} is not what the run committed itself to"
        for name, secret in known.items()
        if commitment(secret) != identity.secret_commitment
    )
    return Finding("secret", ", ".join(known) or "not here, which is as it may be", faults)


def check_ledger(ledger: Ledger, manifest: Manifest) -> Finding:
    claimed = ledger.value("identity_sha256")
    faults = () if claimed == manifest.identity_sha256 else (f"it belongs to a run of identity {claimed}",)
    return Finding("ledger", f"of identity {str(claimed)[:16]}", faults)


def check_records(done: list[DoneImage], manifest: Manifest) -> Finding:
    """Each record against what the labels of its samples decide, and its place."""
    identity, places = manifest.identity, manifest.shard.places(manifest.identity.images.count)
    settings, faults, samples = settings_of(identity), [], 0
    for image in done:
        try:
            labels = image.labels()
            samples += len(labels)
            faults += [f"image {said(image)}: {fault}" for fault in faults_of(image, labels, identity, settings)]
        except DensePureError as fault:
            faults.append(f"image {said(image)}: {fault}")
    faults += [
        f"image {said(image)} has place {image.place}, none of {shard_of(manifest)} of {identity.images.count} images"
        for image in done
        if image.place not in places
    ]
    return Finding("records", f"{len(done)} decided again from {samples:,} labels", tuple(faults))


def check_shards(done: list[DoneImage], manifest: Manifest) -> Finding:
    """Check that the shards of a merged run hold each image once; of a shard, what it holds."""
    provenance, count = manifest.provenance, manifest.identity.images.count
    if provenance.merged_from is None:
        return Finding("shard", f"{provenance.shard}: {len(done)} of its {manifest.asked} images, of {count}")
    merged = [Shard.parsed(part.shard) for part in provenance.merged_from]
    words = f"merged from {len(merged)}"
    if provenance.shard is not None or len(done) != count:
        return Finding("shard", words, ("what is merged is a whole run, and this is none",))
    held = {place for shard in merged for place in shard.places(count)}
    if not len(held) == sum(shard.size(count) for shard in merged) == count:
        return Finding("shard", words, ("they do not hold each image once",))
    return Finding("shard", words)


def said(image: DoneImage) -> str:
    """Speak of an image by its number, and by its name where its record can be read and has one."""
    with contextlib.suppress(CheckFailed):
        return numbered(image.idx, parsed(ImageRecord, image.record, LEDGER).name)
    return str(image.idx)


def faults_of(image: DoneImage, labels: Labels, identity: Identity, settings: Settings) -> Iterator[str]:
    record, timing = parsed(ImageRecord, image.record, "its record"), parsed(TimingRecord, image.timing, "its timing")
    if (image.idx, image.idx) != (record.idx, timing.idx):
        yield f"indices {record.idx} and {timing.idx} do not belong together"
    classes = len(identity.class_names)
    if len(labels) and not NOT_FINITE <= labels.min() <= labels.max() < classes:
        yield f"a label is none of the {classes} classes"
        return
    certificate = decided(labels.tolist(), record, settings, math.prod(identity.image))
    if certificate is None:
        yield f"{len(labels)} labels are not those that decide it"
        return
    expected = record_of(record.idx, record.image_sha256, record.label, certificate, record.name)
    for name, one, other in differing(asdict(record), asdict(expected)):
        yield f"{name} is {one}, and its labels give {other}"
    if record.stopped and identity.budget_seconds == BudgetIdentity(None, None):
        yield "it was stopped by time, and time had no limit"
    counted = (len(labels), int((labels == NOT_FINITE).sum()))
    if (timing.samples, timing.not_finite) != counted:
        yield f"samples and not_finite are {timing.samples} and {timing.not_finite}, its labels give {counted}"


def decided(labels: list[int], record: ImageRecord, settings: Settings, pixels: int) -> Certificate | None:
    """The certificate of these labels; None when they are more or fewer than it takes."""
    decider = settings.rule(pixels, record.label is not None).start(record.label)
    ended = decider.needed == 0
    for label in labels:
        if ended:
            return None
        ended = decider.add(label)
    return None if ended == record.stopped else decider.certificate(record.stopped)


def check_tables(path: Path, done: list[DoneImage], named: bool) -> Finding:
    """The results against what the ledger says of each image. named: whether the run names its images."""
    pairs = [(parsed(ImageRecord, i.record, LEDGER), parsed(TimingRecord, i.timing, LEDGER)) for i in done]
    faults = []
    for record, timing, image in ((*pair, image) for pair, image in zip(pairs, done, strict=True)):
        if lines_of(record, timing, named)[1:] != (image.record, image.timing):
            faults.append(f"{LEDGER}: image {record} is not written as it would be")
    for name, expected in zip(RESULTS, results_of(pairs, named), strict=True):
        with contextlib.suppress(OSError):  # `read` says why
            size, given = (path / name).stat().st_size, len(expected.encode())
            if size > given + files.MIB:  # not read: a sparse file costs nothing on the disk, and its size in memory
                faults.append(f"{name} has {size:,} bytes, and the ledger gives {given:,}")
                continue
        found = read(path / name, "results file").decode("utf-8", "replace")
        if found != expected:
            lines = zip((*found.splitlines(), ""), (*expected.splitlines(), ""), strict=False)
            number = next((i for i, (one, other) in enumerate(lines, start=1) if one != other), 0)
            faults.append(f"{name}, line {number}, is not what the ledger gives")
    return Finding("results", f"{', '.join(RESULTS)} written again from the ledger", tuple(faults))


def check_summary(path: Path, done: list[DoneImage], manifest: Manifest) -> Finding:
    if not (path / SUMMARY).exists():
        return Finding("summary", "not written yet")
    found = parsed(Summary, read(path / SUMMARY), SUMMARY)
    pairs = [(parsed(ImageRecord, i.record, LEDGER), parsed(TimingRecord, i.timing, LEDGER)) for i in done]
    settings = settings_of(manifest.identity)
    reach = reach_of(settings, math.prod(manifest.identity.image))
    expected = summarize(pairs, manifest.asked, found.interrupted, radii_of(settings), reach, found.failed)
    if len(done) < manifest.asked and found.done < len(done):
        return Finding("summary", "of an earlier end of the run")
    faults = [
        f"{name} is {one}, and the records give {other}"
        for name, one, other in differing(asdict(found), asdict(expected))
    ]
    if len(done) + len(found.failed) > manifest.asked or {image.idx for image in done}.intersection(found.failed):
        faults.append(f"failed names {len(found.failed)} images, and {len(done)} of {manifest.asked} are done")
    if read(path / SUMMARY).decode("utf-8", "replace") != page(found):
        faults.append("it is not written as it would be")
    return Finding("summary", f"{found.done} of {found.asked} images", tuple(faults))


def check_seal(path: Path, ledger: Ledger, complete: bool) -> Finding:
    """Hashes of all files, of a complete run."""
    if not (path / SEAL).exists():
        missing = (f"{SEAL} is missing, though the run is complete",) if complete else ()
        return Finding("seal", "none: the run is not complete", missing)
    claimed = parsed(Seal, read(path / SEAL), SEAL).sha256
    try:
        found = hashes(path, ledger)
    except OSError as error:
        raise CheckFailed(f"{error.filename} cannot be read ({error.strerror})") from None
    if set(claimed) != set(found):
        return Finding("seal", "unreadable", (f"{SEAL} does not name {', '.join(found)}",))
    faults = tuple(f"{name} is not what was sealed" for name in found if claimed[name] != found[name])
    return Finding("seal", f"{len(found)} files", faults)


def check_attacks(path: Path, records: Mapping[int, ImageRecord]) -> Finding:
    """Check whether an attack has broken a certificate, and whether the attacks are on certificates of this run."""
    attacks, faults = read_lines(path / ATTACKS, Falsification), []
    for attack in attacks:
        record = records.get(attack.idx)
        if record is None or record.radius != attack.radius:
            faults.append(f"image {record or attack.idx} has no certificate of radius {exact(attack.radius)}")
        if attack.broken:
            faults.append(
                f"the certificate of image {record or attack.idx} is broken at a distance of {attack.distance}"
            )
    return Finding("attacks", f"{len(attacks)} on certificates of this run", tuple(faults))


def check_images(images: ImageSet, manifest: Manifest, done: list[DoneImage]) -> Finding:
    images = images.hashed_as(manifest.identity.images.unreadable)
    same = images.sha256() == manifest.identity.images.sha256
    faults = [] if same else ["they are not the images of the manifest"]
    records = records_of(done)
    places = dict(enumerate(images.order))
    if any(places.get(image.place) != image.idx for image in done):
        faults.append("the certified images are not at their places among them")
    for image in images.readable():
        record = records.get(image.idx)
        if record is not None and record.image_sha256 != image_sha256(image.pixels).hex():
            faults.append(f"image {image} is not the one that was certified")
        if record is not None and record.label != image.label:
            faults.append(f"image {image} has the label {image.label}, not {record.label}")
    return Finding("images", f"{len(images)} of {images.name}", tuple(faults))


def records_of(done: list[DoneImage]) -> dict[int, ImageRecord]:
    return {image.idx: parsed(ImageRecord, image.record, LEDGER) for image in done}


def read(path: Path, kind: Kind = "run file") -> bytes:
    try:
        return files.content(path, kind)
    except OSError as error:
        raise CheckFailed(f"{path.name} cannot be read ({error.strerror})") from None
