"""How far a rewritten module's outputs are from the float module's, image by image, and which operation costs what."""

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..artifact import deviation
from ..data import preprocess, sources
from ..errors import DataError, plain
from ..models.convnext import ConvNeXt
from ..records.base import InputKind
from ..records.manifest import Preprocessing
from .apply import apply
from .images import pixel_reader
from .plan import LoadedPlan, quantized, restricted

Pixels = NDArray[np.uint8]  # (N, C, H, W)
Distances = NDArray[np.float64]  # (N,)

CHUNK = 16  # images at once


def pixels_of(
    source: sources.ImageSource, preprocessing: Preprocessing, model: ConvNeXt, chosen: range | None = None
) -> Pixels:
    """Images of a source as the model is to see them; None: all.

    Raises:
        DataError: naming the image that cannot be read.
    """
    read = pixel_reader(source, preprocessing, model)
    pixels = []
    for index in range(len(source)) if chosen is None else chosen:
        try:
            pixels.append(read(index))
        except OSError as error:
            reason = plain(error)
            raise DataError(f"{source.names[index]} of {source.name}: {reason}; replace or remove it") from None
    return np.stack(pixels)


def inputs(model: ConvNeXt, pixels: Pixels, preprocessing: Preprocessing) -> Iterator[Tensor]:
    """The images as the model takes them, `CHUNK` at a time."""
    kind: InputKind = "uint8" if model.takes_uint8 else "float32"
    for start in range(0, len(pixels), CHUNK):
        yield torch.from_numpy(preprocess.as_input(pixels[start : start + CHUNK], preprocessing, kind))


@torch.inference_mode()
def outputs(model: ConvNeXt, pixels: Pixels, preprocessing: Preprocessing) -> tuple[Tensor, ...]:
    """What the model puts out for all images, joined: logits, an embedding, or four maps."""
    parts = [model(batch) for batch in inputs(model, pixels, preprocessing)]
    if isinstance(parts[0], Tensor):
        return (torch.cat(parts),)
    return tuple(torch.cat(maps) for maps in zip(*parts, strict=True))


def distances(outputs: Sequence[Tensor], expected: Sequence[Tensor], classify: bool) -> Distances:
    """The Kullback-Leibler divergence of each image's expected class probabilities from the found ones.

    Where there are no classes to choose among: the squared relative error, the mean over the outputs.
    """
    if classify:
        p, q = (logits.double().log_softmax(1) for logits in (expected[0], outputs[0]))
        return (p.exp() * (p - q)).sum(1).clamp_min(0).numpy()  # rounding makes zeros negative
    errors = [deviation.relative_errors(a.numpy(), b.numpy()) ** 2 for a, b in zip(outputs, expected, strict=True)]
    mean: Distances = np.mean(errors, axis=0)
    return mean


def sensitivities(
    model: ConvNeXt,
    loaded: LoadedPlan,
    pixels: Pixels,
    preprocessing: Preprocessing,
    known: dict[str, float],
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, float]]:
    """(operation, mean distance) when that operation alone is quantized.

    Args:
        model: folded, fp32; left as it was.
        loaded: how each operation would be quantized.
        known: operations that need not be measured again.
    """
    names = [name for name in quantized(loaded.plan) if name not in known]
    expected = outputs(model, pixels, preprocessing)
    for done, name in enumerate(names):
        if progress is not None:
            progress(done, len(names))
        changed = copy.deepcopy(model)
        apply(changed, restricted(loaded, {name}))
        moved = outputs(changed, pixels, preprocessing)
        yield name, float(distances(moved, expected, classifies(model)).mean())


def classifies(model: ConvNeXt) -> bool:
    """Whether the outputs are logits of classes: one class has probability 1 whatever its logit is."""
    return model.spec.task == "classify" and model.spec.num_classes > 1
