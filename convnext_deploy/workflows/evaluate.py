"""`evaluate`: an artifact on labelled images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import formats
from ..accuracy import evaluation
from ..accuracy.partial import SCORED
from ..accuracy.targets import problem_of
from ..artifact.manifest import Artifact
from ..artifact.session import RunOptions
from ..data import numbering, sources
from ..records.accuracy import EvalResult, ScoreResult
from ..records.base import Problem


@dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled images, and the file of the model's class names; each as in `api.evaluate`."""

    data: str
    split: str | None = None
    labels: Path | None = None
    annotations: str | None = None
    class_order: sources.ClassOrder = "torchvision"
    problem: Problem | None = None

    def words(self) -> tuple[str, ...]:
        """The options of the command line that name the same images."""
        given = {
            "--data": self.data, "--split": self.split, "--labels": self.labels, "--annotations": self.annotations,
            "--class-order": None if self.class_order == "torchvision" else self.class_order, "--problem": self.problem,
        }  # fmt: skip
        return tuple(word for option, value in given.items() if value is not None for word in (option, str(value)))

    def opened(self) -> tuple[sources.ImageSource, dict[str, int] | None]:
        """The source, and the number of each class by its name."""
        classes = numbering.class_map(self.labels) if self.labels is not None else None
        source = sources.open_source(self.data, self.split, annotations=self.annotations, class_order=self.class_order)
        return source, classes


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
) -> EvalResult | ScoreResult:
    """The steps of `api.evaluate`, on an artifact whose files were checked."""
    problem = problem_of(artifact.manifest.model, images.problem)
    source, classes = images.opened()
    judge = evaluation.score if problem in SCORED else evaluation.evaluate
    return judge(
        formats.opened(artifact, options, trust),
        source,
        artifact=artifact,
        batch=artifact.manifest.export.batch.opt if batch is None else batch,
        problem=problem,
        out=out,
        limit=limit,
        classes=classes,
        force=force,
        progress=progress,
        say=say,
    )
