"""A model repository for Triton Inference Server."""

import shutil
from pathlib import Path
from typing import Any

import msgspec

from ...artifact.manifest import Artifact
from ...env import needs
from ...errors import UsageError
from ...records.manifest import TensorRecord

# Triton's backend for each format, the platform where the backend has several, and whether it counts tensors instead
# of naming them.
BACKENDS = {
    "onnx": ("onnxruntime", "", False),
    "openvino": ("openvino", "", False),
    "tensorrt": ("tensorrt", "", False),
    "torchscript": ("pytorch", "", True),
    "aotinductor": ("pytorch", "torch_aoti", True),
}
VERSION = "1"
LABELS = "labels.txt"
DELAY_US = 500  # that the first image of a batch waits for others


def written(artifact: Artifact, name: str, folder: Path, *, instances: int, delay_us: int = DELAY_US) -> list[str]:
    """Write `name/config.pbtxt`, the class names and the model's files below a folder.

    Args:
        instances: of the model, that run at once.
        delay_us: microseconds that a request may wait for others.

    Returns:
        What whoever serves it has to know, a line each.

    Raises:
        UsageError: Triton has no backend for the format.
        MissingPackageError: tritonclient is not installed.
    """
    export = artifact.manifest.export
    if export.format not in BACKENDS:
        raise UsageError(
            f"{artifact.path} is of format {export.format}, for which Triton has no backend; it has some for "
            f"{', '.join(BACKENDS)} (or take --for docker)"
        )
    config = _config(artifact, name, instances, delay_us)
    model = folder / name
    (model / VERSION).mkdir(parents=True)
    for file in artifact.manifest.files:
        if file.path.startswith("model."):
            shutil.copyfile(artifact.path / file.path, model / VERSION / file.path)
    if artifact.manifest.labels:
        (model / LABELS).write_text("".join(f"{label}\n" for label in artifact.manifest.labels), "utf-8")
    with needs("google"):
        from google.protobuf import text_format
    (model / "config.pbtxt").write_text(text_format.MessageToString(config), "utf-8")
    notes = [f"tritonserver --model-repository {{out}}  # serves it as {name}"]
    if export.format == "tensorrt":
        notes.append("# the server's TensorRT has to be of the version that the engine was built with")
    return notes


def _config(artifact: Artifact, name: str, instances: int, delay_us: int) -> Any:
    """The model's configuration, as Triton's own message."""
    with needs("grpc"):
        import grpc  # noqa: F401 - without it tritonclient raises an error of its own
    with needs("tritonclient"):
        from tritonclient.grpc import model_config_pb2 as triton

    manifest = artifact.manifest
    export, batch = manifest.export, manifest.export.batch
    backend, platform, counted = BACKENDS[export.format]
    main = next(file.path for file in manifest.files if file.path.startswith("model."))
    if export.format == "openvino":
        main = "model.xml"
    batched = batch.min == 1 and batch.max > 1
    dtypes = {"float32": triton.TYPE_FP32, "uint8": triton.TYPE_UINT8, "int32": triton.TYPE_INT32}
    config = triton.ModelConfig(
        name=name, backend=backend, platform=platform, max_batch_size=batch.max if batched else 0,
        default_model_filename=main,
    )  # fmt: skip

    def dims(record: TensorRecord) -> list[int]:
        sizes = [side if isinstance(side, int) else -1 for side in record.shape]
        if not batched:
            return [batch.min if batch.min == batch.max else -1, *sizes[1:]]
        return sizes[1:]

    for index, record in enumerate(manifest.inputs):
        config.input.add(
            name=f"INPUT__{index}" if counted else record.name, data_type=dtypes[record.dtype], dims=dims(record)
        )
    for index, record in enumerate(manifest.outputs):
        labelled = manifest.labels is not None and manifest.model.task == "classify"
        config.output.add(
            name=f"OUTPUT__{index}" if counted else record.name,
            data_type=dtypes[record.dtype],
            dims=dims(record),
            label_filename=LABELS if labelled else "",
        )
    if batched:
        config.dynamic_batching.max_queue_delay_microseconds = delay_us
        config.dynamic_batching.preferred_batch_size.extend([batch.opt] if 1 < batch.opt <= batch.max else [])
    kind = triton.ModelInstanceGroup.KIND_CPU if export.device == "cpu" else triton.ModelInstanceGroup.KIND_GPU
    config.instance_group.add(count=instances, kind=kind)
    config.version_policy.latest.num_versions = 1
    height, width = manifest.model.image_size
    for size in sorted({1, batch.opt}) if batched else [0]:
        warm_up = config.model_warmup.add(name=f"batch {size}", batch_size=size)
        for record, given in zip(manifest.inputs, config.input, strict=True):
            sides = {"height": height, "width": width, "batch": batch.min}
            shape = [side if isinstance(side, int) else sides.get(side, 1) for side in record.shape]
            warm_up.inputs[given.name].CopyFrom(
                triton.ModelWarmup.Input(
                    data_type=given.data_type, dims=shape[1:] if batched else shape, zero_data=True
                )
            )
    for key, value in (
        ("artifact_sha256", artifact.sha256),
        ("preprocessing", msgspec.json.encode(manifest.preprocessing).decode()),
    ):
        config.parameters[key].string_value = value
    return config
