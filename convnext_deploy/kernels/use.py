"""A model rewritten to the fused operations, in place. Names, shapes and values of its parameters stay what they were.

Parts of a model are named as its modules are: `stem`, `stages.0` (all its blocks), `downsamples.0`, `head`. A narrow
stage can run in another way, with both linears in one kernel: as `stages.0.mlp`.
"""

from collections.abc import Collection, Iterator
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..models.convnext import Block, ChannelNorm, ConvNeXt, Downsample, Head, Stem
from .dwconv_norm import dwconv_moments, launch_of
from .expand import expand, expand_squares
from .mlp import WIDEST, mlp
from .patches import downsample, pool_norm, stem
from .project import grn_factor, project
from .quantized import E4M3, dwconv_norm_quantized, expand_quantized, expand_squares_quantized, project_quantized

MLP = ".mlp"  # ends the names of alternatives


class FusedBlock(nn.Module):
    """A folded `Block`, (N, H, W, C) -> (N, H, W, C), in three kernels; with GRN a fourth, which is small."""

    row_sums: Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.dwconv_norm, self.expand, self.grn, self.project = (
            block.dwconv_norm, block.expand, block.grn, block.project,
        )  # fmt: skip
        linear = block.expand.linear
        wide = torch.promote_types(linear.weight.dtype, torch.float32)
        self.register_buffer("row_sums", linear.weight.double().sum(1).to(wide), persistent=False)
        _lay_out(block.dwconv_norm.conv)

    def forward(self, x: Tensor) -> Tensor:
        norm, widen, narrow = self.dwconv_norm.norm, self.expand.linear, self.project.linear
        y, moments, chunk = _convolved(self.dwconv_norm.conv, x)
        arguments = (y, widen.weight, widen.bias, norm.kind, norm.eps, self.expand.activation, moments, self.row_sums)
        if self.grn is None:
            hidden, factor = expand(*arguments, chunk), None
        else:
            hidden, squares = expand_squares(*arguments, chunk)
            factor = grn_factor(squares, self.grn.weight, self.grn.eps)
        return cast(Tensor, project(hidden, narrow.weight, narrow.bias, x, factor))


class FusedMlpBlock(nn.Module):
    """A folded V1 `Block` of up to `mlp.WIDEST` channels, (N, H, W, C) -> (N, H, W, C), in two kernels."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.dwconv_norm, self.expand, self.project = block.dwconv_norm, block.expand, block.project
        _lay_out(block.dwconv_norm.conv)

    def forward(self, x: Tensor) -> Tensor:
        norm, widen, narrow = self.dwconv_norm.norm, self.expand.linear, self.project.linear
        y, moments, chunk = _convolved(self.dwconv_norm.conv, x)
        first = (y, widen.weight, widen.bias, norm.kind, norm.eps, self.expand.activation, moments, chunk)
        return cast(Tensor, mlp(*first, narrow.weight, narrow.bias, x))


class CodedLinear(Protocol):
    """What `quantization.apply` puts in a linear's place: weight (in, out) in codes, and the scales of a plan."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    scale: Tensor
    zero_point: Tensor
    shift: float


class FusedQuantizedBlock(nn.Module):
    """A `Block` whose two linears a plan runs in int8 without zero points, or in E4M3: (N, H, W, C) -> (N, H, W, C)."""

    expand_scales: Tensor
    project_scales: Tensor
    in_scale: Tensor
    hidden_scale: Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.dwconv_norm, self.expand, self.grn, self.project = (
            block.dwconv_norm, block.expand, block.grn, block.project,
        )  # fmt: skip
        widen, narrow = (cast(CodedLinear, linear) for linear in (self.expand.linear, self.project.linear))
        for name, linear in (("expand", widen), ("project", narrow)):
            linear.weight.data = linear.weight.data.t().contiguous().t()  # the kernels read (out, in)
            self._derive(f"{name}_scales", linear.scale.float() * linear.weight_scale.float())
        gain = self.dwconv_norm.norm.weight  # None, unless the plan balances its channels with the weight's
        ones = widen.scale.new_ones(len(widen.weight), dtype=torch.float32)
        self._derive("in_scale", widen.scale.float() / (ones if gain is None else gain.float()))
        scale = narrow.scale.float()
        self._derive("hidden_scale", torch.stack((scale, torch.full_like(scale, narrow.shift))))
        _lay_out(self.dwconv_norm.conv)

    def _derive(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.dwconv_norm.conv, self.dwconv_norm.norm
        widen, narrow = (cast(CodedLinear, linear) for linear in (self.expand.linear, self.project.linear))
        e4m3 = widen.weight.dtype == E4M3
        codes = dwconv_norm_quantized(x, conv.weight, conv.bias, norm.kind, norm.eps, self.in_scale, e4m3)
        first = (codes, widen.weight.t(), widen.bias, self.expand.activation, self.expand_scales)
        last = (narrow.weight.t(), narrow.bias, x, self.project_scales)
        if self.grn is None:
            return cast(Tensor, project_quantized(expand_quantized(*first, self.hidden_scale), *last))
        hidden, squares = expand_squares_quantized(*first)
        factor = grn_factor(squares, self.grn.weight, self.grn.eps)
        return cast(Tensor, project_quantized(hidden, *last, factor, self.hidden_scale))


def _convolved(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """What a deferred norm is made of: the convolution, its moments, and how many channels one of these stands for."""
    y, moments = dwconv_moments(x, conv.weight, conv.bias)
    return y, moments, launch_of(x, conv.weight).channels


def _lay_out(conv: nn.Conv2d) -> None:
    """(C, 1, K, K) with the channels next to one another, as `dwconv_norm.taps` takes it without a copy."""
    conv.weight.data = conv.weight.data.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


class FusedStem(nn.Module):
    """A patch `Stem`: images (N, C, H, W), of any type and strides, -> (N, H / 4, W / 4, dims[0])."""

    input_mean = None  # the mean is in the bias

    def __init__(self, part: Stem) -> None:
        super().__init__()
        self.convs, self.norm = part.convs, part.norm

    @property
    def dtype(self) -> torch.dtype | None:
        return None  # the kernel takes images as they are

    def forward(self, images: Tensor) -> Tensor:
        conv, norm = cast(nn.Conv2d, self.convs[0]), self.norm
        return cast(Tensor, stem(images, conv.weight, conv.bias, norm.weight, norm.bias, norm.kind, norm.eps))


class FusedDownsample(nn.Module):
    """A folded `Downsample`: (N, H, W, C) -> (N, H / 2, W / 2, C')."""

    def __init__(self, part: Downsample) -> None:
        super().__init__()
        self.norm, self.conv = part.norm, part.conv
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, downsample(x, self.conv.weight, self.conv.bias, self.norm.kind, self.norm.eps))


class FusedHead(Head):
    """A `Head` that pools first: (N, H, W, C) -> (N, classes), or the features."""

    def __init__(self, part: Head) -> None:
        nn.Module.__init__(self)
        self.norm_first, self.norm, self.hidden, self.classifier = False, part.norm, part.hidden, part.classifier
        self.activation = part.activation

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        y = pool_norm(x, norm.kind, norm.eps)
        if norm.weight is not None:
            y = y * norm.weight
        return self.products(y if norm.bias is None else y + norm.bias)


def parts(model: ConvNeXt) -> tuple[str, ...]:
    """The parts of a folded model that the kernels can run, in order."""
    return tuple(name for name in _parts(model) if _fits(model, name))


def alternatives(model: ConvNeXt) -> tuple[str, ...]:
    """Other ways to run some of its parts: stages without GRN, in 32 or 16 bits, of up to `mlp.WIDEST` channels."""
    return tuple(
        name + MLP
        for name in parts(model)
        if name.startswith("stages.") and all(map(_is_narrow, cast(nn.ModuleList, model.get_submodule(name))))
    )


def _is_narrow(block: nn.Module) -> bool:
    block = cast(Block, block)
    return (
        block.grn is None and isinstance(block.expand.linear, nn.Linear) and block.expand.linear.in_features <= WIDEST
    )


def _parts(model: ConvNeXt) -> Iterator[str]:
    yield "stem"
    for stage in range(len(model.stages)):
        if stage:
            yield f"downsamples.{stage - 1}"
        yield f"stages.{stage}"
    yield "head"


def _fits(model: ConvNeXt, name: str) -> bool:
    if name == "stem":
        return type(model.stem) is Stem and model.spec.stem == "patch" and model.stem.norm.weight is not None
    if name == "head":
        return type(model.head) is Head and not model.head.norm_first and not model.spec.patch_tokens
    if name.startswith("downsamples"):
        part = model.get_submodule(name)
        return isinstance(part, Downsample) and _plain(part.norm) and isinstance(part.conv, nn.Conv2d)
    return all(isinstance(block, Block) and _fits_block(block) for block in model.get_submodule(name).children())


def _fits_block(block: Block) -> bool:
    linears, norm = (block.expand.linear, block.project.linear), block.dwconv_norm.norm
    types = {parameter.dtype for parameter in block.parameters()}
    in_floats = all(isinstance(linear, nn.Linear) for linear in linears) and _plain(norm)
    return (
        (in_floats or (_coded(*linears) and norm.bias is None))
        and block.project.layer_scale is None
        and (block.grn is None or block.grn.bias is None)
        and len(types) == 1
    )


def _coded(*linears: nn.Module) -> bool:
    """Whether expand and project are quantized, symmetrically and to one type; a shift is of project's input only."""
    if not all(hasattr(linear, "weight_scale") for linear in linears):
        return False
    coded = cast("tuple[CodedLinear, ...]", linears)
    same = {linear.zero_point.dtype for linear in coded} | {linear.weight.dtype for linear in coded}
    return len(same) == 1 and same <= {torch.int8, E4M3} and coded[0].shift == 0


def _plain(norm: ChannelNorm) -> bool:
    """Whether its scale and shift have been folded into what follows."""
    return norm.weight is None and norm.bias is None


@torch.no_grad()
def use_kernels(model: ConvNeXt, names: Collection[str]) -> None:
    """Put the fused operations into the named parts of a folded model, in place.

    Raises:
        UsageError: a part that the kernels cannot run, or that the model does not have; or one in both ways.
    """
    possible = (*parts(model), *alternatives(model))
    for name in names:
        if name not in possible:
            raise UsageError(f"no kernel runs {name} of {model.spec.architecture}; they run {', '.join(possible)}")
        if name + MLP in names:
            raise UsageError(f"{name} and {name}{MLP} are two ways to run the same blocks; name one of them")
    for name in names:
        part = model.get_submodule(name.removesuffix(MLP))
        if isinstance(part, Stem):
            model.stem = FusedStem(part)  # type: ignore[assignment]  # the same parameters and result
        elif isinstance(part, Head):
            model.head = FusedHead(part)
        elif isinstance(part, Downsample):
            model.downsamples[int(name.rpartition(".")[2])] = FusedDownsample(part)
        else:
            stage = cast(nn.ModuleList, part)
            for index, block in enumerate(stage):
                in_codes = not isinstance(cast(Block, block).expand.linear, nn.Linear)
                fused = FusedMlpBlock if name.endswith(MLP) else FusedQuantizedBlock if in_codes else FusedBlock
                stage[index] = fused(cast(Block, block))
