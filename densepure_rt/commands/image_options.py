"""The options that say which images, and what is done to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from densepure_rt.commands.groups import TypedOptions, Value, as_plain
from densepure_rt.commands.options import IMAGES
from densepure_rt.errors import UsageError

if TYPE_CHECKING:
    from densepure_rt.images.changes import Fit
    from densepure_rt.images.datasets import ImageSet
    from densepure_rt.smoothing.classifier import SmoothedClassifier

SHIPPED_MAX = 25  # of the 500 shipped images, so that a plain `certify` ends within 10 minutes on 2 cores


@dataclass(frozen=True)
class ImageOptions(TypedOptions):
    """Which images."""

    images: Annotated[
        Path | None,
        typer.Option(
            help="Images of one split: a folder of class folders, a folder with labels.csv (file,label), loose "
            "images, .npz (x, y), IDX or CIFAR-10 .bin. Default: the shipped Fashion-MNIST test images.",
            rich_help_panel=IMAGES,
        ),
    ] = None
    skip: Annotated[int, typer.Option(help="Take only every SKIP-th image.", rich_help_panel=IMAGES)] = 1
    limit: Annotated[
        int | None,
        typer.Option(
            "--max", help=f"Number of images. Default: all; of the shipped ones {SHIPPED_MAX}.", rich_help_panel=IMAGES
        ),
    ] = None

    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[IMAGE]...", help="Image files, instead of --images.", show_default=False),
    ] = None
    fit: Annotated[
        str | None,
        typer.Option(
            help="Fit image files to the engine's size: crop, resize or pad. The radius is in pixels of the fitted "
            "image.",
            rich_help_panel=IMAGES,
        ),
    ] = None
    convert: Annotated[
        bool,
        typer.Option(
            "--convert",
            help="Convert image files: transparent ones onto --background, grey to colour, colour to grey, 16 bits "
            "to 8. The radius is in pixels of the converted image.",
            rich_help_panel=IMAGES,
        ),
    ] = False
    background: Annotated[str, typer.Option(help="Colour for --convert and --fit pad.", rich_help_panel=IMAGES)] = (
        "white"
    )
    labels: Annotated[
        Path | None,
        typer.Option(
            help="File of class names, one per line, instead of those in the classifier's sidecar.",
            rich_help_panel=IMAGES,
        ),
    ] = None
    labels_csv: Annotated[
        Path | None,
        typer.Option(
            help="CSV table file,label with the labels of the images. Files are relative to --images, or as given "
            "as arguments.",
            rich_help_panel=IMAGES,
        ),
    ] = None

    def kept(self) -> dict[str, Value]:
        """Return what a run keeps of one image file that was named without an option; several are named again."""
        return {"images": as_plain(self.files[0])} if self.files and len(self.files) == 1 else {}

    def open(self, smoothed: SmoothedClassifier) -> ImageSet:
        """Open the images that are asked for, of the size and with the class names of the engines.

        The classifier takes the class names of --labels.
        """
        from densepure_rt.images.changes import Preparation
        from densepure_rt.images.datasets import open_images
        from densepure_rt.runtime.bundle import read_class_names

        if self.files and "images" in self.typed:
            raise UsageError("image files and --images were named: give one of them")
        if self.labels is not None:
            smoothed.name_classes(read_class_names(self.labels, len(smoothed.class_names)))
        how = Preparation(cast("Fit | None", self.fit), self.convert, self.background)
        if "background" in self.typed and not (self.convert or self.fit == "pad"):
            raise UsageError("--background is of --convert and of --fit pad: ask for one of them")
        path = self.files or self.images
        limit = SHIPPED_MAX if path is None and self.limit is None else self.limit
        found = open_images(path, smoothed.bundle.unet.image, smoothed.class_names, how, self.labels_csv)
        return found.select(self.skip, limit)
