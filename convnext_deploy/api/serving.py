"""The server: `serve` runs it, `asgi` returns the application for whoever has a server already."""

import contextlib
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from .. import argument_names, arguments
from ..arguments import Unpack
from ..artifact import manifest
from ..errors import UsageError
from ..records.base import Device
from .artifacts import Trust, opened
from .verbs import verb

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from ..serving.options import ServeOptions
    from ..serving.server import Server
    from ..serving.service import Service
    from ..serving.shadow import ShadowOptions
    from ..serving.workers import Workers

    _Told = tuple[dict[str, Path], ServeOptions, Path | None, Path | None, ShadowOptions | None, bool]

Artifacts = arguments.Location | Sequence[arguments.Location] | Mapping[str, arguments.Location]


class ApplicationOptions(TypedDict, total=False):
    """How an application serves; what is None or left out is as the text says."""

    device: Annotated[Device, "cpu, or cuda for a GPU."]
    threads: Annotated[int | None, "CPU threads of each batch; None: the cores by `sessions`, or 4 at most."]
    sessions: Annotated[int | None, "batches that run at once; None: the cores by `threads`, and one on a GPU."]
    max_batch: Annotated[int | None, "images of a batch; None: 8, or the most that the artifact takes."]
    max_wait_ms: Annotated[float | None, "that the first image of a batch waits for others; None: 0."]
    slo_ms: Annotated[
        float | None,
        "the time from a request to its answer, if it is to be kept: a request that would take longer is refused.",
    ]
    deadline_ms: Annotated[
        float | None, "after which a request is given up, if the client names no time of its own; None: 30,000."
    ]
    room: Annotated[int | None, "images on their way at once, more are refused; None: 1024."]
    max_body_bytes: Annotated[int | None, "of a request, before and after decompression; None: 32 MiB."]
    max_pixels: Annotated[int | None, "of an image before it is resized; None: 67,108,864."]
    body_s: Annotated[float | None, "that a client may take to send a request's body; None: 30."]
    idle_s: Annotated[float | None, "that a connection may be open without a whole request head; None: 15."]
    drain_s: Annotated[float | None, "that requests under way may take at the end; None: 30."]
    token: Annotated[str | None, "that every request but health checks has to bring, as `Authorization: Bearer TOKEN`."]
    labels: Annotated[arguments.Location | None, "file of class names; None: the artifact's own."]
    gate: Annotated[
        arguments.Location | None, "result of `gate --json` that has to be PASS; it is read again at every reload."
    ]
    bench: Annotated[
        arguments.Location | None,
        "rows of `bench --scenario server --save`, from which `threads`, `max_batch` and `slo_ms` are taken where they "
        "are not given.",
    ]
    shadow: Annotated[
        arguments.Location | None, "an artifact that is asked a share of the requests as well, and compared."
    ]
    shadow_share: Annotated[float | None, "share of the requests that it is asked; None: 0.1."]
    shadow_limit: Annotated[float | None, "share of the images whose answers may differ; None: 0.01."]
    trust: Trust


class ServerOptions(ApplicationOptions, total=False):
    """How a server serves; `ApplicationOptions`, and its processes."""

    workers: Annotated[int | None, "processes behind the one address, which share the cores; None: 1."]


@verb
def serve(
    artifacts: Artifacts,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    admin: str | None = None,
    grpc_port: int | None = None,
    ready: "Callable[[Server | Workers], None]" = lambda server: None,
    say: Callable[[str], None] = lambda line: None,
    **options: Unpack[ServerOptions],
) -> None:
    """Serve artifacts over HTTP until SIGTERM or Ctrl-C; requests under way are answered first.

    Args:
        artifacts: a folder, several, or folders by the names they are served under.
        host: the address to listen on.
        port: 0 takes a free one.
        admin: HOST:PORT that takes `POST /reload`; None: only SIGHUP reloads.
        grpc_port: for clients of gRPC, on the same host; 0 takes a free one, None: there is none. It needs the extra
            `triton`.
        ready: told when requests are taken; its argument has the `address`, and `stop` for other threads.
        say: told what happens, a line each.

    Raises:
        UsageError, ArtifactError: one line each, before anything is served.
        CheckFailed: an artifact computes wrong outputs here, or requests were given up at the end.
    """
    argument_names.check(say=say, ready=ready)
    port = arguments.whole("port", port, least=0)
    if grpc_port is not None:
        arguments.whole("grpc_port", grpc_port, least=0)
        # Where one is missing, that is said before anything is opened.
        import grpc  # noqa: F401
        import tritonclient.grpc  # noqa: F401
    from ..serving import listeners, server, workers

    with contextlib.ExitStack() as sockets:
        listener, second = (
            sockets.enter_context(listeners.bound(arguments.text("host", host), port, "the address")),
            None,
        )
        if admin is not None:
            name, _, number = arguments.text("admin", admin).rpartition(":")
            if not name or not number.isdecimal():
                raise UsageError(f"admin {arguments.shown(admin)}; expected HOST:PORT such as 127.0.0.1:8001")
            second = sockets.enter_context(listeners.bound(name.strip("[]"), int(number[:9]), "admin", beside=listener))
        server_settings = _settings(artifacts, say, options)
        several = server_settings[1].workers > 1
        third = None
        if grpc_port is not None:
            if grpc_port and grpc_port in {one.getsockname()[1] for one in (listener, second) if one is not None}:
                raise UsageError(f"--grpc-port {grpc_port} is a port of HTTP too; choose another")
            third = sockets.enter_context(listeners.bound(host, grpc_port, "--grpc-port", shared=several))
        if several:
            workers.Workers(workers.order(*server_settings), listener, second, say, third).run(ready)
        else:
            service = _service(server_settings, say)
            if third is not None:
                third.close()  # gRPC takes no socket, and refuses a port that somebody takes now
            server.Server(service, listener, second, grpc_port=grpc_port).run(ready)


@verb
def asgi(
    artifacts: Artifacts, *, say: Callable[[str], None] = lambda line: None, **options: Unpack[ApplicationOptions]
) -> "Starlette":
    """The server's ASGI application, for uvicorn or another server, or to be mounted in an application.

    Artifacts are opened before it returns. `application.state.service` is what it serves: its `reload` takes changed
    artifacts, and `close` ends its threads.

    Args:
        artifacts: as for `serve`.
        say: told what happens, a line each.

    Raises:
        UsageError, ArtifactError: one line each, before it returns.
        CheckFailed: an artifact computes wrong outputs here.
    """
    argument_names.check(say=say)
    from ..serving.application import application

    return application(_service(_settings(artifacts, say, options), say))


@verb
def package(
    path: arguments.Location,
    target: Literal["triton", "kserve", "docker"],
    *,
    out: arguments.Location,
    name: str | None = None,
    instances: int = 1,
    image: str | None = None,
    storage_uri: str | None = None,
    requirement: str | None = None,
) -> list[str]:
    """Pack an artifact for another server.

    Args:
        path: the artifact's folder.
        target: "triton": a model repository; "kserve": an InferenceService; "docker": a Dockerfile for `serve`, with
            a compose file.
        out: the folder, which must not exist.
        name: of the model; None: the artifact folder's.
        instances: triton: that run at once.
        image: kserve: the image that "docker" builds.
        storage_uri: kserve: where a repository of "triton" is, in place of the image.
        requirement: docker: what pip installs; None: this version of the package.

    Returns:
        What to do with it: lines for a shell, with comments.

    Raises:
        UsageError, ArtifactError: one line each.
    """
    word = arguments.one_of("target", target, ("triton", "kserve", "docker"))
    for argument, value in (
        ("name", name), ("image", image), ("storage_uri", storage_uri), ("requirement", requirement)
    ):  # fmt: skip
        arguments.maybe(arguments.text, argument, value)
    folder = arguments.path("out", out)
    instances = arguments.whole("instances", instances)
    if os.path.lexists(folder):
        raise UsageError(f"{folder} exists; choose another --out")
    manifest.check_target(folder, force=False)
    artifact = opened(path)
    from ..serving.names import checked, named
    from ..serving.packages import docker, kserve, triton

    (called,) = named([artifact.path]) if name is None else (checked(arguments.text("name", name)),)
    with manifest.staged(folder) as work:
        if word == "triton":
            notes = triton.written(artifact, called, work, instances=instances)
        elif word == "kserve":
            notes = kserve.written(artifact, called, work, image=image, storage_uri=storage_uri)
        else:
            notes = docker.written(artifact, called, work, package=requirement)
    return [note.format(out=shlex.quote(str(folder))) for note in notes]


def _service(told: "_Told", say: Callable[[str], None]) -> "Service":
    from ..serving.service import Service

    paths, options, labels, gate, shadow, trust = told
    return Service(paths, options, labels=labels, gate=gate, shadow=shadow, trust=trust, say=say)


def _settings(artifacts: Artifacts, say: Callable[[str], None], given: Mapping[str, Any]) -> "_Told":
    """What a `Service` is made of, in the order of `workers.order`."""
    options = {name: value for name, value in given.items() if value is not None}
    from ..serving import measured
    from ..serving.names import checked, named
    from ..serving.options import ServeOptions

    if isinstance(artifacts, Mapping):
        paths = named([f"{checked(name)}={arguments.path('artifacts', path)}" for name, path in artifacts.items()])
    else:
        paths = named([str(path) for path in arguments.paths("artifacts", artifacts)])
    labels = arguments.maybe(arguments.path, "labels", options.pop("labels", None))
    gate = arguments.maybe(arguments.path, "gate", options.pop("gate", None))
    bench = arguments.maybe(arguments.path, "bench", options.pop("bench", None))
    beside = _shadow(options)
    trust, device = options.pop("trust", False), options.pop("device", "cpu")
    argument_names.check(trust=trust, say=say)
    if bench is not None:
        if len(paths) > 1:
            raise UsageError(f"--bench {bench} with {len(paths)} artifacts; serve them one by one")
        (path,) = paths.values()
        server_settings, line = measured.settings(bench, manifest.read(path).sha256, options.get("slo_ms"))
        say(line)
        options = server_settings | options
    settings = ServeOptions(device=arguments.one_of("device", device, Device), **options)
    return paths, settings, labels, gate, beside, trust


def _shadow(options: dict[str, Any]) -> "ShadowOptions | None":
    from ..serving.shadow import ShadowOptions

    path = arguments.maybe(arguments.path, "shadow", options.pop("shadow", None))
    given = {name: options.pop(f"shadow_{name}") for name in ("share", "limit") if f"shadow_{name}" in options}
    if path is None:
        if given:
            raise UsageError(f"shadow_{next(iter(given))} without shadow; name the candidate's folder")
        return None
    return ShadowOptions(path=path, **given)
