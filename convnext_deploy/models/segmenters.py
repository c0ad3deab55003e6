"""Checkpoints of whole segmenters: UPerNet's head beside its ConvNeXt, as transformers and mmsegmentation save it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from torch import Tensor

from ..errors import WeightsError, counted, plain
from ..records.manifest import ModelSpec, Preprocessing, Segmentation
from .architecture import Converted
from .names import Rule

CLASSES = 150  # of ADE20K, as the papers' systems have them
HEAD = "decode_head."
TRAINING_ONLY = "auxiliary_head."  # a second head for the loss of training
_PARAMETERS = {"weight": "weight", "bias": "bias", "running_mean": "mean", "running_var": "variance"}
_UNITS = {"psp_modules": "pyramid", "lateral_convs": "laterals", "fpn_convs": "smooths"}
_SINGLE = {"bottleneck": "bottleneck", "fpn_bottleneck": "fusion"}


def _norm(m: re.Match[str]) -> str:
    return f"{_SINGLE[m[1]]}.norm.{_PARAMETERS[m[2]]}"


_NORM = r"(?:batch_norm|bn)\.(weight|bias|running_mean|running_var)"
RULES: tuple[Rule, ...] = (
    (r"(?:classifier|conv_seg)\.(weight|bias)", r"classifier.\1"),
    (r"psp_modules\.(\d)\.1\.conv\.weight", r"pyramid.\1.conv.weight"),
    (rf"psp_modules\.(\d)\.1\.{_NORM}", lambda m: f"pyramid.{m[1]}.norm.{_PARAMETERS[m[2]]}"),
    (r"(lateral_convs|fpn_convs)\.(\d)\.conv\.weight", lambda m: f"{_UNITS[m[1]]}.{m[2]}.conv.weight"),
    (rf"(lateral_convs|fpn_convs)\.(\d)\.{_NORM}", lambda m: f"{_UNITS[m[1]]}.{m[2]}.norm.{_PARAMETERS[m[3]]}"),
    (r"(bottleneck|fpn_bottleneck)\.conv\.weight", lambda m: f"{_SINGLE[m[1]]}.conv.weight"),
    (rf"(bottleneck|fpn_bottleneck)\.{_NORM}", _norm),
)
_COUNTER = r".*\.num_batches_tracked"


def split(
    state: Mapping[str, Tensor], prefix: str | None, where: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], str | None]:
    """(the head's tensors under this project's names, all that is no head's, what was left out).

    Args:
        prefix: only keys below it are the head's.

    Raises:
        WeightsError: no head, several, or keys of one that UPerNet does not have.
    """
    anchor = re.compile(rf"{re.escape(prefix or '')}(.*?){re.escape(HEAD)}(?:classifier|conv_seg)\.weight")
    prefixes = [match[1] for key in state if (match := anchor.fullmatch(key))]
    if not prefixes:
        raise WeightsError(
            f"{where} has no {HEAD}classifier.weight; --task segment expected a segmenter with UPerNet's head, as "
            "transformers' UperNetForSemanticSegmentation has it; --task features gives the maps of a backbone alone"
        )
    if len(prefixes) > 1:
        raise WeightsError(
            f"{where} has {len(prefixes)} segmenters, below {', '.join(map(repr, prefixes))}; "
            "choose one with --weights-key"
        )
    root = (prefix or "") + prefixes[0]
    head: dict[str, Tensor] = {}
    rest, strange, unused = {}, [], 0
    for key, value in state.items():
        if key.startswith(root + TRAINING_ONLY):
            unused += 1
        elif not key.startswith(root + HEAD):
            rest[key] = value
        elif (name := _named(key.removeprefix(root + HEAD))) is not None:
            head[f"segmenter.{name}"] = value
        elif not re.fullmatch(_COUNTER, key, re.DOTALL):
            strange.append(key)
    if strange:
        raise WeightsError(
            f"{where} has keys in its {HEAD.rstrip('.')} that UPerNet's head does not: {', '.join(strange[:4])}"
            + (f" and {len(strange) - 4} more" if len(strange) > 4 else "")
            + "; only UPerNet's can be exported, export the maps before it with --task features"
        )
    note = (
        f"left out {root}{TRAINING_ONLY.rstrip('.')} ({counted(unused, 'tensor')}), which only training uses"
        if unused
        else None
    )
    return head, rest, note


def _named(key: str) -> str | None:
    for pattern, replacement in RULES:
        match = re.fullmatch(pattern, key)
        if match:
            return replacement(match) if callable(replacement) else match.expand(replacement)
    return None


def completed(head: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the biases that convolutions get when their norm is folded into them."""
    biases = {}
    for name, weight in head.items():
        if name.endswith(".conv.weight") and weight.ndim:
            biases[f"{name.removesuffix('weight')}bias"] = weight.new_zeros(weight.shape[0])
    return head | biases


def described(spec: ModelSpec, head: Mapping[str, Tensor], facts: Mapping[str, Any], where: str) -> ModelSpec:
    """The spec with the head that the tensors and the configuration show.

    Raises:
        WeightsError: they contradict each other.
    """
    classifier, fusion = head.get("segmenter.classifier.weight"), head.get("segmenter.fusion.conv.weight")
    if fusion is None or fusion.ndim != 4 or classifier is None or not classifier.ndim or not classifier.shape[0]:
        raise WeightsError(f"{where} lacks the fpn_bottleneck of UPerNet's head; save the checkpoint again")
    blocks = len({name.split(".")[2] for name in head if name.startswith("segmenter.pyramid.")})
    scales = facts.get("pool_scales", Segmentation().pool_scales)
    if not isinstance(scales, Sequence) or len(scales) != blocks:
        raise WeightsError(
            f"{where}: its head pools at {blocks} scales, and the scales are {scales!r}; say them in pool_scales of "
            "config.json"
        )
    said = facts.get("labels")
    if said is not None and len(said) != classifier.shape[0]:
        raise WeightsError(
            f"{where}: {counted(len(said), 'label')} for {counted(classifier.shape[0], 'class')}; mend its config"
        )
    try:
        segmentation = msgspec.convert(
            {
                "channels": fusion.shape[0],
                "pool_scales": tuple(scales),
                "reduce_labels": facts.get("reduce_labels", False),
                "ignored": facts.get("ignored", Segmentation().ignored),
            },
            Segmentation,
        )
    except msgspec.ValidationError as error:
        raise WeightsError(f"{where}: its configuration of the head: {plain(error)}") from None
    return msgspec.structs.replace(spec, segmentation=segmentation, num_classes=classifier.shape[0])


def random_spec(spec: ModelSpec) -> ModelSpec:
    """The head of the paper's ADE20K system (arXiv:2201.03545), on every map, for weights without training."""
    return msgspec.structs.replace(spec, segmentation=Segmentation(), level_norms=(1, 2, 3, 4))


def facts_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' configuration of an UPerNet, and its image processor, say beside the backbone's."""
    facts: dict[str, Any] = {
        "pool_scales": config.get("pool_scales", [1, 2, 3, 6]),  # the defaults are those of UperNetConfig
        "ignored": config.get("loss_ignore_index", 255),
    }
    processor = config.get("preprocessor")
    if isinstance(processor, Mapping):
        facts["reduce_labels"] = bool(processor.get("do_reduce_labels", processor.get("reduce_labels", False)))
    return facts


def with_head(converted: Converted, head: dict[str, Tensor], note: str | None) -> Converted:
    """The backbone's tensors with those of the head."""
    notes = "; ".join(filter(None, (converted.note, note))) or None
    return replace(converted, tensors=converted.tensors | completed(head), note=notes)


def refuse_crop(steps: Preprocessing, where: str) -> None:
    """Refuse a crop: what is cut off would have no class, and masks would be elsewhere.

    Raises:
        WeightsError: with what to say instead.
    """
    if steps.crop_mode != "squash" or steps.crop_pct != 1.0:
        raise WeightsError(
            f"{where}: the preprocessing crops (crop_pct {steps.crop_pct:.4g}, {steps.crop_mode}); --task segment "
            "expected whole images, resized to the image size: give --crop-pct 1 or mend the image processor's config"
        )
