"""Cut the shipped images out of Fashion-MNIST: `python -m densepure_rt.export.zoo.make_data`.

Writes 500 test images (every 20th, the protocol of the DensePure paper) and 128 training images for calibration.
Running it again writes the same bytes: numpy gives every member of an .npz the same fixed date.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from densepure_rt.images.datasets import open_images

SHAPE = (1, 28, 28)
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)  # Fashion-MNIST, README of zalandoresearch/fashion-mnist
# file name -> (split, every so many images, how many)
CUTS = {
    "fashion_mnist_test.npz": ("t10k", 20, 500),
    "fashion_mnist_calibration.npz": ("train", 468, 128),
}


def main(
    source: Annotated[
        Path,
        typer.Option(help="Folder of the IDX files; the default is where Debian's dataset-fashion-mnist puts them."),
    ] = Path("/usr/share/datasets/fashion-mnist"),
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("densepure_rt/data"),
) -> None:
    """Write the images that ship with the package."""
    for name, (split, every, count) in CUTS.items():
        images = open_images(source / f"{split}-images-idx3-ubyte.gz", SHAPE, [str(label) for label in range(10)])
        cut = list(images.select(every, count))
        np.savez_compressed(
            out / name,
            x=np.stack([image.pixels.transpose(1, 2, 0) for image in cut]),
            y=np.array([image.label for image in cut], np.uint8),
            index=np.array([image.idx for image in cut], np.int64),
        )
        typer.echo(f"{out / name}: {len(cut)} images, {(out / name).stat().st_size} bytes")


if __name__ == "__main__":
    typer.run(main)
