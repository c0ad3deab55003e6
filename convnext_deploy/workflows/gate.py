"""`gate`: a candidate against its baseline, on accuracy, latency and size."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from .. import formats
from ..accuracy.gate import Side, judge, refuse_unmeasured
from ..accuracy.gate_scores import ScoredSide, judge_scores
from ..accuracy.partial import read_any
from ..accuracy.prediction_files import read_outputs, read_predictions
from ..accuracy.targets import labelled
from ..artifact import manifest
from ..artifact.manifest import Artifact
from ..artifact.session import RunOptions
from ..data import preprocess
from ..errors import UsageError
from ..records.accuracy import EvalResult, Limits, ScoreResult, ScoreVerdict, Verdict
from ..records.timing import Timing
from ..timing import measure
from .evaluate import Images, evaluate

LATENCY_S = 5.0  # of timing for each side


def gate(
    paths: Mapping[str, Path],
    limits: Limits,
    images: Images | None,
    options: RunOptions,
    *,
    out: Path | None,
    trust: bool,
    progress: Callable[[int, int], None] | None,
    say: Callable[[str], None],
) -> Verdict | ScoreVerdict:
    """The steps of `api.gate`.

    Args:
        paths: of "baseline" and "candidate": an artifact, or the result of an evaluation.
        images: what artifacts are evaluated on.

    Raises:
        DataError: the two were not evaluated on the same images.
        UsageError: a side that does not exist, an artifact without images, images without an artifact, or a limit that
            needs artifacts.
    """
    for name, path in paths.items():
        if not path.exists():
            raise UsageError(
                f"--{name} {path} does not exist; expected an artifact folder, or OUT.json of eval --out OUT"
            )
    artifacts = {name: manifest.verified(path) for name, path in paths.items() if path.is_dir()}
    refuse_unmeasured(limits, sizes=len(artifacts) == 2, timings=len(artifacts) == 2)
    if artifacts and images is None:
        name, artifact = next(iter(artifacts.items()))
        raise UsageError(f"--{name} {artifact.path} is an artifact; give --data, or a result of eval in its place")
    if images is not None and not artifacts:
        raise UsageError(f"--data {images.data} is for artifacts, and both sides are results of eval; leave it out")

    side_of: dict[str, Side | ScoredSide] = {}
    with tempfile.TemporaryDirectory(prefix="gate-") as temporary:
        for name, path in paths.items():
            if images is not None and name in artifacts:
                kept = (out or Path(temporary)) / name
                path = kept.with_name(f"{name}.json")
                if not _is_evaluated(path, artifacts[name], images):
                    evaluate(artifacts[name], images, options, out=kept, trust=trust, progress=progress, say=say)
            side_of[name] = _side(read_any(path), path, artifacts[name].bytes if name in artifacts else None)
    sides = {name: side for name, side in side_of.items() if isinstance(side, Side)}
    scored = {name: side for name, side in side_of.items() if isinstance(side, ScoredSide)}
    if sides and scored:
        raise UsageError(
            f"{' and '.join(f'{name} is a {side.result.problem} model' for name, side in side_of.items())}; "
            "expected two of one kind"
        )
    if scored:
        return judge_scores(scored["baseline"], scored["candidate"], limits)
    if limits.max_latency_ratio is not None:
        timings = _timed_beside_each_other(artifacts, options, trust)
        sides = {name: replace(side, timing=timings[name]) for name, side in sides.items()}
    return judge(sides["baseline"], sides["candidate"], limits)


def _side(result: EvalResult | ScoreResult, path: Path, size: int | None) -> Side | ScoredSide:
    """A result with the predictions beside it."""
    if result.predictions is None:
        raise UsageError(f"{path} has no predictions beside it; evaluate again with --out")
    beside = path.with_name(result.predictions)
    if not beside.exists() and (renamed := path.with_suffix(beside.suffix)).exists():
        beside = renamed  # with the result; it is compared with it
    if isinstance(result, ScoreResult):
        return ScoredSide(result=result, outputs=read_outputs(beside), bytes=size)
    return Side(result=result, predictions=read_predictions(beside), bytes=size)


def _is_evaluated(result: Path, artifact: Artifact, images: Images) -> bool:
    """Whether an earlier call has finished this evaluation."""
    if not result.exists():
        return False
    record = read_any(result)
    source, classes, problem = images.of(artifact)
    numbered = labelled(source, artifact, classes, problem)
    known = (record.artifact_sha256, record.data_sha256, record.problem)
    return known == (artifact.sha256, numbered.sha256, problem)


def _timed_beside_each_other(artifacts: dict[str, Artifact], options: RunOptions, trust: bool) -> dict[str, Timing]:
    """Latency of each artifact on one batch of random pixels, of the size that the baseline is tuned for."""
    batch = artifacts["baseline"].manifest.export.batch.opt
    sessions = {name: formats.opened(artifact, options, trust) for name, artifact in artifacts.items()}
    images = {}
    for name, artifact in artifacts.items():
        model = artifact.manifest.model
        pixels = np.random.default_rng(0).integers(0, 256, (batch, model.in_chans, *model.image_size), np.uint8)
        images[name] = preprocess.as_input(pixels, artifact.manifest.preprocessing, artifact.manifest.export.input)
    return {timing.artifact: timing for timing in measure.interleaved(sessions, images, LATENCY_S)}
