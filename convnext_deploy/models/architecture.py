"""What a checkpoint's tensors show of its architecture, once they have this project's names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import WeightsError
from ..records.manifest import HeadActivation, ModelSpec
from . import beside, registry


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


def described(layout: str, tensors: dict[str, Tensor], norm_first: bool, where: str, may_end: bool) -> Converted:
    """The architecture that tensors show.

    Args:
        may_end: the maps of the first stages are enough, so the others may be absent.

    Raises:
        WeightsError: tensors are missing, or are of no ConvNeXt that is built here.
    """
    weight = tensors.get("head.classifier.weight")
    if layout == "open_clip" and weight is not None and weight.ndim > 0 and "head.classifier.bias" not in tensors:
        tensors["head.classifier.bias"] = weight.new_zeros(weight.shape[0])  # open_clip projects without a bias
    stem_convs = sorted({int(n.split(".")[1]) for n, v in tensors.items() if n.startswith("stem.") and v.ndim == 4})
    named = {_stem_name(name, stem_convs): value for name, value in tensors.items()}
    first_conv = tensors.get("stem.0.weight")
    if first_conv is not None and first_conv.ndim in (3, 5):
        what = "sequences" if first_conv.ndim == 3 else "volumes"
        raise WeightsError(
            f"{where} ({layout} layout) is a ConvNeXt of {what}: its first weight has shape {tuple(first_conv.shape)}; "
            "expected four dimensions, as images have"
        )
    if len(named) < len(tensors):
        raise WeightsError(f"{where} ({layout} layout) has more than one norm in its stem")
    tensors = named
    depths: list[int] = []
    for i in range(4):
        # Without leading zeros, which would name one block twice.
        blocks = {name.split(".")[2] for name in tensors if name.startswith(f"stages.{i}.")}
        gaps = [j for j in range(len(blocks)) if str(j) not in blocks]
        # What was cut on purpose has no head either: a classifier without a stage is damaged.
        if not blocks and may_end and i and not any(name.startswith((*_of_stages(i), "head.")) for name in tensors):
            break
        if i and not any(name.startswith(_of_stages(i)) for name in tensors):
            raise WeightsError(
                f"{where} ({layout} layout) is incomplete: stage {i} has no block 0; expected four stages, and it has "
                f"{i} (depths {', '.join(map(str, depths))}): of those the maps are exported, with --task features, if "
                "you save it without its head's norm and classifier"
            )
        if gaps or not blocks:
            raise WeightsError(f"{where} ({layout} layout) is incomplete: stage {i} has no block {[*gaps, 0][0]}")
        depths.append(len(blocks))
    fifth = sorted(name for name in tensors if name.startswith("stages.4."))
    if fifth:
        raise WeightsError(f"{where} ({layout} layout) has more than four stages ({fifth[0]}); expected a ConvNeXt's 4")
    try:
        depthwise = [tensors[f"stages.{i}.0.dwconv_norm.conv.weight"] for i in range(len(depths))]
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
    first, width = hidden if hidden is not None else classifier, depthwise[-1].shape[0]
    if first is not None and first.ndim > 1 and first.shape[1] == 2 * width:
        raise WeightsError(
            f"{where} ({layout} layout) has a head of {2 * width} channels on {width}: a pooling that joins average "
            "and maximum (global_pool catavgmax, fastai's AdaptiveConcatPool2d); expected global_pool avg"
        )
    _fill_biases_that_no_convolution_has(tensors)
    lacking = (0,) * (4 - len(depths))
    visible = {
        "depths": (*depths, *lacking),
        "dims": (*(conv.shape[0] for conv in depthwise), *lacking),
        "kernel_sizes": (*(conv.shape[-1] for conv in depthwise), *(7 for _ in lacking)),
        "stem": kind,
        # Of any block, so that a block that lacks its own is incomplete and not a sign of another architecture.
        "layer_scale": any(name.endswith(".project.layer_scale") for name in tensors),
        "grn": any(name.endswith(".grn.weight") for name in tensors),
        "head": "norm_pool" if norm_first else "pool_norm",
        "head_hidden": None if hidden is None else hidden.shape[0],
    }
    return Converted(layout, tensors, visible, 0 if classifier is None else classifier.shape[0], stem.shape[1])


def _of_stages(first: int) -> tuple[str, ...]:
    """How the names of the tensors of a stage, 0 to 3, and of those after it begin."""
    return tuple(name for i in range(first, 4) for name in (f"stages.{i}.", f"downsamples.{i - 1}."))


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


def _differing(spec: ModelSpec, facts: Mapping[str, Any]) -> str:
    """The first field in which a spec is not what was found, or else "norm"."""
    return next((name for name in facts if name != "norm" and not registry.agrees(spec, name, facts)), "norm")


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
    stages = registry.stages_in(visible["depths"])
    if stages < 4:
        counts |= {"task": "features", "levels": tuple(range(1, stages + 1))}
    traits = visible | {"norm": f"with{'' if norm_bias else 'out'} bias"}
    if converted.mlp is not None:
        counts["head_hidden"], counts["head_activation"] = converted.mlp
    if converted.level_norms:
        counts["level_norms"] = converted.level_norms
    if converted.layout == "transformers":
        counts["head_norm_eps"] = 1e-12  # the default of its configs
    if converted.layout not in _OF_TIMM:
        traits |= {"activation": "gelu", "norm_eps": 1e-6}
        names = tuple(name for name in names if _differing(registry.spec(name), traits) == "norm")
    held = {name: visible[name] for name in ("depths", "dims", "kernel_sizes")}
    if variant is not None:
        if variant in names:
            return registry.spec(variant, **(counts | held))
        named = registry.spec(variant)
        field = _differing(named, traits)
        raise WeightsError(
            f"{where} is not a {variant}: its {field} is {traits[field]}, expected {getattr(named, field)}"
            + (f"; it fits {', '.join(names)}" if names else "")
        )
    if len(names) > 1 and stages < 4:  # several begin alike; what tensors do not show has to be the same
        unseen = {(s.norm, s.norm_eps, s.activation) for s in map(registry.spec, names)}
        if len(unseen) == 1:
            return registry.spec(names[0], **(counts | held | {"architecture": "custom"}))
    if len(names) == 1:
        return registry.spec(names[0], **(counts | held))
    if len(names) > 1:
        raise WeightsError(f"{where} fits {', '.join(names)}; choose one with --variant")
    if not norm_bias:
        raise WeightsError(
            f"{where} has norms without bias and widths {visible['dims']} of no published variant, so "
            "whether they are RMSNorm or SimpleNorm cannot be told; only published variants of these can be loaded"
        )
    return ModelSpec(architecture="custom", **(visible | counts))
