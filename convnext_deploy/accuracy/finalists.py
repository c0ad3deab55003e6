"""Which candidates are worth the final images, and in which order these may be asked without losing the error rate.

Several candidates are held against the same limit on the same images. Each test alone passes a bad candidate with
probability alpha, and "the first of three that passes" would do so with nearly three times that. Here the order is
fixed before the final images are looked at, from the candidate that agrees most with the baseline to the fastest, and
the first that does not pass ends the walk. Then the chance of passing even one bad candidate is alpha at most: to reach
the first bad one everything before it was good, and that one alone has to be passed by chance (a fixed-sequence
procedure: Maurer, Hothorn and Lehmacher 1995; Westfall and Krishen 2001). No candidate pays for the others' tests.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

from . import binomial, statistics

T = TypeVar("T")
Prospect = Literal["none", "doubtful", "fair"]
SAME_TIME = 0.02  # of two candidates that are no further apart in time, the one that agrees more is taken


def prospect(lost: int, gained: int, images: int, final: int, max_drop: float, alpha: float) -> Prospect:
    """Whether a candidate can pass on the final images, by how many of the selection images flip.

    Flips widen the interval of the drop even where as many are gained as lost. "none": with the fewest flips that the
    selection images allow (one-sided, 1 %) and no drop at all it still would not pass. "doubtful": it would not with
    as many flips as were seen, or it drops by more than the limit there.

    Args:
        lost, gained: selection images that only the baseline, or only the candidate, gets right.
        images: selection images.
        final: final images.
        max_drop: fraction.
    """
    flips = lost + gained
    fewest = binomial.share_bounds(flips, images, 0.01)[0]
    for share, outlook in ((fewest, "none"), (flips / images, "doubtful")):
        half = round(share * final / 2)
        if statistics.drop_bounds(half, half, final, alpha)[1] > max_drop:
            return "none" if outlook == "none" else "doubtful"
    return "doubtful" if (lost - gained) / images > max_drop else "fair"


def front(times_ms: Mapping[str, float], agreements: Mapping[str, float], most: int) -> tuple[str, ...]:
    """The fastest `most` of the candidates that no faster one equals in agreement, the one that agrees most first.

    Args:
        times_ms: of each candidate.
        agreements: of the same, with the baseline on the selection images.
    """
    kept: list[str] = []
    for name in sorted(times_ms, key=lambda name: (times_ms[name], -agreements[name])):
        if not kept:
            kept.append(name)
        elif agreements[name] > agreements[kept[-1]]:
            if times_ms[name] <= (1 + SAME_TIME) * times_ms[kept[-1]]:
                kept[-1] = name
            else:
                kept.append(name)
    return tuple(reversed(kept[:most]))


def walk(order: Sequence[T], passes: Callable[[T], bool]) -> list[T]:
    """Those that pass before the first that does not; what comes after it is not asked."""
    passed = []
    for item in order:
        if not passes(item):
            break
        passed.append(item)
    return passed
