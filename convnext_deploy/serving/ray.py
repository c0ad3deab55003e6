"""The server as a Ray Serve application: replicas of it on the nodes of a cluster, more of them as requests come.

    serve run convnext_deploy.serving.ray:app artifacts=build/clothes max_replicas=8

Each replica is a whole server of its own, with its sessions and its queue; Ray Serve listens and spreads the requests.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..artifact import manifest
from ..env import needs
from ..errors import ArtifactError, UsageError, plain
from .application import application
from .names import named
from .options import LARGEST_BATCH, ServeOptions
from .service import Service

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.applications import Starlette

AHEAD = 2  # batches' worth of requests under way that a replica is to have; with more on average another is started
MOST = 8  # batches' worth that it is given at most; what is more waits in Ray Serve's proxies


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the application is told, beside `ServeOptions`.

    Args:
        artifacts: one folder, or several, as a list or as JSON of one; each as PATH or NAME=PATH, the same on every
            node.
        labels: file of class names, of a server of one model; the same on every node.
        trust: as for `load`.
        min_replicas: that are always there; 0 lets the first request wait for one.
        max_replicas: of as many as the cluster has room for.
        cpus: cores of a replica. With device cuda it has a GPU too.
    """

    artifacts: tuple[str, ...]
    labels: str | None = None
    trust: bool = False
    min_replicas: int = 1
    max_replicas: int = 1
    cpus: int = 1


def app(arguments: Mapping[str, Any]) -> "Application":
    """The application, for `serve run`, a configuration file of Ray Serve, or `ray.serve.run`.

    Args:
        arguments: the fields of `Settings` and of `serving.options.ServeOptions`; texts are read as what they stand
            for.

    Raises:
        UsageError, ArtifactError: one line each, before a replica is started.
    """
    with needs("ray"):
        from ray import serve
    settings, options = read(arguments)
    if settings.labels is not None:  # a replica works in another folder than this process
        settings = msgspec.structs.replace(settings, labels=str(Path(settings.labels).absolute()))
    paths = {name: path.absolute() for name, path in named(settings.artifacts).items()}
    hashes = {name: manifest.verified(path).sha256 for name, path in paths.items()}

    def replica() -> "Starlette":
        return application(opened(paths, hashes, settings, options))

    batch = options.max_batch or LARGEST_BATCH
    deployment = serve.deployment(
        serve.ingress(replica)(),
        name="convnext-deploy",
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "initial_replicas": max(1, settings.min_replicas),
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": AHEAD * batch,
        },
        max_ongoing_requests=min(options.room, MOST * batch),
        graceful_shutdown_timeout_s=options.drain_s,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": int(options.device == "cuda")},
    )
    bound: Application = deployment.bind()
    return bound


def opened(paths: Mapping[str, Path], hashes: Mapping[str, str], settings: Settings, options: ServeOptions) -> Service:
    """In a replica: the models, which are those that the application was made of.

    Raises:
        ArtifactError: this node has another artifact under the path, or none.
    """
    for name, path in paths.items():
        sha256 = manifest.verified(path).sha256
        if sha256 != hashes[name]:
            raise ArtifactError(
                f"{path} is {sha256[:12]} on this node, and {hashes[name][:12]} where the application was made; put "
                "the same artifact on every node"
            )
    labels = None if settings.labels is None else Path(settings.labels)
    say = logging.getLogger("ray.serve").info
    return Service(paths, options, labels=labels, trust=settings.trust, say=say)


def read(arguments: Mapping[str, Any]) -> tuple[Settings, ServeOptions]:
    """Settings, and the options of the server in each replica.

    Raises:
        UsageError: a name that is none, a value of another kind, or no artifact.
    """
    own = set(Settings.__struct_fields__)
    known = own | set(ServeOptions.__dataclass_fields__) - {"workers"}  # a replica is one process
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise UsageError(f"argument {unknown[0]}; expected any of {', '.join(sorted(known))}")
    given = dict(arguments)
    if isinstance(given.get("artifacts"), str):
        given["artifacts"] = _several(given["artifacts"])
    try:
        settings = msgspec.convert({name: given[name] for name in given if name in own}, Settings, strict=False)
        _check(settings)
        limits = {"threads": settings.cpus, "sessions": 1} if given.get("device", "cpu") == "cpu" else {}
        told = limits | {name: given[name] for name in given if name not in own}
        options = msgspec.convert(told, ServeOptions, strict=False)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, UsageError):
            raise error.__cause__ from None
        raise UsageError(f"{plain(error)}; expected the settings of serving.ray and ServeOptions") from None
    if options.threads is not None and options.device == "cpu" and options.threads > settings.cpus:
        raise UsageError(f"threads {options.threads} on {settings.cpus} cores of a replica; give as many cpus")
    return settings, options


def _several(text: str) -> list[str]:
    """One artifact as it is written, whatever its path contains, or a list in JSON."""
    if not text.startswith("["):
        return [text]
    try:
        return msgspec.json.decode(text, type=list[str])
    except msgspec.MsgspecError as error:
        raise UsageError(
            f'artifacts {text}: {plain(error)}; expected a folder, or JSON such as ["a=x","b=y"]'
        ) from None


def _check(settings: Settings) -> None:
    if not settings.artifacts or settings.cpus < 1 or not 0 <= settings.min_replicas <= settings.max_replicas:
        raise UsageError(
            f"{len(settings.artifacts)} artifacts, cpus {settings.cpus}, {settings.min_replicas} to "
            f"{settings.max_replicas} replicas; expected at least one artifact and one core, and no fewer replicas at "
            "most than at least"
        )
    if settings.max_replicas < 1:
        raise UsageError(f"max_replicas {settings.max_replicas}; expected at least 1")
