"""The configuration that mmengine and mmcv write into checkpoints, read as text: nothing of it is executed.

`meta.cfg`, or `config` in older files, is a Python file of assignments. What is read are numbers, texts, lists, tuples,
dictionaries, calls of `dict`, and names that were assigned before; anything else in it counts as unknown. Images come
with blue first there, and a configuration says whether they are turned round.
"""

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import WeightsError

TEXTS = ("cfg", "config")  # of mmengine's and of mmcv's `meta`
MOST_BYTES = 1 << 20


class _Unknown(Exception):
    """An expression that is no plain value."""


def text_of(meta: Any) -> str | None:
    """The configuration's text in a checkpoint's `meta`."""
    found = [meta[name] for name in TEXTS if isinstance(meta.get(name), str)] if isinstance(meta, Mapping) else []
    return found[0] if found and len(found[0]) <= MOST_BYTES else None


def mm_facts(text: str, where: str) -> dict[str, Any]:
    """mean, std, image size, crop and interpolation, as far as the configuration says them.

    Raises:
        WeightsError: images with blue first.
    """
    facts: dict[str, Any] = {}
    values = _assignments(text)
    for found, default in _normalizations(values):
        if not found.get("to_rgb", found.get("bgr_to_rgb", default)) and len(found["mean"]) == 3:
            raise WeightsError(
                f"{where}: its configuration normalizes images with blue first (to_rgb=False), and images are given "
                "with red first; reverse the channels of the stem's weight and give --mean and --std"
            )
        facts["mean"] = [value / 255 for value in found["mean"]]
        facts["std"] = [value / 255 for value in found["std"]]
        break
    pipeline = values.get("test_pipeline")
    return facts | _geometry(pipeline if isinstance(pipeline, list) else [])


def _assignments(text: str) -> dict[str, Any]:
    try:
        lines = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}  # a dump in another form; nothing of it is known
    values: dict[str, Any] = {}
    for line in lines:
        if isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name):
            try:
                values[line.targets[0].id] = _value(line.value, values)
            except (_Unknown, RecursionError, TypeError):
                values.pop(line.targets[0].id, None)
    return values


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name() if node.id in known:
            return known[node.id]
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, known)
        case ast.List() | ast.Tuple():
            return [_value(item, known) for item in node.elts]
        case ast.Dict():
            names = [_value(name, known) for name in node.keys if name is not None]
            return dict(zip(names, [_value(item, known) for item in node.values], strict=True))
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            made: dict[str, Any] = {}
            for item in node.keywords:
                made |= _value(item.value, known) if item.arg is None else {item.arg: _value(item.value, known)}
            return made
    raise _Unknown


def _normalizations(values: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """What normalizes, with whether its code turns images to red first where nothing is said."""
    model = values.get("model")
    inside = model.get("data_preprocessor") if isinstance(model, Mapping) else None
    pipeline = values.get("test_pipeline")
    steps = [step for step in pipeline if isinstance(step, Mapping)] if isinstance(pipeline, list) else []
    normalize = [step for step in steps if step.get("type") == "Normalize"]
    new, old = (inside, values.get("data_preprocessor")), (*normalize, values.get("img_norm_cfg"))
    for found, default in (*((part, False) for part in new), *((part, True) for part in old)):
        if isinstance(found, Mapping) and all(_are_numbers(found.get(name)) for name in ("mean", "std")):
            yield found, default


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, (int, float)) for entry in value)


def _geometry(pipeline: list[Any]) -> dict[str, Any]:
    """Of a classifier's pipeline: a resize of the shorter side and a crop, or a resize to a square."""
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
