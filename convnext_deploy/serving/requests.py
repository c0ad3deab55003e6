"""One request: its body within limits, its token, its time, and the answer to a refusal."""

import asyncio
import hmac
import math
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ..errors import InputError, plain
from .options import ServeOptions
from .service import Service

# In a request's state: when all of it had come, as `time.perf_counter` has it. Other servers do not say.
COMPLETE = "complete"
BODIES = 16  # of the largest size, that may be in memory at once


class Refusal(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, message: str, *, retry_s: float | None = None, close: bool = False) -> None:
        super().__init__(message)
        self.status, self.retry_s, self.close = status, retry_s, close

    def response(self) -> Response:
        headers = {}
        if self.retry_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_s)))
        if self.close:  # what is left of the body is not read
            headers["connection"] = "close"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return error_response(self.status, str(self), headers)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error in the form of the inference protocol: one line in JSON."""
    line = " ".join(message.split())
    return json_response({"error": line}, status, headers)


def json_response(document: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(document), status, headers, media_type="application/json")


def authorize(request: Request, options: ServeOptions) -> None:
    """Refuse a request without the server's token.

    Raises:
        Refusal: 401.
    """
    authorize_header(request.headers.get("authorization", ""), options)


def authorize_header(given: str, options: ServeOptions) -> None:
    """Refuse a request whose `Authorization` is not the server's token."""
    if options.token is None:
        return
    scheme, _, token = given.partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), options.token.encode()):
        raise Refusal(401, "expected the header Authorization: Bearer TOKEN with this server's token", close=True)


@asynccontextmanager
async def body_of(request: Request, service: Service) -> AsyncIterator[bytes]:
    """The body, read and decompressed within the limits; it counts as held until the end of the block.

    Raises:
        Refusal: 400, 408, 413, 415 or 429.
        ClientGone: the connection was closed.
    """
    options, held = service.options, 0
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > options.max_body_bytes:
        raise Refusal(413, f"a body of {length} bytes; at most {options.max_body_bytes} are taken", close=True)
    try:
        pieces: list[bytes] = []

        async def read() -> None:
            nonlocal held
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                piece = message.get("body", b"")
                held += len(piece)
                service.body_bytes += len(piece)
                if held > options.max_body_bytes:
                    raise Refusal(413, f"the body is larger than {options.max_body_bytes} bytes", close=True)
                if service.body_bytes > BODIES * options.max_body_bytes:
                    raise Refusal(
                        429, "the bodies of requests fill the memory set aside for them", retry_s=1, close=True
                    )
                pieces.append(piece)
                if not message.get("more_body"):
                    break

        if waited_s(request) is not None:  # all of it is here
            await read()
        else:
            with anyio.move_on_after(options.body_s) as scope:
                await read()
            if scope.cancelled_caught:
                raise Refusal(408, f"the body took longer than {options.body_s:g} s", close=True)
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        yield decompressed(body, request.headers.get("content-encoding", "identity"), options.max_body_bytes)
    finally:
        service.body_bytes -= held


def decompressed(body: bytes, encoding: str, most: int) -> bytes:
    """What a body contains, of any size up to `most`.

    Raises:
        Refusal: 413 or 415.
        InputError: it is damaged.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise Refusal(415, f"Content-Encoding {encoding[:20]!r}; expected gzip, deflate or none")
    inflate = zlib.decompressobj(wbits=47 if encoding == "gzip" else 15)  # 47: a gzip or zlib head
    try:
        content = inflate.decompress(body, most + 1)
    except zlib.error as error:
        raise InputError(f"the body cannot be decompressed: {plain(error)}") from None
    if len(content) > most:
        raise Refusal(413, f"the body is larger than {most} bytes when decompressed")
    if not inflate.eof:
        raise InputError("the compressed body ends in the middle")
    return content


async def gone(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def waited_s(request: Request) -> float | None:
    """For how long a request that has all come has waited for this thread; None: not known."""
    complete = request.scope.get("state", {}).get(COMPLETE)
    return None if complete is None else float(time.perf_counter() - complete)


def timeout_s(options: ServeOptions, asked_ms: float | None) -> float:
    """The time until a request is given up: the server's, or the client's where that is shorter.

    Raises:
        InputError: no positive time.
    """
    if asked_ms is None:
        return options.deadline_ms / 1e3
    if not asked_ms > 0:
        raise InputError(f"a time-out of {asked_ms:g} ms; expected more than 0")
    return min(asked_ms, options.deadline_ms) / 1e3


async def finished(futures: "list[asyncio.Future[object]]", request: Request, seconds: float) -> None:
    """Wait for the futures, as long as the client does.

    Raises:
        Refusal: 504.
        ClientGone: it has closed the connection.
    """
    loop = asyncio.get_running_loop()
    first = futures[0]
    watch = loop.create_task(gone(request))

    def stop(error: Exception) -> None:
        if not first.done():
            first.set_exception(error)

    watch.add_done_callback(lambda task: None if task.cancelled() else stop(ClientGone()))
    timer = loop.call_later(seconds, stop, Refusal(504, f"no answer within {seconds * 1e3:g} ms"))
    try:
        for future in futures:
            await future
    finally:
        timer.cancel()
        watch.cancel()
