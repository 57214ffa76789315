"""Any supported diffusion network in PyTorch -> a `DiffusionModel`, all that the step graph and its sidecar need.

OpenAI's checkpoints are read in openai_unet.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densepure_rt import files
from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.export.models.programs import first_line
from densepure_rt.export.models.weight_files import WeightFile, variant_note, weight_file
from densepure_rt.export.zoo.models import ZOO, load_weights, new_unet
from densepure_rt.runtime.bundle import MAX_STEPS, Prediction, sha256_of
from densepure_rt.runtime.schedule import Chain, Schedule, ScheduleName, TimestepRule, Variance, make_chain
from densepure_rt.runtime.transport import transfer_fault
from densepure_rt.text import all_printable

# What diffusers' scheduler_config.json calls them (diffusers 0.42, schedulers/scheduling_ddpm.py). Its "learned"
# variance is a variance and not a logarithm, and no published model has it.
DIFFUSERS_SCHEDULES: dict[str, ScheduleName] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
}
DIFFUSERS_PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
DIFFUSERS_VARIANCES: dict[str, Variance] = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}

LEARNED = ("learned_range", "learned")  # variances of which the network gives a logit or a logarithm for each pixel
DIFFUSERS_WEIGHTS = dict.fromkeys(("safetensors", "bin"), "diffusion_pytorch_model")
BELOW_ONE = math.nextafter(1.0, 0.0)


@dataclass(frozen=True)
class DiffusionModel:
    """A diffusion network and how it was trained.

    network: (x [B, C, H, W] in [-1, 1] and beyond, t [B]) -> what it predicts, see `StepGraph`. image: [C, H, W].
    timestep_rule: which timestep belongs to a sigma, see `make_chain`. attention: how it is split, in words, where the
    weights do not tell. notes: what was chosen when it was opened, a sentence each, for whoever exports it.
    """

    network: nn.Module
    image: tuple[int, int, int]
    schedule: Schedule
    variance: Variance
    prediction: Prediction
    clip: tuple[float, float] | None
    weights_sha256: str
    timestep_rule: TimestepRule = "nearest"
    attention: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def learned_variance(self) -> bool:
        return self.variance in LEARNED

    def chain(self, sigma: float, steps: int, rule: TimestepRule | None = None) -> Chain:
        """Make the chain of so many steps from smoothing noise `sigma`. rule: None for the network's own."""
        return make_chain(self.schedule, self.variance, sigma, steps, rule or self.timestep_rule)


class DiffusersNetwork(nn.Module):
    """A diffusers UNet as a plain function of (x, t)."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.unet(x, t, return_dict=False)[0]
        return output


class NoNetwork(nn.Module):
    """A stand-in where there is no diffusion network: pixels pass as they are."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


def zoo_unet(weights: Path = ZOO / "unet.safetensors") -> DiffusionModel:
    """The default UNet, with the weights that ship with it or others that were trained by the same script."""
    return DiffusionModel(
        network=DiffusersNetwork(load_weights(new_unet(), weights)),
        image=(1, 28, 28),
        schedule=Schedule("linear", 1000),
        variance="fixed_small",
        prediction="epsilon",
        clip=(-1.0, 1.0),
        weights_sha256=sha256_of(weights),
    )


def no_unet(image: tuple[int, int, int]) -> DiffusionModel:
    """No diffusion network: a bundle for `--steps 0`, plain randomized smoothing (Cohen et al. 2019)."""
    return DiffusionModel(
        network=NoNetwork(),
        image=image,
        schedule=Schedule("continuous", 1),
        variance="fixed_small",
        prediction="none",
        clip=None,
        weights_sha256=hashlib.sha256(b"").hexdigest(),
    )


def declared_unet(
    network: nn.Module,
    image: tuple[int, int, int],
    schedule: Schedule,
    prediction: Prediction,
    variance: Variance,
    clip: tuple[float, float] | None,
    weights_sha256: str | None = None,
) -> DiffusionModel:
    """A network that says nothing of itself, with what its user says of it, found to take and give what that means.

    weights_sha256: None for the hash of its state dict. Raises UsageError when its output has another shape.
    """
    model = DiffusionModel(
        network=network.eval(),
        image=image,
        schedule=schedule,
        variance=variance,
        prediction=prediction,
        clip=clip,
        weights_sha256=weights_sha256 or state_sha256(network),
    )
    for batch in (2, 3):  # the exporter traces with two; a second size tells whether any will do
        x, t = _example(image, batch)
        try:
            output = _called(network, x, t)
        except Exception as error:  # the user's own code may raise anything
            raise UsageError(
                f"the UNet does not take x {list(x.shape)} and t {list(t.shape)} ({first_line(error)}): it must be a "
                f"function of these two and take any batch; check `image_size`"
            ) from error
        wanted = [batch, image[0] * (2 if model.learned_variance else 1), *image[1:]]
        if not isinstance(output, Tensor) or list(output.shape) != wanted:
            found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UsageError(
                f"the UNet gives {found} for x {list(x.shape)}, but `variance` {variance} means {wanted}: "
                f"learned variances come as a second set of channels"
            )
    return model


def diffusers_unet(
    folder: Path, image: tuple[int | None, int, int] | None = None, clip_given: bool = False
) -> DiffusionModel:
    """A UNet2DModel in the folder that diffusers saves: alone with its scheduler's config, or as a pipeline.

    image: [C, H, W] where the config does not say; C None for the config's. clip_given: whether the caller says the
    clip, which then need not be in the scheduler's config.

    Raises UsageError for what is not there or not supported, CheckFailed for weights that do not fit the config.
    """
    home = folder / "unet" if (folder / "unet").is_dir() else folder
    config = read_config(home / "config.json", "a diffusers UNet")
    if (kind := config.get("_class_name")) != "UNet2DModel":
        raise UsageError(f"{home} holds a {kind}: only UNet2DModel, which needs no prompt and no class, is supported")
    for name in ("num_class_embeds", "class_embed_type"):
        if config.get(name) is not None:
            raise UsageError(f"{home / 'config.json'}: {name} is {config[name]}: only unconditional networks will do")
    if (embedding := config.get("time_embedding_type", "positional")) != "positional":
        raise UsageError(
            f"{home / 'config.json'}: time_embedding_type is {embedding!r}, so it is not told a timestep: wrap it as a "
            f"module:callable and declare it with `prediction` denoiser"
        )
    for name in ("vqvae", "vae"):
        if (folder / name).is_dir():
            raise UsageError(f"{folder} has a {name}: its UNet works on latents, and only one of pixels is supported")
    image = _image(config, home / "config.json", image)
    weights = weight_file(home, DIFFUSERS_WEIGHTS)
    network = _diffusers_network(home, weights)
    refuse_odd(image, len(list(network.get_submodule("down_blocks").children())) - 1)
    places = (folder / "scheduler" / "scheduler_config.json", home / "scheduler_config.json")
    scheduler_path = next((path for path in places if path.is_file()), None)
    if scheduler_path is None:
        raise UsageError(
            f"no {places[0]} and none beside the UNet's config: without it nothing says how the network was noised; "
            f"copy it from the pipeline that the network belongs to"
        )
    model = DiffusionModel(
        network=DiffusersNetwork(network).eval(),
        image=image,
        weights_sha256=state_sha256(network),
        notes=variant_note(weights),
        **diffusers_training(read_config(scheduler_path, "a diffusers scheduler"), scheduler_path, clip_given),
    )
    try:
        channels = _called(model.network, *_example(image)).shape[1]
    except Exception as error:  # a config that builds a network may still say nonsense of it
        raise CheckFailed(f"{home} holds a network that cannot run ({first_line(error)}): copy it again") from error
    if channels != image[0] * (2 if model.learned_variance else 1):
        raise CheckFailed(
            f"{home}: out_channels is {channels} for images of {image[0]}, but the scheduler's variance_type is "
            f"{model.variance}: learned_range, and it alone, means twice as many"
        )
    return model


def diffusers_training(config: Mapping[str, Any], path: Path, clip_given: bool = False) -> dict[str, Any]:
    """schedule, variance, prediction and clip of a DiffusionModel, from a diffusers scheduler's config.

    clip_given: see `diffusers_unet`.
    """

    def known(name: str, table: Mapping[str, Any], default: str) -> Any:
        value = config.get(name, default)
        if not isinstance(value, str) or value not in table:
            raise UsageError(f"{path}: {name} {value!r} is not supported: {', '.join(table)}")
        return table[value]

    def number(name: str, default: float, low: float, high: float) -> float:
        value = config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise CheckFailed(f"{path}: {name} is {value!r}, not a number from {low:g} to {high:g}: copy it again")
        return value

    if "beta_schedule" not in config:  # those that sample by the noise level itself, and know no timesteps
        raise UsageError(
            f"{path} is of a {config.get('_class_name')}, which has no beta_schedule: wrap the UNet as a "
            f"module:callable and declare it"
        )
    for name in ("trained_betas", "thresholding", "rescale_betas_zero_snr"):
        if config.get(name):
            raise UsageError(f"{path}: {name} is set, which is not supported: export it as a module:callable")
    if config.get("clip_sample") is None and not clip_given:  # Euler's and PNDM's never say, and do not clip
        raise UsageError(f"{path} does not say clip_sample: give `clip`=-1,1, as most were trained, or `clip` none")
    steps = number("num_train_timesteps", 1000, 1, MAX_STEPS)
    if not isinstance(steps, int):
        raise CheckFailed(f"{path}: num_train_timesteps is {steps!r}, not a whole number: copy it again")
    beta_start = float(number("beta_start", 1e-4, sys.float_info.min, BELOW_ONE))
    clip = float(number("clip_sample_range", 1.0, sys.float_info.min, sys.float_info.max))
    predicted = "sample" if config.get("predict_epsilon") is False else "epsilon"  # as diffusers before 0.9 wrote it
    return {
        "schedule": Schedule(
            name=known("beta_schedule", DIFFUSERS_SCHEDULES, "linear"),
            steps=steps,
            beta_start=beta_start,
            beta_end=float(number("beta_end", 0.02, beta_start, BELOW_ONE)),
        ),
        "variance": "fixed_small"
        if config.get("variance_type") is None
        else known("variance_type", DIFFUSERS_VARIANCES, "fixed_small"),
        "prediction": known("prediction_type", DIFFUSERS_PREDICTIONS, predicted),
        "clip": (-clip, clip) if config.get("clip_sample", True) else None,
    }


def refuse_odd(image: tuple[int, int, int], halvings: int) -> None:
    """Raise UsageError for an image [C, H, W] that cannot be halved so many times."""
    if any(size < 1 or size % 2**halvings for size in image[1:]):
        raise UsageError(
            f"`image_size` {image[1]}x{image[2]}: this UNet halves its images {halvings} times, so both must be "
            f"multiples of {2**halvings}"
        )


def state_sha256(module: nn.Module) -> str:
    """The hash of a module's parameters and buffers, whatever file they came from: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_config(path: Path, what: str) -> dict[str, Any]:
    """A model's configuration, a JSON object. what: it is of, for errors. Raises UsageError or CheckFailed."""
    try:
        found = all_printable(json.loads(files.text(path, "sidecar")))
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): {what} is a folder that holds it") from error
    except (ValueError, RecursionError) as error:
        if fault := transfer_fault(path):
            raise CheckFailed(f"{path} is not valid JSON: {fault}") from error
        raise CheckFailed(f"{path} is not valid JSON ({error}): copy the folder again") from error
    if not isinstance(found, dict):
        raise CheckFailed(f"{path} should hold a JSON object, found {type(found).__name__}: copy the folder again")
    return found


def _image(config: Mapping[str, Any], path: Path, asked: tuple[int | None, int, int] | None) -> tuple[int, int, int]:
    """[C, H, W] of a UNet's images, of another size where `asked`."""
    size, channels = config.get("sample_size"), config.get("in_channels")
    sides = list(asked[1:]) if asked is not None else size if isinstance(size, list) else [size, size]
    numbers = [channels, *sides]
    if len(numbers) != 3 or not all(type(number) is int and number > 0 for number in numbers):
        raise UsageError(f"{path} does not say the size of its images (sample_size {size}): give it with `image_size`")
    if asked is not None and asked[0] not in (None, channels):
        raise UsageError(
            f"{path}: in_channels is {channels}, not the {asked[0]} of the images asked for: give `image_size` "
            f"{channels}x{asked[1]}x{asked[2]}"
        )
    return numbers[0], numbers[1], numbers[2]


def _example(image: tuple[int, int, int], batch: int = 2) -> tuple[Tensor, Tensor]:
    """x and t of blank images."""
    return torch.zeros(batch, *image), torch.ones(batch)


@torch.inference_mode()
def _called(network: nn.Module, x: Tensor, t: Tensor) -> Any:
    return network(x, t)


def _diffusers_network(home: Path, weights: WeightFile) -> nn.Module:
    from diffusers import UNet2DModel
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity(logging.CRITICAL)  # it warns of what is raised below
    try:
        network, loading = UNet2DModel.from_pretrained(
            str(home),
            local_files_only=True,
            use_safetensors=weights.safe,
            variant=weights.variant or None,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers raises OSError, ValueError, RuntimeError and its readers' own
        reason = " ".join(str(error).split())[:200]  # its first line only announces the second
        raise CheckFailed(f"diffusers cannot load {home} ({reason}): copy the folder again") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            raise CheckFailed(
                f"the weights in {home} do not fit its config: {kind.replace('_', ' ')}, "
                f"first {sorted(loading[kind])[0]}"
            )
    result: nn.Module = network.float()
    return result
