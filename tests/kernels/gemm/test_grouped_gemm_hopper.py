"""The Hopper grouped GEMM: against the reference on a Hopper GPU; what it supports and how it compiles, anywhere.

Gluon kernels don't run in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compile_case import BF16, E4M3, INT8, cases
from moequant import reference
from moequant.batch import QuantizedTensor, empty_transposed_scales
from moequant.kernels.gemm.grouped_gemm import grouped_gemm_blockscale
from moequant.kernels.gemm.grouped_gemm_hopper import (
    CANDIDATES,
    FLOAT32,
    NARROW,
    WIDE,
    Config,
    choose_config,
    grouped_gemm_blockscale_hopper,
)
from moequant.kernels.library.hopper import counters, supports, takes, too_small
from product_calls import call_grouped_gemm, call_int8_addmm

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
hopper = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")]
NAN_BITS = {torch.bfloat16: (torch.int16, 0x7FD1), torch.float16: (torch.int16, 0x7E21), torch.float32: (torch.int32, 0x7FC01234)}
# bf16 rounding alone is 1.66e-3; fp8 tensor cores add with about 14 bits
TOLERANCES = {torch.bfloat16: 1.75e-3, torch.float16: 6e-4, torch.float32: 6e-4}


def hopper_test(function: Any) -> Any:
    for mark in hopper:
        function = mark(function)
    return function


def operands(
    shape: tuple[int, int, int, int], segments: int = 1, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Random operands of shape (L, M, N, K_dim), whose neighbouring groups and blocks have scales far apart."""
    experts, rows, columns, depth = shape
    x = torch.randn(experts, rows, depth, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(experts, columns, depth, device="cuda", dtype=torch.bfloat16)
    x *= torch.exp2(torch.randint(-3, 4, (experts, rows, 1), device="cuda")).to(x.dtype)
    w *= torch.exp2(torch.arange(columns, device="cuda") // 32 % 5).to(w.dtype)[:, None]
    w *= torch.exp2(torch.arange(depth, device="cuda") // 64 % 3).to(w.dtype)
    return reference.quantize_expert_batch(x, dtype=dtype), reference.quantize_weight(w, dtype=dtype, segments=segments)


def poisoned(a: QuantizedTensor, b: QuantizedTensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """An output full of one NaN that no computation makes."""
    bits, payload = NAN_BITS[dtype]
    return torch.full((a.shape[0], a.shape[1], b.shape[1]), payload, dtype=bits, device="cuda").view(dtype)


def launch(a: QuantizedTensor, b: QuantizedTensor, num_tokens: Tensor | None, out: Tensor, **settings: Any) -> Tensor:
    assert supports(a.values, a.scales, b.values, b.scales, out, segments=b.segments)
    grouped_gemm_blockscale_hopper(a.values, a.scales, b.values, b.scales, num_tokens, None, out, segments=b.segments, **settings)
    return out


def counted(counts: list[int]) -> Tensor:
    return torch.tensor(counts, dtype=torch.int32, device="cuda")


def check(
    a: QuantizedTensor, b: QuantizedTensor, counts: list[int] | None, dtype: torch.dtype = torch.bfloat16, **settings: Any
) -> Tensor:
    """Compares the kernel with the reference on the rows of counts, and the others with what was there before. Returns the output."""
    rows = a.shape[1]
    valid = [rows] * a.shape[0] if counts is None else [min(count, rows) for count in counts]
    for expert, count in enumerate(valid):
        a.values.view(torch.int8)[expert, count:] = 0x7F
        a.scales[expert, count:] = torch.nan
    before = poisoned(a, b, dtype)
    out = launch(a, b, None if counts is None else counted(counts), before.clone(), **settings)
    expected = reference.grouped_gemm_blockscale(a, b, counted(valid), out_dtype=torch.float32)
    bits = NAN_BITS[dtype][0]
    mask = torch.arange(rows, device="cuda") < counted(valid).unsqueeze(1)
    assert torch.equal(out.view(bits)[~mask], before.view(bits)[~mask]), "rows past the counts were written"
    for expert, count in enumerate(valid):
        # the rounding error of few numbers scatters
        if count:
            assert relative_error(out[expert, :count], expected[expert, :count]) <= 2 * TOLERANCES[dtype], f"expert {expert}"
    if mask.any():
        error = relative_error(out[mask], expected[mask])
        assert error <= TOLERANCES[dtype], f"relative error {error:.2e}"
    return out


def relative_error(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


CONFIGS = pytest.mark.parametrize("config", CANDIDATES, ids=["wide", "narrow"])


@hopper_test
@CONFIGS
@pytest.mark.parametrize(
    "counts",
    [
        pytest.param(None, id="all-rows"),
        pytest.param([0, 0, 0, 0, 0], id="no-rows"),
        pytest.param([0, 0, 152, 0, 0], id="one-hot-expert"),
        pytest.param([0, 64, 0, 128, 0], id="empty-experts"),
        pytest.param([1, 150, 0, 65, 149], id="mixed"),
        pytest.param([153, 4096, 2**31 - 1, 1, 0], id="more-than-the-buffer"),
    ],
)
def test_counts(counts: list[int] | None, config: Config) -> None:
    check(*operands((5, 152, 256, 384)), counts, config=config)


@hopper_test
@CONFIGS
@pytest.mark.parametrize("depth", [16, 112, 128, 192, 336, 2880])
def test_depth_tails(depth: int, config: Config) -> None:
    check(*operands((2, 140, 256, depth)), [133, 40], config=config)


@hopper_test
@CONFIGS
@pytest.mark.parametrize("columns", [8, 104, 128, 136, 384, 2880])
def test_column_tails(columns: int, config: Config) -> None:
    check(*operands((3, 148, columns, 256)), [148, 7, 80], config=config)


@hopper_test
@CONFIGS
@pytest.mark.parametrize("rows", [4, 60, 64, 68, 128, 132, 4096])
def test_rows_of_the_buffer(rows: int, config: Config) -> None:
    check(*operands((3, rows, 256, 128)), [rows, 1, rows // 2], config=config)


@hopper_test
@CONFIGS
def test_gate_and_up_are_blocked_apart(config: Config) -> None:
    check(*operands((2, 100, 2 * 384, 192), segments=2), [100, 5], config=config)


@hopper_test
@CONFIGS
def test_many_experts(config: Config) -> None:
    check(*operands((250, 132, 256, 128)), [(37 * i) % 140 for i in range(250)], config=config)


@hopper_test
@pytest.mark.parametrize("dtype", NAN_BITS)
def test_output_types(dtype: torch.dtype) -> None:
    check(*operands((2, 140, 384, 320)), [140, 111], dtype)


@hopper_test
def test_scales_are_a_slice_of_a_larger_buffer() -> None:
    a, b = operands((2, 40, 128, 320))
    larger = torch.full((2, 5, 64), torch.nan, device="cuda")
    larger[:, :3, 8:48] = a.scales.transpose(1, 2)
    check(QuantizedTensor(a.values, larger[:, :3, 8:48].transpose(1, 2), "transposed"), b, [40, 11])


@hopper_test
@CONFIGS
def test_repeat_runs_are_equal_and_near_the_plain_kernel(config: Config) -> None:
    a, b = operands((8, 400, 1024, 1536))
    counts = counted([400, 13, 256, 130, 0, 64, 300, 1])
    outs = [launch(a, b, counts, poisoned(a, b), config=config) for _ in range(5)]
    assert all(torch.equal(out.view(torch.int16), outs[0].view(torch.int16)) for out in outs)
    plain = poisoned(a, b)
    grouped_gemm_blockscale(a.values, a.scales, b.values, b.scales, counts, None, plain)
    mask = torch.arange(400, device="cuda") < counts.unsqueeze(1)
    assert relative_error(outs[0][mask], plain[mask]) < 2e-3


@hopper_test
@CONFIGS
@pytest.mark.parametrize("columns", [512, 264, 320, 384])
@pytest.mark.parametrize("num_sms", [None, 3])
def test_rows_go_to_addresses_of_their_own_with_the_same_bits(columns: int, num_sms: int | None, config: Config) -> None:
    counts = [300, 0, 1, 129, 64]
    a, b = operands((5, 300, columns, 384))
    num_tokens = counted(counts)
    expected = poisoned(a, b)
    grouped_gemm_blockscale_hopper(a.values, a.scales, b.values, b.scales, num_tokens, None, expected, config=config)
    places = torch.randperm(5 * 300, device="cuda").view(5, 300)
    elsewhere = poisoned(a, b).view(5 * 300, columns)
    destinations = elsewhere.data_ptr() + places * (2 * columns)
    for expert, count in enumerate(counts):
        destinations[expert, count:] = 8
    grouped_gemm_blockscale_hopper(
        a.values, a.scales, b.values, b.scales, num_tokens, None, None, destinations=destinations, num_sms=num_sms, config=config
    )
    assert torch.equal(elsewhere[places].view(torch.int16), expected.view(torch.int16))


@hopper_test
def test_bad_group_spoils_its_row_alone() -> None:
    a, b = operands((2, 40, 128, 256))
    clean = check(a, b, [40, 11])
    a.scales[0, 7, 1] = torch.nan
    out = launch(a, b, counted([40, 11]), poisoned(a, b))
    assert out[0, 7].isnan().all()
    others = torch.arange(40, device="cuda") != 7
    assert torch.equal(out[0, others], clean[0, others])
    assert torch.equal(out[1, :11], clean[1, :11])


@hopper_test
def test_two_streams_at_once() -> None:
    """Launches of different streams draw from different counters."""
    a, b = operands((8, 256, 1024, 2048))
    counts = counted([200, 13, 256, 130, 0, 64, 255, 1])
    expected = launch(a, b, counts, poisoned(a, b))
    streams = [torch.cuda.Stream() for _ in range(2)]
    outs = [[poisoned(a, b) for _ in range(10)] for _ in streams]
    torch.cuda.synchronize()
    for i in range(10):
        for stream, mine in zip(streams, outs, strict=True):
            with torch.cuda.stream(stream):
                launch(a, b, counts, mine[i])
    torch.cuda.synchronize()
    for out in outs[0] + outs[1]:
        assert torch.equal(out.view(torch.int16), expected.view(torch.int16))
    assert len({counters.of_stream[torch.device("cuda", 0), stream.cuda_stream].data_ptr() for stream in streams}) == 2


@hopper_test
def test_graph_replays_with_new_counts() -> None:
    a, b = operands((4, 256, 512, 1024))
    counts = counted([200, 13, 256, 130])
    out = launch(a, b, counts, poisoned(a, b))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(a, b, counts, out)
        launch(a, b, counts, out)
    for new in ([1, 0, 77, 256], [256, 256, 0, 64]):
        counts.copy_(counted(new))
        out.copy_(poisoned(a, b))
        graph.replay()
        expected = launch(a, b, counts, poisoned(a, b))
        assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


@hopper_test
def test_new_buffers_at_an_old_address() -> None:
    """Kept descriptors follow the shape, not the address alone."""
    for shape in [(2, 256, 512, 1024), (4, 128, 1024, 512), (2, 256, 512, 1024), (8, 64, 256, 1024)]:
        check(*operands(shape), None)


@hopper_test
@CONFIGS
@pytest.mark.parametrize("counts", [None, [1, 150, 0, 65, 149]], ids=["all-rows", "mixed"])
def test_int8_matches_the_reference(config: Config, counts: list[int] | None) -> None:
    check(*operands((5, 152, 640, 1024), dtype=torch.int8), counts, config=config)


@hopper_test
def test_int8_is_within_1e_6_of_exact_sums() -> None:
    a, b = operands((2, 152, 640, 1024), dtype=torch.int8)
    out = launch(a, b, None, torch.empty(2, 152, 640, device="cuda"))
    left, right = a.values.double() * expanded(a.scales, 2), b.values.double() * expanded(expanded(b.scales, 1), 2)
    assert relative_error(out, left @ right.transpose(1, 2)) < 1e-6


@hopper_test
def test_int8_sums_of_the_largest_products_are_exact() -> None:
    a, b = (torch.full((1, n, 1024), 127, dtype=torch.int8, device="cuda") for n in (200, 256))
    a[0, ::3, ::5], b[0, 1::2] = -127, -3
    scales = torch.ones(1, 8, 200, device="cuda").transpose(1, 2), torch.ones(1, 2, 8, device="cuda")
    left, right = QuantizedTensor(a, scales[0], "transposed"), QuantizedTensor(b, scales[1], "block")
    out = launch(left, right, None, torch.empty(1, 200, 256, device="cuda"))
    assert torch.equal(out[0].double(), a[0].double() @ b[0].double().T)


def expanded(scales: Tensor, dim: int) -> Tensor:
    return scales.double().repeat_interleave(128, dim)


def tensors(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    experts, rows, columns, depth = shape
    groups, blocks = -(-depth // 128), -(-columns // 128)
    a, b = (torch.empty(experts, n, depth, dtype=dtype) for n in (rows, columns))
    scales = empty_transposed_scales(experts, rows, groups, "cpu"), torch.empty(experts, blocks, groups)
    return a, scales[0], b, scales[1], torch.empty(experts, rows, columns, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "segments", "taken"),
    [
        pytest.param((4, 256, 4096, 7168), 1, True, id="deepseek"),
        pytest.param((4, 256, 4096, 7168), 2, True, id="deepseek-w13"),
        pytest.param((4, 256, 2880, 2880), 1, True, id="gpt-oss"),
        pytest.param((4, 256, 5760, 2880), 2, False, id="segments-of-no-whole-blocks"),
        pytest.param((4, 255, 4096, 7168), 1, False, id="odd-rows"),
        pytest.param((4, 256, 4096, 7160), 1, False, id="odd-depth"),
        pytest.param((4, 256, 4092, 7168), 1, False, id="odd-columns"),
        pytest.param((300, 16, 128, 128), 1, False, id="many-experts"),
        pytest.param((4, 0, 128, 128), 1, False, id="no-rows"),
    ],
)
def test_what_is_taken(shape: tuple[int, int, int, int], segments: int, taken: bool) -> None:
    assert takes(*tensors(shape), segments) is taken


def test_other_formats_are_not_taken() -> None:
    a, a_scales, b, b_scales, out = tensors((4, 256, 512, 512), torch.int8)
    assert takes(a, a_scales, b, b_scales, out, 1)
    assert not takes(a.view(torch.float8_e5m2), a_scales, b.view(torch.float8_e5m2), b_scales, out, 1)
    assert not takes(a, None, b, None, out, 1)


def test_a_cpu_is_no_hopper() -> None:
    assert not supports(*tensors((4, 256, 512, 512)))


@pytest.mark.parametrize(
    ("experts", "columns", "rows", "config"),
    [(32, 4096, 16, WIDE), (32, 4096, 1024, WIDE), (16, 3072, 64, NARROW), (16, 3072, 128, NARROW), (16, 3072, 1024, WIDE)],
)
def test_configurations_are_the_measured_ones(experts: int, columns: int, rows: int, config: Config) -> None:
    assert choose_config(experts, columns, rows, 2, 132) == config
    # wide tiles of float32 need more registers than there are, and more shared memory
    assert choose_config(experts, columns, rows, 4, 132) == FLOAT32 and FLOAT32.halves == 1


@pytest.mark.parametrize(
    ("experts", "rows", "columns", "expected_rows", "small"),
    [
        pytest.param(6, 1024, 4096, 20, True, id="few weights"),
        pytest.param(6, 1024, 4096, 65, False, id="few weights, many rows"),
        pytest.param(16, 1024, 3072, 16, False, id="many weights"),
        pytest.param(1, 128, 7168, 128, True, id="fewer tiles than multiprocessors"),
        pytest.param(1, 256, 7168, 256, False, id="more tiles than multiprocessors"),
    ],
)
def test_few_tiles_are_left_to_the_plain_kernel(experts: int, rows: int, columns: int, expected_rows: int, small: bool) -> None:
    assert too_small(experts, rows, columns, expected_rows, torch.device("cpu")) == small


COMPILE_CASES = [
    *cases(call_grouped_gemm, *({"dtype": E4M3, "expected_rows": rows, "experts": 16} for rows in (16, 1024)), hopper=True),
    *cases(
        call_grouped_gemm,
        *({"dtype": E4M3, "expected_rows": rows, "experts": 16, "starts": True} for rows in (16, 1024)),
        {"dtype": E4M3, "columns": 1024, "push": True, "starts": True},
        # counts that the TMA warp asks for anew
        {"dtype": E4M3, "experts": 200, "columns": 512, "starts": True},
        {"dtype": INT8, "starts": True},
        hopper=True,
    ),
    *cases(call_grouped_gemm, {"dtype": E4M3, "out_dtype": torch.float32}, hopper=True),
    *cases(call_grouped_gemm, *({"dtype": INT8, "out_dtype": dtype} for dtype in (BF16, torch.float32)), hopper=True),
    *cases(call_int8_addmm, {"bias": False}, hopper=True),
    # one address of a tile is spilled, outside the loop over groups; half a wide tile is left
    *cases(
        call_grouped_gemm,
        *({"dtype": E4M3, "expected_rows": 1024, "experts": 16, **columns, "push": True} for columns in ({}, {"columns": 4224})),
        hopper=True,
        may_spill=True,
    ),
    *cases(call_grouped_gemm, *({"dtype": E4M3, "columns": columns, "push": True} for columns in (1024, 2880)), hopper=True),
    # few columns: narrow tiles; gpt-oss: tails
    *cases(call_grouped_gemm, *({"dtype": E4M3, "columns": n, "depth": k} for n, k in ((1024, 4096), (2880, 2880))), hopper=True),
]
