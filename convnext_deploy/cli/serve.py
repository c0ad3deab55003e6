"""`serve`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError, plain
from . import hints
from .options import Debug, DeviceOption, LabelsOption, Quiet, Trust, given, one_of
from .terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..serving.server import Server
    from ..serving.workers import Workers

TOKEN = "CONVNEXT_DEPLOY_TOKEN"
HERE = ("127.0.0.1", "::1", "localhost")


def serve(
    artifact: Annotated[list[str], typer.Argument(help="Artifact folders, or NAME=FOLDER; the first is the default.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    admin: Annotated[str | None, typer.Option(help="HOST:PORT that takes POST /reload and GET /shadow.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port for clients of gRPC; 0 takes a free one.")] = None,
    slo_ms: Annotated[float | None, typer.Option(help="Refuse (429) what would take longer than this.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Images of a batch; default: 8.")] = None,
    max_wait_ms: Annotated[float, typer.Option(help="That the first image of a batch waits for others.")] = 0.0,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes, for models faster than one Python: they share the cores.")
    ] = 1,
    sessions: Annotated[int | None, typer.Option(help="Batches that run at once; default: cores by threads.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each batch; default: 4 at most.")] = None,
    room: Annotated[int | None, typer.Option(help="Images on their way at once; more are refused: 1024.")] = None,
    deadline_ms: Annotated[float | None, typer.Option(help="After which a request is given up: 30000.")] = None,
    max_body_mb: Annotated[float | None, typer.Option(help="Largest body of a request, in MB: 33.5.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Of an image before it is resized: 67108864.")] = None,
    drain_s: Annotated[float | None, typer.Option(help="That requests may take at the end: 30.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help=f"File with the bearer token that requests bring; or set {TOKEN}.")
    ] = None,
    bench: Annotated[
        Path | None, typer.Option(help="Take threads, batch and limit from rows of `bench --scenario server --save`.")
    ] = None,
    gate: Annotated[
        Path | None, typer.Option(help="Serve and reload only what this verdict of `gate --json` passed.")
    ] = None,
    shadow: Annotated[
        Path | None, typer.Option(help="Candidate that is asked a share of the requests too, and compared.")
    ] = None,
    shadow_share: Annotated[float | None, typer.Option(help="Share of the requests that it is asked: 0.1.")] = None,
    shadow_limit: Annotated[float | None, typer.Option(help="Share of other answers that it may give: 0.01.")] = None,
    labels: LabelsOption = None,
    device: DeviceOption = "cpu",
    trust: Trust = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve artifacts over HTTP: POST /classify, and the Open Inference Protocol at /v2. Ctrl-C or SIGTERM ends it."""
    from .. import api
    from ..records.base import Device
    from ..serving.log import unhindered

    say = unhindered(Terminal(False, quiet).say)
    token = _token(token_file)
    if host not in HERE and token is None:
        say(f"anyone who reaches {host}:{port} can use it; --token-file asks for a token")
    names = ", ".join(artifact)

    def ready(server: "Server | Workers") -> None:
        also = "" if server.grpc_address is None else f"; gRPC on {server.grpc_address}"
        say(f"serving {names} on {server.address} (POST /classify, /v2; {server.address}/docs){also}")
        say(f"next: {hints.request(server.address, token is not None, _tensors(artifact))}")

    api.serve(
        artifact,
        host=host,
        port=port,
        admin=admin,
        grpc_port=grpc_port,
        ready=ready,
        say=say,
        labels=labels,
        gate=gate,
        bench=bench,
        device=one_of("--device", device, Device),
        trust=trust,
        max_wait_ms=max_wait_ms,
        workers=workers,
        **given(
            slo_ms=slo_ms,
            max_batch=max_batch,
            sessions=sessions,
            threads=threads,
            room=room,
            deadline_ms=deadline_ms,
            max_body_bytes=None if max_body_mb is None else int(max_body_mb * 1e6),
            max_pixels=max_pixels,
            drain_s=drain_s,
            shadow=shadow,
            shadow_share=shadow_share,
            shadow_limit=shadow_limit,
            token=token,
        ),
    )


def _tensors(artifacts: "Sequence[str]") -> str | None:
    """The name of the default model, where it has no classes to ask for."""
    from ..artifact import manifest
    from ..serving.names import named

    name, folder = next(iter(named(artifacts).items()))
    model = manifest.read(folder).manifest.model
    return name if model.task != "classify" or model.problem == "regression" else None


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(TOKEN) or None
    try:
        return file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--token-file {file} cannot be read: {plain(error)}") from None
