"""When Python's garbage collector works while the tests run. `conftest.py` imports this file before all that is large.

Until everything is collected it does not work: what imports make stays to the end. Then it looks less often, and never
again at what outlived a test: modules mostly. Of the CPU time of an export it took a quarter.
"""

import gc

gc.disable()


def begin() -> None:
    """Leave what there is to the end, and look at what comes."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()


def full_collections() -> int:
    return gc.get_stats()[2]["collections"]


def keep_what_stays(before: int) -> None:
    """After a test in which all objects were looked at, as each export does at its end: not at the same ones again.

    Args:
        before: the test, the number of full collections.
    """
    if full_collections() > before:
        gc.collect()
        gc.freeze()
