"""`evaluate`: an artifact on labelled images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import formats
from ..accuracy import evaluation
from ..artifact.manifest import Artifact
from ..artifact.session import RunOptions
from ..data import numbering, sources
from ..records.accuracy import EvalResult


@dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled images, and the file of the model's class names; each as in `api.evaluate`."""

    data: str
    split: str | None
    labels: Path | None

    def opened(self) -> tuple[sources.ImageSource, dict[str, int] | None]:
        """The source, and the number of each class by its name."""
        classes = numbering.class_map(self.labels) if self.labels is not None else None
        return sources.open_source(self.data, self.split), classes


def evaluate(
    artifact: Artifact,
    images: Images,
    options: RunOptions,
    *,
    batch: int | None = None,
    limit: int | None = None,
    out: Path | None = None,
    force: bool = False,
    trust: bool = False,
    progress: Callable[[int, int], None] | None,
    say: Callable[[str], None],
) -> EvalResult:
    """The steps of `api.evaluate`, on an artifact whose files were checked."""
    source, classes = images.opened()
    return evaluation.evaluate(
        formats.opened(artifact, options, trust),
        source,
        artifact=artifact,
        batch=artifact.manifest.export.batch.opt if batch is None else batch,
        out=out,
        limit=limit,
        classes=classes,
        force=force,
        progress=progress,
        say=say,
    )
