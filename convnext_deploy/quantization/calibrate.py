"""What a model's tensors hold on real images: run once, from which every range method and scheme can choose.

The statistics of the even and of the odd images are kept apart. The whole is their union, and how far the ranges of
the two halves differ tells whether there were enough images. They are saved as the work proceeds, so that an
interrupted calibration goes on where it stopped; the finished file is a calibration that needs no second run.
"""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ..artifact.manifest import write_file
from ..data import description, preprocess
from ..data import sources as data
from ..env import usable_cores
from ..errors import DataError, UsageError, counted, plain
from ..models.convnext import ConvNeXt, nhwc
from ..models.parameters import tensors_sha256
from ..records.base import Record, Sha256
from ..records.manifest import Preprocessing
from ..records.plan import CalibrationReport, InputStatistics, RangeMethod, Scheme, TensorRange
from .observers import BINS, PERCENTILE, Histogram, clip_rate, from_arrays, histogram, merged, range_of, to_arrays

RANDOM = "random"  # a source of this name is noise; a folder of this name is ./random
SAVE_EVERY = 64  # images, in whole batches; what a process that is killed loses at most
OUTLIER = 10.0  # times the largest magnitude of the median channel
OUTLIERS_LISTED = 16

Statistics = dict[str, Histogram]  # "<module>/even" and "<module>/odd" to the histogram of that module's input
Seen = dict[str, NDArray[Any]]  # of each image: "mean" and "std" of its channels (N, C), "classes" (N,)
_HALVES = ("even", "odd")
_SEEN = "images"  # in the file of statistics, where no module is called so


class Identity(Record, frozen=True, kw_only=True):
    """What statistics belong to."""

    weights_sha256: Sha256  # of the folded module
    data_sha256: Sha256
    names: tuple[str, ...]
    images: int
    batch: int
    image_size: tuple[int, int]
    preprocessing: Preprocessing
    bins: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """The statistics of the inputs of some modules of one model, over one set of images."""

    data: str
    identity: Identity
    statistics: Statistics
    inputs: InputStatistics | None = None  # of the images themselves; None of noise

    def halves(self, name: str) -> tuple[Histogram, Histogram]:
        """Histograms of a module's input, over the even and over the odd images."""
        even, odd = (self.statistics[f"{name}/{half}"] for half in _HALVES)
        return even, odd

    def whole(self, name: str) -> Histogram:
        return merged(*self.halves(name))


def open_images(
    source: str | data.ImageSource, split: str | None, *, images: int, image_size: tuple[int, int]
) -> data.ImageSource:
    """Anything that `data.sources.open_source` opens; noise only where "random" is asked for.

    Raises:
        DataError: as `data.sources.open_source`.
    """
    return random_images(images, image_size) if source == RANDOM else data.open_source(source, split)


def random_images(count: int, image_size: tuple[int, int], seed: int = 0) -> data.ImageSource:
    """Uniform noise, the same for the same seed. Ranges from it are good for trying things out, and for nothing else.

    Args:
        image_size: (height, width) in pixels.
    """

    def read_bytes(index: int) -> bytes:
        pixels = np.random.default_rng((seed, index)).integers(0, 256, (*image_size, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "bmp")  # not compressed: noise cannot be, and no encoder's version matters
        return file.getvalue()

    names = tuple(f"{RANDOM}-{seed}-{index}" for index in range(count))
    return data.ImageSource(name=RANDOM, names=names, labels=None, class_names=None, read_bytes=read_bytes)


def pixel_reader(
    source: data.ImageSource, preprocessing: Preprocessing, model: ConvNeXt
) -> Callable[[int], NDArray[np.uint8]]:
    """From an image's number to what the model is to see, uint8 (C, H, W). Noise has the model's channels.

    Raises:
        DataError: the model takes a number of channels that no image file has.
    """
    chans, size = model.spec.in_chans, model.spec.image_size
    if source.name == RANDOM and chans not in (1, 3):
        return lambda index: np.random.default_rng((chans, index)).integers(0, 256, (chans, *size), np.uint8)
    try:
        to_pixels = preprocess.transform(preprocessing, size, chans)
    except DataError as error:
        raise DataError(f"{error}; for trying out, --calibration {RANDOM} has as many as the model takes") from None
    return lambda index: to_pixels(source.read(index))


def calibrate(
    model: ConvNeXt,
    names: Sequence[str],
    source: data.ImageSource,
    *,
    preprocessing: Preprocessing,
    images: int = 512,
    batch: int = 8,
    resume: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Run a model over images and count what values the inputs of some of its modules take.

    Args:
        model: in eval mode, folded, in fp32, on the device that is to run it.
        names: dotted paths of `nn.Linear` and `nn.Conv2d` modules, such as `stages.0.0.expand.linear`.
        source: `open_images`; its labels are not looked at.
        preprocessing: leads from an image to the model's input; raw pixels go to a model that takes uint8.
        images: how many, evenly spaced over the source.
        batch: images at once; the last batch may be smaller.
        resume: this file is written as the work proceeds, and what it contains is not run again. None keeps nothing.
        progress: called with (images done, images in all), first before any work.

    Raises:
        UsageError: fewer than two images, a name that is no such module, or `resume` belongs to something else.
        DataError: the source has fewer images, or one of them cannot be read.
        CheckFailed: a tensor contains NaN or infinite values.
    """
    if images < 2 or batch < 1:
        raise UsageError(f"images {images}, batch {batch}; expected at least 2 images and a batch of at least 1")
    if images > len(source):
        raise DataError(
            f"{source.name} has {counted(len(source), 'image')}; {images} were asked for: ask for fewer or give more"
        )
    modules = {name: _module(model, name) for name in names}
    source = data.subset(source, images)
    identity = Identity(
        weights_sha256=tensors_sha256(model.state_dict()),
        data_sha256=content_sha256(source),
        names=tuple(names),
        images=images,
        batch=batch,
        image_size=model.spec.image_size,
        preprocessing=preprocessing,
        bins=BINS,
    )
    device = model.get_parameter("stem.convs.0.weight").device
    done, statistics, seen = (0, {}, {}) if resume is None else _opened(resume, identity, device)
    saved = done
    read = pixel_reader(source, preprocessing, model)

    def pixels(index: int) -> NDArray[np.uint8]:
        try:
            return read(index)  # (C, H, W)
        except OSError as error:
            reason = plain(error)
            raise DataError(
                f"{source.names[index]} of {source.name}: {reason}; replace or remove it, calibration leaves none out"
            ) from None

    report = progress or (lambda done, total: None)
    report(done, images)
    with preprocess.decoders() as pool:
        decoded = preprocess.ahead(pool, pixels, range(done, images), batch + usable_cores())
        try:
            while done < images:
                size = min(batch, images - done)
                raw = np.stack([next(decoded) for _ in range(size)])
                given = preprocess.as_input(raw, preprocessing, "uint8" if model.takes_uint8 else "float32")
                found, outputs = _observed(model, modules, torch.from_numpy(given).to(device), done)
                # One assignment: an interrupted batch has not happened.
                done, statistics, seen = done + size, _union(statistics, found), _joined(seen, raw, outputs)
                report(done, images)
                if resume is not None and done - saved >= SAVE_EVERY:
                    _save(resume, identity, done, statistics, seen)
                    saved = done
        finally:  # Ctrl-C too: whole batches only, so that the next call forms the same ones
            if resume is not None and done > saved:
                _save(resume, identity, done, statistics, seen)
    inputs = None
    if source.name != RANDOM:
        spec = model.spec
        classes = seen["classes"] if spec.task == "classify" and spec.num_classes else None
        inputs = description.statistics(seen["mean"], seen["std"], classes, max(2, spec.num_classes))
    return Calibration(source.name, identity, statistics, inputs)


def report(
    calibration: Calibration, method: RangeMethod, scheme: Scheme, *, percentile: float = PERCENTILE
) -> CalibrationReport:
    """The range of every tensor, and what speaks for or against it.

    Raises:
        UsageError: as `observers.range_of`.
    """
    identity = calibration.identity
    return CalibrationReport(
        data=calibration.data,
        data_sha256=identity.data_sha256,
        images=identity.images,
        random=calibration.data == RANDOM,
        method=method,
        percentile=percentile if method == "percentile" else None,
        scheme=scheme,
        image_size=identity.image_size,
        tensors=tuple(_tensor_range(calibration, name, method, scheme, percentile) for name in identity.names),
    )


def content_sha256(source: data.ImageSource) -> str:
    """A hash of the encoded images in their order; `ImageSource.sha256` covers names and labels only.

    Raises:
        DataError: an image cannot be read.
    """
    digest = hashlib.sha256()
    for index, name in enumerate(source.names):
        try:
            content = source.read_bytes(index)
        except OSError as error:
            raise DataError(f"{name} of {source.name} cannot be read: {plain(error)}") from None
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _module(model: ConvNeXt, name: str) -> nn.Linear | nn.Conv2d:
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, nn.Linear | nn.Conv2d):
        found = "nothing" if module is None else f"a {type(module).__name__}"
        raise UsageError(f"the model has {found} at {name!r}; expected the path of a Linear or Conv2d")
    return module


@torch.no_grad()
def _observed(
    model: ConvNeXt, modules: dict[str, nn.Linear | nn.Conv2d], images: Tensor, first: int
) -> tuple[Statistics, Tensor | tuple[Tensor, ...]]:
    """Observe one batch, whose images are number `first` and following; return also what the model says of them."""
    found: Statistics = {}

    def observer(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = nhwc(inputs[0]) if isinstance(module, nn.Conv2d) else inputs[0]
            for parity, half in enumerate(_HALVES):
                part = values[(first + parity) % 2 :: 2]
                if len(part):
                    found[f"{name}/{half}"] = histogram(part, name)

        return observe

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(observer(name)).remove)
        outputs = model(images)
    return found, outputs


def _joined(seen: Seen, raw: NDArray[np.uint8], outputs: Tensor | tuple[Tensor, ...]) -> Seen:
    """What is kept of each image: after those before, those of one more batch."""
    mean, std = description.described(raw)
    classes = np.zeros(len(raw), np.int64)
    if isinstance(outputs, Tensor) and outputs.ndim == 2:
        classes = description.answered(outputs.float().cpu().numpy())
    latest = {"mean": mean, "std": std, "classes": classes}
    return {key: np.concatenate([seen[key], found]) if seen else found for key, found in latest.items()}


def _union(a: Statistics, b: Statistics) -> Statistics:
    return {**a, **{key: merged(a[key], found) if key in a else found for key, found in b.items()}}


def _save(path: Path, identity: Identity, done: int, statistics: Statistics, seen: Seen) -> None:
    from safetensors.numpy import save

    arrays = {f"{key}/{field}": array for key, found in statistics.items() for field, array in to_arrays(found).items()}
    arrays |= {f"{_SEEN}/{field}": array for field, array in seen.items()}
    facts = {"identity": msgspec.json.encode(identity).decode(), "done": str(done)}
    write_file(path, save(arrays, facts))


def _opened(path: Path, identity: Identity, device: torch.device) -> tuple[int, Statistics, Seen]:
    """How many images an earlier run has done, their statistics, and what is kept of each.

    Raises:
        UsageError: the file is damaged, of something else, or could not be written.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    if not path.exists():
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise UsageError(f"{path} cannot be written: {path.parent} is absent or not writable")
        return 0, {}, {}
    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            found, done = msgspec.json.decode(facts["identity"], type=Identity), int(facts["done"])
        grouped: dict[str, dict[str, NDArray[Any]]] = {}
        for key, array in load_file(path).items():
            group, field = key.rsplit("/", 1)
            grouped.setdefault(group, {})[field] = array
        seen = {field: grouped[_SEEN][field] for field in ("mean", "std", "classes")}
        if any(len(array) != done for array in seen.values()):
            raise ValueError(f"it has no {done} images")
        del grouped[_SEEN]
        statistics = {group: from_arrays(arrays, device) for group, arrays in grouped.items()}
    except (SafetensorError, msgspec.MsgspecError, OSError, KeyError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} does not hold a calibration: {plain(error)}; remove it or name another file"
        ) from None
    if found != identity:
        other = ", ".join(
            field for field in Identity.__struct_fields__ if getattr(found, field) != getattr(identity, field)
        )
        raise UsageError(f"{path} is of another calibration (it differs in {other}); remove it or name another file")
    return done, statistics, seen


def _tensor_range(
    calibration: Calibration, name: str, method: RangeMethod, scheme: Scheme, percentile: float
) -> TensorRange:
    whole = calibration.whole(name)
    low, high = range_of(whole, method, scheme, percentile=percentile)  # (1,)
    ends = np.array([range_of(half, method, scheme, percentile=percentile) for half in calibration.halves(name)])
    apart = np.abs(ends[0] - ends[1]).max()
    return TensorRange(
        name=name,
        method=method,
        low=float(low[0]),
        high=float(high[0]),
        min=float(whole.low.min()),
        max=float(whole.high.max()),
        clip_rate=float(clip_rate(whole, low, high, scheme)[0]),
        outlier_channels=_outlier_channels(whole),
        halves_difference=float(apart / (high[0] - low[0])) if apart else 0.0,
    )


def _outlier_channels(statistics: Histogram) -> tuple[tuple[int, float], ...]:
    """Channels that reach far beyond the median one, the worst first. None where the median one is always zero."""
    largest = torch.maximum(statistics.low.abs(), statistics.high.abs()).cpu().numpy()  # (C,)
    median = float(np.median(largest))
    if median == 0:
        return ()
    ratios = largest / median
    worst = np.argsort(-ratios, kind="stable")[:OUTLIERS_LISTED]
    return tuple((int(channel), float(ratios[channel])) for channel in worst if ratios[channel] > OUTLIER)
