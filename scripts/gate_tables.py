"""The tables of docs/design/gate.md: how many images a decision needs, and how often the gate decides what.

    python scripts/gate_tables.py

The chances are exact: summed over every number of lost and gained images that two such models can give.
"""

import bisect
from functools import partial
from statistics import NormalDist

import numpy as np
from scipy.stats import binom

from convnext_deploy.accuracy import statistics
from convnext_deploy.reports import markdown

LIMIT, ALPHA = 0.003, 0.05
DISCORDANCES = (0.003, 0.005, 0.01, 0.02, 0.03)
DROPS = (0.0, 0.0005, 0.001, 0.0015, 0.002)
IMAGES = (1000, 2000, 10_000, 50_000)
_TAIL = 1e-10  # probability of the counts that are left out at each end


def chances(images: int, discordance: float, drop: float) -> tuple[float, float, float]:
    """Probability of PASS, of FAIL, and of the PASS that Wald's interval would give."""
    lost_share, gained_share = (discordance + drop) / 2, (discordance - drop) / 2
    lost_share /= 1 - gained_share  # of the images that are not gained
    z = NormalDist().inv_cdf(1 - ALPHA)

    def wald_fails(gained: int, lost: int) -> bool:
        seen = (lost - gained) / images
        return not bool(seen + z * np.sqrt(((lost + gained) / images - seen**2) / images) <= LIMIT)

    def exceeds(bound: int, gained: int, lost: int) -> bool:
        return statistics.drop_bounds(lost, gained, images, ALPHA)[bound] > LIMIT

    passed = failed = wald = 0.0
    first, last = binom.ppf([_TAIL, 1 - _TAIL], images, gained_share).astype(int).tolist()
    for gained in range(first, last + 1):
        rest = images - gained
        counts = range(int(binom.ppf(1 - _TAIL, rest, lost_share)) + 1)
        weight = binom.pmf(gained, images, gained_share)
        # All three are monotone in the images lost, so the place where the answer changes says everything.
        most = bisect.bisect(counts, False, key=partial(exceeds, 1, gained))
        least = bisect.bisect(counts, False, key=partial(exceeds, 0, gained))
        most_wald = bisect.bisect(counts, False, key=partial(wald_fails, gained))
        passed += weight * binom.cdf(most - 1, rest, lost_share)
        failed += weight * binom.sf(least - 1, rest, lost_share)
        wald += weight * binom.cdf(most_wald - 1, rest, lost_share)
    return passed, failed, wald


def tables() -> str:
    return "\n\n".join((_needed(), _at_the_limit(), _power()))


def _needed() -> str:
    rows = [["discordance", *(f"drop {drop:.2%}".replace("%", "") for drop in DROPS)]]
    for discordance in DISCORDANCES:
        needed = [statistics.images_needed(discordance, drop, LIMIT, ALPHA) for drop in DROPS]
        rows.append([f"{discordance:.1%}", *(f"{number:,}" for number in needed)])
    return _markdown(rows)


def _at_the_limit() -> str:
    rows = [["images", "discordance", "false PASS", "false PASS of Wald's interval", "false FAIL"]]
    for images in IMAGES:
        for discordance in (0.003, 0.004, 0.01, 0.03):
            passed, failed, wald = chances(images, discordance, LIMIT)
            rows.append([f"{images:,}", f"{discordance:.1%}", f"{passed:.1%}", f"{wald:.1%}", f"{failed:.1%}"])
    return _markdown(rows)


def _power() -> str:
    rows = [["images", "discordance", *(f"drop {drop:.2%}".replace("%", "") for drop in (*DROPS, 0.006))]]
    for images in IMAGES[1:]:
        for discordance in (0.006, 0.01, 0.03):
            both = [chances(images, discordance, drop)[:2] for drop in (*DROPS, 0.006)]
            cells = [f"{passed:.0%} / {failed:.0%}" for passed, failed in both]
            rows.append([f"{images:,}", f"{discordance:.1%}", *cells])
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    return markdown.table(rows[0], rows[1:]).rstrip()


if __name__ == "__main__":
    print(tables())
