"""What this CPU multiplies a second at most, by the instructions of the native engine's paths."""

import ctypes

from ..errors import UsageError
from . import library
from .packed import TYPES, ProductType


def gmacs_per_s(type: ProductType, threads: int, seconds: float, isa: str | None = None) -> float:
    """Multiply-accumulates, 1e9 a second, of registers: nothing is loaded.

    Without VNNI, int8 is what weights of 7 bits allow; those of 8 bits are slower (docs/design/native.md).

    Args:
        threads: at once; the result is that of all together.
        isa: one of `library.isas()`; None: `$CONVNEXT_DEPLOY_ISA`, or the best this CPU has.

    Raises:
        MissingPackageError, BuildError: the library is not there and cannot be built.
        UsageError: numbers or a path that are not taken.
    """
    isa = library.chosen_isa(isa)
    rate = ctypes.c_double()
    path = None if isa is None else isa.encode()
    code = library.load(isa).cnxt_peak(path, TYPES.index(type), threads, seconds, rate)
    if code:
        raise UsageError(
            f"{type} products with {threads} threads for {seconds} s; expected 1 thread or more, up to 10 s"
        )
    return rate.value
