"""What values a tensor takes.

A `Histogram` is a fixed amount of memory however many images it has seen. Its bins span [-radius, radius) with a
radius that is a power of two: when a value is outside, the radius doubles and neighbouring bins join, and a value's
bin is the same whether it came before or after. Sums are whole numbers of the smallest step that float64 has, so they
do not round. So one pass over the images suffices, and the merged histograms of any sets, in any order, are that of
their union, bit for bit.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CheckFailed

BINS = 8192  # of a whole tensor; half of them are on each side of zero
BINS_PER_CHANNEL = 2048
LEAST_EXPONENT = -64  # of a radius; in ranges below it nothing is searched for

_SUM_EXPONENT = 1074  # every float64 is a multiple of 2 ** -1074
_SUM_BYTES = 272  # of a sum: 2 ** 2098 is the largest float64 in such units, and 63 bits count images
_CHUNK = 1 << 18  # values binned at once; on a CPU several times faster than all at once, because they stay in cache


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """The values of one tensor with C channels, over all images so far. rows = 1, or C where it is per channel."""

    counts: Tensor  # int64 (rows, bins)
    exponent: Tensor  # int64 (rows,); radius = 2 ** exponent
    low: Tensor  # float64 (C,), exact
    high: Tensor
    low_sum: tuple[int, ...]  # (rows,): each image's extreme, summed over the images; in units of 2 ** -_SUM_EXPONENT
    high_sum: tuple[int, ...]
    images: int

    def mean_extremes(self) -> list[tuple[float, float]]:
        """Of each row, the means over the images of the lowest and the highest value."""
        units = self.images << _SUM_EXPONENT  # of whole numbers Python rounds the quotient once
        return [(low / units, high / units) for low, high in zip(self.low_sum, self.high_sum, strict=True)]


def histogram(values: Tensor, name: str, *, per_channel: bool = False) -> Histogram:
    """Count the values of one batch.

    Args:
        values: any float type (N, ..., C), on any device.
        name: of the tensor, for the message.
        per_channel: bins for each channel instead of for the whole tensor.

    Raises:
        CheckFailed: a value is NaN or infinite.
    """
    images, channels = values.shape[0], values.shape[-1]
    values = values.detach().reshape(images, -1, channels)
    low, high = values.amin(1).double(), values.amax(1).double()  # (N, C); NaN is passed on
    if not (low.isfinite().all() and high.isfinite().all()):
        raise CheckFailed(f"the input of {name} contains NaN or infinite values; nothing can be calibrated on them")
    image_low, image_high = (low, high) if per_channel else (low.amin(1, keepdim=True), high.amax(1, keepdim=True))
    largest = torch.maximum(image_low.abs(), image_high.abs()).amax(0)  # (rows,)
    exponent = torch.frexp(largest)[1].long()  # largest < 2 ** exponent
    exponent = exponent.where(largest > 0, LEAST_EXPONENT).clamp(min=LEAST_EXPONENT)
    return Histogram(
        counts=_binned(values.reshape(-1, channels), exponent, BINS_PER_CHANNEL if per_channel else BINS),
        exponent=exponent,
        low=low.amin(0),
        high=high.amax(0),
        low_sum=_summed(image_low),
        high_sum=_summed(image_high),
        images=images,
    )


def _summed(extremes: Tensor) -> tuple[int, ...]:
    """Over the images, (N, rows) -> (rows,), exactly: float64 would give another sum in another order."""
    return tuple(sum(_units(value) for value in row) for row in extremes.T.tolist())


def _units(value: float) -> int:
    numerator, denominator = value.as_integer_ratio()  # the denominator is a power of two, 2 ** 1074 at most
    return (numerator << _SUM_EXPONENT) // denominator


def _binned(values: Tensor, exponent: Tensor, bins: int) -> Tensor:
    """Counts, (M, C) -> int64 (rows, bins). In float64, where the scaling by a power of two is exact."""
    rows, channels = len(exponent), values.shape[1]
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent.neg()) * (bins // 2)
    first = torch.arange(rows, device=values.device).double() * bins + bins // 2  # (rows,): the bin at zero
    counts = torch.zeros(rows * bins, dtype=torch.int64, device=values.device)
    for chunk in torch.split(values, max(1, _CHUNK // channels)):
        index = chunk.to(torch.float64, copy=True).mul_(scale).floor_().add_(first)
        counts += torch.bincount(index.flatten().int(), minlength=rows * bins)
    return counts.reshape(rows, bins)


def merged(a: Histogram, b: Histogram) -> Histogram:
    """Add up the images of both, exactly: in whichever order sets are merged, the result is the same."""
    exponent = torch.maximum(a.exponent, b.exponent)
    return Histogram(
        counts=_widened(a.counts, exponent - a.exponent) + _widened(b.counts, exponent - b.exponent),
        exponent=exponent,
        low=torch.minimum(a.low, b.low),
        high=torch.maximum(a.high, b.high),
        low_sum=tuple(map(operator.add, a.low_sum, b.low_sum)),
        high_sum=tuple(map(operator.add, a.high_sum, b.high_sum)),
        images=a.images + b.images,
    )


def _widened(counts: Tensor, doublings: Tensor) -> Tensor:
    """The same values after so many doublings of each row's radius, (rows, bins) -> (rows, bins)."""
    half = counts.shape[1] // 2
    signed = torch.arange(-half, half, device=counts.device)  # bin b contains [b, b + 1) bin widths
    index = (signed >> doublings[:, None].clamp(max=62)) + half
    return torch.zeros_like(counts).scatter_add_(1, index, counts)


def to_arrays(statistics: Histogram) -> dict[str, NDArray[Any]]:
    """Everything it contains, to be saved."""
    tensors = {field: getattr(statistics, field).cpu().numpy() for field in _TENSORS}
    sums = {field: _as_bytes(getattr(statistics, field)) for field in _SUMS}
    return {**tensors, **sums, "images": np.array(statistics.images)}


def from_arrays(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> Histogram:
    """The histogram that `to_arrays` was given.

    Raises:
        KeyError, ValueError: it was given none.
    """
    tensors = {field: torch.tensor(arrays[field], device=device) for field in _TENSORS}
    low_sum, high_sum = (_from_bytes(arrays[field]) for field in _SUMS)
    return Histogram(images=int(arrays["images"]), low_sum=low_sum, high_sum=high_sum, **tensors)


def _as_bytes(sums: tuple[int, ...]) -> NDArray[np.uint8]:
    """(rows, bytes), two's complement from the lowest byte on."""
    content = b"".join(number.to_bytes(_SUM_BYTES, "little", signed=True) for number in sums)
    return np.frombuffer(content, np.uint8).reshape(len(sums), _SUM_BYTES)


def _from_bytes(array: NDArray[Any]) -> tuple[int, ...]:
    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != _SUM_BYTES:
        raise ValueError(f"its sums are {array.dtype} {array.shape}, as another version kept them")
    return tuple(int.from_bytes(row.tobytes(), "little", signed=True) for row in array)


_TENSORS = ("counts", "exponent", "low", "high")
_SUMS = ("low_sum", "high_sum")
