"""Which of TensorRT and TensorRT-RTX, and for which GPUs."""

import re
from typing import Any, Literal

from ... import env
from ...errors import MissingPackageError, UsageError

Name = Literal["tensorrt", "tensorrt_rtx"]
TITLES: dict[Name, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
NO_GPU = "TensorRT builds on the GPU it builds for, and there is none here; use --trt rtx"

# Compute capability by the name people give the GPU: NVIDIA's page "CUDA GPU Compute Capability"
# (https://developer.nvidia.com/cuda-gpus), and for T4, A30 and the RTX 20 series its legacy list; read on 2026-11-27.
COMPUTE_CAPABILITIES = {
    "t4": 75, "rtx2060": 75, "rtx2070": 75, "rtx2080": 75,
    "a100": 80, "a30": 80,
    "a2": 86, "a10": 86, "a16": 86, "a40": 86, "rtxa6000": 86, "rtx3060": 86, "rtx3070": 86, "rtx3080": 86,
    "rtx3090": 86,
    "orin": 87,
    "l4": 89, "l40": 89, "l40s": 89, "rtx4060": 89, "rtx4070": 89, "rtx4080": 89, "rtx4090": 89, "rtx6000ada": 89,
    "h100": 90, "h200": 90, "gh200": 90,
    "b200": 100, "gb200": 100, "b300": 103, "gb300": 103, "t5000": 110,
    "rtx5060": 120, "rtx5070": 120, "rtx5080": 120, "rtx5090": 120, "rtxpro6000": 120, "gb10": 121,
}  # fmt: skip


def choose(choice: str) -> tuple[Name, str]:
    """Which module `--format trt` means here, and why in one line.

    Args:
        choice: "tensorrt", "rtx", or "auto": TensorRT where it is installed beside a GPU, else TensorRT-RTX.

    Raises:
        UsageError: TensorRT was asked for by name and there is no GPU to build on.
        MissingPackageError: with the `pip install` to run.
    """
    if choice not in ("auto", "tensorrt", "rtx"):
        raise UsageError(f"--trt {choice}; expected auto, tensorrt or rtx")
    gpus = env.nvidia_gpus()
    absent = env.missing(("tensorrt", "tensorrt_rtx"))
    if choice == "tensorrt" or (choice == "auto" and gpus and "tensorrt" not in absent):
        if "tensorrt" in absent:
            raise MissingPackageError(env.missing_line("tensorrt"))
        if not gpus:
            raise UsageError(NO_GPU)
        return "tensorrt", f"TensorRT: {'asked for' if choice != 'auto' else f'installed, beside {gpus[0]}'}"
    if "tensorrt_rtx" in absent:
        first: Name = "tensorrt" if gpus and choice == "auto" else "tensorrt_rtx"
        raise MissingPackageError(env.missing_line(first))
    if choice == "rtx":
        return "tensorrt_rtx", "TensorRT-RTX: asked for"
    reason = "TensorRT is not installed" if gpus else "no NVIDIA GPU here, and TensorRT builds only on one"
    return "tensorrt_rtx", f"TensorRT-RTX ahead of time: {reason}"


def import_module(name: Name) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`."""
    if name == "tensorrt":
        with env.needs("tensorrt"):
            import tensorrt

            return tensorrt
    with env.needs("tensorrt_rtx"):
        import tensorrt_rtx

        return tensorrt_rtx


def targets_of(words: str) -> tuple[str, ...]:
    """`a100,rtx4090,sm80` as compute capabilities ("sm80", "sm89"), sorted.

    Raises:
        UsageError: a word that is neither a known GPU nor `sm` and a number.
    """
    targets = set()
    for word in filter(None, re.split(r"[,\s]+", words.lower())):
        plain = re.sub(r"[^a-z0-9]", "", word)
        numbered = re.fullmatch(r"sm(\d{2,3})", plain)
        number = int(numbered[1]) if numbered else COMPUTE_CAPABILITIES.get(plain)
        if number is None:
            raise UsageError(
                f"--trt-target {word} is not a known GPU; give its compute capability, such as sm80 for A100"
            )
        targets.add(number)
    if not targets:
        raise UsageError(f"--trt-target {words!r} names no GPU; expected for example a100,rtx4090")
    return tuple(f"sm{number}" for number in sorted(targets))


def known_targets(trt: Any) -> tuple[str, ...]:
    """Compute capabilities that this module can build for without their GPU; none for TensorRT."""
    listed = getattr(trt, "ComputeCapability", None)
    names = [] if listed is None else [name for name in listed.__members__ if name.startswith("SM")]
    return tuple(sorted((name.lower() for name in names), key=lambda name: int(name[2:])))
