"""Module to DeployGraph: the rewritten module, frozen, with the names and shapes of its inputs and outputs."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ..models.convnext import ConvNeXt
from ..records.base import STRIDE
from ..records.manifest import ExportSpec, ModelSpec, TensorRecord
from .channels_first import ChannelsFirst

# Larger sides would only widen torch.export's range; no ConvNeXt is trained or run beyond this.
MAX_SIDE = 8192  # pixels


@dataclass(frozen=True)
class DeployGraph:
    """What a format builds from. `module` is in eval mode and in its final precision; nothing changes it any more."""

    module: ConvNeXt | ChannelsFirst
    export: ExportSpec
    example: Tensor  # (opt, C, H, W) float32, or (opt, H, W, C) uint8
    say: Callable[[str], None] = lambda _: None  # told what a long build is doing
    refit_from: Path | None = None  # an engine whose weights are to be replaced instead of building one

    @property
    def model(self) -> ModelSpec:
        return self.module.spec

    @property
    def input(self) -> TensorRecord:
        return input_record(self.model, self.export)

    @property
    def outputs(self) -> tuple[TensorRecord, ...]:
        return output_records(self.model, self.export)

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Axis of the input to its name, for those axes that are not fixed."""
        return {axis: size for axis, size in enumerate(self.input.shape) if isinstance(size, str)}

    @cached_property
    def program(self) -> ExportedProgram:
        """The module as torch.export sees it; computed when a format first asks for it."""
        batch = self.export.batch
        sides = {
            name: STRIDE * Dim(f"{name}_by_{STRIDE}", min=1, max=MAX_SIDE // STRIDE) for name in ("height", "width")
        }
        shapes = {
            axis: Dim("batch", min=batch.min, max=batch.max) if name == "batch" else sides[name]
            for axis, name in self.dynamic_axes.items()
        }
        return torch.export.export(self.module, (self.example,), dynamic_shapes=(shapes,))

    def release(self) -> None:
        """Empty the module's tensors: what was built from it holds them now, and this graph is of no further use.

        Exporters keep programs, graphs and what they replaced in caches and circles, each of which keeps the weights.
        """
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            tensor.data = tensor.data.new_empty(0)
        gc.collect()


def input_record(model: ModelSpec, export: ExportSpec) -> TensorRecord:
    batch: int | str = export.batch.opt if export.batch.min == export.batch.max else "batch"
    sides: tuple[int | str, ...] = ("height", "width") if export.dynamic_image_size else model.image_size
    channels = (model.in_chans,)
    shape = (batch, *sides, *channels) if export.input == "uint8" else (batch, *channels, *sides)
    return TensorRecord(name="images", dtype=export.input, shape=shape)


def output_records(model: ModelSpec, export: ExportSpec) -> tuple[TensorRecord, ...]:
    batch: int | str = export.batch.opt if export.batch.min == export.batch.max else "batch"
    if model.task == "classify":
        return (TensorRecord(name="logits", dtype="float32", shape=(batch, model.num_classes)),)
    if model.task == "embed":
        width = model.head_hidden or model.dims[3]
        return (TensorRecord(name="embedding", dtype="float32", shape=(batch, width)),)
    records = []
    for channels, stride in zip(model.dims, (4, 8, 16, 32), strict=True):
        sides: tuple[int | str, ...] = tuple(side // stride for side in model.image_size)
        if export.dynamic_image_size:
            sides = (f"height/{stride}", f"width/{stride}")
        records.append(TensorRecord(name=f"stride{stride}", dtype="float32", shape=(batch, channels, *sides)))
    return tuple(records)
