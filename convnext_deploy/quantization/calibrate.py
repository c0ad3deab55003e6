"""What a model's tensors hold on real images: run once, from which every range method and scheme can choose.

The statistics of the even and of the odd images are kept apart. The whole is their union, and how far the ranges of
the two halves differ tells whether there were enough images. They are saved as the work proceeds, so that an
interrupted calibration goes on where it stopped; the finished file is a calibration that needs no second run.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data import description
from ..data import sources as data
from ..errors import DataError, UsageError, counted
from ..models.convnext import ConvNeXt
from ..models.parameters import tensors_sha256
from ..records.manifest import Preprocessing
from ..records.plan import CalibrationReport, InputStatistics, RangeMethod, Scheme, TensorRange
from . import kept
from .counting import HALVES, Runner, Statistics, Work, here, modules_of
from .images import RANDOM, content_sha256
from .kept import Identity
from .observers import BINS, Histogram, merged
from .ranges import PERCENTILE, clip_rate, range_of

SAVE_EVERY = 64  # images, in whole batches; what a process that is killed loses at most
OUTLIER = 10.0  # times the largest magnitude of the median channel
OUTLIERS_LISTED = 16


@dataclass(frozen=True, slots=True)
class Calibration:
    """The statistics of the inputs of some modules of one model, over one set of images."""

    data: str
    identity: Identity
    statistics: Statistics
    inputs: InputStatistics | None = None  # of the images themselves; None of noise

    def halves(self, name: str) -> tuple[Histogram, Histogram]:
        """Histograms of a module's input, over the even and over the odd images."""
        even, odd = (self.statistics[f"{name}/{half}"] for half in HALVES)
        return even, odd

    def whole(self, name: str) -> Histogram:
        return merged(*self.halves(name))


def calibrate(
    model: ConvNeXt,
    names: Sequence[str],
    source: data.ImageSource,
    *,
    preprocessing: Preprocessing,
    images: int = 512,
    batch: int = 8,
    resume: Path | None = None,
    runner: Runner | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Run a model over images and count what values the inputs of some of its modules take.

    Args:
        model: in eval mode, folded, in fp32, on the device that is to run it.
        names: dotted paths of `nn.Linear` and `nn.Conv2d` modules, such as `stages.0.0.expand.linear`.
        source: `images.open_images`; its labels are not looked at.
        preprocessing: leads from an image to the model's input; raw pixels go to a model that takes uint8.
        images: how many, evenly spaced over the source.
        batch: images at once; the last batch may be smaller.
        resume: this file is written as the work proceeds, and what it contains is not run again. None keeps nothing.
        runner: runs the images; None: this process.
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
    modules_of(model, names)  # refuses a name before any work
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
    so_far = kept.NOTHING if resume is None else kept.opened(resume, identity, device)
    saved = len(so_far)
    work = Work(model=model, names=tuple(names), source=source, preprocessing=preprocessing, batch=batch)
    report = progress or (lambda done, total: None)
    report(len(so_far), images)
    try:
        with closing((runner or here())(work, so_far.missing(images))) as pieces:
            for piece in pieces:
                so_far = so_far.with_piece(piece)  # one assignment: an interrupted piece has not happened
                report(len(so_far), images)
                if resume is not None and len(so_far) - saved >= SAVE_EVERY:
                    kept.save(resume, identity, so_far)
                    saved = len(so_far)
    finally:  # Ctrl-C too: whole batches only, so that the next call forms the same ones
        if resume is not None and len(so_far) > saved:
            kept.save(resume, identity, so_far)
    seen = so_far.seen
    inputs = None
    if source.name != RANDOM:
        spec = model.spec
        classes = seen["classes"] if spec.task == "classify" and spec.num_classes else None
        inputs = description.statistics(seen["mean"], seen["std"], classes, max(2, spec.num_classes))
    return Calibration(source.name, identity, so_far.statistics, inputs)


def report(
    calibration: Calibration, method: RangeMethod, scheme: Scheme, *, percentile: float = PERCENTILE
) -> CalibrationReport:
    """The range of every tensor, and what speaks for or against it.

    Raises:
        UsageError: as `ranges.range_of`.
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
