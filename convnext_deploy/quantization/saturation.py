"""Where 8-bit products are not exact: u8 by s8 on x86 without VNNI, and what each runtime does about it.

Before VNNI, x86 multiplies u8 by s8 with `vpmaddubsw`, which adds two products in 16 bits and saturates: 255 * 127 * 2
is 64,770, and 32,767 is the largest sum that fits. With weights of 7 bits (at most 64 in magnitude) the largest is
255 * 64 * 2 = 32,640, and nothing saturates. So a plan that is made on such a machine gets weights of 7 bits, for every
format. With 8 bits ONNX Runtime has an option that multiplies exactly and more slowly, OpenVINO has none, and this
package's engine widens to 16 bits where it has to, which is slower too.
"""

import platform
from collections.abc import Collection

from .. import env
from ..records.plan import OperationType, Plan, QuantizationRecord, WeightBits
from .eight_bits import EightBits

WEIGHT_LIMITS: dict[WeightBits, int] = {8: 127, 7: 64}  # largest magnitude of a weight's code
EXACT_FEATURES = {"avx512_vnni", "avx_vnni", "amx_int8"}  # any of these adds in 32 bits
ORT_OPTION = "session.x64quantprecision"  # a session option of ONNX Runtime; "1" makes u8 by s8 exact


def saturates() -> bool:
    """Whether this machine multiplies u8 by s8 with saturation: x86-64 without VNNI, or that does not tell.

    `/proc/cpuinfo` says it; where that is absent, the answer that is safe is taken.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and not EXACT_FEATURES & env.cpu_features()


def bits_for(type: OperationType, saturating: bool) -> WeightBits:
    """The weights' bits that every runtime multiplies exactly on a machine, and those that can, fast.

    Args:
        saturating: what `saturates` says there.
    """
    return 7 if type == "u8s8" and saturating else 8


def in_danger(record: Plan | QuantizationRecord | None) -> bool:
    """Whether an artifact's products can saturate on this machine, if its runtime does nothing about it."""
    return record is not None and "u8s8" in record.types and record.weight_bits == 8 and saturates()


def refusal(title: str, record: Plan | QuantizationRecord | None) -> str | None:
    """Why a plan cannot run as it says on this machine, and the cure; None where it can, or where nobody knows.

    Args:
        title: of the runtime, one that saturates.
    """
    if not in_danger(record) or not env.cpu_features():
        return None
    return (
        f"{title} multiplies 8 bits with 16-bit saturation on this CPU (x86 without VNNI), and the plan's weights use "
        f"all 8 bits: its outputs would be wrong; {CURE}"
    )


CURE = "run quantize again with --weight-bits 7, or with --target native, which is exact on every CPU"


def cause(eight_bits: EightBits | None, record: QuantizationRecord | None) -> str | None:
    """What may explain outputs that are far from the simulation, and the cure; None where it cannot be this."""
    if eight_bits is not None and eight_bits.saturates and in_danger(record):
        return f"8-bit products may saturate at 16 bits on this CPU; {CURE}"
    return None


def elsewhere(record: Plan | QuantizationRecord) -> str | None:
    """What others see who open the file on x86 without VNNI with a runtime that saturates; None where it is exact."""
    simulation = record.saturation
    if simulation is None:
        return None
    line = (
        "where a runtime of others adds 8-bit products in 16 bits (x86 without VNNI): relative error "
        f"{simulation.relative_error:.2g} in the place of {simulation.relative_error_without:.2g}"
    )
    if simulation.changed is not None and simulation.changed_without is not None:
        points = 100 * (simulation.changed - simulation.changed_without) / simulation.images
        line += f", about {max(0.0, points):.0f} points of agreement lost on {simulation.images} images"
    return f"{line}; `quantize --weight-bits 7` prevents it"


def words(formats: Collection[str]) -> str:
    """For `doctor`.

    Args:
        formats: that saturate.
    """
    if not saturates():
        return "exact here; quantize uses weights of 8 bits"
    return (
        "u8 by s8 saturates at 16 bits here (no VNNI); quantize uses weights of 7 bits, which are exact and fast. "
        f"Plans with 8 bits: refused for {', '.join(formats)}; slower in native, and in onnxruntime with {ORT_OPTION}=1"
    )
