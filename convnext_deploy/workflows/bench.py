"""Contenders in processes of their own, turn by turn, and a `BenchResult` for each of them and each setting."""

import contextlib
import datetime
import math
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from .. import argument_names, arguments, env
from ..arguments import Progress
from ..errors import UsageError, WorkerError, counted
from ..records.base import Device
from ..records.timing import BenchResult, Ceilings, Conditions, Scenario, Scope, ServerLoad, ServerTrial, Status
from ..reports import tables
from ..timing import roofline, scenarios
from ..timing.measure import DRIFT, REST_S, TURN_S, WARMUP_LIMIT_S, drifts, quantile, samples_needed
from ..timing.worker import Closing, Opened, Ready, Turn, Worker
from .contenders import Contender

MIN_TURNS = 6  # the fewest that carry a 95 % interval of a ratio within one run (`regress`)
FRACTIONS = (0.5, 0.9, 0.95, 0.99, 0.999)
SERVICE_TURNS = 3  # of each batch size that a server may form
SERVER_SECONDS = 5.0  # of a run of arrivals, at least


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured of every contender."""

    scenario: Scenario = "single-stream"
    scope: Scope = "compute"
    batches: tuple[int, ...] = (1, 8)
    streams: tuple[int, ...] = (1,)
    seconds: float = 2.0  # of timing, a contender and setting, on average
    percentile: float | None = None  # fraction; go on until its samples are enough
    device: Device = "cpu"
    threads: int | None = None  # of each stream; None: the cores, shared out among the streams
    slo_ms: float | None = None  # scenario server
    seed: int = 0
    warmup_limit_s: float = WARMUP_LIMIT_S

    def checked(self) -> "Plan":
        """Itself, `batches` and `streams` as tuples where one number was given.

        Raises:
            UsageError: numbers that cannot be, or a server without a latency limit.
        """
        for name, value, words in (("scenario", self.scenario, Scenario), ("scope", self.scope, Scope)):
            arguments.one_of(f"--{name}", value, words)
        argument_names.check(device=self.device, threads=self.threads)
        batches, streams = arguments.batch_sizes("batch", self.batches), arguments.wholes("streams", self.streams)
        if not batches or not streams:
            raise UsageError("no batch or no streams; expected numbers of at least 1")
        arguments.whole("seed", self.seed, 0)
        for option, duration in (("--seconds", self.seconds), ("warmup_limit_s", self.warmup_limit_s)):
            arguments.number(option, duration, 0, math.inf, "seconds, more than 0")
        for option, limit in (("--percentile", self.percentile), ("--slo-ms", self.slo_ms)):
            if limit is not None:
                arguments.number(option, limit, -math.inf, math.inf, "a number")
        if self.percentile is not None and not 0 < self.percentile < 1:
            raise UsageError(f"--percentile {100 * self.percentile:.6g}; expected between 0 and 100")
        if (self.scenario == "server") != (self.slo_ms is not None):
            raise UsageError("the scenario server, and no other, takes a latency limit: --slo-ms MILLISECONDS")
        if self.slo_ms is not None and not self.slo_ms > 0:
            raise UsageError(f"--slo-ms {self.slo_ms}; expected milliseconds above 0")
        if self.scenario in ("single-stream", "server") and streams != (1,):
            raise UsageError(f"scenario {self.scenario} has one stream; --streams is for multi-stream and offline")
        return replace(self, batches=batches, streams=streams)


@dataclass(slots=True)
class _Entry:
    """A contender of this run: its process, and its measurements so far in the current setting."""

    contender: Contender
    worker: Worker
    ceilings: Ceilings | None
    opened: Opened | None = None
    ready: Ready | None = None
    turns: list[Turn] = field(default_factory=list)
    failure: str | None = None


def check_batches(contenders: Sequence[Contender], plan: Plan) -> None:
    """Refuse a batch that a contender does not take.

    Raises:
        UsageError: with the batches that it takes.
    """
    for contender in contenders:
        for batch in plan.batches:
            if not contender.batch.min <= batch <= contender.batch.max:
                raise UsageError(
                    f"batch {batch}; {contender.subject} takes {contender.batch.min} to {contender.batch.max}; give "
                    "others with --batch"
                )


def bench(
    contenders: Sequence[Contender],
    plan: Plan,
    *,
    ceilings: Ceilings | None = None,
    progress: Progress | None = None,
) -> Iterator[BenchResult]:
    """Measure every contender in every setting; a row is given as soon as it is finished.

    Contenders of one setting take turns in an order that rotates, each in a process of its own, and never two at a
    time. One that crashes has a row of status failed; the others go on. Ctrl-C ends the setting that is being
    measured, yields what was measured of it as rows of status partial, and is raised again.

    Args:
        ceilings: of this machine, for the rows' percent of the roofline's bound.

    Raises:
        UsageError: a plan that cannot be carried out.
    """
    plan = plan.checked()
    check_batches(contenders, plan)
    run = uuid.uuid4().hex[:12]
    meter = _Meter(plan, len(contenders), progress or (lambda done, total, what: None))
    for streams in plan.streams:
        threads = plan.threads or (max(1, env.usable_cores() // streams) if streams > 1 else None)
        with contextlib.ExitStack() as stack:
            entries = []
            for contender in contenders:
                meter.says(f"starting {contender.subject}")
                worker = Worker(contender.subject, contender.imports)
                stack.callback(worker.close)
                entries.append(_Entry(contender, worker, ceilings, failure=contender.broken))
            for entry in entries:
                meter.says(f"loading {entry.contender.subject}")
                arguments = {**entry.contender.arguments, "threads": threads}
                reply = _asked(entry, "open", opener=entry.contender.opener, arguments=arguments, streams=streams)
                entry.opened = msgspec.convert(reply, Opened) if entry.failure is None else None
            settings = [max(plan.batches)] if plan.scenario == "server" else plan.batches
            for batch in settings:
                measured = _server if plan.scenario == "server" else _group
                yield from measured(entries, plan, batch, streams, run, meter)


def _rated(row: BenchResult, entry: _Entry) -> BenchResult:
    """With TFLOP/s where it is a ConvNeXt's, and with percent of the bound where all of it runs in one type."""
    spec = entry.contender.spec
    if spec is None or row.images_per_s is None:
        return row
    known = None if entry.contender.eight_bits else entry.ceilings
    tflops, percent = roofline.rate(spec, row.precision, row.batch, row.images_per_s, known)
    return msgspec.structs.replace(row, tflops=tflops, percent_of_bound=percent)


def _asked(entry: _Entry, method: str, **arguments: Any) -> Any:
    """The worker's answer; None where it has failed, now or before."""
    if entry.failure is not None:
        return None
    try:
        return entry.worker.call(method, **arguments)
    except WorkerError as error:
        entry.failure = str(error)
        return None


def _group(
    entries: list[_Entry], plan: Plan, batch: int, streams: int, run: str, meter: "_Meter"
) -> Iterator[BenchResult]:
    """All contenders with one batch size and number of streams."""
    interrupted: KeyboardInterrupt | None = None
    try:
        for entry in entries:
            meter.says(f"warming up {entry.contender.subject}, batch {batch}")
            entry.turns, entry.ready = [], None
            reply = _asked(
                entry, "warm", batch=batch, scope=plan.scope, together=plan.scenario == "multi-stream",
                limit_s=plan.warmup_limit_s,
            )  # fmt: skip
            entry.ready = msgspec.convert(reply, Ready) if reply is not None else None
            meter.step()
        order = [entry for entry in entries if entry.ready]
        rounds = _rounds(order, plan)
        meter.expects(rounds)
        for number in range(rounds):
            for entry in order:
                meter.says(f"timing {entry.contender.subject}, batch {batch}")
                time.sleep(REST_S)
                settle = entry.ready is not None and entry.ready.step_ms < TURN_S * 1e3
                reply = _asked(entry, "turn", number=number, seconds=TURN_S, settle=settle)
                if reply is not None:
                    entry.turns.append(msgspec.convert(reply, Turn))
                meter.step()
            order.append(order.pop(0)) if order else None
    except KeyboardInterrupt as error:
        interrupted = error
    for entry in entries:
        if interrupted and entry.turns and entry.failure is None:
            with contextlib.suppress(WorkerError):
                entry.worker.wait()  # the answer that Ctrl-C left unread
        if interrupted and not entry.turns:
            continue
        reply = _asked(entry, "finish")
        closing = msgspec.convert(reply, Closing) if reply is not None else None
        yield _rated(_result(entry, plan, batch, streams, run, closing, interrupted=interrupted is not None), entry)
    if interrupted:
        raise interrupted


def _rounds(entries: Sequence[_Entry], plan: Plan) -> int:
    """Turns for each contender: `plan.seconds` on average, and enough samples for the percentile that was asked."""
    if not entries:
        return 0
    turn_s = [max(TURN_S, entry.ready.step_ms / 1e3) for entry in entries if entry.ready]
    rounds = max(MIN_TURNS, math.ceil(plan.seconds / float(np.mean(turn_s))))
    if plan.percentile is not None:
        fewest = min(max(1, int(TURN_S * 1e3 / entry.ready.step_ms)) for entry in entries if entry.ready)
        rounds = max(rounds, math.ceil(samples_needed(plan.percentile) / fewest))
    return rounds


def _server(
    entries: list[_Entry], plan: Plan, batch: int, streams: int, run: str, meter: "_Meter"
) -> Iterator[BenchResult]:
    """One after the other: service times of each batch size, then the highest rate of arrivals."""
    every = sorted({size for size in (2**power for power in range(12)) if size < batch} | {batch})
    for entry in entries:
        sizes = [size for size in every if entry.contender.batch.min <= size]
        service_s: dict[int, list[float]] = {}
        for size in sizes:
            meter.says(f"service time of {entry.contender.subject}, batch {size}")
            warm_up = _asked(entry, "warm", batch=size, scope="transfer", together=False, limit_s=plan.warmup_limit_s)
            entry.ready = msgspec.convert(warm_up, Ready) if warm_up is not None else entry.ready
            turns = [
                _asked(entry, "turn", number=number, seconds=TURN_S, settle=True) for number in range(SERVICE_TURNS)
            ]
            service_s[size] = [ms / 1e3 for turn in turns if turn is not None for ms in turn["samples_ms"]]
        load, interrupted = _served(entry, plan, service_s, meter)
        if interrupted:
            entry.worker.kill()  # a run of arrivals may take minutes to its end
        closing = None if interrupted else _asked(entry, "finish")
        closed = msgspec.convert(closing, Closing) if closing is not None else None
        row = _result(entry, plan, batch, streams, run, closed, interrupted=interrupted is not None)
        if row.status == "partial":
            row = msgspec.structs.replace(
                row, reason=f"interrupted after {counted(len(load.trials), 'run')} of arrivals"
            )
        tried = load if load.trials or entry.failure is None else None
        yield _rated(msgspec.structs.replace(row, server=tried, images_per_s=load.queries_per_s), entry)
        meter.step()
        if interrupted:
            raise interrupted


def _served(
    entry: _Entry, plan: Plan, service_s: dict[int, list[float]], meter: "_Meter"
) -> tuple[ServerLoad, KeyboardInterrupt | None]:
    """The highest rate that a server carries, as far as it was found, and what ended the search before its end."""
    assert plan.slo_ms is not None
    fraction, sizes = plan.percentile or 0.99, list(service_s)
    trials: list[ServerTrial] = []
    interrupted: KeyboardInterrupt | None = None

    def attempt(rate: float, queries: int, seed: int) -> ServerTrial:
        so_far = scenarios.highest(trials)
        known = f", {tables.rate(so_far)} carried" if so_far else ""
        meter.says(
            f"{tables.rate(rate)} arrivals a second at {entry.contender.subject} for {queries / rate:.0f} s{known}"
        )
        answer = entry.worker.call(
            "arrivals", queries_per_s=rate, queries=queries, seed=seed, sizes=sizes, slo_ms=plan.slo_ms,
            fraction=fraction,
        )  # fmt: skip
        return msgspec.convert(answer, ServerTrial)

    seconds = max(plan.seconds, SERVER_SECONDS)
    expected = scenarios.runs_left(())
    try:
        if entry.failure is None:
            searched = scenarios.trials(
                attempt, service_s, slo_ms=plan.slo_ms, fraction=fraction, seed=plan.seed, seconds=seconds
            )
            for trial in searched:
                trials.append(trial)
                meter.step()
                expected = meter.revised(expected, len(trials) + scenarios.runs_left(trials))
    except WorkerError as error:
        entry.failure = str(error)
    except KeyboardInterrupt as error:
        interrupted = error
    meter.revised(expected, len(trials))
    load = ServerLoad(
        slo_ms=plan.slo_ms,
        fraction=fraction,
        max_batch=max(sizes),
        seed=plan.seed,
        queries_per_s=scenarios.highest(trials),
        trials=tuple(trials),
    )
    return load, interrupted


def _result(
    entry: _Entry, plan: Plan, batch: int, streams: int, run: str, closing: Closing | None, *, interrupted: bool
) -> BenchResult:
    contender, ready, turns = entry.contender, entry.ready, entry.turns
    samples = tuple(ms for turn in turns for ms in turn.samples_ms)
    rates = tuple(turn.images_per_s for turn in turns)
    conditions = msgspec.convert(closing.conditions, Conditions) if closing else None
    status, reason = _status(entry, conditions, plan, interrupted)
    side_by_side = plan.scenario in ("offline", "multi-stream")
    median = float(np.median(samples)) if samples else None
    images = float(np.mean(rates)) * conditions.wall_s if conditions and rates else 0.0
    per_s = None if median is None else float(np.median(rates)) if side_by_side else batch / median * 1e3
    return BenchResult(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        run=run,
        subject=contender.subject,
        model=contender.model,
        runtime=contender.runtime,
        precision=contender.precision,
        eight_bits=contender.eight_bits,
        task=contender.task,
        image_size=contender.image_size,
        device=plan.device,
        threads=entry.opened.threads if entry.opened else env.usable_cores(),
        streams=streams,
        batch=batch,
        scenario=plan.scenario,
        scope="transfer" if plan.scenario == "server" else plan.scope,
        artifact=contender.artifact,
        artifact_sha256=contender.artifact_sha256,
        artifact_bytes=contender.artifact_bytes,
        random_weights=contender.random_weights,
        parity=contender.parity,
        status=status,
        reason=reason,
        samples_ms=samples,
        turns=tuple(len(turn.samples_ms) for turn in turns),
        turn_images_per_s=rates,
        yardstick_ms=tuple(turn.yardstick_ms for turn in turns),
        device_ms=closing.device_ms if closing else None,
        median_ms=median,
        images_per_s=per_s,
        quantiles=tuple(quantile(samples, fraction) for fraction in FRACTIONS) if samples else (),
        warmup_s=ready.warmup_s if ready else None,
        steady=ready.steady if ready else None,
        load_s=entry.opened.load_s if entry.opened and contender.artifact else None,
        first_inference_ms=ready.first_ms if ready else None,
        peak_memory_bytes=closing.peak_memory_bytes if closing else None,
        device_memory_bytes=closing.device_memory_bytes if closing else None,
        energy_j_per_image=conditions.energy_j / images
        if conditions and conditions.energy_j is not None and images
        else None,
        conditions=conditions,
        machine=_machine(conditions),
        versions=env.versions(),
    )


def _status(entry: _Entry, conditions: Conditions | None, plan: Plan, interrupted: bool) -> tuple[Status, str | None]:
    """The worst first: a row has one status, and all the reasons that belong to it."""
    if entry.failure is not None:
        return "failed", entry.failure
    if interrupted:
        return "partial", f"interrupted after {counted(len(entry.turns), 'turn')}"
    if conditions is not None and conditions.problems:
        return "invalid", "; ".join(conditions.problems)
    if entry.ready is not None and not entry.ready.steady:
        return "not steady", f"its medians did not agree within {plan.warmup_limit_s:.0f} s of warm-up"
    medians = [float(np.median(turn.samples_ms)) for turn in entry.turns]
    if drifts(medians):
        return (
            "not steady",
            f"the turns' medians drifted by more than {DRIFT:.0%}: {medians[0]:.3g} to {medians[-1]:.3g} ms",
        )
    return "valid", None


def _machine(conditions: Conditions | None) -> dict[str, str | int]:
    card = None if conditions is None else conditions.gpu
    gpu = {} if card is None else {"gpu": card.name, "driver": card.driver}
    return {**env.machine(), **gpu}


class _Meter:
    """Counts steps, a warm-up or a turn each; how many there are becomes exact as settings are warmed up.

    Of the scenario `server` a step is a run of arrivals; how many the search makes becomes exact as it closes in.
    """

    def __init__(self, plan: Plan, contenders: int, progress: Progress) -> None:
        self._progress, self._contenders = progress, contenders
        self._groups = len(plan.streams) * (1 if plan.scenario == "server" else len(plan.batches))
        timed = max(MIN_TURNS, math.ceil(plan.seconds / TURN_S))
        self._rounds = scenarios.runs_left(()) if plan.scenario == "server" else timed
        self._done = self._surplus = 0
        self._what = ""

    def says(self, what: str) -> None:
        self._what = what
        self._tell()

    def expects(self, rounds: int) -> None:
        self._surplus += (rounds - self._rounds) * self._contenders

    def revised(self, runs: int, now: int) -> int:
        """`now` runs of one contender, where `runs` were expected."""
        self._surplus += now - runs
        self._tell()
        return now

    def step(self) -> None:
        self._done += 1
        self._tell()

    def _tell(self) -> None:
        total = self._groups * self._contenders * (1 + self._rounds) + self._surplus
        self._progress(self._done, max(total, self._done), self._what)
