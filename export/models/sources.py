"""What a command names -> the two models."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

from densepure_rt.errors import UsageError
from densepure_rt.export.models.checkpoints import CHECKPOINTS, is_checkpoint, load_into, read_state_dict, spec_hint
from densepure_rt.export.models.classifiers import ClassifierModel, declare, open_classifier, zoo_classifier
from densepure_rt.export.models.model_options import ModelOptions
from densepure_rt.export.models.openai_unet import AttentionOrder, openai_schedule, openai_unet
from densepure_rt.export.models.programs import built, exported_program
from densepure_rt.export.models.unets import DiffusionModel, declared_unet, diffusers_unet, no_unet, zoo_unet
from densepure_rt.export.zoo.models import ZOO
from densepure_rt.runtime.bundle import Bundle, Prediction, sha256_of
from densepure_rt.runtime.schedule import Schedule, ScheduleName, TimestepRule, Variance

DECLARED = ("image", "schedule", "variance", "prediction", "clip", "timestep_rule", "attention")  # kept in a sidecar
CLIP = (-1.0, 1.0)  # of pixels; what every published sampler does unless told otherwise
Image = tuple[int, int, int]


class Models(NamedTuple):
    """The two models that an export, a comparison or a benchmark is about."""

    unet: DiffusionModel
    classifier: ClassifierModel


def open_models(options: ModelOptions) -> Models:
    """The models that the options name. Raises UsageError, CheckFailed or EnvironmentFault; each says what to do."""
    if options.weights is not None and (options.unet or options.classifier):
        raise UsageError("`weights` is for the model that ships: leave it out beside `unet` and `classifier`")
    if options.classifier is None:
        refuse(options, "the classifier that ships says these itself", *CLASSIFYING)
    unet = open_unet(options)
    if options.classifier is None:
        classifier = zoo_classifier(zoo_file(options.weights, "classifier"))
        if classifier.image != unet.image:
            raise UsageError(
                f"the UNet works on images {list(unet.image)}, and the classifier that ships takes "
                f"{list(classifier.image)}: name one with `classifier`"
            )
        return Models(unet, classifier)
    classifier = open_classifier(
        options.classifier,
        unet.image,
        labels=options.labels,
        weights=options.classifier_weights,
        prefix=options.classifier_prefix,
        declared=declare(
            options.pixel_range,
            options.mean,
            options.std,
            options.channel_order,
            options.resize,
            options.interpolation,
            options.antialias,
            options.crop,
        ),
    )
    return Models(unet, classifier)


def zoo_file(folder: Path | None, name: str) -> Path:
    path = (folder or ZOO) / f"{name}.safetensors"
    if not os.path.isfile(path):  # unlike Path.is_file, it takes any name for an answer
        raise UsageError(f"no weights at {path}: give `weights` a folder that training wrote, or leave it out")
    return path


def open_unet(options: ModelOptions) -> DiffusionModel:
    """The diffusion network that the options name."""
    if options.timestep_rule not in get_args(TimestepRule):
        raise UsageError(f"`timestep_rule` {options.timestep_rule} is not known: {', '.join(get_args(TimestepRule))}")
    load = _loader(options.unet)
    model = load(options)
    if options.clip is not None and load is not _none:
        model = dataclasses.replace(model, clip=clip_of(options.clip))
    rule: TimestepRule = options.timestep_rule  # type: ignore[assignment]  # checked above
    if rule != "nearest" and model.schedule.continuous:
        raise UsageError(f"`timestep_rule` {rule} is for networks with timesteps: leave it out")
    return dataclasses.replace(model, timestep_rule=rule)


def _loader(spec: str | None) -> Callable[[ModelOptions], DiffusionModel]:
    if spec is None:
        return _zoo
    if spec == "none":
        return _none
    path = Path(spec)
    if os.path.isdir(spec):
        return _diffusers
    if path.suffix == ".pt2":
        return _program
    if is_checkpoint(spec):
        return _openai
    if re.fullmatch(r"[\w.]+:[\w.]+", spec):
        return _callable
    raise UsageError(
        f"`unet` {spec} is none of a checkpoint ({', '.join(CHECKPOINTS)}), a diffusers folder, a .pt2 file, "
        f"package.module:function or none: {spec_hint(spec, 'unet')}"
    )


def refuse(options: ModelOptions, why: str, *names: str) -> None:
    """Raise UsageError for options of these names that were given."""
    given = [option for name, option in options.given().items() if name in names]
    if given:
        raise UsageError(f"{why}: leave {', '.join(given)} out")


def _zoo(options: ModelOptions) -> DiffusionModel:
    refuse(options, "the model that ships says these itself", *TRAINING, *LAYOUT, "image_size", "unet_weights")
    return zoo_unet(zoo_file(options.weights, "unet"))


def _none(options: ModelOptions) -> DiffusionModel:
    refuse(options, "without a UNet they mean nothing", *TRAINING, *LAYOUT, "unet_weights", "clip")
    return no_unet(whole_image(options, "`unet` none"))


def _diffusers(options: ModelOptions) -> DiffusionModel:
    refuse(options, "a diffusers folder says these itself", *TRAINING, *LAYOUT, "unet_weights")
    image = image_of(options.image_size) if options.image_size else None
    return diffusers_unet(Path(options.unet or ""), image, clip_given=options.clip is not None)


def _openai(options: ModelOptions) -> DiffusionModel:
    why = "a checkpoint in OpenAI's layout says these itself"
    refuse(options, why, "prediction", "variance", "unet_weights", "beta_start", "beta_end")
    if (options.schedule is None) != (options.diffusion_steps is None):
        raise UsageError("`schedule` and `diffusion_steps` belong together: give both, as it was trained")
    schedule = None
    if options.schedule is not None and options.diffusion_steps is not None:
        schedule = openai_schedule(options.schedule, options.diffusion_steps)
        if options.timestep_scale is not None:
            schedule = dataclasses.replace(schedule, timestep_scale=scale_of(options.timestep_scale))
    elif options.timestep_scale is not None:
        raise UsageError("`timestep_scale` belongs to `schedule` and `diffusion_steps`: give all three")
    orders: dict[str, AttentionOrder] = {name: name for name in get_args(AttentionOrder)}
    if (order := options.attention_order) is not None and order not in orders:
        raise UsageError(f"`attention_order` {order} is not known: {', '.join(orders)}")
    channels, size = None, None
    if options.image_size is not None:
        channels, size, width = image_of(options.image_size)
        if size != width:
            raise UsageError(
                f"`image_size` {options.image_size}: a network of this layout takes squares; give one number"
            )
    model = openai_unet(
        Path(options.unet or ""),
        prefix=options.unet_prefix,
        num_heads=options.num_heads,
        num_head_channels=options.num_head_channels,
        attention_order=None if order is None else orders[order],
        schedule=schedule,
        image_size=size,
    )
    if channels not in (None, model.image[0]):
        raise UsageError(
            f"`image_size` {options.image_size}: the network in {options.unet} takes {model.image[0]} channels; give "
            f"{size} alone"
        )
    return model


def _program(options: ModelOptions) -> DiffusionModel:
    refuse(options, "a program holds its weights and layout", *LAYOUT, "unet_weights")
    path = Path(options.unet or "")
    declared = declared_training(options)  # first: it needs no loading
    return declared_unet(exported_program(path), *declared, weights_sha256=sha256_of(path))


def _callable(options: ModelOptions) -> DiffusionModel:
    refuse(options, "a module:callable builds its own layout", *ATTENTION)
    if options.unet_prefix and options.unet_weights is None:
        raise UsageError("`unet_prefix` is of the names in `unet_weights`: give both, or neither")
    declared = declared_training(options)
    network = built(options.unet or "")
    if options.unet_weights is None:
        return declared_unet(network, *declared)
    state = read_state_dict(options.unet_weights, options.unet_prefix)
    network = load_into(network, state, str(options.unet_weights), prefix=options.unet_prefix)
    return declared_unet(network, *declared, weights_sha256=sha256_of(options.unet_weights))


TRAINING = ("schedule", "diffusion_steps", "timestep_scale", "beta_start", "beta_end", "prediction", "variance")
ATTENTION = ("num_heads", "num_head_channels", "attention_order")
LAYOUT = (*ATTENTION, "unet_prefix")
CLASSIFYING = (
    *("classifier_weights", "classifier_prefix", "labels", "pixel_range", "mean", "std"),
    *("channel_order", "resize", "interpolation", "antialias", "crop"),
)


def declared_training(
    options: ModelOptions,
) -> tuple[Image, Schedule, Prediction, Variance, tuple[float, float] | None]:
    """Return the declared training of a network that does not say it. Raises UsageError naming what is missing."""
    continuous = options.schedule == "continuous"
    needed = ["image_size", "schedule", "prediction"] + ([] if continuous else ["diffusion_steps"])
    missing = [f"`{name}`" for name in needed if getattr(options, name) is None]
    if missing:
        raise UsageError(f"{options.unet} does not say how it was trained: give {', '.join(missing)}")
    predictions: dict[str, Prediction] = {name: name for name in get_args(Prediction) if name != "none"}
    variances: dict[str, Variance] = {name: name for name in get_args(Variance)}
    names: dict[str, ScheduleName] = {name: name for name in get_args(ScheduleName)}
    variance = options.variance or "fixed_small"
    for parameter, value, known in (
        ("prediction", options.prediction, predictions),
        ("variance", variance, variances),
        ("schedule", options.schedule, names),
    ):
        if value not in known:
            raise UsageError(f"`{parameter}` {value} is not known: {', '.join(known)}")
    if continuous != (options.prediction == "denoiser"):
        raise UsageError(
            "`schedule` continuous and `prediction` denoiser belong together: a network that is told sigma in place of "
            "a timestep, and gives the clean image"
        )
    if continuous:
        timed = ("diffusion_steps", "timestep_scale", "beta_start", "beta_end")
        refuse(options, "`schedule` continuous has no timesteps", *timed)
    schedule = Schedule(
        names[options.schedule or ""],
        1 if continuous else steps_of(options.diffusion_steps or 0),
        *betas_of(options),
        timestep_scale=1.0 if options.timestep_scale is None else scale_of(options.timestep_scale),
    )
    image = whole_image(options, str(options.unet))
    return image, schedule, predictions[options.prediction or ""], variances[variance], clip_of(options.clip)


def steps_of(steps: int) -> int:
    if not 2 <= steps <= 100_000:
        raise UsageError(f"`diffusion_steps` {steps}: networks are trained with 2 to 100,000, mostly 1000")
    return steps


def betas_of(options: ModelOptions) -> tuple[float, float]:
    """The first and last beta of a declared schedule; those of Ho et al. 2020 for a linear one unless told."""
    start, end = options.beta_start, options.beta_end
    if options.schedule == "cosine":
        refuse(options, "a cosine schedule has its own betas", "beta_start", "beta_end")
    if start is None and end is None and options.schedule != "scaled_linear":
        return Schedule.beta_start, Schedule.beta_end
    if start is None or end is None or not 0 < start <= end < 1:
        raise UsageError(
            f"`beta_start` {start} `beta_end` {end}: give both, between 0 and 1, the smaller first, as the network was "
            f"trained; a {options.schedule} schedule is defined by them"
        )
    return start, end


def scale_of(scale: float) -> float:
    if not 0 < scale < math.inf:
        raise UsageError(f"`timestep_scale` {scale:g}: a number above 0, such as 1000 / T for a network of T timesteps")
    return scale


def clip_of(text: str | None) -> tuple[float, float] | None:
    """The range of --clip: "-1,1", or "none"."""
    if text is None:
        return CLIP
    if text == "none":
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"`clip` {text}: two numbers with a comma between, such as `clip`=-1,1, or none") from None
    if not -math.inf < low < high < math.inf:
        raise UsageError(f"`clip` {text}: the first number must be the smaller, both finite; none for no clip")
    return low, high


def image_of(text: str) -> tuple[int | None, int, int]:
    """--image-size: "32" is a square, "32x48" height and width, "3x32x48" has the channels too."""
    parts = text.split("x")
    if not 1 <= len(parts) <= 3 or not all(re.fullmatch(r"[1-9]\d{0,4}", part) for part in parts):
        raise UsageError(f"`image_size` {text}: 32, 32x48 (height, width) or 3x32x48 (channels first)")
    numbers = [int(part) for part in parts]
    if len(numbers) == 1:
        return None, numbers[0], numbers[0]
    return (numbers[0] if len(numbers) == 3 else None), numbers[-2], numbers[-1]


def whole_image(options: ModelOptions, what: str) -> Image:
    """[C, H, W]; three channels unless told."""
    if options.image_size is None:
        raise UsageError(f"{what} does not say the size of its images: give `image_size`, such as 3x32x32")
    channels, height, width = image_of(options.image_size)
    return channels or 3, height, width


def refuse_other_models(unet: DiffusionModel, classifier: ClassifierModel, bundle: Bundle) -> None:
    """Raise UsageError unless the bundle was exported from these two models, as they are declared."""
    prepared = classifier.preprocessing and json.loads(json.dumps(dataclasses.asdict(classifier.preprocessing)))
    pairs_of_models = (
        (bundle.unet_path, bundle.unet, unet, "unet"),
        (bundle.classifier_path, bundle.classifier, classifier, "classifier"),
    )
    others = [each for each in pairs_of_models if each[1].weights_sha256 != each[2].weights_sha256]
    if others:
        path, sidecar, model, _ = others[0]
        raise UsageError(
            f"{path} was exported from weights {sidecar.weights_sha256[:16]}..., the model that is given has "
            f"{model.weights_sha256[:16]}...: give {' and '.join(f'`{parameter}`' for *_, parameter in others)} as the "
            f"engine was exported, with the other options of that export, or `engine` an engine that was exported from "
            f"what is given"
        )
    for path, sidecar, model, _ in pairs_of_models:
        pairs = {name: (getattr(sidecar, name), getattr(model, name)) for name in DECLARED if hasattr(model, name)}
        if model is classifier:
            pairs["preprocessing"] = bundle.classifier.preprocessing, prepared
        for name, (exported, given) in pairs.items():
            if exported != given and not (name == "attention" and exported is None):  # of a sidecar that does not say
                raise UsageError(
                    f"{path} was exported with {name} {exported}, the model is given with {given}: repeat the "
                    f"options of the export"
                )
