"""The published ConvNeXt variants, by timm's names, and how to recognise one from its tensors.

Facts follow timm 1.0.31 (`timm/models/convnext.py`); the tests hold every row against timm itself.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..arguments import shown
from ..errors import UsageError
from ..records.manifest import ModelSpec

_ATTO: dict[str, Any] = {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320)}
_FEMTO: dict[str, Any] = {"depths": (2, 2, 6, 2), "dims": (48, 96, 192, 384)}
_PICO: dict[str, Any] = {"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512)}
_NANO: dict[str, Any] = {"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640)}
_TINY: dict[str, Any] = {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}
_SMALL: dict[str, Any] = {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)}
_BASE: dict[str, Any] = {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)}
_LARGE: dict[str, Any] = {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)}
_ZEPTO: dict[str, Any] = {"depths": (2, 2, 4, 2), "dims": (32, 64, 128, 256), "norm": "simplenorm"}
_V2: dict[str, Any] = {"grn": True, "layer_scale": False}
_TEST: dict[str, Any] = {"norm_eps": 1e-5, "head_norm_eps": 1e-5}

VARIANTS: dict[str, dict[str, Any]] = {
    "convnext_zepto_rms": _ZEPTO,
    "convnext_zepto_rms_ols": _ZEPTO | {"stem": "overlap_act"},
    "convnext_atto": _ATTO,
    "convnext_atto_ols": _ATTO | {"stem": "overlap_tiered"},
    "convnext_atto_rms": _ATTO | {"norm": "rmsnorm"},
    "convnext_femto": _FEMTO,
    "convnext_femto_ols": _FEMTO | {"stem": "overlap_tiered"},
    "convnext_pico": _PICO,
    "convnext_pico_ols": _PICO | {"stem": "overlap_tiered"},
    "convnext_nano": _NANO,
    "convnext_nano_ols": _NANO | {"stem": "overlap"},
    "convnext_tiny": _TINY,
    "convnext_tiny_hnf": _TINY | {"head": "norm_pool"},
    "convnext_small": _SMALL,
    "convnext_base": _BASE,
    "convnext_large": _LARGE,
    "convnext_large_mlp": _LARGE | {"head_hidden": 1536},
    "convnext_xlarge": {"depths": (3, 3, 27, 3), "dims": (256, 512, 1024, 2048)},
    "convnext_xxlarge": _TEST | {"depths": (3, 4, 30, 3), "dims": (384, 768, 1536, 3072)},
    "convnextv2_atto": _ATTO | _V2,
    "convnextv2_femto": _FEMTO | _V2,
    "convnextv2_pico": _PICO | _V2,
    "convnextv2_nano": _NANO | _V2,
    "convnextv2_tiny": _TINY | _V2,
    "convnextv2_small": _SMALL | _V2,
    "convnextv2_base": _BASE | _V2,
    "convnextv2_large": _LARGE | _V2,
    "convnextv2_huge": _V2 | {"depths": (3, 3, 27, 3), "dims": (352, 704, 1408, 2816)},
    "test_convnext": _TEST | {"depths": (1, 2, 4, 2), "dims": (24, 32, 48, 64), "activation": "gelu_tanh"},
    "test_convnext2": _TEST | {"depths": (1, 1, 1, 1), "dims": (32, 64, 96, 128), "activation": "gelu_tanh"},
    "test_convnext3": _TEST
    | {"depths": (1, 1, 1, 1), "dims": (32, 64, 96, 128), "kernel_sizes": (7, 5, 5, 3), "activation": "silu"},
}

# Names before timm had tags: `convnext_tiny_384_in22ft1k` is now `convnext_tiny.fb_in22k_ft_in1k_384`.
_DEPRECATED = re.compile(r"(convnext_(?:tiny|small|base|large|xlarge))(_384)?_(in22ft1k|in22k)")
_OLD_TAGS = {"in22ft1k": "fb_in22k_ft_in1k", "in22k": "fb_in22k"}

# How the names of other families in timm begin, whose nearest ConvNeXt is not what is meant.
OTHERS = (
    "resne", "wide_resnet", "vit", "swin", "deit", "beit", "eva", "efficientnet", "tf_efficient", "mobilenet", "regnet",
    "densenet", "vgg", "inception", "maxvit", "coatnet", "convmixer", "xcit", "yolo", "dino", "clip",
)  # fmt: skip

# What the tensors of a checkpoint show. The rest (norm_eps, activation, which norm without a bias) they do not.
VISIBLE = ("depths", "dims", "kernel_sizes", "stem", "layer_scale", "grn", "head", "head_hidden")


def spec(name: str, **overrides: Any) -> ModelSpec:
    """The spec of a published variant. `name` must be one of `VARIANTS`."""
    return ModelSpec(**({"architecture": name} | VARIANTS[name] | overrides))


def is_deprecated(name: str) -> bool:
    """Whether timm knows it as an older name of a variant with its tag."""
    match = _DEPRECATED.fullmatch(name)
    return match is not None and not (match[2] and match[3] == "in22k")


def resolve(name: str) -> tuple[str, str | None]:
    """A user's word for a variant as (timm architecture, pretrained tag or None).

    Takes timm's names with or without tag, those that it deprecates, and the short forms `base`, `v2-base`, `v2_base`.

    Raises:
        UsageError: an unknown name, with the nearest ones.
    """
    stem, _, tag = name.strip().lower().partition(".")
    plain = stem.replace("-", "_")
    old = _DEPRECATED.fullmatch(plain) if is_deprecated(plain) and not tag else None
    if old is not None:
        return old[1], _OLD_TAGS[old[3]] + (old[2] or "")
    short = re.sub(r"^(convnext_?)?v2_", "", plain)
    for candidate in (plain, f"convnextv2_{short}" if short != plain else f"convnext_{plain}"):
        if candidate in VARIANTS:
            return candidate, tag or None
    if plain.startswith(OTHERS):
        raise UsageError(f"{shown(name)} is no ConvNeXt; expected one of the {len(VARIANTS)} of `convnext-deploy list`")
    near = difflib.get_close_matches(plain, VARIANTS, n=3, cutoff=0.5)
    near += [close for close in difflib.get_close_matches(f"convnext_{plain}", VARIANTS, n=3) if close not in near]
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise UsageError(f"unknown variant {shown(name)}{hint} (`convnext-deploy list` prints all {len(VARIANTS)})")


def recognise(visible: dict[str, Any], norm_bias: bool) -> tuple[str, ...]:
    """The published variants whose tensors have exactly these shapes.

    Args:
        visible: the fields of `VISIBLE`, read from a checkpoint.
        norm_bias: whether its norms have a bias (LayerNorm) or not (RMSNorm, SimpleNorm).
    """
    return tuple(
        name
        for name in VARIANTS
        if all(agrees(spec(name), field, visible) for field in VISIBLE)
        and (spec(name).norm == "layernorm") == norm_bias
    )


def stages_in(depths: Sequence[int]) -> int:
    """How many stages there are: a backbone may end early, and has depths of 0 from there on."""
    return sum(depth > 0 for depth in depths)


def agrees(published: ModelSpec, field: str, visible: Mapping[str, Any]) -> bool:
    """Whether a variant has what a checkpoint shows of a field; of one that ends early, in the stages that it has."""
    own, shown_ = getattr(published, field), visible[field]
    if isinstance(shown_, tuple):
        stages = stages_in(visible["depths"])
        own, shown_ = own[:stages], shown_[:stages]
    return bool(own == shown_)


def peculiarities(name: str) -> tuple[str, ...]:
    """In what a variant differs from the paper's V1 design, as words for a table."""
    variant, plain = spec(name), ModelSpec(architecture="", depths=(1, 1, 1, 1), dims=(1, 1, 1, 1))
    words = []
    for field in ("kernel_sizes", "stem", "norm", "norm_eps", "activation", "head", "head_hidden"):
        value = getattr(variant, field)
        if value != getattr(plain, field):
            words.append(f"{field} {'-'.join(map(str, value)) if isinstance(value, tuple) else value}")
    return ("V2 (GRN)", *words) if variant.grn else tuple(words)
