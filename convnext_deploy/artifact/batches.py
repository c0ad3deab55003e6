"""A batch of images as an artifact takes it."""

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, counted
from ..records.base import STRIDE
from ..records.manifest import Manifest

Images = NDArray[np.float32] | NDArray[np.uint8]


def check_images(images: Images, manifest: Manifest) -> None:
    """Refuse a batch that the artifact does not take, saying what was expected.

    Raises:
        InputError: not an array, or wrong dtype, rank, batch size, channels, image size, or a NaN or infinity.
    """
    model, export = manifest.model, manifest.export
    uint8 = export.input == "uint8"
    layout = "(N, H, W, C)" if uint8 else "(N, C, H, W)"
    if not isinstance(images, np.ndarray):
        raise InputError(
            f"images are {type(images).__name__}; expected a {export.input} numpy array {layout}"
            + ("; give its .numpy()" if hasattr(images, "numpy") else "")
        )
    if images.dtype != np.dtype(export.input):
        hint = "raw pixels 0..255" if uint8 else "normalized with the manifest's mean and std"
        raise InputError(f"images have dtype {images.dtype}; expected {export.input} ({hint})")
    if images.ndim != 4:
        raise InputError(f"images have shape {images.shape}; expected {layout}")
    n, (h, w, c) = images.shape[0], (images.shape[1:] if uint8 else (*images.shape[2:], images.shape[1]))
    if c != model.in_chans:
        raise InputError(f"images have shape {images.shape}; expected {model.in_chans} channels in {layout}")
    if not export.batch.min <= n <= export.batch.max:
        raise InputError(
            f"batch {n}; this artifact takes {export.batch.min} to {counted(export.batch.max, 'image')} at once"
        )
    if export.dynamic_image_size:
        if h < STRIDE or w < STRIDE:
            raise InputError(f"images are {h}x{w} pixels; expected at least {STRIDE}x{STRIDE}")
    elif (h, w) != model.image_size:
        expected = "x".join(map(str, model.image_size))
        raise InputError(f"images are {h}x{w} pixels; expected {expected} (or export with --dynamic-image-size)")
    if not uint8 and not np.isfinite(images).all():
        bad = int(np.count_nonzero(~np.isfinite(images)))
        raise InputError(f"images have {bad} NaN or infinite values; expected finite pixels")
