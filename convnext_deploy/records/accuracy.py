"""Evaluations, the limits of a gate, and its verdict."""

from typing import Annotated, Literal

import msgspec

from .base import (
    SCHEMA,
    Decision,
    Fraction,
    Goal,
    HandWritten,
    Images,
    Positive,
    Problem,
    Record,
    SchemaVersion,
    Sha256,
)

CheckName = Literal[
    "top1_drop",
    "map_drop",
    "mask_map_drop",
    "r2_drop",
    "miou_drop",
    "class_drop",
    "agreement",
    "latency_ratio",
    "size_ratio",
]

SCORED: tuple[Goal, ...] = ("multi-label", "regression", "segmentation", "detection")  # models without a top-1


class _Kind(Record, frozen=True, kw_only=True):
    problem: Goal = "single-label"


def is_scored(content: bytes) -> bool:
    """Whether the JSON of an evaluation or a verdict is a `ScoreResult` or `ScoreVerdict`.

    Raises:
        msgspec.MsgspecError: it is neither of these nor one with a top-1.
    """
    return msgspec.json.decode(content, type=_Kind).problem in SCORED


class ClassAccuracy(Record, frozen=True, kw_only=True):
    label: Annotated[int, msgspec.Meta(ge=0)]
    name: str
    images: Positive
    top1: Fraction


class EvalResult(Record, frozen=True, kw_only=True):
    """Accuracy of one artifact over one labelled image source; every prediction is in `predictions`."""

    schema_version: SchemaVersion = SCHEMA
    artifact: str
    artifact_sha256: Sha256  # of manifest.json
    data: str
    data_sha256: Sha256  # of the sample names and labels
    images: Images
    corrupt: tuple[str, ...]
    top1: Fraction
    top5: Fraction
    per_class: tuple[ClassAccuracy, ...]
    images_per_s: float  # whole pipeline: reading, decoding, resizing, inference
    predictions: str | None  # file name beside this result
    notes: tuple[str, ...] = ()  # what was left out, what was assumed about the classes, an accuracy at chance
    problem: Problem = "single-label"


class OutputScore(Record, frozen=True, kw_only=True):
    """One output's average precision (multi-label, detection), R2 (regression), or intersection over union."""

    output: Annotated[int, msgspec.Meta(ge=0)]
    name: str
    positives: int | None  # images that have the label or class; None of a regression
    score: float | None  # None of a label that no image has, or of a class that no mask and no answer has


class ScoreResult(Record, frozen=True, kw_only=True):
    """How well a model without a top-1 does on one image source; `predictions` has what it put out."""

    schema_version: SchemaVersion = SCHEMA
    problem: Goal
    artifact: str
    artifact_sha256: Sha256  # of manifest.json
    data: str
    data_sha256: Sha256  # of the sample names and labels
    images: Images
    corrupt: tuple[str, ...]
    # The mean over labels, outputs or classes of average precision, R2, or intersection over union.
    score: float
    per_output: tuple[OutputScore, ...]
    exact: Fraction | None  # multi-label: images whose labels are all right, where a probability of 0.5 decides
    mean_absolute_error: float | None  # regression
    root_mean_square_error: float | None  # likewise
    average_precision_50: Fraction | None = None  # detection: at an overlap of 0.50, where the score is of 0.50 to 0.95
    mask_average_precision: Fraction | None = None  # detection, of masks, where the objects have some
    mask_average_precision_50: Fraction | None = None
    pixel_accuracy: Fraction | None = None  # segmentation: pixels of the right class
    images_per_s: float
    predictions: str | None  # file name beside this result
    notes: tuple[str, ...] = ()


class Limits(HandWritten, frozen=True, kw_only=True):
    """What a candidate may lose against its baseline. Written by hand, hence in percent; None is not checked."""

    max_drop: Annotated[float, msgspec.Meta(ge=0, le=100)]  # of top-1, mAP, R2 or mIoU, percentage points
    alpha: Annotated[float, msgspec.Meta(gt=0, lt=0.5)] = 0.05  # chance of passing what is at a limit
    max_class_drop: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None  # of one class's top-1, points
    min_agreement: Annotated[float, msgspec.Meta(gt=0, lt=100)] | None = None  # images with the same first class, %
    max_latency_ratio: Annotated[float, msgspec.Meta(gt=0, le=1000)] | None = None  # medians, candidate / baseline
    max_size_ratio: Annotated[float, msgspec.Meta(gt=0, le=1000)] | None = None  # bytes, candidate / baseline


class Check(Record, frozen=True, kw_only=True):
    """One limit held against what was measured. Drops and agreement are fractions."""

    name: CheckName
    decision: Decision
    limit: float
    value: float
    lower: float | None = None  # one-sided bounds at the limits' alpha; None where chance plays no part
    upper: float | None = None


class ClassDrop(Record, frozen=True, kw_only=True):
    """One class's images. `beyond_chance`: more were lost than gained, at the limits' alpha over all classes."""

    label: int
    name: str
    images: int
    lost: int
    gained: int
    p_value: Fraction  # one-sided exact McNemar, after Holm's adjustment for the number of classes
    beyond_chance: bool


class ScoreVerdict(Record, frozen=True, kw_only=True):
    """Whether a multi-label model, a regression, a segmenter or a detector may take its baseline's place."""

    schema_version: SchemaVersion = SCHEMA
    decision: Decision
    problem: Goal
    limits: Limits
    baseline: str
    baseline_sha256: Sha256  # of manifest.json
    candidate: str
    candidate_sha256: Sha256
    data: str
    data_sha256: Sha256
    images: Images
    baseline_score: float
    candidate_score: float
    baseline_mask_score: Fraction | None = None  # detection: the mAP of masks, where both sides have some
    candidate_mask_score: Fraction | None = None
    standard_error: float  # of the drop
    images_needed: int | None  # as in `Verdict`
    checks: Annotated[tuple[Check, ...], msgspec.Meta(min_length=1)]  # the drop first
    doubts: tuple[str, ...] = ()


class Flip(Record, frozen=True, kw_only=True):
    """An image whose first class changed. A margin is the log-probability of the first class less the second's."""

    name: str
    label: int
    baseline: int  # class
    candidate: int
    baseline_margin: float | None  # nats; None where a model has one class
    candidate_margin: float | None


class Verdict(Record, frozen=True, kw_only=True):
    """Whether a candidate may take its baseline's place, and everything that this rests on."""

    schema_version: SchemaVersion = SCHEMA
    decision: Decision
    limits: Limits
    baseline: str
    baseline_sha256: Sha256  # of manifest.json
    candidate: str
    candidate_sha256: Sha256
    data: str
    data_sha256: Sha256
    images: Images
    baseline_top1: Fraction
    candidate_top1: Fraction
    lost: int  # right in the baseline only
    gained: int  # right in the candidate only
    p_value: Fraction  # exact McNemar, two-sided
    images_needed: int | None  # to decide the drop, if it is what it seems; None: decided, or no number will do
    checks: Annotated[tuple[Check, ...], msgspec.Meta(min_length=1)]  # the drop first
    agreement: Fraction  # share of images with the same first class
    confident: int  # images whose class has in the baseline twice the probability of any other, or more
    confident_flips: int  # of these, with another first class in the candidate
    kl_at_least: float  # nats, mean over images: divergence of the candidate from the baseline, on the classes kept
    per_class: tuple[ClassDrop, ...]
    flips: tuple[Flip, ...]
    doubts: tuple[str, ...] = ()  # why there is no PASS although every limit is kept
