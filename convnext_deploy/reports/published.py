"""Published figures that pages set measured ones beside, each with its source. Nothing here was measured by us.

Left out: what could not be read in a source. Swin-T and -S have no published weights for 384 pixels, Swin-L none
trained on ImageNet-1k alone; the papers' training and other models' throughputs are not repeated.
"""

from dataclasses import dataclass

CONVNEXT_README = "README of facebookresearch/ConvNeXt"
SWIN_README = "README of microsoft/Swin-Transformer"
PAPER_V100 = "arXiv:2201.03545, table 1: V100, images/s"
PAPER_A100 = "arXiv:2201.03545, table 12: A100, TF32, channels_last, PyTorch 1.10, images/s"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """ImageNet-1k validation accuracy of published weights."""

    model: str  # timm's architecture
    image_size: int  # pixels
    pretraining: str  # "in1k": none; "in22k": ImageNet-22k first
    top1: float  # fraction
    source: str


def _convnext(name: str, size: int, pretraining: str, top1: float) -> Accuracy:
    return Accuracy(f"convnext_{name}", size, pretraining, top1, CONVNEXT_README)


def _swin(name: str, size: int, pretraining: str, top1: float) -> Accuracy:
    window = 7 if size == 224 else 12
    return Accuracy(f"swin_{name}_patch4_window{window}_{size}", size, pretraining, top1, SWIN_README)


ACCURACIES = (
    _convnext("tiny", 224, "in1k", 0.821), _convnext("small", 224, "in1k", 0.831),
    _convnext("base", 224, "in1k", 0.838), _convnext("base", 384, "in1k", 0.851),
    _convnext("large", 224, "in1k", 0.843), _convnext("large", 384, "in1k", 0.855),
    _convnext("tiny", 224, "in22k", 0.829), _convnext("tiny", 384, "in22k", 0.841),
    _convnext("small", 224, "in22k", 0.846), _convnext("small", 384, "in22k", 0.858),
    _convnext("base", 224, "in22k", 0.858), _convnext("base", 384, "in22k", 0.868),
    _convnext("large", 224, "in22k", 0.866), _convnext("large", 384, "in22k", 0.875),
    _convnext("xlarge", 224, "in22k", 0.870), _convnext("xlarge", 384, "in22k", 0.878),
    _swin("tiny", 224, "in1k", 0.812), _swin("small", 224, "in1k", 0.832),
    _swin("base", 224, "in1k", 0.835), _swin("base", 384, "in1k", 0.845),
    _swin("base", 224, "in22k", 0.852), _swin("base", 384, "in22k", 0.864),
    _swin("large", 224, "in22k", 0.863), _swin("large", 384, "in22k", 0.873),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pair:
    """The same size of ConvNeXt and Swin at one image size: images per second as the ConvNeXt paper printed them."""

    size: str  # "T" ...
    image_size: int  # pixels
    convnext: str  # timm's architecture
    swin: str
    v100: tuple[float, float]  # ConvNeXt, Swin
    a100: tuple[float, float]


def _pair(size: str, name: str, image_size: int, v100: tuple[float, float], a100: tuple[float, float]) -> Pair:
    window = 7 if image_size == 224 else 12
    return Pair(size, image_size, f"convnext_{name}", f"swin_{name}_patch4_window{window}_{image_size}", v100, a100)


PAIRS = (
    _pair("T", "tiny", 224, (774.7, 757.9), (1943.5, 1325.6)),
    _pair("S", "small", 224, (447.1, 436.7), (1275.3, 857.3)),
    _pair("B", "base", 224, (292.1, 286.6), (969.0, 662.8)),
    _pair("B", "base", 384, (95.7, 85.1), (336.6, 242.5)),
    _pair("L", "large", 224, (146.8, 145.0), (611.5, 435.9)),
    _pair("L", "large", 384, (50.4, 46.0), (211.4, 157.9)),
)


def accuracies(model: str, image_size: tuple[int, int]) -> tuple[Accuracy, ...]:
    """The published accuracies of a model at an image size; timm's tag after the name is ignored."""
    name = model.partition(".")[0]
    return tuple(a for a in ACCURACIES if a.model == name and (a.image_size, a.image_size) == image_size)
