"""What `scripts/gpu_check` measures: each step is a generator of records, and prints one JSON line for each at once.

    python benchmarks/gpu_steps.py STEP [--device cpu] [--batch 256]

On the CPU, operations are their references and shapes are small: that rehearses the code, and its times mean nothing.
"""

import argparse
import importlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import kernel_bench
import torch
import torch.nn.functional as F
from bench_block import model_of
from kernel_bench import Case, Subject
from torch import Tensor

from convnext_deploy import env
from convnext_deploy.kernels import mlp
from convnext_deploy.kernels.choice import ONE_KERNEL
from convnext_deploy.kernels.use import MLP, alternatives, parts
from convnext_deploy.models import registry
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.records.timing import Ceilings
from convnext_deploy.timing import roofline

NETWORKS = ("convnext_tiny", "convnext_base")
V2 = ("convnextv2_tiny", "convnextv2_base")
SWIN = {"convnext_tiny": "swin_tiny_patch4_window7_224", "convnext_base": "swin_base_patch4_window7_224"}
Found = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Place:
    """Where a step runs: on a GPU at full size, or in a rehearsal."""

    device: str
    batch: int

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    @property
    def networks(self) -> tuple[str, ...]:
        return ("test_convnext",) if self.rehearsal else NETWORKS

    @property
    def v2(self) -> tuple[str, ...]:
        return ("convnextv2_atto",) if self.rehearsal else V2

    def spec(self, name: str) -> Any:
        return registry.spec(name, image_size=(32, 32)) if self.rehearsal else registry.spec(name)

    def images(self, name: str, batch: int) -> Tensor:
        return torch.randn(batch, 3, *self.spec(name).image_size, device=self.device).half()

    def cases(self, batch: int) -> list[Case]:
        """The stages of T and B."""
        if self.rehearsal:
            return [Case(32, 7, batch, "fp16")]
        dims = {(c, 56 >> stage) for name in NETWORKS for stage, c in enumerate(registry.spec(name).dims)}
        return [Case(c, side, batch, "fp16") for c, side in sorted(dims, key=lambda shape: (-shape[1], shape[0]))]

    def ceilings(self) -> Ceilings:
        if self.rehearsal:
            return Ceilings(
                name="rehearsal", source="none", matrix_tflops={"fp16": 1.0}, vector_tflops=1.0, copy_gb_s=1.0
            )
        return roofline.measure("cuda")


def guarded(what: dict[str, Any], found: Callable[[], Found]) -> Found:
    """Its records; where it raises, one with the reason, so that what follows is measured all the same."""
    try:
        yield from found()
    except Exception as error:
        yield {**what, "error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:400]}"}
        if "CUDA error" in str(error):  # the context is lost, and with it every later measurement of this process
            raise SystemExit(3) from None


def facts(place: Place) -> Found:
    names = ("msgspec", "timm", "typer", "rich", "onnx", "onnxscript", "onnxruntime", "pyarrow", "scipy", "safetensors",
             "PIL", "torchvision", "pytest", "triton")  # fmt: skip
    yield {"machine": env.machine(), "gpus": env.nvidia_gpu_facts(), "versions": env.versions(),
           "cuda": torch.version.cuda, "missing": env.missing(names)}  # fmt: skip
    if not place.rehearsal:
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu",
                 "--format=csv,noheader"]  # fmt: skip
        yield {"clocks": subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()}


def compile_kernels(place: Place) -> Found:
    """All that later steps launch; on the CPU for a GPU that is not there, and only listed."""
    from convnext_deploy.kernels import nvrtc, prebuild

    capability = (9, 0) if place.rehearsal else torch.cuda.get_device_capability()
    wanted: set[prebuild.Variant | nvrtc.Kernel] = set()
    for name in (*place.networks, *place.v2):
        for which in (parts, in_few_kernels):
            model = model_of(place.spec(name), "fp16", place.device, which)
            for batch in (place.batch, 1, 32):
                wanted |= set(prebuild.variants(model, place.images(name, batch)))
    for batch in (place.batch, 1):
        for subject in (ours(name, case, place) for name in OURS for case in fitting(name, place.cases(batch))):
            inputs = subject.inputs()
            for call in subject.contenders.values():
                wanted |= set(prebuild.variants(call, *inputs))
    yield {"variants": len(wanted), "capability": capability}
    if place.rehearsal:
        return
    start = time.monotonic()
    longest_first = sorted(wanted, key=lambda variant: -variant.cost)
    say = lambda line: print(json.dumps({"said": line}), flush=True)  # noqa: E731 - each at once
    for result in guarded({}, lambda: iter([dict(prebuild.prebuild(longest_first, capability, say))])):
        yield {**result, "seconds": time.monotonic() - start}


OURS = ("project", "expand", "mlp", "dwconv_norm")  # from the shortest compilation to the longest


def fitting(name: str, cases: list[Case]) -> list[Case]:
    return [case for case in cases if name != "mlp" or case.channels <= mlp.WIDEST]


def in_few_kernels(model: ConvNeXt) -> tuple[str, ...]:
    """As `--kernels all` has it at large batches: stages of up to `choice.ONE_KERNEL` channels in fewer kernels."""
    stages = {name for name in alternatives(model) if model.spec.dims[int(name.split(".")[1])] <= ONE_KERNEL}
    return tuple(part + MLP if part + MLP in stages else part for part in parts(model))


def libraries(place: Place) -> Found:
    """Copy, cuBLAS, cuBLASLt with epilogues and cuDNN's depthwise: nothing of ours can break it."""
    ceilings = place.ceilings()
    yield {"ceilings": {"copy_gb_s": ceilings.copy_gb_s, "matrix_tflops": ceilings.matrix_tflops}}
    for case in place.cases(place.batch):
        what = {"channels": case.channels, "side": case.side}
        for name, subject in library_subjects(case, place.device).items():
            yield from guarded({**what, "subject": name}, partial(kernel_bench.measured, name, case, subject, ceilings))


def library_subjects(case: Case, device: str) -> dict[str, Subject]:
    c, rows, size = case.channels, case.pixels, case.dtype.itemsize

    def made(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: tuple(
            kernel_bench.normal(*shape, like=case, device=device, scale=shape[-1] ** -0.5) for shape in shapes
        )

    def conv(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x.permute(0, 3, 1, 2), weight.permute(2, 3, 0, 1), padding=3, groups=c)

    def linear(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    def with_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.aten._addmm_activation(bias, x, weight.t(), use_gelu=True)

    def with_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return torch.addmm(residual, x, weight.t())

    flop = 8 * rows * c * c
    return {
        "cudnn depthwise": Subject(
            made((case.batch, case.side, case.side, c), (7, 7, c, 1)), conv, {"cudnn": conv},
            bytes=2 * rows * c * size, vector_flop=98 * rows * c,
        ),
        "cublas expand": Subject(
            made((rows, c), (4 * c, c), (4 * c,)), linear, {"linear": linear, "linear, tanh GELU": with_gelu},
            bytes=5 * rows * c * size, matrix_flop=flop, finish={"linear, tanh GELU": None},
        ),
        "cublas project": Subject(
            made((rows, 4 * c), (c, 4 * c), (c,), (rows, c)), linear,
            {"linear": linear, "residual for bias": with_residual},
            bytes=6 * rows * c * size, matrix_flop=flop, finish={"residual for bias": None},
        ),
    }  # fmt: skip


def kernels(place: Place) -> Found:
    """Each of ours: its error beside float64, then its time."""
    ceilings = place.ceilings()
    for batch in (place.batch, 1):
        for name in OURS:
            for case in fitting(name, place.cases(batch)):
                yield from guarded(
                    {"benchmark": name, "channels": case.channels, "batch": batch},
                    partial(measured_ours, name, case, place, ceilings),
                )


def measured_ours(name: str, case: Case, place: Place, ceilings: Ceilings) -> Found:
    yield from kernel_bench.measured(name, case, ours(name, case, place), ceilings)


def ours(name: str, case: Case, place: Place) -> Subject:
    """A kernel benchmark's subject with our contenders alone."""
    subject: Subject = importlib.import_module(f"bench_{name}").subject(case, place.device)
    for other in [other for other in subject.contenders if not other.startswith("kernel")]:
        del subject.contenders[other]
    return subject


def images_of(place: Place, name: str, batch: int) -> tuple[Tensor, ...]:
    return (place.images(name, batch),)


def in_float(model: Callable[..., Any], images: Tensor) -> Any:
    return model(images.float())


def theirs(name: str, place: Place) -> torch.nn.Module:
    """timm's model in fp16, in the layout that its convolutions like best on a GPU."""
    import timm

    made = timm.create_model(name, **({"img_size": 32} if place.rehearsal and "swin" in name else {}))
    return made.eval().requires_grad_(False).half().to(place.device, memory_format=torch.channels_last)


def rates(name: str, case: Case, subject: Subject, ceilings: Ceilings) -> Found:
    """The records of whole networks, in images a second."""
    what = {"network": name, "batch": case.batch}
    for record in guarded(what, partial(kernel_bench.measured, "network", case, subject, ceilings)):
        shown = {key: record[key] for key in record if not key.endswith(("_s", "_share", "tflops"))}
        rate = {"images_per_s": case.batch / record["median"] * 1e6} if "median" in record else {}
        yield {"network": name, **shown, **rate}


def networks(place: Place, names: tuple[str, ...]) -> Found:
    """Whole networks in CUDA graphs, without `export`: with kernels, with few, with none, and timm's."""
    ceilings = place.ceilings()
    for name in names:
        spec = place.spec(name)
        with torch.inference_mode():
            exact = model_of(spec, "fp32", place.device)
        for batch in (place.batch, 1, 32):
            calls: dict[str, Callable[..., Any]] = {
                word: model_of(spec, "fp16", place.device, which)
                for word, which in (("kernels", parts), ("kernels, mlp", in_few_kernels), ("plain", None))
            }
            calls["kernels of Triton"] = kernel_bench.under(calls["kernels, mlp"], kernel_bench.OF_TRITON)
            calls["timm"] = theirs(name, place)
            subject = Subject(
                partial(images_of, place, name, batch), partial(in_float, exact), calls, bytes=1, finish={"timm": None}
            )
            yield from rates(name, Case(spec.dims[0], spec.image_size[0], batch, "fp16"), subject, ceilings)


def swin(place: Place) -> Found:
    """Swin of the same size beside ours, as timm has it and compiled, in turns in one run."""
    ceilings = place.ceilings()
    torch._inductor.config.freezing = True
    for name in place.networks:
        spec, other = place.spec(name), SWIN.get(name, "swin_tiny_patch4_window7_224")
        model = theirs(other, place)
        calls: dict[str, Callable[..., Any]] = {
            "kernels, mlp": model_of(spec, "fp16", place.device, in_few_kernels), f"timm {other}": model,
        }  # fmt: skip
        if not place.rehearsal:
            calls[f"torch.compile {other}"] = kernel_bench.compiled(model, "default")
        for batch in (place.batch, 1):
            subject = Subject(
                partial(images_of, place, name, batch), torch.clone, calls, bytes=1, finish=dict.fromkeys(calls)
            )
            yield from rates(name, Case(spec.dims[0], spec.image_size[0], batch, "fp16"), subject, ceilings)


def measured_tma(name: str, case: Case, ceilings: Ceilings) -> Found:
    import tma_products

    yield from kernel_bench.measured(f"tma {name}", case, tma_products.subject(name, case), ceilings)


def tma(place: Place) -> Found:
    """Drafts of the products with tensor descriptors and a persistent grid."""
    import tma_products

    if place.rehearsal:
        yield {"variants": list(tma_products.VARIANTS)}
        return
    ceilings = place.ceilings()
    for case in place.cases(place.batch):
        for name in ("expand", "project"):
            yield from guarded(
                {"benchmark": f"tma {name}", "channels": case.channels},
                partial(measured_tma, name, case, ceilings),
            )


def profile(place: Place, batch: int) -> Found:
    """Device time by kernel of one pass of each network; what the rest of a step is at batch 1, launches are."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    activity = ProfilerActivity.CPU if place.rehearsal else ProfilerActivity.CUDA
    for name in place.networks:
        model, images = model_of(place.spec(name), "fp16", place.device, parts), place.images(name, batch)
        with torch.inference_mode():
            model(images)
            with recorded(activities=[activity]) as seen:
                model(images)
        rows = [(row.key[:60], round(row.self_device_time_total, 1), row.count) for row in seen.key_averages()]
        yield {"network": name, "batch": batch, "sum_us": sum(row[1] for row in rows),
               "kernels_us": sorted(rows, key=lambda row: -row[1])[:24]}  # fmt: skip


def compiled(place: Place, name: str, mode: str) -> Found:
    """timm's model under torch.compile, in turns with ours."""
    ceilings, name = place.ceilings(), "test_convnext" if place.rehearsal else name
    # Triton's own convolutions took up to 230 times as long as cuDNN's, and minutes to be tried.
    torch._inductor.config.max_autotune_conv_backends = "ATEN"
    torch._inductor.config.freezing = True
    torch.backends.cudnn.benchmark = True
    model = theirs(name, place)
    call = model if place.rehearsal else torch.compile(model, mode=mode)
    ours_fused = model_of(place.spec(name), "fp16", place.device, in_few_kernels)
    subject = Subject(
        lambda: (place.images(name, place.batch).contiguous(memory_format=torch.channels_last),), torch.clone,
        {f"torch.compile {mode}": call, "kernels, mlp": ours_fused}, bytes=1,
        finish={f"torch.compile {mode}": None, "kernels, mlp": None},
    )  # fmt: skip
    start = time.monotonic()
    for record in kernel_bench.measured("compiled", Case(1, 224, place.batch, "fp16"), subject, ceilings):
        yield {"network": name, "contender": record["contender"], "batch": place.batch, "median_us": record["median"],
               "images_per_s": place.batch / record["median"] * 1e6, "seconds": time.monotonic() - start}  # fmt: skip


STEPS: dict[str, Callable[[Place], Found]] = {
    "facts": facts, "compile": compile_kernels, "libraries": libraries, "kernels": kernels,
    "networks": lambda place: networks(place, place.networks), "networks-v2": lambda place: networks(place, place.v2),
    "swin": swin, "tma": tma,
    "profile": lambda place: profile(place, place.batch), "profile-1": lambda place: profile(place, 1),
    "compiled-tiny": lambda place: compiled(place, "convnext_tiny", "default"),
    "compiled-base": lambda place: compiled(place, "convnext_base", "default"),
    "autotuned-tiny": lambda place: compiled(place, "convnext_tiny", "max-autotune-no-cudagraphs"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # a process of its own; fp32 is what others are held against
    for record in STEPS[args.step](Place(args.device, args.batch)):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
