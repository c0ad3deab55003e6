"""`--config FILE`: what stands beside a checkpoint otherwise, in a file that the user names."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import WeightsError
from .facts import facts_of, understood
from .mm_config import facts_in, read_config
from .provenance import FROM, joined, sourced


def configured(known: Mapping[str, Any], file: Path, asked: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The facts beside a checkpoint, with those of the file.

    Args:
        asked: fields of `Preprocessing` that the user gives.

    Raises:
        WeightsError: the file cannot be understood, or contradicts what stands beside the checkpoint or is given.
    """
    if file.suffix == ".py":
        found = understood(lambda values: facts_in(values, f"--config {file}"), read_config(file), f"--config {file}")
    elif file.suffix == ".json":
        found = understood(facts_of, _of_json(file), f"--config {file}")
    else:
        raise WeightsError(f"--config {file} ends in {file.suffix!r}; expected .py (mmpretrain and relatives) or .json")
    found.pop(FROM, None)
    for others, where in ((known, f"beside {source}"), (asked, "given")):
        for name in sorted(found.keys() & others.keys()):
            if not _equal(found[name], others[name]):
                raise WeightsError(
                    f"{name} is {_shown(found[name])} in --config {file.name} and {_shown(others[name])} {where}; "
                    "leave one of them out"
                )
    return joined(known, sourced(found, file.name))


def _of_json(file: Path) -> dict[str, Any]:
    """As `facts_of` takes it, where an image processor and open_clip's configuration have names."""
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise WeightsError(f"--config {file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"--config {file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"--config {file} holds a {type(content).__name__}; expected a JSON object")
    if "model_cfg" in content or "preprocess_cfg" in content:
        return {"open_clip": content}
    if any(name in content for name in ("image_mean", "image_std", "image_processor_type", "crop_size", "resample")):
        return {"preprocessor": content}
    return content


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-9)
    return bool(one == other)


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_shown, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
