"""Every part of a model on a GPU, with and without the fused kernels: what `kernels/measured.json` is made of.

    python benchmarks/bench_block.py [--variants tiny base] [--precision fp16] [--batches 1 32 256] [--update]
    python benchmarks/bench_block.py --update --from FILE   # of what another machine measured

A part is the stem, one block of a stage, a downsample or the head; `compiled` is torch.compile of the same module
(max-autotune unless --mode says otherwise), and `kernels, mlp` a block whose linears are one kernel. --update writes
compiled's time over that of both into the table, for the GPU that measured them.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from kernel_bench import (
    BEST_MODE,
    IN_TURN,
    SMALL_BATCH,
    WIDE_TILES,
    Case,
    Subject,
    arguments,
    compiled,
    measured,
    refuse_without_gpu,
    under,
)
from records import append
from torch import Tensor, nn

from convnext_deploy.artifact.manifest import encode, write_file
from convnext_deploy.kernels import choice
from convnext_deploy.kernels.use import MLP, alternatives, parts, use_kernels
from convnext_deploy.models import passes, registry
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.records.base import Precision
from convnext_deploy.records.manifest import ModelSpec
from convnext_deploy.records.timing import KernelMeasurement
from convnext_deploy.timing import roofline


def model_of(
    spec: ModelSpec, precision: Precision, device: str, fused: Callable[[ConvNeXt], tuple[str, ...]] | None = None
) -> ConvNeXt:
    """Folded, with the same random weights each time, and kernels in what `fused` names."""
    torch.manual_seed(0)
    model = ConvNeXt(spec).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape))  # PyTorch's own initialisation is at zero in places
    passes.fold_norm_affine(model)
    passes.fold_layer_scale(model)
    passes.fold_grn_bias(model)
    passes.cast_parameters(model, precision)
    model = model.to(device)
    if fused is not None:
        use_kernels(model, fused(model))
    return model


def part_of(model: ConvNeXt, name: str) -> nn.Module:
    found = model.get_submodule(name)
    return found[0] if isinstance(found, nn.ModuleList) else found


def shape_of(spec: ModelSpec, name: str, batch: int) -> tuple[int, ...]:
    """Of a part's input."""
    kind, _, index = name.partition(".")
    height, width = spec.image_size
    if kind == "stem":
        return batch, spec.in_chans, height, width
    stage = 3 if kind == "head" else int(index)
    return batch, height // (4 << stage), width // (4 << stage), spec.dims[stage]


def subjects(
    spec: ModelSpec, precision: Precision, batch: int, device: str, mode: str = BEST_MODE
) -> Iterator[tuple[str, Case, Subject]]:
    plain, fused, narrow, exact = (
        model_of(spec, precision, device, names) for names in (None, parts, alternatives, None)
    )
    exact, others = exact.double(), alternatives(plain)
    costs = {"stages": ("dwconv_norm", "expand", "project"), "downsamples": ("downsample",), "stem": ("stem",)}
    for name in parts(plain):
        kind, _, index = name.partition(".")
        shape = shape_of(spec, name, batch)
        stage = {"stages": 1, "downsamples": 2}.get(kind)
        where = f"stage {int(index) + stage}" if stage else kind
        wanted = costs.get(kind, ("head",))
        found = [op for op in roofline.operations(spec) if op.stage == where and op.name in wanted]
        case = Case(spec.dims[0] if kind == "stem" else shape[-1], shape[2], batch, precision)

        def inputs(shape: tuple[int, ...] = shape, case: Case = case) -> tuple[Tensor, ...]:
            return (torch.randn(shape, device=device).to(case.dtype),)

        size = case.dtype.itemsize
        small = {"wide tiles": WIDE_TILES, "in turn": IN_TURN} if batch <= SMALL_BATCH else {}
        contenders: dict[str, Callable[..., Any]] = {"kernels": part_of(fused, name)}
        contenders |= {f"kernels, {word}": under(part_of(fused, name), settings) for word, settings in small.items()}
        if name + MLP in others:
            contenders["kernels, mlp"] = part_of(narrow, name)
        contenders |= {"eager": part_of(plain, name), "compiled": compiled(part_of(plain, name), mode)}
        yield name, case, Subject(
            inputs=inputs,
            exact=part_of(exact, name),
            contenders=contenders,
            bytes=sum(size * (batch * (op.elements + op.operands) + op.weights) for op in found),
            matrix_flop=sum(2 * batch * op.matrix_macs for op in found),
            vector_flop=sum(2 * batch * op.vector_macs for op in found),
        )  # fmt: skip


def speedups(name: str, case: Case, grn: bool, times: dict[str, float]) -> Iterator[KernelMeasurement]:
    """Of the kernels over compiled PyTorch, from each contender's time; nothing where that was left out."""
    kinds: dict[str, Any] = {"kernels": name.partition(".")[0], "kernels, mlp": "mlp"}
    for contender, kind in kinds.items():
        if "compiled" in times and contender in times:
            yield KernelMeasurement(
                part=kind, channels=case.channels, grn=grn and kind == "stages", precision=case.precision,
                batch=case.batch, speedup=times["compiled"] / times[contender],
            )  # fmt: skip


def recorded(records: Iterable[dict[str, Any]]) -> dict[str, list[KernelMeasurement]]:
    """The speedups by GPU that lines of this benchmark say, wherever they were written; other lines are passed over."""
    times: dict[tuple[str, str, bool, Case], dict[str, float]] = defaultdict(dict)
    for record in records:
        if record.get("benchmark") == "block" and "median" in record:
            case = Case(record["channels"], record["side"], record["batch"], record["precision"])
            times[record["gpu"], record["part"], record["grn"], case][record["contender"]] = record["median"]
    found: dict[str, list[KernelMeasurement]] = defaultdict(list)
    for (gpu, name, grn, case), medians in times.items():
        found[gpu] += speedups(name, case, grn, medians)
    return dict(found)


def updated(gpu: str, new: list[KernelMeasurement]) -> None:
    """Put new measurements in the place of those of the same part, width, type and batch."""
    table: dict[str, list[KernelMeasurement]] = choice.table()
    rows = {_key(row): row for row in (*table.get(gpu, []), *new)}
    table[gpu] = [rows[key] for key in sorted(rows)]
    write_file(choice.TABLE, encode(dict(sorted(table.items()))))


def _key(row: KernelMeasurement) -> tuple[Any, ...]:
    return row.part, row.channels, row.grn, row.precision, row.batch


def measured_here(
    variants: list[str], batches: list[int], precision: Precision, mode: str | None
) -> list[dict[str, Any]]:
    """Every part's records, each written at once. mode: of torch.compile; None leaves it out."""
    ceilings, found = roofline.measure("cuda"), []
    for variant in variants:
        spec = registry.spec(registry.resolve(variant)[0])
        for batch in batches:
            for name, case, subject in subjects(spec, precision, batch, "cuda", mode or BEST_MODE):
                if mode is None:
                    del subject.contenders["compiled"]
                for record in measured("block", case, subject, ceilings):
                    found.append({"variant": spec.architecture, "part": name, "grn": spec.grn, "mode": mode, **record})
                    append(found[-1], "gpu-kernels")
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--variants", nargs="+", default=["tiny", "base", "v2-tiny"])
    parser.add_argument("--mode", default=BEST_MODE, help="of torch.compile; 'default' takes seconds, not minutes")
    parser.add_argument("--update", action="store_true", help="write the table that `export --kernels measured` reads")
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE", help="measure nothing: JSON lines to take")
    args = parser.parse_args()
    if args.update and args.without_compile:
        parser.error("--update needs torch.compile's times; leave --without-compile out")
    if args.source is not None:
        records = [json.loads(line) for line in args.source.read_text().splitlines()]
    else:
        refuse_without_gpu()
        torch.backends.cudnn.benchmark = True
        mode = None if args.without_compile else args.mode
        records = measured_here(args.variants, args.batches, args.precision, mode)
    for gpu, rows in recorded(records).items():
        if args.update:
            updated(gpu, rows)
        else:
            print(msgspec.json.encode(rows).decode())


if __name__ == "__main__":
    main()
