"""Module to DeployGraph: the rewritten module, frozen, with the names and shapes of its inputs and outputs."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges

from ..records.base import STRIDE
from ..records.manifest import ExportSpec, ModelSpec, TensorRecord

# Larger sides would only widen torch.export's range; no ConvNeXt is trained or run beyond this.
MAX_SIDE = 8192  # pixels
# torch.export captures sides from here on, for its guards ask how the strides of the last map compare, which is open
# where that map has a side of one pixel. What it captures is the same there: the range is widened to what is taken,
# guards are left out when a program runs, and every export of any size is verified at 32x32.
CAPTURED_TILES = 2
SIDES = ("height", "width")


@dataclass(frozen=True)
class DeployGraph:
    """What a format builds from: nothing changes it any more, so that what is captured is what is built.

    The module is in eval mode, in its final precision and form, with kernels in it where the spec names them.
    """

    module: nn.Module  # a ConvNeXt, or what stands for one; `spec` is its ModelSpec
    export: ExportSpec
    example: Tensor  # (opt, C, H, W) float32, or (opt, H, W, C) uint8
    say: Callable[[str], None] = lambda _: None  # told what a long build is doing
    refit_from: Path | None = None  # an engine whose weights are to be replaced instead of building one

    @property
    def model(self) -> ModelSpec:
        return cast(ModelSpec, self.module.spec)

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
        batch, tiles = self.export.batch, CAPTURED_TILES + (self.model.detection is not None)
        smallest = (tiles - 1) * STRIDE + 1 if self.model.detection is not None else tiles * STRIDE
        shapes = {
            axis: Dim(name, min=batch.min, max=batch.max) if name == "batch" else Dim(name, min=smallest, max=MAX_SIDE)
            for axis, name in self.dynamic_axes.items()
        }
        least = [tiles * STRIDE if self.dynamic_axes.get(axis) in SIDES else 0 for axis in range(self.example.ndim)]
        size = [max(own, side) for own, side in zip(self.example.shape, least, strict=True)]
        example = self.example if size == [*self.example.shape] else self.example.new_zeros(size)
        # Cropping to whole patches asks of sizes what always holds but cannot be proven; ONNX drops what is asserted.
        crops = self.export.quantization is not None or self.model.task in ("segment", "detect")
        program = torch.export.export(
            self.module, (example,), dynamic_shapes=(shapes,), prefer_deferred_runtime_asserts_over_guards=crops
        )
        images = next(node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
        for axis, name in self.dynamic_axes.items():
            if name in SIDES:
                symbol = images.meta["val"].shape[axis].node.expr
                program.range_constraints[symbol] = ValueRanges(STRIDE, MAX_SIDE)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # names the folders of this machine, in every file built from it
        return program

    def release(self) -> None:
        """Empty the module's tensors: what was built from it has them now, and this graph is of no further use.

        Exporters keep programs, graphs and what they replaced in caches and circles, each of which keeps the weights.
        """
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            tensor.data = tensor.data.new_empty(0)
        gc.collect()


def input_record(model: ModelSpec, export: ExportSpec) -> TensorRecord:
    batch: int | str = export.batch.opt if export.batch.min == export.batch.max else "batch"
    sides: tuple[int | str, ...] = SIDES if export.dynamic_image_size else model.image_size
    channels = (model.in_chans,)
    shape = (batch, *sides, *channels) if export.input == "uint8" else (batch, *channels, *sides)
    return TensorRecord(name="images", dtype=export.input, shape=shape)


def output_records(model: ModelSpec, export: ExportSpec) -> tuple[TensorRecord, ...]:
    batch: int | str = export.batch.opt if export.batch.min == export.batch.max else "batch"
    if model.task == "classify":
        return (TensorRecord(name="logits", dtype="float32", shape=(batch, model.num_classes)),)
    if model.task == "embed":
        width = model.head_hidden or model.dims[3]
        embedding = TensorRecord(name="embedding", dtype="float32", shape=(batch, width))
        if not model.patch_tokens:
            return (embedding,)
        height, wide = model.map_sizes()[3]
        patches: int | str = "patches" if export.dynamic_image_size else height * wide
        return (embedding, TensorRecord(name="patch_tokens", dtype="float32", shape=(batch, patches, width)))
    if model.detection is not None:
        most, side = model.detection.most_detections, model.detection.mask_side
        masks = TensorRecord(name="masks", dtype="float32", shape=(batch, most, side, side))
        return (
            TensorRecord(name="boxes", dtype="float32", shape=(batch, most, 4)),
            TensorRecord(name="scores", dtype="float32", shape=(batch, most)),
            TensorRecord(name="labels", dtype="int32", shape=(batch, most)),
            *((masks,) if side else ()),
        )
    if model.task == "segment":
        if export.argmax:
            whole: tuple[int | str, ...] = SIDES if export.dynamic_image_size else model.image_size
            return (TensorRecord(name="classes", dtype="int32", shape=(batch, *whole)),)
        first, stride = model.map_sizes()[model.levels[0] - 1], 2 << model.levels[0]
        map = (f"height/{stride}", f"width/{stride}") if export.dynamic_image_size else first
        return (TensorRecord(name="logits", dtype="float32", shape=(batch, model.num_classes, *map)),)
    records = []
    for level in model.levels:
        channels, stride = model.dims[level - 1], 2 << level
        sides: tuple[int | str, ...] = model.map_sizes()[level - 1]
        if export.dynamic_image_size:
            sides = (f"height/{stride}", f"width/{stride}")
        records.append(TensorRecord(name=f"stride{stride}", dtype="float32", shape=(batch, channels, *sides)))
    return tuple(records)
