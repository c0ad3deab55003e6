"""`evaluate`: an artifact on labelled images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import formats
from ..accuracy import evaluation
from ..accuracy.inference import Runner
from ..accuracy.targets import problem_of
from ..artifact.manifest import Artifact
from ..artifact.session import RunOptions, Session
from ..cluster import connection
from ..data import boxes, masks, numbering, sources
from ..errors import UsageError
from ..records.accuracy import SCORED, EvalResult, ScoreResult
from ..records.base import Goal, Problem
from . import cluster_evaluate


@dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled images, and the file of the model's class names; each as in `api.evaluate`."""

    data: str | sources.ImageSource
    split: str | None = None
    labels: Path | None = None
    annotations: str | None = None
    class_order: sources.ClassOrder = "torchvision"
    problem: Problem | None = None
    reduce_labels: bool = False

    def words(self) -> tuple[str, ...]:
        """The options of the command line that name the same images."""
        given = {
            "--data": self.data if isinstance(self.data, str) else "DATA", "--split": self.split,
            "--labels": self.labels, "--annotations": self.annotations,
            "--class-order": None if self.class_order == "torchvision" else self.class_order, "--problem": self.problem,
        }  # fmt: skip
        flags = ("--reduce-labels",) if self.reduce_labels else ()
        return flags + tuple(
            word for option, value in given.items() if value is not None for word in (option, str(value))
        )

    def opened(self) -> tuple[sources.ImageSource, dict[str, int] | None]:
        """The source, and the number of each class by its name."""
        if self.reduce_labels:
            raise UsageError("--reduce-labels is for the masks of a segmenter; leave it out")
        classes = numbering.class_map(self.labels) if self.labels is not None else None
        source = sources.open_source(self.data, self.split, annotations=self.annotations, class_order=self.class_order)
        return source, classes

    def of(self, artifact: Artifact) -> tuple[sources.ImageSource, dict[str, int] | None, Goal]:
        """The source as the artifact needs it, the number of each class by its name, and what the model is judged as.

        Raises:
            UsageError: the model has no accuracy, or options that are for another.
            DataError: the images or masks are not what they are said to be.
        """
        model = artifact.manifest.model
        goal = problem_of(model, self.problem)
        if model.detection is not None:
            return self._boxed(artifact), None, goal
        if model.segmentation is None:
            return *self.opened(), goal
        if self.labels is not None:
            raise UsageError(f"--labels {self.labels}: masks contain the numbers of classes; give it to export")
        listed = self.annotations is not None and sources.is_list(self.annotations)
        source = masks.masked(
            sources.open_source(self.data, self.split, annotations=self.annotations if listed else None),
            None if listed else self.annotations,
            ignored=model.segmentation.ignored,
            reduce_labels=self.reduce_labels or model.segmentation.reduce_labels,
        )
        return source, None, goal

    def _boxed(self, artifact: Artifact) -> sources.ImageSource:
        """The source with the objects of a COCO file, whose categories are found among the model's class names."""
        if self.annotations is None:
            raise UsageError(f"{artifact.path} is a detector; give --annotations FILE, a COCO file of instances")
        if self.reduce_labels:
            raise UsageError("--reduce-labels is for the masks of a segmenter; leave it out")
        model, named = artifact.manifest.model, artifact.manifest.labels
        facts = model.detection
        assert facts is not None
        numbers = None if named is None else {name: number for number, name in enumerate(named)}
        if self.labels is not None:
            names = numbering.names_of(self.labels, model.num_classes)
            numbers = {name: number for number, name in enumerate(names)}
        source = sources.open_source(self.data, self.split)
        return boxes.boxed(source, Path(self.annotations), numbers, model.num_classes, bool(facts.mask_side))


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
    ray: str | None = None,
    progress: Callable[[int, int], None] | None,
    say: Callable[[str], None],
) -> EvalResult | ScoreResult:
    """The steps of `api.evaluate`, on an artifact whose files were checked."""
    address = None if ray is None else connection.checked(ray)
    source, classes, problem = images.of(artifact)
    judge = evaluation.score if problem in SCORED else evaluation.evaluate
    session: Session | Runner = (
        formats.opened(artifact, options, trust)
        if address is None
        else cluster_evaluate.runner(address, options, trust=trust, say=say)
    )
    return judge(
        session,
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
