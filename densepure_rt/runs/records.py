"""What the files of a run folder hold, as types: read and checked by them, and their JSON Schemas made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from densepure_rt.images.changes import AS_IS, Fit, Preparation
from densepure_rt.images.datasets import LeftOut
from densepure_rt.json_files import (
    STRICT,
    Count,
    Label,
    Probability,
    Radius,
    Sha256,
    Text,
    adapter,
    canonical,
    without_unused,
)
from densepure_rt.runs.falsifier import Falsification
from densepure_rt.runs.shards import PATTERN, Shard
from densepure_rt.runtime.bundle import Accuracy
from densepure_rt.runtime.schedule import Schedule, TimestepRule, Variance
from densepure_rt.smoothing.certificate import Abstention, EpsOutcome, Method
from densepure_rt.text import numbered

SCHEMA_VERSION: Literal[2] = 2
Secret = Annotated[str, Field(pattern="^([0-9a-f]{2}){32,}$")]
ShardName = Annotated[str, Field(pattern=PATTERN), AfterValidator(lambda name: str(Shard.parsed(name)))]


@dataclass(frozen=True)
class ImageRecord:
    """A line of results.jsonl: a certificate, full precision; see `densepure_rt.smoothing.certificate.Certificate`.

    label: None where it is not known; correct then too. predict, radius: None for an abstention. image_sha256: of
    shape and pixels, as the noise's key takes it. name: of its file, see `LabelledImage`; None, and not written, where
    the run names none.
    """

    __pydantic_config__ = STRICT
    idx: int
    image_sha256: Sha256
    label: Label | None
    predict: Label | None
    radius: Radius | None
    correct: bool | None
    n0: Count
    n: Count
    n_a: Count
    alpha: Probability
    p_lower: Probability
    stopped: bool
    outcomes: tuple[EpsOutcome, ...] = ()
    name: Text | None = None

    def __str__(self) -> str:
        return numbered(self.idx, self.name)


@dataclass(frozen=True)
class TimingRecord:
    """A line of timing.jsonl: what an image took. samples: those that it was judged by; see `scheduling.Cost`."""

    __pydantic_config__ = STRICT
    idx: int
    samples: Count
    unet_calls: Count
    classifier_calls: Count
    not_finite: Count
    seconds: Radius


@dataclass(frozen=True)
class NamedFile:
    """A file by its name and the SHA-256 of its bytes, with that of its sidecar's."""

    __pydantic_config__ = STRICT
    name: str
    sha256: Sha256
    sidecar_sha256: Sha256 | None


@dataclass(frozen=True)
class PreparedIdentity:
    """The changes made to image files before they were certified; see `densepure_rt.images.changes.Preparation`.

    pillow: the version that did it. radius: of which pixels certificates speak.
    """

    __pydantic_config__ = STRICT
    fit: Fit | None
    convert: bool
    background: str
    pillow: str
    radius: str = "in the pixels as they were prepared"

    @property
    def preparation(self) -> Preparation:
        return Preparation(self.fit, self.convert, self.background)


@dataclass(frozen=True)
class ImagesIdentity:
    """sha256: over idx, label, shape and pixels of each image, in order.

    unreadable: `idx` of those that could not be read when the run began, whose shape is zeros there; they may be
    certified when the run goes on. prepared: what was done to them. Both are left out where there is none.
    """

    __pydantic_config__ = STRICT
    count: Count
    sha256: Sha256
    unreadable: tuple[int, ...] | None = None
    prepared: PreparedIdentity | None = None

    @property
    def preparation(self) -> Preparation:
        return AS_IS if self.prepared is None else self.prepared.preparation


@dataclass(frozen=True)
class NoiseIdentity:
    __pydantic_config__ = STRICT
    law: str
    smoothing_table_sha256: Sha256
    vote_table_sha256: Sha256


@dataclass(frozen=True)
class RuleIdentity:
    """The rule by which samples become certificates; a field that a method does not have is None.

    alpha_charged_for_noise: what the noise's finite precision costs of alpha. tested: which classes are asked about.
    """

    __pydantic_config__ = STRICT
    method: Method
    n: Count
    alpha: Probability
    alpha_charged_for_noise: Probability
    tested: str
    n0: Count | None = None
    radii: tuple[Radius, ...] | None = None
    reserve: Probability | None = None
    radius_loss: Probability | None = None
    look: Count | None = None

    @property
    def most_samples(self) -> int:
        """The most samples of an image."""
        return (self.n0 or 0) + self.n


@dataclass(frozen=True)
class BudgetIdentity:
    """Wall seconds, None for no limit."""

    __pydantic_config__ = STRICT
    image: Radius | None
    run: Radius | None


@dataclass(frozen=True)
class ArithmeticIdentity:
    """The arithmetic of the engines where they run: machines, libraries and batches that round otherwise differ.

    Attributes:
        fingerprint: SHA-256 of what fixed items give at the batch that runs; see `densepure_rt.runtime.probe`.
        batch: Items of one call; None where another batch gave the same bits.
        instruction_sets: Of the CPU, where it runs the engines.
        driver: The GPU's driver, and the newest CUDA that it runs.
        cuda: The CUDA runtime, as it reports itself.
        cudnn: Likewise.
        tensorrt: Likewise, as a provider of ONNX Runtime.
    """

    __pydantic_config__ = STRICT
    fingerprint: Sha256
    batch: Count | None = None
    instruction_sets: tuple[str, ...] = ()
    driver: str | None = None
    cuda: str | None = None
    cudnn: str | None = None
    tensorrt: str | None = None


@dataclass(frozen=True)
class Identity:
    """All that results depend on. Runs of equal identity give equal records, and may be resumed and merged.

    image: [channels, height, width]. runs_on: what runs the engines, with its version; processor: on which CPU or GPU,
    since others round otherwise; compute_capability: of the GPU; arithmetic: None in runs of before it was recorded,
    which can be read but not gone on with. conditioning: what the network is told at each
    step; coefficients: of the step graph. alpha_bar: of the first state. secret_commitment: SHA-256 of the secret.
    public_seed: what the secret was made of, where it is public.
    """

    __pydantic_config__ = STRICT
    engine: NamedFile
    classifier: NamedFile
    precision: str
    runs_on: str
    compute_capability: str | None
    processor: str
    schedule: Schedule
    variance: Variance
    prediction: str
    clip: tuple[float, float] | None
    class_names: tuple[str, ...]
    image: tuple[int, int, int]
    images: ImagesIdentity
    sigma: Radius
    sigma_in_network_units: Radius
    steps: Count
    timestep_rule: TimestepRule
    timesteps: tuple[int, ...]
    conditioning: tuple[float, ...]
    coefficients: tuple[Mapping[str, float], ...]
    alpha_bar: Probability
    votes: Count
    tie_rule: str
    rule: RuleIdentity
    budget_seconds: BudgetIdentity
    noise: NoiseIdentity
    secret_commitment: Sha256
    public_seed: int | None
    arithmetic: ArithmeticIdentity | None = None

    @property
    def sha256(self) -> str:
        fields = asdict(self, dict_factory=without_unused)
        if self.arithmetic is None:  # as it was hashed before there was one
            del fields["arithmetic"]
        return hashlib.sha256(canonical(fields)).hexdigest()


@dataclass(frozen=True)
class MergedShard:
    """A shard that a run was merged from. seal_sha256: of its seal.json, which binds its files."""

    __pydantic_config__ = STRICT
    shard: ShardName
    started: Text
    host: Text
    seal_sha256: Sha256


@dataclass(frozen=True)
class Provenance:
    """Who ran it, where and when. revealed_secret: hex, once `densepure-rt reveal` has made it public.

    shard: which part of the images the folder is of; None for all. merged_from: the shards of a run that was merged;
    argv, started, host, python and platform are then those of the merge, and the rest that of its first shard.
    parity: how far the engine's ONNX file was from PyTorch when it was exported, where its sidecar says so.
    left_out: what lay beside the images in their source. grey_repeated: of all images, how many were grey and repeated
    to three channels. images_named: whether results name the images' files. options: those of certify, by their names
    and as typed, paths absolute; of a merged run those of its first shard. All four are None in manifests of before.
    """

    __pydantic_config__ = STRICT
    argv: tuple[Text, ...]
    device: Mapping[Text, Text | int | bool]
    started: Text
    host: Text
    images: Text
    python: Text
    platform: Text
    versions: Mapping[Text, Text]
    weights_sha256: Mapping[Text, Sha256]
    seed_note: Text | None
    shard: ShardName | None = None
    revealed_secret: Secret | None = None
    parity: Accuracy | None = None
    merged_from: tuple[MergedShard, ...] | None = None
    left_out: tuple[LeftOut, ...] | None = None
    grey_repeated: Count | None = None
    images_named: bool | None = None
    options: Mapping[Text, Text | int | float | bool | tuple[Text, ...]] | None = None

    @property
    def of_shards(self) -> bool:
        """Return whether the run is a shard, or was merged from shards."""
        return self.shard is not None or self.merged_from is not None


@dataclass(frozen=True)
class Manifest:
    """manifest.json: what was run. identity_sha256: of the identity as canonical JSON."""

    __pydantic_config__ = STRICT
    schema_version: Literal[2]
    identity_sha256: Sha256
    identity: Identity
    provenance: Provenance

    @property
    def shard(self) -> Shard:
        """Which part of the images the folder is of: the only one of one, unless it is that of a shard."""
        return Shard.parsed(self.provenance.shard or "1/1")

    @property
    def asked(self) -> int:
        """The number of images that were asked for."""
        return self.shard.size(self.identity.images.count)


@dataclass(frozen=True)
class Summary:
    """summary.json. done: images certified, of `asked`. interrupted: by Ctrl-C.

    accuracy: certified accuracy at each of `radii`; None where n cannot reach, or nothing is labelled. reasons: how
    many abstained for each. samples: what an image was judged by, in the mean. not_finite: samples; they count against
    the class. stopped: images that time cut short. failed: `idx` of those that no worker could sample; they are not
    done, and count as uncertified.
    """

    __pydantic_config__ = STRICT
    done: Count
    asked: Count
    interrupted: bool
    radii: tuple[Radius, ...]
    accuracy: tuple[Probability | None, ...]
    abstained: Count
    reasons: Mapping[Abstention, Count]
    samples: Radius
    unet_calls: Count
    not_finite: Count
    stopped: Count
    failed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Seal:
    """seal.json. sha256: of each file of a complete run, by its name; the ledger's is that of its content."""

    __pydantic_config__ = STRICT
    sha256: Mapping[str, Sha256]


SCHEMAS: Mapping[str, type[Any]] = {
    "manifest": Manifest,
    "record": ImageRecord,
    "timing": TimingRecord,
    "attack": Falsification,
    "summary": Summary,
    "seal": Seal,
}


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of one of SCHEMAS."""
    schema = adapter(SCHEMAS[name]).json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"densepure-rt/{name}/{SCHEMA_VERSION}",
    } | schema


if __name__ == "__main__":  # make schemas
    for name in SCHEMAS:
        Path("docs/schemas", f"{name}.json").write_text(
            json.dumps(json_schema(name), indent=2) + "\n", encoding="utf-8"
        )
