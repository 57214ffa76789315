"""Which PyTorch models a command is about: the options that `export`, `parity` and `bench` share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

UNET, CLASSIFIER = "UNet", "Classifier"  # the panels of --help


@dataclass(frozen=True)
class ModelOptions:
    """The two models as they were asked for; a field for each option, named as the option is."""

    unet: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint in OpenAI's layout (.pt, .safetensors), diffusers folder, program (.pt2), "
            "module:callable, or none for plain smoothing; default: the model that ships.",
            rich_help_panel=UNET,
        ),
    ] = None
    unet_weights: Annotated[
        Path | None, typer.Option(help="State dict for a module:callable.", rich_help_panel=UNET)
    ] = None
    unet_prefix: Annotated[
        str, typer.Option(help="Take the names in the file that start so, such as model.", rich_help_panel=UNET)
    ] = ""
    image_size: Annotated[
        str | None,
        typer.Option(help="Where the network does not say: 32, 3x32x48 (channels first).", rich_help_panel=UNET),
    ] = None
    num_heads: Annotated[int | None, typer.Option(help="Attention heads at every width.", rich_help_panel=UNET)] = None
    num_head_channels: Annotated[
        int | None, typer.Option(help="Channels of an attention head, in its place.", rich_help_panel=UNET)
    ] = None
    attention_order: Annotated[
        str | None,
        typer.Option(
            help="legacy, or new where it was trained with guided-diffusion's use_new_attention_order.",
            rich_help_panel=UNET,
        ),
    ] = None
    schedule: Annotated[
        str | None,
        typer.Option(
            help="linear, scaled_linear, cosine, or continuous for a network that is told sigma.", rich_help_panel=UNET
        ),
    ] = None
    diffusion_steps: Annotated[
        int | None, typer.Option(help="Timesteps that it was trained with.", rich_help_panel=UNET)
    ] = None
    beta_start: Annotated[
        float | None,
        typer.Option(help="First beta of a linear schedule, 0.0001 unless told.", rich_help_panel=UNET),
    ] = None
    beta_end: Annotated[float | None, typer.Option(help="Last beta of it, 0.02 unless told.", rich_help_panel=UNET)] = (
        None
    )
    timestep_scale: Annotated[
        float | None, typer.Option(help="It is told timestep times this.", rich_help_panel=UNET)
    ] = None
    prediction: Annotated[
        str | None, typer.Option(help="What it gives: epsilon, v, x0 or denoiser.", rich_help_panel=UNET)
    ] = None
    variance: Annotated[
        str | None,
        typer.Option(
            help="fixed_small, fixed_large, learned_range, learned, or renoised for consistency models.",
            rich_help_panel=UNET,
        ),
    ] = None
    clip: Annotated[str | None, typer.Option(help="Range that x0 is clipped to, or none.", rich_help_panel=UNET)] = None
    timestep_rule: Annotated[
        str,
        typer.Option(
            help="nearest, or as published: densepure, carlini. Runs follow it unless told otherwise.",
            rich_help_panel=UNET,
        ),
    ] = "nearest"
    classifier: Annotated[
        str | None,
        typer.Option(
            help="timm:NAME, transformers folder, program (.pt2), .onnx file or module:callable; default: the one that "
            "ships.",
            rich_help_panel=CLASSIFIER,
        ),
    ] = None
    classifier_weights: Annotated[
        Path | None, typer.Option(help="State dict for timm:NAME or a module:callable.", rich_help_panel=CLASSIFIER)
    ] = None
    classifier_prefix: Annotated[
        str, typer.Option(help="Take the names in that file that start so.", rich_help_panel=CLASSIFIER)
    ] = ""
    labels: Annotated[Path | None, typer.Option(help="Class names, one a line.", rich_help_panel=CLASSIFIER)] = None
    pixel_range: Annotated[
        str | None,
        typer.Option(help="Pixels that it was trained on: 0,1 or 0,255 or -1,1.", rich_help_panel=CLASSIFIER),
    ] = None
    mean: Annotated[
        str | None, typer.Option(help="Subtracted, in that range, for each channel.", rich_help_panel=CLASSIFIER)
    ] = None
    std: Annotated[str | None, typer.Option(help="Divided by.", rich_help_panel=CLASSIFIER)] = None
    channel_order: Annotated[str | None, typer.Option(help="RGB, BGR or grey.", rich_help_panel=CLASSIFIER)] = None
    resize: Annotated[str | None, typer.Option(help="What it takes, HEIGHTxWIDTH.", rich_help_panel=CLASSIFIER)] = None
    interpolation: Annotated[
        str | None, typer.Option(help="bicubic, bilinear or nearest.", rich_help_panel=CLASSIFIER)
    ] = None
    antialias: Annotated[
        bool | None, typer.Option("--antialias/--no-antialias", help="Of --resize.", rich_help_panel=CLASSIFIER)
    ] = None
    crop: Annotated[
        str | None, typer.Option(help="Centre crop after the resize, HEIGHTxWIDTH.", rich_help_panel=CLASSIFIER)
    ] = None
    weights: Annotated[
        Path | None,
        typer.Option(help="Folder of the shipped model's unet.safetensors and classifier.safetensors, trained anew."),
    ] = None

    def given(self) -> dict[str, str]:
        """The fields that are not as they are by default, and each as a message names it."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {
            option.name: f"`{option.name}`" + ("=False" if values[option.name] is False else "")
            for option in fields(self)
            if values[option.name] != option.default
        }
