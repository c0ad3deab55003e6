"""timm's models beside ConvNeXt: built and verified as any export is, or as timm has them; runs in workers."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from .. import formats
from ..accuracy.probes import Probe
from ..artifact import manifest
from ..artifact.session import RunOptions, Session
from ..data import preprocess
from ..errors import UsageError
from ..graph.capture import DeployGraph
from ..models.baseline_detectors import BaselineDetector
from ..models.baselines import Baseline, preprocessing_of
from ..models.parameters import tensors_sha256
from ..records.base import Device, content_of
from ..records.manifest import ExportSpec, WeightsRecord
from ..runtimes.torch_session import TorchSession
from . import build
from .caches import BASELINE_NAME
from .contenders import Wanted

PROBES = 4


def build_baseline(want: dict[str, Any]) -> None:
    """Build one of timm's models in a format, and compare it with timm's own outputs.

    Raises:
        UsageError: the format cannot hold it.
        CheckFailed: what was built computes something else, or in another type.
    """
    order = msgspec.convert(want, Wanted)
    fmt = formats.get(order.runtime)
    formats.require(fmt)
    if fmt.own_network:
        raise UsageError(f"format {fmt.name} takes ConvNeXt only; {order.model} runs as torch, onnx or openvino")
    if order.precision not in fmt.precisions:
        raise UsageError(f"format {fmt.name} has no {order.precision}; it has {', '.join(sorted(fmt.precisions))}")
    with manifest.staged(order.folder, marker=BASELINE_NAME) as folder:
        parts = build.built(fmt, _prepared(order, typed_graph=fmt.typed_graph, on_cpu=fmt.ahead_of_time), folder)
        record = build.verified(fmt, parts, folder, order.folder, own=False)
        (folder / BASELINE_NAME).write_bytes(manifest.encode(record))
    build.remember(fmt, order.folder, BASELINE_NAME, lambda _: None)  # where it cannot, the next run builds again


def _prepared(request: Wanted, *, typed_graph: bool, on_cpu: bool) -> build.Prepared:
    """timm's module in the asked type, with its outputs in fp32."""
    spec = ExportSpec(format=request.runtime, precision=request.precision, batch=request.batch, device=request.device)
    source = Baseline(request.model, request.image_size, request.task)
    pixels = preprocess.probe_images(3, request.image_size, PROBES)
    images = preprocess.as_input(pixels, preprocessing_of(request.model), spec.input)
    expected = tuple(x.numpy() for x in _expected(source, torch.from_numpy(images)))
    module = Baseline(request.model, request.image_size, request.task, request.precision if typed_graph else "fp32")
    example = torch.from_numpy(images[np.arange(max(2, request.batch.opt)) % PROBES])
    place = "cpu" if on_cpu else request.device
    return build.Prepared(
        graph=DeployGraph(module=module.to(place), export=spec, example=example.to(place)),
        sets=(Probe("bundled", pixels, expected),),
        weights=_weights_of(module),
        preprocessing=preprocessing_of(request.model),
    )


def _expected(source: Baseline, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What verification compares with: outputs, or a detector's candidates."""
    with torch.inference_mode():
        outputs = source.body.candidates(images) if isinstance(source.body, BaselineDetector) else source(images)
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs


def _weights_of(module: Baseline) -> WeightsRecord:
    return WeightsRecord(
        source="random", layout="timm", random=True, tensors_sha256=tensors_sha256(module.state_dict())
    )


def open_baseline(path: str, device: Device, threads: int | None) -> Session:
    """A session of what `build_baseline` wrote."""
    folder = Path(path)
    record = manifest.decode(content_of(folder / BASELINE_NAME), str(folder / BASELINE_NAME))
    # Built in this run, or found in the record of what this user built (see `contenders.built`).
    return formats.opened(manifest.Artifact(folder, record), RunOptions(device=device, threads=threads), trust=True)


def open_timm(want: dict[str, Any], threads: int | None) -> Session:
    """A session of timm's own module: as it comes, or through torch.compile, which compiles at the first inference.

    On a GPU images and weights are channels_last, and torch.compile looks for the fastest kernels.
    """
    order = msgspec.convert(want, Wanted)
    module = Baseline(order.model, order.image_size, order.task, order.precision)
    spec = ExportSpec(format="eager", precision=order.precision, batch=order.batch, device=order.device)
    record = build.described(module.spec, spec, _weights_of(module), preprocessing_of(order.model))
    call: Any = module.to(order.device)
    if order.device == "cuda":
        call = module.to(memory_format=torch.channels_last)
    if order.runtime == "torch.compile":
        call = torch.compile(call, dynamic=False, mode="max-autotune" if order.device == "cuda" else None)
    return TorchSession(call, record, RunOptions(device=order.device, threads=threads))
