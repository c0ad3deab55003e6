"""A JPEG's size by its head, and pixels that are Pillow's."""

import io

import numpy as np
import pytest
from PIL import Image

from convnext_deploy.data import decoding, jpeg


def jpeg_file(width: int, height: int, mode: str = "RGB", **options: object) -> bytes:
    noise = np.random.default_rng(width).integers(0, 256, (5, 7, 3), np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    image.save(file, "JPEG", **options)
    return file.getvalue()


def test_a_baseline_jpeg_says_its_size_and_nothing_else_does() -> None:
    content = jpeg_file(70, 51, exif=Image.Exif(), comment=b"FF C0 \xff\xc0")
    assert jpeg.baseline_sides(content) == (70, 51)
    scan = content.index(b"\xff\xda")
    assert {jpeg.baseline_sides(content[:length]) for length in range(scan)} == {None}
    assert jpeg.baseline_sides(jpeg_file(70, 51, progressive=True)) is None
    frame = content[content.index(b"\xff\xc0", content.index(b"\xff\xfe") + 20) :][:19]
    assert jpeg.baseline_sides(content[:scan] + frame + content[scan:]) is None  # two sizes
    for other in (b"", b"\xff\xd8", b"\x89PNG\r\n", b"\xff\xd8" + b"\xff\xe0\0\0" * 1000, content[2:]):
        assert jpeg.baseline_sides(other) is None


def test_a_jpeg_that_may_have_any_number_of_scans_does_not_say_its_size() -> None:
    content = jpeg_file(70, 51)
    scan = content.index(b"\xff\xda")
    assert content[scan + 4] == 3
    one = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"  # of the first component alone; each may come thousands of times
    assert jpeg.baseline_sides(content[:scan] + one + content[scan:]) is None


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (8, 16), (33, 47), (250, 131)])
def test_pixels_are_pillows(mode: str, subsampling: int, width: int, height: int) -> None:
    pytest.importorskip("simplejpeg", reason="the extra serve is not installed")
    content = jpeg_file(width, height, mode, subsampling=subsampling, quality=60)
    pixels = decoding.photograph(content)
    if mode == "CMYK":  # Pillow knows who inverts it
        assert pixels is None
        return
    assert pixels is not None
    np.testing.assert_array_equal(pixels, np.asarray(decoding.decoded(content)))


def test_what_is_damaged_is_pillows_to_judge() -> None:
    content = jpeg_file(80, 60)
    for damaged in (content[: len(content) // 2], content[:-2]):
        assert decoding.photograph(damaged) is None


def test_a_large_jpeg_is_refused_by_its_head() -> None:
    with pytest.raises(decoding.UnreadableImage, match="80x60 pixels; at most 4,799 are decoded"):
        decoding.photograph(jpeg_file(80, 60), 4799)


def test_another_decoder_than_pillows_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg", reason="the extra serve is not installed")
    jpeg._decoder.cache_clear()
    monkeypatch.setattr(jpeg, "_decoded", lambda *_: np.zeros((288, 432, 3), np.uint8))
    assert jpeg._decoder() is None
    jpeg._decoder.cache_clear()
