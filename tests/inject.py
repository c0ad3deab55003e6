"""Faults in what a builder writes: the module that it gets is a copy with one thing wrong, which only a check can see.

`python tests/inject.py` makes 100 faults a format and type, 300 a format, with a fixed seed. It prints the table
of docs/design/verification.md: how many were caught, how many by outputs alone, and how far the smallest moved the
outputs.
"""

import argparse
import copy
import dataclasses
import functools
import importlib
import itertools
import random
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import timm
import torch
from faults import FAULTS, OF_8_BITS, Fault, NoSuch
from references import randomize_
from safetensors.torch import save_file

from convnext_deploy import api, formats
from convnext_deploy.accuracy import probes
from convnext_deploy.artifact import deviation, readback
from convnext_deploy.artifact.session import RunOptions
from convnext_deploy.data import preprocess
from convnext_deploy.errors import CheckFailed
from convnext_deploy.formats.base import Format, StandIn
from convnext_deploy.graph.capture import DeployGraph
from convnext_deploy.graph.module_contents import expected_of
from convnext_deploy.models import checkpoint, passes
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.quantization import plan as plans
from convnext_deploy.quantization.calibrate import calibrate
from convnext_deploy.quantization.images import random_images
from convnext_deploy.records.base import Precision
from convnext_deploy.records.manifest import BatchRange, ExportRequest, Manifest, OracleRecord
from convnext_deploy.workflows import build, export

SIZE = (32, 32)
BATCH = BatchRange(min=1, opt=4, max=4)
# Two small models in turn, so that each has half of the faults: V1 with layer scale, V2 with GRN.
SMALL: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 10}

Files = dict[str, bytes]
# A format's builder, given a faulty module ----------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Subject:
    """A model that was exported rightly, up to what its files are checked with; and what was built for faulty ones."""

    fmt: Format
    graph: DeployGraph
    right: ConvNeXt
    held: readback.Expected
    files: Files
    record: Manifest
    sets: tuple[probes.Probe, ...]
    reload: probes.Reload
    seen: set[Any] = dataclasses.field(default_factory=set)


def subject(name: str, precision: Precision, folder: Path, *, grn: bool = False, eight_bits: bool = False) -> Subject:
    """A model built in a format and type; in 8 bits with every product, and the rest in `precision`."""
    fmt = formats.get(name)
    model = timm.models.convnext.ConvNeXt(**SMALL, use_grn=grn, ls_init_value=None if grn else 1e-6)
    weights = str(folder / f"{'v2' if grn else 'v1'}.safetensors")
    save_file(randomize_(model).state_dict(), weights)
    reload = functools.partial(checkpoint.load, weights, image_size=SIZE)
    plan = _plan(reload(), name, precision) if eight_bits else None
    request = ExportRequest(format=name, precision=precision, batch=BATCH)
    loaded = reload()
    sets = probes.of_source(loaded, False, None)
    unasked = OracleRecord(name="self")
    prepared = export._prepared(fmt, request, loaded, sets, unasked, plan, "none", None, lambda _: None)
    right = copy.deepcopy(loaded.model)  # the build gives the module's weights back
    graph = dataclasses.replace(prepared.graph, module=copy.deepcopy(prepared.graph.module))
    with tempfile.TemporaryDirectory() as scratch:
        record = build.built(fmt, prepared, Path(scratch)).manifest
        files = _read(Path(scratch))
    assert record.read_back is not None
    assert record.read_back.failures == ()
    held = expected_of(right, halved=not fmt.typed_graph and precision == "fp16")
    return Subject(fmt, graph, right, held, files, record, prepared.sets, reload)


def _plan(loaded: checkpoint.Loaded, target: Any, rest: Precision) -> plans.LoadedPlan:
    example = torch.zeros(2, 3, *SIZE)
    passes.fold(loaded.model, None, lambda m: (m(example),))
    names = plans.products(loaded.model)
    options: dict[str, Any] = {"preprocessing": loaded.preprocessing, "images": 32, "batch": 16}
    found = calibrate(loaded.model, tuple(names.values()), random_images(32, SIZE), **options)
    eight = formats.eight_bits_of(target)
    options = {"method": "mse", "input": "float32", "rest": rest, "type": eight.int8, "eight_bits": eight}
    plan = plans.draft(
        loaded.model, found, tuple(names), target=target, weights_sha256=loaded.weights.tensors_sha256, **options
    )
    return plans.LoadedPlan(plan, {}, eight_bits=eight)


def _read(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _files(given: Subject, wrong: ConvNeXt, held: readback.Expected) -> Files:
    """What the builder writes for a module; built where the right files cannot be patched, which takes seconds."""
    patched = _patched(given, held)
    if patched is not None:
        return patched
    with tempfile.TemporaryDirectory() as folder:
        module = wrong if given.fmt.rewrite is None else given.fmt.rewrite(wrong)
        given.fmt.build(dataclasses.replace(given.graph, module=module), Path(folder))
        return _read(Path(folder))


def _patched(given: Subject, after: readback.Expected) -> Files | None:
    """The right files with the changed tensors in their places; None where these are not found, or not once."""
    before, files = given.held, dict(given.files)
    alike = (before.epsilons, before.activations) == (after.epsilons, after.activations)
    if not alike or [t.name for t in before.tensors] != [t.name for t in after.tensors]:
        return None
    for old, new in zip(before.tensors, after.tensors, strict=True):
        if readback.checksum(old.values) == readback.checksum(new.values):
            continue
        if old.values.size < 8:  # too few bytes to be found by
            return None
        for content, changed in zip(_spellings(old), _spellings(new), strict=True):
            places = [name for name, file in files.items() if content in file]
            if len(places) == 1 and files[places[0]].count(content) == 1:
                files[places[0]] = files[places[0]].replace(content, changed)
                break
        else:
            return None
    return files


def _spellings(tensor: readback.Tensor) -> Iterator[bytes]:
    """As files may contain it; the order does not depend on the values."""
    for type in dict.fromkeys((tensor.type, "float32", "float16")):
        for values in readback._types(tensor, type, halved=True):
            for layout in readback._layouts(values):
                yield layout.tobytes()


# Trials ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One fault. `moved` is how far it moves the outputs by itself, in float64 (relative, the worst of four images)."""

    fault: str
    moved: float
    by_file: bool
    by_outputs: bool

    @property
    def caught(self) -> bool:
        return self.by_file or self.by_outputs


def tried(given: Subject, fault: Fault, chance: random.Random) -> Trial | None:
    """A fault between build and check, and both checks of an export; None where it was tried, or changes no file."""
    wrong = copy.deepcopy(given.right)
    try:
        with torch.no_grad():
            fault(wrong, chance)
    except NoSuch:
        return None
    held = expected_of(wrong)
    identity = tuple(map(tuple, (held.checksums, held.epsilons, held.activations)))
    if identity in given.seen:
        return None
    given.seen.add(identity)
    files = _files(given, wrong, held)
    if files == given.files:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        assert given.fmt.read_back is not None
        by_file = readback.differences(given.fmt.read_back(folder), given.held).failures
        session = given.fmt.load(folder, given.record, RunOptions(threads=1))
        parity = probes.judged(session, given.record, given.sets, given.reload)
    by_outputs = any(found.failures for found in parity)
    return Trial(fault.__name__, _moved(given.right, wrong), bool(by_file), by_outputs)


def _moved(right: ConvNeXt, wrong: ConvNeXt) -> float:
    images = torch.from_numpy(preprocess.probe_images(3, SIZE, 4) / 127.5 - 1)
    with torch.inference_mode():
        found, expected = (copy.deepcopy(model).double()(images).numpy() for model in (wrong, right))
    return float(deviation.relative_errors(found, expected).max())


def caught(name: str, precision: Precision, fault: Fault, chance: random.Random, folder: Path) -> bool:
    """Whether a whole export with the fault is refused."""
    module = importlib.import_module(f"convnext_deploy.formats.{name}")
    right: Format = module.FORMAT

    def build(graph: DeployGraph, folder: Path) -> StandIn | None:
        wrong = copy.deepcopy(graph.module)
        assert isinstance(wrong, ConvNeXt)
        with torch.no_grad():
            fault(wrong, chance)
        return right.build(dataclasses.replace(graph, module=wrong), folder)

    setattr(module, "FORMAT", dataclasses.replace(right, build=build))  # noqa: B010 - no module has it for mypy
    try:
        api.export(
            "random", variant="test_convnext", num_classes=10, format=name, precision=precision, image_size=SIZE,
            batch=BATCH, out=folder / "artifact", force=True,
        )  # fmt: skip
    except CheckFailed:
        return True
    finally:
        setattr(module, "FORMAT", right)  # noqa: B010
    return False


CASES: tuple[tuple[str, Precision, bool], ...] = (
    ("native", "fp32", False), ("native", "bf16", False), ("native", "fp32", True),
    ("onnx", "fp32", False), ("onnx", "fp16", False), ("onnx", "fp32", True),
    ("openvino", "fp32", False), ("openvino", "bf16", False), ("openvino", "fp32", True),
    ("torchscript", "fp32", False), ("torchscript", "fp16", False), ("torchscript", "bf16", False),
    ("pt2", "fp32", False), ("pt2", "fp16", False), ("pt2", "bf16", False),
    ("eager", "fp32", False), ("eager", "fp16", False), ("eager", "bf16", False),
)  # fmt: skip


def trials(name: str, precision: Precision, eight_bits: bool, count: int, seed: int = 0) -> list[Trial]:
    """As many faults, of all kinds in turn."""
    kinds = FAULTS + (OF_8_BITS if eight_bits else ())
    chance, found = random.Random(seed), list[Trial]()
    with tempfile.TemporaryDirectory() as scratch:
        subjects = [subject(name, precision, Path(scratch), grn=grn, eight_bits=eight_bits) for grn in (False, True)]
        for index in itertools.count():
            trial = tried(subjects[index // len(kinds) % 2], kinds[index % len(kinds)], chance)
            found += [] if trial is None else [trial]
            if len(found) == count:
                return found
    raise AssertionError("unreachable")


def row(name: str, type: str, found: list[Trial]) -> str:
    caught = [trial for trial in found if trial.caught]
    by_outputs = [trial.moved for trial in found if trial.by_outputs]
    missed = [trial.moved for trial in found if not trial.caught]
    cells = (
        name, type, str(len(found)), str(len(caught)), _least(t.moved for t in caught), str(len(by_outputs)),
        _least(by_outputs), f"{max(missed):.1e}" if missed else "none missed",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _least(moved: Any) -> str:
    some = [value for value in moved if value > 0]
    return f"{min(some):.1e}" if some else "none"


HEADING = """\
| format | type | faults | caught | smallest | caught by outputs | smallest of these | largest missed |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the faults that verification catches, by format and type.")
    parser.add_argument("--faults", type=int, default=100, help="of each format and type")
    parser.add_argument("--only", nargs="*", default=[], help="formats, or formats with their type: onnx-int8")
    parser.add_argument("--log", type=Path, help="every fault, a line of JSON each")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(HEADING, flush=True)
    for name, precision, eight_bits in CASES:
        type = "int8" if eight_bits else precision
        if arguments.only and not {name, f"{name}-{type}"} & set(arguments.only):
            continue
        found = trials(name, precision, eight_bits, arguments.faults)
        print(row(name, type, found), flush=True)
        if arguments.log:
            with arguments.log.open("a") as log:
                for trial in found:
                    log.write(msgspec.json.encode({"format": name, "type": type} | dataclasses.asdict(trial)).decode())
                    log.write("\n")


if __name__ == "__main__":
    main()
