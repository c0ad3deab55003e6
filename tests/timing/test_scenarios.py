"""The queue on a virtual clock, beside the formulas of queueing theory."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from convnext_deploy.errors import UsageError
from convnext_deploy.records.timing import ServerTrial
from convnext_deploy.timing import scenarios
from convnext_deploy.timing.scenarios import (
    RealClock,
    VirtualClock,
    highest,
    poisson_arrivals,
    serve,
    trial,
    trials,
    virtual_server,
)

SERVICE_S = 0.02


def served(rate: float, queries: int, service_s: dict[int, list[float]], seed: int = 0) -> scenarios.Served:
    clock = VirtualClock()
    arrivals = poisson_arrivals(rate, queries, seed)
    return serve(arrivals, virtual_server(service_s, clock, seed), max(service_s), clock)  # type: ignore[arg-type]


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_waiting_times_are_those_of_an_m_d_1_queue(load: float) -> None:
    waits = np.array(
        [served(load / SERVICE_S, 8_000, {1: [SERVICE_S]}, seed).waits_s[1000:].mean() for seed in range(8)]
    )
    expected = load * SERVICE_S / (2 * (1 - load))  # Pollaczek and Khinchine, without variance of service
    error = waits.std(ddof=1) / np.sqrt(len(waits))
    assert abs(waits.mean() - expected) < 4 * error
    assert abs(waits.mean() - expected) < 0.1 * expected


def test_a_queue_that_waits_for_exponential_service_waits_twice_as_long() -> None:
    times = np.random.default_rng(3).exponential(SERVICE_S, 100_000).tolist()
    load = 0.5 * np.mean(times) / SERVICE_S
    waits = np.mean([served(0.5 / SERVICE_S, 15_000, {1: times}, seed).waits_s.mean() for seed in range(6)])
    assert waits == pytest.approx(load * np.mean(times) / (1 - load), rel=0.1)  # M/M/1


def test_the_share_of_queries_that_wait_is_the_load() -> None:
    assert np.mean(served(30, 20_000, {1: [SERVICE_S]}).waits_s > 0) == pytest.approx(0.6, abs=0.02)


def test_arrivals_are_poisson_and_the_same_for_the_same_seed() -> None:
    arrivals = poisson_arrivals(100, 50_000, 7)
    counts = np.bincount(arrivals.astype(int))[:-1]
    assert counts.mean() == pytest.approx(100, rel=0.02)
    assert counts.var() == pytest.approx(counts.mean(), rel=0.2)
    assert np.array_equal(arrivals, poisson_arrivals(100, 50_000, 7))
    assert not np.array_equal(arrivals, poisson_arrivals(100, 50_000, 8))


def test_what_waits_is_served_together_up_to_the_largest_batch() -> None:
    clock = VirtualClock()
    found = serve([0.0, 0.1, 0.2, 0.3, 0.4, 5.0], virtual_server({4: [1.0]}, clock, 0), 4, clock)
    assert found.batches.tolist() == [1, 4, 1]
    assert found.latencies_s == pytest.approx([1.0, 1.9, 1.8, 1.7, 1.6, 1.0])
    assert found.waits_s == pytest.approx([0.0, 0.9, 0.8, 0.7, 0.6, 0.0])


def searched(
    run: Callable[[int], None], service_s: dict[int, list[float]], clock: VirtualClock, slo_ms: float, **options: Any
) -> tuple[float | None, list[ServerTrial]]:
    attempt = partial(trial, run, max_batch=max(service_s), slo_ms=slo_ms, fraction=0.99, clock=clock)
    found = list(trials(attempt, service_s, slo_ms=slo_ms, **options))
    return highest(found), found


def test_the_highest_rate_of_a_queue_without_batching_is_that_of_the_simulated_m_d_1() -> None:
    clock = VirtualClock()
    service = {1: [SERVICE_S]}
    rate, _ = searched(virtual_server(service, clock, 1), service, clock, slo_ms=100, seconds=200)
    assert rate is not None
    at, above = (
        np.quantile(served(rate, 50_000, service, seed=9).latencies_s, 0.99) * 1e3
        for rate in (0.93 * rate, 1.15 * rate)
    )
    assert at <= 100 < above


def test_batching_carries_more_than_one_at_a_time() -> None:
    alone, batched = {1: [0.02]}, {1: [0.02], 2: [0.025], 4: [0.035], 8: [0.055]}
    rates = []
    for service in (alone, batched):
        clock = VirtualClock()
        rate, _ = searched(virtual_server(service, clock, 1), service, clock, slo_ms=150)
        rates.append(rate or 0.0)
    assert 30 < rates[0] < 50  # one at a time: 50 a second are the most
    assert 100 < rates[1] < 8 / 0.055


def test_a_limit_below_one_service_is_carried_at_no_rate() -> None:
    clock = VirtualClock()
    service = {1: [SERVICE_S]}
    assert searched(virtual_server(service, clock, 1), service, clock, slo_ms=19) == (None, [])


def test_a_server_that_is_slower_than_it_was_measured_is_found_out() -> None:
    clock = VirtualClock()
    slower = virtual_server({1: [1.1 * SERVICE_S]}, clock, 1)
    rate, found = searched(slower, {1: [SERVICE_S]}, clock, slo_ms=100, seconds=100)
    assert not found[0].passed
    assert rate is not None
    assert rate < found[0].queries_per_s


def test_a_server_that_was_measured_too_slow_is_found_out() -> None:
    clock = VirtualClock()
    measured = [SERVICE_S] * 90 + [50 * SERVICE_S] * 10  # a disturbance while it was measured
    rate, _ = searched(virtual_server({1: [SERVICE_S]}, clock, 1), {1: measured}, clock, slo_ms=100)
    assert rate is not None
    assert 25 < rate < 50


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="--slo-ms 0"):
        searched(lambda size: None, {1: [0.1]}, VirtualClock(), slo_ms=0)


def test_on_the_real_clock_latencies_are_what_the_clock_says() -> None:
    begin = time.perf_counter()
    found = serve([0.0, 0.01, 0.02, 0.2], lambda size: time.sleep(0.03), 8, RealClock())
    elapsed = time.perf_counter() - begin
    assert found.batches.sum() == 4
    assert found.latencies_s.min() >= 0.03
    assert 0.23 <= 0.2 + found.latencies_s[-1] <= elapsed
