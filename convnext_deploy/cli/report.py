"""`report`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import WRITES, Debug, Json, Quiet
from .terminal import Terminal


def report(
    results: Annotated[list[Path], typer.Argument(help="Files of recorded results, JSON Lines.")],
    out: Annotated[Path, typer.Option(**WRITES, help="The page to write: .html, or .md for Markdown tables.")],
    title: Annotated[str, typer.Option(help="The page's title.")] = "ConvNeXt benchmarks",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """One self-contained HTML page (or Markdown) from recorded results: tables, plots, conditions."""
    from .. import api

    terminal = Terminal(json, quiet)
    written = api.report(results, out=out, title=title)
    size = written.stat().st_size
    viewer = [f"python -m webbrowser {written.absolute().as_uri()}"] if written.suffix == ".html" else []
    terminal.result({"out": str(written), "bytes": size}, f"{written}: {size} B", viewer)
