"""Images in a fixed order, read one at a time, and what lies beside them."""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from densepure_rt import logs
from densepure_rt.errors import UsageError
from densepure_rt.images.changes import AS_IS, Preparation
from densepure_rt.images.formats import Pixels, Unreadable
from densepure_rt.json_files import STRICT, Count, Text
from densepure_rt.text import numbered, plural


@dataclass(frozen=True)
class LeftOut:
    """Files or folders of the images' source that are no images of the run. first: some of their names."""

    __pydantic_config__ = STRICT
    why: Text
    count: Count
    first: tuple[Text, ...]

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        return f"{self.why}: {self.count:,} ({', '.join(self.first)}{more})"


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """An image: `idx` numbers it in results, `pixels` is uint8 [C, H, W], `label` is None where it is not known.

    name: its file, relative to the source, and `FILE:POSITION` in a file of several; as whoever made it wrote it, and
    part of no hash. None for an image of no file.
    """

    idx: int
    pixels: Pixels
    label: int | None
    name: str | None = None

    def __repr__(self) -> str:
        named = "" if self.name is None else f", name={self.name!r}"
        shape = "x".join(map(str, self.pixels.shape))
        return f"LabelledImage(idx={self.idx}, pixels={self.pixels.dtype} {shape}, label={self.label}{named})"

    def __str__(self) -> str:
        return numbered(self.idx, self.name)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in a fixed order, read one at a time. `name` is what to print.

    left_out: what lies in the source beside its images. grey: positions of the grey images that are repeated to three
    channels for an engine of colour. name_at: the name of the image at a position; None where they have none. files:
    where each image is a file of its own. prepared: what is done to these. unreadable: why images could not be read
    when that was last tried, by their `idx`. unhashed: images that `sha256` takes for unreadable, whatever they are.
    """

    name: str
    indices: Sequence[int]
    labels: Sequence[int] | None
    read: Callable[[int], Pixels]  # position among all images of the source -> [C, H, W]
    positions: Sequence[int]  # those that belong to this set, into `indices`, `labels` and `read`
    left_out: tuple[LeftOut, ...] = ()
    grey: frozenset[int] = frozenset()
    name_at: Callable[[int], str] | None = None
    files: Sequence[Path] | None = None
    prepared: Preparation = AS_IS
    unreadable: dict[int, str] = field(default_factory=dict)
    unhashed: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.positions)

    def __repr__(self) -> str:
        return f"ImageSet({self.name!r}, {plural(len(self), 'image')}, {'labelled' if self.labelled else 'no labels'})"

    def __iter__(self) -> Iterator[LabelledImage]:
        for i in self.positions:
            yield self._image(i, np.ascontiguousarray(self.read(i)))

    def _image(self, i: int, pixels: Pixels) -> LabelledImage:
        label = None if self.labels is None else self.labels[i]
        return LabelledImage(self.indices[i], pixels, label, None if self.name_at is None else self.name_at(i))

    def readable(self) -> Iterator[LabelledImage]:
        """Yield the images whose files can be read; what is wrong with the others is logged, once, and kept."""
        for i in self.positions:
            if (pixels := self._try(i)) is not None:
                yield self._image(i, pixels)

    def _try(self, i: int) -> Pixels | None:
        """Read an image; None where its file cannot be read."""
        idx = self.indices[i]
        try:
            pixels = self.read(i)
        except Unreadable as fault:
            if idx not in self.unreadable:
                logs.say(f"image {idx} has failed: {fault}", logging.WARNING)
            self.unreadable[idx] = str(fault)
            return None
        self.unreadable.pop(idx, None)
        return np.ascontiguousarray(pixels)

    @property
    def order(self) -> list[int]:
        """The `idx` of each image."""
        return [self.indices[i] for i in self.positions]

    @property
    def names(self) -> dict[int, str]:
        """The name of each image that has one, by its `idx`."""
        return {} if self.name_at is None else {self.indices[i]: self.name_at(i) for i in self.positions}

    @property
    def repeated(self) -> int:
        """Count the grey images of this set that are repeated to three channels."""
        return sum(i in self.grey for i in self.positions) if self.grey else 0

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def select(self, skip: int = 1, limit: int | None = None) -> ImageSet:
        """Every `skip`-th image by position, at most `limit` of them."""
        if skip < 1 or (limit is not None and limit < 1):
            raise UsageError(f"`skip` {skip} and `limit` {limit} select no image: both must be 1 or more")
        return replace(self, positions=self.positions[::skip][:limit])

    def sha256(self) -> str:
        """Hash over idx, label (-1 where unknown), shape and pixels of each image, in order.

        An image that cannot be read has a shape of zeros.
        """
        digest = hashlib.sha256()
        for i in self.positions:
            idx, label = self.indices[i], -1 if self.labels is None else self.labels[i]
            pixels = None if idx in self.unhashed else self._try(i)
            digest.update(struct.pack("<5q", idx, label, *((0, 0, 0) if pixels is None else pixels.shape)))
            digest.update(b"" if pixels is None else pixels.tobytes())
        return digest.hexdigest()

    def hashed_as(self, unreadable: Iterable[int] | None) -> ImageSet:
        """Return the images with those left out of the hash that could not be read when a run of them began."""
        return replace(self, unhashed=frozenset(unreadable or ()))
