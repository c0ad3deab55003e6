"""Groups of options that several commands share, each declared once as a dataclass, and the decorator that takes them.

    @grouped
    def export(out: Annotated[...], checkpoint: Checkpoint, ...) -> None: ...

On the command line every field of `Checkpoint` is an option of `export`, in the panel of its group.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..errors import UsageError
from .options import (
    DATA,
    LabelsOption,
    batch_range,
    class_order_of,
    given,
    head_activation_of,
    image_size_of,
    numbers,
    one_of,
)

if TYPE_CHECKING:
    from ..records.base import Problem
    from ..records.manifest import TensorRtSpec
    from ..workflows.evaluate import Images

T = TypeVar("T")

# An option of a panel of --help.
_checkpoint: Callable[..., Any] = functools.partial(typer.Option, rich_help_panel="Checkpoint")
_images: Callable[..., Any] = functools.partial(typer.Option, rich_help_panel="Preprocessing")
_data: Callable[..., Any] = functools.partial(typer.Option, rich_help_panel=DATA)
_tensorrt: Callable[..., Any] = functools.partial(typer.Option, rich_help_panel="TensorRT")

ReduceLabels = Annotated[bool, _data("--reduce-labels", help="Masks count from 1, and 0 counts nowhere (ADE20K).")]


def grouped(command: Callable[..., T]) -> Callable[..., T]:
    """A command whose parameters that are annotated with a group are, for typer, the options of that group."""
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in inspect.signature(command).parameters.items()
        if dataclasses.is_dataclass(parameter.annotation)
    }
    flat: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        flat += [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in dataclasses.fields(groups[name])
        ]

    @functools.wraps(command)
    def flattened(**values: Any) -> T:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        return command(**values)

    flattened.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    flattened.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return flattened


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Which checkpoint, and what it does not say about itself."""

    weights: Annotated[
        str | None,
        _checkpoint(help="File, folder, timm name, hf-hub:owner/name@REVISION, or random. Default: published."),
    ] = None
    variant: Annotated[
        str | None,
        _checkpoint(help="Which ConvNeXt: base, v2-tiny, convnext_base.fb_in1k ... Default: what the tensors are."),
    ] = None
    weights_key: Annotated[str | None, _checkpoint(help="Wrapper or key prefix to load from the file.")] = None
    config: Annotated[
        Path | None,
        _checkpoint(help="Configuration of the model, where it is not beside the weights: mm's .py, or JSON."),
    ] = None
    head_activation: Annotated[
        str | None,
        _checkpoint(help="Activation of an MLP head, unknown from tensors: gelu, gelu_tanh, silu, relu, tanh, none."),
    ] = None
    input: Annotated[str, _images(help="float32 (normalized NCHW) or uint8 (raw NHWC).")] = "float32"
    image_size: Annotated[
        str | None,
        _images(help="Pixels: 224 or HEIGHTxWIDTH. Default: what the checkpoint says, else 224."),
    ] = None
    mean: Annotated[
        str | None,
        _images(
            help="Mean of the training images in [0, 1]: R,G,B or one number. Default: from beside the checkpoint."
        ),
    ] = None
    std: Annotated[
        str | None,
        _images(help="Standard deviation of the training images. Default: as of --mean."),
    ] = None
    crop_pct: Annotated[
        float | None,
        _images(help="Share of the resized image that evaluation crops. Default: as of --mean."),
    ] = None
    interpolation: Annotated[
        str | None,
        _images(help="bicubic, bilinear, nearest or lanczos. Default: as of --mean."),
    ] = None
    exif_orientation: Annotated[
        bool,
        _images("--exif-orientation", help="Turn images as EXIF says. Training scripts do not."),
    ] = False

    def read(self) -> dict[str, Any]:
        """The arguments of `api.export` and its like that the options stand for."""
        from ..records.base import InputKind

        return {
            "variant": self.variant,
            "weights_key": self.weights_key,
            "config": self.config,
            "head_activation": head_activation_of(self.head_activation),
            "input": one_of("--input", self.input, InputKind),
            "image_size": image_size_of(self.image_size),
            "preprocessing": given(
                mean=numbers("--mean", self.mean),
                std=numbers("--std", self.std),
                crop_pct=self.crop_pct,
                interpolation=self.interpolation,
                exif_orientation=self.exif_orientation or None,
            ),
        }

    def words(self) -> list[str]:
        """The options that were given, to be typed again."""
        return words(self)


@dataclass(frozen=True, kw_only=True)
class ExportedCheckpoint(Checkpoint):
    """Which checkpoint, and what shapes a model of random weights."""

    num_classes: Annotated[
        int | None,
        _checkpoint(help="Must agree with the checkpoint; shapes random weights."),
    ] = None
    in_chans: Annotated[
        int | None,
        _checkpoint(help="Must agree with the checkpoint; shapes random weights."),
    ] = None

    def read(self) -> dict[str, Any]:
        return {**super().read(), "num_classes": self.num_classes, "in_chans": self.in_chans}


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What the network is to put out."""

    task: Annotated[str, _checkpoint(help="classify, embed or features.")] = "classify"
    levels: Annotated[
        str | None,
        _checkpoint(
            help="features: which maps, such as 2,3,4 (strides 8,16,32). Default: those with a norm, else all."
        ),
    ] = None

    def read(self) -> dict[str, Any]:
        from ..records.base import NetworkTask

        return {"task": one_of("--task", self.task, NetworkTask), "levels": self.levels}

    def words(self) -> list[str]:
        return words(self)


@dataclass(frozen=True, kw_only=True)
class WholeOutputs(Outputs):
    """The same, with the head of a segmenter."""

    task: Annotated[str, _checkpoint(help="classify, embed, features or segment (UPerNet).")] = "classify"

    def read(self) -> dict[str, Any]:
        from ..records.base import PlanTask

        return {"task": one_of("--task", self.task, PlanTask), "levels": self.levels}


@dataclass(frozen=True, kw_only=True)
class AllOutputs(Outputs):
    """What the network is to put out, with heads that belong to another network."""

    task: Annotated[
        str, _checkpoint(help="classify, embed, features, segment (UPerNet), detect (RetinaNet, FCOS, R-CNN).")
    ] = "classify"
    argmax: Annotated[
        bool,
        _checkpoint("--argmax", help="segment: put out each pixel's class, resized in the graph, not logits."),
    ] = False
    patch_tokens: Annotated[
        bool,
        _checkpoint("--patch-tokens", help="embed: a second output with the last map's pixels, as DINOv3."),
    ] = False

    def read(self) -> dict[str, Any]:
        from ..records.base import Task

        return {
            "task": one_of("--task", self.task, Task),
            "levels": self.levels,
            "argmax": self.argmax,
            "patch_tokens": self.patch_tokens,
        }


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """How the labels of `--data` are found and numbered."""

    split: Annotated[str | None, _data(help="Which split of --data, where it has several.")] = None
    labels: LabelsOption = None
    annotations: Annotated[
        str | None,
        _data(help="Labels of a folder's images: list, COCO, folder of VOC's XML or of masks (or their column)."),
    ] = None
    class_order: Annotated[
        str,
        _data(help="Who numbers class names: torchvision (10 before 2) or timm."),
    ] = "torchvision"

    def read(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "labels": self.labels,
            "annotations": self.annotations,
            "class_order": class_order_of(self.class_order),
        }

    def images(self, data: str) -> "Images":
        """The images of `--data`, which a command that is typed next names in the same way."""
        from ..workflows.evaluate import Images

        return Images(data=data, **self.read())


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What a classifier's outputs are."""

    problem: Annotated[
        str | None,
        _data(help="What outputs mean: single-label, multi-label, binary (one logit) or regression."),
    ] = None
    multi_label: Annotated[bool, _data("--multi-label", help="Short for --problem multi-label.")] = False

    def read(self) -> "Problem | None":
        from ..records.base import Problem

        if self.problem is None:
            return "multi-label" if self.multi_label else None
        problem: Problem = one_of("--problem", self.problem, Problem)
        if self.multi_label and problem != "multi-label":
            raise UsageError(f"--problem {problem} and --multi-label contradict each other; give one of them")
        return problem


@dataclass(frozen=True, kw_only=True)
class TensorRt:
    """What only TensorRT and TensorRT-RTX are told."""

    trt: Annotated[str, _tensorrt(help="With --format trt: auto, tensorrt or rtx.")] = "auto"
    trt_target: Annotated[
        str | None,
        _tensorrt(help="TensorRT-RTX: GPUs to build for: a100,rtx4090,sm80. Default: Ampere and later."),
    ] = None
    trt_profile: Annotated[
        list[str] | None,
        _tensorrt(help="One more batch range to tune for, MIN:OPT:MAX. Repeatable."),
    ] = None
    trt_sides: Annotated[
        str | None,
        _tensorrt(help="Pixels MIN:OPT:MAX with --dynamic-image-size. Default: 32 to 1024."),
    ] = None
    trt_optimization_level: Annotated[int | None, _tensorrt(min=0, max=5, help="0 to 5. Default: 3.")] = None
    trt_workspace_mb: Annotated[int | None, _tensorrt(min=1, help="Scratch memory. Default: all.")] = None
    trt_hardware_compatible: Annotated[
        bool,
        _tensorrt("--trt-hardware-compatible", help="Run on any GPU from Ampere on."),
    ] = False
    trt_version_compatible: Annotated[
        bool,
        _tensorrt("--trt-version-compatible", help="Run on later versions too."),
    ] = False
    trt_refit: Annotated[str, _tensorrt(help="none, refit, or strip (weights come in with `refit`).")] = "none"

    def read(self, format: str) -> "TensorRtSpec | None":
        """The options as one record; None where none was given and the format is another."""
        from .. import formats
        from ..records.manifest import TensorRtSpec

        targets: tuple[str, ...] = ()
        if self.trt_target is not None:
            from ..runtimes.tensorrt import choose

            targets = choose.targets_of(self.trt_target)
        if self.trt_refit not in ("none", "refit", "strip"):
            raise UsageError(f"--trt-refit {self.trt_refit}; expected none, refit or strip")
        sides = None if self.trt_sides is None else batch_range(self.trt_sides, "--trt-sides")
        spec = TensorRtSpec(
            targets=targets,
            profiles=tuple(batch_range(text, "--trt-profile") for text in self.trt_profile or ()),
            sides=None if sides is None else (sides.min, sides.opt, sides.max),
            optimization_level=self.trt_optimization_level,
            workspace_mb=self.trt_workspace_mb,
            hardware_compatible=self.trt_hardware_compatible,
            version_compatible=self.trt_version_compatible,
            refit=self.trt_refit,  # type: ignore[arg-type]  # checked above
        )
        return spec if spec != TensorRtSpec() or format == "trt" or formats.get(format).ahead_of_time else None


def words(group: Any) -> list[str]:
    """The options of a group that differ from their defaults, as they are typed."""
    words_given = []
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if value != field.default:
            words_given.append(f"--{field.name.replace('_', '-')}")
            words_given += [] if value is True else [str(value)]
    return words_given
