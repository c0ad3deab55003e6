"""Small UPerNets on ConvNeXt, as transformers builds and saves them."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import transformers
from references import DEPTHS, DIMS, randomize_

CLASSES = 5


def upernet(v2: bool = False, **changed: Any) -> Any:
    """With a head for training beside it, and batch norms whose statistics matter."""
    kind = transformers.ConvNextV2Config if v2 else transformers.ConvNextConfig
    backbone = kind(
        hidden_sizes=list(DIMS), depths=list(DEPTHS), out_features=[f"stage{level}" for level in range(1, 5)]
    )
    config = {"hidden_size": 24, "use_auxiliary_head": True, "auxiliary_channels": 16, "num_labels": CLASSES}
    made = transformers.UperNetConfig(backbone_config=backbone, **config | changed)
    model = randomize_(transformers.UperNetForSemanticSegmentation(made))
    generator = torch.Generator().manual_seed(1)
    for name, statistic in model.named_buffers():
        if name.endswith("running_mean"):
            statistic.normal_(generator=generator).mul_(0.3)
        elif name.endswith("running_var"):
            statistic.uniform_(0.5, 1.5, generator=generator)
    return model


def saved(model: Any, folder: Path, side: int = 64, **processor: Any) -> str:
    """The folder that users have: weights, config.json, preprocessor_config.json."""
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    size = {"height": side, "width": side}
    transformers.SegformerImageProcessor(size=size, **processor).save_pretrained(folder)
    return str(folder)


@torch.inference_mode()
def logits_of(model: Any, images: torch.Tensor) -> torch.Tensor:
    """What the head gives before transformers resizes it."""
    found: torch.Tensor = model.decode_head(model.backbone(images).feature_maps)
    return found
