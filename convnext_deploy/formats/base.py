"""What a deployable format is: a record of facts and two functions."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.readback import Contents
from ..artifact.session import RunOptions, Session
from ..quantization.eight_bits import EightBits
from ..records.base import Device, Precision, Task
from ..records.manifest import ExportRequest, Manifest
from ..records.plan import Plan

if TYPE_CHECKING:  # it needs torch, and a format that only loads may not
    from torch import nn

    from ..graph.capture import DeployGraph
    from ..models.convnext import ConvNeXt

StandIn = Callable[[Manifest], Session]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Each file of `convnext_deploy.formats` defines one, called FORMAT.

    `build` writes its files into a folder; `load` opens that folder again. Where the machine can build but not run
    (an engine without its GPU), `build` returns a function that makes a stand-in: a session that runs what was built
    from, to verify with, and says so in `Session.stands_in`.
    """

    name: str
    summary: str
    suffix: str  # of the main file, which is always called model<suffix>
    runtime: str
    requires: tuple[str, ...]  # import names that load needs
    build_requires: tuple[str, ...]  # and those that build needs beside them
    extra: str | None  # the pip extra that installs its runtime; None where the base installation does
    runs_code: bool  # opening an artifact runs code that it brings, so that whoever made it has to be trusted
    precisions: frozenset[Precision]
    devices: frozenset[Device]
    # What networks it takes: the head of a segmenter has operations that not every runtime here has.
    tasks: frozenset[Task] = frozenset({"classify", "embed", "features"})
    typed_graph: bool  # precision is a property of the built graph; if not, the runtime decides when it loads it
    build: Callable[["DeployGraph", Path], StandIn | None]
    load: Callable[[Path, Manifest, RunOptions], Session]
    read_back: Callable[[Path], Contents] | None = None  # what the built files hold; None where none can be read
    # Raises for what else it cannot do, before any work.
    refuse: Callable[[ExportRequest, Plan | None], None] | None = None
    ready: Callable[[], str] = lambda: "ready"  # how, in a few words; raises MissingPackageError where it cannot build
    # The network in the form that it captures: the last rewrite before the graph is frozen.
    rewrite: "Callable[[ConvNeXt], nn.Module] | None" = None
    own_network: bool = False  # what it contains is this package's ConvNeXt, and no other model
    kernels: bool = False  # can run `convnext_deploy.kernels`
    cuda_graphs: bool = False  # its session replays a captured CUDA graph where it is told to
    ahead_of_time: bool = False  # built from a graph on the CPU, whatever device it is for
    eight_bits: EightBits | None = None  # how it computes what a plan quantizes; None: it takes no such plan
    bf16_features: frozenset[str] = frozenset()  # CPU features, any of which makes its bf16 faster than its fp32
    benched: frozenset[Device] = frozenset()  # where `bench` takes it without being told to
    optimized: frozenset[Device] = frozenset()  # where `optimize` tries it without being told to
    builds_in: float = 1.0  # about so many times as long as the checkpoint takes to load: for the time that is left
