"""What a listed picture may cost its reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from densepure_rt.errors import UsageError
from densepure_rt.images.formats import MOST_SCANS, read_image, require_few_scans
from tests.support.pictures import SCAN, file_of, noise, scan_bomb


def test_a_jpeg_of_too_many_scans_is_refused_and_one_of_as_many_as_may_be_is_read(tmp_path: Path) -> None:
    (tmp_path / "many.jpg").write_bytes(scan_bomb(28, MOST_SCANS))
    (tmp_path / "bomb.jpg").write_bytes(scan_bomb(28, MOST_SCANS + 1))
    assert (read_image(tmp_path / "many.jpg", (1, 28, 28)) == 128).all()
    with pytest.raises(UsageError, match=r"bomb.jpg has more than 100 scans, .*: save it anew"):
        read_image(tmp_path / "bomb.jpg", (1, 28, 28))


def test_only_scans_are_counted() -> None:
    """Neither what stands in a camera's own segment, nor the film that a telephone puts behind a picture."""
    film = SCAN * 10 * MOST_SCANS
    exif = Image.Exif()
    exif[0x927C] = film[:60_000]
    for content in (
        file_of(Image.fromarray(noise(64, 64, 3)), "JPEG", exif=exif),
        file_of(Image.fromarray(noise(64, 64, 3)), "JPEG", quality=100, progressive=True) + film,
        file_of(Image.fromarray(noise(64, 64, 3))) + film,
        film,
    ):
        assert content.count(SCAN) > MOST_SCANS
        require_few_scans(content, "it")


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 5, 20, 300, -1])
def test_the_scans_of_a_file_that_is_cut_short_are_counted_too(cut: int) -> None:
    require_few_scans(scan_bomb(28, MOST_SCANS)[:cut], "it")
