"""The depthwise 7x7 convolution on Hopper's matrix units: geometry and launch of `cuda/dwconv_sm90.cu`.

It takes fp16 and bf16; `hopper.takes_dwconv` says where it is used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import launch
from .nvrtc import Boxes, Kernel, start

PAD, STEP_CHANNELS, THREADS, PIECE = 3, 32, 256, 16  # pixels, channels, threads, bytes: as in the source
PROCESSOR_BYTES, PROGRAM_BYTES = (
    228 << 10,
    1 << 10,
)  # shared memory of a multiprocessor; what a program has beside its own
MOST_PROGRAMS = 3  # on a multiprocessor: 80 registers a thread


@dataclass(frozen=True)
class Tiling:
    """16 sites, of `rows` rows and 8 columns each, as strips, blocks of columns and images; and what a map makes of it.

    tile_rows, tile_columns: that the sites are used for.
    """

    strips: int
    rows: int
    blocks: int
    images: int
    tile_rows: int
    tile_columns: int

    @property
    def height(self) -> int:
        """Rows of a tile with its halo."""
        return self.tile_rows + 2 * PAD

    @property
    def width(self) -> int:
        return self.tile_columns + 2 * PAD

    @property
    def own_blocks(self) -> int:
        """Blocks with outputs."""
        return -(-self.tile_columns // 8)

    @property
    def run(self) -> int:
        """Rows of the same remainder by `rows`."""
        return max(self.strips, -(-self.height // self.rows))

    def place(self, row: int) -> int:
        """Of a row among the pieces of a block, for row 0 of a strip that begins there."""
        return row % self.rows * self.run + row // self.rows

    @property
    def plane(self) -> int:
        """Pieces of a block of columns; two blocks are 4 banks of 8 apart where one load takes both."""
        pieces = max(self.place(row) for row in (*range(self.height), self.strips * self.rows - 1)) + 1
        return pieces if self.blocks < 4 else pieces + (2 - pieces) % 4

    @property
    def map(self) -> int:
        """Pieces of an image, of which two stand 4 banks apart likewise."""
        pieces = (self.own_blocks + 1) * self.plane
        return pieces + (2 - pieces) % 4 if self.blocks == 1 else pieces

    @property
    def pitch(self) -> int:
        """Bytes of a channel: an odd number of pieces. Rows below the tile are read too, for sites without outputs."""
        beyond = max(self.place(row) for row in range(self.rows + 2 * PAD)) + self.strips
        pieces = (self.images - 1) * self.map + max(self.map, self.own_blocks * self.plane + beyond)
        return (pieces + (1 - pieces) % 8) * PIECE

    def shared_bytes(self, chunk: int) -> int:
        """In the source's order: alignment, tile, zeros, table, turned tile, moments of the first step, barrier."""
        step, across = 2 * STEP_CHANNELS, 4 if self.own_blocks == 3 else self.own_blocks
        pixels = self.images * -(-self.tile_rows * across // (THREADS // 32)) * THREADS // 4
        turned = STEP_CHANNELS * self.pitch + STEP_CHANNELS // 8 * 2 * PIECE
        earlier = pixels * 8 if chunk > STEP_CHANNELS else 0
        return 512 + step * (self.images * self.height * self.width + 16) + STEP_CHANNELS * 256 + turned + earlier + 8

    def tiles(self, images: int, height: int, width: int) -> int:
        """Of a batch, for one chunk."""
        return -(-images // self.images) * -(-height // self.tile_rows) * -(-width // self.tile_columns)

    @property
    def accesses(self) -> int:
        """Times that a step of a tile occupies its shared memory, 128 bytes each."""
        turned = self.images * self.height * (self.own_blocks + 1)
        results = self.images * self.tile_rows * self.own_blocks
        loads = (4 if self.blocks == 1 else 3) * (self.rows + 2 * PAD)
        brought = self.images * self.height * self.width // 2
        return brought + 8 * turned + STEP_CHANNELS * (loads + 8 + 2 * self.rows) + 4 * results


SHAPES = ((4, 4, 4, 1), (8, 4, 2, 1), (8, 2, 2, 1), (4, 2, 1, 4))  # strips, rows, blocks, images


def even(length: int, most: int) -> int:
    """The tiles' length that spreads a map's evenly."""
    return -(-length // -(-length // most))


def tiling(height: int, width: int, chunk: int) -> Tiling:
    """The one that loads shared memory least, of those of which two programs fit a multiprocessor."""
    candidates = [
        Tiling(strips, rows, blocks, images, even(height, strips * rows), even(width, 8 * blocks))
        for strips, rows, blocks, images in SHAPES
    ]
    return min(
        (c for c in candidates if c.own_blocks >= c.blocks - 1 and programs(c, chunk) > 1),
        key=lambda c: c.tiles(1 << 8, height, width) * c.accesses,
    )


def programs(tiling: Tiling, chunk: int) -> int:
    """That share a multiprocessor."""
    return min(MOST_PROGRAMS, PROCESSOR_BYTES // (tiling.shared_bytes(chunk) + PROGRAM_BYTES))


def kernel(height: int, width: int, channels: int, chunk: int, dtype: torch.dtype) -> Kernel:
    """For maps of this size. `chunk` channels, 64 or 32, have moments of their own."""
    t = tiling(height, width, chunk)
    constants = (
        ("CHUNK", chunk), ("STRIPS", t.strips), ("ROWS", t.rows), ("BLOCKS", t.blocks), ("IMAGES", t.images),
        ("TILE_ROWS", t.tile_rows), ("TILE_COLUMNS", t.tile_columns), ("PLANE", t.plane), ("MAP", t.map),
        ("PITCH", t.pitch), ("PROGRAMS", programs(t, chunk)), ("H", height), ("W", width), ("C", channels),
        ("BF16", int(dtype == torch.bfloat16)),
    )  # fmt: skip
    return Kernel(
        "dwconv_sm90.cu", "dwconv_moments", constants, THREADS, t.shared_bytes(chunk), programs=programs(t, chunk)
    )


def dwconv_moments(x: Tensor, taps: Tensor, bias: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """(N, H, W, C), (49, C), (C,) -> (N, H, W, C), and moments (N, H, W, chunks, 2) fp32; float16 or bfloat16.

    Raises:
        BuildError: NVRTC or the driver failed.
    """
    images, height, width, channels = x.shape
    t, own = tiling(height, width, chunk), kernel(height, width, channels, chunk, x.dtype)
    chunks = -(-channels // chunk)
    x = x.contiguous()
    y = torch.empty_like(x)
    moments = torch.empty((images, height, width, chunks, 2), dtype=torch.float32, device=x.device)
    tiles, most = chunks * t.tiles(images, height, width), own.programs * launch.processors(x)
    if most >= chunks:
        most -= most % chunks  # a program keeps to a chunk, whose taps it has laid out once
    box = Boxes(x, (t.images, t.height, t.width, STEP_CHANNELS), 64)
    start(own, x, min(tiles, most), box, taps, bias, y, moments, images)
    return y, moments
