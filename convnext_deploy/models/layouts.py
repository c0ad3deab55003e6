"""A checkpoint's tensors translated from the names that it has to this project's own.

Whatever stands before a layout's anchor (`module.`, `model.`, `_orig_mod.`, `backbone.`) is a prefix and is taken off.
Every key must be understood: a left-over key is an error, because a weight that is silently ignored is a wrong model.
Two kinds of file hold more on purpose: a backbone stands beside the neck and heads of its detector or segmenter, and
the tasks embed and features use no classifier.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import WeightsError
from ..records.base import Task
from ..records.manifest import HeadActivation
from . import beside, reparametrized
from .architecture import Converted, described
from .heads import Classifier, classifier_of, is_affine
from .names import LAYOUTS, TO_FEATURES, Layout

# How the names of the stem and the stages begin below a network's prefix: to these no fine-tune adds its head.
_BODY = re.compile(
    r"(visual\.trunk\.)?(stem|stages|downsample_layers|features|embeddings|encoder\.stages)[._]|\d\.\d\."
)


def has_anchor(state: Mapping[str, Tensor]) -> bool:
    """Whether some ConvNeXt is in it, below any prefix; its weights may be in parts."""
    names = [reparametrized.whole_name(key) for key in state]
    return any(layout.prefixes(names) for layout in LAYOUTS)


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
    state, joined = reparametrized.joined(_unwrapped(state, where), where)
    beside.refuse_other_tools(state, where)
    state, copies = beside.without_copies(state)
    whole = state
    prefix = None if prefix is None else beside.unwrapped(prefix)
    if prefix is not None:
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    layout, inner_prefix, others = _recognise(state, where)
    notes = [note for note in (joined, copies) if note]
    if others:
        notes.append(f"taking {inner_prefix} of {where}, and not {', '.join(others)} (--weights-key chooses)")
        own, theirs = ((*prefixes, *_beside(layout, prefixes)) for prefixes in ((inner_prefix,), others))
        state = {key: value for key, value in state.items() if key.startswith(own) or not key.startswith(theirs)}
    keys = _translated(state, layout, inner_prefix, where)
    tensors, outside, left = keys.tensors, keys.outside, keys.counters
    _refuse_differing_copies(state, layout, inner_prefix, tensors, where)
    around = [
        key for key in whole if not key.startswith(((prefix or "") + inner_prefix, *keys.siblings)) and whole[key].ndim
    ]
    levels = _level_norms(layout, tensors, pooled=task != "features" or not around)
    backbone = (layout.backbone or bool(levels)) and "head.norm.weight" not in tensors
    if backbone and task != "features":
        raise WeightsError(
            f"{where} ({layout.name} layout) is a backbone: it gives maps and has no head{TO_FEATURES}"
            + (", or --task segment for the whole" if any("decode_head." in key for key in whole) else "")
        )
    if task != "features":
        beside.refuse_learned_pooling(state, where)
    normalization = beside.normalization(state, outside, _channels(tensors), where)
    if normalization is not None:
        outside = [key for key in outside if key not in normalization.keys]
        notes.append(f"{' and '.join(normalization.keys)} are taken for the normalization of the pixels")
    elif prefix is not None:
        apart = [key for key in whole if not key.startswith(prefix)]
        notes += [
            f"{mean} and {std} normalize in front of the network, and --weights-key leaves them out (--mean, --std)"
            for mean, std in beside.normalizing(whole, apart, _channels(tensors))
        ]
    root = _replaced_head(keys, layout, inner_prefix)
    head = keys.head
    behind = [] if backbone else beside.heads(state, outside, keys.around, _width(tensors), biased=task == "classify")
    if task != "classify":  # which uses no head, however many there are
        left = left + [key for key in outside if key.startswith(tuple(behind))]
        outside = [key for key in outside if not key.startswith(tuple(behind))]
    elif len(behind) == 1 and not head:
        head = {key.removeprefix(behind[0]): state[key] for key in outside if key.startswith(behind[0])}
        root, outside = behind[0], [key for key in outside if not key.startswith(behind[0])]
        network = keys.network.rstrip(".") or "the network"
        notes.append(f"{root.rstrip('.')} is taken for the classifier behind {network}")
    if backbone:
        left, outside = left + outside, []
    if keys.inside or outside:
        raise WeightsError(
            f"{where} ({layout.name} layout) has keys that ConvNeXt does not: {_named(keys.inside + outside, 5)}; "
            + _cure_of_others(keys, prefix or "", inner_prefix)
        )
    notes += [f"left out {_named(left, 3)}, beside the model"] if left else []
    classifier = Classifier({f"head.classifier.{name}": v for name, v in head.items() if name in ("weight", "bias")})
    if task == "classify" and head:
        classifier = classifier_of(head, root, where, head_activation)
        notes += classifier.notes
    weight, bias = (classifier.tensors.get(f"head.classifier.{name}") for name in ("weight", "bias"))
    if weight is not None and bias is None and layout.name != "open_clip":
        raise WeightsError(
            f"{where} has the classifier {root}weight without a bias, and so have heads that norm the vector or their "
            f"weight (cosine, ArcFace), which its tensors do not tell; if it is a plain linear, save it with "
            f"{root}bias of {weight.shape[0] if weight.ndim else 0} zeros; else use --task embed"
        )
    if classifier.tensors.keys() & tensors.keys():
        raise WeightsError(f"{where} ({layout.name} layout) has two heads; name the part to load with --weights-key")
    norm_first = any(key.startswith(inner_prefix + "norm_pre.") for key in state)
    description = described(layout.name, tensors | classifier.tensors, norm_first, where, task == "features")
    mlp = None
    if classifier.hidden is not None and classifier.activation is not None:
        mlp = (classifier.hidden, classifier.activation)
        description.visible["head_hidden"] = None  # a fine-tune's head tells nothing of the variant
    if 0 in description.visible["depths"]:
        notes.append(f"ends after stage {description.visible['depths'].index(0)} of 4, whose maps are all it gives")
    return replace(description, note="; ".join(notes) or None, normalization=normalization, level_norms=levels, mlp=mlp)


def _unwrapped(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if beside.unwrapped(key) in tensors:
            raise WeightsError(f"{where} has {beside.unwrapped(key)} a second time, as {key}; expected it once")
        tensors[beside.unwrapped(key)] = value
    return tensors


@dataclass(slots=True)
class _Keys:
    """A state dict's keys by what they are. `head` is below the layout's own name for it."""

    whole: Mapping[str, Tensor]
    network: str  # what all of its names begin with, those of its norm beside it too
    around: str  # what stands before the last name of that
    siblings: tuple[str, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    inside: list[str] = field(default_factory=list)  # below the prefix, and no parameter of a ConvNeXt
    outside: list[str] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)  # such as AveragedModel's `n_averaged`; no weight is one number


def _translated(state: Mapping[str, Tensor], layout: Layout, inner_prefix: str, where: str) -> _Keys:
    parent = _parent(inner_prefix)
    siblings = _beside(layout, (inner_prefix,))
    # Beside its prefix stands a part of the network itself, or the head of it.
    is_split = layout.is_split and any(key.startswith(siblings) for key in state)
    network = parent if is_split else inner_prefix
    keys = _Keys(state, network, _parent(network), siblings)
    sources: dict[str, str] = {}
    for key, value in state.items():
        if not key.startswith((inner_prefix, *keys.siblings)):
            if value.ndim == 0 and beside.is_counter(key, value):
                keys.counters.append(key)
            else:
                keys.outside.append(key)
            continue
        bare = key[len(inner_prefix if key.startswith(inner_prefix) else parent) :]
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
    if not inner_prefix:  # the network's own names are at the top, so what has another there stands beside it
        own = {key.partition(".")[0] for key in sources.values()} | {layout.classifier.partition(".")[0]}
        keys.outside += [key for key in keys.inside if key.partition(".")[0] not in own]
        keys.inside = [key for key in keys.inside if key.partition(".")[0] in own]
        keys.counters += [key for key in keys.outside if state[key].ndim == 0 and beside.is_counter(key, state[key])]
        keys.outside = [key for key in keys.outside if key not in keys.counters]
    return keys


def _beside(layout: Layout, prefixes: tuple[str, ...]) -> tuple[str, ...]:
    """How the names of those parts of networks begin that stand beside their prefixes."""
    return tuple(_parent(prefix) + name for prefix in prefixes for name in layout.siblings)


def _parent(prefix: str) -> str:
    return prefix[: prefix.rstrip(".").rfind(".") + 1]


def _cure_of_others(keys: _Keys, prefix: str, inner_prefix: str) -> str:
    """What to do about keys that are no ConvNeXt's, inside the network or beside it."""
    within = [key for key in keys.inside if _BODY.match(key.removeprefix(inner_prefix))]
    if within:
        return (
            f"no ConvNeXt has {within[0]}: it is another network of similar names, or a ConvNeXt with layers added, "
            "and neither is computed here"
        )
    if keys.network and not keys.inside:
        count = sum(key.startswith(keys.network) for key in keys.whole)
        return f"load the ConvNeXt alone with --weights-key {prefix}{keys.network} ({count} of {len(keys.whole)} keys)"
    if not inner_prefix:
        return "leave out what is not the network's when the checkpoint is saved"
    return "name the part to load with --weights-key (a wrapper or a key prefix)"


def _replaced_head(keys: "_Keys", layout: Layout, inner_prefix: str) -> str:
    """What a head's names begin with. One that was put in the place of more than the classifier is taken as a whole."""
    wider = inner_prefix + layout.wider
    if not keys.inside or not all(key.startswith(wider) and is_affine(key) for key in keys.inside):
        return inner_prefix + layout.classifier
    inner = layout.classifier.removeprefix(layout.wider)
    keys.head = {inner + name: value for name, value in keys.head.items()}
    keys.head |= {key.removeprefix(wider): keys.whole[key] for key in keys.inside}
    keys.inside = []
    return wider


def _refuse_differing_copies(
    state: Mapping[str, Tensor], layout: Layout, inner_prefix: str, tensors: Mapping[str, Tensor], where: str
) -> None:
    for key, value in state.items():
        name = layout.copied(key[len(inner_prefix) :]) if key.startswith(inner_prefix) else None
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
    listing = ", ".join(key if key.isprintable() else repr(key) for key in keys[:most])
    return listing + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _recognise(state: Mapping[str, Tensor], where: str) -> tuple[Layout, str, tuple[str, ...]]:
    """The layout, the network's prefix, and the prefixes of its copies that are not taken."""
    for layout in LAYOUTS:
        prefixes = layout.prefixes(state)
        best = beside.averaged(prefixes) if len(prefixes) > 1 else None
        if best is not None:
            return layout, best, tuple(prefix for prefix in prefixes if prefix != best)
        if len(prefixes) > 1:
            raise WeightsError(
                f"{where} has {len(prefixes)} ConvNeXts, below {', '.join(_counted(p, state) for p in prefixes)}; "
                "choose one with --weights-key"
            )
        if prefixes:
            return layout, prefixes[0], ()
    listing = _named(list(state), 4) or "no tensors"
    known = ", ".join(layout.name for layout in LAYOUTS)
    isotropic = any(re.search(r"(^|\.)blocks\.0\.dwconv\.weight$", key) for key in state)
    if isotropic and not any("stages." in key for key in state):
        raise WeightsError(
            f"{where} is an isotropic ConvNeXt, of one stage without downsampling (keys: {listing}); "
            "expected four stages"
        )
    raise WeightsError(f"{where} is not a ConvNeXt checkpoint (keys: {listing}); expected one of the layouts {known}")


def _channels(tensors: Mapping[str, Tensor]) -> int:
    stem = tensors.get("stem.0.weight")
    return stem.shape[1] if stem is not None and stem.ndim == 4 else 0


def _width(tensors: Mapping[str, Tensor]) -> int:
    """The number of channels of the pooled vector."""
    conv = tensors.get("stages.3.0.dwconv_norm.conv.weight")
    return conv.shape[0] if conv is not None and conv.ndim == 4 else 0


def _counted(prefix: str, state: Mapping[str, Tensor]) -> str:
    return f"{prefix!r} ({sum(key.startswith(prefix) for key in state)} of {len(state)} keys)"
