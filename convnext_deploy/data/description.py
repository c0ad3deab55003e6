"""What images look like in a few numbers: the mean and the standard deviation of each channel of each image."""

import numpy as np
from numpy.typing import NDArray

from ..artifact.batches import Images
from ..records.base import InputKind
from ..records.manifest import Preprocessing
from ..records.plan import InputStatistics

Values = NDArray[np.float64]


def described(pixels: NDArray[np.uint8]) -> tuple[Values, Values]:
    """(N, C, H, W) to the mean and the standard deviation of each channel of each image, (N, C), white 1."""
    wide = pixels.reshape(*pixels.shape[:2], -1).astype(np.float32)
    return wide.mean(2).astype(np.float64) / 255, wide.std(2).astype(np.float64) / 255


def described_input(images: Images, preprocessing: Preprocessing, input: InputKind) -> tuple[Values, Values]:
    """Describe a batch as an artifact takes it: (N, H, W, C) pixels, or (N, C, H, W) normalized."""
    if input == "uint8":
        return described(images.transpose(0, 3, 1, 2))
    wide = images.reshape(*images.shape[:2], -1)
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    return wide.mean(2) * std + mean, wide.std(2) * std


def answered(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """(N, outputs) to the class of each: the likeliest, or of one output whether it is above 0."""
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).astype(np.int64)
    return logits.argmax(axis=1)


def statistics(means: Values, stds: Values, classes: NDArray[np.int64] | None, count: int) -> InputStatistics:
    """The reference, from what `described` and `answered` say of its images.

    Args:
        classes: None: the model has none.
        count: of classes.
    """
    counts = () if classes is None else tuple(np.bincount(classes, minlength=count).tolist())
    return InputStatistics(
        images=len(means),
        mean=tuple(means.mean(0).tolist()),
        mean_spread=tuple(means.std(0).tolist()),
        std=tuple(stds.mean(0).tolist()),
        std_spread=tuple(stds.std(0).tolist()),
        classes=counts,
    )
