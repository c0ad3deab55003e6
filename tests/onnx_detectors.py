"""Detectors and segmenters as users have them: a ConvNeXt of some library, a neck behind it, and an exporter's ONNX."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from references import DIMS, randomize_
from torch import Tensor, nn


class Neck(nn.Module):
    """A feature pyramid on the maps of a backbone, added from the coarsest down; puts out one map and its mean."""

    def __init__(self, backbone: nn.Module, channels: Sequence[int] = DIMS) -> None:
        super().__init__()
        self.backbone = backbone
        self.lateral = nn.ModuleList(nn.Conv2d(count, 8, 1) for count in channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps: Any = self.backbone(images)
        maps = getattr(maps, "feature_maps", maps)
        maps = list(maps.values()) if isinstance(maps, dict) else maps
        found = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        top = found[-1]
        for x in reversed(found[:-1]):
            top = x + F.interpolate(top, size=x.shape[-2:], mode="nearest")
        return top, top.mean((2, 3))


def detector(backbone: nn.Module, channels: Sequence[int] = DIMS) -> nn.Module:
    return randomize_(Neck(backbone, channels))


def exported(
    module: nn.Module,
    path: Path,
    opset: int,
    *,
    dynamo: bool = False,
    dynamic: bool = True,
    shape: Sequence[int] = (1, 3, 64, 64),
) -> Path:
    """The module as PyTorch's exporters write it: the one that traces (no dynamo), or the later one."""
    axes = {"images": {0: "batch", 2: "height", 3: "width"}}
    options: dict[str, Any] = {"dynamic_axes": axes} if dynamic and not dynamo else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters', of each other and of their own internals
        torch.onnx.export(
            module,
            (torch.zeros(*shape),),
            str(path),
            opset_version=opset,
            input_names=["images"],
            output_names=["top", "pooled"],
            dynamo=dynamo,
            **(options if not dynamo else {"external_data": False, "verbose": False}),
        )
    return path


def in_functions(model: onnx.ModelProto, size: int, opset: int | None = None) -> onnx.ModelProto:
    """The model with every `size` nodes that follow one another as a function, and each two of these as one again.

    Those from the first Resize on stay: ONNX Runtime 1.32 does not infer shapes of one in a function.

    Args:
        opset: of the functions; None: the model's.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    imports = [onnx.helper.make_opsetid(one.domain, opset or one.version) for one in model.opset_import]
    imports.append(onnx.helper.make_opsetid("functions", 1))
    for level, count in (("inner", size), ("outer", 2)):
        nodes = list(result.graph.node)
        del result.graph.node[:]
        end = next((index for index, node in enumerate(nodes) if node.op_type in ("Resize", "Shape")), len(nodes))
        for start in range(0, end, count):
            stop = min(start + count, end)
            own, later = nodes[start:stop], nodes[stop:]
            made = [name for node in own for name in node.output if name]
            needed = {*(name for node in later for name in node.input), *(value.name for value in model.graph.output)}
            read = dict.fromkeys(name for node in own for name in node.input if name and name not in made)
            put_out = [name for name in made if name in needed]
            name = f"{level}{start}"
            result.functions.append(onnx.helper.make_function("functions", name, [*read], put_out, own, imports))
            result.graph.node.append(onnx.helper.make_node(name, [*read], put_out, name, domain="functions"))
        result.graph.node.extend(nodes[end:])
    result.opset_import.append(imports[-1])
    return result


def nodes_of(path: Path) -> list[Any]:
    return list(onnx.load(str(path)).graph.node)
