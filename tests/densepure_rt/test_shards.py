from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densepure_rt.datasets import open_images
from densepure_rt.errors import UsageError
from densepure_rt.shards import Shard

OF = st.integers(1, 40)


@given(OF, st.integers(0, 200))
def test_every_image_is_in_one_shard(of: int, images: int) -> None:
    shards = [Shard(number, of) for number in range(1, of + 1)]
    places = sorted(place for shard in shards for place in shard.places(images))
    assert places == list(range(images))
    assert [shard.size(images) for shard in shards] == [len(shard.places(images)) for shard in shards]
    assert max(shard.size(images) for shard in shards) - min(shard.size(images) for shard in shards) <= 1


def test_a_count_beyond_what_a_range_may_be_long_has_a_size_too() -> None:
    assert Shard(1, 3).size(3 * 10**30 + 1) == 10**30 + 1


@given(OF, st.data())
def test_a_shard_is_written_as_it_is_read(of: int, data: st.DataObject) -> None:
    shard = Shard(data.draw(st.integers(1, of)), of)
    assert Shard.parsed(str(shard)) == shard


@pytest.mark.parametrize(
    "text", ["", "2", "0/8", "9/8", "-1/8", "02/8", "2/08", "2 / 8", "2/8\n", "2/8/8", "a/b", "²/8"]
)
def test_what_is_no_shard_is_refused_with_one_that_is(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{text!r} is no shard")) as refused:
        Shard.parsed(text)
    assert "such as 2/8" in str(refused.value)


def test_a_shard_of_a_selection_has_every_nth_of_its_images() -> None:
    images = open_images(None, (1, 28, 28), [str(label) for label in range(10)]).select(3, 8)
    assert Shard(2, 3).select(images).order == images.order[1::3]
    assert [image.idx for image in Shard(2, 3).select(images)] == images.order[1::3]
    assert Shard(9, 9).select(images).order == []
