"""Verdicts on two runs of `bench`, for a build server and for a pull request."""

from collections.abc import Sequence

from ..records.timing import Comparison
from ..timing.compare import interval_words
from .junit import Case, document
from .markdown import table

ORDER = ("SLOWER", "INCONCLUSIVE", "FASTER", "SAME")


def junit(comparisons: Sequence[Comparison]) -> bytes:
    """JUnit XML: SLOWER is a failure, INCONCLUSIVE is skipped."""
    return document("convnext-deploy bench", [_case(comparison) for comparison in comparisons])


def _case(comparison: Comparison) -> Case:
    said = f"{comparison.verdict} {interval_words(comparison)}"
    if comparison.verdict == "SLOWER":
        message = f"SLOWER: {interval_words(comparison)}"
        return Case(group=comparison.setting, name=comparison.subject, outcome="failure", message=message, output=said)
    if comparison.verdict == "INCONCLUSIVE":
        reason = comparison.reason or ""
        return Case(group=comparison.setting, name=comparison.subject, outcome="skipped", message=reason, output=said)
    return Case(group=comparison.setting, name=comparison.subject, output=said)


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A table for a pull request or a GitHub step summary; SLOWER rows come first."""
    ordered = sorted(comparisons, key=lambda comparison: ORDER.index(comparison.verdict))
    rows = [(c.verdict, c.subject, c.setting, interval_words(c), c.reason or "") for c in ordered]
    return table(("verdict", "what", "setting", "time, new / old (95 %)", ""), rows)
