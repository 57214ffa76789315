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
            help="One split: folder of class folders, folder with labels.csv (file,label), images, .npz (x, y), IDX or "
            "CIFAR-10 .bin; default: the shipped Fashion-MNIST test images.",
            rich_help_panel=IMAGES,
        ),
    ] = None
    skip: Annotated[int, typer.Option(help="Take every SKIP-th image.", rich_help_panel=IMAGES)] = 1
    limit: Annotated[
        int | None,
        typer.Option(
            "--max", help=f"How many images; default: all, {SHIPPED_MAX} of the shipped ones.", rich_help_panel=IMAGES
        ),
    ] = None

    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[IMAGE]...", help="Image files, in place of --images.", show_default=False),
    ] = None
    fit: Annotated[
        str | None,
        typer.Option(
            help="Bring image files to the engine's size: crop, resize, pad. The radius is that of the changed image.",
            rich_help_panel=IMAGES,
        ),
    ] = None
    convert: Annotated[
        bool,
        typer.Option(
            "--convert",
            help="Lay transparent images on --background, turn grey to colour and colour to grey, 16 bits to 8. The "
            "radius is that of the changed image.",
            rich_help_panel=IMAGES,
        ),
    ] = False
    background: Annotated[str, typer.Option(help="A colour for --convert and --fit pad.", rich_help_panel=IMAGES)] = (
        "white"
    )
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Class names, one a line, in place of those of the classifier's export.", rich_help_panel=IMAGES
        ),
    ] = None
    labels_csv: Annotated[
        Path | None,
        typer.Option(
            help="Table file,label of the images, its files relative to --images, or as they are named.",
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
