"""The Open Inference Protocol, version 2, over HTTP: tensors in JSON, or in bytes behind it (binary tensor extension).

The header `Inference-Header-Content-Length` says how many bytes of a body are JSON. Inputs and outputs with the
parameter `binary_data_size` follow in their order, as little-endian values.
"""

import math
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..arguments import shown
from ..artifact.batches import Images, check_images
from ..errors import InputError
from ..records.manifest import Manifest, TensorRecord
from .batching import Outputs

HEADER = "inference-header-content-length"
VERSION = "1"  # of every model: an artifact's own version is its SHA-256
DTYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1"), "INT32": np.dtype("<i4")}
NAMES = {"float32": "FP32", "uint8": "UINT8", "int32": "INT32"}


class RequestTensor(msgspec.Struct):
    name: str
    shape: list[int] | None = None
    datatype: str = ""
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class InferRequest(msgspec.Struct):
    """A request's JSON. What it has beside these fields is not read, as the protocol has it."""

    inputs: list[RequestTensor]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[RequestTensor] | None = None


def parsed(body: bytes, header: str | None, manifest: Manifest) -> tuple[InferRequest, Images]:
    """A request and its images, in the layout and type that the artifact takes. They may be a view of the body.

    Args:
        header: the value of `HEADER`.

    Raises:
        InputError: one line.
    """
    size = len(body)
    if header is not None:
        if not header.isdecimal() or len(header) > 12 or int(header) > len(body):
            raise InputError(f"{HEADER} {header[:20]!r}; expected at most the {len(body)} bytes of the body")
        size = int(header)
    try:
        request = msgspec.json.decode(memoryview(body)[:size], type=InferRequest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the body is no inference request: {error}") from None
    return request, images_of(request, memoryview(body)[size:], manifest)


def images_of(request: InferRequest, rest: memoryview, manifest: Manifest) -> Images:
    """The images of a request, of which all is looked at.

    Args:
        rest: the bytes behind it.

    Raises:
        InputError: one line.
    """
    expected = manifest.inputs[0]
    if len(request.inputs) != 1 or request.inputs[0].name != expected.name:
        names = ", ".join(shown(tensor.name) for tensor in request.inputs[:8]) or "none"
        raise InputError(f"inputs {names}; expected one, {expected.name}")
    images = _tensor(request.inputs[0], rest, NAMES[expected.dtype])
    check_images(images, manifest)
    outputs(request, manifest)
    return images


def _tensor(tensor: RequestTensor, rest: memoryview, datatype: str) -> NDArray[Any]:
    if tensor.datatype != datatype:
        raise InputError(f"input {tensor.name} has datatype {tensor.datatype[:20]!r}; expected {datatype}")
    shape = tensor.shape or []
    if len(shape) != 4 or any(side < 1 or side > 2**31 for side in shape):
        raise InputError(f"input {tensor.name} has shape {shown(shape)}; expected 4 sizes of at least 1")
    count, dtype = math.prod(shape), DTYPES[datatype]
    if "binary_data_size" in tensor.parameters:
        size = tensor.parameters["binary_data_size"]
        if size != len(rest) or size != count * dtype.itemsize:
            raise InputError(
                f"input {tensor.name} has binary_data_size {shown(size)} and {len(rest)} bytes behind the JSON; "
                f"shape {shape} of {datatype} has {count * dtype.itemsize}"
            )
        return np.frombuffer(rest, dtype).reshape(shape)
    if tensor.data is None:
        raise InputError(f"input {tensor.name} has neither data nor binary_data_size")
    try:
        wide = np.array(tensor.data, np.float64)  # numbers in any nesting
        if wide.size != count:
            raise InputError(f"input {tensor.name} has {wide.size} values; shape {shape} has {count}")
        if datatype == "UINT8" and not ((wide >= 0) & (wide <= 255) & (wide == np.floor(wide))).all():
            raise InputError(f"input {tensor.name} has values that are no whole numbers from 0 to 255")
        with np.errstate(over="ignore"):  # becomes infinite, which is refused
            return wide.reshape(shape).astype(dtype)
    except (ValueError, TypeError, OverflowError):  # the last: a whole number of 400 digits
        raise InputError(f"input {tensor.name} has data that are not numbers in equal rows") from None


def outputs(request: InferRequest, manifest: Manifest) -> list[tuple[int, TensorRecord, bool]]:
    """Which outputs are asked for: their places, and whether in bytes.

    Raises:
        InputError: there is none of that name.
    """
    binary = bool(request.parameters.get("binary_data_output", False))
    places = {record.name: place for place, record in enumerate(manifest.outputs)}
    if not request.outputs:
        return [(place, record, binary) for place, record in enumerate(manifest.outputs)]
    names = []
    for asked in request.outputs:
        if asked.name not in places:
            raise InputError(f"output {asked.name[:40]!r}; expected one of {', '.join(places)}")
        if "classification" in asked.parameters:
            raise InputError(
                "the classification extension is not served; POST /classify returns names and probabilities"
            )
        place = places[asked.name]
        names.append((place, manifest.outputs[place], bool(asked.parameters.get("binary_data", binary))))
    return names


def answered(name: str, request: InferRequest, manifest: Manifest, results: Outputs) -> tuple[bytes, dict[str, str]]:
    """The body of an answer, and its headers."""
    listed, raw = [], []
    for place, record, binary in outputs(request, manifest):
        values = results[place]
        type = NAMES[record.dtype]
        tensor: dict[str, Any] = {"name": record.name, "datatype": type, "shape": list(values.shape)}
        if binary:
            content = values.astype(DTYPES[type], copy=False).tobytes()
            tensor["parameters"] = {"binary_data_size": len(content)}
            raw.append(content)
        else:
            tensor["data"] = values.ravel().tolist()
        listed.append(tensor)
    document: dict[str, Any] = {"model_name": name, "model_version": VERSION, "outputs": listed}
    if request.id is not None:
        document["id"] = request.id
    head = msgspec.json.encode(document)
    if not raw:
        return head, {"content-type": "application/json"}
    return b"".join((head, *raw)), {"content-type": "application/octet-stream", HEADER: str(len(head))}


def metadata(name: str, manifest: Manifest) -> dict[str, Any]:
    """What a model takes and returns; -1 is any size."""

    def tensor(record: TensorRecord) -> dict[str, Any]:
        shape = [-1 if isinstance(side, str) else side for side in record.shape]
        return {"name": record.name, "datatype": NAMES[record.dtype], "shape": shape}

    return {
        "name": name,
        "versions": [VERSION],
        "platform": f"convnext-deploy_{manifest.export.format}",
        "inputs": [tensor(record) for record in manifest.inputs],
        "outputs": [tensor(record) for record in manifest.outputs],
    }
