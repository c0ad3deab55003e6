"""What checkpoints are compared with: the published ConvNeXt rebuilt, and values at which every parameter matters.

No package has the official code, so a rewrite of the published architecture with the official key names stands here.
`test_layouts` holds it against timm.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOLERANCE = 1e-5  # fp32, ||ours - theirs|| / ||theirs|| of the worst sample
DEPTHS, DIMS = (1, 2, 2, 1), (16, 24, 32, 40)  # of no published variant

State = dict[str, Tensor]


def randomize_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Values for every parameter at which all of them matter and activations keep their size.

    timm's own initialisation leaves many at 0, 1 or 1e-6, where a wrong conversion would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        value = parameter.data.normal_(generator=generator)
        is_grn = "grn" in name
        if value.squeeze().ndim > 1:
            value.div_(math.sqrt(value[0].numel()))
        elif not is_grn and name.endswith(("gamma", "layer_scale", "layer_scale_parameter")):
            value.mul_(0.1).add_(0.3)
        elif not is_grn and name.endswith("weight"):  # norms
            value.mul_(0.2).add_(1)
        else:
            value.mul_(0.3)
    return module.eval().requires_grad_(False)


def empty(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        module = build()
    return module.to_empty(device="cpu")


def images(batch: int = 2, channels: int = 3, size: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of the worst sample. NaN stays NaN, which no comparison passes."""
    assert actual.shape == expected.shape
    actual, expected = actual.double().flatten(1), expected.double().flatten(1)
    return float(((actual - expected).norm(dim=1) / expected.norm(dim=1)).max())


class FirstNorm(nn.Module):
    """LayerNorm over the channels of (N, C, H, W), written out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(dim=1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.weight[:, None, None] + self.bias[:, None, None]


class OfficialGrn(nn.Module):
    """arXiv:2301.00808, algorithm 1, on (N, H, W, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        gx = x.pow(2).sum(dim=(1, 2), keepdim=True).sqrt()
        nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * nx) + self.beta + x


class OfficialBlock(nn.Module):
    def __init__(self, channels: int, v2: bool) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        if v2:
            self.grn = OfficialGrn(4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        if not v2:
            self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))
        y = self.pwconv2(self.grn(y) if hasattr(self, "grn") else y)
        y = y * self.gamma if hasattr(self, "gamma") else y
        return x + y.permute(0, 3, 1, 2)


class Official(nn.Module):
    """ConvNeXt of arXiv:2201.03545 (V1) and arXiv:2301.00808 (V2) under the official repositories' key names."""

    def __init__(
        self, depths: tuple[int, ...], dims: tuple[int, ...], v2: bool, classes: int = 1000, chans: int = 3
    ) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(chans, dims[0], 4, stride=4), FirstNorm(dims[0]))
        others = [nn.Sequential(FirstNorm(dims[i]), nn.Conv2d(dims[i], dims[i + 1], 2, stride=2)) for i in range(3)]
        self.downsample_layers = nn.ModuleList([stem, *others])
        self.stages = nn.ModuleList(
            nn.Sequential(*(OfficialBlock(dims[i], v2) for _ in range(depths[i]))) for i in range(4)
        )
        self.norm = nn.LayerNorm(dims[3], eps=1e-6)
        self.head = nn.Linear(dims[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x.mean(dim=(2, 3))))
