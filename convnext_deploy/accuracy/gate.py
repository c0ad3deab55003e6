"""May a candidate take its baseline's place? Two evaluations on the same images and limits in, a verdict out.

Nothing is read or run here. PASS says that the candidate keeps the limits, FAIL that it does not, and both are said
only where chance would say so wrongly with probability alpha at most; the rest is INCONCLUSIVE.
"""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..arguments import shown
from ..errors import DataError, UsageError, plain
from ..records.accuracy import Check, CheckName, ClassAccuracy, ClassDrop, EvalResult, Flip, Limits, Verdict
from ..records.base import Decision
from ..records.timing import Timing
from . import binomial, statistics
from .predictions import Predictions

CONFIDENT_NATS = math.log(2)  # between the first two classes: the first at least twice as probable
_SMALLEST_REST = 1e-6  # probability; below it, what float32 leaves of 1 less five probabilities is rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two models: what `evaluate` said of it, and its size and latency where these are compared."""

    result: EvalResult
    predictions: Predictions
    bytes: int | None = None
    timing: Timing | None = None


# What each limit takes, in words.
_POINTS, _TIMES = "percentage points from 0 to 100", "a ratio of candidate to baseline above 0 and at most 1000"
LIMITS = {
    "max_drop": _POINTS, "max_class_drop": _POINTS, "alpha": "a chance above 0 and below 0.5",
    "min_agreement": "a percentage above 0 and below 100", "max_latency_ratio": _TIMES, "max_size_ratio": _TIMES,
}  # fmt: skip


def limits_from_toml(text: str, where: str) -> dict[str, Any]:
    """The settings of a limits file, unknown names refused; `limits_from` makes them limits.

    Raises:
        UsageError: not TOML, or a key that is none of the limits.
    """
    try:
        settings = msgspec.toml.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise UsageError(f"{where} is not a TOML file: {plain(error)}") from None
    known = Limits.__struct_fields__
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"{where} sets {name!r}, which is no limit{hint} (limits: {', '.join(known)})")
    return settings


def limits_from(settings: Mapping[str, Any]) -> Limits:
    """Limits of names and values.

    Raises:
        UsageError: a value out of its range, or no `max_drop`.
    """
    if settings.get("max_drop") is None:
        raise UsageError("no limit for the drop; give --max-drop POINTS, or max_drop in the file of --limits")
    try:
        return msgspec.convert(dict(settings), Limits)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # the latter of half a surrogate pair
        field = re.search(r"`\$\.(\w+)`", str(error))  # which field; the rest is JSON Schema's way to say it
        if field is None or field[1] not in LIMITS:
            raise UsageError(f"limits: {plain(error)}") from None
        value = shown(settings[field[1]])
        raise UsageError(f"limit {field[1]} {value}; expected {LIMITS[field[1]]}") from None


def judge(baseline: Side, candidate: Side, limits: Limits) -> Verdict:
    """Hold a candidate against its baseline.

    Raises:
        DataError: the two were not evaluated on the same images, or predictions are not those of their result.
        UsageError: a limit on size or latency, and a side without it.
    """
    limits = limits_from(msgspec.structs.asdict(limits))  # a record made in Python is not yet checked
    _check_same_images(baseline, candidate)
    sides = (baseline, candidate)
    refuse_unmeasured(
        limits,
        sizes=all(side.bytes is not None for side in sides),
        timings=all(side.timing is not None for side in sides),
    )

    before, after = baseline.predictions, candidate.predictions
    right_before, right_after = _right(before), _right(after)
    images = len(before.names)
    is_lost, is_gained = right_before & ~right_after, ~right_before & right_after
    lost, gained = int(is_lost.sum()), int(is_gained.sum())
    flipped = before.top_classes[:, 0] != after.top_classes[:, 0]
    margins, margins_after = _margins(before), _margins(after)
    confident = margins >= CONFIDENT_NATS
    per_class = _per_class(baseline.result.per_class, before.labels, is_lost, is_gained, limits.alpha)

    drop = _drop(lost, gained, images, limits)
    checks = [drop]
    if limits.max_class_drop is not None:
        checks.append(_class_drop(per_class, limits.max_class_drop / 100))
    if limits.min_agreement is not None:
        checks.append(_agreement(int((~flipped).sum()), images, limits.min_agreement / 100, limits.alpha))
    if limits.max_latency_ratio is not None and baseline.timing and candidate.timing:
        checks.append(_latency(baseline.timing, candidate.timing, limits.max_latency_ratio, limits.alpha))
    if limits.max_size_ratio is not None and baseline.bytes and candidate.bytes:
        ratio = candidate.bytes / baseline.bytes
        checks.append(check_of("size_ratio", limits.max_size_ratio, ratio))
    decision = worst([check.decision for check in checks])
    doubts = _doubts(before, after)
    if decision == "PASS" and doubts:
        decision = "INCONCLUSIVE"
    needed = None
    if drop.decision == "INCONCLUSIVE":
        needed = statistics.images_needed((lost + gained) / images, drop.value, drop.limit, limits.alpha)
    return Verdict(
        decision=decision,
        doubts=doubts,
        limits=limits,
        baseline=baseline.result.artifact,
        baseline_sha256=baseline.result.artifact_sha256,
        candidate=candidate.result.artifact,
        candidate_sha256=candidate.result.artifact_sha256,
        data=candidate.result.data,
        data_sha256=candidate.result.data_sha256,
        images=images,
        baseline_top1=baseline.result.top1,
        candidate_top1=candidate.result.top1,
        lost=lost,
        gained=gained,
        p_value=statistics.mcnemar(lost, gained),
        images_needed=needed,
        checks=tuple(checks),
        agreement=float(1 - flipped.mean()),
        confident=int(confident.sum()),
        confident_flips=int((confident & flipped).sum()),
        kl_at_least=float(_divergence(before, after).mean()),
        per_class=per_class,
        flips=tuple(
            Flip(
                name=before.names[index],
                label=int(before.labels[index]),
                baseline=int(before.top_classes[index, 0]),
                candidate=int(after.top_classes[index, 0]),
                baseline_margin=float(margins[index]),
                candidate_margin=float(margins_after[index]),
            )
            for index in np.flatnonzero(flipped).tolist()
        ),
    )


def _doubts(before: Predictions, after: Predictions) -> tuple[str, ...]:
    """Why these answers and labels cannot show that the candidate is as good as the baseline, whatever the drop is.

    A model that does not know the classes has no accuracy to lose, so that any candidate keeps every limit. That is so
    where the labels are numbered otherwise than the model's outputs, or where the preprocessing is another one.
    """
    doubts = []
    first, second = before.top_classes[:, 0], after.top_classes[:, 0]
    for name, answers in (("baseline", first), ("candidate", second)):
        right, chance = answers == before.labels, statistics.expected_agreement(answers, before.labels)
        if not statistics.is_above_chance(int(right.sum()), len(right), chance):
            doubts.append(
                f"the {name}'s top-1 {right.mean():.2%} is not clearly above chance ({chance:.2%}): its classes are "
                "not these labels, or its preprocessing is another (--labels, inspect)"
            )
    wrong = (first != before.labels) & (second != before.labels)
    for where, among, least in (("all images", np.ones(len(first), bool), 1), ("images both get wrong", wrong, 30)):
        if among.sum() < least:
            continue
        one, other = first[among], second[among]
        chance = statistics.expected_agreement(one, other)
        if not statistics.is_above_chance(int((one == other).sum()), len(one), chance) and (one != other).any():
            doubts.append(
                f"on {where} the two give the same first class to {(one == other).mean():.2%}, which is not clearly "
                f"above chance ({chance:.2%}): such a candidate cannot have the drop that was measured but by luck"
            )
    return tuple(doubts)


def refuse_unmeasured(limits: Limits, *, sizes: bool, timings: bool) -> None:
    """Refuse a limit on what is not known of both sides."""
    for name, limit, known in (
        ("max_size_ratio", limits.max_size_ratio, sizes),
        ("max_latency_ratio", limits.max_latency_ratio, timings),
    ):
        if limit is not None and not known:
            raise UsageError(f"{name} {limit} compares artifacts; give artifact folders as --baseline and --candidate")


def _check_same_images(baseline: Side, candidate: Side) -> None:
    for side in (baseline, candidate):
        result, predictions = side.result, side.predictions
        if predictions.top_classes.shape[1] < 2:
            raise DataError(
                f"{result.artifact} has one output, so that its top-1 on {result.data} is 100 % whatever it computes; "
                "compare logits instead (`load` and `run` in Python)"
            )
        if not _are_of(predictions, result):
            raise DataError(f"the predictions beside the result of {result.artifact} are not its own; evaluate again")
    one, other = baseline.result, candidate.result
    if one.data_sha256 != other.data_sha256:
        raise DataError(
            f"the baseline was evaluated on {one.data} and the candidate on {other.data}, which contain other images "
            "or labels; evaluate both on the same images"
        )
    names, others = baseline.predictions.names, candidate.predictions.names
    if names != others:  # of the same source: an image could be read on one side only
        odd = sorted(set(names) ^ set(others)) or ["their order"]
        raise DataError(
            f"{odd[0]} of {one.data} could be read for {'the baseline' if odd[0] in names else 'the candidate'} only; "
            "evaluate both again"
        )
    if not np.array_equal(baseline.predictions.labels, candidate.predictions.labels):
        raise DataError(f"the labels of {one.data} differ between baseline and candidate; evaluate both again")


def _are_of(predictions: Predictions, result: EvalResult) -> bool:
    """Whether a summary says of every class what these predictions say."""
    if not predictions.names or len(predictions.names) != result.images:
        return False
    counts = dict(zip(*(row.tolist() for row in np.unique(predictions.labels, return_counts=True)), strict=True))
    listed = {row.label: row.images for row in result.per_class}
    return (
        math.isclose(float(_right(predictions).mean()), result.top1)
        and len(listed) == len(result.per_class)
        and listed == counts
    )


def _right(predictions: Predictions) -> NDArray[np.bool_]:
    """(N,): the label is the first class."""
    return predictions.top_classes[:, 0] == predictions.labels


def _margins(predictions: Predictions) -> NDArray[np.float64]:
    """(N,), nats: how far the second class is behind the first."""
    log_probs = predictions.top_log_probs.astype(np.float64)
    return log_probs[:, 0] - log_probs[:, 1]


def _drop(lost: int, gained: int, images: int, limits: Limits) -> Check:
    lower, upper = statistics.drop_bounds(lost, gained, images, limits.alpha)
    return check_of("top1_drop", limits.max_drop / 100, (lost - gained) / images, lower, upper)


def _class_drop(per_class: tuple[ClassDrop, ...], limit: float) -> Check:
    """A tripwire: classes have too few images to prove that none drops, so only what is beyond chance counts."""
    drops = [(row.lost - row.gained) / row.images for row in per_class if row.beyond_chance]
    return check_of("class_drop", limit, max(drops, default=0.0))


def _agreement(agreeing: int, images: int, limit: float, alpha: float) -> Check:
    lower, upper = binomial.share_bounds(agreeing, images, alpha)
    decision: Decision = "PASS" if lower >= limit else "FAIL" if upper < limit else "INCONCLUSIVE"
    return Check(
        name="agreement", decision=decision, limit=limit, value=agreeing / images, lower=lower, upper=upper
    )  # fmt: skip


def _latency(baseline: Timing, candidate: Timing, limit: float, alpha: float) -> Check:
    ratio, lower, upper = statistics.ratio_of_medians(candidate.samples_ms, baseline.samples_ms, alpha)
    return check_of("latency_ratio", limit, ratio, lower, upper)


def check_of(
    name: CheckName, limit: float, value: float, lower: float | None = None, upper: float | None = None
) -> Check:
    """Check a value that must not exceed its limit; without bounds, the value itself decides."""
    low, high = (value if lower is None else lower), (value if upper is None else upper)
    decision: Decision = "PASS" if high <= limit else "FAIL" if low > limit else "INCONCLUSIVE"
    return Check(name=name, decision=decision, limit=limit, value=value, lower=lower, upper=upper)


def worst(decisions: list[Decision]) -> Decision:
    return "FAIL" if "FAIL" in decisions else "INCONCLUSIVE" if "INCONCLUSIVE" in decisions else "PASS"


def _per_class(
    classes: tuple[ClassAccuracy, ...],
    labels: NDArray[np.int64],
    is_lost: NDArray[np.bool_],
    is_gained: NDArray[np.bool_],
    alpha: float,
) -> tuple[ClassDrop, ...]:
    """Compare every class that has images, in label order."""
    size = int(labels.max()) + 1
    lost, gained = np.bincount(labels[is_lost], minlength=size), np.bincount(labels[is_gained], minlength=size)
    counts = [(int(lost[row.label]), int(gained[row.label])) for row in classes]
    p_values = statistics.holm([statistics.mcnemar_loss(*pair) for pair in counts])
    return tuple(
        ClassDrop(
            label=row.label,
            name=row.name,
            images=row.images,
            lost=pair[0],
            gained=pair[1],
            p_value=p_value,
            beyond_chance=p_value <= alpha,
        )
        for row, pair, p_value in zip(classes, counts, p_values, strict=True)
    )


def _divergence(before: Predictions, after: Predictions) -> NDArray[np.float64]:
    """(N,), nats: a lower bound of KL(before || after).

    Known of both models are the probabilities of the label and of classes that are among the first of both. All
    others are taken together, and taking classes together never makes the divergence larger.
    """
    same = before.top_classes[:, :, None] == after.top_classes[:, None, :]  # (N, k, k')
    shared = same.any(axis=2)  # (N, k)
    log_p = before.top_log_probs.astype(np.float64)
    log_q = (same * after.top_log_probs.astype(np.float64)[:, None, :]).sum(axis=2)  # 0 where not shared
    label_listed = (shared & (before.top_classes == before.labels[:, None])).any(axis=1)
    known = np.column_stack([shared, ~label_listed])  # (N, k + 1): the label last, where it is not among them
    log_p = np.column_stack([log_p, before.label_log_prob.astype(np.float64)])
    log_q = np.column_stack([log_q, after.label_log_prob.astype(np.float64)])
    p, q = np.exp(log_p) * known, np.exp(log_q) * known
    rest_p = np.maximum(1 - p.sum(axis=1), _SMALLEST_REST)
    rest_q = np.maximum(1 - q.sum(axis=1), _SMALLEST_REST)
    divergence = (p * (log_p - log_q)).sum(axis=1) + rest_p * np.log(rest_p / rest_q)
    return np.asarray(np.maximum(divergence, 0.0), np.float64)
