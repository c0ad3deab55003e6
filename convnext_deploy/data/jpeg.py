"""JPEG files: the size by the head alone, and pixels without Pillow, where simplejpeg decodes the same ones sooner."""

import functools
import importlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PHOTOGRAPH = Path(__file__).parent / "images" / "coffee.jpg"  # one of those that come with the package
_KINDS = {"YCbCr": "RGB", "Gray": "GRAY"}  # of files, and what their pixels are; others have more than one reading

_START, _SCAN, _BASELINE = b"\xff\xd8", 0xDA, 0xC0
# Segments that may stand before the scan: applications' (E0 to EF), comments, tables, the restart interval.
_SKIPPED = frozenset((*range(0xE0, 0xF0), 0xFE, 0xDB, 0xC4, 0xDD))


def baseline_sides(content: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels of a baseline JPEG of one scan, whose decoding takes a time in proportion to them.

    A scan of some components may be followed by any number of others, each as long as the first.

    None: it is none, or its head has what is not looked at here. That says nothing of whether it can be read.
    """
    if not content.startswith(_START):
        return None
    place, sides, components = len(_START), None, 0
    while place + 10 <= len(content) and content[place] == 0xFF:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        if marker == _SCAN:
            return sides if content[place + 4] == components else None
        if marker == _BASELINE and sides is None:
            height, width = (int.from_bytes(content[place + at : place + at + 2], "big") for at in (5, 7))
            sides, components = (width, height), content[place + 9]
        elif marker not in _SKIPPED:
            return None
        place += 2 + max(2, length)
    return None


def pixels(content: bytes) -> NDArray[np.uint8] | None:
    """(H, W, 3) of RGB or (H, W) of grey, as Pillow decodes a baseline JPEG, which `content` is.

    None: it is for Pillow to say what the file is. It is damaged, of other colours, or simplejpeg is not there.
    """
    decoder = _decoder()
    if decoder is None:
        return None
    try:
        kind = _KINDS.get(decoder.decode_jpeg_header(content)[2])
        return None if kind is None else _decoded(decoder, content, kind)
    except ValueError:
        return None


def _decoded(decoder: Any, content: bytes, kind: str) -> NDArray[np.uint8]:
    decoded: NDArray[np.uint8] = decoder.decode_jpeg(content, kind)
    return decoded[..., 0] if kind == "GRAY" else decoded


@functools.cache
def _decoder() -> Any:
    """simplejpeg; None: it is not installed, or its libjpeg-turbo decodes other pixels than Pillow's."""
    if importlib.util.find_spec("simplejpeg") is None:
        return None
    decoder, content = importlib.import_module("simplejpeg"), PHOTOGRAPH.read_bytes()
    return decoder if all(_is_alike(decoder, file) for file in (content, *_in_other_ways(content))) else None


def _is_alike(decoder: Any, content: bytes) -> bool:
    with Image.open(io.BytesIO(content)) as image:
        return np.array_equal(_decoded(decoder, content, _KINDS["YCbCr"]), np.asarray(image))


def _in_other_ways(content: bytes) -> Iterator[bytes]:
    """A part of a photograph with each way to store colours: as fine as grey, half as wide, a quarter."""
    with Image.open(io.BytesIO(content)) as image:
        part = image.crop((0, 0, 61, 47))
    for subsampling in (0, 1, 2):
        file = io.BytesIO()
        part.save(file, "JPEG", subsampling=subsampling)
        yield file.getvalue()
