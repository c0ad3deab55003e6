"""Timing loops on work whose length is known, and the statistics beside scipy's."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from convnext_deploy.artifact.batches import Images
from convnext_deploy.artifact.session import RunOptions, Session
from convnext_deploy.records.manifest import PrecisionTruth
from convnext_deploy.timing import measure
from convnext_deploy.timing.measure import Work


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class FakeSession(Session):
    """Takes as long as it is told, and keeps what was asked of it."""

    def __init__(self, step: Callable[[], None]) -> None:
        super().__init__(None, RunOptions(threads=1))  # type: ignore[arg-type]
        self.asked: list[str] = []
        self.bound: list[int] = []
        self.work = step

    def bind(self, images: Images) -> None:
        self.bound.append(int(images.flat[0]))

    def _bind(self, images: Images) -> None: ...

    def _step(self) -> None:
        self.asked.append("step")
        self.work()

    def _sync(self) -> None:
        self.asked.append("sync")

    def _fetch(self) -> tuple[NDArray[np.float32], ...]:
        return ()

    def _unshare(self) -> None: ...

    def _precision(self) -> PrecisionTruth:
        return PrecisionTruth(graph={"fp32": 1.0})


def work(step: Callable[[int], None]) -> Work:
    return Work(lambda _: None, step)


def batches(count: int) -> list[Any]:
    return [np.full((2, 1), index, np.uint8) for index in range(count)]


# Turns ---------------------------------------------------------------------------------------------------------------


def test_a_sample_is_one_step_and_its_sync_and_the_first_of_a_turn_is_not_kept() -> None:
    session = FakeSession(lambda: spin(0.002))
    samples = measure.turn(measure.compute_only(session, batches(1)), 0, seconds=0.02)
    assert session.asked == ["step", "sync"] * (len(samples) + 1)
    assert min(samples) >= 2.0


def test_turns_rotate_among_the_input_batches() -> None:
    session = FakeSession(lambda: None)
    work = measure.compute_only(session, batches(3))
    for number in range(5):
        measure.turn(work, number, seconds=0.0)
    assert session.bound == [0, 1, 2, 0, 1]


def test_a_turn_that_need_not_settle_times_every_step() -> None:
    session = FakeSession(lambda: spin(0.002))
    samples = measure.turn(measure.compute_only(session, batches(1)), 0, seconds=0.02, settle=False)
    assert session.asked == ["step", "sync"] * len(samples)


def test_the_yardstick_is_some_milliseconds() -> None:
    assert measure.yardstick() > 0.5


def test_a_step_longer_than_a_turn_is_one_sample() -> None:
    assert len(measure.turn(work(lambda _: spin(0.02)), 0, seconds=0.01)) == 1


def test_the_harness_takes_less_than_a_hundredth_of_a_step_of_ten_milliseconds() -> None:
    begin = time.thread_time()  # CPU time, so that others on the machine do not count
    samples = measure.turn(measure.compute_only(FakeSession(lambda: None), batches(1)), 0, seconds=0.2)
    assert (time.thread_time() - begin) / len(samples) < 0.01 * 0.010


def test_competitors_of_one_process_take_turns_in_an_order_that_rotates() -> None:
    seen: list[str] = []

    def taking_turns(name: str) -> FakeSession:
        def step() -> None:
            seen.append(name)
            spin(0.05)

        return FakeSession(step)

    sessions = {name: taking_turns(name) for name in "abc"}
    timings = measure.interleaved(sessions, dict.fromkeys(sessions, batches(1)[0]), seconds=0.6)
    assert [t.artifact for t in timings] == ["a", "b", "c"]
    assert all(t.batch == 2 and t.median_ms >= 50 and len(t.samples_ms) >= 3 for t in timings)
    changes = [name for before, name in zip(["", *seen], seen, strict=False) if name != before]
    assert "".join(changes).endswith("abcbcacab"[1:])  # warm-ups, then abc bca cab; c is still warm in between


# Warm-up -------------------------------------------------------------------------------------------------------------


def timed(monkeypatch: pytest.MonkeyPatch, medians: list[float], limit_s: float = 60.0) -> measure.WarmUp:
    """A warm-up whose windows have these medians, the last one for ever."""
    given = iter(medians)
    monkeypatch.setattr(measure, "_samples", lambda *_: [next(given, medians[-1])])
    return measure.warm_up(work(lambda _: None), limit_s)


def test_warm_up_goes_on_until_five_windows_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    medians = [9.0, 5.0, 3.0, 1.0, 1.01, 1.0, 1.01, 1.0]

    def samples(*_: object) -> list[float]:
        taken.append(1)
        return [medians[len(taken) - 1]]

    monkeypatch.setattr(measure, "_samples", samples)
    assert measure.warm_up(work(lambda _: None)).steady
    assert len(taken) == 8


def test_windows_that_fall_steadily_are_not_steady_though_they_lie_close(monkeypatch: pytest.MonkeyPatch) -> None:
    falling = [1.04, 1.03, 1.02, 1.01, 1.0]
    assert measure.trend(falling) == pytest.approx(2 / 120)
    medians = iter([*falling, 1.005, 1.0, 1.005])
    seen: list[float] = []
    monkeypatch.setattr(measure, "_samples", lambda *_: [seen.append(m := next(medians)) or m])  # type: ignore[func-returns-value]
    assert measure.warm_up(work(lambda _: None)).steady
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("medians", "windows"),
    [
        ([10.0, 10.8, 10.0, 10.8, 10.1], 5),  # scattered, but no longer changing
        ([12.0, 11.0, 10.0, 10.1, 10.0, 10.1], 6),  # the first two of five are still above
    ],
)
def test_warm_up_ends_with_the_change_and_not_with_the_scatter(
    medians: list[float], windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[float] = []
    given = iter([*medians, *medians[-2:] * 5])
    monkeypatch.setattr(measure, "_samples", lambda *_: [taken.append(m := next(given)) or m])  # type: ignore[func-returns-value]
    assert measure.warm_up(work(lambda _: None)).steady
    assert len(taken) == windows


def test_a_warm_up_that_never_settles_ends_at_its_limit_and_says_so() -> None:
    level = iter(range(1, 10_000))
    found = measure.warm_up(work(lambda _: time.sleep(0.001 * next(level))), limit_s=0.5)
    assert not found.steady
    assert 0.5 <= found.seconds < 2


def test_a_drift_over_the_turns_is_found_and_noise_is_not() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(1, 0.02, 20)
    assert not measure.drifts(noise.tolist())
    assert measure.drifts((noise * np.linspace(1, 1.2, 20)).tolist())
    assert not measure.drifts(np.linspace(1, 1.03, 20).tolist())  # a trend, and too small to matter
    assert not measure.drifts([*noise[:-1].tolist(), 5.0])  # one slow turn


# Streams -------------------------------------------------------------------------------------------------------------


def test_streams_run_side_by_side() -> None:
    works = [work(lambda _: time.sleep(0.02)) for _ in range(4)]
    samples, steps_per_s = measure.turn_of_streams(works, 0, seconds=0.4, together=False)
    assert steps_per_s > 2 / 0.02  # one after the other: 50 a second
    assert len(samples) == pytest.approx(steps_per_s * 0.4, rel=0.4)


def test_a_query_of_all_streams_lasts_as_long_as_the_slowest() -> None:
    lengths = (0.005, 0.03)

    def sleeping(seconds: float) -> Work:
        return work(lambda _: time.sleep(seconds))

    works = [sleeping(seconds) for seconds in lengths]
    samples, steps_per_s = measure.turn_of_streams(works, 0, seconds=0.2, together=True)
    # The clock starts when all may begin, which the slowest may see a moment earlier.
    assert min(samples) > 25
    assert steps_per_s < 2 / 0.025


def test_an_error_in_one_stream_ends_all_of_them() -> None:
    def broken(number: int) -> None:
        calls.append(number)
        if len(calls) > 1:
            raise ValueError("broken")

    calls: list[int] = []
    with pytest.raises(ValueError, match="broken"):
        measure.turn_of_streams([work(lambda _: time.sleep(0.01)), work(broken)], 0, seconds=5, together=True)


# Quantiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "needs"), [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368), (0.999, 3688)])
def test_a_quantile_is_given_from_the_first_number_of_samples_that_carries_it(fraction: float, needs: int) -> None:
    assert 2 * fraction**needs <= 0.05 < 2 * fraction ** (needs - 1)  # all samples lie below it
    samples = np.random.default_rng(0).lognormal(size=needs).tolist()
    found, lacking = measure.quantile(samples, fraction), measure.quantile(samples[:-1], fraction)
    assert found.needs == lacking.needs == needs
    assert found.value_ms == pytest.approx(np.quantile(samples, fraction))
    assert found.high_ms == max(samples)
    assert (lacking.value_ms, lacking.low_ms, lacking.high_ms) == (None, None, None)


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 25), (0.9, 200), (0.99, 1000), (0.999, 100_000)])
def test_the_interval_is_scipys(fraction: float, count: int) -> None:
    samples = np.random.default_rng(1).gamma(2, size=count)
    found = measure.quantile(samples.tolist(), fraction)
    theirs = scipy.stats.quantile_test(samples, p=fraction).confidence_interval(0.95)
    assert (found.low_ms, found.high_ms) == (theirs.low, theirs.high)


def test_the_interval_holds_the_true_median_in_95_of_100_runs() -> None:
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(2000):
        found = measure.quantile(generator.exponential(size=40).tolist(), 0.5)
        assert found.low_ms is not None
        assert found.high_ms is not None
        held += found.low_ms <= np.log(2) <= found.high_ms
    assert 0.94 <= held / 2000 <= 0.98


@pytest.mark.parametrize("count", [5, 9, 30])
def test_the_trend_is_mann_and_kendalls(count: int) -> None:
    generator = np.random.default_rng(count)
    for slope in (0.0, 0.05, 0.3):
        values = generator.normal(size=count) + slope * np.arange(count)
        theirs = scipy.stats.kendalltau(np.arange(count), values, method="exact").pvalue
        assert measure.trend(values.tolist()) == pytest.approx(theirs, rel=1e-9)
