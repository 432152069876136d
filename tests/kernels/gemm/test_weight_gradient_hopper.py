"""Weight gradients of fp8 operands: the Hopper kernel against products in float64 on a Hopper GPU; the operation, what the kernel takes
and how it compiles, anywhere.

Gluon kernels don't run in Triton's interpreter; `test_hopper_stores.py` runs their source as Python.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_grouped_gemm_hopper import CONFIGS, NAN_BITS, hopper_test
from torch import Tensor

from compile_case import BF16, E4M3, cases, empty
from guarded import Guarded
from moequant import ops
from moequant.batch import ceil_div
from moequant.kernels.gemm.grouped_gemm_hopper import FLOAT32, NARROW, WIDE, Config
from moequant.kernels.gemm.weight_gradient_hopper import supports_weight_gradient, takes_weight_gradient, weight_gradient_hopper
from moequant.testing import assert_bit_equal, relative_error
from tokenwise import FP8, Operands, assert_near_gradient, columnwise_operands, exact_gradient


def poisoned(experts: int, columns: int, depth: int, dtype: torch.dtype = BF16) -> Guarded:
    """An output full of NaN, between guard bytes."""
    return Guarded(experts, columns, depth, dtype=dtype, device="cuda")


def launch(operands: Operands, out: Tensor, **settings: Any) -> Tensor:
    assert supports_weight_gradient(*operands, out)
    weight_gradient_hopper(*operands, out, **settings)
    return out


def check(counts: list[int], columns: int, depth: int, dtype: torch.dtype = BF16, spare: int = 0, **settings: Any) -> Tensor:
    operands = columnwise_operands(counts, columns, depth, "cuda", spare)
    out = poisoned(len(counts), columns, depth, dtype)
    launch(operands, out.tensor, **settings)
    out.assert_only(name="the gradient")
    assert_near_gradient(out.tensor, exact_gradient(*operands, len(counts)), counts)
    return out.tensor


@hopper_test
@CONFIGS
@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([0, 0, 0], id="no-tokens"),
        pytest.param([0, 0, 1111, 0, 0], id="one-hot-expert"),
        pytest.param([0, 128, 0, 256, 0], id="empty-experts"),
        pytest.param([1, 127, 128, 129, 640], id="mixed"),
        pytest.param([300], id="one-expert"),
    ],
)
def test_counts(counts: list[int], config: Config) -> None:
    check(counts, 256, 512, config=config)


@hopper_test
@CONFIGS
@pytest.mark.parametrize(
    ("columns", "depth"),
    [(1, 264), (37, 8), (64, 136), (100, 72), (128, 392), (130, 128), (191, 1032), (193, 256), (320, 384), (1000, 520)],
    ids=str,
)
def test_any_columns_of_both(columns: int, depth: int, config: Config) -> None:
    check([129, 0, 200], columns, depth, config=config)


@hopper_test
@CONFIGS
def test_many_experts(config: Config) -> None:
    check([(37 * i) % 300 * (i % 5 > 0) for i in range(200)], 128, 264, config=config)


@hopper_test
@pytest.mark.parametrize("dtype", NAN_BITS)
def test_output_types(dtype: torch.dtype) -> None:
    check([500, 0, 129], 300, 1032, dtype)


@hopper_test
@CONFIGS
@pytest.mark.parametrize("num_sms", [1, 7])
def test_programs_of_many_tiles(num_sms: int, config: Config) -> None:
    check([700, 0, 130, 5], 520, 776, config=config, num_sms=num_sms)


@hopper_test
def test_tall_experts_are_cut_into_bands() -> None:
    # more than 16 row tiles, and not a multiple of them
    check([256, 1], 128 * 19 + 5, 520)


@hopper_test
def test_blocks_past_the_last_one_do_not_matter() -> None:
    # as many again, all of them NaN
    check([100, 260], 130, 264, spare=720)


@hopper_test
@CONFIGS
def test_repeat_runs_are_equal(config: Config) -> None:
    counts = [400, 13, 256, 130, 0, 64, 300, 1]
    operands = columnwise_operands(counts, 1024, 1536, "cuda")
    outs = [launch(operands, poisoned(len(counts), 1024, 1536).tensor, config=config) for _ in range(5)]
    for out in outs[1:]:
        assert_bit_equal(out, outs[0])


@hopper_test
def test_two_streams_at_once() -> None:
    """Launches of different streams draw from different counters."""
    counts = [200, 13, 256, 130, 0, 64, 255, 1]
    operands = columnwise_operands(counts, 512, 768, "cuda")
    expected = launch(operands, poisoned(len(counts), 512, 768).tensor)
    streams = [torch.cuda.Stream() for _ in range(2)]
    outs = [[poisoned(len(counts), 512, 768).tensor for _ in range(10)] for _ in streams]
    torch.cuda.synchronize()
    for i in range(10):
        for stream, mine in zip(streams, outs, strict=True):
            with torch.cuda.stream(stream):
                launch(operands, mine[i])
    torch.cuda.synchronize()
    for out in outs[0] + outs[1]:
        assert_bit_equal(out, expected)


@hopper_test
def test_graph_replays_with_new_blocks() -> None:
    """What experts have is read on the device: a captured launch takes what is there when it is replayed."""
    first, second = (columnwise_operands(counts, 256, 512, "cuda") for counts in ([300, 0, 128], [1, 200, 300]))
    out = poisoned(3, 256, 512).tensor
    launch(first, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(first, out)
    expected = launch(second, poisoned(3, 256, 512).tensor)
    for mine, theirs in zip(first, second, strict=True):
        mine.copy_(theirs)
    out.fill_(torch.nan)
    graph.replay()
    assert_bit_equal(out, expected)


@hopper_test
def test_a_bad_scale_spoils_its_numbers_alone() -> None:
    counts = [300, 200]
    operands = columnwise_operands(counts, 256, 512, "cuda")
    clean = launch(operands, poisoned(2, 256, 512).tensor).clone()
    # of expert 1's first block column 7 of a; expert 0 has three
    operands[1][3, 7] = torch.nan
    out = launch(operands, poisoned(2, 256, 512).tensor)
    assert out[1, 7].isnan().all()
    others = torch.ones(2, 256, dtype=torch.bool, device="cuda")
    others[1, 7] = False
    assert_bit_equal(out[others], clean[others])


@hopper_test
@pytest.mark.parametrize("dtype", NAN_BITS)
@pytest.mark.parametrize("depth", [264, 260, 257])
def test_the_operation_takes_any_columns_on_a_gpu(dtype: torch.dtype, depth: int) -> None:
    """By the kernel, or by torch where rows of out are no multiple of 16 bytes."""
    counts = [300, 0, 129]
    operands = columnwise_operands(counts, 130, depth, "cuda")
    out = poisoned(3, 130, depth, dtype)
    ops.weight_gradient(*operands, out.tensor)
    out.assert_only(name="the gradient")
    # torch rounds to bfloat16 first
    by_torch = depth * dtype.itemsize % 16 != 0
    assert_near_gradient(out.tensor, exact_gradient(*operands, 3), counts, BF16 if by_torch else None)


@pytest.mark.gpu
def test_other_gpus_multiply_with_torch_and_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("torch's grouped_mm is one expert after the other here")
    monkeypatch.setattr("moequant.kernels.library.common.why_no_gluon", lambda device: "another GPU")
    counts = [300, 0, 129]
    operands = columnwise_operands(counts, 136, 264, "cuda")
    out = poisoned(3, 136, 264)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.weight_gradient(*operands, out.tensor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    out.assert_only(name="the gradient")
    assert_near_gradient(out.tensor, exact_gradient(*operands, len(counts)), counts)


def small_operands() -> Operands:
    """Two experts, the second without tokens; two columns of a, three of b. Numbers are small integers, scales powers of two."""
    a, b = torch.zeros(2, 256), torch.zeros(3, 256)
    a[:, :2] = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    b[:, :2] = torch.tensor([[1.0, 1.0], [0.0, 2.0], [5.0, -1.0]])
    # one row for each block, 16 bytes apart
    a_scales = torch.tensor([[2.0, 0.5, 9.0, 9.0], [1.0, 1.0, 9.0, 9.0]])[:, :2]
    return a.to(FP8), a_scales, b.to(FP8), torch.tensor([[4.0, 1.0]]), torch.tensor([1, 2], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_operation_gives_the_numbers_that_a_hand_computes(dtype: torch.dtype) -> None:
    out = torch.full((2, 2, 3), torch.nan, dtype=dtype)
    ops.weight_gradient(*small_operands(), out)
    # 1 * 1 + 2 * 1, times 2 * 4; 3 * 5 + -4 * -1, times 0.5 * 4
    expected = torch.tensor([[[24.0, 32.0, 24.0], [-2.0, -16.0, 38.0]], [[0.0] * 3] * 2])
    assert torch.equal(out.float(), expected)


def test_the_exact_gradient_of_these_tests_is_the_references() -> None:
    counts = [130, 0, 5]
    operands = columnwise_operands(counts, 70, 140)
    out = torch.full((3, 70, 140), torch.nan)
    ops.weight_gradient(*operands, out)
    assert operands[-1].tolist() == [2, 3, 4] and operands[1].shape[0] > 4
    assert relative_error(out, exact_gradient(*operands, 3)) < 1e-6


def tensors(experts: int, columns: int, depth: int, dtype: torch.dtype = BF16) -> list[Tensor]:
    blocks = experts * 2
    scales = empty(blocks, ceil_div(columns, 4) * 4, dtype=torch.float32)[:, :columns]
    a, b = (empty(width, blocks * 128, dtype=E4M3) for width in (columns, depth))
    block_ends = torch.zeros(experts, dtype=torch.int32)
    return [
        a,
        scales,
        b,
        empty(ceil_div(depth, 128), blocks, dtype=torch.float32),
        block_ends,
        empty(experts, columns, depth, dtype=dtype),
    ]


@pytest.mark.parametrize(
    ("shape", "dtype", "taken"),
    [
        ((32, 4096, 7168), BF16, True),
        ((3, 37, 8), BF16, True),
        ((3, 37, 12), BF16, False),
        ((3, 37, 12), torch.float32, True),
        ((3, 37, 2), torch.float32, False),
        ((3, 37, 8), torch.float16, True),
        ((300, 16, 128), BF16, True),
        ((3, 0, 128), BF16, False),
        ((3, 128, 128), torch.float64, False),
    ],
    ids=str,
)
def test_rows_of_the_gradient_are_whole_16_bytes(shape: tuple[int, int, int], dtype: torch.dtype, taken: bool) -> None:
    arguments = tensors(*shape, dtype=dtype)
    assert takes_weight_gradient(*arguments) is taken
    assert not supports_weight_gradient(*arguments), "a CPU is no Hopper"


@pytest.mark.parametrize("changed", ["format", "stride", "order", "place", "strides of out"])
def test_what_tma_can_not_address_is_refused(changed: str) -> None:
    arguments = tensors(3, 36, 128)
    a, a_scales, _, _, _, out = arguments
    assert takes_weight_gradient(*arguments)
    if changed == "format":
        arguments[0] = a.view(torch.float8_e5m2)
    elif changed == "stride":
        arguments[1] = empty(a_scales.shape[0], 38, dtype=torch.float32)[:, :36]
    elif changed == "order":
        arguments[1] = a_scales.T.contiguous().T
    elif changed == "place":
        arguments[0] = empty(a.numel() + 1, dtype=E4M3)[1:].view(a.shape)
    else:
        arguments[5] = empty(*out.shape[:2], 256)[..., :128]
    assert not takes_weight_gradient(*arguments)


def call_weight_gradient(
    dtype: torch.dtype, columns: int = 4096, depth: int = 7168, out_dtype: torch.dtype = BF16, experts: int = 16
) -> None:
    assert dtype == E4M3
    ops.weight_gradient(*tensors(experts, columns, depth, out_dtype))


def configured(shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Config:
    """What a launch takes for a shape."""
    from moequant.kernels.gemm import weight_gradient_hopper as module

    seen: list[Config] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, HALVES, STAGES, **named: seen.append(Config(HALVES, STAGES))

    monkeypatch.setattr(module, "weight_gradient_hopper_kernel", Recorder())
    weight_gradient_hopper(*tensors(*shape, dtype=dtype))
    return seen[0]


@pytest.mark.parametrize(
    ("shape", "dtype", "config"),
    [
        ((16, 1536, 2048), BF16, WIDE),
        ((16, 2048, 768), BF16, WIDE),
        ((16, 2048, 768), torch.float16, WIDE),
        ((4, 512, 512), BF16, NARROW),
        ((16, 1536, 2048), torch.float32, FLOAT32),
    ],
    ids=str,
)
def test_compiled_cases_are_of_every_configuration(
    shape: tuple[int, int, int], dtype: torch.dtype, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert configured(shape, dtype, monkeypatch) == config


COMPILE_CASES = cases(
    call_weight_gradient,
    {"dtype": E4M3},
    {"dtype": E4M3, "columns": 1536, "depth": 2048},
    {"dtype": E4M3, "columns": 2048, "depth": 768, "out_dtype": torch.float16},
    # ends inside a row tile and half a column tile; few tiles, which are narrow ones
    {"dtype": E4M3, "columns": 2900, "depth": 2952},
    {"dtype": E4M3, "columns": 512, "depth": 512, "experts": 4},
    {"dtype": E4M3, "columns": 1536, "depth": 2048, "out_dtype": torch.float32},
    hopper=True,
)

OPERATION_CASES = {"weight_gradient": {"fp8": lambda: (*small_operands(), torch.zeros(2, 2, 3))}}
