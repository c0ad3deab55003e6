"""Verdicts and their intervals, beside scipy's rank tests and on samples whose answer is known."""

import itertools
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.stats
from sample_records import bench_row as row
from sample_records import noisy

from convnext_deploy.errors import DataError
from convnext_deploy.records.timing import Comparison
from convnext_deploy.reports import comparisons
from convnext_deploy.timing import compare


@pytest.mark.parametrize(("m", "n"), [(4, 4), (5, 9), (12, 7)])
def test_the_rank_sum_table_is_scipys(m: int, n: int) -> None:
    counts = compare._rank_sum_counts(m, n)
    survival = counts[::-1].cumsum()[::-1] / counts.sum()  # P(U >= u)
    for pieces in ([1] * m, range(m)):
        high = np.array([n + 10 * piece - 0.5 for piece in pieces]) + np.arange(m) * 1e-3
        found = scipy.stats.mannwhitneyu(high, np.arange(n), alternative="greater", method="exact")
        assert survival[int(found.statistic)] == pytest.approx(found.pvalue, rel=1e-9)
    assert counts.sum() == pytest.approx(scipy.special.comb(m + n, m))


def test_the_signed_rank_table_is_that_of_all_signs() -> None:
    sums = [sum(r for r, sign in zip(range(1, 9), signs, strict=True) if sign)
            for signs in itertools.product((0, 1), repeat=8)]  # fmt: skip
    assert compare._signed_rank_counts(8).tolist() == np.bincount(sums).tolist()


@pytest.mark.parametrize("paired", [False, True])
def test_the_interval_holds_the_true_ratio_in_95_of_100_runs(paired: bool) -> None:
    generator = np.random.default_rng(1)
    held, runs = 0, 2000
    interval_of = compare.ratio_of_turns if paired else compare.ratio_of_runs
    for _ in range(runs):
        old = generator.lognormal(0, 0.05, 9)
        new = 1.1 * generator.lognormal(0, 0.05, 9)
        found = interval_of(new, old)
        assert found is not None
        held += found[1] <= 1.1 <= found[2]
    assert 0.94 <= held / runs <= 0.985  # exact tables are discrete, so a little above 95 %


def test_an_a_a_run_is_never_slower_or_faster_and_mostly_the_same() -> None:
    verdicts = [compare.compare([row(noisy(seed))], [row(noisy(seed + 1000))], 0.05)[0].verdict for seed in range(200)]
    assert set(verdicts) <= {"SAME", "INCONCLUSIVE"}
    assert verdicts.count("SAME") >= 190


@pytest.mark.parametrize(("level", "expected"), [(1.25, "SLOWER"), (0.75, "FASTER"), (1.0, "SAME")])
def test_a_change_beyond_the_margin_is_found(level: float, expected: str) -> None:
    (found,) = compare.compare([row(noisy(0))], [row(noisy(1, level))], 0.05)
    assert found.verdict == expected
    assert found.low is not None
    assert found.high is not None
    assert found.low <= level <= found.high


def test_a_change_about_as_large_as_the_margin_is_inconclusive() -> None:
    (found,) = compare.compare([row(noisy(0))], [row(noisy(1, 1.05))], 0.05)
    assert found.verdict == "INCONCLUSIVE"
    assert "crosses the margin of 5%" in (found.reason or "")


def test_resembling_samples_do_not_narrow_the_interval() -> None:
    few, many = ([[level] * n for level in (49.0, 50.0, 51.0, 52.0, 48.0, 50.5)] for n in (1, 1000))
    one, other = (compare.ratio_of_runs(*[compare.blocks_ms(row(turns))] * 2) for turns in (few, many))
    assert one == other


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status": "invalid", "reason": "shared"}, "the new result is invalid: shared"),
        ({"machine": {"cpu": "b", "cores": 2}}, "another machine: cpu a before, b now"),
        ({"scenario": "server"}, "carries no interval"),
        ({"batch": 8}, "not in the earlier results"),
    ],
)
def test_what_cannot_be_compared_is_inconclusive_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    old = row(noisy(0), **({"scenario": "server"} if "scenario" in changes else {}))
    found = compare.compare([old], [row(noisy(1), **changes)], 0.05)[0]
    assert found.verdict == "INCONCLUSIVE"
    assert reason in (found.reason or "")


@pytest.mark.parametrize(("level", "pace"), [(1.25, 1.25), (1.0, 1.25), (0.8, 0.8)])
def test_a_machine_that_changed_between_the_runs_makes_no_verdict(level: float, pace: float) -> None:
    (found,) = compare.compare([row(noisy(0))], [row(noisy(1, level), yardstick_ms=(4.0 * pace,) * 12)], 0.05)
    assert found.verdict == "INCONCLUSIVE"
    assert found.reason == f"the machine itself took {pace:.3f} times as long for the same work (yardstick_ms)"


def test_two_artifacts_that_are_called_the_same_are_compared_each_with_itself() -> None:
    one, other = ({"artifact_sha256": letter * 64} for letter in "ab")
    old = [row(noisy(0), **one), row(noisy(1, 2.0), **other)]
    new = [row(noisy(2), **one), row(noisy(3, 2.0), **other)]
    found = compare.compare(old, new, 0.05)
    assert [(c.subject[-9:], c.verdict) for c in found] == [(" aaaaaaaa", "SAME"), (" bbbbbbbb", "SAME")]
    (lost, kept) = sorted(compare.compare(old, new[:1], 0.05), key=lambda c: c.verdict)
    assert (lost.verdict, lost.reason, kept.verdict) == ("INCONCLUSIVE", "not in the new results", "SAME")


def test_an_artifact_that_was_built_anew_is_compared_with_the_one_before() -> None:
    (found,) = compare.compare(
        [row(noisy(0), artifact_sha256="a" * 64)], [row(noisy(1), artifact_sha256="b" * 64)], 0.05
    )
    assert found.verdict == "SAME"


def test_a_row_that_disappeared_is_named() -> None:
    (found,) = compare.compare([row(noisy(0))], [], 0.05)
    assert (found.verdict, found.reason) == ("INCONCLUSIVE", "not in the new results")


def test_too_few_turns_are_inconclusive() -> None:
    (found,) = compare.compare([row(noisy(0, turns=3))], [row(noisy(1))], 0.05)
    assert found.reason == "3 and 12 turns; needs 4 each"


def test_results_survive_being_written_and_read(tmp_path: Path) -> None:
    rows = (row(noisy(0)), row(noisy(1), batch=8))
    (tmp_path / "base.json").write_bytes(compare.encode_results(rows))
    assert compare.read_results(tmp_path / "base.json") == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b'{"model": 1}\n', "line 1 is not a result of bench"), (None, "cannot be read")],
)
def test_a_file_of_something_else_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "base.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        compare.read_results(tmp_path / "base.json")


def test_junit_and_markdown_tell_each_verdict_apart() -> None:
    made = [
        Comparison(subject="a<b", setting="s", verdict="SAME", ratio=1.0, low=0.99, high=1.01),
        Comparison(subject="c", setting="s", verdict="SLOWER", ratio=1.2, low=1.1, high=1.3),
        Comparison(subject="d", setting="s", verdict="INCONCLUSIVE", ratio=None, low=None, high=None, reason="shared"),
    ]
    (suite,) = ElementTree.fromstring(comparisons.junit(made))
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    assert [[child.tag for child in case] for case in suite] == [
        ["system-out"], ["failure", "system-out"], ["skipped", "system-out"],
    ]  # fmt: skip
    lines = comparisons.markdown(made).splitlines()
    assert lines[2] == "| SLOWER | c | s | 1.200 (1.100 to 1.300) |  |"
    assert lines[3].startswith("| INCONCLUSIVE | d | s | – | shared |")


def test_no_name_breaks_the_table_or_the_xml_of_a_comparison() -> None:
    name = "build/a|b\x1b[31m<i>"
    made = [Comparison(subject=name, setting="s", verdict="SLOWER", ratio=1.2, low=1.1, high=1.3)]
    (suite,) = ElementTree.fromstring(comparisons.junit(made))
    assert suite[0].get("name") == "build/a|b?[31m<i>"
    row = comparisons.markdown(made).splitlines()[2]
    assert row.count("|") == 6
    assert "&lt;i>" in row
