"""What others make of the same checkpoint: timm's own export, and onnxruntime's quantizers on any ONNX file."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from convnext_deploy.records.manifest import ModelSpec

LINEARS = ["MatMul", "Gemm"]
BATCH = 8  # images at once where ranges are collected


def export_timm(checkpoint: Path | None, spec: ModelSpec, path: Path) -> None:
    """timm's module as torch.onnx exports it, with an open batch; random weights where there is no checkpoint."""
    shape = {"in_chans": spec.in_chans, "num_classes": spec.num_classes}
    if spec.architecture == "custom":
        model: torch.nn.Module = timm.models.convnext.ConvNeXt(
            depths=spec.depths, dims=spec.dims, ls_init_value=1.0 if spec.layer_scale else None, use_grn=spec.grn,
            **shape,
        )  # fmt: skip
    else:
        model = timm.create_model(spec.architecture, **shape)
    if checkpoint is not None:
        model.load_state_dict(load_file(checkpoint))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), (torch.zeros(2, spec.in_chans, *spec.image_size),), str(path), dynamo=True, opset_version=20,
            input_names=["images"], output_names=["logits"], external_data=False, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=256)},),
        )  # fmt: skip


def quantize_static(source: Path, images: NDArray[np.float32], path: Path, linears: bool) -> None:
    """onnxruntime's: min-max ranges, unsigned activations, weights by channel, its own placement."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self.batches = iter(np.split(images, range(BATCH, len(images), BATCH)))

        def get_next(self) -> dict[str, Any] | None:
            chunk = next(self.batches, None)
            return None if chunk is None else {"images": chunk}

    quantize(
        source, path, Reader(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        op_types_to_quantize=LINEARS if linears else None,
    )  # fmt: skip


def quantize_dynamic(source: Path, path: Path) -> None:
    """onnxruntime's: the linears, with scales that each batch's own values give."""
    from onnxruntime.quantization import quantize_dynamic as quantize

    quantize(source, path, op_types_to_quantize=LINEARS, per_channel=True)
