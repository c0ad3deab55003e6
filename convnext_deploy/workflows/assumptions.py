"""Which image size, statistics and crop a checkpoint was trained with, where only labelled images can tell.

A checkpoint that says nothing of its images runs at any size and with any statistics, only worse. So the likely ones
are tried on a few images, and the better half goes on with twice as many: first sizes with statistics, those of the
images themselves among them, then crops, which matter less. What is left is held against what is assumed, on images
that nothing was chosen on.

What the user gave is taken, whatever fits. It is tried against other values all the same, and the user is told of those
that fit better: a size that was remembered wrongly is as silent a loss as one that was assumed.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from .. import arguments
from ..accuracy import binomial, statistics
from ..data import preprocess, sources
from ..data.image_source import refuse_unlabelled, with_one_label
from ..data.numbering import numbered
from ..errors import CheckFailed, DataError, UsageError, counted
from ..models import provenance
from ..models.provenance import numbers
from ..records.manifest import Preprocessing, Provenance
from .evaluate import Images

if TYPE_CHECKING:
    from ..models.checkpoint import Loaded

SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384)  # pixels
CROPS = (0.875, 0.95, 1.0)
MOST = 1024  # images that are looked at
FIRST = 24  # of the first round
BATCH = 16
ALPHA = 0.01  # chance of calling what is assumed wrong where it is as good
KEPT = 2  # sizes with statistics that crops are tried with
SHOWN = 3  # candidates of the last round
TRIED = ("image_size", "mean", "std", "crop_pct")  # of the facts

Say = Callable[[str], None]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel


@dataclass(frozen=True, slots=True)
class Candidate:
    """One combination; everything else is as the checkpoint's preprocessing has it."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float

    def __str__(self) -> str:
        high, wide = self.size
        return f"{high}x{wide} pixels, mean {numbers(self.mean)} std {numbers(self.std)}, crop {self.crop:g}"

    def facts(self) -> dict[str, str]:
        """Each fact, by its name in the manifest and as `provenance` has it."""
        side = "x".join(map(str, self.size))
        return dict(zip(TRIED, (side, numbers(self.mean), numbers(self.std), f"{self.crop:.4g}"), strict=True))

    def options(self, other: "Candidate") -> str:
        """What to add to a command so that it is this one and not the other."""
        side = str(self.size[0]) if self.size[0] == self.size[1] else f"{self.size[0]}x{self.size[1]}"
        words = [f"--image-size {side}"] if self.size != other.size else []
        if (self.mean, self.std) != (other.mean, other.std):
            words.append(f"--mean {numbers(self.mean)} --std {numbers(self.std)}")
        return " ".join([*words, f"--crop-pct {self.crop:g}"] if self.crop != other.crop else words)


def check(
    loaded: "Loaded", images: Images, say: Say, progress: arguments.Progress | None = None
) -> dict[str, Provenance]:
    """Try what is likely in the place of what is assumed or given, and say what fits best.

    Args:
        progress: told (combinations done, combinations of this round, what is being tried).

    Returns:
        The given facts in whose place another value fits better, beyond chance, which they say.

    Raises:
        UsageError: not a classifier of one label an image.
        DataError: no labels, labels that are not the model's, or too few images.
        CheckFailed: another combination is better than the assumed one, beyond chance; with the options that take it.
    """
    spec = loaded.model.spec
    if spec.task != "classify" or spec.problem not in (None, "single-label") or spec.num_classes < 2:
        raise UsageError("--data checks what is assumed by top-1, which only a classifier of one label an image has")
    opened, classes = images.opened()
    refuse_unlabelled(opened)
    source = numbered(with_one_label(opened), spec.num_classes, loaded.labels, classes)
    for note in source.notes:
        say(note)
    assumed = set(loaded.preprocessing.assumed)
    given = {name: said for name, said in loaded.provenance.items() if name in TRIED and said.how == "given"}
    statistics_here = functools.cache(lambda: _statistics(loaded, source))
    own, bases, crops = _candidates(loaded, assumed, statistics_here)
    _, all_bases, all_crops = _candidates(loaded, assumed | given.keys(), statistics_here)
    if len(all_bases) * len(all_crops) == 1:
        say("image size, statistics and crop are known, so that --data has nothing to check")
        return {}
    count = min(len(source), MOST)
    if count < 2 * FIRST:
        few = f"{source.name} has {counted(len(source), 'image')}; at least {2 * FIRST} are needed to check what is"
        if len(bases) * len(crops) > 1:
            raise DataError(f"{few} assumed")
        say(f"{few} given")
        return {}
    choosing, confirming = sources.parts(source, (count // 2, count - count // 2))
    trial = _Trial(loaded, choosing, progress)
    best = _fitting(trial, bases, crops, say)
    if given:
        best += _fitting(trial, all_bases, all_crops, say)
    return _judge(_Trial(loaded, confirming, progress), own, best, given, say)


def _fitting(trial: "_Trial", bases: list[Candidate], crops: list[float], say: Say) -> list[Candidate]:
    """The combinations that fit best, the best first."""
    kept = _narrowed(trial, bases, KEPT, say)[:KEPT]
    return _narrowed(trial, [replace(base, crop=crop) for base in kept for crop in crops], 1, say)[:SHOWN]


def _narrowed(trial: "_Trial", left: list[Candidate], until: int, say: Say) -> list[Candidate]:
    """The candidates of the last round, the best first; of equal ones the earlier."""
    stop, images = FIRST, len(trial.source)
    while len(left) > until:
        stop = min(stop, images)
        what = f"trying {len(left)} combinations of size, statistics and crop on {stop} images"
        say(what)
        trial.extend_all(left, stop, what)
        left = sorted(left, key=functools.partial(trial.right, stop=stop), reverse=True)
        if stop == images or len(left) // 2 <= until:
            break
        left, stop = left[: len(left) // 2], 2 * stop
    return left


def _candidates(
    loaded: "Loaded", free: Collection[str], own_statistics: Callable[[], Statistics]
) -> tuple[Candidate, list[Candidate], list[float]]:
    """What would be taken; the sizes and statistics that are likely where these are free, it first; crops likewise."""
    from ..models.facts import IMAGENET_MEAN, IMAGENET_STD

    facts, size = loaded.preprocessing, loaded.model.spec.image_size
    own = Candidate(size, facts.mean, facts.std, facts.crop_pct)
    channels = loaded.model.spec.in_chans
    usual = [((0.5,) * channels, (0.5,) * channels)]
    if channels == 3:
        usual.append((IMAGENET_MEAN, IMAGENET_STD))
    elif channels == 1:
        usual.append(((float(np.mean(IMAGENET_MEAN)),), (float(np.mean(IMAGENET_STD)),)))
    # dict: each once, the value that would be taken first.
    sizes = dict.fromkeys([own.size, *((side, side) for side in SIZES if "image_size" in free)])
    norms = dict.fromkeys([(own.mean, own.std)])
    if {"mean", "std"} <= set(free):
        norms |= dict.fromkeys([*usual, own_statistics()])
    crops = dict.fromkeys([own.crop, *(CROPS if "crop_pct" in free else [])])
    bases = [Candidate(side, mean, std, own.crop) for side, (mean, std) in itertools.product(sizes, norms)]
    return own, bases, list(crops)


def _statistics(loaded: "Loaded", source: sources.ImageSource) -> Statistics:
    """Mean and standard deviation of the images' own channels, white being 1, as people round them.

    Raises:
        DataError: not one of them can be read.
    """
    size, channels = loaded.model.spec.image_size, loaded.model.spec.in_chans
    whole_images = msgspec.structs.replace(loaded.preprocessing, crop_pct=1.0)  # of which people take them
    to_pixels = preprocess.transform(whole_images, size, channels)
    few, pixels = sources.subset(source, FIRST), []
    for index in range(len(few)):
        with contextlib.suppress(OSError):  # which counts as wrong for every candidate
            pixels.append(to_pixels(few.read(index)).reshape(channels, -1))
    if not pixels:
        raise DataError(f"none of {len(few)} images of {source.name} can be read")
    values = np.concatenate(pixels, 1) / 255
    mean, std = values.mean(1), np.maximum(values.std(1), 1e-3)
    return tuple(np.round(mean, 3).tolist()), tuple(np.round(std, 3).tolist())


class _Trial:
    """Which images of a source each candidate gets right, as far as it was tried."""

    def __init__(
        self, loaded: "Loaded", source: sources.ImageSource, progress: arguments.Progress | None = None
    ) -> None:
        self.loaded = loaded
        self.source = source
        self.progress = progress
        self.hits: dict[Candidate, NDArray[np.bool_]] = {}

    def right(self, candidate: Candidate, stop: int | None = None) -> int:
        """How many images it gets right, of those before `stop`."""
        return int(self.hits[candidate][:stop].sum())

    def p_value(self, better: Candidate, other: Candidate) -> float:
        """The chance of such a lead where both are as good; 1 where there is none."""
        one, two = self.hits[better], self.hits[other]
        gained, lost = int((one & ~two).sum()), int((~one & two).sum())
        return 1.0 if gained <= lost else statistics.mcnemar(lost, gained)

    def extend_all(self, candidates: Collection[Candidate], stop: int, what: str) -> None:
        """`extend` of each."""
        for number, candidate in enumerate(candidates):
            if self.progress is not None:
                self.progress(number, len(candidates), what)
            self.extend(candidate, stop)

    def extend(self, candidate: Candidate, stop: int) -> None:
        """Try it on the images before `stop`. Those that cannot be read count as wrong for all candidates alike."""
        import torch

        before = self.hits.get(candidate, np.zeros(0, np.bool_))
        indices = range(len(before), stop)

        model, labels = self.loaded.model, self.source.labels
        assert labels is not None
        facts: Preprocessing = msgspec.structs.replace(
            self.loaded.preprocessing, mean=candidate.mean, std=candidate.std, crop_pct=candidate.crop
        )
        to_pixels = preprocess.transform(facts, candidate.size, model.spec.in_chans)
        right = np.zeros(len(indices), np.bool_)
        with preprocess.decoders() as pool, torch.inference_mode():
            for these in preprocess.decoded_batches(pool, self.source.read, to_pixels, indices, BATCH):
                if these.read:
                    batch = preprocess.as_input(np.stack(these.pixels), facts, "float32")
                    first = model(torch.from_numpy(batch)).argmax(1).numpy()
                    right[np.array(these.read) - indices.start] = first == labels[these.read]
        self.hits[candidate] = np.concatenate([before, right])


def _judge(
    trial: _Trial, own: Candidate, best: list[Candidate], given: dict[str, Provenance], say: Say
) -> dict[str, Provenance]:
    """Hold what would be taken against the best with what was given, and that against the best with any values.

    Args:
        trial: of images that nothing was chosen on.
        own: what would be taken.
        best: what fits best on other images.
        given: the facts that the user gave.

    Returns:
        As `check` does.

    Raises:
        CheckFailed: as `check` does.
    """
    images, rivals = len(trial.source), list(dict.fromkeys([*best, own]))
    trial.extend_all(rivals, images, f"comparing the best on {images} other images")
    rivals.sort(key=trial.right, reverse=True)
    for candidate in rivals:
        low, high = binomial.share_bounds(trial.right(candidate), images, 0.025)
        what = "taken" if candidate == own else "fits best" if candidate == rivals[0] else "next"
        say(f"{what}: {candidate}: top-1 {trial.right(candidate) / images:.2%} ({low:.2%} to {high:.2%}, 95 %)")
    # The best of a few on these images too, for which the limit of the p-value makes up.
    limit = ALPHA / len(rivals)
    fitting = next(one for one in rivals if not _differing(one, own) & given.keys())
    as_good = [
        one for one in rivals if trial.p_value(rivals[0], one) > limit and trial.p_value(one, fitting) <= limit
    ]  # of which the one that changes least is advised: the digits of a mean are no mistake
    preferred = min(as_good, key=lambda one: len(_differing(one, own)), default=fitting)
    gain = f"top-1 {trial.right(preferred) / images:.2%}, not {trial.right(fitting) / images:.2%}, on {images} images"
    doubted = {
        name: msgspec.structs.replace(given[name], fits_better=f"{preferred.facts()[name]} ({gain})")
        for name in TRIED
        if name in given.keys() & _differing(preferred, own)
    }
    for line in provenance.better(doubted):
        say(f"{line}; to take what fits better: {preferred.options(own)}")
    p_value = trial.p_value(fitting, own)
    if p_value <= limit:
        raise CheckFailed(
            f"what is assumed does not fit: {fitting} is right on {trial.right(fitting)} of {images} other "
            f"images, and {own} on {trial.right(own)} (p = {p_value:.1g}); export again with "
            f"{fitting.options(own)}, or give the assumed values to keep them"
        )
    if not doubted:
        say(f"what is assumed or given is as good as any other, as far as {images} other images show")
    return doubted


def _differing(one: Candidate, other: Candidate) -> set[str]:
    """The names of the facts in which they differ."""
    values = other.facts()
    return {name for name, value in one.facts().items() if value != values[name]}
