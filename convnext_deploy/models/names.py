"""The key names under which ConvNeXt checkpoints are published: each layout as rules that give this project's names.

A layout is recognised by one key, its anchor. Where two layouts share it, the first that also has its mark counts.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

TO_FEATURES = "; use --task features"  # ends what is said of a backbone without a head

Rule = tuple[str, str | Callable[[re.Match[str]], str]]


@dataclass(frozen=True, slots=True)
class Layout:
    """`anchor` identifies the layout; `rules` are (pattern of a whole key, replacement), the first match counts."""

    name: str
    anchor: str
    rules: tuple[Rule, ...]
    mark: str = ""  # of a key below the same prefix that has to be there too
    ignored: str = r"(?!)"  # keys that belong to the layout and hold nothing the network computes with
    classifier: str = "\0"  # what stands before the names of a classifier's parts, which only --task classify needs
    wider: str = "\0"  # what stands before a head that a fine-tune put in the place of more than the classifier
    copies: tuple[Rule, ...] = ()  # keys that hold a parameter a second time
    siblings: tuple[str, ...] = ()  # keys that stand beside the prefix, not below it
    is_split: bool = False  # what stands there is a part of the network, and no classifier
    backbone: bool = False  # it returns maps for another network, and has no head

    def named(self, key: str) -> str | None:
        """This project's name of a key without its prefix; None where there is none."""
        return _first(self.rules, key)

    def copied(self, key: str) -> str | None:
        """The name of the parameter that a key contains a second time."""
        return _first(self.copies, key)

    def prefixes(self, keys: Iterable[str]) -> list[str]:
        """What stands before the anchor, for each network of this layout."""
        keys = list(keys)
        ends = [key for key in keys if key == self.anchor or key.endswith("." + self.anchor)]
        prefixes = sorted(key.removesuffix(self.anchor) for key in ends)
        return [prefix for prefix in prefixes if self._is_marked(keys, prefix)]

    def _is_marked(self, keys: list[str], prefix: str) -> bool:
        return not self.mark or any(
            key.startswith(prefix) and re.fullmatch(self.mark, key[len(prefix) :]) for key in keys
        )


def _first(rules: tuple[Rule, ...], key: str) -> str | None:
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, key)
        if match:
            return replacement(match) if callable(replacement) else match.expand(replacement)
    return None


_WB = r"(weight|bias)"

_BLOCK_TIMM: dict[str, str] = {
    "conv_dw": "dwconv_norm.conv", "norm": "dwconv_norm.norm",
    "mlp.fc1": "expand.linear", "mlp.grn": "grn", "mlp.fc2": "project.linear",
}  # fmt: skip
_BLOCK_OFFICIAL: dict[str, str] = {
    "dwconv": "dwconv_norm.conv", "norm": "dwconv_norm.norm", "layernorm": "dwconv_norm.norm",
    "pwconv1": "expand.linear", "grn": "grn", "pwconv2": "project.linear",
}  # fmt: skip
_BLOCK_MMPRETRAIN: dict[str, str] = {
    "depthwise_conv": "dwconv_norm.conv", "norm": "dwconv_norm.norm", "layer_norm": "dwconv_norm.norm",
    "pointwise_conv1": "expand.linear", "grn": "grn", "pointwise_conv2": "project.linear",
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


def _level(m: re.Match[str]) -> str:
    """Of the norm of a map, which the detection code counts from 0."""
    return f"level_norms.{int(m[1]) + 1}.{m[2]}"


def _official(block: Mapping[str, str]) -> tuple[Rule, ...]:
    return (
        (rf"downsample_layers\.0\.([01])\.{_WB}", r"stem.\1.\2"),
        (rf"downsample_layers\.(\d)\.([01])\.{_WB}", _downsample),
        (r"stages\.(\d)\.(\d+)\.grn\.(gamma|beta)", lambda m: f"stages.{m[1]}.{m[2]}.grn.{_GRN_NAMES[m[3]]}"),
        (rf"stages\.(\d)\.(\d+)\.{_alternatives(block)}\.{_WB}", _block(block)),
        (r"stages\.(\d)\.(\d+)\.gamma", r"stages.\1.\2.project.layer_scale"),
        (rf"norm([0-3])\.{_WB}", _level),
        (rf"norm\.{_WB}", r"head.norm.\1"),
    )


def _timm(joint: str) -> tuple[Rule, ...]:
    """Rules of the stem and the stages, `joint` standing between their names and numbers."""
    return (
        (rf"stem{joint}(\d)\.{_WB}", r"stem.\1.\2"),  # which of them is the norm is told by the ranks
        (rf"stages{joint}(\d)\.downsample\.([01])\.{_WB}", _downsample),
        (rf"stages{joint}(\d)\.blocks\.(\d+)\.{_alternatives(_BLOCK_TIMM)}\.{_WB}", _block(_BLOCK_TIMM)),
        (rf"stages{joint}(\d)\.blocks\.(\d+)\.gamma", r"stages.\1.\2.project.layer_scale"),
    )


def _torchvision(features: str) -> tuple[Rule, ...]:
    return (
        (rf"{features}0\.([01])\.{_WB}", r"stem.\1.\2"),
        (
            rf"{features}([246])\.([01])\.{_WB}",
            lambda m: f"downsamples.{int(m[1]) // 2 - 1}.{_NORM_OR_CONV[m[2]]}.{m[3]}",
        ),
        (
            rf"{features}([1357])\.(\d+)\.{_alternatives(_BLOCK_TORCHVISION)}\.{_WB}",
            lambda m: f"stages.{int(m[1]) // 2}.{m[2]}.{_BLOCK_TORCHVISION[m[3]]}.{m[4]}",
        ),
        (
            rf"{features}([1357])\.(\d+)\.layer_scale",
            lambda m: f"stages.{int(m[1]) // 2}.{m[2]}.project.layer_scale",
        ),
    )


_TIMM_RULES: tuple[Rule, ...] = (
    *_timm(r"\."),
    (rf"(?:head\.norm|norm_pre)\.{_WB}", r"head.norm.\1"),
    (rf"head\.pre_logits\.fc\.{_WB}", r"head.hidden.\1"),
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
        # The text tower, CoCa's decoder of texts, and the temperature.
        ignored=r"(transformer|token_embedding|positional_embedding|ln_final|text_projection|text|text_decoder|cls_emb"
        r"|attn_mask|logit_scale|logit_bias)(\..*)?",
    ),
    # Other parts of a network have a `stem` too, such as the pyramid of MaskFormer.
    Layout("timm", "stem.0.weight", _TIMM_RULES, mark=r"stages\..*", classifier="head.fc.", wider="head."),
    # `create_model(..., features_only=True)`, and what is built on it, such as segmentation_models_pytorch.
    Layout("timm_features", "stem_0.weight", _timm("_"), mark=r"stages_\d\..*", backbone=True),
    # A graph, whose own names say nothing: `onnx_convnext` names what it finds by the official ones.
    Layout(
        "onnx",
        "onnx.downsample_layers.0.0.weight",
        tuple((r"onnx\." + pattern, new) for pattern, new in _official(_BLOCK_OFFICIAL)),
        backbone=True,
    ),
    # mmpretrain, and mmdetection and mmsegmentation, which take their ConvNeXt from it.
    Layout(
        "mmpretrain",
        "downsample_layers.0.0.weight",
        _official(_BLOCK_MMPRETRAIN),
        mark=r"stages\.\d\.\d+\.(depthwise_conv|pointwise_conv\d)\..*",
        classifier="head.fc.",
        siblings=("head.",),
    ),
    # facebookresearch/dinov3, dinov3/models/convnext.py, 2026-11: `norms` is three identities and `norm` once more.
    Layout(
        "dinov3",
        "downsample_layers.0.0.weight",
        _official(_BLOCK_OFFICIAL),
        mark=rf"norms\.3\.{_WB}",
        classifier="head.",
        copies=((rf"norms\.3\.{_WB}", r"head.norm.\1"),),
    ),
    Layout(
        "official", "downsample_layers.0.0.weight", _official(_BLOCK_OFFICIAL), classifier="head."
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
            (rf"hidden_states_norms\.stage([1-4])\.{_WB}", r"level_norms.\1.\2"),
            (rf"layernorm\.{_WB}", r"head.norm.\1"),
        ),
        classifier="classifier.",
        siblings=("classifier.",),
    ),
    # Beside `model.`, which files leave out and modules have, stands the last norm.
    Layout(
        "dinov3_transformers",
        "stages.0.downsample_layers.0.weight",
        (
            (rf"stages\.0\.downsample_layers\.([01])\.{_WB}", r"stem.\1.\2"),
            (rf"stages\.(\d)\.downsample_layers\.([01])\.{_WB}", _downsample),
            (rf"stages\.(\d)\.layers\.(\d+)\.{_alternatives(_BLOCK_MMPRETRAIN)}\.{_WB}", _block(_BLOCK_MMPRETRAIN)),
            (r"stages\.(\d)\.layers\.(\d+)\.gamma", r"stages.\1.\2.project.layer_scale"),
            (rf"layer_norm\.{_WB}", r"head.norm.\1"),
        ),
        siblings=("layer_norm.",),
        is_split=True,
    ),
    Layout(
        "torchvision",
        "features.0.0.weight",
        (
            *_torchvision(r"features\."),
            (rf"classifier\.0\.{_WB}", r"head.norm.\1"),
        ),
        classifier="classifier.2.",
        wider="classifier.",
    ),
    # The module `features` alone, as the detectors' `BackboneWithFPN` contains it.
    Layout(
        "torchvision_features", "0.0.weight", _torchvision(""), mark=r"1\.0\.block\.0\.weight", backbone=True
    ),
)  # fmt: skip
