"""The Open Inference Protocol, version 2, over gRPC, with the messages and stubs that tritonclient brings."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as stubs

from .. import env
from ..errors import InputError, UsageError
from . import protocol
from .batching import Closed, Outputs, Refused, bare
from .model import Model
from .protocol import InferRequest, RequestTensor
from .requests import Refusal, authorize_header, timeout_s
from .service import Service

CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED, 404: grpc.StatusCode.NOT_FOUND, 504: grpc.StatusCode.DEADLINE_EXCEEDED
}  # fmt: skip
# Of several workers, each connection is one's: clients connect anew now and then, and so come to all of them. gRPC
# does that without losing a request.
AGE_MS = 30_000
REFUSED_S = 0.1  # that requests are refused before gRPC ends
OPEN = ("ServerLive", "ServerReady", "ModelReady")  # asked without the token

Context = Any  # grpc.aio's, which has no types
Answer = Callable[[Any, Context], Awaitable[Any]]


class Rpc:
    """A server for clients of gRPC beside the one for HTTP, in the same event loop.

    Args:
        where: HOST:PORT; port 0 takes a free one, which `port` is then.
        shared: siblings listen on the same port; the system spreads connections over them.

    Raises:
        UsageError: the address cannot be listened on.
    """

    def __init__(self, service: Service, where: str, *, shared: bool = False) -> None:
        self._service, self._leaving = service, False
        settings = {
            "grpc.max_receive_message_length": service.options.max_body_bytes,
            "grpc.so_reuseport": int(shared),  # another process must not share the port without a word
        }
        if shared:
            settings["grpc.max_connection_age_ms"] = AGE_MS
        self._server = grpc.aio.server(options=list(settings.items()))
        servicer = stubs.GRPCInferenceServiceServicer()
        for answer in (
            self._live, self._ready, self._model_ready, self._metadata, self._model_metadata, self._index, self._infer
        ):  # fmt: skip
            name = _NAMES[answer.__name__]
            setattr(servicer, name, self._wrapped(name, answer))
        stubs.add_GRPCInferenceServiceServicer_to_server(servicer, self._server)
        try:
            self.port = int(self._server.add_insecure_port(where))
        except RuntimeError:
            raise UsageError(f"--grpc-port: {where} cannot be listened on; choose another") from None

    async def start(self) -> None:
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Answer what was asked, and refuse what comes now.

        gRPC cancels what comes while it ends, and such a client cannot know whether it was computed. UNAVAILABLE says
        that another server may be asked. Only what comes in the last moment, before a client hears of the end, is
        still CANCELLED; no method here has seen it.
        """
        self._leaving = True
        await asyncio.sleep(min(REFUSED_S, grace_s))
        await self._server.stop(grace_s)

    def _wrapped(self, name: str, answer: Answer) -> Answer:
        """A method with what all have in common: the token, errors as codes, metrics."""
        service, path = self._service, f"grpc {name}"
        seconds = service.metrics.seconds.labels(path)

        async def method(request: Any, context: Context) -> Any:
            started, code = time.perf_counter(), grpc.StatusCode.OK
            try:
                if name not in OPEN:
                    metadata = dict(context.invocation_metadata() or ())
                    authorize_header(str(metadata.get("authorization", "")), service.options)
                return await answer(request, context)
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except Exception as error:  # whatever it is becomes a code and one line
                code, line = self._code(bare(error))
                await context.abort(code, line)
            finally:
                service.metrics.requests.labels(path, code.name).inc()
                seconds.observe(time.perf_counter() - started)

        return method

    def _code(self, error: Exception) -> tuple[grpc.StatusCode, str]:
        line = " ".join(str(error).split())
        if isinstance(error, Refusal):
            return CODES[error.status], line
        if isinstance(error, Refused):
            self._service.metrics.refused.labels("full").inc()
            return grpc.StatusCode.RESOURCE_EXHAUSTED, line
        if isinstance(error, Closed):
            return grpc.StatusCode.UNAVAILABLE, "the server is ending"
        if isinstance(error, asyncio.TimeoutError):
            self._service.metrics.refused.labels("late").inc()
            return grpc.StatusCode.DEADLINE_EXCEEDED, "no answer in time"
        if isinstance(error, InputError | UsageError):
            return grpc.StatusCode.INVALID_ARGUMENT, line
        self._service.say(f"a request failed: {type(error).__name__}: {line}")
        return grpc.StatusCode.INTERNAL, "the request failed; the server's log says why"

    def _model(self, name: str, version: str) -> Model:
        model = self._service.models.get(name)
        if model is None:
            raise Refusal(404, f"no model {name[:100]!r} (models: {', '.join(self._service.models)})")
        if version not in ("", protocol.VERSION):
            raise Refusal(404, f"no version {version[:20]!r}; every model has the version {protocol.VERSION}")
        return model

    async def _live(self, request: Any, context: Context) -> Any:
        return messages.ServerLiveResponse(live=True)

    async def _ready(self, request: Any, context: Context) -> Any:
        return messages.ServerReadyResponse(ready=not self._service.draining)

    async def _model_ready(self, request: Any, context: Context) -> Any:
        self._model(request.name, request.version)
        return messages.ModelReadyResponse(ready=not self._service.draining)

    async def _metadata(self, request: Any, context: Context) -> Any:
        return messages.ServerMetadataResponse(name="convnext-deploy", version=env.version())

    async def _model_metadata(self, request: Any, context: Context) -> Any:
        model = self._model(request.name, request.version)
        return messages.ModelMetadataResponse(**protocol.metadata(model.name, model.manifest))

    async def _index(self, request: Any, context: Context) -> Any:
        models = [{"name": name, "version": protocol.VERSION, "state": "READY"} for name in self._service.models]
        return messages.RepositoryIndexResponse(models=models)

    async def _infer(self, request: Any, context: Context) -> Any:
        asked, raw = _asked(request)
        left = context.time_remaining()
        seconds = timeout_s(self._service.options, None if left is None else max(left, 1e-3) * 1e3)
        while True:
            if self._leaving:
                raise Closed
            model = self._model(request.model_name, request.model_version)
            images = protocol.images_of(asked, memoryview(raw), model.manifest)
            job = None
            try:
                job = model.queue.admit(len(images), asyncio.get_running_loop().create_future())
                model.queue.put(job, images)
                results: Outputs = await asyncio.wait_for(job.owner, seconds)
                break
            except Closed:
                if self._model(request.model_name, "") is model:
                    raise
            finally:
                if job is not None:
                    model.queue.cancel(job)  # unless it is over
        response = messages.ModelInferResponse(
            model_name=model.name, model_version=protocol.VERSION, id=request.id
        )  # fmt: skip
        for place, record, _ in protocol.outputs(asked, model.manifest):
            datatype = protocol.NAMES[record.dtype]
            values = np.ascontiguousarray(results[place], protocol.DTYPES[datatype])
            response.outputs.add(name=record.name, datatype=datatype, shape=values.shape)
            response.raw_output_contents.append(values.tobytes())
        return response


_NAMES = {
    "_live": "ServerLive", "_ready": "ServerReady", "_model_ready": "ModelReady", "_metadata": "ServerMetadata",
    "_model_metadata": "ModelMetadata", "_index": "RepositoryIndex", "_infer": "ModelInfer",
}  # fmt: skip


def _asked(request: Any) -> tuple[InferRequest, bytes]:
    """A message as the request that HTTP's JSON would be, and the bytes behind it.

    Raises:
        InputError: tensors in another form than one of the two that there are.
    """
    raw = list(request.raw_input_contents)
    if len(raw) not in (0, len(request.inputs)):
        raise InputError(f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs; expected as many, or none")
    inputs = []
    for place, tensor in enumerate(request.inputs):
        parameters: dict[str, Any] = {}
        data = None
        if raw:
            parameters["binary_data_size"] = len(raw[place])
        else:
            contents = tensor.contents
            data = list(contents.fp32_contents if tensor.datatype == "FP32" else contents.uint_contents)
        inputs.append(
            RequestTensor(
                name=tensor.name, shape=list(tensor.shape), datatype=tensor.datatype, parameters=parameters, data=data
            )
        )
    outputs = [
        RequestTensor(name=output.name, parameters=dict.fromkeys(output.parameters, True)) for output in request.outputs
    ]
    return InferRequest(inputs=inputs, id=request.id, outputs=outputs or None), b"".join(raw)
