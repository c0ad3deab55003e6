"""Timing: when a session has warmed up, what one sample is, and what the samples can carry.

A *sample* is one step, from the call to the finished output, by `perf_counter_ns`. Samples are taken in *turns*, a
fifth of a second each, and competitors take turns, so that a change of the machine meets all of them.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..artifact.batches import Images
from ..artifact.session import Session
from ..env import usable_cores
from ..records.timing import Quantile, Timing
from .conditions import Watch

TURN_S = 0.2  # one session's turn before the next one's
WINDOW_S = 0.1  # of warm-up, between two looks at the median
WINDOWS = 5  # the last ones, which must not change any more
AGREEMENT = 0.05  # between the first two and the last two of them, relative to their middle
TREND_P = 0.05  # below: the medians rise or fall
DRIFT = 0.05  # over all turns, beyond which a trend makes a result not steady
DRIFT_P = 0.01  # of that trend: one row in a hundred would fail by chance, if the change were large enough too
WARMUP_LIMIT_S = 20.0
CONFIDENCE = 0.95
# Before a turn: threads of the competitor before may spin on, ONNX Runtime's for 40 ms and PyTorch's for 8 ms (measured
# as CPU time after the last step, onnxruntime 1.32 and torch 2.15, 2 cores).
REST_S = 0.06


@dataclass(frozen=True, slots=True)
class Work:
    """What is timed. `begin` gets ready for a turn and is not timed; `step` is one sample, finished when it returns.

    Both take a running number, by which they rotate among several input batches.
    """

    begin: Callable[[int], None]
    step: Callable[[int], None]


def compute_only(session: Session, batches: Sequence[Images]) -> Work:
    """`step` and `sync` on a bound batch; the batch changes from turn to turn."""

    def step(_: int) -> None:
        session.step()
        session.sync()

    return Work(lambda index: session.bind(batches[index % len(batches)]), step)


@dataclass(frozen=True, slots=True)
class WarmUp:
    seconds: float
    steady: bool
    step_ms: float  # the median of the last window


def warm_up(work: Work, limit_s: float = WARMUP_LIMIT_S) -> WarmUp:
    """Step until steady: of the medians of the last five windows the first two and the last two agree within 5 %, and
    they show no trend.

    A window lasts a tenth of a second, or one step where that is longer. Trend: Mann-Kendall's test at 0.05, which
    for five medians means that each is above the one before, or each below. How far they scatter is not asked: that
    does not end with warming up, and the interval of what is measured afterwards shows it.
    """
    work.begin(0)
    start = time.perf_counter()
    medians: list[float] = []
    while True:
        medians.append(float(np.median(_samples(work, WINDOW_S, 0))))
        last = medians[-WINDOWS:]
        change = abs(np.mean(last[-2:]) - np.mean(last[:2])) / np.median(last)
        steady = len(last) == WINDOWS and change <= AGREEMENT and trend(last) >= TREND_P
        elapsed = time.perf_counter() - start
        if steady or elapsed >= limit_s:
            return WarmUp(elapsed, bool(steady), last[-1])


def yardstick() -> float:
    """Milliseconds of a fixed piece of work that no runtime shares: how fast the machine itself is at this moment.

    Two thirds of the time a matrix product on each core, a third reading memory. A virtual machine whose host is busy,
    or whose clocks are lower, shows here, where no counter inside of it tells. Seen: ONNX Runtime from 52 to 60 ms,
    products on all cores from 1.57 to 1.84, while arithmetic on one thread and reading memory took what they had.

    To be called in a process whose BLAS has one thread (`timing.worker.Worker` sees to it): others would spin on.
    """
    small = np.linspace(0.1, 1.0, 512 * 512, dtype=np.float32).reshape(512, 512)
    large = np.ones(1 << 23, dtype=np.float32)  # 32 MB
    cores = usable_cores()
    times = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(4):  # the first starts the threads
            start = time.perf_counter_ns()
            list(pool.map(np.matmul, [small] * cores, [small] * cores))
            large.sum()
            times.append((time.perf_counter_ns() - start) / 1e6)
    return float(np.median(times[1:]))


def turn(
    work: Work, number: int, seconds: float = TURN_S, *, settle: bool = True, watch: Watch | None = None
) -> list[float]:
    """Milliseconds of each sample of one turn, at least one.

    Args:
        number: of the turn; the input batch rotates with it.
        settle: first take one step that is not timed, for what the change of turns costs: caches that others filled,
            threads that fell asleep. Steps longer than a turn overwrite the caches themselves.
        watch: runs while samples are taken.
    """
    work.begin(number)
    if settle:
        work.step(number)
    with watch or nullcontext():
        return _samples(work, seconds, number)


def _samples(work: Work, seconds: float, number: int) -> list[float]:
    samples: list[float] = []
    clock = time.perf_counter_ns
    end = clock() + round(seconds * 1e9)
    stop = 0
    while stop < end:
        number += 1
        start = clock()
        work.step(number)
        stop = clock()
        samples.append((stop - start) / 1e6)
    return samples


def turn_of_streams(
    works: Sequence[Work], number: int, seconds: float = TURN_S, *, together: bool, watch: Watch | None = None
) -> tuple[list[float], float]:
    """One turn of several sessions side by side, a thread each.

    Args:
        together: MLPerf's multi-stream: a query is one step of every stream, and the next one starts when all have
            finished. False: offline, each stream goes on by itself.

    Returns:
        Milliseconds of each query (together) or of each stream's step, and the steps that were finished by second.
    """
    gate = threading.Barrier(len(works))
    starts: list[float] = []
    times: list[list[float]] = [[] for _ in works]
    ends = [0.0] * len(works)
    failures: list[BaseException] = []
    clock = time.perf_counter

    def run(index: int) -> None:
        try:
            works[index].begin(number + index)  # here: a bound batch is its thread's
            works[index].step(number + index)
            gate.wait()
            begin = clock()
            starts.append(begin)
            go_on = True
            while go_on:
                start = clock()
                works[index].step(number + index)
                if together:
                    gate.wait()
                times[index].append((clock() - start) * 1e3)
                go_on = clock() < begin + seconds
                if together:  # all streams have to come to the same answer
                    go_on = _agreed(gate, votes, index, go_on)
            ends[index] = clock()
        except BaseException as error:
            failures.append(error)
            gate.abort()

    votes = [True] * len(works)
    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    with watch or nullcontext():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    real = [error for error in failures if not isinstance(error, threading.BrokenBarrierError)]
    if failures:
        raise (real or failures)[0]
    steps = sum(map(len, times))
    samples = times[0] if together else [sample for samples in times for sample in samples]
    return samples, steps / (max(ends) - min(starts))


def _agreed(gate: threading.Barrier, votes: list[bool], index: int, vote: bool) -> bool:
    votes[index] = vote
    gate.wait()
    outcome = all(votes)
    gate.wait()  # nobody votes again before everybody has read
    return outcome


def interleaved(sessions: Mapping[str, Session], images: Mapping[str, Images], seconds: float) -> tuple[Timing, ...]:
    """Latency of several sessions of this process, compute only, turn by turn.

    Args:
        sessions: name to session; the order rotates from round to round.
        images: the batch of each session.
        seconds: time to spend on each session after its warm-up.
    """
    works = {name: compute_only(session, [images[name]]) for name, session in sessions.items()}
    warm = {name: warm_up(work, WARMUP_LIMIT_S) for name, work in works.items()}
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    order = list(sessions)
    for number in range(max(1, round(seconds / TURN_S))):
        for name in order:
            time.sleep(REST_S)
            samples[name] += turn(works[name], number, settle=warm[name].step_ms < TURN_S * 1e3)
        order.append(order.pop(0))
    timings = []
    for name, session in sessions.items():
        median = float(np.median(samples[name]))
        timings.append(
            Timing(
                artifact=name,
                batch=len(images[name]),
                threads=session.options.threads or usable_cores(),
                samples_ms=tuple(samples[name]),
                median_ms=median,
                images_per_s=len(images[name]) / median * 1e3,
                steady=warm[name].steady,
            )
        )
    return tuple(timings)


# What samples can carry -----------------------------------------------------------------------------------------------


def quantile(samples_ms: Sequence[float], fraction: float) -> Quantile:
    """A quantile with its 95 % interval, whatever the samples' distribution; no value where they are too few.

    The number of samples below the true quantile is binomial, so two order statistics enclose it with a probability
    that is known exactly (David and Nagaraja, Order Statistics, 7.1). That is true of independent samples: where
    neighbours resemble each other the true interval is wider, so verdicts are made from turns (`regress`), not from
    this.
    """
    needs = samples_needed(fraction)
    count = len(samples_ms)
    if count < needs:
        return Quantile(fraction=fraction, value_ms=None, low_ms=None, high_ms=None, needs=needs)
    below = np.cumsum(_binomial(count, fraction))  # P(at most k samples lie below the quantile)
    tail = (1 - CONFIDENCE) / 2
    low = int(np.searchsorted(below, tail, side="right"))  # first k with P(at most k) > tail
    high = int(np.searchsorted(below, 1 - tail, side="left"))
    ordered = np.sort(np.asarray(samples_ms, dtype=np.float64))
    return Quantile(
        fraction=fraction,
        value_ms=float(np.quantile(ordered, fraction)),
        low_ms=float(ordered[low - 1]),
        high_ms=float(ordered[high]),
        needs=needs,
    )


def samples_needed(fraction: float) -> int:
    """The fewest samples whose smallest and largest enclose the quantile with 97.5 % on either side."""
    tail = (1 - CONFIDENCE) / 2
    return int(np.ceil(np.log(tail) / np.log(max(fraction, 1 - fraction))))


def _binomial(count: int, p: float) -> NDArray[np.float64]:
    """P(k successes in `count`), k = 0..count, in logarithms so that no power underflows."""
    k = np.arange(1, count + 1)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((count - k + 1) / k))])
    every = np.arange(count + 1)
    return np.exp(log_choose + every * np.log(p) + (count - every) * np.log1p(-p))


def trend(values: Sequence[float]) -> float:
    """Two-sided p of Mann-Kendall's test: how likely so much rising or falling is, where the order means nothing.

    The exact distribution of the number of inversions of a permutation; ties count half. 1.0 below three values.
    """
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    if n < 3:
        return 1.0
    score = float(np.sum(np.sign(x[None, :] - x[:, None])[np.triu_indices(n, 1)]))
    pairs = n * (n - 1) // 2
    counts = np.ones(1)  # P(that many inversions)
    for size in range(2, n + 1):
        counts = np.convolve(counts, np.full(size, 1 / size))
    extreme = np.abs(pairs - 2 * np.arange(pairs + 1)) >= abs(score) - 1e-9
    return min(1.0, float(counts[extreme].sum()))


def drifts(turn_medians: Sequence[float]) -> bool:
    """Whether the turns of a measurement rise or fall by more than 5 % from the first to the last.

    The slope is the median of all slopes between two turns (Theil and Sen), so that one slow turn does not make one.
    """
    x = np.asarray(turn_medians, dtype=np.float64)
    if trend(x.tolist()) >= DRIFT_P:
        return False
    first, second = np.triu_indices(len(x), 1)
    slope = float(np.median((x[second] - x[first]) / (second - first)))
    return abs(slope) * (len(x) - 1) > DRIFT * float(np.median(x))
