"""Non-maximum suppression as a PyTorch operator, which exporters see as one node."""

import torch
from torch import Tensor


@torch.library.custom_op("convnext_deploy::unsuppressed", mutates_args=())
def unsuppressed(boxes: Tensor, scores: Tensor, overlap: float, least: float) -> Tensor:
    """Which boxes of each class no box of the same class with a higher score overlaps by more than `overlap`.

    Only boxes with a score above `least` count. Of equal scores the first goes before.

    Args:
        boxes: (N, M, 4), left, top, right, bottom, float32.
        scores: (N, K, M), float32.

    Returns:
        (N, K, M), bool.
    """
    from torchvision.ops import nms

    kept = torch.zeros_like(scores, dtype=torch.bool)
    above = scores > least
    for image, number in above.any(2).nonzero().tolist():
        places = above[image, number].nonzero()[:, 0]
        kept_boxes = nms(boxes[image, places], scores[image, number, places], overlap)
        kept[image, number, places[kept_boxes]] = True
    return kept


@unsuppressed.register_fake
def _(boxes: Tensor, scores: Tensor, overlap: float, least: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)
