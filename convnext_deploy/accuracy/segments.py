"""A segmenter's answers beside the masks: of each image and class the pixels that are right, true and predicted."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..artifact import label_maps
from ..data import masks
from ..data.image_source import Masks
from ..errors import CheckFailed
from .outputs import Segments


def counted(
    names: tuple[str, ...], indices: Sequence[int], outputs: NDArray[np.generic], truth: Masks, classes: int
) -> Segments:
    """One batch's counts. Each answer is resized to its mask, as transformers' processors resize it.

    Args:
        outputs: logits (N, K, h, w), or classes (N, H, W).

    Raises:
        CheckFailed: logits that are not finite.
        DataError: a mask that cannot be read.
    """
    confusions: list[tuple[NDArray[np.int64], ...]] = []
    for name, index, output in zip(names, indices, outputs, strict=True):
        if not np.isfinite(output.astype(np.float32, copy=False)).all():
            raise CheckFailed(f"the model's outputs for {name} have NaN or infinite values")
        label_map = masks.read(truth, index, classes)
        predicted = label_maps.classes_of(output, (label_map.shape[0], label_map.shape[1]))
        counts = label_map != masks.IGNORED
        label_map, predicted = label_map[counts], predicted[counts]
        pixels = (label_map[label_map == predicted], label_map, predicted)
        confusions.append(tuple(np.bincount(each, minlength=classes) for each in pixels))
    hits, of_truth, of_prediction = (np.stack(each).astype(np.int64) for each in zip(*confusions, strict=True))
    return Segments(names, hits, of_truth, of_prediction)
