"""Launch records: what is chosen for a shape and a GPU, and that a graph for any batch is not tied to one."""

import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from convnext_deploy.kernels import launch
from convnext_deploy.kernels.dwconv_norm import launch_of
from convnext_deploy.kernels.launch import ProductLaunch, fitted_launch, programs
from convnext_deploy.kernels.project import PARTS

TINY = (96, 192, 384, 768)
BASE = (128, 256, 512, 1024)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "capability", lambda x: (9, 0))
    monkeypatch.setattr(launch, "waits_are_operations", lambda: True)


def linear(outputs: int, inputs: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(outputs, inputs, dtype=dtype, device="meta")


def counts(record: ProductLaunch, weight: Tensor, rows: int) -> int:
    return programs(record, -(-rows // record.m), len(weight))


def before_and_after(weight: Tensor, rows: int, parts: Sequence[int] = (1,)) -> tuple[int, int]:
    """Programs with the record of so many rows as it is, and spread."""
    return counts(launch.product_launch(weight, rows), weight, rows), counts(
        fitted_launch(weight, rows, parts=parts), weight, rows
    )


@pytest.mark.parametrize(
    ("widths", "batch", "expand", "project"),
    [  # by stage; the table of docs/design/kernels.md
        (TINY, 1, [(294, 294), (156, 156), (96, 96), (48, 96)], [(98, 98), (39, 156), (24, 96), (12, 120)]),
        (TINY, 8, [(588, 588), (294, 294), (600, 600), (336, 336)], [(196, 196), (98, 98), (150, 150), (84, 168)]),
        (BASE, 1, [(392, 392), (208, 208), (128, 128), (64, 128)], [(98, 98), (52, 104), (32, 128), (16, 128)]),
    ],
)
def test_products_of_few_rows_are_spread_over_the_gpu(
    widths: tuple[int, ...], batch: int, expand: list[tuple[int, int]], project: list[tuple[int, int]]
) -> None:
    for stage, width in enumerate(widths):
        rows = batch * (56 >> stage) ** 2
        assert before_and_after(linear(4 * width, width), rows) == expand[stage]
        assert before_and_after(linear(width, 4 * width), rows, PARTS) == project[stage]


@pytest.mark.parametrize("widths", [TINY, BASE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8], ids=str)
def test_at_batch_32_nothing_is_narrowed_or_split(widths: tuple[int, ...], dtype: torch.dtype) -> None:
    for stage, width in enumerate(widths):
        rows = 32 * (56 >> stage) ** 2
        for weight in (linear(4 * width, width, dtype), linear(width, 4 * width, dtype)):
            assert fitted_launch(weight, rows, parts=PARTS) == launch.product_launch(weight, rows)


def test_a_product_is_split_only_where_that_saves_more_than_a_kernel_costs() -> None:
    for inputs in range(64, 8192, 64):
        record = fitted_launch(linear(768, inputs), 49, parts=PARTS)
        trips = inputs / record.k
        assert record.split == 1 or trips / record.split >= launch.PART_TRIPS
        assert record.split == 1 or trips - trips / record.split >= launch.SAVED_TRIPS
    assert [fitted_launch(linear(768, inputs), 49, parts=PARTS).split for inputs in (1536, 2048, 3072)] == [1, 4, 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("generation", [(8, 0), (9, 0)])
def test_stages_fit_the_smallest_shared_memory(
    generation: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "capability", lambda x: generation)
    deepest = 0
    for outputs in (40, 96, 768, 1536):
        for rows in (49, 196, 3136, 6272):
            record, plain = (f(linear(outputs, 3072, dtype), rows) for f in (fitted_launch, launch.product_launch))
            size = (record.m + record.n) * record.k * record.stages * dtype.itemsize
            assert record.stages >= plain.stages
            assert size <= (96 << 10)
            deepest = max(deepest, record.stages)
    assert deepest >= 4


def test_a_downsample_is_split_by_whole_taps() -> None:
    weight = torch.empty(1024, 512, 2, 2, dtype=torch.float16, device="meta")
    assert fitted_launch(weight, 49, parts=(1, 2, 4)).split == 4
    assert fitted_launch(weight, 49, parts=(1,)).split == 1


def test_tiles_hold_rows_of_one_image_where_they_are_told_to() -> None:
    weight = linear(768, 3072)
    apart, together = fitted_launch(weight, 49, images=8, parts=PARTS), fitted_launch(weight, 8 * 49, parts=PARTS)
    assert apart.m == together.m == 64
    assert programs(together, 7, 768) == 168
    assert apart.n == 64  # 8 tiles for 8 images: 96 programs
    assert apart.split == 1


def test_a_gpu_with_fewer_multiprocessors_is_filled_by_wider_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = linear(768, 3072)
    monkeypatch.setattr(launch, "processors", lambda x: 16)
    found = fitted_launch(weight, 49, parts=PARTS)
    assert (found.n, found.split) == (64, 1)
    monkeypatch.setattr(launch, "processors", lambda x: 148)
    assert fitted_launch(weight, 49, parts=PARTS).split == 6


def test_multiprocessors_are_those_of_the_tensors_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.processors(torch.empty(1)) == launch.PROCESSORS
    there: Any = types.SimpleNamespace(is_cuda=True, device="cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(multi_processor_count=len(device))
    )
    assert launch.processors(there) == 6


def test_a_graph_for_any_batch_is_not_spread_and_has_no_guard() -> None:
    """It runs at its largest batch too, where narrow tiles and parts would cost."""
    seen = []

    def traced(x: Tensor) -> Tensor:
        weight = torch.empty(768, 3072, dtype=torch.float16)
        batch = x.shape[0]
        seen.append(fitted_launch(weight, 49 * batch, parts=PARTS))
        seen.append(fitted_launch(weight, 49, images=batch, parts=PARTS))
        return x + 1

    graph = make_fx(traced, tracing_mode="symbolic")(torch.empty(3, 2))
    assert {(record.n, record.split) for record in seen} == {(64, 1)}
    assert not graph.shape_env.guards


@pytest.mark.parametrize(
    ("generation", "starts_early"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((12, 0), True)]
)
def test_kernels_start_early_from_sm_90_on(
    generation: tuple[int, int], starts_early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "capability", lambda x: generation)
    for known in (True, False):  # to Triton
        monkeypatch.setattr(launch, "waits_are_operations", lambda known=known: known)
        assert fitted_launch(linear(768, 3072), 49).pdl is (starts_early and known)
    assert launch.dependent(starts_early) == ({"PDL": True, "launch_pdl": True} if starts_early else {"PDL": False})


@pytest.mark.parametrize(
    ("widths", "batch", "rows"),
    [(TINY, 1, [12, 6, 4, 2]), (BASE, 1, [14, 7, 5, 3]), (TINY, 8, [14, 14, 14, 7]), (TINY, 32, [14, 14, 14, 7])],
)
def test_strips_of_the_convolution_are_lower_at_small_batches(
    widths: tuple[int, ...], batch: int, rows: list[int]
) -> None:
    for stage, width in enumerate(widths):
        side = 56 >> stage
        x = torch.empty(batch, side, side, width, dtype=torch.float16, device="meta")
        weight = torch.empty(width, 1, 7, 7, dtype=torch.float16, device="meta")
        assert launch_of(x, weight).rows == rows[stage]
        assert launch_of(x, weight, whole=True).rows <= rows[stage]  # these programs are fewer
