"""The race of `optimize`: candidates are built, timed, compared and dropped, until one is chosen."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .. import formats
from ..accuracy import finalists, gate
from ..accuracy.evaluation import evaluate, read_result
from ..accuracy.prediction_files import SUFFIX, read_predictions
from ..artifact import manifest
from ..artifact.manifest import Artifact, encode, write_file
from ..data import sources
from ..errors import ArtifactError, CheckFailed, UsageError, counted
from ..formats.base import Format
from ..models.checkpoint import Loaded
from ..quantization import plan as plans
from ..quantization.plan import LoadedPlan
from ..records.accuracy import Limits, Verdict
from ..records.optimize import Candidate
from ..records.timing import BenchResult
from ..timing import compare
from ..timing.measure import quantile
from . import bench
from .agenda import Agenda
from .candidates import Goal, candidate, floats, hopeless, rest_of
from .drafts import Drafts, folded, read_kept
from .workshop import Job, Workshop

HELD_OUT = 64  # of the selection images, that corrections are judged on
FIRST_S, LAST_S = 1.2, 3.0  # of timing, a candidate: to sort, and to decide
FINALISTS = 3
SHARES = (0.5, 0.25, 0.125)  # of the damage that smaller plans may do
NEAR = 1.3  # times the fastest: runtimes for which other plans are tried


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a race ends with."""

    baseline: str
    baseline_top1: float | None  # on the final images; None where nothing had to be judged there
    order: tuple[str, ...]  # of the finalists
    chosen: str | None
    why: str
    timings: tuple[BenchResult, ...]


@dataclass
class Race:
    """One call: the rows of its table, and what each step needs. `rows` is replaced row by row, never in place."""

    workshop: Workshop
    loaded: Loaded
    goal: Goal
    calibration: sources.ImageSource
    selection: sources.ImageSource
    final: sources.ImageSource
    say: Callable[[str], None]
    agenda: Agenda
    rows: dict[str, Candidate]
    _drafting: Drafts | None = None
    least: dict[str, float] = field(
        default_factory=dict
    )  # ms of a batch, the fastest sample: others' work slows it least

    def run(self, taken: Sequence[Format]) -> Outcome:
        """Everything up to the choice.

        Raises:
            CheckFailed: not even fp32 could be built.
        """
        device = self.goal.device
        for fmt in taken:
            for exact_or_half in floats(fmt, device):
                self._set(exact_or_half)
            if fmt.eight_bits is not None and (device == "cuda" or not fmt.kernels):
                rest = rest_of(fmt, device, self.workshop.machine)
                self._set(candidate(fmt, rest, "int8", kernels=fmt.kernels))
        self.agenda.expect(build=len(self.rows), time=2 * len(self.rows), draft=1, evaluate=len(self.selection))

        exact = [name for name, row in self.rows.items() if row.exact]
        self._build(exact)
        exact = [name for name in exact if self.rows[name].state == "built"]
        if not exact:
            why = "; ".join(f"{row.name}: {row.reason}" for row in self.rows.values() if row.reason)
            raise CheckFailed(f"not even fp32 can be built here: {why}")
        self._time("first", exact, FIRST_S)
        preferred = [name for name in self.rows if device in formats.get(self.rows[name].runtime).benched]
        for number, group in enumerate((preferred, [name for name in self.rows if name not in preferred])):
            fresh = self._build_shorter(group)
            if fresh:
                self._time(f"second-{number}", [self._fastest_exact(), *fresh], FIRST_S)

        baseline = self._fastest_exact()
        self._drop_slow(baseline)
        self._compare(baseline, [name for name in self._left() if not self.rows[name].exact])
        self._try_plans(baseline)
        near = [name for name in self._left(exact=True) if self.least[name] <= NEAR * self._ms(baseline)]
        lossy = [name for name in self._left() if not self.rows[name].exact]
        timings = self._time("last", list(dict.fromkeys([baseline, *lossy, *near])), LAST_S)
        order, winner, why = self._decide(baseline)
        for name in self._left():
            if name != winner:
                self._set(self.rows[name], state="slower", reason=f"exact, and slower than {winner or baseline}")
        if winner is not None:
            self._set(self.rows[winner], state="chosen", reason=None)
        before = self._side(baseline, "final").result.top1 if order else None
        return Outcome(baseline, before, order, winner, why, timings)

    # Rows

    def _set(self, row: Candidate, **changes: Any) -> None:
        row = msgspec.structs.replace(row, **changes)
        before = self.rows.get(row.name)
        self.rows[row.name] = row
        self.agenda.rows = tuple(self.rows.values())
        if row.reason and (before is None or before.reason != row.reason):
            self.say(f"{row.name}: {row.state}, {row.reason}")
        self.agenda.tell()

    def _left(self, exact: bool | None = None) -> list[str]:
        """What was timed and is still in the race."""
        return [
            name for name, row in self.rows.items() if row.state == "timed" and (exact is None or row.exact == exact)
        ]

    def _fastest_exact(self) -> str:
        return min(self._left(exact=True), key=self._ms)

    def _ms(self, name: str) -> float:
        ms = self.rows[name].ms
        return math.inf if ms is None else ms

    # Building

    def _build(self, names: Sequence[str], plans_of: Mapping[str, LoadedPlan] | None = None) -> None:
        """Each becomes "built" or "rejected"; what an earlier call has built is taken, and refused again."""
        rejected = self.workshop.folder / "rejected.json"
        refused = read_kept(rejected, dict[str, str])
        jobs: list[Job] = []
        written: dict[str, LoadedPlan] = {}

        def put(row: Candidate, outcome: Artifact | str) -> None:
            if isinstance(outcome, str):
                self._set(row, state="rejected", reason=outcome)
                return
            plan = written.get(row.name)
            parity = next((p.relative_error for p in outcome.manifest.parity if p.reference == "source"), None)
            self._set(
                row, state="built", artifact_sha256=outcome.sha256, bytes=outcome.bytes, parity=parity,
                operations=plans.quantized(plan.plan) if plan else (),
            )  # fmt: skip

        for name in names:
            row, plan, path = self.rows[name], (plans_of or {}).get(name), None
            if name in refused:
                put(row, refused[name])
                continue
            if plan is not None:
                path = self.workshop.folder / f"{name}.plan.json"
                plan = written[name] = LoadedPlan(plans.write(path, plan.plan, plan.tensors), plan.tensors)
            try:
                kept = self.workshop.kept(row, plan.sha256 if plan else None)
            except ArtifactError:  # a file of it was changed: it is built again
                kept = None
            if kept is None:
                jobs.append((row, path))
            else:
                put(row, kept)
        self.agenda.expect(build=len(jobs) - len(names))
        for row, outcome in self.workshop.builds(jobs, lambda doing, units: self.agenda.begin("build", doing, units)):
            self.agenda.end("build")
            if isinstance(outcome, str):
                refused[row.name] = outcome
                write_file(rejected, encode(refused))
            put(row, outcome)

    def _build_shorter(self, group: Sequence[str]) -> list[str]:
        """Half precision and 8 bits of some runtimes, but for those that cannot become the fastest; what was built."""
        shorter, drafted = [], {}
        for name in group:
            row = self.rows[name]
            if row.state != "waiting":
                continue
            fp32 = next((r for r in self.rows.values() if r.runtime == row.runtime and r.exact), None)
            why = None
            if fp32 is not None and fp32.ms is not None:
                best = min(row.ms for row in self.rows.values() if row.ms is not None)
                why = hopeless(row.type, self.goal.device, self.workshop.machine, self.least[fp32.name], best)
            if why is not None:
                self._set(row, state="left out", reason=why)
                self.agenda.expect(build=-1, time=-2)
                continue
            shorter.append(name)
        for name in [name for name in shorter if self.rows[name].eight_bits]:
            row = self.rows[name]
            fmt = formats.get(row.runtime)
            self.agenda.begin("draft", f"choosing scales for {fmt.name}")
            drafted[name] = self._drafts().whole(fmt.name, row.precision)
            self.agenda.end("draft")
        self._build(shorter, drafted)
        return [name for name in shorter if self.rows[name].state == "built"]

    def _drafts(self) -> Drafts:
        if self._drafting is None:
            held_out = folded(self.loaded, sources.subset(self.selection, HELD_OUT), self.goal.input)
            self._drafting = Drafts(
                folder=self.workshop.folder,
                loaded=self.loaded,
                calibration=self.calibration,
                held_out=held_out,
                input=self.goal.input,
                saturates=self.workshop.machine.saturates,
                runner=self.workshop.calibrates(),
                say=self.agenda.says,
                progress=self.agenda.phase,
            )
        return self._drafting

    # Timing

    def _time(self, kept: str, names: Sequence[str], seconds: float) -> tuple[BenchResult, ...]:
        """All of them interleaved; each row gets its time and its interval."""
        path = self.workshop.folder / f"timing-{kept}.jsonl"
        hashes = {self.rows[name].artifact_sha256 for name in names}
        rows: tuple[BenchResult, ...] = compare.read_results(path) if path.is_file() else ()
        if {row.artifact_sha256 for row in rows} != hashes:
            rows = tuple(self._bench(names, seconds))
            write_file(path, compare.encode_results(rows))
        for name in names:
            own = [row for row in rows if row.artifact_sha256 == self.rows[name].artifact_sha256]
            best = min(own, key=_batch_ms, default=None)
            if best is None or best.status == "failed":
                reason = "it was not measured" if best is None else best.reason
                self._set(self.rows[name], state="rejected", reason=reason)
                continue
            median = quantile(best.samples_ms, 0.5)
            self.least[name] = min(_batch_ms(best), *best.samples_ms)
            single = self.goal.objective == "latency" and median.low_ms is not None and median.high_ms is not None
            self._set(
                self.rows[name], state="timed", ms=_batch_ms(best), timing=best.reason or best.status,
                interval_ms=(median.low_ms, median.high_ms) if single else None,
            )  # fmt: skip
        return rows

    def _bench(self, names: Sequence[str], seconds: float) -> Iterator[BenchResult]:
        goal = self.goal
        throughput = goal.objective == "throughput"
        cores = self.workshop.machine.cores
        streams = tuple(dict.fromkeys((1, cores))) if throughput and goal.device == "cpu" else (1,)
        plan = bench.Plan(
            scenario="offline" if throughput else "single-stream",
            batches=(goal.batch,),
            streams=streams,
            seconds=seconds,
            device=goal.device,
            threads=goal.threads,
            warmup_limit_s=4.0,
        )
        self.agenda.begin("time", f"timing {counted(len(names), 'candidate')}", units=len(names))
        yield from self.workshop.timings([self.rows[name] for name in names], plan, self.agenda.steps)
        self.agenda.end("time", units=len(names))

    def _drop_slow(self, baseline: str) -> None:
        """What is no faster than the fastest fp32 has something to lose, and nothing to give."""
        for name in self._left():
            row = self.rows[name]
            if name != baseline and self.least[name] >= self._ms(baseline) and not row.exact:
                self._set(row, state="slower", reason=f"no faster than {baseline}, which is exact")

    # Accuracy

    def _compare(self, baseline: str, names: Sequence[str]) -> None:
        """Agreement on the selection images; what cannot pass on as many final ones is dropped."""
        if not names:
            return
        limits = Limits(max_drop=self.goal.max_drop, alpha=self.goal.alpha)
        before = self._side(baseline, "selection")
        for name in sorted(names, key=self._ms):
            verdict = gate.judge(before, self._side(name, "selection"), limits)
            changes: dict[str, Any] = {"agreement": verdict.agreement, "lost": verdict.lost, "gained": verdict.gained}
            if self._prospect(verdict) == "none":
                changes |= {
                    "state": "dropped",
                    "reason": f"{verdict.lost} lost and {verdict.gained} gained of {verdict.images} selection images: "
                    f"it cannot be shown on {len(self.final)} final ones that it keeps {self.goal.max_drop:g} points",
                }
            self._set(self.rows[name], **changes)

    def _prospect(self, of: Verdict | Candidate) -> finalists.Prospect:
        assert of.lost is not None
        assert of.gained is not None
        images, final = len(self.selection), len(self.final)
        return finalists.prospect(of.lost, of.gained, images, final, self.goal.max_drop / 100, self.goal.alpha)

    def _try_plans(self, baseline: str) -> None:
        """For runtimes that are fast in 8 bits: the linears alone, and with less where the whole has little chance."""
        eight = [row for row in self.rows.values() if row.eight_bits and row.ms is not None and not row.kernels]
        fast = sorted(
            (row for row in eight if self.least[row.name] < self._ms(baseline)), key=lambda r: self.least[r.name]
        )
        for row in fast:
            if self.least[row.name] > NEAR * self._ms(fast[0].name):
                break
            whole = self._drafts().whole(row.runtime, row.precision)
            tried = self._try_plan(baseline, row, self._drafts().linears(whole), "linears")
            for share in SHARES:
                if any(
                    row_there.state == "timed" and self._prospect(row_there) == "fair"
                    for row_there in (self.rows[row.name], *tried)
                ):
                    break
                smaller = self._drafts().smaller(whole, share)
                tried += self._try_plan(baseline, row, smaller, str(len(plans.quantized(smaller.plan))))

    def _try_plan(self, baseline: str, like: Candidate, plan: LoadedPlan, suffix: str) -> list[Candidate]:
        """One more plan for a runtime, built and compared; its time comes with the others'."""
        row = candidate(formats.get(like.runtime), like.precision, like.eight_bits, suffix=suffix)
        count = len(plans.quantized(plan.plan))
        if row.name in self.rows or not 0 < count < len(like.operations):
            return []
        self._set(row)
        self._build([row.name], {row.name: plan})
        if self.rows[row.name].state == "built":
            self._set(self.rows[row.name], state="timed")
            self._compare(baseline, [row.name])
        return [self.rows[row.name]]

    def _side(self, name: str, kind: str) -> gate.Side:
        """A candidate's predictions on a set of images, kept."""
        artifact = manifest.read(self.workshop.path(self.rows[name]))
        images = self.selection if kind == "selection" else self.final
        out = self.workshop.folder / f"{name}-{kind}"
        path = out.with_name(f"{out.name}.json")
        # With --force, after a run that ended: what it evaluated was another file, even if it computes the same.
        kept = read_result(path) if path.is_file() else None
        if kept is None or kept.artifact_sha256 != artifact.sha256:
            self.agenda.begin("evaluate", f"{name} on {len(images)} {kind} images", units=len(images))
            session = self.workshop.opened(artifact)
            batch = min(artifact.manifest.export.batch.max, 16)
            evaluate(session, images, artifact=artifact, batch=batch, out=out, force=True, progress=self.agenda.count)
            self.agenda.end("evaluate", units=len(images))
        result = read_result(path)
        if (result.artifact_sha256, result.data_sha256) != (artifact.sha256, images.sha256):
            raise UsageError(f"{path} is of another artifact or other images; remove {self.workshop.folder}")
        return gate.Side(result=result, predictions=read_predictions(out.with_name(f"{out.name}{SUFFIX}")))

    # The end

    def _decide(self, baseline: str) -> tuple[tuple[str, ...], str | None, str]:
        """(finalists in their order, the one that is chosen, why)."""
        goal, exact = self.goal, self._fastest_exact()
        for name in self._left():
            if not self.rows[name].exact and self._ms(name) >= (1 - finalists.SAME_TIME) * self._ms(exact):
                self._set(self.rows[name], state="slower", reason=f"no faster than {exact}, which is exact")
        lossy = [name for name in self._left() if not self.rows[name].exact]
        agreements = {name: self.rows[name].agreement or 0.0 for name in lossy}
        order = finalists.front({name: self._ms(name) for name in lossy}, agreements, FINALISTS)
        limit = goal.max_latency_ms
        if limit is not None:
            if self._ms(exact) <= limit:
                return (
                    (),
                    exact,
                    f"{exact} is exact and takes {self._ms(exact):.2f} ms of the {limit:g} that are allowed",
                )
            order = tuple(name for name in order if self._ms(name) <= limit)
            if not order:
                least = min(self._left(), key=self._ms)
                return (), None, f"nothing keeps {limit:g} ms: the fastest left is {least} at {self._ms(least):.2f} ms"
        self.agenda.expect(evaluate=len(self.final) * (len(order) + 1) if order else 0)
        before = self._side(baseline, "final") if order else None
        limits = Limits(max_drop=goal.max_drop, alpha=goal.alpha)

        def passes(name: str) -> bool:
            assert before is not None
            verdict = gate.judge(before, self._side(name, "final"), limits)
            passed = verdict.decision == "PASS"
            needed = f"; about {verdict.images_needed:,} would decide" if verdict.images_needed else ""
            reason = (
                None if passed else f"the gate says {verdict.decision} on {counted(verdict.images, 'image')}{needed}"
            )
            self._set(self.rows[name], state="passed" if passed else "not proven", reason=reason, verdict=verdict)
            return passed

        # With a limit of latency the safest that keeps it is the answer, and nothing faster is asked for.
        passed = finalists.walk(order[:1] if limit is not None else order, passes)
        for name in self._left():
            if not self.rows[name].exact:
                why = "one that agrees more did not pass" if name in order else "another agrees as much and is faster"
                self._set(self.rows[name], state="not tried", reason=why)
        if passed:
            drop = self.rows[passed[-1]].verdict
            assert drop is not None
            bound = drop.checks[0].upper
            tried = f" over all {len(order)} that could be tried" if len(order) > 1 else ""
            return order, passed[-1], (
                f"the fastest that is proven to lose at most {goal.max_drop:g} points of top-1 (upper bound "
                f"{100 * (bound or 0):.2f}, alpha {goal.alpha:g}{tried})"
            )  # fmt: skip
        if limit is not None:
            return (
                order,
                None,
                f"{order[0]} keeps {limit:g} ms, and its accuracy is not proven: {self._reason(order[0])}",
            )
        none = f"{order[0]}: {self._reason(order[0])}" if order else "nothing shorter is faster and likely to keep it"
        return order, exact, f"the fastest in fp32, which is exact; {none}"

    def _reason(self, name: str) -> str:
        return self.rows[name].reason or self.rows[name].state


def _batch_ms(row: BenchResult) -> float:
    """Milliseconds of a batch: the median, or what it takes on average with several streams."""
    if row.images_per_s is None or row.status == "failed":
        return math.inf
    return 1e3 * row.batch / row.images_per_s
