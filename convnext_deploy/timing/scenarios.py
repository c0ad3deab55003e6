"""The server scenario: seeded Poisson arrivals against one session with dynamic batching, and the rate it can carry.

The queue runs on a clock that it is given: the real one against a session, a virtual one against measured service
times. So the search for the highest rate begins where few real runs are needed.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..records.timing import ServerTrial
from .measure import quantile, samples_needed

SEARCH_STEPS = 12  # halvings of the range of rates, on the virtual clock
SEARCH_QUERIES = 10_000  # a step
STRIDE = 1.4  # between two rates that are tried for real, until one has passed and one has failed
FIRST_LOAD = 0.3  # of a server, where the virtual clock finds no rate
CLOSE = 1.07  # ratio of these two at which the search for real ends
MAX_TRIALS = 8
SPIN_S = 0.002  # before an arrival: sleeping ends too late by about that much


class Clock(Protocol):
    def now(self) -> float: ...

    def sleep_until(self, moment: float) -> None: ...


class RealClock:
    """Seconds of `perf_counter`; sleeps, and spins through the last two milliseconds."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep_until(self, moment: float) -> None:
        pause = moment - time.perf_counter() - SPIN_S
        if pause > 0:
            time.sleep(pause)
        while time.perf_counter() < moment:
            pass


@dataclass(slots=True)
class VirtualClock:
    """Time that passes only when it is told to."""

    time: float = 0.0

    def now(self) -> float:
        return self.time

    def sleep_until(self, moment: float) -> None:
        self.time = max(self.time, moment)


@dataclass(frozen=True, slots=True)
class Served:
    latencies_s: NDArray[np.float64]  # (queries,) from arrival to answer
    waits_s: NDArray[np.float64]  # (queries,) from arrival to the start of its batch
    batches: NDArray[np.int64]  # sizes, in the order they were served


def poisson_arrivals(queries_per_s: float, queries: int, seed: int) -> NDArray[np.float64]:
    """Moments of arrival in seconds from 0, (queries,): independent exponential gaps."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / queries_per_s, queries))


def serve(
    arrivals: Sequence[float] | NDArray[np.float64],
    run: Callable[[int], None],
    max_batch: int,
    clock: Clock,
) -> Served:
    """Answer queries in the order they arrive; a free server takes all that wait, at most `max_batch`, as one batch.

    Args:
        arrivals: ascending, in seconds from the start.
        run: serves a batch of that many images, and returns when it is done.
    """
    begin = clock.now()
    moments = begin + np.asarray(arrivals, dtype=np.float64)
    count = len(moments)
    finished, started = np.empty(count), np.empty(count)
    sizes = []
    first = 0
    while first < count:
        clock.sleep_until(float(moments[first]))
        start = clock.now()
        waiting = int(np.searchsorted(moments, start, side="right")) - first
        size = min(max(waiting, 1), max_batch)
        run(size)
        started[first : first + size], finished[first : first + size] = start, clock.now()
        sizes.append(size)
        first += size
    return Served(finished - moments, started - moments, np.array(sizes))


def trial(
    run: Callable[[int], None],
    queries_per_s: float,
    queries: int,
    seed: int,
    *,
    max_batch: int,
    slo_ms: float,
    fraction: float,
    clock: Clock | None = None,
) -> ServerTrial:
    """One run of Poisson arrivals; it passes if its quantile, not the interval around it, is within the limit.

    Args:
        run: serves a batch of that many images.
        fraction: of the queries that have to be answered within the limit.
    """
    served = serve(poisson_arrivals(queries_per_s, queries, seed), run, max_batch, clock or RealClock())
    latency = quantile((served.latencies_s * 1e3).tolist(), fraction)
    return ServerTrial(
        queries_per_s=queries_per_s,
        queries=queries,
        latency=latency,
        mean_batch=float(served.batches.mean()),
        passed=latency.value_ms is not None and latency.value_ms <= slo_ms,
    )


def trials(
    attempt: Callable[[float, int, int], ServerTrial],
    service_s: Mapping[int, Sequence[float]],
    *,
    slo_ms: float,
    fraction: float = 0.99,
    seed: int = 0,
    seconds: float = 10.0,
) -> Iterator[ServerTrial]:
    """Runs that close in on the highest rate of Poisson arrivals whose latency quantile stays within the limit.

    A virtual queue with the measured service times is searched by halving. The rate that it finds is where the real
    search begins, which ends when a rate that passed and one that failed are within 7 %.

    Args:
        attempt: makes a run with so many queries a second, queries, and a seed.
        service_s: batch size to measured seconds of one such batch, for the sizes that the server may form; sizes in
            between are served as the next larger one.
        seconds: of each run; longer where the quantile needs more queries.

    Raises:
        UsageError: the limit is not positive.
    """
    if not slo_ms > 0:
        raise UsageError(f"--slo-ms {slo_ms}; expected milliseconds above 0")
    rate = _searched(service_s, slo_ms, fraction, seed)
    passed_at, failed_at = 0.0, np.inf
    for number in range(MAX_TRIALS):
        if not rate > 0 or failed_at <= CLOSE * passed_at:
            return
        tried = attempt(rate, max(round(rate * seconds), 2 * samples_needed(fraction)), seed + number)
        yield tried
        passed_at, failed_at = (rate, failed_at) if tried.passed else (passed_at, rate)
        if not passed_at:
            rate /= STRIDE
        else:
            rate = float(np.sqrt(passed_at * failed_at)) if np.isfinite(failed_at) else rate * STRIDE


def runs_left(made: Sequence[ServerTrial]) -> int:
    """About how many runs `trials` still makes after these: for a display of the time that is left."""
    if len(made) >= MAX_TRIALS:
        return 0
    passed_at = highest(made)
    failed_at = min((one.queries_per_s for one in made if not one.passed), default=None)
    open_sides = (passed_at is None) + (failed_at is None)  # each costs one more run at least
    apart = STRIDE if passed_at is None or failed_at is None else failed_at / passed_at
    halvings = 0 if apart <= CLOSE else math.ceil(math.log2(math.log(apart) / math.log(CLOSE)))
    return min(open_sides + halvings, MAX_TRIALS - len(made))


def highest(trials: Sequence[ServerTrial]) -> float | None:
    """The highest rate that passed."""
    return max((one.queries_per_s for one in trials if one.passed), default=None)


def _searched(service_s: Mapping[int, Sequence[float]], slo_ms: float, fraction: float, seed: int) -> float:
    """The highest rate on the virtual clock; 0 where even a typical single query takes too long."""
    low, high = 0.0, max(size / float(np.mean(times)) for size, times in service_s.items())  # which no queue exceeds
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        clock = VirtualClock()
        arrivals = poisson_arrivals(middle, SEARCH_QUERIES, seed)
        served = serve(arrivals, virtual_server(service_s, clock, seed), max(service_s), clock)
        if np.quantile(served.latencies_s, fraction) * 1e3 <= slo_ms:
            low = middle
        else:
            high = middle
    alone_s = float(np.median(service_s[min(service_s)]))
    # Nothing carries the limit if more service times than the quantile allows exceed it; real runs say whether a
    # disturbance of the measurement did that, as long as the typical one does not.
    return low or (FIRST_LOAD / alone_s if alone_s * 1e3 <= slo_ms else 0.0)


def virtual_server(service_s: Mapping[int, Sequence[float]], clock: VirtualClock, seed: int) -> Callable[[int], None]:
    """Lets time pass as a server with these service times would: each batch takes one of the measured times."""
    generator = np.random.default_rng(seed)
    sizes = sorted(service_s)

    def run(size: int) -> None:
        times = service_s[sizes[int(np.searchsorted(sizes, size))]]
        clock.time += times[int(generator.integers(len(times)))]

    return run
