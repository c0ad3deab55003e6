"""Every Triton kernel that a model will launch, compiled in processes of their own before the first step.

A kernel takes from one to 23 seconds, so that in series a network takes minutes. What is compiled goes to Triton's
cache on disk, where the first launch finds it. The machines that compile need no GPU and take none of its memory.
"""

import contextlib
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .. import env
from ..errors import BuildError
from ..processes import end_with, import_path, python
from .nvrtc import Kernel, cubin
from .operation import IMPLEMENTATIONS, Launch, recording

Target = tuple[int, int]  # compute capability


@dataclass(frozen=True, order=True)
class Variant:
    """One compilation: a kernel, the types of its run-time arguments, and its constants and launch options."""

    kernel: str  # module:name
    arguments: tuple[str | int | float | None, ...]  # a type's name for a tensor
    options: tuple[tuple[str, Any], ...]

    @property
    def cost(self) -> int:
        """What to begin with: the convolution takes longest, in proportion to its rows."""
        return int(dict(self.options).get("ROWS", 1)) * self.kernel.count("dwconv")

    def loaded(self) -> Any:
        module, _, name = self.kernel.partition(":")
        return getattr(importlib.import_module(module), name)


def variants(call: Callable[..., Any], *inputs: Tensor) -> tuple[Variant | Kernel, ...]:
    """What a rewritten model, or a function of this package's operations, launches for such inputs, each once.

    Nothing is computed and no memory is taken. The launch records are the ones of the inputs' device.
    """
    launches: list[Launch] = []
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes, torch.no_grad():
        likes = [fakes.from_tensor(tensor) for tensor in inputs]
        with recording(launches), _Implementations():  # type: ignore[no-untyped-call]  # torch has no stub for it
            call(*likes)
    selection = {launch.kernel if isinstance(launch.kernel, Kernel) else _variant(launch) for launch in launches}
    return tuple(sorted(selection, key=lambda one: (-one.cost, str(one))))


class _Implementations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no stub for it
    """Runs what Triton would, where an operation of this package is called, instead of its shapes alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "convnext_deploy":
            return IMPLEMENTATIONS[func.name().partition("::")[2].partition(".")[0]](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _variant(launch: Launch) -> Variant:
    kernel = launch.kernel.fn
    arguments = (str(a.dtype) if isinstance(a, Tensor) else a for a in launch.arguments)
    return Variant(f"{kernel.__module__}:{kernel.__name__}", tuple(arguments), tuple(sorted(launch.options.items())))


def prebuild(
    selection: Iterable[Variant | Kernel], target: Target, say: Callable[[str], None] = lambda _: None
) -> dict[str, int]:
    """Compile those that are not in Triton's cache, in as many processes as there are cores.

    Kernels in CUDA C++ take a second or two each; they are compiled in threads, and stay in this process.

    Returns:
        How many were there ("cached") and how many were not ("compiled").

    Raises:
        BuildError: a kernel does not compile; the others have been.
    """
    selection = tuple(selection)
    own = [kernel for kernel in selection if isinstance(kernel, Kernel)]
    marks = {variant: _mark(variant, target) for variant in selection if isinstance(variant, Variant)}
    missing = [variant for variant, mark in marks.items() if not mark.exists()]
    failed = {}
    if own:
        say(f"compiling {len(own)} kernels in CUDA C++")
        with ThreadPoolExecutor(min(len(own), env.usable_cores())) as pool:
            list(pool.map(cubin, own))
    if missing:
        count = min(len(missing), env.usable_cores())
        say(f"compiling {len(missing)} kernels in {count} processes; they stay in Triton's cache")
    for done, (variant, error) in enumerate(compiled(missing, target), 1):
        say(f"compiled {done} of {len(missing)} kernels: {variant.kernel.partition(':')[2]}")
        if error is None:
            marks[variant].parent.mkdir(parents=True, exist_ok=True)
            marks[variant].touch()
        else:
            failed[variant] = error
    if failed:
        variant, error = next(iter(failed.items()))
        raise BuildError(f"{len(failed)} of {len(missing)} kernels do not compile; first {variant.kernel}: {error}")
    return {"cached": len(marks) - len(missing), "compiled": len(missing) + len(own)}


def _mark(variant: Variant, target: Target) -> Path:
    """A file beside Triton's cache that says that it has this variant."""
    import triton

    text = json.dumps([triton.__version__, target, variant.loaded().cache_key, _plain(variant)])
    return Path(triton.knobs.cache.dir) / "convnext-deploy" / hashlib.sha256(text.encode()).hexdigest()


def _plain(variant: Variant) -> list[Any]:
    return [variant.kernel, variant.arguments, variant.options]


def compiled(
    variants: Iterable[Variant], target: Target, processes: int | None = None
) -> Iterator[tuple[Variant, str | None]]:
    """Each variant as soon as it is compiled, with what went wrong, or None."""
    left: SimpleQueue[Variant] = SimpleQueue()
    done: SimpleQueue[tuple[Variant, str | None]] = SimpleQueue()
    expected = 0
    for expected, variant in enumerate(variants, 1):  # noqa: B007 - the last number is how many there are
        left.put(variant)
    children: list[subprocess.Popen[str]] = []
    count = min(expected, processes or env.usable_cores())

    def work() -> None:
        command = python(f"from {__name__} import main; main()", *map(str, target))
        environment = import_path() | {"PYTHONWARNINGS": "ignore"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment, **pipes, start_new_session=True) as child:
            children.append(child)
            assert child.stdin is not None
            assert child.stdout is not None
            while (variant := _taken(left)) is not None:
                try:
                    child.stdin.write(json.dumps(_plain(variant)) + "\n")
                    child.stdin.flush()
                    answer = child.stdout.readline()
                except BrokenPipeError:
                    answer = ""
                ended = "" if answer else f"the compiling process ended with {child.wait()}"
                done.put((variant, ended or json.loads(answer)))

    with ThreadPoolExecutor(max(1, count)) as pool:
        workers = [pool.submit(work) for _ in range(count)]
        try:
            for _ in range(expected):
                yield done.get()
        finally:  # also where nobody takes the rest
            while _taken(left) is not None:
                pass
            for child in children:
                _kill(child)
    for worker in workers:
        worker.result()


def _kill(child: "subprocess.Popen[str]") -> None:
    """End it, and the assembler that it may have started."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.killpg(child.pid, signal.SIGKILL)


def _taken(left: "SimpleQueue[Variant]") -> Variant | None:
    try:
        return left.get_nowait()
    except Empty:
        return None


# In the compiling process ---------------------------------------------------------------------------------------------


class _AbsentGpu:
    """As much of Triton's driver as a compilation asks for."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", target[0] * 10 + target[1], 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_one(variant: Variant) -> None:
    """As a launch would, but for the launch: so that Triton's key of it is the launch's."""
    from triton.runtime.jit import MockTensor

    arguments = [
        MockTensor(getattr(torch, argument.removeprefix("torch."))) if isinstance(argument, str) else argument
        for argument in variant.arguments
    ]
    variant.loaded().warmup(*arguments, grid=(1,), **dict(variant.options))


def main() -> None:
    from triton.runtime import driver

    major, minor = map(int, sys.argv[1:])
    driver.set_active(_AbsentGpu((major, minor)))
    end_with(sys.stdin.fileno())  # the parent's pipe: also in the middle of a compilation
    for line in sys.stdin:
        kernel, arguments, options = json.loads(line)
        error = None
        try:
            compile_one(Variant(kernel, tuple(arguments), tuple(map(tuple, options))))
        except Exception as failure:  # whatever the compiler raises is the answer
            error = f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
        print(json.dumps(error), flush=True)
