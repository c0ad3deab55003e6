"""What is cut out of the maps of a pyramid, as a PyTorch operator, which exporters see as one node. arXiv:1703.06870"""

from collections.abc import Sequence

import torch
from torch import Tensor

CANONICAL_SIDE, CANONICAL_STRIDE_LOG2 = 224.0, 4.0  # a region of 224x224 pixels is cut out of the map of stride 16
EPSILON = 1e-6  # torchvision's


@torch.library.custom_op("convnext_deploy::cut_out", mutates_args=())
def cut_out(
    maps: Sequence[Tensor], regions: Tensor, levels: Tensor, strides: Sequence[int], size: int, samples: int
) -> Tensor:
    """Each region of one of the maps, as so many places, by torchvision's `roi_align`.

    Args:
        maps: (N, C, H, W) each, float32.
        regions: (N, R, 4), left, top, right, bottom in pixels of the images.
        levels: (N, R), int64: of which map each is cut out.
        strides: pixels of the images a pixel of each map.
        samples: at each place, along each side; 0: by the region's size.

    Returns:
        (N * R, C, size, size)
    """
    from torchvision.ops import roi_align

    count = regions.shape[1]
    images = torch.arange(len(regions), device=regions.device).repeat_interleave(count)
    rows = torch.cat((images[:, None].to(regions.dtype), regions.flatten(0, 1)), dim=1)
    pooled = maps[0].new_zeros(len(rows), maps[0].shape[1], size, size)
    for index, (x, stride) in enumerate(zip(maps, strides, strict=True)):
        own = (levels.flatten() == index).nonzero()[:, 0]
        pooled[own] = roi_align(x, rows[own], (size, size), 1 / stride, samples)
    return pooled


@cut_out.register_fake
def _(
    maps: Sequence[Tensor], regions: Tensor, levels: Tensor, strides: Sequence[int], size: int, samples: int
) -> Tensor:
    return maps[0].new_empty(regions.shape[0] * regions.shape[1], maps[0].shape[1], size, size)


def level_numbers(regions: Tensor) -> Tensor:
    """The logarithm of the stride of the map that each region (..., 4) belongs to, before it is rounded down."""
    area = (regions[..., 2] - regions[..., 0]) * (regions[..., 3] - regions[..., 1])
    return CANONICAL_STRIDE_LOG2 + torch.log2(torch.sqrt(area) / CANONICAL_SIDE) + EPSILON


def levels_of(regions: Tensor, strides: Sequence[int]) -> Tensor:
    """The index of the map that each region (..., 4) is cut out of, int64; as torchvision's `MultiScaleRoIAlign`."""
    first, last = (stride.bit_length() - 1 for stride in (strides[0], strides[-1]))
    return level_numbers(regions).floor().clamp(first, last).to(torch.int64) - first
