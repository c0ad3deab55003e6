"""From the bytes of an image file to 8-bit pixels, within limits."""

import errno
import functools
import importlib
import importlib.util
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..errors import plain
from ..records.base import MAX_SIDE
from . import jpeg, jxl

# Decoding takes up to 8 bytes a pixel in each thread: half a GB at this limit.
MAX_PIXELS = MAX_SIDE**2
# Filters of Pillow and of the native engine take up to 48 bytes for each pixel of a side, whatever the result is.
MAX_RESIZED_SIDE = 2**20

# Pillow opens many formats more, among them EPS, for which it starts Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "JXL", "PNG", "PPM", "TIFF", "WEBP")

# Formats that Pillow reads with a package of their own, or does from some release on, and how their files begin.
_WITH_PACKAGE = {
    "JXL": ("pillow_jxl", "pillow-jxl-plugin", (jxl.CODESTREAM, jxl.CONTAINER)),
    "AVIF": ("pillow_avif", "pillow>=11.3", (b"\x00\x00\x00\x1cftypavif", b"\x00\x00\x00\x20ftypavif")),
}  # fmt: skip
_ORIENTATION = 0x0112  # of EXIF

# Of a file that is missing, forbidden, or a link that leads nowhere; a failing disk has other numbers.
_OF_THE_FILE = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENXIO
}  # fmt: skip


class UnreadableImage(OSError):
    """One image that cannot be read or decoded; the others of its source are not concerned."""


def is_of_the_file(error: OSError) -> bool:
    return error.errno in _OF_THE_FILE


def decoded(content: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Decode an encoded image; 16 bits a channel become 8.

    Grey images of 16 bits are divided by 257 and rounded, so that black stays 0 and white becomes 255. Pillow itself
    would cut them off at 255. Colour images of 16 bits are Pillow's own: it keeps the upper eight bits.

    Raises:
        UnreadableImage: empty, none of `formats`, damaged, of more than `max_pixels`, or of a pixel type without a
            known white. One line, and always the same one for the same bytes.
    """
    if not content:
        raise UnreadableImage("the file is empty")
    try:
        if "JXL" in formats and (sides := jxl.sides(content)) is not None:
            refuse_many(*sides, max_pixels)  # its plugin decodes as soon as it opens
        image = Image.open(io.BytesIO(content), formats=_built_in(formats))
        refuse_many(image.width, image.height, max_pixels)
        refuse_incomplete(image)
        image.load()
        refuse_many(image.width, image.height, max_pixels)  # what a file contains may be larger than its head says
        return _eight_bits(image)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:  # its own text contains a memory address
        for name, (_, package, begins) in _WITH_PACKAGE.items():
            if name in formats and name not in _built_in(formats) and content.startswith(begins):
                raise UnreadableImage(f"this Pillow does not read {name}; pip install '{package}'") from error
        raise UnreadableImage(f"not an image in a format that is read here ({', '.join(formats)})") from error
    # Everything: decoders of third parties raise what their authors never thought of, AttributeError and MemoryError
    # among it, and one damaged image must not end an evaluation of thousands.
    except Exception as error:
        raise UnreadableImage(f"it cannot be decoded: {plain(error)}") from error


def photograph(content: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8] | None:
    """The pixels of a baseline JPEG, (H, W, 3) or (H, W), as `decoded` has them; None: it is for `decoded`.

    Raises:
        UnreadableImage: more than `max_pixels`.
    """
    sides = jpeg.baseline_sides(content)
    if sides is None:
        return None
    refuse_many(*sides, max_pixels)
    return jpeg.pixels(content)


@functools.cache
def _built_in(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the formats that this Pillow was built with; it fails for a name that it does not know."""
    Image.init()
    for name, (module, _, _) in _WITH_PACKAGE.items():
        if name not in Image.OPEN and importlib.util.find_spec(module) is not None:
            importlib.import_module(module)  # which makes the format known to Pillow
    return tuple(name for name in formats if name in Image.OPEN)


def is_turned(image: Image.Image) -> bool:
    """Whether EXIF says that the pixels are not stored as the picture is to be looked at."""
    try:
        return image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:  # of damaged EXIF, which says nothing then; readers of third parties raise anything
        return False


def upright(image: Image.Image) -> Image.Image:
    """The pixels as EXIF says that the picture is to be looked at."""
    return ImageOps.exif_transpose(image) if is_turned(image) else image


def refuse_many(width: int, height: int, most: int = MAX_PIXELS) -> None:
    """Refuse an image of more than that many pixels.

    Raises:
        UnreadableImage: with its size and the limit.
    """
    if width * height > most:
        raise UnreadableImage(f"{width}x{height} pixels; at most {most:,} are decoded, make it smaller first")


def refuse_incomplete(image: Image.Image) -> None:
    """Refuse a TIFF whose strips or tiles leave pixels out, which Pillow would set to 0 without a word.

    Args:
        image: opened and not yet loaded.

    Raises:
        UnreadableImage: with how many of its pixels are there.
    """
    if image.format != "TIFF" or not isinstance(image, ImageFile.ImageFile):
        return
    whole = (0, 0, image.width, image.height)
    # A colour that is stored by itself has the extents of the others. Before Pillow 11 a tile has no names.
    extents = {extents or whole for _, extents, *_ in image.tile}
    stored = sum((right - left) * (lower - upper) for left, upper, right, lower in extents)
    if stored < image.width * image.height:
        raise UnreadableImage(
            f"its strips have {stored:,} pixels of {image.width}x{image.height}; the file is damaged, write it again"
        )


def refuse_long(width: int, height: int) -> None:
    """Refuse to resize an image with a side of more than `MAX_RESIZED_SIDE` pixels.

    Raises:
        UnreadableImage: with its size and the limit.
    """
    if max(width, height) > MAX_RESIZED_SIDE:
        raise UnreadableImage(
            f"{width}x{height} pixels; sides of at most {MAX_RESIZED_SIDE:,} are resized, cut it into pieces first"
        )


def _eight_bits(image: Image.Image) -> Image.Image:
    # Older releases of Pillow give 16-bit PNG as mode "I", and PPM of more than 8 bits comes scaled to 16 bits in it.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        pixels = np.asarray(image).astype(np.uint32)  # (H, W), 0..65535
        grey = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
        grey.info |= {name: image.info[name] for name in ("exif",) if name in image.info}
        return grey
    if image.mode in ("I", "F"):
        raise UnreadableImage(f"pixels of 32 bits (mode {image.mode}) have no known white; convert it to 8 bits")
    return image
