"""The images of a calibration: what opens them, noise where it is asked for, and what the model sees of them."""

import hashlib
import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data import preprocess
from ..data import sources as data
from ..errors import DataError, plain
from ..models.convnext import ConvNeXt
from ..records.manifest import Preprocessing

RANDOM = "random"  # a source of this name is noise; a folder of this name is ./random


def open_images(
    source: str | data.ImageSource, split: str | None, *, images: int, image_size: tuple[int, int]
) -> data.ImageSource:
    """Anything that `data.sources.open_source` opens; noise only where "random" is asked for.

    Raises:
        DataError: as `data.sources.open_source`.
    """
    return random_images(images, image_size) if source == RANDOM else data.open_source(source, split)


def random_images(count: int, image_size: tuple[int, int], seed: int = 0) -> data.ImageSource:
    """Uniform noise, the same for the same seed. Ranges from it are good for trying things out, and for nothing else.

    Args:
        image_size: (height, width) in pixels.
    """

    def read_bytes(index: int) -> bytes:
        pixels = np.random.default_rng((seed, index)).integers(0, 256, (*image_size, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "bmp")  # not compressed: noise cannot be, and no encoder's version matters
        return file.getvalue()

    names = tuple(f"{RANDOM}-{seed}-{index}" for index in range(count))
    return data.ImageSource(name=RANDOM, names=names, labels=None, class_names=None, read_bytes=read_bytes)


def pixel_reader(
    source: data.ImageSource, preprocessing: Preprocessing, model: ConvNeXt, first: int = 0
) -> Callable[[int], NDArray[np.uint8]]:
    """From an image's number to what the model is to see, uint8 (C, H, W). Noise has the model's channels.

    Args:
        first: where the source is a part of another, the number of its first image there.

    Raises:
        DataError: the model takes a number of channels that no image file has.
    """
    chans, size = model.spec.in_chans, model.spec.image_size
    if source.name == RANDOM and chans not in (1, 3):
        return lambda index: np.random.default_rng((chans, first + index)).integers(0, 256, (chans, *size), np.uint8)
    try:
        to_pixels = preprocess.transform(preprocessing, size, chans)
    except DataError as error:
        raise DataError(f"{error}; for trying out, --calibration {RANDOM} has as many as the model takes") from None
    return lambda index: to_pixels(source.read(index))


def content_sha256(source: data.ImageSource) -> str:
    """A hash of the encoded images in their order; `ImageSource.sha256` covers names and labels only.

    Raises:
        DataError: an image cannot be read.
    """
    digest = hashlib.sha256()
    for index, name in enumerate(source.names):
        try:
            content = source.read_bytes(index)
        except OSError as error:
            raise DataError(f"{name} of {source.name} cannot be read: {plain(error)}") from None
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
