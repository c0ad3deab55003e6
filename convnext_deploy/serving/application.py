"""The ASGI application: which address is answered by what."""

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from .. import env
from ..artifact.batches import Images
from ..data.decoding import UnreadableImage
from ..errors import CheckFailed, InputError, UsageError
from ..records.prediction import Prediction
from . import multipart, openapi, protocol
from .batching import Closed, Job, Outputs, Refused, bare
from .metrics import CONTENT_TYPE
from .model import Model
from .requests import (
    ClientGone,
    Refusal,
    authorize,
    body_of,
    error_response,
    finished,
    json_response,
    timeout_s,
    waited_s,
)
from .service import Service
from .siblings import Siblings

INLINE_BYTES = 2**18  # of a body that is read in the event loop; larger ones would hold up others
BEHIND_S = 1e-3  # that a request waits for the event loop before other threads are given short work too
# Of several workers, one whose requests wait for so long gives connections away, one at a time. Which worker accepted
# how many is chance, and clients keep them.
BUSY_S, GIFT_S = 0.01, 0.05
CLASSIFY_PARAMETERS = ("top", "model", "timeout_ms")
CLOSED_REQUEST = 499  # the status under which metrics count a client that went away

INFER = "/v2/models/{model}/infer"

Handler = Callable[[Request], Awaitable[Response]]


def application(service: Service, siblings: Siblings | None = None) -> Starlette:
    """What clients may ask: classification, the inference protocol, health, metrics and their description."""
    served = _Served(service, siblings)
    routes = [
        served.route("/classify", served.classify, "POST"),
        served.route("/v2", served.server),
        served.route("/v2/health/live", served.live, open=True),
        served.route("/v2/health/ready", served.ready, open=True),
        served.route("/v2/repository/index", served.index, "POST"),
        served.route("/healthz", served.live, open=True),
        served.route("/readyz", served.ready, open=True),
        served.route("/metrics", served.metrics),
        served.route("/openapi.json", served.openapi),
        served.route("/docs", served.docs),
    ]
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        routes += [
            served.route(model, served.model),
            served.route(f"{model}/ready", served.model_ready),
            served.route(f"{model}/infer", served.infer, "POST"),
        ]
    return _starlette(service, routes)


def admin(service: Service, siblings: Siblings | None = None) -> Starlette:
    """What only whoever runs the server may ask."""
    served = _Served(service, siblings)
    return _starlette(
        service,
        [
            served.route("/reload", served.reload, "POST"),
            served.route("/shadow", served.shadow),
            served.route("/healthz", served.live, open=True),
            served.route("/readyz", served.ready, open=True),
            served.route("/metrics", served.metrics),
        ],
    )


class _Application(Starlette):
    """Starlette, which looks for the addresses that are asked most before it does anything else."""

    at_once: dict[tuple[str, str], tuple[Handler, dict[str, str]]]  # by method and path: what answers, its parameters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        known = None if scope["type"] != "http" else self.at_once.get((scope["method"], scope["path"]))
        if known is None or scope.get("root_path"):  # a path below somebody else's application
            await super().__call__(scope, receive, send)
            return
        endpoint, scope["path_params"] = known
        response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def _starlette(service: Service, routes: list[Route]) -> Starlette:
    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = "no such address" if error.status_code == 404 else f"{request.method} is not taken here"
        headers = dict(error.headers or {})
        return error_response(error.status_code, f"{what}; GET /docs lists what there is", headers)

    made = _Application(routes=routes, exception_handlers={HTTPException: unknown})
    endpoints = {route.path: route.endpoint for route in routes}
    made.at_once = {
        ("POST", path.format(model=name)): (endpoints[path], {"model": name})
        for path in ("/classify", INFER)
        if path in endpoints
        for name in service.models
    }
    made.state.service = service
    return made


class _Served:
    """The handlers over one service, which may be one of several."""

    def __init__(self, service: Service, siblings: Siblings | None) -> None:
        self.service, self.siblings = service, siblings
        self._next_gift = 0.0  # when a connection may be given away again

    def route(self, path: str, handler: Handler, method: str = "GET", *, open: bool = False) -> Route:
        """A handler with what all have in common: the token, refusals as answers, metrics.

        Args:
            open: asked without the token.
        """
        service, metrics = self.service, self.service.metrics
        seconds = metrics.seconds.labels(path)
        statuses: dict[int, Any] = {}

        async def endpoint(request: Request) -> Response:
            started = time.perf_counter()
            try:
                if not open:
                    authorize(request, service.options)
                response = await handler(request)
            except asyncio.CancelledError:  # the server ends and waits no longer
                service.abandoned += 1
                raise
            except Exception as error:  # whatever it is becomes an answer, and one that says no more than its line
                response = self._refused(bare(error))
            if service.draining or self._gives_away(request):
                response.headers["connection"] = "close"
            status = response.status_code
            if status not in statuses:
                statuses[status] = metrics.requests.labels(path, str(status))
            statuses[status].inc()
            seconds.observe(time.perf_counter() - started)
            return response

        return Route(path, endpoint, methods=[method])

    def _gives_away(self, request: Request) -> bool:
        """Whether the connection closes behind its answer, so that a worker with less to do accepts its next one."""
        if self.siblings is None or (waited_s(request) or 0.0) < BUSY_S:
            return False
        now = time.monotonic()
        if now < self._next_gift:
            return False
        self._next_gift = now + GIFT_S
        return True

    def _refused(self, error: Exception) -> Response:
        refused = self.service.metrics.refused
        if isinstance(error, Refusal):
            if error.status in (408, 413, 429, 504):
                refused.labels({408: "slow", 413: "large", 429: "bodies", 504: "late"}[error.status]).inc()
            return error.response()
        if isinstance(error, Refused):
            refused.labels("full").inc()
            return Refusal(429, str(error), retry_s=error.retry_s).response()
        if isinstance(error, Closed):
            return Refusal(503, "the server is ending", retry_s=1, close=True).response()
        if isinstance(error, ClientGone):
            refused.labels("gone").inc()
            return Response(status_code=CLOSED_REQUEST, headers={"connection": "close"})
        if isinstance(error, UnreadableImage | InputError | UsageError):
            return error_response(400, str(error))
        what = f"{type(error).__name__}: {error}"
        self.service.say(f"a request failed: {' '.join(what.split())}")
        return error_response(500, "the request failed; the server's log says why")

    # What all may ask

    async def live(self, request: Request) -> Response:
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        draining = self.service.draining
        return json_response({"ready": not draining}, 503 if draining else 200)

    async def metrics(self, request: Request) -> Response:
        loop = asyncio.get_running_loop()
        if self.siblings is not None:
            text = await self.siblings.metrics()
        else:
            text = await loop.run_in_executor(None, self.service.metrics.text)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        return json_response(openapi.document(self.service))

    async def docs(self, request: Request) -> Response:
        return HTMLResponse(openapi.page(openapi.document(self.service)))

    # Classification

    async def classify(self, request: Request) -> Response:
        query = request.query_params
        unknown = sorted(set(query) - set(CLASSIFY_PARAMETERS))
        if unknown:
            raise InputError(f"no parameter {unknown[0][:50]!r}; expected {', '.join(CLASSIFY_PARAMETERS)}")
        top = _whole(query.get("top", "5"), "top")
        seconds = timeout_s(self.service.options, _number(query.get("timeout_ms"), "timeout_ms"))
        name = query.get("model", self.service.default)
        model = self._model(name)
        if not model.has_classes:
            raise UsageError(f"{name} has no classes; its outputs are at /v2/models/{name}/infer")
        async with body_of(request, self.service) as body:
            kind = request.headers.get("content-type", "")
            images = [("", body)]
            if kind.lower().startswith("multipart/form-data"):
                images = multipart.files(body, kind)
            model, results = await self._classified(name, request, images, seconds)
        predictions = []
        for (image, _), outputs in zip(images, results, strict=True):
            best = model.best(outputs, top)
            self.service.metrics.answers.labels(name, str(best[0].number), best[0].name or "").inc()
            predictions.append(Prediction(image=image, classes=best))
        document = {"model": name, "artifact_sha256": model.sha256, "predictions": predictions}
        return json_response(document)

    async def _classified(
        self, name: str, request: Request, images: list[tuple[str, bytes]], seconds: float
    ) -> tuple[Model, list[Outputs]]:
        waited = waited_s(request)
        while True:
            model = self._model(name)
            jobs: list[Job] = []
            try:
                here = waited is not None and len(images) == 1 and self._is_computed_here(waited)
                if here and model.is_short(images[0][1]):
                    jobs.append(model.queue.admit(1, waited_s=waited or 0.0))
                    return model, [model.queue.run(jobs[0], *_input_of(model, *images[0]))]
                loop = asyncio.get_running_loop()
                jobs.extend(model.queue.admit(1, loop.create_future(), waited or 0.0) for _ in images)
                for job, (image, content) in zip(jobs, images, strict=True):
                    self.service.pool.submit(_prepare, model, job, image, content)
                return model, await self._answered(jobs, request, seconds)
            except Closed:
                if self._model(name) is model:
                    raise
            finally:
                for job in jobs:
                    model.queue.cancel(job)  # those that are not over

    def _is_computed_here(self, waited: float) -> bool:
        """Whether short work is: unless requests wait for this thread while there are cores for others."""
        return waited < BEHIND_S or self.service.options.cores == 1

    async def _answered(self, jobs: list[Job], request: Request, seconds: float) -> list[Outputs]:
        futures = [job.owner for job in jobs]
        try:
            await finished(futures, request, seconds)
        finally:
            for future in futures:
                if future.done() and not future.cancelled():
                    future.exception()  # of several that failed only the first is told
        return [future.result() for future in futures]

    # The inference protocol

    async def server(self, request: Request) -> Response:
        return json_response(
            {"name": "convnext-deploy", "version": env.version(), "extensions": ["binary_tensor_data"]}
        )

    async def index(self, request: Request) -> Response:
        return json_response(
            [{"name": name, "version": protocol.VERSION, "state": "READY"} for name in self.service.models]
        )

    async def model(self, request: Request) -> Response:
        model = self._addressed(request)
        return json_response(protocol.metadata(model.name, model.manifest))

    async def model_ready(self, request: Request) -> Response:
        self._addressed(request)
        return await self.ready(request)

    async def infer(self, request: Request) -> Response:
        name = self._addressed(request).name
        header = request.headers.get(protocol.HEADER)
        async with body_of(request, self.service) as body:
            while True:
                model = self._model(name)
                read = functools.partial(protocol.parsed, body, header, model.manifest)
                if len(body) <= INLINE_BYTES:
                    asked, images = read()
                else:
                    asked, images = await asyncio.get_running_loop().run_in_executor(self.service.pool, read)
                micros = asked.parameters.get("timeout")
                if micros is not None and not isinstance(micros, int | float):
                    raise InputError("the parameter timeout is no number; expected microseconds")
                seconds = timeout_s(self.service.options, None if micros is None else micros / 1e3)
                try:
                    results = await self._inferred(model, request, images, seconds)
                    break
                except Closed:
                    if self._model(name) is model:
                        raise
        content, headers = protocol.answered(name, asked, model.manifest, results)
        return Response(content, headers=headers)

    async def _inferred(self, model: Model, request: Request, images: Images, seconds: float) -> Outputs:
        waited = waited_s(request)
        if waited is not None and self._is_computed_here(waited) and model.are_short(images):
            return model.queue.run(model.queue.admit(len(images), waited_s=waited), images)
        job = model.queue.admit(len(images), asyncio.get_running_loop().create_future(), waited or 0.0)
        try:
            model.queue.put(job, images)
            return (await self._answered([job], request, seconds))[0]
        finally:
            model.queue.cancel(job)

    # What only whoever runs the server may ask

    async def reload(self, request: Request) -> Response:
        if self.siblings is not None:
            done, lines = await self.siblings.reload()
            self.service.say(f"{'reloaded' if done else 'reload refused'}: {'; '.join(lines)}")
            return json_response({"reloaded": lines}) if done else error_response(409, "; ".join(lines))
        try:
            lines = await asyncio.get_running_loop().run_in_executor(None, self.service.reload)
        except (UsageError, CheckFailed) as error:
            self.service.say(f"reload refused: {error}")
            return error_response(409, str(error))
        for line in lines:
            self.service.say(f"reloaded {line}")
        return json_response({"reloaded": lines})

    async def shadow(self, request: Request) -> Response:
        beside, state = self.service.shadow, None
        if self.siblings is not None:
            state = await self.siblings.shadow()
        elif beside is not None:
            state = await asyncio.to_thread(beside.state)
        if state is None:
            return error_response(404, "no candidate is compared; serve --shadow FOLDER compares one")
        return json_response(state)

    def _model(self, name: str) -> Model:
        model = self.service.models.get(name)
        if model is None:
            raise Refusal(404, f"no model {name[:100]!r} (models: {', '.join(self.service.models)})", close=True)
        return model

    def _addressed(self, request: Request) -> Model:
        version = request.path_params.get("version", protocol.VERSION)
        if version != protocol.VERSION:
            raise Refusal(
                404, f"no version {version[:20]!r}; every model has the version {protocol.VERSION}", close=True
            )
        return self._model(request.path_params["model"])


def _prepare(model: Model, job: Job, image: str, content: bytes) -> None:
    """In a decoding thread."""
    if job.over:
        return
    try:
        images, seconds = _input_of(model, image, content)
    except Exception as error:  # the request is told; the thread has others to serve
        model.queue.fail(job, error)
    else:
        model.queue.put(job, images, seconds)


def _input_of(model: Model, image: str, content: bytes) -> tuple[Images, float]:
    """`Model.input_of`, whose error names the image of several."""
    try:
        return model.input_of(content)
    except UnreadableImage as error:
        raise UnreadableImage(f"{image}: {error}" if image else str(error)) from error


def _whole(text: str, name: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise InputError(f"{name} {text[:20]!r}; expected a whole number of at least 1")
    return int(text)


def _number(text: str | None, name: str) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{name} {text[:20]!r}; expected a number") from None
