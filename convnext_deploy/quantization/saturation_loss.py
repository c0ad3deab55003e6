"""The simulation of a plan on x86 without VNNI, in a runtime that does nothing about it (`saturation` has the facts).

`vpmaddubsw` multiplies unsigned codes by signed ones, adds the products of two neighbours, and saturates their sum at
16 bits. Few pairs of weights are large enough for that: only their sums are computed again, and what they lose is
added to the product that the simulation computes anyway.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..artifact import deviation
from ..models.convnext import ConvNeXt, nchw, nhwc
from ..records.manifest import Preprocessing
from ..records.plan import SaturationRecord
from .apply import QuantizedConvolution, QuantizedLinear, QuantizedPatches, apply
from .distance import Pixels, classifies, outputs
from .plan import LoadedPlan

IMAGES = 32  # that are looked at, at most: the sums cost up to twice as much as the network
LARGEST, LEAST = 2**15 - 1, -(2**15)  # of 16 bits
CODE = 255  # the largest unsigned code
AT_ONCE = 1 << 24  # sums that are in memory


@torch.no_grad()
def measure(
    model: ConvNeXt, loaded: LoadedPlan, pixels: Pixels, preprocessing: Preprocessing
) -> SaturationRecord | None:
    """How far a plan's outputs are from the float module's, with saturation and without.

    Args:
        model: folded, fp32; left as it was.
        pixels: uint8 (N, C, H, W), of which the first are looked at.

    Returns:
        None where nothing can saturate: no product of u8 by s8, or weights that are too small for it.
    """
    pixels = pixels[:IMAGES]
    simulation = copy.deepcopy(model)
    apply(simulation, loaded)
    if not saturate(saturating := copy.deepcopy(simulation)):
        return None
    expected = outputs(model, pixels, preprocessing)
    without, there = (outputs(one, pixels, preprocessing) for one in (simulation, saturating))

    def error(of: tuple[Tensor, ...]) -> float:
        worst = deviation.worst([one.numpy() for one in of], [one.numpy() for one in expected])
        return float(np.sqrt((worst**2).mean()))

    def changes(of: tuple[Tensor, ...]) -> int | None:
        return int((of[0].argmax(1) != expected[0].argmax(1)).sum()) if classifies(model) else None

    return SaturationRecord(
        images=len(pixels),
        relative_error=error(there),
        relative_error_without=error(without),
        changed=changes(there),
        changed_without=changes(without),
    )


def saturate(model: nn.Module) -> int:
    """Let the products of u8 by s8 saturate, in place; the number of those that can."""
    count = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.zero_point.dtype == torch.uint8:
            weight = _rows(module)
            pairs = _pairs(weight)
            if len(pairs[0]):
                count += 1
                module.register_forward_hook(_hook(weight, pairs))
    return count


def loss(codes: Tensor, weight: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """What saturation takes from a product of codes, (R, out) int32.

    Args:
        codes: (R, in) uint8.
        weight: (in, out) int8, `in` even.
        pairs: those that can saturate, each the number of its first row, and its column.
    """
    rows, columns = pairs
    first, second = (weight[rows + offset, columns].int() for offset in (0, 1))  # (P,)
    total = torch.zeros(len(codes), weight.shape[1], dtype=torch.int32)
    step = max(1, AT_ONCE // len(rows))
    for start in range(0, len(codes), step):
        part = codes[start : start + step]
        sums = part[:, rows].int() * first + part[:, rows + 1].int() * second  # (r, P)
        total[start : start + step].index_add_(1, columns, sums.clamp(LEAST, LARGEST) - sums)
    return total


def _pairs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of neighbouring rows, a column each, whose sum can leave 16 bits with some codes."""
    pairs = weight.int().reshape(-1, 2, weight.shape[1])
    high, low = CODE * pairs.clamp_min(0).sum(1), CODE * pairs.clamp_max(0).sum(1)
    numbers, columns = ((high > LARGEST) | (low < LEAST)).nonzero(as_tuple=True)
    return 2 * numbers, columns


def _rows(module: QuantizedLinear) -> Tensor:
    """The weight (in, out) in the order of the codes, with a row of zeros where `in` is odd."""
    weight = module.weight
    if isinstance(module, QuantizedConvolution):
        weight = weight.permute(2, 3, 1, 0).flatten(0, 2)  # (out, in, k, k) -> (k * k * in, out)
    return torch.cat([weight, weight.new_zeros(len(weight) % 2, weight.shape[1])])


def _hook(weight: Tensor, pairs: tuple[Tensor, Tensor]) -> Any:
    def add_loss(module: QuantizedLinear, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = arguments[0]
        if isinstance(module, QuantizedPatches):
            codes = module.patches(module.codes(nhwc(x)), module.zero)
        else:
            codes = module.codes(x)
        rows = codes.flatten(0, -2)
        rows = torch.cat([rows, rows.new_zeros(len(rows), len(weight) - rows.shape[1])], 1)
        change = loss(rows, weight, pairs) * (module.scale * module.weight_scale)
        change = change.reshape(*codes.shape[:-1], -1)
        return output + (nchw(change) if isinstance(module, QuantizedPatches) else change)

    return add_loss
