"""`--config FILE`: what stands beside a checkpoint otherwise, in a file that the user names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import WeightsError, plain
from ..records.base import content_of
from .facts import facts_of, understood
from .mm_config import facts_in, read_config
from .provenance import FROM, equal, joined, shown, sourced
from .torchvision_detectors import is_config


def configured(known: Mapping[str, Any], file: Path, asked: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The facts beside a checkpoint, with those of the file.

    Args:
        asked: fields of `Preprocessing` from the user.

    Raises:
        WeightsError: the file cannot be understood, or contradicts what stands beside the checkpoint or is given.
    """
    if file.suffix == ".py":
        facts = understood(lambda values: facts_in(values, f"--config {file}"), read_config(file), f"--config {file}")
    elif file.suffix == ".json":
        facts = understood(facts_of, _of_json(file), f"--config {file}")
    else:
        raise WeightsError(f"--config {file} ends in {file.suffix!r}; expected .py (mmpretrain and relatives) or .json")
    facts.pop(FROM, None)
    if not facts:
        raise WeightsError(
            f"--config {file} says nothing that is known here; expected a configuration of mmpretrain, mmdetection, "
            "mmsegmentation, timm, transformers or open_clip, or what torchvision's detector was given"
        )
    for others, where in ((known, f"beside {source}"), (asked, "given")):
        for name in sorted(facts.keys() & others.keys()):
            if not equal(facts[name], others[name]):
                raise WeightsError(
                    f"{name} is {shown(facts[name])} in --config {file.name} and {shown(others[name])} {where}; "
                    "leave one of them out"
                )
    return joined(known, sourced(facts, file.name))


def _of_json(file: Path) -> dict[str, Any]:
    """As `facts_of` takes it, where an image processor and open_clip's configuration have names."""
    try:
        content = json.loads(content_of(file))
    except OSError as error:
        raise WeightsError(f"--config {file} cannot be read: {plain(error)}") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"--config {file} is not JSON: {plain(error)}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"--config {file} contains a {type(content).__name__}; expected a JSON object")
    if "model_cfg" in content or "preprocess_cfg" in content:
        return {"open_clip": content}
    if is_config(content):
        return {"detector": content}
    if any(name in content for name in ("image_mean", "image_std", "image_processor_type", "crop_size", "resample")):
        return {"preprocessor": content}
    return content
