"""What this CPU multiplies a second at most, by the native engine's own kernels."""

import ctypes

from ..errors import UsageError
from . import library
from .packed import TYPES, ProductType


def tflops(type: ProductType, threads: int, seconds: float) -> float:
    """Multiplications and additions, 1e12 a second, of operands that stay in the cores' own caches.

    Raises:
        MissingPackageError, BuildError: the library is not there and cannot be built.
        UsageError: numbers that are not taken.
    """
    found = ctypes.c_double()
    code = library.load().cnxt_peak(TYPES.index(type), threads, seconds, found)
    if code:
        raise UsageError(
            f"{type} products with {threads} threads for {seconds} s; expected 1 thread or more, up to 10 s"
        )
    return 2 * found.value / 1e3
