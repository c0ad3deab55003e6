"""From a checkpoint and labelled images to the fastest artifact on this machine that is proven to keep its accuracy.

    fp32        every runtime, built and timed beside each other                  this machine
    shorter     half precision and 8 bits, where they can be the fastest          calibration images
    agreement   what is faster than fp32, and has a chance on the final images    selection images
    smaller     plans with less in 8 bits, where the whole has little chance      selection images
    timing      all that is left, interleaved                                     this machine
    gate        the front from the safest to the fastest (`accuracy.finalists`)   final images

The three sets of images are disjoint, and the final ones are looked at only once the order of the finalists is fixed.
Everything is kept below `<out>.optimize/`, so that the same call goes on where one was interrupted.
"""

import contextlib
import datetime
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from .. import arguments, formats
from ..accuracy.targets import problem_of
from ..artifact import manifest
from ..artifact.manifest import encode, write_file
from ..data import numbering, sources
from ..data.image_source import refuse_unlabelled, with_one_label
from ..errors import CheckFailed, DataError, UsageError, WeightsError, counted
from ..models import provenance
from ..models.checkpoint import Loaded
from ..models.names import TO_FEATURES
from ..models.source import Source
from ..records.manifest import BatchRange
from ..records.optimize import OptimizeResult
from ..reports import optimized
from . import build, cluster_optimize
from .agenda import Agenda, View
from .candidates import Goal, Machine, machine_here
from .race import Outcome, Race
from .workshop import Workshop

CALIBRATION = 256  # images, at most an eighth of the labelled ones where these serve for it
SELECTION = 256  # likewise
LEAST_IMAGES = 64  # labelled
DIFFERENCES_SHOWN = 4  # between this call and the one whose work a folder contains
RESULT, PAGE, IDENTITY = "result.json", "report.html", "identity.json"


def work_folder(out: Path) -> Path:
    """Where a run keeps what it has done."""
    return out.with_name(f"{out.name}.optimize")


def optimize(
    source: Source,
    goal: Goal,
    *,
    out: Path,
    say: Callable[[str], None],
    watch: Callable[[View], None],
    ray: str | None = None,
    node_kind: str | None = None,
    command: tuple[str, ...] | None = None,
) -> OptimizeResult:
    """The steps of `api.optimize`, on arguments that are checked.

    Raises:
        UsageError: what can be refused before the work.
        CheckFailed: not even fp32 could be built, or nothing keeps the limit of latency; `result.json` says why.
    """
    if ray is not None:
        cluster_optimize.refuse_bases(source)
    with contextlib.ExitStack() as stack:
        nodes = None if ray is None else stack.enter_context(cluster_optimize.nodes_of(ray, node_kind, goal, say))
        machine = machine_here(goal.runtimes, goal.device) if nodes is None else nodes.machine
        return _optimized(source, goal, machine, nodes, out, say, watch, command)


def _optimized(
    source: Source,
    goal: Goal,
    machine: Machine,
    nodes: "cluster_optimize.Nodes | None",
    out: Path,
    say: Callable[[str], None],
    watch: Callable[[View], None],
    command: tuple[str, ...] | None,
) -> OptimizeResult:
    opened, classes = goal.images.opened()
    refuse_unlabelled(opened)
    say("loading the checkpoint")
    loaded = _classifier(source)
    if loaded.note:
        say(loaded.note)
    for line in provenance.contradictions(loaded.provenance):
        say(line)
    if loaded.preprocessing.assumed:  # said before minutes of work, which a wrong size would waste
        say(
            f"assumed, nothing says it: {', '.join(loaded.preprocessing.assumed)}; `export --data` with these images "
            "tries other values"
        )
    model = loaded.model.spec
    problem = problem_of(model, goal.images.problem)
    if problem != "single-label":
        raise UsageError(
            f"optimize judges top-1, and the model is {problem}; export it, and hold the artifact against its baseline "
            "with `gate`"
        )
    whole = numbering.numbered(with_one_label(opened), model.num_classes, loaded.labels, classes)
    for note in whole.notes:
        say(note)
    sets = _sets(whole, goal.calibration)
    folder = work_folder(out)
    there = _check_identity(
        folder, weights=loaded.weights.tensors_sha256, preprocessing=loaded.preprocessing, model=model,
        options=_named(goal), images=[part.sha256 for part in sets], versions=machine.versions,
        machine=machine.facts if nodes is None else {"nodes": nodes.kind},
    )  # fmt: skip
    if there:
        built = sum((one / manifest.MANIFEST_NAME).is_file() for one in folder.iterdir())
        say(f"going on with the work in {folder}" + (f": {counted(built, 'candidate')} built" if built else ""))
    made: dict[str, Any] = {
        "folder": folder, "source": source, "input": goal.input, "device": goal.device, "threads": goal.threads,
        "batch": BatchRange(min=1, opt=goal.batch, max=max(goal.batch, 32)), "machine": machine,
    }  # fmt: skip
    workshop = (
        Workshop(**made)
        if nodes is None
        else cluster_optimize.Workshop(**made, nodes=nodes, weights_sha256=loaded.weights.tensors_sha256, say=say)
    )
    race = Race(workshop, loaded, goal, *sets, say, Agenda(watch), {})
    try:
        outcome = race.run([formats.get(name) for name in machine.runtimes])
    finally:
        workshop.close()
    result = _result(race, outcome, command)
    write_file(folder / RESULT, encode(result))
    final = sets[2]
    places = {name: index for index, name in enumerate(final.names)}
    page = optimized.page(
        result, lambda name: final.read(places[name]), optimized.next_commands(out, goal.images.words(), result)
    )
    write_file(folder / PAGE, page.encode())
    if outcome.chosen is None:
        raise CheckFailed(f"{outcome.why} (see {folder / PAGE})")
    if nodes is not None:
        say(cluster_optimize.verified_here(workshop.path(race.rows[outcome.chosen]), goal))
    _put(workshop.path(race.rows[outcome.chosen]), out, say)
    for row in race.rows.values():  # what was measured of the others stays
        if (workshop.path(row) / manifest.MANIFEST_NAME).is_file():
            manifest.remove(workshop.path(row))
    return result


def _classifier(source: Source) -> Loaded:
    """The checkpoint.

    Raises:
        UsageError: it is no classifier; with what can be done for it here.
    """
    try:
        return source.load()
    except WeightsError as error:
        wrong, backbone, _ = str(error).partition(TO_FEATURES)
        if not backbone:
            raise
        raise UsageError(
            f"optimize judges top-1: {wrong}; export it with --task features, segment or detect in each type, and "
            "hold the artifacts against each other with `gate` and `bench`"
        ) from None


def _sets(
    whole: sources.ImageSource, calibration: str | sources.ImageSource | None
) -> tuple[sources.ImageSource, sources.ImageSource, sources.ImageSource]:
    """Disjoint images: to calibrate on, to select on, and for the final gate, which gets the most."""
    if len(whole) < LEAST_IMAGES:
        raise DataError(
            f"{whole.name} has {counted(len(whole), 'image')}; at least {LEAST_IMAGES} labelled ones are needed"
        )
    eighth = len(whole) // 8
    if calibration is None:
        first, selection, final = sources.parts(whole, (min(CALIBRATION, eighth), min(SELECTION, eighth), -1))
        return first, selection, final
    selection, final = sources.parts(whole, (min(SELECTION, eighth), -1))
    images = sources.open_whole("--calibration", calibration)
    return sources.parts(images, (min(CALIBRATION, len(images)),))[0], selection, final


def _check_identity(folder: Path, **facts: object) -> bool:
    """Make the folder, or say True of one that contains work of the same call.

    Raises:
        UsageError: it contains the work of something else, naming what, or none at all.
    """
    path, identity = folder / IDENTITY, msgspec.json.encode(facts)
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        write_file(path, identity)
        return False
    if not path.is_file():
        raise UsageError(f"{folder} contains no work of `optimize`; remove it or choose another --out")
    kept = path.read_bytes()
    if kept != identity:
        raise UsageError(
            f"{folder} contains the work of a call with {_differences(kept, identity)}; remove it, or choose another "
            "--out"
        )
    return True


def _named(goal: Goal) -> Goal:
    """With the names of images that are in memory: what they are is told by `images`."""
    given = replace(goal.images, data=str(goal.images.data))
    return replace(goal, images=given, calibration=None if goal.calibration is None else str(goal.calibration))


def _differences(kept: bytes, asked: bytes) -> str:
    """What was another in the call that a folder is of."""
    try:
        before, after = msgspec.json.decode(kept, type=dict[str, Any]), msgspec.json.decode(asked)
    except (msgspec.MsgspecError, RecursionError):  # of an earlier version
        return "other options, images or versions"
    one, other = _flat(before), _flat(after)
    names = [name for name in dict.fromkeys((*one, *other)) if one.get(name) != other.get(name)]
    said = [
        f"other {name}"
        if name in ("weights", "images")
        else f"{name} {arguments.shown(one.get(name))} in the place of {arguments.shown(other.get(name))}"
        for name in names[:DIFFERENCES_SHOWN]
    ]
    return ", ".join(said) + (f" and {len(names) - len(said)} more" if len(names) > len(said) else "")


def _flat(facts: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Facts by the names of their fields; those of options stand alone, as on the command line."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        called = f"--{name.replace('_', '-')}" if within == "options" else f"{within} {name}".strip()
        flat |= (
            _flat(value, "options" if called == "--images" else called) if isinstance(value, dict) else {called: value}
        )
    return flat


def _result(race: Race, outcome: Outcome, command: tuple[str, ...] | None) -> OptimizeResult:
    loaded, goal, machine = race.loaded, race.goal, race.workshop.machine
    sizes = (len(race.calibration), len(race.selection), len(race.final))
    return OptimizeResult(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        model=loaded.model.spec.architecture,
        weights=loaded.weights.source,
        weights_sha256=loaded.weights.tensors_sha256,
        image_size=loaded.model.spec.image_size,
        input=goal.input,
        preprocessing=loaded.preprocessing,
        device=goal.device,
        threads=goal.threads,
        objective=goal.objective,
        batch=goal.batch,
        max_drop=goal.max_drop,
        alpha=goal.alpha,
        max_latency_ms=goal.max_latency_ms,
        data=race.final.name,
        images=dict(zip(("calibration", "selection", "final"), sizes, strict=True)),
        candidates=tuple(race.rows.values()),
        baseline=outcome.baseline,
        baseline_top1=outcome.baseline_top1,
        order=outcome.order,
        chosen=outcome.chosen,
        why=outcome.why,
        timings=outcome.timings,
        seconds=race.agenda.seconds,
        notes=(*race.final.notes, *(f"{name} did not take part: {why}" for name, why in machine.left_out.items())),
        command=command,
        machine=machine.facts,
        versions=machine.versions,
    )


def _put(made: Path, out: Path, say: Callable[[str], None]) -> None:
    """The chosen folder at its place, in one step."""
    with manifest.staged(out, say) as folder:
        shutil.copytree(made, folder, dirs_exist_ok=True)
    build.remember(formats.of(manifest.read(out)), out, manifest.MANIFEST_NAME, say)
