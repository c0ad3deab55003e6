"""Which model is meant: where its checkpoint is, and what is said about it beside what it says itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import arguments
from ..records.base import Problem, Task
from ..records.manifest import HeadActivation
from . import given

if TYPE_CHECKING:  # it needs torch, and refusing an argument does not
    from .checkpoint import Loaded


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
        cls,
        weights: arguments.Weights | None,
        *,
        variant: str | None = None,
        task: Task = "classify",
        image_size: arguments.ImageSize | None = None,
        num_classes: int | None = None,
        in_chans: int | None = None,
        weights_key: str | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        levels: Sequence[int] | str | None = None,
        head_activation: HeadActivation | None = None,
        patch_tokens: bool = False,
        config: arguments.Location | None = None,
        problem: Problem | None = None,
    ) -> "Source":
        """The arguments of a public function, each in any form that it may be written in.

        Raises:
            UsageError: the first that is not what its name means.
        """
        arguments.check(
            variant=variant, task=task, num_classes=num_classes, in_chans=in_chans, weights_key=weights_key,
            head_activation=head_activation, problem=problem, patch_tokens=patch_tokens,
        )  # fmt: skip
        return cls(
            weights=arguments.maybe(given.weights, "weights", weights),
            variant=variant,
            task=task,
            image_size=arguments.maybe(arguments.image_size, "image_size", image_size),
            num_classes=num_classes,
            in_chans=in_chans,
            weights_key=weights_key,
            preprocessing=arguments.maybe(arguments.preprocessing, "preprocessing", preprocessing),
            levels=arguments.maybe(arguments.levels, "levels", levels),
            head_activation=head_activation,
            patch_tokens=patch_tokens,
            config=arguments.maybe(arguments.path, "config", config),
            problem=problem,
        )

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
