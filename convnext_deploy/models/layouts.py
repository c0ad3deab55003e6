"""The key names under which ConvNeXt checkpoints are published, each translated to this project's own.

Five layouts: timm, the official repositories (V1 and V2), Hugging Face transformers, torchvision and open_clip.
Each is recognised by one key that no other layout has; whatever stands before that key (`module.`, `model.`,
`_orig_mod.`, `backbone.`) is a prefix and is taken off. Every key must be understood: a left-over key is an error,
because a weight that is silently ignored is a wrong model.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..errors import WeightsError
from ..records.manifest import ModelSpec
from . import registry

Rule = tuple[str, str | Callable[[re.Match[str]], str]]


@dataclass(frozen=True, slots=True)
class Layout:
    """`anchor` identifies the layout; `rules` are (pattern of a whole key, replacement), the first match counts."""

    name: str
    anchor: str
    rules: tuple[Rule, ...]
    ignored: str = r"(?!)"  # keys that belong to the layout and hold nothing the network computes with
    classifier: str = r"(?!)"  # keys of a classifier of any form, which only --task classify needs


@dataclass(frozen=True, slots=True)
class Converted:
    """Tensors under this project's names, and what the source's key names showed beyond them."""

    layout: str
    tensors: dict[str, Tensor]
    visible: dict[str, Any]  # the fields of `registry.VISIBLE`
    num_classes: int
    in_chans: int
    note: str | None = None  # what was left out, or taken for granted


_WB = r"(weight|bias)"
_SEQUENCE = r"(?:[1-9]\d*\.)?"  # of a linear behind modules without weights, such as dropout, in an nn.Sequential

_BLOCK_TIMM: dict[str, str] = {
    "conv_dw": "dwconv_norm.conv", "norm": "dwconv_norm.norm",
    "mlp.fc1": "expand.linear", "mlp.grn": "grn", "mlp.fc2": "project.linear",
}  # fmt: skip
_BLOCK_OFFICIAL: dict[str, str] = {
    "dwconv": "dwconv_norm.conv", "norm": "dwconv_norm.norm", "layernorm": "dwconv_norm.norm",
    "pwconv1": "expand.linear", "grn": "grn", "pwconv2": "project.linear",
}  # fmt: skip
_BLOCK_TORCHVISION: dict[str, str] = {
    "block.0": "dwconv_norm.conv", "block.2": "dwconv_norm.norm",
    "block.3": "expand.linear", "block.5": "project.linear",
}  # fmt: skip
_NORM_OR_CONV = {"0": "norm", "1": "conv"}
_GRN_NAMES = {"gamma": "weight", "beta": "bias"}


def _block(names: Mapping[str, str]) -> Callable[[re.Match[str]], str]:
    return lambda m: f"stages.{m[1]}.{m[2]}.{names[m[3]]}.{m[4]}"


def _downsample(m: re.Match[str]) -> str:
    return f"downsamples.{int(m[1]) - 1}.{_NORM_OR_CONV[m[2]]}.{m[3]}"


def _alternatives(names: Mapping[str, str]) -> str:
    return "(" + "|".join(re.escape(name) for name in names) + ")"


_TIMM_RULES: tuple[Rule, ...] = (
    (rf"stem\.(\d)\.{_WB}", r"stem.\1.\2"),  # which of them is the norm is told by the ranks, see `_name_stem`
    (rf"stages\.(\d)\.downsample\.([01])\.{_WB}", _downsample),
    (rf"stages\.(\d)\.blocks\.(\d+)\.{_alternatives(_BLOCK_TIMM)}\.{_WB}", _block(_BLOCK_TIMM)),
    (r"stages\.(\d)\.blocks\.(\d+)\.gamma", r"stages.\1.\2.project.layer_scale"),
    (rf"(?:head\.norm|norm_pre)\.{_WB}", r"head.norm.\1"),
    (rf"head\.pre_logits\.fc\.{_WB}", r"head.hidden.\1"),
    (rf"head\.fc\.{_SEQUENCE}{_WB}", r"head.classifier.\1"),
)

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "open_clip",
        "visual.trunk.stem.0.weight",
        (
            *((r"visual\.trunk\." + pattern, new) for pattern, new in _TIMM_RULES),
            (r"visual\.head\.proj\.weight", "head.classifier.weight"),
            (r"visual\.head\.mlp\.fc1\.(weight|bias)", r"head.hidden.\1"),
            (r"visual\.head\.mlp\.fc2\.weight", "head.classifier.weight"),
        ),
        ignored=r"(?!visual\.).*",  # the text tower and the temperature
    ),
    Layout("timm", "stem.0.weight", _TIMM_RULES, classifier=r"head\.fc\..*"),
    Layout(
        "official",
        "downsample_layers.0.0.weight",
        (
            (rf"downsample_layers\.0\.([01])\.{_WB}", r"stem.\1.\2"),
            (rf"downsample_layers\.(\d)\.([01])\.{_WB}", _downsample),
            (
                r"stages\.(\d)\.(\d+)\.grn\.(gamma|beta)",
                lambda m: f"stages.{m[1]}.{m[2]}.grn.{_GRN_NAMES[m[3]]}",
            ),
            (rf"stages\.(\d)\.(\d+)\.{_alternatives(_BLOCK_OFFICIAL)}\.{_WB}", _block(_BLOCK_OFFICIAL)),
            (r"stages\.(\d)\.(\d+)\.gamma", r"stages.\1.\2.project.layer_scale"),
            (rf"norm\.{_WB}", r"head.norm.\1"),
            (rf"head\.{_SEQUENCE}{_WB}", r"head.classifier.\1"),
        ),
        classifier=r"head\..*",
    ),
    Layout(
        "transformers",
        "embeddings.patch_embeddings.weight",
        (
            (rf"embeddings\.patch_embeddings\.{_WB}", r"stem.0.\1"),
            (rf"embeddings\.layernorm\.{_WB}", r"stem.1.\1"),
            (rf"encoder\.stages\.(\d)\.downsampling_layer\.([01])\.{_WB}", _downsample),
            (
                rf"encoder\.stages\.(\d)\.layers\.(\d+)\.{_alternatives(_BLOCK_OFFICIAL)}\.{_WB}",
                _block(_BLOCK_OFFICIAL),
            ),
            (
                r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer_scale_parameter",
                r"stages.\1.\2.project.layer_scale",
            ),
            (rf"layernorm\.{_WB}", r"head.norm.\1"),
            (rf"classifier\.{_SEQUENCE}{_WB}", r"head.classifier.\1"),
        ),
        classifier=r"classifier\..*",
    ),
    Layout(
        "torchvision",
        "features.0.0.weight",
        (
            (rf"features\.0\.([01])\.{_WB}", r"stem.\1.\2"),
            (
                rf"features\.([246])\.([01])\.{_WB}",
                lambda m: f"downsamples.{int(m[1]) // 2 - 1}.{_NORM_OR_CONV[m[2]]}.{m[3]}",
            ),
            (
                rf"features\.([1357])\.(\d+)\.{_alternatives(_BLOCK_TORCHVISION)}\.{_WB}",
                lambda m: f"stages.{int(m[1]) // 2}.{m[2]}.{_BLOCK_TORCHVISION[m[3]]}.{m[4]}",
            ),
            (
                r"features\.([1357])\.(\d+)\.layer_scale",
                lambda m: f"stages.{int(m[1]) // 2}.{m[2]}.project.layer_scale",
            ),
            (rf"classifier\.0\.{_WB}", r"head.norm.\1"),
            (rf"classifier\.2\.{_SEQUENCE}{_WB}", r"head.classifier.\1"),
        ),
        classifier=r"classifier\.(?!0\.).*",
    ),
)  # fmt: skip

_SIBLINGS = {"transformers": ("classifier.",)}  # keys that stand beside the prefix, not below it
_OF_TIMM = ("timm", "open_clip")  # the other layouts know the papers' arithmetic only: LayerNorm, 1e-6, exact GELU


def has_anchor(state: Mapping[str, Tensor]) -> bool:
    """Whether some ConvNeXt is in it, below any prefix."""
    return any(key == layout.anchor or key.endswith("." + layout.anchor) for layout in LAYOUTS for key in state)


def convert(
    state: Mapping[str, Tensor], where: str, prefix: str | None = None, *, classifier: bool = True
) -> Converted:
    """Translate a state dict of any known layout.

    Args:
        state: key to tensor; nothing is modified.
        where: how to call the checkpoint in an error.
        prefix: take only the keys below it. None: found by the layout's anchor.
        classifier: whether it is used. If not, it may have any form.

    Raises:
        WeightsError: no layout fits, several prefixes fit, or a key is left over.
    """
    if prefix is not None:
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    layout, found = _recognise(state, where)
    parent = found[: found.rstrip(".").rfind(".") + 1]
    siblings = tuple(parent + name for name in _SIBLINGS.get(layout.name, ()))
    tensors: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    unknown, counters = [], []
    for key, value in state.items():
        bare = "\0"  # outside the prefix: matches no rule
        if key.startswith(found):
            bare = key[len(found) :]
        elif key.startswith(siblings):
            bare = key[len(parent) :]
        name = _translate(layout, bare)
        if name in tensors and not classifier and re.fullmatch(layout.classifier, bare, re.DOTALL):
            continue
        if name in tensors:
            raise WeightsError(
                f"{where} ({layout.name} layout) has {sources[name]} and {key}, which mean the same; "
                "expected one of them"
            )
        if name is not None:
            tensors[name], sources[name] = value, key
        elif bare == "\0" and found and value.ndim == 0:
            counters.append(key)  # such as AveragedModel's `n_averaged`; no weight is a single number
        elif not re.fullmatch(layout.ignored, bare, re.DOTALL) and (
            classifier or not re.fullmatch(layout.classifier, bare, re.DOTALL)
        ):
            unknown.append(key)
    if unknown:
        shown = _named(unknown, 5)
        inside = sum(key.startswith(found) for key in state)
        outside = bool(found) and not any(key.startswith(found) for key in unknown)
        raise WeightsError(
            f"{where} ({layout.name} layout) has keys that ConvNeXt does not: {shown}; "
            + (
                f"load the ConvNeXt alone with --weights-key {(prefix or '') + found} ({inside} of {len(state)} keys)"
                if outside
                else "name the part to load with --weights-key (a wrapper or a key prefix)"
            )
        )
    norm_first = any(key.startswith(found + "norm_pre.") for key in state)
    notes = [f"left out {_named(counters, 3)}, a counter beside the model"] if counters else []
    head = sources.get("head.classifier.weight", "")
    if classifier and re.search(r"\.[1-9]\d*\.weight$", head) and not head.endswith("classifier.2.weight"):
        notes.append(f"{head} is taken as the classifier: what stands before it has no weights, as dropout has none")
    return replace(_described(layout.name, tensors, norm_first, where), note="; ".join(notes) or None)


def _named(keys: list[str], most: int) -> str:
    """Keys of a file on one line, whatever they hold."""
    shown = ", ".join(key if key.isprintable() else repr(key) for key in keys[:most])
    return shown + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _translate(layout: Layout, key: str) -> str | None:
    for pattern, replacement in layout.rules:
        match = re.fullmatch(pattern, key)
        if match:
            return replacement(match) if callable(replacement) else match.expand(replacement)
    return None


def _recognise(state: Mapping[str, Tensor], where: str) -> tuple[Layout, str]:
    for layout in LAYOUTS:
        prefixes = sorted(
            key.removesuffix(layout.anchor)
            for key in state
            if key == layout.anchor or key.endswith("." + layout.anchor)
        )
        if len(prefixes) > 1:
            raise WeightsError(
                f"{where} holds {len(prefixes)} ConvNeXts, below {', '.join(_counted(p, state) for p in prefixes)}; "
                "choose one with --weights-key"
            )
        if prefixes:
            return layout, prefixes[0]
    shown = _named(list(state), 4) or "no tensors"
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise WeightsError(f"{where} is not a ConvNeXt checkpoint (keys: {shown}); expected one of the layouts {known}")


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
        raise WeightsError(f"{where} ({layout} layout) is incomplete: it has no 4-dimensional {error}") from None
    for conv in depthwise:
        if conv.ndim != 4 or 0 in conv.shape or conv.shape[-1] % 2 == 0:
            raise WeightsError(
                f"{where} ({layout} layout) has a depthwise weight of shape {tuple(conv.shape)}; "
                "expected (C, 1, k, k) with odd k"
            )
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
    names = registry.recognise(converted.visible, norm_bias)
    found = converted.visible | {"norm": f"with{'' if norm_bias else 'out'} bias"}
    counts: dict[str, Any] = {"num_classes": converted.num_classes, "in_chans": converted.in_chans}
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
            f"{where} has norms without bias and widths {converted.visible['dims']} of no published variant, so "
            "whether they are RMSNorm or SimpleNorm cannot be told; only published variants of these can be loaded"
        )
    return ModelSpec(architecture="custom", **converted.visible, **counts)
