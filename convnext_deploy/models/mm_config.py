"""Configurations of mmengine and mmcv, from a checkpoint or a file: read as text, and nothing of it is executed.

`meta.cfg` of a checkpoint, or `config` in older files, is a Python file of assignments, and so is the file that
training was started with, which may begin in others (`_base_`). What is read are numbers, texts, lists, tuples,
dictionaries, calls of `dict`, and names that were assigned before; anything else in it counts as unknown. Images come
with blue first there, and a configuration says whether they are turned round.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import WeightsError, plain
from ..records.base import content_of
from .convnext import ACTIVATIONS

TEXTS = ("cfg", "config")  # of mmengine's and of mmcv's `meta`
MOST_BYTES = 1 << 20
MOST_BASES = 20  # files that one begins in, and those in others

# Names of mmpretrain and its relatives.
BACKBONES = ("ConvNeXt", "ConvNeXtV2")
WRAPPERS = ("TIMMBackbone", "HuggingFaceClassifier", "TimmClassifier")
MULTI_LABEL_HEADS = ("MultiLabelLinearClsHead", "MultiLabelClsHead", "CSRAClsHead")


class _Unknown(Exception):
    """An expression that is no plain value."""


def text_of(meta: Any) -> str | None:
    """The configuration's text in a checkpoint's `meta`."""
    texts = [meta[name] for name in TEXTS if isinstance(meta.get(name), str)] if isinstance(meta, Mapping) else []
    return texts[0] if texts and len(texts[0]) <= MOST_BYTES else None


def read_config(file: Path) -> dict[str, Any]:
    """What a configuration file assigns, after the files that it begins in; a dictionary changes that of the same name.

    Raises:
        WeightsError: a file that cannot be read, is no Python, or begins in itself.
    """
    return _with_bases(file, (file.resolve(),))


def bases_of(file: Path) -> list[str]:
    """The files that a configuration begins in, as it names them.

    Raises:
        WeightsError: as `read_config`.
    """
    return _bases(_assigned(_parsed(file), {}))


def _bases(values: Mapping[str, Any]) -> list[str]:
    bases = values.get("_base_", [])
    return [str(base) for base in ([bases] if isinstance(bases, str) else bases)]


def _parsed(file: Path) -> list[ast.stmt]:
    try:
        text = content_of(file).decode()
    except OSError as error:
        raise WeightsError(f"--config {file} cannot be read: {plain(error)}") from None
    except UnicodeDecodeError:
        raise WeightsError(f"--config {file} is no text; expected a configuration such as mmpretrain's") from None
    if len(text) > MOST_BYTES:
        raise WeightsError(f"--config {file} has {len(text):,} characters; at most {MOST_BYTES:,} are read")
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise WeightsError(f"--config {file} is no Python: {plain(error)}") from None
    if any(isinstance(line, ast.With) for line in body):
        raise WeightsError(
            f"--config {file} imports its bases (with read_base()), which would run them; write it out with mmengine's "
            "Config.fromfile(FILE).dump('whole.py'), and give that"
        )
    return body


def _with_bases(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    body = _parsed(file)
    known: dict[str, Any] = {}
    for base in _bases(_assigned(body, {})):
        path = (file.parent / base).resolve()
        if path in above or len(above) > MOST_BASES:
            raise WeightsError(f"--config {file} begins in {base}, which begins in it again; expected an end")
        known = _changed(known, _with_bases(path, (*above, path)))
    return _changed(known, _assigned(body, known))


def _changed(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """As mmengine merges: dictionaries by their names, unless one says `_delete_`; everything else is replaced."""
    merged = dict(base)
    for name, value in over.items():
        before = merged.get(name)
        if isinstance(value, Mapping) and isinstance(before, dict) and not value.get("_delete_"):
            merged[name] = _changed(before, value)
        elif isinstance(value, Mapping):
            merged[name] = {key: entry for key, entry in value.items() if key != "_delete_"}
        else:
            merged[name] = value
    merged.pop("_base_", None)
    return merged


def mm_facts(text: str, where: str) -> dict[str, Any]:
    """Facts in the configuration's text inside a checkpoint.

    Raises:
        WeightsError: as `facts_in`.
    """
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}  # a dump in another form; nothing of it is known
    return facts_in(_assigned(body, {}), where)


def facts_in(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """mean, std, image size, crop, interpolation and what the model is, as far as the configuration says them.

    Raises:
        WeightsError: images with blue first, or another network than a ConvNeXt with a head that is known.
    """
    facts = _network(values.get("model"), where)
    for layer, default in _normalizations(values):
        if not layer.get("to_rgb", layer.get("bgr_to_rgb", default)) and len(layer["mean"]) == 3:
            raise WeightsError(
                f"{where}: its configuration normalizes images with blue first (to_rgb=False), and images are given "
                "with red first; reverse the channels of the stem's weight and give --mean and --std"
            )
        facts["mean"] = [value / 255 for value in layer["mean"]]
        facts["std"] = [value / 255 for value in layer["std"]]
        break
    pipeline = values.get("test_pipeline")
    return facts | _geometry(pipeline if isinstance(pipeline, list) else [])


def _assigned(lines: list[ast.stmt], known: Mapping[str, Any]) -> dict[str, Any]:
    """What a file's own lines assign. `known` is what they can name beside."""
    values: dict[str, Any] = {}
    for line in lines:
        if not (isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name)):
            continue
        name = line.targets[0].id
        try:
            values[name] = _value(line.value, {**known, **values, "_base_": known})
        except (_Unknown, RecursionError, TypeError):
            values.pop(name, None)
    return values


def _network(model: Any, where: str) -> dict[str, Any]:
    """What the backbone and the head are, under the names of `facts.with_facts`."""
    backbone = model.get("backbone") if isinstance(model, Mapping) else None
    if not isinstance(backbone, Mapping):
        return {}
    kind = str(backbone.get("type", "")).rpartition(".")[2]
    if kind in WRAPPERS:  # of another library's model, whose layout is that library's
        return {}
    if kind not in BACKBONES:
        raise WeightsError(f"{where} describes a backbone {kind or 'without a type'!r}; expected ConvNeXt")
    facts: dict[str, Any] = {}
    arch, pooled = backbone.get("arch"), backbone.get("gap_before_final_norm", True)
    if isinstance(arch, Mapping):
        for name, own in (("depths", "depths"), ("channels", "dims")):
            if isinstance(arch.get(name), list):
                facts[own] = tuple(arch[name])
    elif isinstance(arch, str):
        facts["arch"] = arch
    for name, own in (("in_channels", "in_chans"), ("use_grn", "grn")):
        if name in backbone:
            facts[own] = backbone[name]
    if backbone.get("stem_patch_size", 4) != 4:
        raise WeightsError(f"{where} asks for stem_patch_size {backbone['stem_patch_size']!r}; expected 4")
    activation = (backbone.get("act_cfg") or {}).get("type", "GELU")
    if activation.lower() not in ACTIVATIONS:
        raise WeightsError(f"{where} asks for act_cfg {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    facts["activation"] = activation.lower()
    norm = backbone.get("norm_cfg") or {}
    if norm.get("type", "LN2d") not in ("LN2d", "LN"):
        raise WeightsError(f"{where} asks for norm_cfg {norm['type']!r}; expected LN2d")
    facts["norm_eps"] = facts["head_norm_eps"] = float(norm.get("eps", 1e-6))
    indices = backbone.get("out_indices")
    if indices is not None:
        facts["levels"] = tuple(sorted(index % 4 + 1 for index in ([indices] if isinstance(indices, int) else indices)))
    return facts | _head(model, bool(pooled), where)


def _head(model: Mapping[str, Any], pooled: bool, where: str) -> dict[str, Any]:
    """Read a classifier's head. Necks and heads of detectors and segmenters are left out with their tensors."""
    head, neck = model.get("head"), model.get("neck")
    if not isinstance(head, Mapping) or "num_classes" not in head:
        return {}
    if isinstance(neck, Mapping) and str(neck.get("type", "")).rpartition(".")[2] != "GlobalAveragePooling":
        raise WeightsError(f"{where} asks for the neck {neck.get('type')!r}; expected GlobalAveragePooling, or none")
    facts: dict[str, Any] = {"num_classes": head["num_classes"], "global_pool": "avg"}
    if not pooled:
        facts["head"] = "norm_pool"
    if str(head.get("type", "")).rpartition(".")[2] in MULTI_LABEL_HEADS:
        facts["problem"] = "multi-label"
    return facts


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name() if node.id in known:
            return known[node.id]
        case ast.Attribute() | ast.Subscript():  # `_base_.model`, `model.backbone`, `image["size"]`
            return _part(node, known)
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, known)
        case ast.List() | ast.Tuple():
            return [_value(item, known) for item in node.elts]
        case ast.Dict():
            names = [_value(name, known) for name in node.keys if name is not None]
            return dict(zip(names, [_value(item, known) for item in node.values], strict=True))
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            entries: dict[str, Any] = {}
            for item in node.keywords:
                entries |= _value(item.value, known) if item.arg is None else {item.arg: _value(item.value, known)}
            return entries
    raise _Unknown


def _part(node: ast.Attribute | ast.Subscript, known: Mapping[str, Any]) -> Any:
    whole = _value(node.value, known)
    name = node.attr if isinstance(node, ast.Attribute) else _value(node.slice, known)
    try:
        return whole[name]
    except (LookupError, TypeError):
        raise _Unknown from None


def _normalizations(values: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """What normalizes, with whether its code turns images to red first where nothing is said."""
    model = values.get("model")
    inside = model.get("data_preprocessor") if isinstance(model, Mapping) else None
    pipeline = values.get("test_pipeline")
    steps = [step for step in pipeline if isinstance(step, Mapping)] if isinstance(pipeline, list) else []
    normalize = [step for step in steps if step.get("type") == "Normalize"]
    new, old = (inside, values.get("data_preprocessor")), (*normalize, values.get("img_norm_cfg"))
    for layer, default in (*((part, False) for part in new), *((part, True) for part in old)):
        if isinstance(layer, Mapping) and all(_are_numbers(layer.get(name)) for name in ("mean", "std")):
            yield layer, default


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, (int, float)) for entry in value)


def _geometry(pipeline: list[Any]) -> dict[str, Any]:
    """Read a classifier's pipeline: a resize of the shorter side and a crop, or a resize to a square."""
    steps = {step.get("type"): step for step in pipeline if isinstance(step, Mapping)}
    resize = steps.get("ResizeEdge") or steps.get("Resize")
    if resize is None or resize.get("keep_ratio"):
        return {}  # detectors resize by other rules
    size, crop = resize.get("scale", resize.get("size")), steps.get("CenterCrop", {}).get("crop_size")
    facts = {}
    if resize.get("interpolation") in ("bicubic", "bilinear", "nearest", "lanczos"):
        facts["interpolation"] = resize["interpolation"]
    by_edge = resize.get("type") == "ResizeEdge" or (isinstance(size, list) and size[1:] == [-1])
    edge = size[0] if isinstance(size, list) and size else size
    if by_edge and isinstance(edge, int) and isinstance(crop, int) and 0 < crop <= edge:
        return facts | {"input_size": [crop] * 2, "crop_pct": crop / edge}
    if not by_edge and crop is None and isinstance(edge, int) and size in (edge, [edge], [edge, edge]):
        return facts | {"input_size": [edge] * 2, "crop_pct": 1.0, "crop_mode": "squash"}
    return facts
