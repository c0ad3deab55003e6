"""Accuracy: measured by `evaluate`, and held against a baseline by `gate`."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from .. import argument_names, arguments
from ..arguments import Unpack
from ..errors import UsageError, plain
from ..records.accuracy import EvalResult, Limits, ScoreResult, ScoreVerdict, Verdict
from ..records.base import content_of
from ..workflows.export import Say, silent
from .artifacts import OpeningOptions, SessionOptions, opened, run_options
from .images import Images, JudgedOptions, labelled, labelled_or_none
from .verbs import defaults_of, part, verb


class EvaluateOptions(JudgedOptions, SessionOptions, total=False):
    """How labels are read, and how the artifact runs."""


class GateOptions(JudgedOptions, OpeningOptions, total=False):
    """How labels are read, and how both artifacts run."""


@verb
def evaluate(
    path: arguments.Location,
    data: Images,
    *,
    batch: int | None = None,
    limit: int | None = None,
    out: arguments.Location | None = None,
    force: bool = False,
    ray: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Say = silent,
    **options: Unpack[EvaluateOptions],
) -> EvalResult | ScoreResult:
    """Accuracy of an artifact over labelled images; every prediction is kept when `out` is given.

    The labels must be the model's. Class names are looked up among the artifact's labels, in `labels`, or as WordNet
    ids; without any of these there must be as many classes as the model has outputs, and their order is assumed.

    Args:
        path: the artifact's folder.
        data: folder of class folders, tar, Parquet, a list of images, or `hfds:NAME`; or what a program has in memory:
            a list of (image, label), a dataset or loader of PyTorch, or a dataset of Hugging Face, whose images are
            paths, Pillow's, or arrays of uint8.
        batch: images at once; None: the size the artifact is tuned for.
        limit: only so many images, evenly spaced over the source.
        out: path without suffix for `<out>.json` and `<out>.npz`.
        force: replace what an earlier call wrote there.
        ray: evaluate on the nodes of a Ray cluster: HOST:PORT, "auto" for the one that runs on this machine, or
            "local" for one of this machine's cores that ends with the call.
        progress: told (images done, images in all).
        say: told what is assumed about the images, and where an interrupted call goes on.
    """
    images = labelled(data, part(options, JudgedOptions))
    out = arguments.maybe(arguments.path, "out", out)
    batch = arguments.maybe(arguments.batch_size, "batch", batch)
    argument_names.check(limit=limit, force=force, ray=ray, say=say)
    arguments.progress(progress, arguments.OF_IMAGES)
    run, trust = run_options(part(options, SessionOptions))
    artifact = opened(path)
    from ..workflows import evaluate as workflow

    return workflow.evaluate(
        artifact,
        images,
        run,
        batch=batch,
        limit=limit,
        out=out,
        force=force,
        trust=trust,
        ray=ray,
        progress=progress,
        say=say,
    )


@verb
def gate(
    baseline: arguments.Location,
    candidate: arguments.Location,
    *,
    limits: Limits | Mapping[str, Any] | arguments.Location,
    data: Images | None = None,
    out: arguments.Location | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Say = silent,
    **options: Unpack[GateOptions],
) -> Verdict | ScoreVerdict:
    """Hold a candidate against its baseline: on accuracy, and where the limits ask for it on latency and size.

    Args:
        baseline: `<out>.json` of an evaluation, with its predictions beside it; or an artifact folder.
        candidate: likewise.
        limits: `records.accuracy.Limits`, a dictionary of its fields, or a TOML file of them.
        data: what artifact folders are evaluated on, as for `evaluate`.
        out: folder that keeps their evaluations, `baseline` and `candidate`, which are not run twice.
        progress: told (images done, images in all) of one evaluation after the other.
        say: as for `evaluate`.

    Raises:
        DataError: the two were not evaluated on the same images.
        UsageError: a side that does not exist, an artifact without `data`, `data` without an artifact, or a limit that
            needs artifacts.
    """
    paths = {
        name: arguments.path(name, given, "an artifact folder, or OUT.json of an evaluation")
        for name, given in (("baseline", baseline), ("candidate", candidate))
    }
    if all(path.is_file() for path in paths.values()):
        defaults = defaults_of(JudgedOptions)
        for name, value in part(options, JudgedOptions).items():
            if value != defaults[name]:
                option = f"--{name.replace('_', '-')}" + ("" if value is True else f" {arguments.shown(value)}")
                raise UsageError(f"{option} is for artifacts, and both sides are results of eval; leave it out")
    images = labelled_or_none(data, part(options, JudgedOptions))
    out = arguments.maybe(arguments.path, "out", out)
    argument_names.check(say=say)
    arguments.progress(progress, arguments.OF_IMAGES)
    run, trust = run_options(part(options, OpeningOptions))
    judged = _limits(limits)
    from ..workflows import gate as workflow

    return workflow.gate(paths, judged, images, run, out=out, trust=trust, progress=progress, say=say)


def _limits(given: Any) -> Limits:
    from ..accuracy.gate import limits_from, limits_from_toml

    if isinstance(given, Limits):
        return limits_from(msgspec.structs.asdict(given))
    if isinstance(given, Mapping):
        return limits_from(given)
    file = arguments.path("limits", given, "a dictionary of limits, records.accuracy.Limits, or a TOML file of them")
    try:
        return limits_from(limits_from_toml(content_of(file).decode(), str(file)))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"limits {file} cannot be read: {plain(error)}") from None
