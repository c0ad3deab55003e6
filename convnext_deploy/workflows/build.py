"""From a module in its final form to a folder that is verified and recorded: every model goes this way."""

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from .. import env
from ..accuracy import canary, probes
from ..artifact import licences, manifest, readback, trust, verify
from ..artifact.session import RunOptions, Session
from ..errors import ParityError, PrecisionError
from ..formats.base import Format
from ..graph.capture import DeployGraph, input_record, output_records
from ..quantization import saturation
from ..records.base import SCHEMA
from ..records.manifest import (
    ExportSpec,
    Manifest,
    ModelSpec,
    OracleRecord,
    PassRecord,
    PrecisionTruth,
    Preprocessing,
    Provenance,
    ReadBack,
    WeightsRecord,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A module that nothing changes any more, and all that its manifest says of where it comes from."""

    graph: DeployGraph
    sets: tuple[probes.Probe, ...]  # images with the outputs of every reference
    weights: WeightsRecord
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None = None
    provenance: dict[str, Provenance] = field(default_factory=dict)
    passes: tuple[PassRecord, ...] = ()
    oracle: OracleRecord | None = None
    held: readback.Expected | None = None  # what the built files have to hold; None where nothing knows


@dataclass(frozen=True, slots=True)
class Built:
    """A folder with a format's files. The manifest lacks what only running them can tell."""

    manifest: Manifest
    sets: tuple[probes.Probe, ...]
    open: Callable[[Manifest], Session]  # of the files, or of their stand-in


def built(fmt: Format, prepared: Prepared, folder: Path) -> Built:
    """Capture and build, and read the files back.

    The module is released with `prepared`, so that it is not in memory beside what the runtime reads.
    """
    graph = prepared.graph
    model, spec = graph.model, graph.export
    graph.say(f"building {fmt.name}")
    stand_in = fmt.build(graph, folder)
    licences.write(prepared.weights.licence, folder)
    draft = described(
        model,
        spec,
        prepared.weights,
        prepared.preprocessing,
        labels=prepared.labels,
        provenance=prepared.provenance,
        passes=prepared.passes,
        oracle=prepared.oracle,
        read_back=_read_back(fmt, prepared.held, folder),
    )
    if stand_in is None:  # which may run the program
        graph.release()
    open_here = stand_in or (lambda manifest: fmt.load(folder, manifest, RunOptions(device=spec.device)))
    return Built(draft, prepared.sets, open_here)


def described(
    model: ModelSpec, spec: ExportSpec, weights: WeightsRecord, facts: Preprocessing, **made: Any
) -> Manifest:
    """What a session has to know, before anything has run: the only place that makes a manifest.

    Args:
        made: further fields of `Manifest`.
    """
    return Manifest(
        schema_version=SCHEMA,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        tool=f"convnext-deploy {env.version()}",
        model=model,
        weights=weights,
        preprocessing=facts,
        export=spec,
        inputs=(input_record(model, spec),),
        outputs=output_records(model, spec),
        parity=(),
        precision=PrecisionTruth(graph={}),
        versions=env.versions(),
        machine=env.machine(),
        files=(),
        **{"labels": None, "passes": (), **made},
    )


def _read_back(fmt: Format, held: readback.Expected | None, folder: Path) -> ReadBack:
    """The built files beside the module that they were built from."""
    if fmt.read_back is None or held is None:
        what = f"{fmt.name}'s files" if fmt.read_back is None else "a network of another family"
        return ReadBack(tensors=0, epsilons=None, activations=None, unread=f"{what} cannot be read back")
    return readback.differences(fmt.read_back(folder), held)


def verified(
    fmt: Format, made: Built, folder: Path, target: Path, *, own: bool = True, reload: probes.Reload | None = None
) -> Manifest:
    """The whole manifest of a folder that computes what its module does, in the type that was asked for.

    Args:
        target: where the folder goes; a wrong one is kept aside beside it.
        own: it is this package's network, of which every format can tell the types of the products.
        reload: reads the source again, as it is before any rewrite.

    Raises:
        CheckFailed: the outputs, the files or the types are wrong.
    """
    session = made.open(made.manifest)
    record = msgspec.structs.replace(
        made.manifest,
        parity=probes.judged(session, made.manifest, made.sets, reload),
        precision=session.precision(),
    )
    (folder / canary.FILE).write_bytes(canary.recorded(record, made.sets[0]))
    record = msgspec.structs.replace(record, files=manifest.file_records(folder))
    _judge(record, fmt, folder, target, own)
    return record


def _judge(record: Manifest, fmt: Format, folder: Path, target: Path, own: bool) -> None:
    """Keep a wrong artifact aside, with its report, and raise."""
    wrong = [f"on {parity.images}: {failure}" for parity in record.parity for failure in parity.failures]
    wrong += record.read_back.failures if record.read_back else ()
    imprecise: tuple[str, ...] = ()
    if own or record.precision.graph or record.precision.executed:
        imprecise = verify.precision_failures(record.precision, record, fmt.typed_graph, engine=fmt.ahead_of_time)
    if not wrong and not imprecise:
        return
    rejected = target.absolute().with_name(target.name + ".rejected")
    (folder / manifest.REJECTED_NAME).write_bytes(manifest.encode(record))
    in_the_way = manifest.not_ours(rejected, manifest.REJECTED_NAME) if os.path.lexists(rejected) else None
    where = f"kept aside in {rejected}" if in_the_way is None else f"not kept aside: {in_the_way}"
    if in_the_way is None:
        manifest.replace(folder, rejected, manifest.REJECTED_NAME)
    # The tolerances are those of the precision that was asked for: where another ran, the outputs are its consequence.
    error = PrecisionError if imprecise else ParityError
    cause = saturation.cause(fmt.eight_bits, record.export.quantization)
    likely = () if cause is None else (cause,)
    raise error(f"{'; '.join((*likely, *imprecise, *wrong))}; {where}")


def remember(fmt: Format, target: Path, marker: str, say: Callable[[str], None]) -> None:
    """Record what runs code as built by this user; say why where that cannot be."""
    unrecorded = trust.remember(manifest.sha256_of(target / marker)) if fmt.runs_code else None
    if unrecorded is not None:
        say(f"not recorded as built by you, so that opening it needs --trust: {unrecorded}")
