"""Which kernel multiplies, for which arguments: decided on CPU tensors, as on a Hopper GPU, and without a launch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moequant import ops
from moequant.batch import ceil_div, empty_transposed_scales
from moequant.kernels.gemm import gemm1_swiglu_hopper
from moequant.kernels.gemm.grouped_gemm import grouped_gemm_blockscale as plain
from moequant.kernels.gemm.grouped_gemm_hopper import grouped_gemm_blockscale_hopper
from moequant.kernels.library import common, hopper

FP8 = torch.float8_e4m3fn


@pytest.fixture
def on_hopper(monkeypatch):
    """A CPU counts as an H200 with 132 multiprocessors."""
    monkeypatch.setenv("MOEQUANT_CPU_KERNELS", "1")
    for module in (common, hopper, gemm1_swiglu_hopper):
        monkeypatch.setattr(module, "runs_gluon", lambda device: True)


def operands(experts: int, rows: int, columns: int, depth: int, segments: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b = (torch.empty(experts, n, depth, dtype=FP8) for n in (rows, columns))
    blocks, groups = segments * ceil_div(columns // segments, 128), ceil_div(depth, 128)
    return a, empty_transposed_scales(experts, rows, groups, "cpu"), b, torch.empty(experts, blocks, groups)


def output(experts: int, rows: int, columns: int) -> Tensor:
    return torch.empty(experts, rows, columns, dtype=torch.bfloat16)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("shape", "expected_rows", "kernel"),
    [
        pytest.param((16, 1024, 3072, 256), 16, grouped_gemm_blockscale_hopper, id="many weights"),
        pytest.param((6, 1024, 4096, 256), 20, plain, id="few weights"),
        pytest.param(
            (6, 1024, 4096, 256), None, grouped_gemm_blockscale_hopper, id="few weights, of all rows if nothing is expected"
        ),
        pytest.param((1, 128, 7168, 256), 128, plain, id="fewer tiles than multiprocessors"),
        pytest.param((1, 256, 7168, 256), 256, grouped_gemm_blockscale_hopper, id="more tiles than multiprocessors"),
        pytest.param((16, 1021, 3072, 256), 16, plain, id="rows that TMA can't step over"),
    ],
)
@pytest.mark.parametrize("pushed", [False, True])
def test_hopper_s_kernel_has_the_problems_that_it_takes_and_that_are_not_small(shape, expected_rows, kernel, pushed):
    out = None if pushed else output(*shape[:3])
    assert ops.gemm_kernel(*operands(*shape), out, expected_rows=expected_rows) is kernel


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("pushed", [False, True])
@pytest.mark.parametrize(
    ("columns", "kernel"), [(6144, grouped_gemm_blockscale_hopper), (5760, plain)], ids=["whole blocks", "half a block"]
)
def test_hopper_s_kernel_has_no_segments_that_end_within_a_block(columns, kernel, pushed):
    out = None if pushed else output(16, 256, columns)
    assert ops.gemm_kernel(*operands(16, 256, columns, 256, 2), out, 2) is kernel


def test_a_cpu_has_the_plain_kernel():
    assert ops.gemm_kernel(*operands(16, 1024, 3072, 256), output(16, 1024, 3072)) is plain


def fuses(experts: int, rows: int, inner: int, expected_rows: int) -> bool:
    a, a_scales, w13, w13_scales = operands(experts, rows, 2 * inner, 256, 2)
    values, scales = (
        torch.empty(experts, rows, inner, dtype=FP8),
        empty_transposed_scales(experts, rows, ceil_div(inner, 128), "cpu"),
    )
    return ops.fuses_gemm1(a, a_scales, w13, w13_scales, values, scales, expected_rows)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("experts", "rows", "inner", "expected_rows", "fused"),
    [
        pytest.param(16, 256, 2048, 64, True, id="many tiles"),
        # 2 row tiles of 64 by 32 column tiles; with 5 experts 320
        pytest.param(1, 128, 2048, 64, False, id="tiles that programs of the plain kernel share, and add in another order"),
        pytest.param(5, 128, 2048, 64, True, id="more tiles than multiprocessors"),
        pytest.param(16, 256, 1536, 1, False, id="faster apart"),
        pytest.param(16, 256, 1440, 64, False, id="not taken"),
    ],
)
def test_gemm_1_is_fused_where_it_gives_the_same_bits_sooner(experts, rows, inner, expected_rows, fused):
    assert fuses(experts, rows, inner, expected_rows) is fused


def test_nothing_is_fused_without_a_hopper_gpu():
    assert not fuses(16, 256, 2048, 64)


@pytest.mark.parametrize("rows, apart", [(2, 4), (4, 4), (5, 8), (130, 132)])
def test_scales_side_by_side_have_groups_that_tma_can_step_over(rows, apart):
    scales = torch.randn(rows, 3)
    moved = ops.rows_side_by_side(scales)
    assert moved.stride() == (1, apart) and torch.equal(moved, scales)
    assert ops.rows_side_by_side(moved) is moved


def test_scales_of_one_row_are_side_by_side_already():
    scales = torch.randn(1, 3)
    assert ops.rows_side_by_side(scales) is scales
