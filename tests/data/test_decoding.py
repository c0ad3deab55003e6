"""From files to pixels: 16 bits held against numpy, limits, and decoders that fail in every way."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from convnext_deploy.data import decoding


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """Written by hand, so that what is in it is known."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_every_grey_of_16_bits_is_divided_by_257_and_rounded() -> None:
    values = np.arange(65536, dtype=np.uint32).reshape(256, 256)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    image = decoding.decoded(png(256, 256, rows, depth=16))
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), np.rint(values / 257.0).astype(np.uint8))
    tiff = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(tiff, "TIFF")
    for file in (tiff.getvalue(), b"P5 256 256 65535 " + values.astype(">u2").tobytes()):
        np.testing.assert_array_equal(np.asarray(decoding.decoded(file)), np.asarray(image))


def test_colours_of_16_bits_are_within_one_of_it() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (9, 7, 3))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    image = decoding.decoded(png(7, 9, rows, depth=16, colour=2))
    assert np.abs(np.asarray(image).astype(int) - np.rint(values / 257)).max() <= 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_have_no_known_white(mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (4, 4), 300).save(file, "TIFF")
    with pytest.raises(OSError, match=rf"32 bits \(mode {mode}\) have no known white; convert it to 8 bits"):
        decoding.decoded(file.getvalue())


@pytest.mark.parametrize(
    ("width", "height"),
    [(13_000, 13_000), (40_000, 25_000), (2**31 - 1, 2**31 - 1), (8193, 8192)],
    ids=["found", "10^9", "largest", "one column past the limit"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_more_pixels_than_the_limit_are_refused_before_they_are_decoded(width: int, height: int) -> None:
    content = png(width, height, bytes(1000))
    tracemalloc.start()
    with pytest.raises(OSError, match=r"pixels; at most 67,108,864 are decoded|decompression bomb"):
        decoding.decoded(content)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    "error", [NotImplementedError, RuntimeError, AttributeError, MemoryError, RecursionError, AssertionError, OSError]
)
def test_whatever_a_decoder_raises_is_one_line_about_that_image(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def load(self: object) -> None:
        raise error("two\nlines")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(decoding.UnreadableImage, match=r"^it cannot be decoded: \w+( \w+)+$"):
        decoding.decoded(png(1, 1, b"\0\0"))


@pytest.mark.parametrize("format", ["ICO", "DDS", "SPIDER", "EPS"])
def test_formats_that_no_photograph_has_are_not_decoded(format: str) -> None:
    file = io.BytesIO()
    Image.new("F" if format == "SPIDER" else "RGB", (16, 16)).save(file, format)
    with pytest.raises(OSError, match="not an image in a format that is read here"):
        decoding.decoded(file.getvalue())
