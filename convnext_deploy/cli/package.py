"""`package`."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .options import Debug, Json, Quiet, given, one_of
from .terminal import Terminal


def package(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    for_: Annotated[str, typer.Option("--for", help="triton, kserve or docker.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    name: Annotated[str | None, typer.Option(help="The model's name; default: the artifact folder's.")] = None,
    instances: Annotated[int | None, typer.Option(min=1, help="triton: that run at once; default: 1.")] = None,
    image: Annotated[str | None, typer.Option(help="kserve: image built from --for docker.")] = None,
    storage_uri: Annotated[
        str | None, typer.Option(help="kserve: where a repository of --for triton is, as s3://bucket/models.")
    ] = None,
    requirement: Annotated[
        str | None, typer.Option(help="docker: what pip installs; default: this version of convnext-deploy.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Pack an artifact for another server: a Triton repository, a KServe manifest, or a container's Dockerfile."""
    from .. import api

    target = {"triton": ("instances",), "kserve": ("image", "storage_uri"), "docker": ("requirement",)}
    options = given(instances=instances, image=image, storage_uri=storage_uri, requirement=requirement)
    for option in options:
        if for_ in target and option not in target[for_]:
            only = next(one for one, names in target.items() if option in names)
            raise UsageError(f"--{option.replace('_', '-')} is for --for {only}, not for --for {for_}")
    terminal = Terminal(json, quiet)
    next_ = api.package(artifact, one_of("--for", for_, tuple(target)), out=out, name=name, **options)
    terminal.result({"out": str(out)}, f"{out}: packed for {for_}", next_)
