"""From an image to what a model takes: timm's evaluation transform, normalization, threads for both, probe images."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..env import usable_cores
from ..errors import DataError, plain
from ..records.base import InputKind
from ..records.manifest import Preprocessing
from . import decoding, resizing

T = TypeVar("T")
# A decoded image to pixels, uint8 (C, H, W). The image is Pillow's, or an array (H, W, 3) or (H, W).
ToPixels = Callable[[Image.Image | NDArray[np.uint8]], NDArray[np.uint8]]
_Values = NDArray[np.uint8] | NDArray[np.float32]


def transform(preprocessing: Preprocessing, image_size: tuple[int, int], in_chans: int) -> ToPixels:
    """timm's evaluation transform without the normalization: a decoded image to pixels, uint8 (C, H, W).

    It is written here in Pillow and numpy, so that an artifact that needs no torch can be evaluated without it, and
    returns timm's pixels bit for bit (`tests/data/test_data.py`).

    Args:
        preprocessing: resize, crop and interpolation.
        image_size: (height, width) in pixels; need not be square.
        in_chans: 1 converts to grey, 3 to RGB.

    The function that it returns raises OSError for an image whose shape cannot be resized.

    Raises:
        DataError: another number of channels, which no image file has.
    """
    if in_chans not in (1, 3):
        raise DataError(f"the model takes {in_chans} channels; image files can be read as 1 (grey) or 3 (RGB)")
    mode = "L" if in_chans == 1 else "RGB"
    # The fill of crop mode "border".
    fill = tuple(round(255 * value) for value in preprocessing.mean)
    colour = (fill * in_chans)[:in_chans] if preprocessing.crop_mode == "border" else (0,) * in_chans

    def pixels(image: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
        if isinstance(image, Image.Image) and preprocessing.exif_orientation:
            image = decoding.upright(image)
        before = (image.height, image.width) if isinstance(image, Image.Image) else image.shape
        decoding.refuse_long(before[1], before[0])
        if preprocessing.crop_mode == "fit":
            return _fitted(_as_image(image).convert(mode), image_size, fill)
        height, width = _resized(before[0], before[1], preprocessing, image_size)
        if min(height, width) < 1:
            raise OSError(f"{before[1]}x{before[0]} pixels cannot be resized to {width}x{height}")
        decoding.refuse_many(width, height)  # a strip of few pixels can become thousands of times larger
        filter = preprocessing.interpolation
        if filter != "nearest" and (columns_first := resizing.rule()) is not None:
            if isinstance(image, Image.Image):
                image = np.asarray(image if image.mode in ("L", "RGB") else image.convert(mode))
            return resizing.cropped(image, (height, width), image_size, filter, colour, columns_first)
        converted = _as_image(image).convert(mode)
        if converted.size != (width, height):
            converted = converted.resize((width, height), resizing.FILTERS[filter])
        cropped = _cropped(converted, image_size, colour)
        return np.ascontiguousarray(np.asarray(cropped).reshape(*image_size, in_chans).transpose(2, 0, 1))

    return pixels


def _as_image(image: Image.Image | NDArray[np.uint8]) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


def fitted_sides(sides: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image that is resized to fit, with the roundings of torchvision's detectors."""
    scale = min(float(np.float32(most) / np.float32(side)) for most, side in zip(image_size, sides, strict=True))
    return max(1, math.floor(sides[0] * scale)), max(1, math.floor(sides[1] * scale))


def _fitted(image: Image.Image, image_size: tuple[int, int], fill: Sequence[int]) -> NDArray[np.uint8]:
    """The whole image at the top left, resized bilinearly as PyTorch does without antialiasing, uint8 (C, H, W)."""
    height, width = fitted_sides((image.height, image.width), image_size)
    decoding.refuse_many(width, height)
    pixels: _Values = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)  # (H, W, C) -> (C, H, W)
    for axis, side in ((1, height), (2, width)):
        pixels = _interpolated(pixels, axis, side)
    channels = len(pixels)
    colour = np.array((*fill, *fill, *fill)[:channels], np.uint8)[:, None, None]
    whole = np.broadcast_to(colour, (channels, *image_size)).copy()
    whole[:, :height, :width] = np.rint(pixels)
    return whole


def _interpolated(pixels: _Values, axis: int, side: int) -> _Values:
    """Between the centres of pixels along one axis, in float32; only what the result needs becomes that."""
    size = pixels.shape[axis]
    if size == side:
        return pixels
    place = np.maximum((np.arange(side, dtype=np.float32) + np.float32(0.5)) * np.float32(size / side) - 0.5, 0)
    first = np.minimum(place.astype(np.int64), size - 1)
    second = np.minimum(first + 1, size - 1)
    part = (place - first).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(3)])
    low, high = (pixels.take(places, axis).astype(np.float32, copy=False) for places in (first, second))
    values: NDArray[np.float32] = low + (high - low) * part
    return values


def _resized(height: int, width: int, preprocessing: Preprocessing, image_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) before the crop, with the roundings of timm and, for a square in the centre, of torchvision."""
    edges = [math.floor(side / preprocessing.crop_pct) for side in image_size]
    if preprocessing.crop_mode == "squash":
        return edges[0], edges[1]
    if preprocessing.crop_mode == "center" and edges[0] == edges[1]:
        long = int(edges[0] * max(height, width) / min(height, width))
        return (long, edges[0]) if width <= height else (edges[0], long)
    ratios = (height / edges[0], width / edges[1])
    ratio = max(ratios) if preprocessing.crop_mode == "border" else min(ratios)
    return round(height / ratio), round(width / ratio)


def _cropped(image: Image.Image, image_size: tuple[int, int], colour: tuple[int, ...]) -> Image.Image:
    """The centre, (height, width) pixels; what the image lacks is filled on both sides, the odd pixel at the end."""
    height, width = image_size
    more_x, more_y = max(width - image.width, 0), max(height - image.height, 0)
    if more_x or more_y:
        fill = colour[0] if image.mode == "L" else colour
        padded = Image.new(image.mode, (image.width + more_x, image.height + more_y), fill)
        padded.paste(image, (more_x // 2, more_y // 2))
        image = padded
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def as_input(
    pixels: NDArray[np.uint8], preprocessing: Preprocessing, input: InputKind
) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Pixels, uint8 (N, C, H, W), as the batch that a model or artifact takes.

    Returns:
        For the input "uint8" the same pixels as (N, H, W, C); for "float32" (pixels - 255 mean) / (255 std), in the
        float32 steps of timm's PrefetchLoader, (N, C, H, W).

    Raises:
        DataError: the preprocessing has neither one mean and std nor one a channel.
    """
    if input == "uint8":
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))  # (N, C, H, W) -> (N, H, W, C)
    channels = pixels.shape[1]
    images = pixels.astype(np.float32)
    images -= _per_channel(preprocessing.mean, channels)
    images /= _per_channel(preprocessing.std, channels)
    return images


def _per_channel(values: tuple[float, ...], channels: int) -> NDArray[np.float32]:
    """255 times the values, multiplied before they are rounded to float32, (C, 1, 1) or (1, 1, 1)."""
    if len(values) not in (1, channels):
        raise DataError(f"mean and std have {len(values)} values for {channels} channels; expected one a channel")
    return np.array([value * 255 for value in values], np.float32)[:, None, None]


@contextmanager
def decoders(threads: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads, one a core where nothing else is said; leaving drops the work that waits."""
    pool = ThreadPoolExecutor(threads or usable_cores(), thread_name_prefix="decode")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # the executor's own exit would first decode all that waits


@dataclass(frozen=True, slots=True)
class Batch:
    """The images of these indices: those that were read, with the pixels of each, and those that were not."""

    indices: range
    read: list[int]
    pixels: list[NDArray[np.uint8]]  # each (C, H, W)
    failed: list[tuple[int, str]]  # with a line each
    turned: list[int]  # read, with an EXIF orientation
    sides: list[tuple[int, int]]  # of those read: (height, width) in pixels, as the model saw them


def decoded_batches(
    pool: ThreadPoolExecutor,
    read: Callable[[int], Image.Image],
    to_pixels: Callable[[Image.Image], NDArray[np.uint8]],
    indices: range,
    batch: int,
    upright: bool = False,
) -> Iterator[Batch]:
    """Images in order, `batch` after another. One that cannot be read leaves its batch smaller and moves no other.

    Args:
        read: opens the image of an index, or raises OSError.
        to_pixels: of `transform`.
        upright: whether it turns images as EXIF says.

    """

    def decode(index: int) -> tuple[NDArray[np.uint8], bool, tuple[int, int]] | str:
        try:
            image = read(index)
            turned = decoding.upright(image) if upright else image
            return to_pixels(image), decoding.is_turned(image), (turned.height, turned.width)
        except OSError as error:
            return plain(error)

    decoded = ahead(pool, decode, indices, batch + usable_cores())
    for first in range(indices.start, indices.stop, batch):
        pending = Batch(range(first, min(first + batch, indices.stop)), [], [], [], [], [])
        for index, outcome in zip(pending.indices, decoded, strict=False):  # `decoded` goes on in the next batch
            if isinstance(outcome, str):
                pending.failed.append((index, outcome))
            else:
                pending.read.append(index)
                pending.pixels.append(outcome[0])
                pending.turned.extend([index] if outcome[1] else [])
                pending.sides.append(outcome[2])
        yield pending


def turned_words(count: int, first: str, preprocessing: Preprocessing) -> str | None:
    """What is done with images that have an EXIF orientation; None where there is none to speak of."""
    if not count:
        return None
    images = f"{count:,} image{'s have' if count > 1 else ' has'} an EXIF orientation, such as {first}"
    if preprocessing.exif_orientation:
        return f"{images}; they were turned as it says"
    return f"{images}; it is left as it is, as training scripts leave it (export --exif-orientation turns them)"


def ahead(pool: ThreadPoolExecutor, work: Callable[[int], T], indices: range, count: int) -> Iterator[T]:
    """The results in order, with never more than `count` items under way or waiting to be fetched."""
    upcoming = iter(indices)
    waiting: deque[Future[T]] = deque(pool.submit(work, index) for index in itertools.islice(upcoming, count))
    while waiting:
        result = waiting.popleft().result()
        waiting.extend(pool.submit(work, index) for index in itertools.islice(upcoming, 1))
        yield result


# Left, top, and side of the crops of a bundled photograph, as fractions of its largest centred crop.
_CROPS = ((0.0, 0.0, 1.0), (0.0, 0.0, 0.6), (0.4, 0.4, 0.6), (0.4, 0.0, 0.6), (0.0, 0.4, 0.6))


def probe_images(in_chans: int, image_size: tuple[int, int], limit: int) -> NDArray[np.uint8]:
    """Natural images that come with the package, to compare numbers on; they have no labels.

    All eight photographs come first, each cropped to the image size's aspect ratio around its centre, then one zoomed
    corner of each, then the next: 40 different samples, of which the first `limit` are given. Which pixels they hold
    depends on nothing but the versions of Pillow and its JPEG decoder.

    Args:
        in_chans: 1 is grey, 3 RGB. Other numbers repeat R, G, B cyclically, which means nothing as a picture and
            serves to probe numerics only.
        image_size: (height, width) in pixels.
        limit: at least 1; past 40 there are no more samples.

    Returns:
        uint8 (N, C, H, W), N = min(limit, 40).
    """
    files = sorted((Path(__file__).parent / "images").glob("*.jpg"))
    places = list(itertools.islice(itertools.product(_CROPS, files), limit))
    return np.stack([_probe(file, crop, in_chans, image_size) for crop, file in places])


def _probe(
    file: Path, crop: tuple[float, float, float], in_chans: int, image_size: tuple[int, int]
) -> NDArray[np.uint8]:
    height, width = image_size
    with Image.open(file) as photograph:
        image = photograph.convert("L" if in_chans == 1 else "RGB")
    scale = min(image.width / width, image.height / height)
    # A product may be rounded up, and Pillow refuses a box that is larger than the image by 1e-13 pixels.
    full_width, full_height = min(width * scale, image.width), min(height * scale, image.height)
    left = (image.width - full_width) / 2 + crop[0] * full_width
    top = (image.height - full_height) / 2 + crop[1] * full_height
    right, bottom = left + crop[2] * full_width, top + crop[2] * full_height
    box = (left, top, min(right, image.width), min(bottom, image.height))
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box)).reshape(height, width, -1)
    channels = np.arange(in_chans) % pixels.shape[2]
    return np.ascontiguousarray(pixels[:, :, channels].transpose(2, 0, 1))  # (H, W, C) -> (C, H, W)
