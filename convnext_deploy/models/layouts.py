"""A checkpoint's tensors translated from the names that it has to this project's own, and what they show.

Whatever stands before a layout's anchor (`module.`, `model.`, `_orig_mod.`, `backbone.`) is a prefix and is taken off.
Every key must be understood: a left-over key is an error, because a weight that is silently ignored is a wrong model.
Two kinds of file hold more on purpose: a backbone stands beside the neck and heads of its detector or segmenter, and
the tasks embed and features use no classifier.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from ..records.base import Task
from ..records.manifest import HeadActivation, ModelSpec
from . import beside, registry
from .heads import Classifier, classifier_of
from .names import LAYOUTS, Layout


@dataclass(frozen=True, slots=True)
class Converted:
    """Tensors under this project's names, and what the source's key names showed beyond them."""

    layout: str
    tensors: dict[str, Tensor]
    visible: dict[str, Any]  # the fields of `registry.VISIBLE`
    num_classes: int
    in_chans: int
    note: str | None = None  # what was left out, or taken for granted
    mlp: tuple[int, HeadActivation] | None = None  # hidden width and activation of a head that a fine-tune put there
    normalization: beside.Normalization | None = None  # a layer in front of the network
    level_norms: tuple[int, ...] = ()  # the levels, 1 to 4, whose maps have a norm of their own


_OF_TIMM = (
    "timm",
    "open_clip",
    "timm_features",
)  # the other layouts know the papers' arithmetic only: LayerNorm, 1e-6, exact GELU


def has_anchor(state: Mapping[str, Tensor]) -> bool:
    """Whether some ConvNeXt is in it, below any prefix."""
    return any(layout.prefixes(state) for layout in LAYOUTS)


def convert(
    state: Mapping[str, Tensor],
    where: str,
    prefix: str | None = None,
    *,
    task: Task = "classify",
    head_activation: HeadActivation | None = None,
) -> Converted:
    """Translate a state dict of any known layout.

    Args:
        state: key to tensor; nothing is modified.
        where: how to call the checkpoint in an error.
        prefix: take only the keys below it. None: found by the layout's anchor.
        task: without a classifier, that may have any form; with maps, a backbone may stand beside anything.
        head_activation: between the two linears of an MLP head, which its tensors do not tell.

    Raises:
        WeightsError: no layout fits, several prefixes fit, or a key is left over.
    """
    whole = state = _unwrapped(state, where)
    prefix = None if prefix is None else beside.unwrapped(prefix)
    if prefix is not None:
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    layout, found, others = _recognise(state, where)
    notes = []
    if others:
        notes.append(f"taking {found} of {where}, and not {', '.join(others)} (--weights-key chooses)")
        state = {key: value for key, value in state.items() if key.startswith(found) or not key.startswith(others)}
    keys = _translated(state, layout, found, where)
    tensors, outside, left = keys.tensors, keys.outside, keys.counters
    _refuse_differing_copies(state, layout, found, tensors, where)
    around = [key for key in whole if not key.startswith(((prefix or "") + found, *keys.siblings)) and whole[key].ndim]
    levels = _level_norms(layout, tensors, pooled=task != "features" or not around)
    backbone = (layout.backbone or bool(levels)) and "head.norm.weight" not in tensors
    if backbone and task != "features":
        raise WeightsError(
            f"{where} ({layout.name} layout) is a backbone: it gives maps and has no head; use --task features"
            + (", or --task segment for the whole" if any("decode_head." in key for key in whole) else "")
        )
    normalization = beside.normalization(state, outside, _channels(tensors), where)
    if normalization is not None:
        outside = [key for key in outside if key not in normalization.keys]
        notes.append(f"{' and '.join(normalization.keys)} are taken for the normalization of the pixels")
    head, root = keys.head, found + layout.classifier
    behind = None if head or backbone else beside.head(state, outside, keys.parent, _width(tensors))
    if behind is not None:
        own = {key: state[key] for key in outside if key.startswith(behind)}
        outside = [key for key in outside if key not in own]
        left = left if task == "classify" else [*left, *own]
        if task == "classify":
            head, root = {key.removeprefix(behind): value for key, value in own.items()}, behind
            network = found.rstrip(".") or "the network"
            notes.append(f"{behind.rstrip('.')} is taken for the classifier behind {network}")
    if backbone:
        left, outside = left + outside, []
    if keys.inside or outside:
        raise WeightsError(
            f"{where} ({layout.name} layout) has keys that ConvNeXt does not: {_named(keys.inside + outside, 5)}; "
            + (
                f"load the ConvNeXt alone with --weights-key {(prefix or '') + found} "
                f"({sum(key.startswith(found) for key in state)} of {len(state)} keys)"
                if found and not keys.inside
                else "name the part to load with --weights-key (a wrapper or a key prefix)"
            )
        )
    notes += [f"left out {_named(left, 3)}, beside the model"] if left else []
    classifier = Classifier({f"head.classifier.{name}": v for name, v in head.items() if name in ("weight", "bias")})
    if task == "classify" and head:
        classifier = classifier_of(head, root, where, head_activation)
        notes += classifier.notes
    if classifier.tensors.keys() & tensors.keys():
        raise WeightsError(f"{where} ({layout.name} layout) has two heads; name the part to load with --weights-key")
    norm_first = any(key.startswith(found + "norm_pre.") for key in state)
    described = _described(layout.name, tensors | classifier.tensors, norm_first, where)
    mlp = None
    if classifier.hidden is not None and classifier.activation is not None:
        mlp = (classifier.hidden, classifier.activation)
        described.visible["head_hidden"] = None  # a fine-tune's head tells nothing of the variant
    return replace(described, note="; ".join(notes) or None, normalization=normalization, level_norms=levels, mlp=mlp)


def _unwrapped(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if beside.unwrapped(key) in found:
            raise WeightsError(f"{where} has {beside.unwrapped(key)} a second time, as {key}; expected it once")
        found[beside.unwrapped(key)] = value
    return found


@dataclass(slots=True)
class _Keys:
    """A state dict's keys by what they are. `head` is below the layout's own name for it."""

    parent: str  # what stands before the last name of the network's prefix
    siblings: tuple[str, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    inside: list[str] = field(default_factory=list)  # below the prefix, and no parameter of a ConvNeXt
    outside: list[str] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)  # such as AveragedModel's `n_averaged`; no weight is one number


def _translated(state: Mapping[str, Tensor], layout: Layout, found: str, where: str) -> _Keys:
    parent = found[: found.rstrip(".").rfind(".") + 1]
    keys = _Keys(parent, tuple(parent + name for name in layout.siblings))
    sources: dict[str, str] = {}
    for key, value in state.items():
        if not key.startswith((found, *keys.siblings)):
            if value.ndim == 0:
                keys.counters.append(key)
            elif not re.fullmatch(layout.ignored, "\0", re.DOTALL):
                keys.outside.append(key)
            continue
        bare = key[len(found if key.startswith(found) else parent) :]
        if bare.startswith(layout.classifier):
            keys.head[bare.removeprefix(layout.classifier)] = value
            continue
        name = layout.named(bare)
        if name in keys.tensors:
            raise WeightsError(
                f"{where} ({layout.name} layout) has {sources[name]} and {key}, which mean the same; "
                "expected one of them"
            )
        if name is not None:
            keys.tensors[name], sources[name] = value, key
        elif layout.copied(bare) is None and not re.fullmatch(layout.ignored, bare, re.DOTALL):
            keys.inside.append(key)
    return keys


def _refuse_differing_copies(
    state: Mapping[str, Tensor], layout: Layout, found: str, tensors: Mapping[str, Tensor], where: str
) -> None:
    for key, value in state.items():
        name = layout.copied(key[len(found) :]) if key.startswith(found) else None
        original = tensors.get(name) if name is not None else None
        if original is None or value.is_meta or original.is_meta or torch.equal(value, original):
            continue
        raise WeightsError(
            f"{where} ({layout.name} layout): {key} differs from the {name} that it is a copy of; expected equal "
            "values, because one of them is left out; save the checkpoint again"
        )


def _level_norms(layout: Layout, tensors: dict[str, Tensor], pooled: bool) -> tuple[int, ...]:
    """The levels whose maps have a norm.

    mmpretrain's classifiers call the norm of the pooled vector `norm3`, as a detector's backbone calls that of the
    last map. It is the latter where other levels have one too, or where the heads of a detector stand beside it.

    Args:
        pooled: the last norm, where it is the only one, is taken for that of the pooled vector.
    """
    levels = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("level_norms.")})
    if layout.name == "mmpretrain" and levels == [4] and pooled and "head.norm.weight" not in tensors:
        for parameter in ("weight", "bias"):
            value = tensors.pop(f"level_norms.4.{parameter}", None)
            if value is not None:
                tensors[f"head.norm.{parameter}"] = value
        return ()
    return tuple(levels)


def _named(keys: list[str], most: int) -> str:
    """Keys of a file on one line, whatever they hold."""
    shown = ", ".join(key if key.isprintable() else repr(key) for key in keys[:most])
    return shown + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _recognise(state: Mapping[str, Tensor], where: str) -> tuple[Layout, str, tuple[str, ...]]:
    """The layout, the network's prefix, and the prefixes of its copies that are not taken."""
    for layout in LAYOUTS:
        prefixes = layout.prefixes(state)
        best = beside.averaged(prefixes) if len(prefixes) > 1 else None
        if best is not None:
            return layout, best, tuple(prefix for prefix in prefixes if prefix != best)
        if len(prefixes) > 1:
            raise WeightsError(
                f"{where} holds {len(prefixes)} ConvNeXts, below {', '.join(_counted(p, state) for p in prefixes)}; "
                "choose one with --weights-key"
            )
        if prefixes:
            return layout, prefixes[0], ()
    shown = _named(list(state), 4) or "no tensors"
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise WeightsError(f"{where} is not a ConvNeXt checkpoint (keys: {shown}); expected one of the layouts {known}")


def _channels(tensors: Mapping[str, Tensor]) -> int:
    stem = tensors.get("stem.0.weight")
    return stem.shape[1] if stem is not None and stem.ndim == 4 else 0


def _width(tensors: Mapping[str, Tensor]) -> int:
    """The number of channels of the pooled vector."""
    conv = tensors.get("stages.3.0.dwconv_norm.conv.weight")
    return conv.shape[0] if conv is not None and conv.ndim == 4 else 0


def _counted(prefix: str, state: Mapping[str, Tensor]) -> str:
    return f"{prefix!r} ({sum(key.startswith(prefix) for key in state)} of {len(state)} keys)"


def _described(layout: str, tensors: dict[str, Tensor], norm_first: bool, where: str) -> Converted:
    weight = tensors.get("head.classifier.weight")
    if layout == "open_clip" and weight is not None and weight.ndim > 0 and "head.classifier.bias" not in tensors:
        tensors["head.classifier.bias"] = weight.new_zeros(weight.shape[0])  # open_clip projects without a bias
    stem_convs = sorted({int(n.split(".")[1]) for n, v in tensors.items() if n.startswith("stem.") and v.ndim == 4})
    named = {_stem_name(name, stem_convs): value for name, value in tensors.items()}
    if len(named) < len(tensors):
        raise WeightsError(f"{where} ({layout} layout) has more than one norm in its stem")
    tensors = named
    depths = []
    for i in range(4):
        # Without leading zeros, which would name one block twice.
        blocks = {name.split(".")[2] for name in tensors if name.startswith(f"stages.{i}.")}
        gaps = [j for j in range(len(blocks)) if str(j) not in blocks]
        if gaps or not blocks:
            raise WeightsError(f"{where} ({layout} layout) is incomplete: stage {i} has no block {[*gaps, 0][0]}")
        depths.append(len(blocks))
    try:
        depthwise = [tensors[f"stages.{i}.0.dwconv_norm.conv.weight"] for i in range(4)]
        stem = tensors["stem.convs.0.weight"]
    except KeyError as error:
        raise WeightsError(
            f"{where} ({layout} layout) is incomplete: it has no 4-dimensional {error.args[0]!r}"
        ) from None
    for conv in depthwise:
        if conv.ndim != 4 or 0 in conv.shape or conv.shape[-1] % 2 == 0:
            raise WeightsError(
                f"{where} ({layout} layout) has a depthwise weight of shape {tuple(conv.shape)}; "
                "expected (C, 1, k, k) with odd k"
            )
    _refuse_other_patches(stem, len(stem_convs) == 2, where, layout)
    if 0 in stem.shape:
        raise WeightsError(f"{where} ({layout} layout) has an empty weight in its stem, {tuple(stem.shape)}")
    kind = "patch"
    if len(stem_convs) == 2:
        tiered = stem.shape[0] < depthwise[0].shape[0]
        # With the activation between them, timm numbers the convolutions 0 and 2.
        kind = "overlap_act" if stem_convs == [0, 2] else "overlap_tiered" if tiered else "overlap"
    hidden, classifier = tensors.get("head.hidden.weight"), tensors.get("head.classifier.weight")
    if any(linear is not None and (linear.ndim == 0 or linear.shape[0] == 0) for linear in (hidden, classifier)):
        raise WeightsError(f"{where} ({layout} layout) has a linear without rows in its head")
    first, width = hidden if hidden is not None else classifier, depthwise[3].shape[0]
    if first is not None and first.ndim > 1 and first.shape[1] == 2 * width:
        raise WeightsError(
            f"{where} ({layout} layout) has a head of {2 * width} channels on {width}: a pooling that joins average "
            "and maximum (global_pool catavgmax, fastai's AdaptiveConcatPool2d); expected global_pool avg"
        )
    _fill_biases_that_no_convolution_has(tensors)
    visible = {
        "depths": tuple(depths),
        "dims": tuple(conv.shape[0] for conv in depthwise),
        "kernel_sizes": tuple(conv.shape[-1] for conv in depthwise),
        "stem": kind,
        # Of any block, so that a block that lacks its own is incomplete and not a sign of another architecture.
        "layer_scale": any(name.endswith(".project.layer_scale") for name in tensors),
        "grn": any(name.endswith(".grn.weight") for name in tensors),
        "head": "norm_pool" if norm_first else "pool_norm",
        "head_hidden": None if hidden is None else hidden.shape[0],
    }
    return Converted(layout, tensors, visible, 0 if classifier is None else classifier.shape[0], stem.shape[1])


def _refuse_other_patches(stem: Tensor, overlapping: bool, where: str, layout: str) -> None:
    side, what = (3, "an overlapping stem") if overlapping else (4, "patches")
    if stem.ndim == 4 and stem.shape[2:] != (side, side):
        high, wide = stem.shape[2:]
        raise WeightsError(
            f"{where} ({layout} layout) has {what} of {high}x{wide} pixels (patch_size {high}); expected "
            f"{side}x{side}, as every published ConvNeXt has"
        )


def _fill_biases_that_no_convolution_has(tensors: dict[str, Tensor]) -> None:
    """Of a network that was made with `conv_bias=False`, whose norms have the biases. One missing alone is damage."""
    weights = [name for name in tensors if name.endswith((".conv.weight",)) or name.startswith("stem.convs.")]
    convs = [name.removesuffix("weight") for name in weights if name.endswith("weight")]
    if convs and not any(f"{name}bias" in tensors for name in convs):
        for name in convs:
            weight = tensors[f"{name}weight"]
            tensors[f"{name}bias"] = weight.new_zeros(weight.shape[0] if weight.ndim else 0)


def _stem_name(name: str, convs: list[int]) -> str:
    """`stem.<index>.<parameter>` by what stands at that index: a convolution has a 4-dimensional weight."""
    if not name.startswith("stem."):
        return name
    _, index, parameter = name.split(".")
    if int(index) in convs:
        return f"stem.convs.{convs.index(int(index))}.{parameter}"
    return f"stem.norm.{parameter}"


def _differing(spec: ModelSpec, found: Mapping[str, Any]) -> str:
    """The first field in which a spec is not what was found, or else "norm"."""
    return next((name for name, value in found.items() if name != "norm" and getattr(spec, name) != value), "norm")


def spec_of(converted: Converted, variant: str | None, where: str) -> ModelSpec:
    """The architecture that a checkpoint's tensors show, named after the published variant that has the same.

    What tensors do not show (epsilons, the activation, which of the norms without bias) comes from that variant.
    Widths and depths that no variant has give "custom" with the paper's choices: LayerNorm, GELU, 1e-6. So do those
    of a variant with other choices in a layout whose code has no others.

    Args:
        variant: the user's own word for it, a key of `registry.VARIANTS`; then the tensors must agree with it.

    Raises:
        WeightsError: the tensors contradict `variant`, or they fit several or no variants where it matters.
    """
    norm_bias = any(name.endswith("norm.bias") for name in converted.tensors)
    visible = converted.visible
    names = registry.recognise(visible, norm_bias)
    counts: dict[str, Any] = {"num_classes": converted.num_classes, "in_chans": converted.in_chans}
    if not names and visible["head_hidden"] is not None:  # a head of its own on the network of a variant
        visible, counts["head_hidden"] = visible | {"head_hidden": None}, visible["head_hidden"]
        names = registry.recognise(visible, norm_bias)
    found = visible | {"norm": f"with{'' if norm_bias else 'out'} bias"}
    if converted.mlp is not None:
        counts["head_hidden"], counts["head_activation"] = converted.mlp
    if converted.level_norms:
        counts["level_norms"] = converted.level_norms
    if converted.layout == "transformers":
        counts["head_norm_eps"] = 1e-12  # the default of its configs
    if converted.layout not in _OF_TIMM:
        found |= {"activation": "gelu", "norm_eps": 1e-6}
        names = tuple(name for name in names if _differing(registry.spec(name), found) == "norm")
    if variant is not None:
        if variant in names:
            return registry.spec(variant, **counts)
        asked = registry.spec(variant)
        field = _differing(asked, found)
        raise WeightsError(
            f"{where} is not a {variant}: its {field} is {found[field]}, expected {getattr(asked, field)}"
            + (f"; it fits {', '.join(names)}" if names else "")
        )
    if len(names) == 1:
        return registry.spec(names[0], **counts)
    if len(names) > 1:
        raise WeightsError(f"{where} fits {', '.join(names)}; choose one with --variant")
    if not norm_bias:
        raise WeightsError(
            f"{where} has norms without bias and widths {visible['dims']} of no published variant, so "
            "whether they are RMSNorm or SimpleNorm cannot be told; only published variants of these can be loaded"
        )
    return ModelSpec(architecture="custom", **(visible | counts))
