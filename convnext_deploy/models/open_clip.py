"""What `open_clip_config.json` says beside the weights of an image tower, and what open_clip does where it is silent.

Facts follow open_clip 3.3 (`open_clip/transform.py`, `open_clip/constants.py`).
"""

from collections.abc import Mapping
from typing import Any

from ..errors import WeightsError

CONFIG = "open_clip_config.json"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Of its evaluation transform: the shorter side is resized to the image size, of which nothing is cropped.
DEFAULTS: dict[str, Any] = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 1.0}
MODES = {"shortest": "center", "squash": "squash"}


def open_clip_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Preprocessing and image size. A configuration says what differs from the defaults.

    Raises:
        WeightsError: the longer side is resized and the rest filled, which is no step here.
    """
    vision = (config.get("model_cfg") or {}).get("vision_cfg") or {}
    given = config.get("preprocess_cfg") or {}
    mode = given.get("resize_mode", "shortest")
    if mode not in MODES:
        raise WeightsError(f"{CONFIG} asks for resize_mode {mode!r}; expected {' or '.join(map(repr, MODES))}")
    facts = DEFAULTS | {name: given[name] for name in ("mean", "std", "interpolation") if given.get(name) is not None}
    size = given.get("size") or vision.get("image_size", 224)
    sides = [int(side) for side in size] if isinstance(size, (list, tuple)) else [int(size)] * 2
    return {
        **facts,
        "crop_mode": MODES[mode],
        "input_size": sides[-2:],
        "global_pool": vision.get("timm_pool") or "avg",
    }
