"""Which kernel multiplies, for which arguments: decided on CPU tensors, as on a Hopper GPU, and without a launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moequant import ops
from moequant.batch import ANY_ROWS, ceil_div, empty_transposed_scales
from moequant.kernels.gemm import gemm1_swiglu_hopper, grouped_gemm, grouped_gemm_hopper
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


class Launches:
    """Stands in for a kernel: what each launch is compiled for, but for the number of experts, and how many experts it has."""

    def __init__(self, name: str, seen: list[Any], experts: list[int]) -> None:
        self.name, self.seen, self.experts = name, seen, experts

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any, **options: Any) -> None:
        options.pop("EXPERTS", None)
        if "SHAPE" in options:
            options["SHAPE"] = options["SHAPE"]._replace(experts=0)
        if "size" in options:
            self.experts.append(options.pop("size")[0])
        self.seen.append((self.name, *sorted((name, str(value)) for name, value in options.items())))


# experts, rows of each, whether they lie in one buffer, and a guess of their number
PROBLEMS = [
    (1, 16, False, 1),
    (1, 128, True, 128),
    (2, 4096, False, 1000),
    (4, 64, False, 3),
    (16, 1024, True, 16),
    (128, 16, False, 16),
    (128, 512, True, 512),
    (300, 32, False, 4),
]


def launches_of(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, columns: int, depth: int, any_rows: bool) -> set[Any]:
    """What products of all PROBLEMS, stored and pushed, are compiled for."""
    seen: list[Any] = []
    experts: list[int] = []
    for module, name in ((grouped_gemm, "grouped_gemm_kernel"), (grouped_gemm_hopper, "grouped_gemm_hopper_kernel")):
        monkeypatch.setattr(module, name, Launches(name, seen, experts))
    monkeypatch.setattr(grouped_gemm, "reduce_split_k", lambda *_: None)
    for count, rows, ragged, hint in PROBLEMS:
        a, a_scales, b, b_scales = operands(count, rows, columns, depth)
        starts, out = None, output(count, rows, columns)
        if ragged:
            a, out, starts = a.flatten(0, 1), out.flatten(0, 1), torch.zeros(count, dtype=torch.int32)
            a_scales = torch.empty(ceil_div(depth, 128), count * rows).T
        scales = (a_scales, b_scales) if dtype == FP8 else (None, None)
        pair = torch.empty(a.shape, dtype=dtype), scales[0], torch.empty(b.shape, dtype=dtype), scales[1]
        counts, guess = torch.zeros(count, dtype=torch.int32), ANY_ROWS if any_rows else hint
        before = len(seen)
        ops.grouped_gemm_blockscale(*pair, counts, starts, out, 1, guess)
        ops.grouped_gemm_push(*pair, counts, starts, torch.zeros(out.shape[:-1], dtype=torch.int64), guess, None)
        assert len(seen) - before == 2 * (2 if any_rows and count > 256 else 1)
    assert not any_rows or max(experts, default=0) <= 256
    return set(seen)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("columns", "depth"), [(1536, 512), (4096, 256), (136, 2048), (200, 200)], ids=str)
def test_for_any_rows_the_choice_depends_on_columns_and_depth_alone(columns, depth, dtype, monkeypatch):
    chosen = launches_of(monkeypatch, dtype, columns, depth, True)
    assert len(chosen) == 1
    (name, *_), *_ = chosen
    # 200 numbers of a byte are no multiple of 16 bytes
    assert name == ("grouped_gemm_hopper_kernel" if dtype == FP8 and depth % 16 == 0 else "grouped_gemm_kernel")
    # what is guessed of the rows does choose otherwise
    assert len(launches_of(monkeypatch, dtype, columns, depth, False)) > 1


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("experts", [1, 6, 16, 300])
@pytest.mark.parametrize("rows", [16, 128, 1024])
@pytest.mark.parametrize(("inner", "fused"), [(1536, True), (2048, True), (1440, False)])
def test_for_any_rows_gemm_1_is_fused_or_not_by_its_columns(experts, rows, inner, fused):
    assert fuses(experts, rows, inner, ANY_ROWS) is fused


def misplaced(x: Tensor) -> Tensor:
    """The same from a byte on."""
    return torch.empty(x.numel() + 1, dtype=torch.uint8)[1:].view(x.dtype).view(x.shape)


@pytest.mark.usefixtures("on_hopper")
def test_where_places_would_choose_the_kernel_they_are_refused():
    a, a_scales, b, b_scales = operands(4, 64, 1024, 256)
    out = output(4, 64, 1024)
    for pair in ((misplaced(a), b), (a, misplaced(b))):
        assert ops.gemm_kernel(pair[0], a_scales, pair[1], b_scales, out, expected_rows=2000) is plain
        with pytest.raises(
            ValueError, match="batch_invariant=True .* [ab] must begin at a multiple of 16 bytes, got 0x.*; clone it"
        ):
            ops.gemm_kernel(pair[0], a_scales, pair[1], b_scales, out, expected_rows=ANY_ROWS)
    a, a_scales, b, b_scales = operands(4, 63, 1024, 256)
    with pytest.raises(ValueError, match=r"batch_invariant=True .* groups a multiple of 4 numbers apart, .* \(126, 1, 63\)"):
        ops.gemm_kernel(a, a_scales, b, b_scales, output(4, 63, 1024), expected_rows=ANY_ROWS)
    # without rows nothing is launched
    none = operands(4, 0, 1024, 256)
    assert ops.gemm_kernel(*none, output(4, 0, 1024), expected_rows=ANY_ROWS) is plain
