"""Summarize a run: certified accuracy at radii, abstentions, cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from densepure_rt.rounding import exact, floored_share
from densepure_rt.runs.records import ImageRecord, Summary, TimingRecord
from densepure_rt.smoothing.certificate import abstention
from densepure_rt.smoothing.settings import Settings

RADII = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the papers' CIFAR-10 tables


def summarize(
    done: Sequence[tuple[ImageRecord, TimingRecord]],
    asked: int,
    interrupted: bool,
    radii: Sequence[float],
    reach: float | None,
    failed: Sequence[int] = (),
) -> Summary:
    """radii: of the accuracy; reach: the largest radius that n can certify; failed: further images, not certified."""
    records, timings = [record for record, _ in done], [timing for _, timing in done]
    reasons = Counter(why for record in records if (why := abstention(record)) is not None)
    labelled = [record for record in records if record.label is not None]
    uncertified = len(failed) if len(labelled) == len(records) else 0
    return Summary(
        done=len(done),
        asked=asked,
        interrupted=interrupted,
        radii=tuple(radii),
        accuracy=tuple(accuracy_at(labelled, radius, reach, uncertified) for radius in radii),
        abstained=reasons.total(),
        reasons=dict(reasons),
        samples=sum(timing.samples for timing in timings) / max(1, len(timings)),
        unet_calls=sum(timing.unet_calls for timing in timings),
        not_finite=sum(timing.not_finite for timing in timings),
        stopped=sum(record.stopped for record in records),
        failed=tuple(failed),
    )


def radii_of(settings: Settings) -> tuple[float, ...]:
    """Return the radii at which a run's accuracy is told."""
    return RADII if settings.decided is None else settings.decided


def accuracy_at(labelled: Sequence[ImageRecord], radius: float, reach: float | None, failed: int = 0) -> float | None:
    """The share of images that are certified for their own label at the radius; None of none, or beyond reach.

    failed: further images, which are not.
    """
    if not len(labelled) + failed or radius > (reach or 0.0):
        return None
    return sum(bool(record.correct) and (record.radius or 0.0) >= radius for record in labelled) / (
        len(labelled) + failed
    )


def accuracy_so_far(summary: Summary) -> str:
    reached = [(r, share) for r, share in zip(summary.radii, summary.accuracy, strict=True) if share is not None]
    return "certified " + ", ".join(f"{floored_share(share, 0)} at {exact(r)}" for r, share in reached)
