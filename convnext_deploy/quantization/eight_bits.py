"""What a format says of its arithmetic in 8 bits; everything that quantizes for a format asks this record."""

from dataclasses import dataclass

from ..records.base import Precision
from ..records.plan import OperationType


@dataclass(frozen=True, slots=True, kw_only=True)
class EightBits:
    """How a format computes the matrix products that a plan quantizes for it."""

    int8: OperationType  # what its products take: u8s8 is what x86 multiplies, s8s8 what GPUs do, without zero points
    fp8: bool = False  # it takes E4M3 too
    rest: Precision = "fp32"  # the type of everything else, where none is asked for
    scales_in_rest: bool = False  # the scales in its graph have the type of the rest
    convolutions: bool = False  # it runs a convolution in 8 bits as it is; else it gets a matrix product over patches
    gelu_tanh: bool = False  # GELU's tanh form is faster in it, where 8 bits hide the difference
    family: str | None = None  # formats of one family compute the same: a plan for one is a plan for the other
    saturates: bool = False  # on x86 without VNNI it adds u8 by s8 in 16 bits, and cannot be told to do otherwise

    def computes_as(self, other: "EightBits | None") -> bool:
        """Whether a plan for the other is a plan for this one too."""
        return other is not None and self.family is not None and self.family == other.family
