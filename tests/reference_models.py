"""Small models as other libraries and the published code make them, which several test files load."""

import re
from typing import Any

import timm
import torch
import torch.nn.functional as F
import transformers
from references import DEPTHS, DIMS, FirstNorm, Official, State, empty, randomize_
from torch import Tensor, nn

from convnext_deploy.models import registry

Maps = tuple[Tensor, ...]
ALL = (1, 2, 3, 4)


def transformers_model(v2: bool, depths: tuple[int, ...] = DEPTHS, dims: tuple[int, ...] = DIMS) -> nn.Module:
    settings = {"depths": list(depths), "hidden_sizes": list(dims), "num_labels": 11}
    if v2:
        return transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(**settings))
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**settings))


def torchvision_model(depths: tuple[int, ...], dims: tuple[int, ...]) -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.convnext import ConvNeXt as TorchvisionConvNeXt

    outs = [*dims[1:], None]
    return TorchvisionConvNeXt(
        [CNBlockConfig(*stage) for stage in zip(dims, outs, depths, strict=True)], num_classes=11
    )


class Clip(nn.Module):
    """What of open_clip's image tower matters: a timm trunk without classifier, then a projection without bias."""

    def __init__(self, name: str, mlp: int | None, width: int, out: int = 24, **arguments: object) -> None:
        super().__init__()
        trunk = timm.create_model(name, num_classes=0, **arguments)
        head = nn.Module()
        if mlp is None:
            head.proj = nn.Linear(width, out, bias=False)
        else:
            head.mlp = nn.Module()
            head.mlp.fc1, head.mlp.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, out, bias=False)
        self.visual = nn.Module()
        self.visual.trunk, self.visual.head = trunk, head
        self.positional_embedding = nn.Parameter(torch.zeros(77, 16))
        self.token_embedding = nn.Embedding(100, 16)
        self.transformer = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
        self.logit_scale = nn.Parameter(torch.zeros([]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.visual.get_submodule("trunk")(x)
        head: Any = self.visual.head
        return head.proj(x) if hasattr(head, "proj") else head.mlp.fc2(F.gelu(head.mlp.fc1(x)))


def clip(mlp: int | None = None, name: str = "convnext_atto", **arguments: Any) -> Any:
    width = arguments.get("dims", registry.spec(name).dims)[-1]
    return randomize_(empty(lambda: Clip(name, mlp, width, **arguments)))


def mmpretrain(state: State) -> State:
    """A classifier's official names as mmpretrain has them: its backbone, and its head beside it."""
    names = {"dwconv": "depthwise_conv", "pwconv1": "pointwise_conv1", "pwconv2": "pointwise_conv2"}
    found = {}
    for key, value in state.items():
        key = ".".join(names.get(part, part) for part in key.split("."))
        key = re.sub(r"^norm\.", "norm3.", key)
        found[key.replace("head.", "head.fc.") if key.startswith("head.") else f"backbone.{key}"] = value
    return found


class OfficialBackbone(Official):
    """As the detection code of the papers' repositories has it: `norm0` to `norm3` and no head."""

    def __init__(self, v2: bool = False, levels: tuple[int, ...] = ALL) -> None:
        super().__init__(DEPTHS, DIMS, v2)
        del self.norm, self.head
        self.levels = levels
        for level in levels:
            self.add_module(f"norm{level - 1}", FirstNorm(DIMS[level - 1]))

    def forward(self, x: Tensor) -> Maps:  # type: ignore[override]  # a backbone's outputs are several
        maps = []
        for index, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = stage(downsample(x))
            if index + 1 in self.levels:
                maps.append(self.get_submodule(f"norm{index}")(x))
        return tuple(maps)


class Dinov3(Official):
    """As facebookresearch/dinov3 has it: `norms` is three identities and `norm` a second time."""

    def __init__(self) -> None:
        super().__init__(DEPTHS, DIMS, v2=False)
        self.add_module("head", nn.Identity())
        self.norms = nn.ModuleList([*(nn.Identity() for _ in range(3)), self.norm])


def maps_of(model: Any, x: Tensor) -> Maps:
    maps: list[Tensor] = []
    for downsample, stage in zip(model.downsample_layers, model.stages, strict=True):
        x = stage(downsample(x))
        maps.append(x)
    return tuple(maps)


def mm_names(state: State) -> State:
    names = {"dwconv": "depthwise_conv", "pwconv1": "pointwise_conv1", "pwconv2": "pointwise_conv2"}
    return {".".join(names.get(part, part) for part in key.split(".")): value for key, value in state.items()}


NECK = {"neck.lateral_convs.0.conv.weight": torch.ones(8, 16, 1, 1), "rpn_head.rpn_cls.bias": torch.zeros(3)}
