"""The anchors of a detector: at every place of every level, a box for each size and ratio."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

from ..artifact.detections import anchor_counts, level_sides, padded_sides, pyramid_sides
from ..records.manifest import Detection, ModelSpec


class Anchors:
    """Those of a model, for images of any size. As torchvision's `AnchorGenerator` returns them, level after level."""

    def __init__(self, spec: ModelSpec) -> None:
        assert spec.detection is not None
        self.spec = spec
        self.facts: Detection = spec.detection
        made = AnchorGenerator(self.facts.anchor_sizes, self.facts.aspect_ratios)
        self.cells = tuple(cell.tolist() for cell in made.cell_anchors)  # (A, 4) of each level, around (0, 0)

    def of(self, levels: Sequence[Tensor], padded: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """(A, 4): at every place of every level, row after row, its anchors.

        Args:
            levels: the pyramid's maps.
            padded: (height, width) of what they were computed from.
        """
        boxes = []
        for cells, level in zip(self.cells, levels, strict=True):
            height, width = level.shape[2:]
            device = level.device
            down = torch.arange(height, device=device, dtype=torch.int32) * (padded[0] // height)
            across = torch.arange(width, device=device, dtype=torch.int32) * (padded[1] // width)
            y, x = torch.meshgrid(down, across, indexing="ij")
            shifts = torch.stack((x, y, x, y), dim=2).reshape(-1, 1, 4).to(dtype)
            cell = torch.tensor(cells, device=device, dtype=dtype)
            boxes.append((shifts + cell).reshape(-1, 4))
        return torch.cat(boxes)

    def counts(self, first: Sequence[tuple[int, int]]) -> list[int]:
        """Anchors of each level.

        Args:
            first: (height, width) of the backbone's maps.
        """
        return [h * w * count for (h, w), count in zip(level_sides(first, self.facts), self.facts.anchors, strict=True)]

    def tables(self) -> list[NDArray[np.float32]]:
        """What files may contain beside the parameters: the anchors, for images of the model's own size."""
        sides = padded_sides(self.spec.image_size)
        levels = [torch.empty(1, 0, *size) for size in pyramid_sides(self.spec, self.spec.image_size)]
        anchors = self.of(levels, sides, torch.float32)
        sizes, centres = anchors[:, 2:] - anchors[:, :2], 0.5 * (anchors[:, :2] + anchors[:, 2:])
        split = torch.split(anchors, anchor_counts(self.spec, self.spec.image_size))
        cells = [torch.tensor(cell) for cell in self.cells]
        return [
            table.numpy()
            for table in (anchors, sizes, 0.5 * sizes, centres, anchors[:, :2] + 0.5 * sizes, *split, *cells)
        ]
