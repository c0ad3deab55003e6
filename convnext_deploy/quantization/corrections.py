"""Corrections that bring a quantized module closer to its source: each is tried, and kept only where it helps.

balance   scale the channels between a norm and what follows it, so that no channel dominates the tensor's range
          (SmoothQuant, arXiv:2211.10438; exact before quantization)
shift     where zero points do not exist: centre a one-sided tensor, and move the shift into the bias (exact)
bias      take the mean error that rounding adds to each output channel out of its bias (arXiv:1906.04721)
rounding  choose each weight's rounding so that it makes up for the error of the others (GPTQ, arXiv:2210.17323)
"""

import copy
from collections.abc import Callable, Mapping

import msgspec
import torch
from torch import Tensor, nn

from ..models.convnext import ConvNeXt, nhwc
from ..records.manifest import Preprocessing
from ..records.plan import OperationPlan, Plan, WeightBits
from .apply import TYPES, QuantizedLinear, QuantizedPatches, apply, how_of, rebalance, rounded, rows_of, scales_of
from .calibrate import Calibration
from .distance import Pixels, inputs
from .operators import dequantize
from .plan import LoadedPlan, kind_of, products, quantized, representable

Progress = Callable[[int, int], None]

BALANCE = 0.5  # how much of the difficulty moves from the activations to the weights; SmoothQuant's default
DAMPING = 0.01  # of the mean diagonal of GPTQ's Hessian; the paper's
BLOCK = 128  # columns of GPTQ between two updates of all others; the paper's


@torch.no_grad()
def balance_factors(model: ConvNeXt, calibration: Calibration, names: tuple[str, ...]) -> dict[str, Tensor]:
    """`balance/<operation>` -> (C,), for the expands and downsamples among the names.

    The factor of a channel is sqrt(largest activation / largest weight), with a mean of the logarithm of 0: dividing
    the activations and multiplying the weights by it makes both reach equally far, each relative to its own.
    """
    factor_of = {}
    paths = products(model)
    for name in names:
        if kind_of(name) not in ("expand", "downsample"):
            continue
        statistics = calibration.whole(paths[name])
        activations = torch.maximum(statistics.low.abs(), statistics.high.abs())  # (C,), float64
        product = model.get_submodule(paths[name])
        assert isinstance(product, nn.Linear | nn.Conv2d)
        weights = product.weight.double().abs().transpose(0, 1).flatten(1).amax(1)  # (C,)
        usable = (activations > 0) & (weights > 0)
        factors = torch.where(usable, activations**BALANCE / weights ** (1 - BALANCE), 1.0)
        factors = torch.where(usable, factors / factors[usable].log().mean().exp(), 1.0) if usable.any() else factors
        factor_of[f"balance/{name}"] = factors.float()
    return factor_of


def shifted(loaded: LoadedPlan, calibration: Calibration, model: ConvNeXt) -> Plan:
    """The plan with every s8s8 project's input centred, so that all 256 codes are used.

    GELU's outputs lie above -0.17: a symmetric range leaves almost half of its codes unused.
    """
    paths, plan, how = products(model), loaded.plan, how_of(loaded)
    operations = dict(plan.operations)
    for name, operation in plan.operations.items():
        if operation.type != "s8s8" or kind_of(name) != "project" or operation.scale is None:
            continue
        statistics = calibration.whole(paths[name])
        low = float(statistics.low.min())
        high = min(float(statistics.high.max()), 127 * operation.scale)  # where the method clips
        scale = representable(torch.tensor((high - low) / 255), how, plan.rest).item()
        operations[name] = msgspec.structs.replace(operation, scale=scale, shift=low + 128 * scale)
    return msgspec.structs.replace(plan, operations=operations)


@torch.no_grad()
def bias_corrections(
    model: ConvNeXt, loaded: LoadedPlan, pixels: Pixels, preprocessing: Preprocessing, progress: Progress
) -> dict[str, Tensor]:
    """`bias/<operation>` -> (out,): what rounding takes from the mean of each output channel.

    Each operation is given the inputs that it has in the float module, so one pass over the images is enough.

    Args:
        progress: told (images done, images in all).
    """
    exact, changed = _balanced(model, loaded)
    paths = products(model)
    sums = {name: (torch.zeros(()).double(), 0) for name in quantized(loaded.plan)}

    def observer(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        replacement = changed.get_submodule(paths[name])

        def observe(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            error = (output - replacement(arguments[0])).double()
            if isinstance(module, nn.Conv2d):
                error = nhwc(error)
            total, count = sums[name]
            sums[name] = total + error.flatten(0, -2).sum(0), count + error[..., 0].numel()

        return observe

    _run(exact, {paths[name]: observer(name) for name in sums}, pixels, preprocessing, progress)
    return {f"bias/{name}": (total / count).float() for name, (total, count) in sums.items()}


@torch.no_grad()
def rounded_weights(
    model: ConvNeXt, loaded: LoadedPlan, pixels: Pixels, preprocessing: Preprocessing, progress: Progress
) -> dict[str, Tensor]:
    """`weight/<operation>` (out, in) in 8 bits and `weight_scale/<operation>` (out,), by GPTQ.

    Args:
        progress: told (images done, images in all), then (operations done, operations in all).
    """
    exact, changed = _balanced(model, loaded)
    paths = products(model)
    squares: dict[str, Tensor] = {}

    def observer(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        replacement = changed.get_submodule(paths[name])
        assert isinstance(replacement, QuantizedLinear)

        def observe(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            x = nhwc(arguments[0]) if isinstance(module, nn.Conv2d) else arguments[0]
            x = dequantize(replacement.codes(x), replacement.scale, replacement.zero_point, 0)
            if isinstance(replacement, QuantizedPatches):
                x = replacement.patches(x)
            x = x.flatten(0, -2)  # (rows, in)
            squares[name] = squares.get(name, torch.zeros(())) + x.T @ x

        return observe

    names = [name for name in quantized(loaded.plan) if loaded.plan.operations[name].type != "fp8"]
    _run(exact, {paths[name]: observer(name) for name in names}, pixels, preprocessing, progress)
    tensors_of = {}
    for done, name in enumerate(names):
        progress(done, len(names))
        operation = loaded.plan.operations[name]
        rows = rows_of(exact.get_submodule(paths[name]))
        scales = scales_of(rows, operation, loaded)
        tensors_of[f"weight/{name}"] = gptq(rows, scales, squares.pop(name), operation, loaded.plan.weight_bits)
        tensors_of[f"weight_scale/{name}"] = scales
    return tensors_of


def gptq(rows: Tensor, scales: Tensor, hessian: Tensor, operation: OperationPlan, bits: WeightBits = 8) -> Tensor:
    """Weights rounded one input at a time; what a rounding adds to the output is taken from the inputs to come.

    Args:
        rows: (out, in).
        scales: (out,).
        hessian: (in, in), the inputs' sum of outer products.

    Returns:
        (out, in), in the type of the operation's weights.
    """
    weights, hessian = rows.double().clone(), hessian.double()
    columns = weights.shape[1]
    dead = hessian.diagonal() <= 0  # an input that was always zero
    hessian = hessian + torch.diag(dead.double() + DAMPING * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    result = torch.empty(rows.shape, dtype=TYPES[operation.type][1])
    scale = scales.double()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.zeros(len(weights), stop - start, dtype=torch.float64)
        for column in range(start, stop):
            code = rounded(weights[:, column : column + 1], scale, operation, bits)[:, 0]
            result[:, column] = code
            error = (weights[:, column] - code.double() * scale) / inverse[column, column]
            weights[:, column:stop] -= error[:, None] * inverse[column, column:stop]
            errors[:, column - start] = error
        weights[:, stop:] -= errors @ inverse[start:stop, stop:]
    return result


def _balanced(model: ConvNeXt, loaded: LoadedPlan) -> tuple[ConvNeXt, ConvNeXt]:
    """The float module with the plan's balance, and the quantized one."""
    exact, changed = copy.deepcopy(model), copy.deepcopy(model)
    for name in quantized(loaded.plan):
        factors = loaded.tensors.get(f"balance/{name}")
        if factors is not None:
            rebalance(exact, name, factors)
    apply(changed, loaded)
    return exact, changed


def _run(
    model: ConvNeXt,
    observers: Mapping[str, Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]],
    pixels: Pixels,
    preprocessing: Preprocessing,
    progress: Progress,
) -> None:
    """Run the model over the images, with an observer of each named module's input and output."""
    handles = [model.get_submodule(path).register_forward_hook(observe) for path, observe in observers.items()]
    try:
        done = 0
        for batch in inputs(model, pixels, preprocessing):
            progress(done, len(pixels))
            model(batch)
            done += len(batch)
    finally:
        for handle in handles:
            handle.remove()
