"""A part of a run that another process certifies: shard i/n has every n-th image, from the i-th on."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from densepure_rt.errors import UsageError

if TYPE_CHECKING:
    from densepure_rt.images.datasets import ImageSet

PATTERN = "^[1-9][0-9]{0,8}/[1-9][0-9]{0,8}$"


@dataclass(frozen=True)
class Shard:
    """number: from 1 to `of`, how many there are. With more shards than images the last ones have none."""

    number: int
    of: int

    @classmethod
    def parsed(cls, text: str) -> Shard:
        """Parse a shard such as 2/8. Raises UsageError for any other text."""
        if re.fullmatch(PATTERN, text):
            number, of = map(int, text.split("/"))
            if number <= of:
                return cls(number, of)
        raise UsageError(f"{text!r} is no shard: ask for one of n by its number from 1 to n, such as 2/8")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def places(self, images: int) -> range:
        """Return the places of its images, from 0, among all of a run."""
        return range(self.number - 1, images, self.of)

    def size(self, images: int) -> int:
        """Count its images among all; of any count, where a range has a length up to 2^63 alone."""
        return (images - self.number) // self.of + 1

    def select(self, images: ImageSet) -> ImageSet:
        """Its images, of all that a run is over."""
        return replace(images, positions=images.positions[self.number - 1 :: self.of])
