"""The batch at which an engine is fastest on this machine: timed once, and remembered."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing, suppress
from pathlib import Path

from densepure_rt import files, logs
from densepure_rt._version import __version__
from densepure_rt.errors import DensePureError, EnvironmentFault, UsageError
from densepure_rt.json_files import replaced, strict
from densepure_rt.runtime import gpu
from densepure_rt.runtime.bundle import Bundle
from densepure_rt.runtime.device import MAX_BATCH, Provider
from densepure_rt.runtime.machine import available_cores, cache_folder, processor
from densepure_rt.runtime.open_device import open_device
from densepure_rt.smoothing.samplers import OnDevice
from densepure_rt.smoothing.settings import Settings

ON_GPU, ON_CPU = (64, 256, 512), (16, 32, 64)  # what is timed where the engine takes any batch
FILE = "batches.json"


def fastest_batch(bundle: Bundle, threads: int, provider: Provider) -> int:
    """Return the batch of the least time per image, of a step and a label, with the default settings.

    A plan is timed at the batches that it was built for. What is remembered is of these engines, threads, provider and
    machine. A batch for which there is no memory is left out. Raises UsageError or EnvironmentFault when none runs.
    """
    place, key = cache_folder() / FILE, key_of(bundle, threads, provider)
    known = remembered(place)
    if key in known:
        return known[key]
    seconds, fault = dict[int, float](), None
    for batch in candidates(bundle, provider):
        try:
            seconds[batch] = seconds_per_image(bundle, batch, threads, provider)
        except (UsageError, EnvironmentFault) as error:
            fault = error
    if fault is not None and not seconds:
        raise fault
    best = min(seconds, key=seconds.__getitem__)
    times = ", ".join(f"{batch}: {1000 * each:.3g} ms" for batch, each in seconds.items())
    logs.say(f"batch {best} is the fastest here (per image {times})", batch=best)
    remember(place, known | {key: best})
    return best


def candidates(bundle: Bundle, provider: Provider) -> tuple[int, ...]:
    """Return the batches to time."""
    if bundle.unet.plan is not None:
        return tuple(sorted(bundle.unet.plan.batches)) or ON_GPU
    return ON_CPU if provider == "cpu" else ON_GPU


def seconds_per_image(bundle: Bundle, batch: int, threads: int, provider: Provider) -> float:
    """Time a step, where there is a diffusion network, and a label, in full batches."""
    settings = Settings()
    with closing(open_device(bundle, batch, threads, provider)) as device:
        sampler = OnDevice(device)
        chain = bundle.unet.chain(settings.sigma, settings.steps if bundle.unet.prediction != "none" else 0)
        step = sampler.seconds_per_item(chain, "step") if len(chain) else 0.0
        return step + sampler.seconds_per_item(chain, "classify")


def key_of(bundle: Bundle, threads: int, provider: Provider) -> str:
    """Hash all that the times depend on."""
    on_gpu = bundle.unet.plan is not None or provider != "cpu"
    machine = dict(gpu.find().facts) if on_gpu else {"processor": processor(), "cores": available_cores()}
    engines = bundle.unet.file.sha256, bundle.classifier.file.sha256
    said = json.dumps([__version__, engines, threads, provider, machine], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def remembered(place: Path) -> dict[str, int]:
    """Read the file; nothing of one that is damaged or not there."""
    with suppress(OSError, ValueError, DensePureError):
        found = strict(files.content(place, "model"))
        if isinstance(found, dict):
            return {key: value for key, value in found.items() if type(value) is int and 1 <= value <= MAX_BATCH}
    return {}


def remember(place: Path, known: dict[str, int]) -> None:
    """Write the file; without room or leave to do so, the next process times again."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        replaced(place, json.dumps(known, indent=1, sort_keys=True) + "\n")
