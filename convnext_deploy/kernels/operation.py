"""How an operation is told to PyTorch: one name, a Triton implementation, and its plain reference on the CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op


def operation(
    name: str, triton: Callable[..., Any], cpu: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """`convnext_deploy::<name>`.

    Args:
        triton: the implementation for a GPU; its annotations are the operation's. torch.compile and AOTInductor look
            into it and compile its kernels themselves; torch.export keeps the name.
        cpu: the reference, with the same arguments, so that a module rewritten to operations runs without a GPU.
        fake: the shapes and types of what it gives.
    """
    made: Any = triton_op(f"convnext_deploy::{name}", triton, mutates_args=())
    made.register_kernel("cpu")(cpu)
    made.register_fake(fake)
    return made


def shaped(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor on the device of another, and of its type unless told otherwise."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def sum_type(x: Tensor) -> torch.dtype:
    """The type of what is accumulated from x: fp32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
