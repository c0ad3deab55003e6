"""The range to quantize a tensor over, and the scale and zero point of a range.

Range methods: "minmax"; "moving_average", the mean over the images of each one's extremes; "percentile"; "entropy",
the least Kullback-Leibler divergence between the values and their quantized selves; "mse", the least squared error.
The last two model the values as uniform within a bin, of which there are at least 2048 up to the largest magnitude
(512 in the histogram of a channel).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UsageError
from ..records.plan import RangeMethod, Scheme
from .observers import LEAST_EXPONENT, Histogram

Floats = NDArray[np.float64]

ENTROPY_BINS = 2048  # joined for "entropy": in bins much finer than levels it would count what 8 bits cannot keep
PERCENTILE = 99.99  # 99.9 already cuts off signal in ConvNeXt

_LARGEST = {"u8_asymmetric": 255.0, "s8_symmetric": 127.0, "fp8_e4m3": 448.0}  # code, from zero or from the lowest


# Scales ---------------------------------------------------------------------------------------------------------------


def scale_and_zero_point(low: Floats, high: Floats, scheme: Scheme) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """What a range is quantized with: `value = scale * (code - zero_point)`. Arrays of one shape, or numbers.

    The scale is rounded to float32 first and the zero point computed from it, so that whoever simulates and whoever
    runs uses the same number. A range so narrow that its scale would be zero or subnormal, such as that of a tensor
    of nothing but zeros, gets the scale 1, which takes all of its values to exactly zero.
    """
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    reach = high - low if scheme == "u8_asymmetric" else np.maximum(-low, high)
    scale = (reach / _LARGEST[scheme]).astype(np.float32)
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
    if scheme != "u8_asymmetric":
        return scale, np.zeros(scale.shape, np.int64)
    return scale, np.clip(np.rint(-low / scale), 0, 255).astype(np.int64)


def levels(low: Floats, high: Floats, scheme: Scheme) -> Floats:
    """Every value that can be represented, ascending: ranges (K,) -> (K, L), L = 256, and 253 for e4m3."""
    scale, zero_point = scale_and_zero_point(low, high, scheme)
    return scale[:, None].astype(np.float64) * (_codes(scheme) - zero_point[:, None])


def _codes(scheme: Scheme) -> Floats:
    if scheme == "fp8_e4m3":
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        return np.unique(every[every.isfinite()].numpy())  # one zero of the two
    return np.arange(256.0) if scheme == "u8_asymmetric" else np.arange(-128.0, 128.0)


def weight_scales(weight: Tensor, scheme: Scheme, method: RangeMethod, limit: int = 127) -> Tensor:
    """The scale of each output channel, (out, ...) -> float32 (out,).

    Args:
        scheme: a symmetric one.
        method: "minmax", or "mse", the scale with the least squared error of the channel's weights.
        limit: largest code of an integer scheme.

    Raises:
        UsageError: another scheme or method.
    """
    if scheme == "u8_asymmetric" or method not in ("minmax", "mse"):
        raise UsageError(f"weights as {scheme} by {method}; expected s8_symmetric or fp8_e4m3, by minmax or mse")
    rows = weight.detach().flatten(1).float()  # (out, in)
    largest = rows.abs().amax(1)
    top = min(limit, _LARGEST[scheme]) if scheme == "s8_symmetric" else _LARGEST[scheme]
    best = _scale(largest, top)
    if method == "minmax":
        return best
    least = torch.full_like(largest, torch.inf, dtype=torch.float64)
    # Below half of the largest weight, clipping that one alone costs more than the rounding of 48,000 weights in 8
    # bits. The floating grid also gains from a range wider than the weights: it shifts them within an octave.
    widest = 1 if scheme == "fp8_e4m3" else 0
    for exponent in np.arange(widest, -1 - 1 / 64, -1 / 32):
        scale = _scale(largest * 2.0 ** float(exponent), top)
        error = (_rounded(rows / scale[:, None], scheme, limit) * scale[:, None] - rows).double().square().sum(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _scale(largest: Tensor, top: float) -> Tensor:
    scale = largest / top
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


def _rounded(codes: Tensor, scheme: Scheme, limit: int) -> Tensor:
    """The nearest code of a symmetric scheme, float32."""
    if scheme == "fp8_e4m3":
        return codes.clamp(-448, 448).to(torch.float8_e4m3fn).float()  # unclamped, PyTorch would give NaN
    return codes.round().clamp(-limit, limit)


# Ranges ---------------------------------------------------------------------------------------------------------------


def range_of(
    statistics: Histogram, method: RangeMethod, scheme: Scheme, *, percentile: float = PERCENTILE
) -> tuple[Floats, Floats]:
    """The range to quantize over, low <= 0 <= high, each (rows,). Of a symmetric scheme, low = -high.

    Args:
        percentile: of "percentile" only: of the magnitudes for a symmetric scheme, else of each tail.

    Raises:
        UsageError: "entropy" for fp8_e4m3, whose levels lie closer together near zero as the values do, or a
            percentile that is none.
    """
    if method == "entropy" and scheme == "fp8_e4m3":
        raise UsageError("entropy chooses between integer ranges; for fp8_e4m3 use mse, percentile or minmax")
    if not 50 < percentile <= 100:
        raise UsageError(f"percentile {percentile}; expected above 50, and at most 100")
    ranges = [_row_range(row, method, scheme, percentile) for row in _rows(statistics)]
    low, high = np.array(ranges).T  # (rows,)
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    if scheme != "u8_asymmetric":
        high = np.maximum(-low, high)
        low = -high
    return low, high


def clip_rate(statistics: Histogram, low: Floats, high: Floats, scheme: Scheme) -> Floats:
    """The share of each row's values that a range moves by more than rounding does, (rows,)."""
    shares = []
    for row, grid in zip(_rows(statistics), levels(low, high, scheme), strict=True):
        lowest, highest = grid[0] - (grid[1] - grid[0]) / 2, grid[-1] + (grid[-1] - grid[-2]) / 2
        below = row.moments(lowest)[0] if lowest > row.low else 0.0
        above = row.total - row.moments(highest)[0] if highest < row.high else 0.0
        shares.append((below + above) / row.total)
    return np.array(shares)


class _Row:
    """One row of a histogram as a density that is uniform within each bin."""

    def __init__(self, counts: Floats, radius: float, low: float, high: float, mean: tuple[float, float]) -> None:
        self.counts, self.low, self.high, self.mean_extremes = counts, low, high, mean
        self.half = len(counts) // 2
        self.width = radius / self.half
        self.total = float(counts.sum())
        centres = (np.arange(len(counts)) - self.half + 0.5) * self.width
        second = centres**2 + self.width**2 / 12
        self._below = np.stack([np.r_[0, np.cumsum(counts * moment)[:-1]] for moment in (1.0, centres, second)])

    def moments(self, t: Floats | float) -> Floats:
        """The integrals of 1, x and x ** 2 over all values below t, (3, *t.shape)."""
        position = np.clip(np.asarray(t) / self.width + self.half, 0, len(self.counts))
        index = np.minimum(position.astype(np.int64), len(self.counts) - 1)
        start, part = (index - self.half) * self.width, (position - index) * self.width
        density = self.counts[index] / self.width
        first = start * part + part**2 / 2
        second = start**2 * part + start * part**2 + part**3 / 3
        return self._below[:, index] + density * np.stack([part, first, second])

    def squared_errors(self, grid: Floats) -> Floats:
        """Summed over the values, each rounded to the nearest level: levels (K, L) -> (K,)."""
        inner = self.moments((grid[:, 1:] + grid[:, :-1]) / 2)  # (3, K, L - 1)
        ends = self.moments(np.array([-np.inf, np.inf]))[:, None].repeat(len(grid), 1)  # (3, K, 2)
        below = np.concatenate([ends[..., :1], inner, ends[..., 1:]], axis=2)
        zeroth, first, second = np.diff(below, axis=2)  # (K, L)
        return (second - 2 * grid * first + grid**2 * zeroth).sum(1)

    def quantile(self, share: float) -> float:
        """The value below which that share of all values is."""
        return _crossing(self.counts, share) * self.width - self.half * self.width

    def magnitude_quantile(self, share: float) -> float:
        folded = self.counts[self.half :] + self.counts[self.half - 1 :: -1]
        return _crossing(folded, share) * self.width


def _rows(statistics: Histogram) -> list[_Row]:
    counts = statistics.counts.double().cpu().numpy()
    per_channel = len(counts) > 1
    low, high = statistics.low.cpu().numpy(), statistics.high.cpu().numpy()
    means = statistics.mean_extremes()
    return [
        _Row(
            counts[row],
            2.0 ** int(statistics.exponent[row]),
            float(low[row] if per_channel else low.min()),
            float(high[row] if per_channel else high.max()),
            means[row],
        )
        for row in range(len(counts))
    ]


def _crossing(counts: Floats, share: float) -> float:
    """In bins from the first one's start: where the running total reaches a share of the whole."""
    running = np.cumsum(counts)
    target = max(share * running[-1], np.finfo(np.float64).tiny)  # a share of 0 is the start of the first value's bin
    index = int(np.searchsorted(running, target))
    return index + 1 - float((running[index] - target) / counts[index])


def _row_range(row: _Row, method: RangeMethod, scheme: Scheme, percentile: float) -> tuple[float, float]:
    """Low and high, still without regard to zero and symmetry."""
    if method == "minmax" or max(-row.low, row.high) < 2.0**LEAST_EXPONENT:  # zeros, or too small for the bins
        return row.low, row.high
    if method == "moving_average":
        return row.mean_extremes
    if method == "percentile":
        share = percentile / 100
        if scheme == "u8_asymmetric":
            return max(row.quantile(1 - share), row.low), min(row.quantile(share), row.high)
        return 0.0, min(row.magnitude_quantile(share), max(-row.low, row.high))
    if method == "entropy":
        return _entropy_range(row, scheme)
    return _mse_range(row, scheme)


def _mse_range(row: _Row, scheme: Scheme) -> tuple[float, float]:
    """Searched down to a 48th of an octave: the error is flat around its least."""
    low = low_end = min(row.low, 0.0)
    high = high_end = max(row.high, 0.0)
    coarse = -np.arange(25) / 3  # octaves, down to a 256th of the values' range
    fine = [np.linspace(1 / 3, -1 / 3, 9), np.linspace(1 / 12, -1 / 12, 9)]
    if scheme != "u8_asymmetric":  # one search for both ends can afford finer steps
        coarse, fine = -np.arange(97) / 12, fine[1:]
        high = high_end = max(-low, high)
    if scheme == "fp8_e4m3":  # gains from ranges wider than the values too: they shift the values within an octave
        coarse, high_end = np.r_[1 + coarse[:12], coarse], 2 * high
    for octaves in (coarse, *fine):
        if scheme == "u8_asymmetric":
            lows, highs = (ends.ravel() for ends in np.meshgrid(low * 2.0**octaves, high * 2.0**octaves))
            lows, highs = np.maximum(lows, low_end), np.minimum(highs, high_end)
        else:
            highs = np.minimum(high * 2.0**octaves, high_end)
            lows = -highs
        best = int(row.squared_errors(levels(lows, highs, scheme)).argmin())
        low, high = float(lows[best]), float(highs[best])
    return low, high


def _entropy_range(row: _Row, scheme: Scheme) -> tuple[float, float]:
    """Magnitudes beyond a threshold are clipped; the threshold is the one with the least divergence.

    The values' own distribution, with what is clipped counted in the outermost bins, is compared with the one that
    is left of it when each level's values are spread evenly over the level's bins.
    """
    counts = row.counts.reshape(ENTROPY_BINS, -1).sum(1)
    half, width = len(counts) // 2, row.width * (len(row.counts) // ENTROPY_BINS)
    centres = (np.arange(len(counts)) - half + 0.5) * width
    reach = max(-row.low, row.high)

    def clipped(threshold: float) -> tuple[Floats, float]:
        """The range, (2,), and its scale."""
        low, high = max(min(row.low, 0.0), -threshold), min(max(row.high, 0.0), threshold)
        ends = np.array([low, high] if scheme == "u8_asymmetric" else [-threshold, threshold])
        return ends, float(scale_and_zero_point(ends[0], ends[1], scheme)[0])

    best, widest_scale = clipped(reach)
    counts = _without_spike(counts, int(np.ceil(widest_scale / width)))
    least = np.inf
    least_bins = 256 if scheme == "u8_asymmetric" else 128  # with fewer than levels on a side nothing would be lost
    for bins in range(int(np.ceil(reach / width)), least_bins - 1, -4):
        ends, scale = clipped(min(bins * width, reach))
        first, stop = int(np.floor(ends[0] / width)) + half, int(np.ceil(ends[1] / width)) + half
        level = np.rint(centres[first:stop] / scale).astype(np.int64)
        level -= level[0]
        below, above = counts[:first].sum(), counts[stop:].sum()
        kept = counts[first:stop].copy()
        kept[0] = max(kept[0], float(below > 0))  # clipped to where no values are: counted as one, not infinitely far
        kept[-1] = max(kept[-1], float(above > 0))
        filled = kept > 0
        reference = kept.copy()
        reference[0] += below
        reference[-1] += above
        spread = (np.bincount(level, kept) / np.maximum(np.bincount(level, filled), 1))[level][filled]
        reference = reference[filled] / reference.sum()
        divergence = float((reference * np.log(reference / spread * spread.sum())).sum())
        if divergence < least:
            best, least = ends, divergence
    return float(best[0]), float(best[1])


def _without_spike(counts: Floats, width: int) -> Floats:
    """So many bins on each side of zero, what one level of the widest range covers, get the next bin's count.

    After GELU most values may lie there. Any range that puts them on one level with others then seems to move that
    mass, and the least divergence is found where levels are as narrow as bins: at a few percent of the values' range.
    But the widest range already takes these values to zero or to a level beside it, so none needs a narrower one.
    """
    half = len(counts) // 2
    counts = counts.copy()
    counts[half - width : half] = counts[half - width - 1]
    counts[half : half + width] = counts[half + width]
    return counts
