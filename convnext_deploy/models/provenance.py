"""Of each fact that tensors do not show: whether it is known, and from where, was given by the user, or is assumed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..records.manifest import ModelSpec, Preprocessing, Provenance
from . import detector_names

FROM = "from"  # in facts: where each of the others stood

# Layouts of code that has one activation, one epsilon, one pooling and no dilation; the others' code is configured.
_CONSTANT = ("official", "dinov3", "torchvision", "torchvision_features")
_OF_TIMM = ("timm", "timm_features", "open_clip")
_OPTIONS = "--image-size, --mean, --std, --crop-pct, --interpolation, --variant, --config, --labels"


def sourced(facts: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Facts with the place that they stood in, unless they say another."""
    places = {name: where for name in facts if name != FROM}
    return {**facts, FROM: {**places, **facts.get(FROM, {})}}


def joined(facts: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of two places; the second's go first."""
    return {**facts, **over, FROM: {**facts.get(FROM, {}), **over.get(FROM, {})}}


def says_sides(facts: Mapping[str, Any]) -> bool:
    """Whether both sides that a detector's images are resized to are said, and so its image size."""
    return "min_size" in facts and "max_size" in facts


def equal(one: Any, other: Any) -> bool:
    """Whether two facts say the same, as far as the digits of a configuration go."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-9)
    return bool(one == other)


def shown(value: Any) -> str:
    """A fact as an option takes it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(shown, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def provenance(
    spec: ModelSpec,
    preprocessing: Preprocessing,
    labels: Sequence[str] | None,
    facts: Mapping[str, Any],
    layout: str,
    given: Mapping[str, str],
) -> dict[str, Provenance]:
    """Of the image size, the preprocessing, what the network computes, and the labels.

    Args:
        facts: as `sourced` and `joined` make them.
        given: names to the options that the user gave for them.
    """
    places = facts.get(FROM, {})

    def said(name: str, value: str, fact: str | None = None, otherwise: str | None = None) -> Provenance:
        if name in given:
            return Provenance(
                value=value, how="given", source=given[name], contradicts=contradicted(name, fact or name)
            )
        where = places.get(fact or name) or otherwise
        return Provenance(value=value, how="known" if where else "assumed", source=where)

    used = {"image_size": spec.image_size, "mean": preprocessing.mean, "std": preprocessing.std,
            "interpolation": preprocessing.interpolation, "crop_pct": preprocessing.crop_pct}  # fmt: skip

    def contradicted(name: str, fact: str) -> str | None:
        other = facts.get(fact)
        if other is None or name not in used:
            return None
        if isinstance(other, (list, tuple)) and len(other) == 1:
            other = tuple(other) * spec.in_chans  # of one number, for every channel
        at_test = name in ("image_size", "crop_pct") and "test" in facts and list(spec.image_size) == facts["test"][0]
        if at_test:  # a second size that the checkpoint names, with a crop of its own
            other = spec.image_size if name == "image_size" else facts["test"][1]
        return None if equal(used[name], other) else f"{shown(other)} ({places.get(fact, 'the checkpoint')})"

    of_code = f"the code of the layout {layout}"
    constant = of_code if layout in _CONSTANT else None
    architecture = places.get("architecture")  # what timm's name of an architecture stands for
    head = "" if spec.head_norm_eps == spec.norm_eps else f", head {spec.head_norm_eps:g}"
    sides = "min_size and max_size" if says_sides(facts) else None
    fields = {
        "image_size": said("image_size", "x".join(map(str, spec.image_size)), "input_size", otherwise=sides),
        "mean": said("mean", numbers(preprocessing.mean)),
        "std": said("std", numbers(preprocessing.std)),
        "interpolation": said("interpolation", preprocessing.interpolation),
        "crop_pct": said("crop_pct", f"{preprocessing.crop_pct:.4g}"),
        "activation": said("activation", spec.activation, otherwise=constant or architecture),
        "norm_eps": said("norm_eps", f"{spec.norm_eps:g}{head}", otherwise=constant or architecture),
    }
    if not spec.has_maps:
        fields["global_pool"] = said(
            "global_pool", "avg", otherwise=of_code if layout not in _OF_TIMM else architecture
        )
    fields["output_stride"] = said("output_stride", "32", otherwise=of_code if layout not in _OF_TIMM else architecture)
    if spec.segmentation is not None:
        masks = spec.segmentation
        fields["pool_scales"] = said("pool_scales", numbers(masks.pool_scales))
        fields["ignored"] = said("ignored", str(masks.ignored))
        fields["reduce_labels"] = said("reduce_labels", "yes" if masks.reduce_labels else "no")
    if spec.detection is not None:
        for name, value in detector_names.facts_of(spec.detection).items():
            if name in ("anchor_sizes", "aspect_ratios"):
                lists = value if name == "anchor_sizes" else dict.fromkeys(value)
                fields[name] = said(name, " ".join(map(numbers, lists)))
            else:
                fields[name] = said(name, numbers(value) if isinstance(value, tuple) else f"{value:g}")
    if spec.task in ("classify", "segment", "detect"):
        fields["labels"] = said("labels", f"{len(labels)} names" if labels else "none")
    return fields


def numbers(values: Sequence[float]) -> str:
    """As a user types them: "0.5,0.25"."""
    return ",".join(f"{value:.4g}" for value in values)


def lines(provenances: Mapping[str, Provenance]) -> list[str]:
    """For the first lines of an output: what is given, what is known and from where, and what is assumed."""
    result = []
    for how in ("given", "known"):
        places: dict[str, list[str]] = {}
        for name, one in provenances.items():
            if one.how == how:
                places.setdefault(one.source or "", []).append(f"{name} {one.value}")
        if places:
            result.append(f"{how}: " + "; ".join(f"{', '.join(facts)} ({place})" for place, facts in places.items()))
    result += contradictions(provenances)
    assumed = [f"{name} {one.value}" for name, one in provenances.items() if one.how == "assumed"]
    if assumed:
        result.append(f"assumed: {', '.join(assumed)} (say otherwise with {_OPTIONS})")
    return result


def contradictions(facts: Mapping[str, Provenance]) -> list[str]:
    """A line for each fact that the user gave and the checkpoint says otherwise; what was given is taken."""
    return [
        f"{one.source} gives {name} {one.value}, and the checkpoint says {one.contradicts}: what was given is taken"
        for name, one in facts.items()
        if one.contradicts is not None
    ]


def better(found: Mapping[str, Provenance]) -> list[str]:
    """A line for each fact that the user gave and labelled images fit better with another; what was given is taken."""
    return [
        f"{one.source} gives {name} {one.value}, and labelled images prefer {one.fits_better}: what was given is taken"
        for name, one in found.items()
        if one.fits_better is not None
    ]
