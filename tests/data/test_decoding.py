"""From files to pixels: 16 bits held against numpy, limits, and decoders that fail in every way."""

import importlib.util
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from convnext_deploy.data import decoding, jxl, masks


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


# JPEG XL --------------------------------------------------------------------------------------------------------------

# 7x5 pixels whose values are 0, 2, 4 ... 208, without loss, by libjxl (pillow-jxl-plugin 1.3.8).
JXL = bytes.fromhex(
    "ff0a2040100908000100a0004b28b06db48fc2ef282828090a0a0a1c1b1183252a706a8cd1313870811801ca8092ab3ae000c900"
)
BOXED = bytes.fromhex("0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20")  # what stands before the box


def boxed(kind: bytes, codestream: bytes) -> bytes:
    return BOXED + (8 + len(codestream)).to_bytes(4, "big") + kind + codestream


def large(side: int) -> bytes:
    """The head of a square codestream: no multiple of 8, 30 bits for a side, the ratio 1."""
    return b"\xff\x0a" + ((3 << 1) + ((side - 1) << 3) + (1 << 33)).to_bytes(6, "little") + bytes(8)


@pytest.mark.parametrize(
    "content", [JXL, boxed(b"jxlc", JXL), boxed(b"jxlp", bytes(4) + JXL)], ids=["bare", "in a box", "in parts"]
)
def test_a_jpeg_xl_file_says_its_size(content: bytes) -> None:
    assert jxl.sides(content) == (7, 5)
    assert all(jxl.sides(content[:length]) in (None, (7, 5)) for length in range(len(content)))


def test_a_large_jpeg_xl_file_is_refused_before_its_plugin_decodes_it() -> None:
    """The plugin decodes when it opens, so a file of few bytes could take all memory."""
    for content in (large(2**20), boxed(b"jxlc", large(2**20))):
        with pytest.raises(decoding.UnreadableImage, match="1048576x1048576 pixels; at most 67,108,864 are decoded"):
            decoding.decoded(content)


def test_jpeg_xl_is_read_with_its_plugin_and_refused_in_one_line_without() -> None:
    for content in (JXL, boxed(b"jxlc", JXL)):
        if importlib.util.find_spec("pillow_jxl") is None:
            with pytest.raises(
                decoding.UnreadableImage, match=r"^this Pillow does not read JXL; pip install 'pillow-jxl-plugin'$"
            ):
                decoding.decoded(content)
        else:
            assert np.array_equal(np.asarray(decoding.decoded(content)).ravel(), np.arange(0, 210, 2))


@pytest.mark.parametrize("orientation", [1, 6])  # 6: the sides are exchanged
@pytest.mark.parametrize("rows", [9, 8_388_608])
def test_a_tiff_without_all_its_strips_is_refused_and_not_filled_with_zeros(rows: int, orientation: int) -> None:
    file = io.BytesIO()
    Image.new("L", (7, 8), 3).save(file, "TIFF", tiffinfo={274: orientation})
    content = file.getvalue()
    assert sorted(decoding.decoded(content).size) == [7, 8]
    length = struct.pack("<HHI", 257, 4, 1)  # the tag of the height, a number of 32 bits
    if length not in content:
        length = struct.pack("<HHI", 257, 3, 1)
    place = content.index(length)
    damaged = content[:place] + struct.pack("<HHII", 257, 4, 1, rows) + content[place + 12 :]
    for read in (decoding.decoded, masks._numbers):
        with pytest.raises(decoding.UnreadableImage, match=r"its strips have 56 pixels of"):
            read(damaged)
