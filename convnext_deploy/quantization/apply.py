"""The module rewritten to a plan: in fp32 it is the simulation, and exporters see the same operators."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import shown
from ..errors import UsageError
from ..models.convnext import Block, ChannelNorm, ConvNeXt, nchw, nhwc
from ..records.base import InputKind
from ..records.plan import OperationPlan, OperationType, Scheme, WeightBits
from . import operators
from .eight_bits import EightBits
from .plan import LoadedPlan, kind_of, operations, products, representable
from .ranges import weight_scales
from .saturation import WEIGHT_LIMITS

TYPES: dict[OperationType, tuple[torch.dtype, torch.dtype]] = {  # of the input's and the weight's codes
    "u8s8": (torch.uint8, torch.int8), "s8s8": (torch.int8, torch.int8), "fp8": (torch.float8_e4m3fn,) * 2,
}  # fmt: skip
WEIGHT_SCHEMES: dict[OperationType, Scheme] = {"u8s8": "s8_symmetric", "s8s8": "s8_symmetric", "fp8": "fp8_e4m3"}


class QuantizedLinear(nn.Module):
    """A linear whose operands are both quantized, (..., in) -> (..., out).

    The input's scale is one number, the weight's one an output; the product itself runs in the scale's float type
    here, and in integers where a runtime fuses the two dequantizations into it.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, operation: OperationPlan, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> None:
        """Args: weight (out, in), already quantized; weight_scale (out,); bias (out,), float."""
        super().__init__()
        activations, weights = TYPES[operation.type]
        assert operation.scale is not None
        assert weight.dtype == weights
        self.shift = operation.shift
        self.register_buffer("weight", self.laid_out(weight))
        self.register_buffer("weight_scale", weight_scale.to(bias.dtype))
        self.register_buffer("weight_zero_point", torch.zeros(len(weight_scale)).to(weights))
        self.register_buffer("scale", torch.tensor(operation.scale, dtype=bias.dtype))
        self.register_buffer("zero_point", torch.tensor(operation.zero_point).to(activations))
        self.bias = nn.Parameter(bias.clone(), requires_grad=False)

    def laid_out(self, weight: Tensor) -> Tensor:
        return weight.t().contiguous()  # (in, out), as ONNX's MatMul takes it: no transpose is left to fold

    def codes(self, x: Tensor) -> Tensor:
        x = x.to(self.scale.dtype)
        return operators.quantize(x - self.shift if self.shift else x, self.scale, self.zero_point)

    def product(self, q: Tensor) -> Tensor:
        x = operators.dequantize(q, self.scale, self.zero_point, 0)
        return (
            torch.matmul(x, operators.dequantize(self.weight, self.weight_scale, self.weight_zero_point, 1)) + self.bias
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.codes(x))


class QuantizedPatches(QuantizedLinear):
    """A convolution as a linear over its patches: (N, C, H, W) -> (N, out, h, w).

    Its kernel either does not overlap itself (stride = side, no padding), or keeps the size (stride 1, odd side, padded
    with zeros). A matrix product needs no quantized output to run in 8 bits, which ONNX Runtime's convolution does.
    """

    def __init__(
        self, operation: OperationPlan, weight: Tensor, weight_scale: Tensor, bias: Tensor, conv: nn.Conv2d
    ) -> None:
        """
        Args:
            weight: (out, in * side ** 2), each row in the order (kernel row, kernel column, in).
            conv: the float one.
        """
        self.kernel_size, self.stride, self.padding = (pair[0] for pair in _geometry(conv))
        super().__init__(operation, weight, weight_scale, bias)
        self.zero = operation.zero_point  # the code of 0

    def patches(self, x: Tensor, zero: int = 0) -> Tensor:
        """(N, H, W, C) -> (N, h, w, k * k * C).

        Args:
            zero: what a pixel of padding is.
        """
        k = self.kernel_size
        if k > self.stride:
            x = F.pad(x, (0, 0, *[self.padding] * 4), value=zero)
            moved = [x[:, i : i + 1 - k or None] for i in range(k)]
            return torch.cat([one[:, :, j : j + 1 - k or None] for one in moved for j in range(k)], -1)
        _, height, width, channels = x.shape
        rows, columns = height // k, width // k
        if not (isinstance(height, int) and isinstance(width, int) and height % k == width % k == 0):
            x = x[:, : rows * k, : columns * k]  # what the stride leaves over; where sizes are dynamic, it may be none
        x = x.reshape(-1, rows, k, columns, k, channels).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, rows, columns, k * k * channels)

    def forward(self, x: Tensor) -> Tensor:
        return nchw(self.product(self.patches(self.codes(nhwc(x)), self.zero)))


class QuantizedConvolution(QuantizedPatches):
    """The same as a convolution, (N, C, H, W) -> (N, out, h, w): for runtimes that run one in 8 bits as it is."""

    def forward(self, x: Tensor) -> Tensor:
        y = operators.dequantize(self.codes(x), self.scale, self.zero_point, 0)
        weight = operators.dequantize(self.weight, self.weight_scale, self.weight_zero_point, 0)
        return F.conv2d(y, weight, self.bias, stride=self.stride, padding=self.padding)

    def laid_out(self, weight: Tensor) -> Tensor:
        k = self.kernel_size
        return weight.reshape(len(weight), k, k, -1).permute(0, 3, 1, 2).contiguous()


def _geometry(conv: nn.Conv2d) -> tuple[tuple[int, ...], ...]:
    """Kernel, stride and padding, each (vertical, horizontal); of those convolutions that `products` names, equal."""
    assert isinstance(conv.padding, tuple)
    return conv.kernel_size, conv.stride, conv.padding


def check(loaded: LoadedPlan, model: ConvNeXt, weights_sha256: str, input: InputKind) -> None:
    """Refuse a plan of another checkpoint.

    Raises:
        UsageError: what the plan was made for, and what it was given.
    """
    plan = loaded.plan
    if plan.weights_sha256 != weights_sha256:
        raise UsageError(
            f"the plan was made for other weights ({plan.architecture}, tensors {plan.weights_sha256[:12]}; these are "
            f"{model.spec.architecture}, {weights_sha256[:12]}); run quantize for this checkpoint"
        )
    if plan.input != input:
        raise UsageError(
            f"the plan was made for the input {plan.input}, not {input}; add --input {plan.input}, or run quantize "
            f"with --input {input}"
        )
    if plan.image_size != model.spec.image_size:
        own, given = ("x".join(map(str, size)) for size in (plan.image_size, model.spec.image_size))
        asked = str(plan.image_size[0]) if plan.image_size[0] == plan.image_size[1] else own
        raise UsageError(
            f"the plan was calibrated at {own} pixels, not at {given}; add --image-size {asked}, or run quantize "
            f"for {given}"
        )
    _check_tensors(loaded, model)


def _check_tensors(loaded: LoadedPlan, model: ConvNeXt) -> None:
    """Refuse tensors beside a plan that are not those of its operations in this model."""
    paths = products(model)
    for key, tensor in loaded.tensors.items():
        what, _, name = key.partition("/")
        operation = loaded.plan.operations.get(name)
        if what not in ("balance", "bias", "weight", "weight_scale") or operation is None or operation.type == "fp32":
            raise UsageError(
                f"the plan's tensors contain {shown(key)}; expected balance, bias, weight and weight_scale of what it "
                "quantizes; run quantize again"
            )
        if name not in paths:
            continue  # `apply` says which operations there are
        if what == "balance":
            norm_before(model, name)
        product = model.get_submodule(paths[name])
        assert isinstance(product, nn.Linear | nn.Conv2d)
        rows = rows_of(product)
        shape = {"balance": (product.weight.shape[1],), "weight": tuple(rows.shape)}.get(what, (len(rows),))
        types = (TYPES[operation.type][1],) if what == "weight" else (torch.float32, torch.float64)
        if tuple(tensor.shape) != shape or tensor.dtype not in types:
            raise UsageError(
                f"the plan's {key} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected {types[0]} of "
                f"shape {shape}; run quantize again"
            )
        values = tensor.float()
        if not values.isfinite().all() or (what in ("balance", "weight_scale") and not (values > 0).all()):
            expected = "finite numbers" if what in ("bias", "weight") else "finite numbers above 0"
            raise UsageError(f"the plan's {key} contains {_odd(values)}; expected {expected}; run quantize again")
        other = {"weight": "weight_scale", "weight_scale": "weight"}.get(what)
        if other is not None and f"{other}/{name}" not in loaded.tensors:
            raise UsageError(f"the plan's tensors contain {key} and no {other} of it; run quantize again")


def _odd(values: Tensor) -> float:
    """The first value that is not finite, else the smallest."""
    wrong = values[~values.isfinite()]
    return float(wrong[0] if len(wrong) else values.min())


@torch.no_grad()
def apply(model: ConvNeXt, loaded: LoadedPlan) -> None:
    """Rewrite a folded fp32 module in place, so that it computes what the plan says.

    Raises:
        UsageError: the plan names an operation that the model does not have, or that cannot run in that type.
    """
    plan, tensors = loaded.plan, loaded.tensors
    paths = products(model)
    for name, operation in plan.operations.items():
        if operation.type == "fp32":
            if name not in operations(model):
                raise UsageError(f"the plan keeps {name} in fp32; expected one of {', '.join(operations(model))}")
            continue  # `models.passes.cast_parameters` leaves it out
        if name not in paths:
            raise UsageError(f"the plan names {name} to run in {operation.type}; expected one of {', '.join(paths)}")
        balance = tensors.get(f"balance/{name}")
        if balance is not None:
            rebalance(model, name, balance)
        if how_of(loaded).gelu_tanh and kind_of(name) == "project":
            _approximate_gelu(model, name, operation)
        _replace(model, paths[name], _quantized(model.get_submodule(paths[name]), name, operation, loaded))


# The largest distance between GELU and its tanh form, at x = 2.7.
GELU_TANH_ERROR = 4.8e-4


def _approximate_gelu(model: ConvNeXt, project: str, operation: OperationPlan) -> None:
    """GELU's tanh form, where what becomes of it is less than a sixteenth of a step of the quantizer behind it.

    For formats in which it is faster (`EightBits.gelu_tanh`).
    """
    block = model.get_submodule(project.rpartition(".")[0])
    assert isinstance(block, Block)
    assert operation.scale is not None
    if block.grn is None and block.expand.activation == "gelu" and operation.scale >= 16 * GELU_TANH_ERROR:
        block.expand.activation = "gelu_tanh"


def rebalance(model: ConvNeXt, name: str, factors: Tensor) -> None:
    """Divide what the norm before an operation puts out by `factors` (C,), and multiply its weight by them: exact.

    Only a norm's output can be scaled a channel: nothing else in a block commutes with it. The activation does not
    (GELU(a x) is not a GELU(x)), so there is no such balance between expand and project.
    """
    norm, follower = norm_before(model, name), model.get_submodule(products(model)[name])
    assert isinstance(follower, nn.Linear | nn.Conv2d)
    weight = follower.weight.double()
    follower.weight.copy_(
        (weight * factors.double().reshape(1, -1, *[1] * (weight.ndim - 2))).to(follower.weight.dtype)
    )
    own = torch.ones(len(factors), dtype=torch.float64) if norm.weight is None else norm.weight.double()
    norm.weight = nn.Parameter((own / factors.double()).to(follower.weight.dtype), requires_grad=False)
    if norm.bias is not None:
        norm.bias.copy_((norm.bias.double() / factors.double()).to(norm.bias.dtype))


def norm_before(model: ConvNeXt, name: str) -> ChannelNorm:
    """The norm whose output is the input of an expand or a downsample; nothing else directly follows one.

    Raises:
        UsageError: another operation.
    """
    kind = kind_of(name)
    if kind not in ("expand", "downsample"):
        raise UsageError(f"{name} does not follow a norm directly; only expand and downsample can be balanced")
    path = f"{name}.norm" if kind == "downsample" else f"{name.rpartition('.')[0]}.dwconv_norm.norm"
    norm = model.get_submodule(path)
    assert isinstance(norm, ChannelNorm)
    return norm


def rows_of(product: nn.Module) -> Tensor:
    """The product's weight as a matrix (out, in), a convolution's rows in the order (kernel row, kernel column, in)."""
    assert isinstance(product, nn.Linear | nn.Conv2d)
    weight = product.weight
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight


def how_of(loaded: LoadedPlan) -> EightBits:
    """How the target of a plan that quantizes something computes."""
    assert loaded.eight_bits is not None, f"a plan for {loaded.plan.target} without what this format says of 8 bits"
    return loaded.eight_bits


def scales_of(rows: Tensor, operation: OperationPlan, loaded: LoadedPlan) -> Tensor:
    """The scale of each row of a weight matrix (out, in), float32 (out,), as the target's graph stores it."""
    plan = loaded.plan
    limit = WEIGHT_LIMITS[plan.weight_bits]
    scales = weight_scales(rows, WEIGHT_SCHEMES[operation.type], plan.weight_ranges, limit)
    return representable(scales, how_of(loaded), plan.rest)


def rounded(rows: Tensor, scales: Tensor, operation: OperationPlan, bits: WeightBits = 8) -> Tensor:
    """(out, in) to the nearest values that the weights' type has; int8 without -128, so that it is symmetric."""
    dtype = TYPES[operation.type][1]
    scaled = rows / scales[:, None]
    if dtype == torch.float8_e4m3fn:
        return scaled.clamp(-operators.E4M3_MAX, operators.E4M3_MAX).to(dtype)
    limit = WEIGHT_LIMITS[bits]
    return scaled.round().clamp(-limit, limit).to(dtype)


def _quantized(product: nn.Module, name: str, operation: OperationPlan, loaded: LoadedPlan) -> QuantizedLinear:
    assert isinstance(product, nn.Linear | nn.Conv2d)
    assert product.bias is not None
    rows = rows_of(product)
    scales, weight = loaded.tensors.get(f"weight_scale/{name}"), loaded.tensors.get(f"weight/{name}")
    if weight is None or scales is None:
        scales = scales_of(rows, operation, loaded)
        weight = rounded(rows, scales, operation, loaded.plan.weight_bits)
    elif weight.dtype == torch.int8 and weight.short().abs().amax() > WEIGHT_LIMITS[loaded.plan.weight_bits]:
        raise UsageError(
            f"the plan's weight/{name} reaches {int(weight.short().abs().amax())}, above the "
            f"{WEIGHT_LIMITS[loaded.plan.weight_bits]} of {loaded.plan.weight_bits} bits; run quantize again"
        )
    bias = product.bias.double()
    if operation.shift:
        bias = bias + rows.double().sum(1) * operation.shift
    correction = loaded.tensors.get(f"bias/{name}")
    if correction is not None:
        bias = bias + correction.double()
    bias = bias.to(product.bias.dtype)
    if isinstance(product, nn.Linear):
        return QuantizedLinear(operation, weight, scales, bias)
    kind = QuantizedConvolution if how_of(loaded).convolutions else QuantizedPatches
    return kind(operation, weight, scales, bias, product)


def _replace(model: ConvNeXt, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
