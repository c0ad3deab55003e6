"""The gate for models that have no top-1: mAP, R2 or mIoU in its place, paired image by image."""

from dataclasses import dataclass

import msgspec
import numpy as np

from ..errors import DataError, UsageError
from ..records.accuracy import CheckName, Limits, ScoreResult, ScoreVerdict
from . import outputs
from .boxes import Detections
from .gate import check_of, limits_from, worst
from .outputs import Outputs, Segments

_NAMES: dict[str, CheckName] = {
    "multi-label": "map_drop", "regression": "r2_drop", "segmentation": "miou_drop", "detection": "map_drop",
}  # fmt: skip
_OF_CLASSIFIERS = ("max_class_drop", "min_agreement", "max_latency_ratio")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSide:
    """One of the two models: what `score` said of it, and its size where that is compared."""

    result: ScoreResult
    outputs: Outputs | Segments | Detections
    bytes: int | None = None


def judge_scores(baseline: ScoredSide, candidate: ScoredSide, limits: Limits) -> ScoreVerdict:
    """Hold a candidate against its baseline.

    Raises:
        DataError: the two were not evaluated on the same images, or outputs are not those of their result.
        UsageError: a limit that only classifiers of one label an image have.
    """
    limits = limits_from(msgspec.structs.asdict(limits))  # a record made in Python is not yet checked
    problem = baseline.result.problem
    for name in _OF_CLASSIFIERS:
        if getattr(limits, name) is not None:
            raise UsageError(f"{name} {getattr(limits, name)} is no limit for a {problem} model; expected max_drop")
    if limits.max_size_ratio is not None and not (baseline.bytes and candidate.bytes):
        raise UsageError(f"max_size_ratio {limits.max_size_ratio} compares artifacts; give artifact folders")
    _check_same_images(baseline, candidate)
    before, after = (outputs.scored(side.outputs, problem) for side in (baseline, candidate))
    for side, answers in ((baseline, before), (candidate, after)):
        if not np.isclose(answers.score, side.result.score, rtol=0, atol=1e-6):
            raise DataError(f"the outputs beside the result of {side.result.artifact} are not its own; evaluate again")
    drop = outputs.drop_between(before, after, limits.alpha)
    limit, images = limits.max_drop / 100, len(baseline.outputs.names)
    checks = [check_of(_NAMES[problem], limit, drop.value, drop.lower, drop.upper)]
    if before.of_masks is not None and after.of_masks is not None:
        of_masks = outputs.drop_between(before.of_masks, after.of_masks, limits.alpha)
        checks.append(check_of("mask_map_drop", limit, of_masks.value, of_masks.lower, of_masks.upper))
    if limits.max_size_ratio is not None and baseline.bytes and candidate.bytes:
        checks.append(check_of("size_ratio", limits.max_size_ratio, candidate.bytes / baseline.bytes))
    doubts = tuple(
        f"the {name}'s {outputs.chance_words(side.outputs, answers, problem)}"
        for name, side, answers in (("baseline", baseline, before), ("candidate", candidate, after))
        if not outputs.is_above_chance(side.outputs, answers, problem)
    )
    decision = worst([check.decision for check in checks])
    needed = None
    if checks[0].decision == "INCONCLUSIVE":
        needed = outputs.images_needed(drop, images, limit)
    return ScoreVerdict(
        decision="INCONCLUSIVE" if decision == "PASS" and doubts else decision,
        problem=problem,
        limits=limits,
        baseline=baseline.result.artifact,
        baseline_sha256=baseline.result.artifact_sha256,
        candidate=candidate.result.artifact,
        candidate_sha256=candidate.result.artifact_sha256,
        data=candidate.result.data,
        data_sha256=candidate.result.data_sha256,
        images=images,
        baseline_score=before.score,
        candidate_score=after.score,
        baseline_mask_score=None if before.of_masks is None else before.of_masks.score,
        candidate_mask_score=None if after.of_masks is None else after.of_masks.score,
        standard_error=drop.standard_error,
        images_needed=needed,
        checks=tuple(checks),
        doubts=doubts,
    )


def _has_masks(side: ScoredSide) -> bool:
    return isinstance(side.outputs, Detections) and side.outputs.masks is not None


def _check_same_images(baseline: ScoredSide, candidate: ScoredSide) -> None:
    one, other = baseline.result, candidate.result
    if one.problem != other.problem:
        raise DataError(
            f"the baseline is a {one.problem} model and the candidate a {other.problem} one; expected two of one kind"
        )
    if _has_masks(baseline) != _has_masks(candidate):
        without = baseline if _has_masks(candidate) else candidate
        raise DataError(
            f"{without.result.artifact} was evaluated without masks and the other with masks; expected two of one kind"
        )
    same_targets = np.array_equal(baseline.outputs.targets, candidate.outputs.targets)
    if one.data_sha256 != other.data_sha256 or baseline.outputs.names != candidate.outputs.names or not same_targets:
        raise DataError(
            f"the baseline was evaluated on {one.data} and the candidate on {other.data}, which contain other images "
            "or labels, or could not be read alike; evaluate both on the same images"
        )
