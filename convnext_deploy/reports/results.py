"""Reading recorded results: JSON Lines of several kinds, in one file or many."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import msgspec

from ..accuracy import binomial
from ..errors import DataError, plain
from ..models import registry
from ..records.accuracy import EvalResult, ScoreResult, ScoreVerdict, Verdict
from ..records.base import MAX_RESULTS_BYTES, Above0, BatchSize, PlanType, Positive, Task, content_of
from ..records.optimize import OptimizeResult
from ..records.timing import Ceilings, LayerKind, ProfileResult, RooflineResult
from ..timing import roofline
from ..timing.measure import quantile

KINDS: tuple[LayerKind, ...] = get_args(LayerKind)


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What a page shows of one timing; a benchmark's record contains more."""

    model: str
    runtime: str
    precision: str
    batch: BatchSize
    image_size: tuple[Positive, Positive]
    samples_ms: tuple[Above0, ...]
    median_ms: Above0 | None
    images_per_s: Above0 | None
    machine: dict[str, Any]
    versions: dict[str, str]
    created: str = ""
    scenario: str = "single-stream"
    scope: str = "compute"
    task: str = "classify"
    device: str = "cpu"
    threads: int | None = None
    streams: int = 1
    subject: str = ""
    artifact: str | None = None
    artifact_sha256: str | None = None
    eight_bits: PlanType | None = None  # products in it, the rest in `precision`
    random_weights: bool | None = None  # None: not known
    label: str = ""  # tells apart what would be called the same; no file has it
    status: str = "valid"
    reason: str | None = None
    tflops: float | None = None
    percent_of_bound: float | None = None  # 100: as fast as the roofline allows
    top1: float | None = None  # a fraction

    @property
    def series(self) -> str:
        """What a plot's legend calls it."""
        return " ".join(filter(None, (self.runtime, self.type, self.label)))

    @property
    def type(self) -> str:
        """What its products run in. Records of before `eight_bits` say it in their subject only."""
        words = self.subject.removeprefix(f"{self.model} {self.runtime} ").split()
        return self.eight_bits or (words[0] if words[:1] in (["int8"], ["fp8"]) else self.precision)

    @property
    def valid(self) -> bool:
        return self.status == "valid" and self.median_ms is not None and self.images_per_s is not None

    def interval_ms(self) -> tuple[float, float] | None:
        """95 % interval of the median, from order statistics; None for fewer than 6 samples, which carry none."""
        median = quantile(self.samples_ms, 0.5)
        return None if median.low_ms is None or median.high_ms is None else (median.low_ms, median.high_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything that was read, in the files' order."""

    files: tuple[str, ...]
    measurements: tuple[Measurement, ...] = ()
    profiles: tuple[ProfileResult, ...] = ()
    rooflines: tuple[RooflineResult, ...] = ()
    evaluations: tuple[EvalResult, ...] = ()
    scores: tuple[ScoreResult, ...] = ()
    verdicts: tuple[Verdict | ScoreVerdict, ...] = ()
    optimizations: tuple[OptimizeResult, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)  # records of a kind that no page shows


def read(paths: Sequence[Path]) -> Results:
    """Read files of JSON Lines, or of one JSON document each.

    Raises:
        DataError: a file that cannot be read, a line that is not JSON or not the record it says, or nothing to show.
    """
    kinds: dict[str, list[Any]] = {name: [] for name in SHOWN}
    left_out: Counter[str] = Counter()
    for path in paths:
        for where, document in _documents(path):
            name, record = _record(where, document)
            if name in kinds:
                kinds[name].append(record)
            else:
                left_out[name] += 1
    if not any(kinds.values()):
        listed = ", ".join(f"{count} {name}" for name, count in left_out.items()) or "nothing"
        raise DataError(
            f"{', '.join(map(str, paths))}: no result that a report shows (found: {listed}); expected what `bench`, "
            "`profile`, `roofline`, `eval`, `gate --json` or `optimize` wrote"
        )
    return Results(
        files=tuple(path.name for path in paths),
        left_out=dict(left_out),
        **{name: tuple(records) for name, records in kinds.items()},
    )


def _documents(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if path.is_dir():
        there = sorted(path.glob("result.json")) or sorted(path.glob("*.jsonl"))
        raise DataError(f"{path} is a folder; give files of results" + (f", such as {there[0]}" if there else ""))
    try:
        text = content_of(path, MAX_RESULTS_BYTES)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {plain(error)}") from None
    documents = []
    try:
        whole = msgspec.json.decode(text)  # one document, which may be indented
        lines = [(str(path), whole)]
    except _NOT_JSON:
        lines = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    lines.append((f"{path}, line {number}", msgspec.json.decode(line)))
                except _NOT_JSON as error:
                    raise DataError(f"{path}, line {number} is not JSON: {plain(error)}") from None
    for where, document in lines:
        if not isinstance(document, dict):
            raise DataError(f"{where} contains {type(document).__name__}; expected a JSON object")
        rows = document.get("results")
        if document.keys() == {"results", "comparisons"} and isinstance(rows, list):  # of `bench --json`
            documents += [(f"{where}, result {number}", row) for number, row in enumerate(rows, 1)]
        else:
            documents.append((where, document))
    for where, document in documents:
        if not isinstance(document, dict):
            raise DataError(f"{where} contains {type(document).__name__}; expected a JSON object")
    return documents


_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
SHOWN = ("measurements", "profiles", "rooflines", "evaluations", "scores", "verdicts", "optimizations")


def _record(where: str, document: dict[str, Any]) -> tuple[str, Any]:
    """Which kind of record a document is, and the record; other kinds are given by name only."""
    types: dict[str, tuple[str, Any]] = {
        "profile": ("profiles", ProfileResult), "roofline": ("rooflines", RooflineResult),
        "optimize": ("optimizations", OptimizeResult),
    }  # fmt: skip
    kind = document.get("record")
    if isinstance(kind, str) and kind in types:
        name, type_ = types[kind]
    elif {"runtime", "samples_ms", "images_per_s"} <= document.keys():
        name, type_ = "measurements", Measurement
    elif {"decision", "checks", "limits"} <= document.keys():
        name, type_ = "verdicts", ScoreVerdict if "problem" in document else Verdict
    elif {"per_output", "data_sha256"} <= document.keys():
        name, type_ = "scores", ScoreResult
    elif {"per_class", "data_sha256"} <= document.keys():
        name, type_ = "evaluations", EvalResult
    else:
        named = str(kind or document.get("benchmark") or document.get("what") or "unknown")
        return " ".join(named.split())[:40], None
    bits = _most_bits(document)
    if bits > 63:
        raise DataError(f"{where} contains a whole number of {bits} bits; those of a result have at most 63")
    try:
        return name, msgspec.convert(document, type_)
    except msgspec.ValidationError as error:
        raise DataError(f"{where} is not a result of this version: {plain(error)}") from None


def _most_bits(value: Any) -> int:
    """Of the whole numbers in any depth, without their signs: arrays and plots hold 63."""
    if isinstance(value, dict | list):
        return max(map(_most_bits, value.values() if isinstance(value, dict) else value), default=0)
    return value.bit_length() if isinstance(value, int) else 0


def latest(measurements: Sequence[Measurement]) -> tuple[Measurement, ...]:
    """Keep the last of equal settings of one artifact on equal machines, in the order of the first.

    What would be called the same and is not gets a label: the artifact's folder, and its hash where that is the same.
    """
    newest: dict[tuple[Any, ...], Measurement] = {}
    for m in measurements:
        key = (_identity(m), m.model, m.image_size, m.task, m.runtime, m.type, m.precision, m.batch, m.scenario,
               m.scope, m.device, m.threads, m.streams, machine_words(m.machine))  # fmt: skip
        newest[key] = m
    return _labelled(tuple(newest.values()))


def _identity(m: Measurement) -> str:
    """The artifact's hash. One with random weights is its folder: `bench` builds the same one anew there."""
    if m.artifact_sha256 is None or m.random_weights:
        return f"{m.subject} {m.artifact or ''}"
    return m.artifact_sha256


def _labelled(measurements: Sequence[Measurement]) -> tuple[Measurement, ...]:
    alike: dict[tuple[Any, ...], dict[str, str]] = {}
    for m in measurements:
        folder = Path(m.artifact or "").name
        alike.setdefault((m.model, m.image_size, m.task, m.runtime, m.type), {})[_identity(m)] = folder

    def label(m: Measurement) -> str:
        names = alike[m.model, m.image_size, m.task, m.runtime, m.type]
        folder = names[_identity(m)]
        if len(names) == 1:
            return ""
        alone = folder and list(names.values()).count(folder) == 1
        return folder if alone else f"{folder} {(m.artifact_sha256 or '')[:8]}".strip()

    return tuple(msgspec.structs.replace(m, label=label(m)) for m in measurements)


def rated(results: Results) -> tuple[Measurement, ...]:
    """The latest measurements, with TFLOP/s and percent of the bound where a record has none of its own.

    FLOPs follow from the architecture, so only for ConvNeXt; the bound from ceilings that were measured on the same
    machine and stand in the same files.
    """
    ceilings = {machine_words(r.machine): r.ceilings for r in results.rooflines if r.machine is not None}
    return tuple(_rated(m, ceilings.get(machine_words(m.machine))) for m in latest(results.measurements))


def _rated(m: Measurement, ceilings: Ceilings | None) -> Measurement:
    name = m.model.partition(".")[0]
    if m.tflops is not None or m.images_per_s is None or not m.valid or name not in registry.VARIANTS:
        return m
    if m.task not in get_args(Task):
        return m
    spec = registry.spec(name, image_size=m.image_size, task=m.task)
    # A GPU's ceilings do not tell which machine's CPU they are beside; 8 bits run in two types.
    known = ceilings if m.device == "cpu" and m.type == m.precision else None
    tflops, percent = roofline.rate(spec, m.precision, m.batch, m.images_per_s, known)
    return msgspec.structs.replace(m, tflops=tflops, percent_of_bound=percent)


def accuracy_of(m: Measurement, evaluations: Sequence[EvalResult]) -> tuple[EvalResult, ...]:
    """The evaluations of this very artifact, the last of each set of images."""
    own = {e.data_sha256: e for e in evaluations if m.artifact_sha256 == e.artifact_sha256}
    return tuple(own.values())


def share_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` images, exact (Clopper and Pearson)."""
    return binomial.share_bounds(round(share * count), count, 0.025)


def type_of(profile: ProfileResult) -> str:
    return profile.eight_bits or profile.precision


def machine_words(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine.get('cpu') or 'unknown CPU'}, {machine.get('cores', '?')} "
        f"core{'' if machine.get('cores') == 1 else 's'}"
    )


def by_kind(profile: ProfileResult) -> dict[str, float]:
    """Milliseconds of each kind of layer that occurs, in the order of `KINDS`."""
    sums = {kind: sum(layer.ms for layer in profile.layers if layer.kind == kind) for kind in KINDS}
    return {kind: ms for kind, ms in sums.items() if ms}
