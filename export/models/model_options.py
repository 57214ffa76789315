"""Which PyTorch models a command is about: the options that `export`, `parity` and `bench` share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

of_unet, of_classifier = (partial(typer.Option, rich_help_panel=panel) for panel in ("UNet", "Classifier"))


@dataclass(frozen=True)
class Options:
    """A field for each option, named as the option is."""

    def given(self) -> dict[str, str]:
        """The fields that are not as they are by default, and each as a message names it."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {
            option.name: f"`{option.name}`" + ("=False" if values[option.name] is False else "")
            for option in fields(self)
            if values[option.name] != option.default
        }


@dataclass(frozen=True)
class ModelOptions(Options):
    """The two models as they were asked for."""

    unet: Annotated[
        str | None,
        of_unet(
            help="Checkpoint in OpenAI's layout (.pt, .safetensors), diffusers folder, program (.pt2), "
            "module:callable, or none for plain smoothing. Default: the shipped model."
        ),
    ] = None
    unet_weights: Annotated[Path | None, of_unet(help="State dict for a module:callable.")] = None
    unet_prefix: Annotated[str, of_unet(help="Load only the tensors whose names start with this, such as model.")] = ""
    image_size: Annotated[
        str | None, of_unet(help="Image size if the network does not say it: 32, or 3x32x48 (channels first).")
    ] = None
    num_heads: Annotated[int | None, of_unet(help="Number of attention heads at every width.")] = None
    num_head_channels: Annotated[int | None, of_unet(help="Channels per attention head, instead of --num-heads.")] = (
        None
    )
    attention_order: Annotated[
        str | None,
        of_unet(help="Order of the attention channels: legacy, or new for guided-diffusion's use_new_attention_order."),
    ] = None
    schedule: Annotated[
        str | None,
        of_unet(help="Noise schedule: linear, scaled_linear, cosine, or continuous for a network that takes sigma."),
    ] = None
    diffusion_steps: Annotated[int | None, of_unet(help="Number of timesteps of the training.")] = None
    beta_start: Annotated[float | None, of_unet(help="First beta of a linear schedule. Default: 0.0001.")] = None
    beta_end: Annotated[float | None, of_unet(help="Last beta of a linear schedule. Default: 0.02.")] = None
    timestep_scale: Annotated[
        float | None, of_unet(help="Factor by which timesteps are multiplied before the network gets them.")
    ] = None
    prediction: Annotated[str | None, of_unet(help="What the network predicts: epsilon, v, x0 or denoiser.")] = None
    variance: Annotated[
        str | None,
        of_unet(
            help="Variance of a reverse step: fixed_small, fixed_large, learned_range, learned, or renoised for "
            "consistency models."
        ),
    ] = None
    clip: Annotated[str | None, of_unet(help="Range to clip x0 to, or none.")] = None
    timestep_rule: Annotated[
        str,
        of_unet(
            help="Rule that maps sigma to a timestep: nearest, or as published densepure or carlini. The default "
            "of later runs."
        ),
    ] = "nearest"
    classifier: Annotated[
        str | None,
        of_classifier(
            help="timm:NAME, transformers folder, program (.pt2), .onnx file or module:callable. Default: the "
            "shipped classifier."
        ),
    ] = None
    classifier_weights: Annotated[Path | None, of_classifier(help="State dict for timm:NAME or a module:callable.")] = (
        None
    )
    classifier_prefix: Annotated[str, of_classifier(help="Load only the tensors whose names start with this.")] = ""
    labels: Annotated[Path | None, of_classifier(help="File of class names, one per line.")] = None
    pixel_range: Annotated[
        str | None, of_classifier(help="Range of the pixels that it was trained on: 0,1 or 0,255 or -1,1.")
    ] = None
    mean: Annotated[str | None, of_classifier(help="Mean to subtract per channel, in the units of --pixel-range.")] = (
        None
    )
    std: Annotated[str | None, of_classifier(help="Standard deviation to divide by per channel.")] = None
    channel_order: Annotated[str | None, of_classifier(help="Order of the channels: RGB, BGR or grey.")] = None
    resize: Annotated[str | None, of_classifier(help="Size to resize to, HEIGHTxWIDTH.")] = None
    interpolation: Annotated[
        str | None, of_classifier(help="Interpolation of --resize: bicubic, bilinear or nearest.")
    ] = None
    antialias: Annotated[
        bool | None, of_classifier("--antialias/--no-antialias", help="Antialias when --resize shrinks.")
    ] = None
    crop: Annotated[str | None, of_classifier(help="Size of the centre crop after the resize, HEIGHTxWIDTH.")] = None
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the shipped model's unet.safetensors and classifier.safetensors, after new training."
        ),
    ] = None
