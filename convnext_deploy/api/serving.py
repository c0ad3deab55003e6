"""The server: `serve` runs it, `asgi` gives the application to whoever has a server already."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import arguments, env
from ..errors import UsageError
from ..records.base import Device

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from ..serving.server import Server
    from ..serving.service import Service

Artifacts = arguments.Location | Sequence[arguments.Location] | Mapping[str, arguments.Location]


@env.missing_named()
def serve(
    artifacts: Artifacts,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    admin: str | None = None,
    ready: "Callable[[Server], None]" = lambda server: None,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> None:
    """Serve artifacts over HTTP until SIGTERM or Ctrl-C; requests under way are answered first.

    Args:
        artifacts: a folder, several, or folders by the names they are served under.
        port: 0 takes a free one.
        admin: HOST:PORT that takes `POST /reload`; None: only SIGHUP reloads.
        ready: told when requests are taken; its argument has the `address`, and `stop` for other threads.
        say: told what happens, a line each.
        options: those of `asgi`.

    Raises:
        UsageError, ArtifactError: one line each, before anything is served.
        CheckFailed: an artifact gives wrong outputs here, or requests were given up at the end.
    """
    from ..serving import server

    listener, second = server.bound(arguments.text("host", host), port, "the address"), None
    try:
        if admin is not None:
            name, _, number = arguments.text("admin", admin).rpartition(":")
            if not name or not number.isdecimal():
                raise UsageError(f"admin {admin}; expected HOST:PORT such as 127.0.0.1:8001")
            second = server.bound(name.strip("[]"), int(number[:9]), "admin")
        service = _service(artifacts, say, options)
        server.Server(service, listener, second).run(ready)
    finally:
        listener.close()
        if second is not None:
            second.close()


@env.missing_named()
def asgi(artifacts: Artifacts, *, say: Callable[[str], None] = lambda line: None, **options: Any) -> "Starlette":
    """The server's ASGI application, for uvicorn or another server, or to be mounted in an application.

    Artifacts are opened before it returns. `application.state.service` is what it serves: its `reload` takes changed
    artifacts, and `close` ends its threads.

    Args:
        artifacts: as for `serve`.
        say: told what happens, a line each.
        options: `device`, `threads`, `sessions`, `max_batch`, `max_wait_ms`, `slo_ms`, `deadline_ms`, `room`,
            `max_body_bytes`, `max_pixels`, `body_s`, `idle_s`, `drain_s` and `token` as in
            `serving.options.ServeOptions`; `labels`, a file of class names; `gate`, the verdict that has to be PASS,
            read again at every reload; `trust`, as for `load`.

    Raises:
        What `serve` raises.
    """
    from ..serving.application import application

    return application(_service(artifacts, say, options))


def _service(artifacts: Artifacts, say: Callable[[str], None], options: dict[str, Any]) -> "Service":
    from ..serving.options import ServeOptions
    from ..serving.service import Service, named

    if isinstance(artifacts, Mapping):
        paths = named([f"{name}={arguments.path('artifacts', path)}" for name, path in artifacts.items()])
    else:
        paths = named([str(path) for path in arguments.paths("artifacts", artifacts)])
    labels = arguments.maybe(arguments.path, "labels", options.pop("labels", None))
    gate = arguments.maybe(arguments.path, "gate", options.pop("gate", None))
    trust, device = options.pop("trust", False), options.pop("device", "cpu")
    arguments.check(trust=trust, say=say)
    unknown = sorted(set(options) - set(ServeOptions.__dataclass_fields__))
    if unknown:
        raise UsageError(f"option {unknown[0]}; expected one of {', '.join(ServeOptions.__dataclass_fields__)}")
    settings = ServeOptions(device=arguments.one_of("device", device, Device), **options)
    return Service(paths, settings, labels=labels, gate=gate, trust=trust, say=say)
