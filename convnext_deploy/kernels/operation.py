"""How an operation is told to PyTorch: one name, a Triton implementation, and its plain reference on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}  # of each operation, the one for a GPU


@dataclass(frozen=True)
class Launch:
    """A kernel and what it would have been launched with."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


@contextmanager
def recording(launches: list[Launch]) -> Iterator[None]:
    """Within it, kernels are not launched: they are added to the list."""
    token = _recorded.set(launches)
    try:
        yield
    finally:
        _recorded.reset(token)


def recorded() -> list[Launch] | None:
    """Where a launch is to be added instead of being made."""
    return _recorded.get()


def wrap_triton(kernel: Any) -> Any:
    """PyTorch's `wrap_triton`, or what records. PyTorch looks for this name in the source of an operation."""
    launches = recorded()
    return torch.library.wrap_triton(kernel) if launches is None else _Recorder(kernel, launches)


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel = kernel
        self._launches = launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self._launches.append(Launch(self._kernel, arguments, options))


def operation(
    name: str, triton: Callable[..., Any], cpu: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """`convnext_deploy::<name>`.

    Args:
        triton: the implementation for a GPU; its annotations are the operation's. torch.compile and AOTInductor look
            into it and compile its kernels themselves; torch.export keeps the name.
        cpu: the reference, with the same arguments, so that a module rewritten to operations runs without a GPU.
        fake: the shapes and types of what it returns.
    """
    IMPLEMENTATIONS[name] = triton
    registered: Any = triton_op(f"convnext_deploy::{name}", triton, mutates_args=())
    registered.register_kernel("cpu")(cpu)
    registered.register_fake(fake)
    return registered


def shaped(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor on the device of another, and of its type unless told otherwise."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def sum_type(x: Tensor) -> torch.dtype:
    """The type of what is accumulated from x: fp32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
