"""The fastest plan within an accuracy budget: sensitivities on images, measured gains, and a gate at the end.

    prepare        calibrate, draft, corrections                               calibration images
    sensitivity    each operation alone in 8 bits, simulated                   selection images
    gain           latency of each group of operations, left out of the rest   this machine and runtime
    candidates     nested plans, the most damage for the least gain left out   selection images, interleaved timing
    gate           the fastest candidate that is faster than float, until one passes   final images

The three sets of images are disjoint, and the final ones are looked at only once a candidate is chosen. What was
measured is kept below `<plan>.search/`, so that an interrupted search goes on where it stopped.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from .. import env, formats
from ..accuracy import gate, statistics
from ..accuracy.evaluation import evaluate, read_result
from ..accuracy.predictions import SUFFIX, read_predictions
from ..artifact.manifest import Artifact, encode, remove, write_file
from ..artifact.session import RunOptions, Session
from ..data import preprocess, sources
from ..errors import CheckFailed, UsageError
from ..models.convnext import ConvNeXt
from ..quantization import distance
from ..quantization import plan as plans
from ..quantization.plan import LoadedPlan
from ..records.accuracy import Limits, Verdict
from ..records.base import Precision
from ..records.manifest import Preprocessing
from ..records.plan import PlanCandidate, SearchResult
from ..records.timing import Timing
from ..runtimes.torch_session import TorchSession
from ..timing import measure

SENSITIVITY_IMAGES = 64
TIMING_S = 3.0  # of each artifact
LEAST_GAIN = 0.01  # of the latency with everything in 8 bits: what 8 bits in a group must save to be worth anything
BUDGETS = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of the distance with everything in 8 bits, one candidate each
EVALUATION_BATCH = 16
FLOAT = "use a float precision"  # what is left where no plan is
FINALISTS = 3  # candidates that may be tried on the final images

Progress = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a plan may cost, and what it is measured on."""

    max_drop: float  # percentage points of top-1
    alpha: float
    batch: int


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """What every step needs. `build` exports the checkpoint to a folder, with a plan or in a float type."""

    folder: Path
    build: Callable[[Path, "LoadedPlan | None", Precision | None], Artifact]
    simulation: Callable[["LoadedPlan | None"], ConvNeXt] | None  # where the artifact cannot run here
    preprocessing: Preprocessing
    selection: sources.ImageSource
    final: sources.ImageSource
    threads: int | None
    say: Callable[[str], None]
    progress: Progress


def search(
    bench: Workbench,
    model: ConvNeXt,
    loaded: LoadedPlan,
    pixels: distance.Pixels,
    budget: Budget,
    images: Mapping[str, int],
) -> tuple[SearchResult, LoadedPlan | None]:
    """The fastest plan that passes the gate, or None, and everything that was measured on the way.

    Args:
        model: folded, fp32.
        loaded: a plan that has every operation in 8 bits.
        pixels: of the selection images, for sensitivities.
        images: sizes of the three sets, for the record.
    """
    known = _sensitivities(bench, model, loaded, pixels)
    limits = Limits(max_drop=budget.max_drop, alpha=budget.alpha)
    baseline = bench.build(bench.folder / "fp32", None, "fp32")
    floats = {"fp32": baseline}
    rejected: dict[str, PlanCandidate] = {}
    features = formats.get(loaded.plan.target).bf16_features  # with these, its bf16 is a float type to be beaten
    if features and (loaded.plan.rest == "bf16" or features & env.cpu_features()):
        bf16 = _built(bench, "bf16", None, rejected)
        floats |= {} if bf16 is None else {"bf16": bf16}

    gains: dict[str, float] = {}
    useful = set(known)
    if bench.simulation is None:
        gains = _gains(bench, loaded, budget.batch, rejected)
        useful = {name for name in known if not gains or gains[_group(name)] > 0}
    if not useful:
        why = f"8 bits make no group of operations faster on this machine and runtime; {FLOAT}"
        return _result(bench, loaded, budget, images, known, gains, tuple(rejected.values()), None, why), None

    sets = _nested(known, gains, useful)
    artifacts, chosen_plans = dict(floats), {}
    for index, names in enumerate(sets, 1):
        name = f"plan{index}"
        chosen_plans[name] = plans.restricted(loaded, names)
        bench.say(f"{name}: {len(names)} operations in 8 bits")
        built = _built(bench, name, chosen_plans[name], rejected, sum(known[operation] for operation in names))
        artifacts |= {} if built is None else {name: built}
    chosen_plans = {name: plan for name, plan in chosen_plans.items() if name in artifacts}
    if not chosen_plans:
        row = next(row for name, row in rejected.items() if name.startswith("plan"))
        why = f"no candidate is left of {len(sets)}, {row.name}: {row.rejected}; cure that, or {FLOAT}"
        return _result(bench, loaded, budget, images, known, gains, tuple(rejected.values()), None, why), None
    timings = _timed(artifacts, budget.batch, bench) if bench.simulation is None else {}

    sides = {
        name: _side(bench, artifact, chosen_plans.get(name), "selection", bench.selection)
        for name, artifact in artifacts.items()
    }
    candidates = {}
    for name, artifact in artifacts.items():
        operations = plans.quantized(chosen_plans[name].plan) if name in chosen_plans else ()
        verdict = gate.judge(sides["fp32"], sides[name], limits)
        candidates[name] = PlanCandidate(
            name=name,
            operations=operations,
            predicted=sum(known[operation] for operation in operations),
            agreement=verdict.agreement,
            top1=verdict.candidate_top1,
            latency=timings.get(name),
            bytes=artifact.bytes,
            selection=verdict.decision,
            final=None,
            final_drop=None,
        )

    fastest_float = min(floats, key=lambda name: timings[name].median_ms) if timings else "fp32"
    tried = _worth_trying(candidates, timings, chosen_plans, fastest_float, budget.alpha)
    chosen, why = None, f"no plan is faster than {fastest_float} and passes on the selection images; {FLOAT}"
    before = _side(bench, baseline, None, "final", bench.final) if tried else None
    for name in tried[:FINALISTS]:
        assert before is not None
        after = _side(bench, artifacts[name], chosen_plans[name], "final", bench.final)
        verdict = gate.judge(before, after, limits)
        candidates[name] = msgspec.structs.replace(candidates[name], final=verdict.decision, final_drop=_drop(verdict))
        if verdict.decision == "PASS":
            first = "fastest" if timings else "one with the most in 8 bits"
            chosen, why = name, f"the {first} of {len(tried)} that passes on the final images"
            break
        needed = f"; about {verdict.images_needed} would decide it" if verdict.images_needed else ""
        why = f"{name} is {verdict.decision} on {verdict.images} final images{needed}; {FLOAT}"
    rows = (*candidates.values(), *rejected.values())
    found = _result(bench, loaded, budget, images, known, gains, rows, chosen, why)
    return found, None if chosen is None else chosen_plans[chosen]


def _built(
    bench: Workbench,
    name: str,
    plan: LoadedPlan | None,
    rejected: dict[str, PlanCandidate],
    predicted: float = 0.0,
) -> Artifact | None:
    """The artifact; None where it fails to build or to verify, which becomes a row of `rejected`."""
    try:
        return bench.build(bench.folder / name, plan, "bf16" if plan is None else None)
    except CheckFailed as error:
        bench.say(f"{name} is rejected: {error}")
        rejected[name] = PlanCandidate(
            name=name,
            operations=() if plan is None else plans.quantized(plan.plan),
            predicted=predicted,
            agreement=None,
            top1=None,
            latency=None,
            bytes=0,
            selection=None,
            final=None,
            final_drop=None,
            rejected=str(error),
        )
        return None


def _sensitivities(bench: Workbench, model: ConvNeXt, loaded: LoadedPlan, pixels: distance.Pixels) -> dict[str, float]:
    """Of every operation of the plan; kept after each."""
    path = bench.folder / "sensitivities.json"
    known = _kept(path) or {}
    steps = distance.sensitivities(
        model, loaded, pixels[:SENSITIVITY_IMAGES], bench.preprocessing, known, bench.progress("sensitivity")
    )
    for name, value in steps:
        known[name] = value
        write_file(path, encode(known))
    return known


def _kept(path: Path) -> dict[str, float] | None:
    """What an earlier call has measured.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, float])
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {error}; remove it, and the search measures that again") from None


def _group(operation: str) -> str:
    """Operations that are timed together: a stage's linears, the downsamples, the stem, the head."""
    return operation[: len("stages.0")] if operation.startswith("stages.") else plans.kind_of(operation)


def _gains(bench: Workbench, loaded: LoadedPlan, batch: int, rejected: dict[str, PlanCandidate]) -> dict[str, float]:
    """Milliseconds a batch that 8 bits in each group save while all others have them; 0 where it is next to nothing.

    Empty where everything in 8 bits was rejected. A group whose own artifact was rejected gets the mean of the others.
    """
    path = bench.folder / "gains.json"
    kept = _kept(path)
    if kept is not None:
        return kept
    names = plans.quantized(loaded.plan)
    groups = dict.fromkeys(map(_group, names))
    whole_artifact = _built(bench, "all", loaded, rejected)
    if whole_artifact is None:
        return {}
    artifacts = {"all": whole_artifact}
    for group in groups:
        bench.say(f"gain of {group}")
        rest = plans.restricted(loaded, [name for name in names if _group(name) != group])
        built = _built(bench, f"without-{group}", rest, rejected)
        artifacts |= {} if built is None else {group: built}
    timings = _timed(artifacts, batch, bench)
    whole = timings["all"].median_ms
    measured = {group: timings[group].median_ms - whole for group in groups if group in artifacts}
    usual = float(np.mean(list(measured.values()))) if measured else whole
    saved = {group: measured.get(group, usual) for group in groups}
    for group in measured:
        remove(artifacts[group].path)
    found = {group: gain if gain > LEAST_GAIN * whole else 0.0 for group, gain in saved.items()}
    write_file(path, encode(found))
    return found


def _nested(known: Mapping[str, float], gains: Mapping[str, float], useful: Collection[str]) -> list[tuple[str, ...]]:
    """Sets of operations, each a part of the one before: the least damage for the gain stays longest."""
    members = {group: [name for name in useful if _group(name) == group] for group in map(_group, useful)}

    def price(name: str) -> float:
        group = _group(name)
        return known[name] / (gains[group] / len(members[group])) if gains else known[name]

    ordered = sorted(useful, key=price)
    sums = np.cumsum([known[name] for name in ordered])
    found: list[tuple[str, ...]] = []
    for share in BUDGETS:
        kept = tuple(ordered[: int(np.searchsorted(sums, share * sums[-1] * (1 + 1e-9), side="right"))])
        if kept and kept not in found:
            found.append(kept)
    return found


def _timed(artifacts: Mapping[str, Artifact], batch: int, bench: Workbench) -> dict[str, Timing]:
    options = RunOptions(threads=bench.threads)
    sessions = {name: _opened(artifact, options) for name, artifact in artifacts.items()}
    images = {}
    for name, artifact in artifacts.items():
        found = artifact.manifest
        pixels = preprocess.probe_images(found.model.in_chans, found.model.image_size, batch)
        images[name] = preprocess.as_input(pixels, found.preprocessing, found.export.input)
    bench.say(f"timing {len(sessions)} artifacts, interleaved")
    return {timing.artifact: timing for timing in measure.interleaved(sessions, images, TIMING_S)}


def _opened(artifact: Artifact, options: RunOptions) -> Session:
    return formats.opened(artifact, options, trust=True)  # `Workbench.build` has just built it, or knows who did


def _side(
    bench: Workbench, artifact: Artifact, loaded: LoadedPlan | None, kind: str, images: sources.ImageSource
) -> gate.Side:
    """An artifact's predictions on a set of images, from its runtime or, where that cannot run here, simulated."""
    out = bench.folder / f"{artifact.path.name}-{kind}"
    result_file = out.with_name(f"{out.name}.json")
    if not result_file.exists():
        if bench.simulation is not None:
            session: Session = TorchSession(bench.simulation(loaded), artifact.manifest, RunOptions())
        else:
            session = _opened(artifact, RunOptions(threads=bench.threads))
        batch = min(artifact.manifest.export.batch.max, EVALUATION_BATCH)
        evaluate(session, images, artifact=artifact, batch=batch, out=out, progress=bench.progress(out.name))
    result = read_result(result_file)
    if result.artifact_sha256 != artifact.sha256 or result.data_sha256 != images.sha256:
        raise UsageError(f"{result_file} is of another artifact or other images; remove {bench.folder} and run again")
    return gate.Side(result=result, predictions=read_predictions(out.with_name(f"{out.name}{SUFFIX}")))


def _worth_trying(
    candidates: Mapping[str, PlanCandidate],
    timings: Mapping[str, Timing],
    chosen: Collection[str],
    fastest_float: str,
    alpha: float,
) -> list[str]:
    """Candidates that are faster than every float artifact and not already refused, the fastest first."""
    left = [name for name in chosen if candidates[name].selection != "FAIL"]
    if not timings:
        return sorted(left, key=lambda name: -len(candidates[name].operations))
    reference = timings[fastest_float].samples_ms
    faster = [
        name
        for name in left
        if statistics.ratio_of_medians(timings[name].samples_ms, reference, alpha)[2] < 1  # upper bound
    ]
    return sorted(faster, key=lambda name: timings[name].median_ms)


def _drop(verdict: Verdict) -> tuple[float, float, float]:
    check = next(check for check in verdict.checks if check.name == "top1_drop")
    assert check.lower is not None
    assert check.upper is not None
    return check.value, check.lower, check.upper


def _result(
    bench: Workbench,
    loaded: LoadedPlan,
    budget: Budget,
    images: Mapping[str, int],
    known: dict[str, float],
    gains: dict[str, float],
    candidates: Sequence[PlanCandidate],
    chosen: str | None,
    why: str,
) -> SearchResult:
    return SearchResult(
        target=loaded.plan.target,
        max_drop=budget.max_drop,
        alpha=budget.alpha,
        batch=budget.batch,
        images=dict(images),
        sensitivities=known,
        gains_ms=gains,
        corrections=loaded.plan.corrections,
        candidates=tuple(candidates),
        accuracy_of="runtime" if bench.simulation is None else "simulation",
        chosen=chosen,
        why=why,
        machine=env.machine(),
        versions=env.versions(),
    )
