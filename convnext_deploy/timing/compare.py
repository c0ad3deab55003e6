"""Is it slower than before? Verdicts from two results of `bench`, and how CI reads them.

Samples that follow one another resemble each other, so an interval from all of them would be too narrow. The unit is
the turn: each turn's median is one observation, and the turns of competitors lie between two of them. The interval of
the ratio is the one that belongs to a rank test on the logarithms: Mann and Whitney's for two runs, Wilcoxon's for two
competitors that took the same turns in one run. Both are exact for any distribution (Hollander, Wolfe and Chicken,
Nonparametric Statistical Methods, 4.3 and 3.3). A verdict needs the whole interval on one side of the margin, and the
same answer in units of the yardstick that was timed before each turn: between two runs the machine itself may change.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, counted, plain
from ..records.base import MAX_RESULTS_BYTES, content_of
from ..records.timing import BenchResult, Comparison, Verdicts

CONFIDENCE = 0.95
MAX_BLOCKS = 40  # turns beyond are joined in order: the exact tables grow with the fourth power
PAIRED_TURNS = 6  # the fewest whose signed ranks carry 95 %
UNPAIRED_TURNS = 4  # likewise of each of two runs

Interval = tuple[float, float, float]  # ratio, low, high


def blocks_ms(result: BenchResult) -> NDArray[np.float64]:
    """One time a turn: the median step, or with several streams what an image of each step took."""
    if result.scenario in ("offline", "multi-stream"):
        times = 1e3 * result.batch / np.asarray(result.turn_images_per_s)
    else:
        pieces = np.split(np.asarray(result.samples_ms), np.cumsum(result.turns)[:-1])
        times = np.array([np.median(piece) for piece in pieces])
    if len(times) <= MAX_BLOCKS:
        return times
    return np.array([np.median(part) for part in np.array_split(times, MAX_BLOCKS)])


def ratio_of_runs(new: NDArray[np.float64], old: NDArray[np.float64]) -> Interval | None:
    """How many times as long `new` takes as `old`, with its 95 % interval; None where the turns are too few."""
    if min(len(new), len(old)) < UNPAIRED_TURNS:
        return None
    differences = np.sort((np.log(new)[:, None] - np.log(old)[None, :]).ravel())
    return _enclosed(differences, _rank_sum_counts(len(new), len(old)))


def ratio_of_turns(new: NDArray[np.float64], old: NDArray[np.float64]) -> Interval | None:
    """The interval of the ratio of two competitors of one run: turn i of one belongs to turn i of the other."""
    count = min(len(new), len(old))
    if count < PAIRED_TURNS:
        return None
    logs = np.log(new[:count]) - np.log(old[:count])
    first, second = np.triu_indices(count)
    averages = np.sort((logs[first] + logs[second]) / 2)
    return _enclosed(averages, _signed_rank_counts(count))


def _enclosed(ordered: NDArray[np.float64], counts: NDArray[np.float64]) -> Interval:
    """The middle of the ordered log ratios and the two that the test's null distribution puts around it."""
    below = np.cumsum(counts) / counts.sum()
    skip = int(np.searchsorted(below, (1 - CONFIDENCE) / 2, side="right"))  # P(statistic < skip) <= 2.5 %
    middle, low, high = np.exp([np.median(ordered), ordered[skip - 1], ordered[-skip]])
    return float(middle), float(low), float(high)


def _rank_sum_counts(m: int, n: int) -> NDArray[np.float64]:
    """In how many of the orders of m and n values Mann and Whitney's U is 0, 1 ... m n."""
    row = [np.ones(1) for _ in range(n + 1)]
    for i in range(1, m + 1):
        fresh = [np.ones(1)]
        for j in range(1, n + 1):
            counts = np.zeros(i * j + 1)
            counts[j:] += row[j]  # the largest value is one of the m: it exceeds all j
            counts[: len(fresh[-1])] += fresh[-1]  # or one of the n
            fresh.append(counts)
        row = fresh
    return row[n]


def _signed_rank_counts(count: int) -> NDArray[np.float64]:
    """In how many of the 2^count choices of signs the positive ranks sum to 0, 1 ... count (count + 1) / 2."""
    counts = np.ones(1)
    for rank in range(1, count + 1):
        fresh = np.zeros(len(counts) + rank)
        fresh[: len(counts)] += counts
        fresh[rank:] += counts
        counts = fresh
    return counts


def verdict(interval: Interval, max_slowdown: float) -> Verdicts:
    """SLOWER, FASTER: the whole interval is beyond the margin; SAME: within it; else INCONCLUSIVE."""
    _, low, high = interval
    upper, lower = 1 + max_slowdown, 1 / (1 + max_slowdown)
    if low > upper:
        return "SLOWER"
    if high < lower:
        return "FASTER"
    return "SAME" if lower <= low and high <= upper else "INCONCLUSIVE"


def setting(result: BenchResult) -> str:
    """In which setting it was measured, in words."""
    sides = "x".join(map(str, result.image_size))
    streams = f"{result.streams} streams of " if result.streams > 1 else ""
    words = (result.scenario, f"batch {result.batch}", f"{sides} pixels", result.task, result.scope)
    return ", ".join((*words, f"{result.device}, {streams}{counted(result.threads, 'thread')}"))


def compare(old: Sequence[BenchResult], new: Sequence[BenchResult], max_slowdown: float) -> tuple[Comparison, ...]:
    """A verdict for every row of either run; a row that only one of them has is INCONCLUSIVE.

    Args:
        max_slowdown: fraction; 0.05 takes up to 5 % more time for the same.
    """
    before, after = _by_artifact(old), _by_artifact(new)
    comparisons = []
    for key in dict.fromkeys((*after, *before)):
        olds, news = before.get(key, {}), after.get(key, {})
        if len(olds) <= 1 and len(news) <= 1:  # one artifact of this name: it may have been built anew
            pairs = [(next(iter(olds.values()), None), next(iter(news.values()), None), "")]
        else:
            pairs = [(olds.get(sha), news.get(sha), f" {(sha or '')[:8]}") for sha in dict.fromkeys((*news, *olds))]
        comparisons += [_compared(one, other, key[0] + mark, key[1], max_slowdown) for one, other, mark in pairs]
    return tuple(comparisons)


def _by_artifact(rows: Sequence[BenchResult]) -> dict[tuple[str, str], dict[str | None, BenchResult]]:
    """The last row of each artifact, by what it is called and its setting: two artifacts may be called the same."""
    results: dict[tuple[str, str], dict[str | None, BenchResult]] = {}
    for row in rows:
        results.setdefault((row.subject, setting(row)), {})[row.artifact_sha256] = row
    return results


def _compared(
    old: BenchResult | None, new: BenchResult | None, subject: str, where: str, max_slowdown: float
) -> Comparison:
    reason = _incomparable(old, new)
    interval = None
    if reason is None and old is not None and new is not None:
        interval = ratio_of_runs(blocks_ms(new), blocks_ms(old))
        reason = None if interval else f"{len(old.turns)} and {len(new.turns)} turns; needs {UNPAIRED_TURNS} each"
    if interval is None:
        return Comparison(
            subject=subject, setting=where, verdict="INCONCLUSIVE", ratio=None, low=None, high=None, reason=reason
        )
    decision, pace = verdict(interval, max_slowdown), 1.0
    if old is not None and new is not None:
        pace = float(np.median(new.yardstick_ms) / np.median(old.yardstick_ms))
    ratio, low, high = interval
    if verdict((ratio / pace, low / pace, high / pace), max_slowdown) != decision:
        decision = "INCONCLUSIVE"
        reason = f"the machine itself took {pace:.3f} times as long for the same work (yardstick_ms)"
    elif decision == "INCONCLUSIVE":
        reason = f"the interval crosses the margin of {max_slowdown:.0%}; measure longer, or on a quieter machine"
    return Comparison(subject=subject, setting=where, verdict=decision, ratio=ratio, low=low, high=high, reason=reason)


def _incomparable(old: BenchResult | None, new: BenchResult | None) -> str | None:
    if old is None or new is None:
        return f"not in the {'earlier' if old is None else 'new'} results"
    for when, row in (("earlier", old), ("new", new)):
        if row.status != "valid":
            return f"the {when} result is {row.status}: {row.reason}"
    for fact in ("cpu", "cores", "gpu"):
        if old.machine.get(fact) != new.machine.get(fact):
            return f"another machine: {fact} {old.machine.get(fact)} before, {new.machine.get(fact)} now"
    if new.scenario == "server":
        return "the highest rate of a server carries no interval; compare its trials"
    return None


# Files ----------------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> tuple[BenchResult, ...]:
    """Read a results file.

    Raises:
        DataError: it cannot be read, a line is not a BenchResult of this version, or there is none.
    """
    try:
        lines = content_of(path, MAX_RESULTS_BYTES).splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {plain(error)}; expected results of `bench --save`") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(msgspec.json.decode(line, type=BenchResult))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise DataError(f"{path} line {number} is not a result of bench: {plain(error)}") from None
    if not rows:
        raise DataError(f"{path} is empty; expected results of `bench --save`, one a line")
    return tuple(rows)


def encode_results(rows: Sequence[BenchResult]) -> bytes:
    """JSON Lines."""
    return b"".join(msgspec.json.encode(row) + b"\n" for row in rows)


def interval_words(comparison: Comparison) -> str:
    if comparison.ratio is None:
        return "–"
    return f"{comparison.ratio:.3f} ({comparison.low:.3f} to {comparison.high:.3f})"
