"""Images and masks of 4x5 pixels with one value each, and files of them."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def save(path: Path, pixels: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)
    return path


def grey(value: int) -> Any:
    return np.full((4, 5), value, np.uint8)


def colour(value: int) -> Any:
    return np.full((4, 5, 3), value, np.uint8)
