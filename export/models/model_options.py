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
            "module:callable, or none for plain smoothing; default: the model that ships."
        ),
    ] = None
    unet_weights: Annotated[Path | None, of_unet(help="State dict for a module:callable.")] = None
    unet_prefix: Annotated[str, of_unet(help="Take the names in the file that start so, such as model.")] = ""
    image_size: Annotated[str | None, of_unet(help="Where the network does not say: 32, 3x32x48 (channels first).")] = (
        None
    )
    num_heads: Annotated[int | None, of_unet(help="Attention heads at every width.")] = None
    num_head_channels: Annotated[int | None, of_unet(help="Channels of an attention head, in its place.")] = None
    attention_order: Annotated[
        str | None, of_unet(help="legacy, or new where it was trained with guided-diffusion's use_new_attention_order.")
    ] = None
    schedule: Annotated[
        str | None, of_unet(help="linear, scaled_linear, cosine, or continuous for a network that is told sigma.")
    ] = None
    diffusion_steps: Annotated[int | None, of_unet(help="Timesteps that it was trained with.")] = None
    beta_start: Annotated[float | None, of_unet(help="First beta of a linear schedule, 0.0001 unless told.")] = None
    beta_end: Annotated[float | None, of_unet(help="Last beta of it, 0.02 unless told.")] = None
    timestep_scale: Annotated[float | None, of_unet(help="It is told timestep times this.")] = None
    prediction: Annotated[str | None, of_unet(help="What it gives: epsilon, v, x0 or denoiser.")] = None
    variance: Annotated[
        str | None,
        of_unet(help="fixed_small, fixed_large, learned_range, learned, or renoised for consistency models."),
    ] = None
    clip: Annotated[str | None, of_unet(help="Range that x0 is clipped to, or none.")] = None
    timestep_rule: Annotated[
        str, of_unet(help="nearest, or as published: densepure, carlini. Runs follow it unless told otherwise.")
    ] = "nearest"
    classifier: Annotated[
        str | None,
        of_classifier(
            help="timm:NAME, transformers folder, program (.pt2), .onnx file or module:callable; default: the one that "
            "ships."
        ),
    ] = None
    classifier_weights: Annotated[Path | None, of_classifier(help="State dict for timm:NAME or a module:callable.")] = (
        None
    )
    classifier_prefix: Annotated[str, of_classifier(help="Take the names in that file that start so.")] = ""
    labels: Annotated[Path | None, of_classifier(help="Class names, one a line.")] = None
    pixel_range: Annotated[str | None, of_classifier(help="Pixels that it was trained on: 0,1 or 0,255 or -1,1.")] = (
        None
    )
    mean: Annotated[str | None, of_classifier(help="Subtracted, in that range, for each channel.")] = None
    std: Annotated[str | None, of_classifier(help="Divided by.")] = None
    channel_order: Annotated[str | None, of_classifier(help="RGB, BGR or grey.")] = None
    resize: Annotated[str | None, of_classifier(help="What it takes, HEIGHTxWIDTH.")] = None
    interpolation: Annotated[str | None, of_classifier(help="bicubic, bilinear or nearest.")] = None
    antialias: Annotated[bool | None, of_classifier("--antialias/--no-antialias", help="Of --resize.")] = None
    crop: Annotated[str | None, of_classifier(help="Centre crop after the resize, HEIGHTxWIDTH.")] = None
    weights: Annotated[
        Path | None,
        typer.Option(help="Folder of the shipped model's unet.safetensors and classifier.safetensors, trained anew."),
    ] = None
