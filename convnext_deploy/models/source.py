"""Which model is meant: where its checkpoint is, and what is said about it beside what it says itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from .. import argument_names, arguments
from ..arguments import Unpack
from ..records.base import Problem, Task
from ..records.manifest import HeadActivation
from . import given

if TYPE_CHECKING:  # it needs torch, and refusing an argument does not
    from .checkpoint import Loaded


class CheckpointOptions(TypedDict, total=False):
    """Which checkpoint is read, and what it does not say about itself; of every function that reads one."""

    variant: Annotated[str | None, "which ConvNeXt; None infers it from the tensors."]
    image_size: Annotated[
        arguments.ImageSize | None,
        "one number or (height, width), in pixels, at least 32; None: what the checkpoint says, else 224.",
    ]
    preprocessing: Annotated[
        Mapping[str, Any] | None,
        "fields of `records.manifest.Preprocessing` (mean, std, interpolation, crop_pct, crop_mode, exif_orientation) "
        "that override what stands beside the checkpoint; a plain state dict says nothing about them. One number for "
        "`mean` or `std` is for every channel.",
    ]
    head_activation: Annotated[
        HeadActivation | None,
        "between the two linears of an MLP head: gelu, gelu_tanh, silu, relu, tanh or none. Tensors do not tell it.",
    ]
    weights_key: Annotated[
        str | None, "the wrapper or key prefix to load from a file that contains several models; None: the only one."
    ]
    config: Annotated[
        arguments.Location | None,
        "a file with what stands beside the checkpoint otherwise: a configuration of mmpretrain and its relatives, "
        "which is read and not executed, or a JSON file of timm, transformers or open_clip; of a detector one of what "
        "torchvision's constructor was given.",
    ]


class NetworkOptions(CheckpointOptions, total=False):
    """What is said about a checkpoint to functions that take other tasks than classifying."""

    levels: Annotated[
        Sequence[int] | str | None,
        "of the task features: which maps, of 1 to 4 (strides 4 to 32); None: those that have a norm in the "
        "checkpoint, as a detector's backbone has, else all.",
    ]


class SourceOptions(NetworkOptions, total=False):
    """All that can be said about a checkpoint."""

    num_classes: Annotated[int | None, "must agree with the checkpoint; shapes a model with random weights."]
    in_chans: Annotated[int | None, "channels of the images; must agree with the checkpoint, as `num_classes`."]
    patch_tokens: Annotated[
        bool,
        "with task embed: the second output contains each pixel of the last map under the norm of the pooled vector, "
        "as DINOv3 returns its patch tokens.",
    ]
    problem: Annotated[
        Problem | None,
        "what a classifier's outputs mean, where the checkpoint does not say it: single-label, multi-label, binary "
        "(one logit) or regression.",
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Made once, where arguments are checked, and taken by everything that reads a checkpoint."""

    weights: str | None = None  # file, folder, timm name, `hf-hub:owner/name` or "random"; None: `variant`'s published
    variant: str | None = None  # None: inferred from the tensors
    task: Task = "classify"
    image_size: tuple[int, int] | None = None  # (height, width) in pixels; None: what the checkpoint says, else 224
    num_classes: int | None = None  # must agree with the checkpoint; shapes a model with random weights
    in_chans: int | None = None  # likewise
    weights_key: str | None = None  # wrapper or key prefix, where a file has several models
    preprocessing: Mapping[str, Any] | None = None  # fields of `Preprocessing` that override the checkpoint's
    levels: tuple[int, ...] | None = None  # of the task features, 1 to 4; None: those that have a norm, or all
    head_activation: HeadActivation | None = None  # between the linears of an MLP head, which tensors do not tell
    patch_tokens: bool = False  # of the task embed: the last map's pixels too
    config: Path | None = None  # what stands beside the checkpoint elsewhere: an mm configuration, or a JSON file
    problem: Problem | None = None  # what a classifier's outputs mean; None: what the checkpoint says

    @classmethod
    def of(
        cls, weights: arguments.Weights | None, *, task: Task = "classify", **options: Unpack[SourceOptions]
    ) -> "Source":
        """The arguments of a public function, each in any form that it may be written in.

        Raises:
            UsageError: the first that is not what its name means.
        """
        readers: dict[str, Callable[[str, Any], Any]] = {
            "image_size": arguments.image_size, "preprocessing": arguments.preprocessing, "levels": arguments.levels,
            "config": arguments.path,
        }  # fmt: skip
        argument_names.check(task=task, **{name: value for name, value in options.items() if name not in readers})
        read: dict[str, Any] = dict(options)
        read |= {name: arguments.maybe(readers[name], name, read[name]) for name in readers if name in read}
        return cls(weights=arguments.maybe(given.weights, "weights", weights), task=task, **read)

    def load(self) -> "Loaded":
        """The model, filled from the checkpoint (see `checkpoint.load`, also for what it raises)."""
        from . import checkpoint

        return checkpoint.load(
            self.weights,
            variant=self.variant,
            task=self.task,
            image_size=self.image_size,
            num_classes=self.num_classes,
            in_chans=self.in_chans,
            weights_key=self.weights_key,
            preprocessing=self.preprocessing,
            levels=self.levels,
            head_activation=self.head_activation,
            patch_tokens=self.patch_tokens,
            config=self.config,
            problem=self.problem,
        )
