"""transformers' own UPerNets with random weights, on a ConvNeXt or a Swin: what a whole segmenter is compared with."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..env import needs
from ..errors import UsageError
from ..records.manifest import ModelSpec, Segmentation
from . import registry
from .segmenters import CLASSES

# Width of the first stage, depths, and heads of each stage (arXiv:2103.14030, section 3.3).
SWINS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
_SWIN = re.compile(r"swin_(tiny|small|base|large)_patch4_window(\d+)_\d+")
_LEVELS = [f"stage{level}" for level in range(1, 5)]


class BaselineSegmenter(nn.Module):
    """Images (N, 3, H, W) to logits (N, 150, H / 4, W / 4), before transformers resizes them."""

    def __init__(self, name: str, image_size: tuple[int, int]) -> None:
        super().__init__()
        with needs("transformers"):
            import transformers
        head = Segmentation()
        backbone = _backbone(transformers, name, image_size)
        config = transformers.UperNetConfig(
            backbone_config=backbone, hidden_size=head.channels, pool_scales=list(head.pool_scales),
            use_auxiliary_head=False, num_labels=CLASSES,
        )  # fmt: skip
        self.body: Any = transformers.UperNetForSemanticSegmentation(config)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.body.decode_head(self.body.backbone(images).feature_maps)
        return logits


def _backbone(transformers: Any, name: str, image_size: tuple[int, int]) -> Any:
    """
    Raises:
        UsageError: neither a ConvNeXt nor a Swin.
    """
    if name in registry.VARIANTS:
        spec = registry.spec(name)
        kind = transformers.ConvNextV2Config if spec.grn else transformers.ConvNextConfig
        return kind(depths=list(spec.depths), hidden_sizes=list(spec.dims), out_features=_LEVELS)
    match = _SWIN.fullmatch(name)
    if match is None:
        raise UsageError(
            f"{name} has no UPerNet of transformers here; compare with --compare swin, or leave --task out"
        )
    width, depths, heads = SWINS[match[1]]
    return transformers.SwinConfig(
        embed_dim=width, depths=list(depths), num_heads=list(heads), window_size=int(match[2]),
        image_size=list(image_size), out_features=_LEVELS,
    )  # fmt: skip


def created(name: str, image_size: tuple[int, int]) -> tuple[nn.Module, ModelSpec]:
    """The module, in the state of the random generator of PyTorch, and what sessions and formats ask for."""
    module = BaselineSegmenter(name, image_size)
    config = module.body.config.backbone_config
    width = config.hidden_sizes[0] if name in registry.VARIANTS else config.embed_dim
    spec = ModelSpec(
        architecture=name,
        depths=(1, 1, 1, 1),
        dims=(width, 2 * width, 4 * width, 8 * width),
        num_classes=CLASSES,
        task="segment",
        image_size=image_size,
        segmentation=Segmentation(),
    )
    for name_, statistic in module.named_buffers():  # of batch norms, which training would have set
        if name_.endswith("running_mean"):
            torch.nn.init.normal_(statistic, std=0.1)
        elif name_.endswith("running_var"):
            torch.nn.init.uniform_(statistic, 0.5, 1.5)
    return module, spec
