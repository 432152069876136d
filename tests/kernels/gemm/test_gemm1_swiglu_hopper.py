"""GEMM 1 with SwiGLU and quantization inside: bit for bit the two kernels that it replaces, on a Hopper GPU; what it takes, anywhere.

Gluon kernels don't run in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compile_case import E4M3, cases, counted as no_rows, empty, quantized, ragged
from moequant import ops, reference
from moequant.batch import QuantizedTensor, empty_transposed_scales
from moequant.formats import FORMATS, RECIPES
from moequant.kernels.gemm.gemm1_swiglu_hopper import faster_apart, gemm1_swiglu_hopper, supports_gemm1_swiglu, takes_gemm1_swiglu
from moequant.kernels.gemm.grouped_gemm_hopper import grouped_gemm_blockscale_hopper
from moequant.kernels.quantization.silu_mul_quantize import silu_mul_quantize
from moequant.ops.gemm import better_apart
from product_calls import gemm1_arguments

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
hopper = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")]
# a NaN that no computation makes, and bytes that are no values
POISON, POISON_BYTE = 0x7FC01234, 0x55

Outputs = tuple[Tensor, Tensor]


def hopper_test(function: Any) -> Any:
    for mark in hopper:
        function = mark(function)
    return function


def operands(shape: tuple[int, int, int, int]) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Random activations and w13 for shape (L, M, I, H), whose neighbouring groups and blocks have scales far apart. Gates are of every
    size up to a few hundred."""
    experts, rows, inner, hidden = shape
    x = torch.randn(experts, rows, hidden, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(experts, 2 * inner, hidden, device="cuda", dtype=torch.bfloat16)
    x *= torch.exp2(torch.randint(-3, 4, (experts, rows, 1), device="cuda")).to(x.dtype)
    w *= torch.exp2(torch.arange(2 * inner, device="cuda") // 32 % 5).to(w.dtype)[:, None]
    w *= torch.exp2(torch.arange(hidden, device="cuda") // 64 % 3).to(w.dtype) / hidden**0.5
    return reference.quantize_expert_batch(x), reference.quantize_weight(w, segments=2)


def poisoned(a: QuantizedTensor, w13: QuantizedTensor) -> Outputs:
    experts, rows, inner = a.shape[0], a.shape[1], w13.shape[1] // 2
    values = torch.full((experts, rows, inner), POISON_BYTE, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    scales = empty_transposed_scales(experts, rows, inner // 128, "cuda")
    scales.view(torch.int32).fill_(POISON)
    return values, scales


def arithmetic(recipe: str) -> dict[str, Any]:
    named = RECIPES[recipe]
    settings = {"eps": named.eps, "power_of_two": named.power_of_two, "reciprocal": named.reciprocal}
    return {"max_value": FORMATS["fp8_e4m3fn"].max, **settings}


def fused(a: QuantizedTensor, w13: QuantizedTensor, num_tokens: Tensor | None, recipe: str = "default") -> Outputs:
    values, scales = poisoned(a, w13)
    assert supports_gemm1_swiglu(a.values, a.scales, w13.values, w13.scales, values, scales)
    gemm1_swiglu_hopper(a.values, a.scales, w13.values, w13.scales, num_tokens, None, values, scales, **arithmetic(recipe))
    return values, scales


def unfused(a: QuantizedTensor, w13: QuantizedTensor, num_tokens: Tensor | None, recipe: str = "default") -> Outputs:
    values, scales = poisoned(a, w13)
    gate_up = torch.full((*a.shape[:2], w13.shape[1]), torch.nan, dtype=torch.bfloat16, device="cuda")
    grouped_gemm_blockscale_hopper(a.values, a.scales, w13.values, w13.scales, num_tokens, None, gate_up, segments=2)
    silu_mul_quantize(gate_up, num_tokens, None, values, scales, ops.quant_spec(values.dtype, recipe))
    return values, scales


def counted(counts: list[int]) -> Tensor:
    return torch.tensor(counts, dtype=torch.int32, device="cuda")


def same(x: Outputs, y: Outputs) -> None:
    assert torch.equal(x[1].view(torch.int32), y[1].view(torch.int32)), "scales differ"
    assert torch.equal(x[0].view(torch.uint8), y[0].view(torch.uint8)), "values differ"


def check(shape: tuple[int, int, int, int], counts: list[int] | None, recipe: str = "default") -> None:
    """Compares the kernel with the two that it replaces, where rows past the counts must stay as they were, and with a second run."""
    a, w13 = operands(shape)
    rows = shape[1]
    valid = [rows] * shape[0] if counts is None else [min(count, rows) for count in counts]
    for expert, count in enumerate(valid):
        a.values.view(torch.int8)[expert, count:] = 0x7F
        a.scales[expert, count:] = torch.nan
    num_tokens = None if counts is None else counted(counts)
    out = fused(a, w13, num_tokens, recipe)
    same(out, unfused(a, w13, num_tokens, recipe))
    same(out, fused(a, w13, num_tokens, recipe))
    for expert, count in enumerate(valid):
        assert (out[0][expert, count:].view(torch.uint8) == POISON_BYTE).all()
        assert (out[1][expert, count:].view(torch.int32) == POISON).all()
        assert out[1][expert, :count].isfinite().all()


@hopper_test
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
def test_counts(counts: list[int] | None) -> None:
    check((5, 152, 256, 384), counts)


@hopper_test
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe: str) -> None:
    check((3, 300, 512, 640), [300, 17, 129], recipe)


@hopper_test
@pytest.mark.parametrize("hidden", [16, 128, 192, 336, 512, 2880])
def test_hidden_sizes(hidden: int) -> None:
    check((2, 260, 256, hidden), [260, 40])


@hopper_test
@pytest.mark.parametrize("inner", [128, 384, 768])
def test_intermediate_sizes(inner: int) -> None:
    check((3, 148, inner, 256), [148, 7, 80])


@hopper_test
@pytest.mark.parametrize("rows", [4, 60, 64, 68, 128, 132, 4096])
def test_rows_of_the_buffer(rows: int) -> None:
    check((3, rows, 256, 256), [rows, 1, rows // 2])


@hopper_test
def test_many_experts() -> None:
    check((250, 132, 128, 256), [(37 * i) % 140 for i in range(250)])


@hopper_test
@pytest.mark.parametrize("counts", [[400, 13, 256, 130, 0, 64, 300, 1], [7, 60, 64, 33, 1, 2, 3, 64]], ids=["mixed", "few"])
def test_many_tiles(counts: list[int]) -> None:
    """Several tiles for each program, long and short ones in turn."""
    check((8, 400, 1024, 1536), counts)


@hopper_test
def test_scales_are_slices_of_larger_buffers() -> None:
    a, w13 = operands((2, 40, 256, 320))
    larger = torch.full((2, 5, 64), torch.nan, device="cuda")
    larger[:, :3, 8:48] = a.scales.transpose(1, 2)
    expected = unfused(a, w13, counted([40, 11]))
    values, out = poisoned(a, w13)
    wide = torch.full((2, 3, 52), POISON, dtype=torch.int32, device="cuda").view(torch.float32)
    scales = wide[:, :2, 3:43].transpose(1, 2)
    source = larger[:, :3, 8:48].transpose(1, 2)
    assert supports_gemm1_swiglu(a.values, source, w13.values, w13.scales, values, scales)
    gemm1_swiglu_hopper(a.values, source, w13.values, w13.scales, counted([40, 11]), None, values, scales, **arithmetic("default"))
    out.copy_(scales)
    same((values, out), expected)
    assert int((wide.view(torch.int32) != POISON).sum()) == 51 * 2


@hopper_test
def test_bad_rows() -> None:
    """A NaN among a's scales spoils its row, a large one overflows: as in the unfused kernels."""
    a, w13 = operands((2, 140, 256, 256))
    for row in (7, 100):
        a.scales[0, row, 1] = torch.nan
        a.scales[0, row + 1, 0] = 1e38
        a.scales[0, row + 2] = 1e17
        a.scales[0, row + 3] = 0.0
    a.scales[1, 5, 1] = torch.nan
    counts = counted([140, 11])
    out = fused(a, w13, counts)
    same(out, unfused(a, w13, counts))
    assert out[1][0, 7].isnan().all() and out[1][1, 5].isnan().all()
    assert (out[0][0, 7].view(torch.uint8) == 0).all()


@hopper_test
def test_graph_replays_with_new_counts() -> None:
    a, w13 = operands((4, 256, 512, 1024))
    counts = counted([200, 13, 256, 130])
    values, scales = poisoned(a, w13)
    graph = torch.cuda.CUDAGraph()
    arguments = (a.values, a.scales, w13.values, w13.scales, counts, None, values, scales)
    gemm1_swiglu_hopper(*arguments, **arithmetic("default"))
    with torch.cuda.graph(graph):
        gemm1_swiglu_hopper(*arguments, **arithmetic("default"))
        gemm1_swiglu_hopper(*arguments, **arithmetic("default"))
    for new in ([1, 0, 77, 256], [256, 256, 0, 64]):
        counts.copy_(counted(new))
        values.view(torch.uint8).fill_(POISON_BYTE)
        scales.view(torch.int32).fill_(POISON)
        graph.replay()
        same((values, scales), unfused(a, w13, counts))


def tensors(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float8_e4m3fn) -> list[Tensor]:
    """The arguments of shape (L, M, I, H) that `takes_gemm1_swiglu` looks at."""
    experts, rows, inner, hidden = shape
    groups, blocks = -(-hidden // 128), -(-inner // 128)
    a, w13 = (torch.empty(experts, n, hidden, dtype=dtype) for n in (rows, 2 * inner))
    a_scales, scales = (empty_transposed_scales(experts, rows, n, "cpu") for n in (groups, blocks))
    return [a, a_scales, w13, torch.empty(experts, 2 * blocks, groups), torch.empty(experts, rows, inner, dtype=dtype), scales]


@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        pytest.param((4, 256, 2048, 7168), True, id="deepseek"),
        pytest.param((4, 256, 768, 2048), True, id="qwen3"),
        pytest.param((4, 256, 2880, 2880), False, id="gpt-oss"),
        pytest.param((4, 255, 2048, 7168), False, id="odd-rows"),
        pytest.param((4, 256, 2048, 7160), False, id="odd-hidden"),
        pytest.param((300, 16, 128, 128), False, id="many-experts"),
        pytest.param((4, 0, 128, 128), False, id="no-rows"),
    ],
)
def test_what_is_taken(shape: tuple[int, int, int, int], taken: bool) -> None:
    assert takes_gemm1_swiglu(*tensors(shape)) is taken


def test_other_formats_are_not_taken() -> None:
    a, a_scales, w13, w13_scales, values, scales = tensors((4, 256, 512, 512))
    assert not takes_gemm1_swiglu(*tensors((4, 256, 512, 512), torch.int8))
    assert not takes_gemm1_swiglu(a, a_scales, w13, w13_scales, values.view(torch.float8_e5m2), scales)
    assert not takes_gemm1_swiglu(a, a_scales, w13, w13_scales, values, scales.contiguous())
    assert not takes_gemm1_swiglu(a, a_scales, w13, w13_scales, values[:, :, :256], scales)


def test_a_cpu_is_no_hopper() -> None:
    assert not supports_gemm1_swiglu(*tensors((4, 256, 512, 512)))


@pytest.mark.parametrize(
    ("experts", "inner", "rows", "apart"),
    [
        (32, 2048, 1, False),
        (32, 2048, 1024, False),
        (16, 1536, 1, True),
        (16, 1536, 64, False),
        (32, 768, 16, True),
        (32, 768, 64, False),
    ],
)
def test_what_is_faster_apart_was_measured(experts: int, inner: int, rows: int, apart: bool) -> None:
    # a CPU counts as an H200
    assert faster_apart(experts, inner, rows, torch.device("cpu")) is apart


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_few_rows_in_a_large_buffer_take_no_memory_for_gate_and_up(layout: str) -> None:
    w13 = torch.empty(16, 3072, 8, dtype=torch.int8)
    for rows, apart in ((1024, True), (2048, False)):
        a = torch.empty(*((16, rows) if layout == "padded" else (16 * rows,)), 8, dtype=torch.int8)
        # 96 and 192 MiB
        assert better_apart(a, w13, 1) is apart
        assert not better_apart(a, w13, 64)


FP8 = torch.float8_e4m3fn


def call_gemm1_swiglu(dtype: torch.dtype, columns: int, recipe: str = "default", starts: bool = False) -> None:
    make = ragged if starts else quantized
    a, a_scales = make(16, 256, 4096, dtype)
    values, scales = make(16, 256, columns, dtype)
    assert a_scales is not None and scales is not None
    w13, w13_scales = empty(16, 2 * columns, 4096, dtype=dtype), empty(16, columns // 64, 32, dtype=torch.float32)
    counts = no_rows(w13), no_rows(w13) if starts else None
    ops.gemm1_swiglu(a, a_scales, w13, w13_scales, *counts, values, scales, recipe, 128)


COMPILE_CASES = cases(
    call_gemm1_swiglu,
    {"dtype": E4M3, "columns": 2048},
    {"dtype": E4M3, "columns": 768, "recipe": "ue8m0"},
    {"dtype": E4M3, "columns": 2048, "starts": True},
    hopper=True,
)


OPERATION_CASES = {
    "gemm1_swiglu": {"int8": lambda: gemm1_arguments(torch.int8), "fp8": lambda: gemm1_arguments(FP8)},
}
