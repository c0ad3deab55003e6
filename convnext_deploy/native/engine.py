"""One packed network, planned for one batch and image size, run through the C interface."""

import ctypes
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArtifactError, BuildError, InputError, UsageError
from . import library, packed
from .packed import TYPES, ProductType

OK, BAD_FILE, BAD_ARGUMENT, NO_MEMORY, NO_FILE, NO_THREADS, BUSY = range(7)
ERRORS = {BAD_FILE: ArtifactError, NO_FILE: ArtifactError, BAD_ARGUMENT: UsageError, BUSY: UsageError}
PARTS = ("stem", "dwconv_norm", "expand", "grn", "project", "downsample", "head", "features", "wait")
MESSAGE_BYTES = 512


@dataclass(frozen=True, slots=True)
class PartTime:
    """What one part of one operation took on the calling thread, which is one of the engine's."""

    name: str  # as a plan names it, where a plan can: `stages.2.0.expand`, `downsamples.0`; else `stages.2.0.wait`
    operation: int  # index in the file
    part: str  # one of `PARTS`; "wait": for the other threads
    type: ProductType | None  # of its product; None where it has none
    executed: ProductType | None  # what multiplied it here: bf16 is multiplied in fp32 by paths without bf16
    ms: float


class Network:
    """A packed network, opened: what engines for several batches share.

    Args:
        source: the packed file, or its bytes.
        isa: one of `library.isas()`; None: `$CONVNEXT_DEPLOY_ISA`, or the best this CPU has.

    Raises:
        ArtifactError: the file is missing or damaged.
        MissingPackageError, BuildError: the library is not there and cannot be built.
    """

    def __init__(self, source: Path | bytes | NDArray[np.uint8], isa: str | None = None) -> None:
        self.model = ctypes.c_void_p()
        self.isa = library.chosen_isa(isa)
        self.library = library.load(self.isa)
        self._bytes = None if isinstance(source, Path) else aligned(source)
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        if isinstance(source, Path):
            code = self.library.cnxt_model_open_file(os.fsencode(source), self.model, message, len(message))
        else:
            assert self._bytes is not None
            code = self.library.cnxt_model_open(
                self._bytes.ctypes.data, self._bytes.nbytes, self.model, message, len(message)
            )
        what = str(source) if isinstance(source, Path) else "the packed network"
        _check(code, message, f"{what}: ")
        self.names = packed.names(packed.kinds_in(source if isinstance(source, Path) else bytes(source[: 2**20])))

    def __del__(self) -> None:
        if getattr(self, "model", None):
            self.library.cnxt_model_close(self.model)


class Engine:
    """A session of the native engine. Bind a batch, run, read `outputs`; one thread at a time, others are refused.

    Any number of engines over one network may run at once, each in a thread of its own.

    Args:
        source: a network, or what one is made of; `isa` belongs to the latter.

    Raises:
        UsageError: a size or path that is not taken.
        What `Network` raises.
    """

    def __init__(
        self, source: Network | Path | bytes | NDArray[np.uint8], batch: int, height: int, width: int, threads: int,
        isa: str | None = None,
    ) -> None:  # fmt: skip
        self._session = ctypes.c_void_p()
        self._running = threading.Lock()
        assert not (isinstance(source, Network) and isa)
        self._network = source if isinstance(source, Network) else Network(source, isa)
        self._library, self.names = self._network.library, self._network.names
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        for name, value in (("batch", batch), ("height", height), ("width", width), ("threads", threads)):
            if not 0 <= value < 2**32:
                raise UsageError(f"{name} {value}; expected a positive number")
        isa = self._network.isa
        options = library.Options(batch, height, width, threads, None if isa is None else isa.encode())
        _check(
            self._library.cnxt_session_open(self._network.model, options, self._session, message, len(message)),
            message,
            "",
        )
        info = library.Info()
        self._library.cnxt_session_info(self._session, info)
        self.isa: str = self._library.cnxt_session_isa(self._session).decode()
        self.products = {name: int(count) for name, count in zip(TYPES, info.products, strict=True)}
        self.multiply_accumulates = {
            name: int(count) for name, count in zip(TYPES, info.multiply_accumulates, strict=True)
        }  # of one image, depthwise convolutions among those in fp32
        chans = int(info.in_chans)
        self.input_dtype = np.dtype(np.uint8 if info.input else np.float32)
        self.input_shape = (batch, height, width, chans) if info.input else (batch, chans, height, width)
        made = {
            i: np.zeros(
                (batch, info.channels[i]) + ((info.heights[i], info.widths[i]) if info.is_map else ()), np.float32
            )
            for i in range(info.outputs)
            if info.channels[i]
        }
        self.outputs: tuple[NDArray[np.float32], ...] = tuple(made.values())
        self._pointers = (ctypes.c_void_p * 4)(*(made[i].ctypes.data if i in made else None for i in range(4)))
        self._input: NDArray[Any] | None = None

    def bind(self, images: NDArray[Any]) -> None:
        """Use this batch, which is referenced: leave it unchanged until the next `bind`.

        Raises:
            InputError: another shape or type than the engine was made for.
        """
        if images.dtype != self.input_dtype or images.shape != self.input_shape:
            raise InputError(
                f"images are {images.dtype} {images.shape}; expected {self.input_dtype} {self.input_shape}"
            )
        content = np.ascontiguousarray(images)
        self._enter()
        self._input = content
        self._running.release()

    def run(self) -> None:
        """One inference of the bound batch into `outputs`, which the next one overwrites.

        Raises:
            UsageError: another thread is running this engine, it was closed, or the process was forked.
        """
        self._enter()
        try:
            _check(self._library.cnxt_session_run(self._session, self._bound(), self._pointers), None, FORKED)
        finally:
            self._running.release()

    def profile(self) -> tuple[PartTime, ...]:
        """`run`, and what each part of it took."""
        self._enter()
        try:
            return self._profiled()
        finally:
            self._running.release()

    def _profiled(self) -> tuple[PartTime, ...]:
        entries = (library.TimingEntry * (len(self.names) * len(PARTS)))()
        count = ctypes.c_size_t()
        code = self._library.cnxt_session_profile(
            self._session, self._bound(), self._pointers, entries, len(entries), ctypes.byref(count)
        )
        _check(code, None, FORKED)
        types: tuple[ProductType | None, ...] = (*TYPES, None)
        return tuple(
            PartTime(
                self._name(entry.operation, PARTS[entry.part]),
                entry.operation,
                PARTS[entry.part],
                types[entry.type],
                types[entry.executed],
                entry.ms,
            )
            for entry in entries[: count.value]
        )

    def _name(self, operation: int, part: str) -> str:
        inside = part in ("dwconv_norm", "expand", "grn", "project", "wait")
        return f"{self.names[operation]}.{part}" if inside else self.names[operation]

    def _bound(self) -> int:
        if self._input is None:
            raise InputError("no images are bound; call bind first")
        return self._input.ctypes.data

    def _enter(self) -> None:
        if not self._running.acquire(blocking=False):
            raise UsageError("another thread is running this engine; open one for each thread, over the same network")
        if not self._session:
            self._running.release()
            raise UsageError("the engine was closed; open another one over the same network")

    def close(self) -> None:
        """Release threads and memory, after the run that another thread may be in; the engine cannot be used again."""
        with self._running:
            if self._session:
                self._library.cnxt_session_close(self._session)
            self._session = type(self._session)()  # `ctypes` is gone already where Python's end closes it

    def __del__(self) -> None:
        if getattr(self, "_session", None):
            self.close()


FORKED = "this process was forked after the session was created, so it lacks the session's threads; create it anew"


def aligned(source: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy of some bytes that begins at a 64-byte boundary."""
    content = np.frombuffer(source, np.uint8) if isinstance(source, bytes) else source
    room = np.empty(content.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + content.nbytes]
    copy[:] = content
    return copy


def _check(code: int, message: "ctypes.Array[ctypes.c_char] | None", prefix: str) -> None:
    if code == OK:
        return
    line = prefix + (message.value.decode(errors="replace") if message is not None else "")
    raise ERRORS.get(code, BuildError)(line)
