"""Checkpoints from anywhere, filled into our module with every key accounted for.

A source is a published timm name (`convnext_base.fb_in1k`), `hf-hub:owner/name` (with `@revision` after it for one
branch, tag or commit), a folder with `config.json` (timm's or transformers'), a file (.safetensors, .pth, .pt, .bin,
.ckpt), or the word `random`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from ..errors import WeightsError, counted, plain
from ..records.base import MAX_SIDE, STRIDE, Problem, Task
from ..records.manifest import HeadActivation, ModelSpec, Preprocessing, Provenance, WeightsRecord
from . import open_clip, registry, segmenters, torchvision_detectors
from .architecture import Converted, spec_of
from .configured import configured
from .convnext import ConvNeXt
from .facts import preprocessing_of, with_facts, with_problem, with_tokens
from .labels import labels_of
from .layouts import convert
from .locations import Checkpoint, read
from .parameters import filled, random_model, refuse_not_finite, tensors_sha256
from .provenance import joined, provenance, sourced
from .training import with_held_labels


@dataclass(frozen=True, slots=True)
class Loaded:
    """A filled module and everything the manifest says about where it came from."""

    model: ConvNeXt
    weights: WeightsRecord
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    note: str | None = None  # which of several models in the file this is, and what of it was left out
    provenance: dict[str, Provenance] = field(default_factory=dict)
    origin: "Origin | None" = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a module's tensors were read, so that another library can read them too (`oracle`)."""

    files: tuple[Path, ...]
    config: Mapping[str, Any]
    key: str | None
    layout: str
    overridden: bool  # the user said some of the preprocessing


def load(
    weights: str | None,
    *,
    variant: str | None = None,
    task: Task = "classify",
    image_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    weights_key: str | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    levels: tuple[int, ...] | None = None,
    head_activation: HeadActivation | None = None,
    patch_tokens: bool = False,
    config: Path | None = None,
    problem: Problem | None = None,
) -> Loaded:
    """Find, read and convert a checkpoint.

    Args:
        weights: the source (see the module); None takes timm's published weights of `variant`.
        variant: a variant's name in any form that `registry.resolve` knows; None infers it from the tensors.
        image_size: (height, width) in pixels; None takes what the source says, else 224x224.
        num_classes, in_chans: must agree with the checkpoint; they shape the model where `weights` is "random". None
            is 1000 classes there, of a segmenter ADE20K's 150, of a detector COCO's 91, and 3 channels.
        weights_key: the wrapper or key prefix to load from a file that contains several models.
        preprocessing: fields of `Preprocessing` that override what stands beside the checkpoint; a mean or std of one
            number is for every channel.
        head_activation: between the two linears of an MLP head, which tensors do not tell.
        patch_tokens: of the task embed: also the last map's pixels, as DINOv3 returns them.
        config: a file with what stands beside the checkpoint otherwise: a configuration of mmpretrain and its relatives
            (.py, with the files that it begins in), or a JSON file of timm, transformers or open_clip.
        problem: what a classifier's outputs mean; None: what stands beside the checkpoint.
        levels: of the task features: which maps, of 1 to 4; None: those that have a norm in the checkpoint, else all.

    Raises:
        WeightsError: nothing found, nothing reachable, not a ConvNeXt, or in contradiction to the arguments.
        UsageError: an unknown variant.
    """
    name, tag = registry.resolve(variant) if variant else (None, None)
    if head_activation is not None and (task != "classify" or weights == "random"):
        where = "random weights" if weights == "random" else f"--task {task}"
        raise WeightsError(f"--head-activation {head_activation} is for a checkpoint's classifier, not for {where}")
    if config is not None and weights == "random":
        raise WeightsError(f"--config {config} is of a checkpoint, not of random weights; leave it out")
    if weights == "random":
        if name is None:
            raise WeightsError("--weights random needs --variant: there are no tensors to infer it from")
        for field, asked, least in (
            ("class", num_classes, {"classify": 1, "segment": 1, "detect": 2}.get(task, 0)),
            ("channel", in_chans, 1),
        ):
            if asked is not None and asked < least:
                raise WeightsError(f"{counted(asked, field)}; expected at least {least}")
        if num_classes is None:
            num_classes = {"segment": segmenters.CLASSES, "detect": torchvision_detectors.CLASSES}.get(task)
        overrides = {"num_classes": num_classes, "in_chans": in_chans}
        spec = registry.spec(name, **{key: value for key, value in overrides.items() if value is not None})
        with_head = {"segment": segmenters.random_spec, "detect": torchvision_detectors.random_spec}.get(task)
        spec = spec if with_head is None else with_head(spec)
        spec = _with_levels(_placed(spec, task, image_size, None), levels, "random weights")
        spec = with_problem(with_tokens(spec, patch_tokens), None, problem, "random weights")
        known = {"input_size": spec.image_size, "global_pool": "avg"}  # of what has no training
        if task == "detect":
            known |= torchvision_detectors.PREPARED
        prepared = preprocessing_of(known | dict(preprocessing or {}), spec)
        _refuse_preparation(prepared, task, "random weights")
        model = random_model(spec)
        record = WeightsRecord(
            source="random", layout="own", random=True, tensors_sha256=tensors_sha256(model.state_dict())
        )
        return Loaded(model, record, prepared, None)

    checkpoint = read(weights, name, tag, weights_key)
    if config is not None:
        facts = configured(checkpoint.facts, config, preprocessing or {}, checkpoint.source)
        checkpoint = replace(checkpoint, facts=facts)
    state: Mapping[str, Tensor] = checkpoint.state
    head: dict[str, Tensor] | None = None
    if task == "segment":
        head, state, left = segmenters.split(checkpoint.state, checkpoint.prefix, checkpoint.source)
    elif task == "detect":
        head, state = torchvision_detectors.split(checkpoint.state, checkpoint.prefix, checkpoint.source)
    converted = convert(
        state,
        checkpoint.source,
        checkpoint.prefix,
        task="features" if task in ("segment", "detect") else task,
        head_activation=head_activation,
    )
    spec = spec_of(converted, name, checkpoint.source)
    if head is not None and task == "detect":
        spec = torchvision_detectors.described(spec, head, checkpoint.facts, checkpoint.source)
        converted = replace(converted, tensors=converted.tensors | head)
        checkpoint = replace(checkpoint, facts=torchvision_detectors.prepared(checkpoint.facts))
    elif head is not None:
        spec = segmenters.described(spec, head, checkpoint.facts, checkpoint.source)
        converted = segmenters.with_head(converted, head, left)
    for field, asked, actual in (("classes", num_classes, spec.num_classes), ("channels", in_chans, spec.in_chans)):
        if asked is not None and asked != actual:
            raise WeightsError(f"{checkpoint.source} has {actual} {field}, not {asked}; fine-tune it first")
    spec = _placed(
        with_facts(spec, checkpoint.facts, checkpoint.source), task, image_size, _trained_size(spec, checkpoint.facts)
    )
    if spec.detection is None or levels is not None:  # a detector's pyramid tells which maps it takes
        spec = _with_levels(spec, levels, checkpoint.source, checkpoint.facts.get("levels"))
    spec = with_problem(with_tokens(spec, patch_tokens), checkpoint.facts.get("problem"), problem, checkpoint.source)
    _refuse_beyond_limits(spec, checkpoint.source)
    if task == "classify" and spec.num_classes == 0:
        raise WeightsError(f"{checkpoint.source} has no classifier; use --task embed or --task features")
    if task == "classify" and not checkpoint.facts.get("pooled", True):
        raise WeightsError(
            f"{checkpoint.source}: its configuration has global_pool '', with which it gives logits for every place of "
            "the last map; expected 'avg': use --task features, or write 'avg' there for one vector of logits"
        )
    model = filled(spec, converted, checkpoint.source)
    refuse_not_finite(model, converted, checkpoint.state, checkpoint.source)
    record = WeightsRecord(
        source=checkpoint.source,
        layout=converted.layout,
        random=False,
        tensors_sha256=tensors_sha256(model.state_dict()),
        file_sha256=checkpoint.file_sha256,
        licence=checkpoint.licence or _licence_of(converted.layout, checkpoint.source),
        revision=checkpoint.revision,
    )
    known = _with_normalization(checkpoint, converted, preprocessing or {})
    if image_size is not None:
        known["input_size"] = list(image_size)
    if converted.layout not in ("own", "timm"):
        known["global_pool"] = "avg"  # the code of those layouts has no other
    silent = open_clip.DEFAULTS if converted.layout == "open_clip" else {}
    prepared = preprocessing_of({**known, **(preprocessing or {})}, spec, silent)
    _refuse_preparation(prepared, task, checkpoint.source)
    facts = with_held_labels(checkpoint.facts, spec)
    labels = labels_of(facts, spec)
    given = {field: f"--{field.replace('_', '-')}" for field in preprocessing or {}}
    given |= {} if image_size is None else {"image_size": "--image-size"}
    given |= {} if name is None else {"activation": "--variant", "norm_eps": "--variant"}
    if converted.normalization is not None:
        facts = joined(facts, sourced({"mean": 0, "std": 0}, "the layer in front of the network"))
    return Loaded(
        model,
        record,
        prepared,
        labels,
        "; ".join(filter(None, (checkpoint.note, converted.note))) or None,
        provenance(spec, prepared, labels, facts, converted.layout, given),
        Origin(checkpoint.files, checkpoint.config, weights_key, converted.layout, bool(preprocessing)),
    )


def _refuse_preparation(steps: Preprocessing, task: Task, where: str) -> None:
    """Refuse steps with which a segmenter's masks or a detector's boxes would be elsewhere.

    Raises:
        WeightsError: with what to say instead.
    """
    if task == "segment":
        segmenters.refuse_crop(steps, where)
    elif task == "detect":
        torchvision_detectors.refuse_other_preparation(steps, where)


def _refuse_beyond_limits(spec: ModelSpec, where: str) -> None:
    """Refuse numbers that no manifest may have: what a configuration says goes into it as it is.

    Raises:
        WeightsError: naming the field and its limit.
    """
    try:
        msgspec.convert(msgspec.to_builtins(spec), ModelSpec)
    except msgspec.ValidationError as error:
        raise WeightsError(
            f"{where}, or its configuration: {plain(error)}; expected a ConvNeXt within limits"
        ) from None


def _trained_size(spec: ModelSpec, facts: Mapping[str, Any]) -> list[int] | None:
    """(height, width) that the source says; of a detector the sides that images are resized to, said or assumed."""
    said: list[int] | None = facts.get("input_size")
    if said is None and spec.detection is not None:
        return [spec.detection.min_side, spec.detection.max_side]
    return said


def _licence_of(layout: str, source: str) -> str | None:
    """The licence of weights that are published under it alone: DINOv3's layouts, and its name in that of a file."""
    return "dinov3-license" if layout.startswith("dinov3") or "dinov3" in source.lower() else None


def _with_normalization(checkpoint: Checkpoint, converted: Converted, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The facts, with the mean and std of a layer in front of the network in their place.

    Raises:
        WeightsError: the user, or what stands beside the checkpoint, says another mean or std.
    """
    known, normalization = dict(checkpoint.facts), converted.normalization
    if normalization is None:
        return known
    for name, key, own in zip(
        ("mean", "std"), normalization.keys, (normalization.mean, normalization.std), strict=True
    ):
        said = asked.get(name, known.get(name))
        values = tuple(said) if isinstance(said, (list, tuple)) else own
        if len(values) != len(own) or any(abs(a - b) > 1e-3 for a, b in zip(values, own, strict=True)):
            statistics = ",".join(f"{value:.4g}" for value in own)
            raise WeightsError(
                f"{checkpoint.source} has a normalization in front of the network, {key} {statistics}, and {name} "
                f"{','.join(f'{value:.4g}' for value in values)} is said beside it; expected one of them: load the "
                f"network alone with --weights-key, or leave the other out"
            )
    return known | {"mean": list(normalization.mean), "std": list(normalization.std)}


def _with_levels(
    spec: ModelSpec, asked: tuple[int, ...] | None, where: str, said: tuple[int, ...] | None = None
) -> ModelSpec:
    """With the maps that are asked for, or else those that the source's own code returns.

    Args:
        said: by the configuration (`out_indices`).

    Raises:
        WeightsError: a level without a norm, of a source that has one for others; or levels for another task.
    """
    if spec.task != "features" and asked is not None:
        raise WeightsError(f"levels {_joined(asked)} are for --task features, not for {spec.task}; leave them out")
    if not spec.has_maps:
        return spec
    if said is not None and spec.level_norms and said != spec.level_norms:
        raise WeightsError(
            f"{where}: its configuration says out_indices for the levels {_joined(said)}, and its tensors have norms "
            f"for {_joined(spec.level_norms)}; mend one of them"
        )
    lacking = [level for level in asked or () if spec.level_norms and level not in spec.level_norms]
    if lacking:
        raise WeightsError(
            f"{where} has a norm for the maps of levels {_joined(spec.level_norms)} and none for level {lacking[0]}, "
            f"which its own code does not give; expected some of {_joined(spec.level_norms)}"
        )
    levels = asked or spec.level_norms or said or spec.levels
    stages = registry.stages_in(spec.depths)
    if max(levels) > stages:
        raise WeightsError(
            f"{where} ends after stage {stages} of 4, and the map of level {max(levels)} is asked for; expected some "
            f"of {_joined(tuple(range(1, stages + 1)))}"
        )
    return msgspec.structs.replace(spec, levels=levels)


def _joined(levels: tuple[int, ...]) -> str:
    return ",".join(map(str, levels))


def _placed(spec: ModelSpec, task: Task, asked: tuple[int, int] | None, trained: list[int] | None) -> ModelSpec:
    size = asked or (tuple(trained) if trained else (224, 224))
    if len(size) != 2 or any(not isinstance(side, int) or not STRIDE <= side <= MAX_SIDE for side in size):
        text = "x".join(str(side)[:12] for side in size[:4])
        raise WeightsError(
            f"image size {text} pixels; expected at least {STRIDE}x{STRIDE} and at most {MAX_SIDE}x{MAX_SIDE} "
            "(--image-size 224 or 800x1280)"
        )
    return msgspec.structs.replace(spec, task=task, image_size=(size[0], size[1]))
