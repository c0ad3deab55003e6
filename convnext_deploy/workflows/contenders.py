"""Who takes part in a benchmark: artifacts, ConvNeXts with random weights, and timm's models in the same formats."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from .. import env, formats
from ..artifact import manifest
from ..artifact.trust import built_here
from ..errors import MissingPackageError, UsageError, WorkerError
from ..models.source import Source
from ..native import library
from ..records.base import Device, NetworkTask, PlanType, Precision, Record, Sha256, Task, content_of
from ..records.manifest import BatchRange, ExportRequest, ModelSpec
from ..records.timing import Ceilings
from ..timing.worker import Worker
from .caches import BASELINE_NAME, BENCH

if TYPE_CHECKING:
    pass

COUNTERPARTS = "convnext_deploy.workflows.counterparts"  # imported by workers
BUILDS_AT_ONCE = 2  # a build of a large model takes several times its weights
TORCH = ("torch", "torch.compile")  # timm's own module, as it comes


class Contender(Record, frozen=True, kw_only=True):
    """One model on one runtime, and how a worker opens it."""

    model: str
    runtime: str
    precision: Precision
    task: Task
    image_size: tuple[int, int]
    batch: BatchRange
    opener: str  # "module:function", called in the worker
    arguments: dict[str, Any]
    imports: tuple[str, ...]  # first, outside of the time that opening takes
    artifact: str | None = None
    artifact_sha256: Sha256 | None = None
    artifact_bytes: int | None = None
    random_weights: bool = True
    parity: float | None = None
    spec: ModelSpec | None = None  # of a ConvNeXt without the head of another network: what its operations are
    eight_bits: PlanType | None = None  # products in it, the rest in `precision`
    label: str | None = None  # beside the model, where two artifacts would be called the same
    broken: str | None = None  # why it could not be built

    @property
    def subject(self) -> str:
        return " ".join(filter(None, (self.model, self.runtime, self.eight_bits or self.precision, self.label)))


class Wanted(Record, frozen=True, kw_only=True):
    """A model with random weights that is to be built."""

    model: str
    runtime: str
    precision: Precision
    task: Task
    image_size: tuple[int, int]
    device: Device

    @property
    def batch(self) -> BatchRange:
        """Tuned for eight images of 224 pixels, or as many as have no more pixels: builds run such a batch."""
        height, width = self.image_size
        return BatchRange(min=1, opt=min(8, max(1, 8 * 224 * 224 // (height * width))), max=256)

    @property
    def folder(self) -> Path:
        sides = "x".join(map(str, self.image_size))
        return BENCH / f"{self.model}-{self.runtime}-{self.precision}-{self.task}-{sides}-{self.device}"


def measured_ceilings(device: Device, threads: int | None, precisions: Sequence[str] | None = None) -> Ceilings:
    """What this machine can do at most, measured now, in a process of its own.

    Args:
        precisions: that are asked for; None: all.

    Raises:
        MissingPackageError: a CPU needs PyTorch or the native engine for it, a GPU PyTorch.
        WorkerError: it failed.
    """
    absent = env.missing(("torch",))
    if absent and device == "cuda":
        raise MissingPackageError(env.missing_line(*absent))
    if absent:
        library.state()
    worker = Worker("measuring ceilings", ("convnext_deploy.timing.roofline", *(() if absent else ("torch",))))
    try:
        ceilings = worker.call(
            "call",
            function="convnext_deploy.timing.roofline:measure",
            arguments={"device": device, "threads": threads, "precisions": precisions},
        )
    finally:
        worker.close()
    return msgspec.convert(ceilings, Ceilings)


def installed_runtimes(device: Device) -> tuple[list[str], list[str]]:
    """(runtimes that `bench` takes by default, a line for each that is left out)."""
    runtimes, left_out = ["torch"], ["torch.compile is left out: it compiles half a minute a row; ask with --runtime"]
    for name in formats.names():
        fmt = formats.get(name)
        if device not in fmt.benched:
            continue
        try:
            formats.state(fmt)
        except MissingPackageError as error:
            left_out.append(f"{name} is left out: {error}")
        else:
            runtimes.append(name)
    return runtimes, left_out


def of_variants(
    variants: Sequence[str],
    compare: Sequence[str],
    runtimes: Sequence[str],
    precisions: Sequence[Precision],
    image_sizes: Sequence[tuple[int, int]],
    task: Task,
    device: Device,
    say: Callable[[str], None],
) -> list[list[Contender]]:
    """ConvNeXts with random weights beside their counterparts, one group a ConvNeXt and image size.

    Raises:
        UsageError: an unknown variant, counterpart or runtime, or one asked for by name that has not the device, the
            task or any of the precisions.
    """
    from ..models import baselines, registry

    by_name = bool(runtimes)  # what is asked for by name is refused, not left out
    if not by_name:
        runtimes, left_out = installed_runtimes(device)
        for line in left_out:
            say(line)
    for runtime in set(runtimes) - set(TORCH):
        fmt = formats.get(runtime)
        formats.require(fmt)
        formats.refuse_device(fmt, device)
    for runtime in runtimes:
        if runtime in TORCH:
            continue
        fmt = formats.get(runtime)
        if task not in fmt.tasks:
            if by_name:
                raise UsageError(
                    f"runtime {runtime} does not take --task {task}; expected one of "
                    f"{', '.join((*TORCH, *(name for name in formats.names() if task in formats.get(name).tasks)))}"
                )
            say(f"{runtime} is left out: it does not take --task {task}")
        elif by_name and fmt.precisions.isdisjoint(precisions):
            lacks = f"runtime {runtime} does not have {', '.join(precisions)}"
            raise UsageError(f"{lacks}; expected --precision {', '.join(sorted(fmt.precisions))}")
    runtimes = [runtime for runtime in runtimes if runtime in TORCH or task in formats.get(runtime).tasks]
    if not variants:
        families = [baselines.FAMILIES[word] for word in compare if word in baselines.FAMILIES]
        variants = [size for size in ("tiny", "small", "base", "large") if any(size in f for f in families)] or ["tiny"]
    groups = []
    for variant in variants:
        architecture, _ = registry.resolve(variant)
        for size in image_sizes:
            models = [architecture, *(baselines.counterpart(word, architecture, size) for word in compare)]
            group = [
                Wanted(model=m, runtime=r, precision=p, task=task, image_size=size, device=device)
                for p in precisions
                for m in dict.fromkeys(models)
                for r in runtimes
                if r in TORCH or p in formats.get(r).precisions
                if r in TORCH or m == architecture or not formats.get(r).own_network
            ]
            for runtime in runtimes:
                lacking = [p for p in precisions if runtime not in TORCH and p not in formats.get(runtime).precisions]
                for precision in lacking:
                    say(f"{runtime} is left out in {precision}, which it does not have")
            groups.append(group)
    artifacts = dict(
        zip(every := list(dict.fromkeys(w for group in groups for w in group)), built(every, say), strict=True)
    )
    return [[artifacts[want] for want in group] for group in groups]


def of_artifacts(
    paths: Sequence[Path],
    compare: Sequence[str],
    device: Device,
    cuda_graph: bool,
    say: Callable[[str], None],
    trust: bool = False,
) -> list[Contender]:
    """Artifacts that exist, and the counterparts of each in its own format, precision, task and image size.

    Args:
        trust: run the code that an artifact brings although somebody else built it.

    Raises:
        ArtifactError: a folder that is not an artifact, or was changed.
        UsageError: a format that is not installed or does not run on the device, an unknown counterpart.
    """
    contenders = [of_artifact(path, device, cuda_graph, trust) for path in paths]
    names = [contender.subject for contender in contenders]
    contenders = [
        contender
        if names.count(contender.subject) == 1
        else msgspec.structs.replace(contender, label=str(contender.artifact))
        for contender in contenders
    ]
    if not compare:
        return contenders
    detector = next((contender.artifact for contender in contenders if contender.task == "detect"), None)
    if detector is not None:
        raise UsageError(
            f"{detector} is a detector, whose counterpart would need the same pyramid and heads; compare whole Mask "
            "R-CNNs with --variant tiny --task detect --compare swin"
        )
    from ..models import baselines

    requests = [
        Wanted(
            model=baselines.counterpart(word, contender.model, contender.image_size),
            runtime="torch" if formats.get(contender.runtime).own_network else contender.runtime,
            precision=contender.precision,
            task=contender.task,
            image_size=contender.image_size,
            device=device,
        )
        for contender in contenders
        for word in compare
    ]
    return contenders + built(list(dict.fromkeys(requests)), say)


def of_artifact(path: Path, device: Device, cuda_graph: bool = False, trust: bool = False) -> Contender:
    """An artifact that exists; every file of it is checked."""
    artifact = manifest.verified(path)
    facts = artifact.manifest
    fmt = formats.of(artifact)
    formats.require(fmt)
    formats.refuse_device(fmt, device)
    formats.refuse_untrusted(fmt, artifact, trust)
    return Contender(
        model=facts.model.architecture,
        runtime=fmt.name,
        precision=facts.export.precision,
        task=facts.model.task,
        image_size=facts.model.image_size,
        batch=facts.export.batch,
        opener="convnext_deploy.api:load",
        arguments={"path": str(path), "device": device, "cuda_graph": cuda_graph, "trust": trust},
        imports=("convnext_deploy.api", f"convnext_deploy.formats.{fmt.name}", *fmt.requires),
        artifact=str(path),
        artifact_sha256=artifact.sha256,
        artifact_bytes=artifact.bytes,
        random_weights=facts.weights.random,
        parity=next((p.relative_error for p in facts.parity if p.reference == "source"), None),
        spec=facts.model if facts.model.task in get_args(NetworkTask) else None,
        eight_bits=facts.export.eight_bits,
    )


def built(requests: Sequence[Wanted], say: Callable[[str], None]) -> list[Contender]:
    """Each model, built in a process of its own or taken from `build/bench`; one that cannot be built says why.

    What is there is taken if the same versions of all packages made it and every file is unchanged.
    """
    from ..models import baselines

    def one(want: Wanted) -> Contender:
        if want.runtime in TORCH:
            return _of_timm(want)
        convnext = baselines.is_convnext(want.model)
        if not _reusable(want, convnext):
            say(f"building {want.model} {want.runtime} {want.precision}")
            worker = Worker(f"building {want.model} {want.runtime}")
            running.append(worker)
            try:
                builder = f"{__name__}:build_convnext" if convnext else f"{COUNTERPARTS}:build_baseline"
                worker.call("call", function=builder, arguments={"want": msgspec.to_builtins(want)})
            except WorkerError as error:
                return _contender(want, opener="", arguments={}, imports=(), broken=str(error))
            finally:
                worker.close()
        # Built just now, or `_reusable` found it in the record of what this user built.
        return of_artifact(want.folder, want.device, trust=True) if convnext else _of_baseline(want)

    running: list[Worker] = []
    with ThreadPoolExecutor(min(BUILDS_AT_ONCE, env.usable_cores())) as pool:
        try:
            return list(pool.map(one, requests))
        except BaseException:  # Ctrl-C: else the pool would wait for builds that nobody wants any more
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in running:
                worker.kill()
            raise


def _reusable(want: Wanted, convnext: bool) -> bool:
    path = want.folder / (manifest.MANIFEST_NAME if convnext else BASELINE_NAME)
    if not path.is_file():
        return False
    existing = manifest.decode(content_of(path), str(path))
    if formats.get(want.runtime).runs_code and not built_here(manifest.sha256_of(path)):
        return False
    there = {
        record.path: record.sha256 for record in manifest.file_records(want.folder) if record.path != BASELINE_NAME
    }
    intact = there == {record.path: record.sha256 for record in existing.files}
    return intact and existing.versions == env.versions() and existing.machine == env.machine()


def _contender(want: Wanted, **how: Any) -> Contender:
    return Contender(
        model=want.model,
        runtime=want.runtime,
        precision=want.precision,
        task=want.task,
        image_size=want.image_size,
        batch=want.batch,
        **how,
    )


def build_convnext(want: dict[str, Any]) -> None:
    """Export a ConvNeXt with random weights; runs in a worker."""
    from .export import export

    order = msgspec.convert(want, Wanted)
    source = Source(
        weights="random",
        variant=order.model,
        task=order.task,
        image_size=order.image_size,
    )
    request = ExportRequest(format=order.runtime, precision=order.precision, batch=order.batch, device=order.device)
    export(source, request, out=order.folder, force=True)


def _of_baseline(want: Wanted) -> Contender:
    record = manifest.decode(content_of(want.folder / BASELINE_NAME), str(want.folder / BASELINE_NAME))
    return _contender(
        want,
        opener=f"{COUNTERPARTS}:open_baseline",
        arguments={"path": str(want.folder), "device": want.device},
        imports=(COUNTERPARTS, f"convnext_deploy.formats.{want.runtime}", *formats.get(want.runtime).requires),
        artifact=str(want.folder),
        artifact_bytes=sum(file.bytes for file in record.files),
        parity=record.parity[0].relative_error,
    )


def _of_timm(want: Wanted) -> Contender:
    from ..models import baselines, registry

    spec = None
    if baselines.is_convnext(want.model) and want.task in get_args(NetworkTask):
        spec = registry.spec(want.model, image_size=want.image_size, task=want.task)
    return _contender(
        want,
        opener=f"{COUNTERPARTS}:open_timm",
        arguments={"want": msgspec.to_builtins(want)},
        imports=(
            COUNTERPARTS,
            "torch",
            "transformers" if want.task == "segment" else "timm",
            "convnext_deploy.runtimes.torch_session",
        ),
        spec=spec,
    )
