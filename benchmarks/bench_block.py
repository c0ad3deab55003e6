"""Every part of a model on a GPU, with and without the fused kernels: what `kernels/measured.json` is made of.

    python benchmarks/bench_block.py [--variants tiny base] [--precision fp16] [--batches 1 32 256] [--update]

A part is the stem, one block of a stage, a downsample or the head; `compiled` is torch.compile max-autotune of the same
module. --update writes compiled's time over the kernels' into the table, for this GPU.
"""

from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from kernel_bench import (
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

from convnext_deploy import passes, roofline
from convnext_deploy.kernels import choice
from convnext_deploy.kernels.use import parts, use_kernels
from convnext_deploy.manifest import encode, write_file
from convnext_deploy.models import registry
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.types import KernelMeasurement, ModelSpec, Precision


def model_of(spec: ModelSpec, precision: Precision, device: str, fused: bool) -> ConvNeXt:
    """Folded, with the same random weights each time."""
    torch.manual_seed(0)
    model = ConvNeXt(spec).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape))  # PyTorch's own initialisation is at zero in places
    passes.fold_norm_affine(model)
    passes.fold_layer_scale(model)
    passes.fold_grn_bias(model)
    passes.cast_parameters(model, precision)
    model = model.to(device)
    if fused:
        use_kernels(model, parts(model))
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


def subjects(spec: ModelSpec, precision: Precision, batch: int, device: str) -> Iterator[tuple[str, Case, Subject]]:
    plain, fused, exact = (model_of(spec, precision, device, fused) for fused in (False, True, False))
    exact = exact.double()
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
        yield name, case, Subject(
            inputs=inputs,
            exact=part_of(exact, name),
            contenders={
                "kernels": part_of(fused, name), "eager": part_of(plain, name),
                "compiled": compiled(part_of(plain, name)),
                **{f"kernels, {word}": under(part_of(fused, name), settings) for word, settings in small.items()},
            },
            bytes=sum(size * (batch * (op.elements + op.operands) + op.weights) for op in found),
            matrix_flop=sum(2 * batch * op.matrix_macs for op in found),
            vector_flop=sum(2 * batch * op.vector_macs for op in found),
        )  # fmt: skip


def updated(gpu: str, new: list[KernelMeasurement]) -> None:
    """Put new measurements in the place of those of the same part, width, type and batch."""
    table: dict[str, list[KernelMeasurement]] = choice.table()
    rows = {_key(row): row for row in (*table.get(gpu, []), *new)}
    table[gpu] = [rows[key] for key in sorted(rows)]
    write_file(choice.TABLE, encode(dict(sorted(table.items()))))


def _key(row: KernelMeasurement) -> tuple[Any, ...]:
    return row.part, row.channels, row.precision, row.batch


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--variants", nargs="+", default=["tiny", "base", "v2-tiny"])
    parser.add_argument("--update", action="store_true", help="write the table that `export --kernels measured` reads")
    args = parser.parse_args()
    if args.update and args.without_compile:
        parser.error("--update needs torch.compile's times; leave --without-compile out")
    refuse_without_gpu()
    torch.backends.cudnn.benchmark = True
    ceilings = roofline.measure("cuda")
    rows = []
    for variant in args.variants:
        spec = registry.spec(registry.resolve(variant)[0])
        for batch in args.batches:
            for name, case, subject in subjects(spec, args.precision, batch, "cuda"):
                if args.without_compile:
                    del subject.contenders["compiled"]
                records = {record["contender"]: record for record in measured("block", case, subject, ceilings)}
                for record in records.values():
                    append({"variant": spec.architecture, "part": name, **record}, "gpu-kernels")
                if "compiled" in records:
                    speedup = records["compiled"]["median"] / records["kernels"]["median"]
                    part: Any = name.partition(".")[0]
                    rows.append(
                        KernelMeasurement(
                            part=part, channels=case.channels, precision=args.precision, batch=batch, speedup=speedup
                        )
                    )
    if args.update:
        updated(torch.cuda.get_device_name(), rows)
    else:
        print(msgspec.json.encode(rows).decode())


if __name__ == "__main__":
    main()
