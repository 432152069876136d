"""The grouped GEMM kernel against `moequant.reference.grouped_gemm_blockscale`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from compile_case import BF16, PLAIN, cases, each_format
from moequant import reference
from moequant.batch import QuantizedTensor
from moequant.kernels.gemm.grouped_gemm import (
    CANDIDATES,
    SMALL_TILES,
    Config,
    grouped_gemm_blockscale,
    locate_tile,
)
from product_calls import call_grouped_gemm, gemm_arguments

Operand = QuantizedTensor | Tensor

DTYPES = {
    "e4m3fn": torch.float8_e4m3fnuz if torch.version.hip else torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "int8": torch.int8,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
PATHS = {"tma": SMALL_TILES, "pointers": SMALL_TILES._replace(tma=False)}


def by_name(table: dict) -> list:
    return [pytest.param(value, id=name) for name, value in table.items()]


def operands(device: str, dtype: torch.dtype, shape: tuple[int, int, int, int], segments: int = 1) -> tuple[Operand, Operand]:
    """Random operands of shape (L, M, N, K_dim), quantized to dtype unless that is bfloat16 or float16."""
    experts, rows, columns, depth = shape
    x = torch.randn(experts, rows, depth, device=device, dtype=torch.bfloat16)
    w = torch.randn(experts, columns, depth, device=device, dtype=torch.bfloat16)
    # neighbouring groups and blocks get scales far apart, so that a wrong scale shows
    x *= torch.exp2(torch.randint(-3, 4, (experts, rows, 1), device=device)).to(x.dtype)
    w *= torch.exp2(torch.arange(columns, device=device) // 32 % 5).to(w.dtype)[:, None]
    w *= torch.exp2(torch.arange(depth, device=device) // 64 % 3).to(w.dtype)
    if dtype in PLAIN:
        return x.to(dtype), w.to(dtype)
    return reference.quantize_expert_batch(x, dtype=dtype), reference.quantize_weight(w, dtype=dtype, segments=segments)


def quantized(device: str, shape: tuple[int, int, int, int]) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Random float8 operands of shape (L, M, N, K_dim)."""
    a, b = operands(device, DTYPES["e4m3fn"], shape)
    assert isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor)
    return a, b


def poison(a: Operand, counts: list[int]) -> None:
    """Fills the rows past counts with NaN: values where their type has one, and scales."""
    for expert, count in enumerate(counts):
        values = a.values if isinstance(a, QuantizedTensor) else a
        if values.dtype == torch.int8:
            values[expert, count:] = 127
        else:
            values[expert, count:] = torch.full_like(values[expert, count:], torch.nan, dtype=torch.float32).to(values.dtype)
        if isinstance(a, QuantizedTensor):
            a.scales[expert, count:] = torch.nan


def launch(
    a: Operand,
    b: Operand,
    num_tokens: Tensor | None,
    out: Tensor,
    config: Config | None = None,
    expected_rows: int | None = None,
) -> Tensor:
    """Runs the kernel over out."""
    left = (a.values, a.scales) if isinstance(a, QuantizedTensor) else (a, None)
    right, segments = ((b.values, b.scales), b.segments) if isinstance(b, QuantizedTensor) else ((b, None), 1)
    grouped_gemm_blockscale(*left, *right, num_tokens, None, out, segments=segments, expected_rows=expected_rows, config=config)
    return out


def poisoned_output(a: Operand, b: Operand, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output full of one NaN that no computation makes."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    payload = {torch.float32: 0x7FC01234, torch.bfloat16: 0x7FD1, torch.float16: 0x7E21}[dtype]
    shape = (a.shape[0], a.shape[1], b.shape[1])
    return torch.full(shape, payload, dtype=bits, device=a.device).view(dtype)


def relative_error(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


def tolerance(dtype: torch.dtype, out_dtype: torch.dtype) -> float:
    """The largest relative error. fp8 tensor cores add with about 14 bits, the others with nearly float32's, and cut off."""
    if out_dtype == torch.bfloat16:
        return 1.75e-3
    if dtype.is_floating_point and dtype.itemsize == 1 and torch.cuda.is_available():
        return 6e-4
    if out_dtype == torch.float16:
        return 3e-4
    interpreted, on_gpu = (1e-6, 1e-5) if dtype == torch.int8 else (1e-5, 1e-4)
    return on_gpu if torch.cuda.is_available() else interpreted


def check(
    a: Operand,
    b: Operand,
    counts: list[int] | None,
    *,
    config: Config | None = None,
    out_dtype: torch.dtype = torch.float32,
    expected_rows: int | None = None,
) -> Tensor:
    """Compares the kernel with the reference on the rows of counts, and the others with what was there before. Returns the output."""
    rows = a.shape[1]
    clamped = [rows] * a.shape[0] if counts is None else [min(count, rows) for count in counts]
    poison(a, clamped)
    num_tokens = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=a.device)
    before = poisoned_output(a, b, out_dtype)
    out = launch(a, b, num_tokens, before.clone(), config, expected_rows)
    expected = reference.grouped_gemm_blockscale(
        a, b, torch.tensor(clamped, dtype=torch.int32, device=a.device), out_dtype=torch.float32
    )
    bits = torch.int32 if out_dtype == torch.float32 else torch.int16
    limit = tolerance((a.values if isinstance(a, QuantizedTensor) else a).dtype, out_dtype)
    for expert, count in enumerate(clamped):
        assert torch.equal(out[expert, count:].view(bits), before[expert, count:].view(bits)), f"expert {expert}: row past {count}"
        # the rounding error of few numbers scatters
        if count:
            error = relative_error(out[expert, :count], expected[expert, :count])
            assert error <= 2 * limit, f"expert {expert}: relative error {error:.2e}"
    if sum(clamped):
        valid = torch.arange(rows, device=a.device) < torch.tensor(clamped, device=a.device).unsqueeze(1)
        error = relative_error(out[valid], expected[valid])
        assert error <= limit, f"relative error {error:.2e}"
    return out


@triton.jit
def write_tiles(
    counts_pointer, found, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr, COLUMN_TILES: tl.constexpr
):
    counts = tl.load(counts_pointer + tl.arange(0, EXPERTS))
    ends = tl.cumsum(tl.cdiv(counts, BLOCK_M) * COLUMN_TILES, 0)
    for tile in range(tl.max(ends, 0)):
        expert, count, row_tile, column_tile = locate_tile(tile, ends, counts, BLOCK_M, GROUP_M, COLUMN_TILES)
        tl.store(found + tile * 4, expert)
        tl.store(found + tile * 4 + 1, count)
        tl.store(found + tile * 4 + 2, row_tile)
        tl.store(found + tile * 4 + 3, column_tile)


def test_tile_numbers_of_the_worked_example(device: str) -> None:
    counts = torch.tensor([70, 0, 130, 0], dtype=torch.int32, device=device)
    found = torch.full((20, 4), -1, dtype=torch.int32, device=device)
    sizes: dict[str, Any] = {"EXPERTS": 4, "BLOCK_M": 64, "GROUP_M": 2, "COLUMN_TILES": 4}
    write_tiles[(1,)](counts, found, **sizes)
    experts, valid, row_tiles, column_tiles = found.T.tolist()
    assert experts == [0] * 8 + [2] * 12
    assert valid == [70] * 8 + [130] * 12
    assert row_tiles == [0, 1] * 8 + [2] * 4
    assert column_tiles == [0, 0, 1, 1, 2, 2, 3, 3] * 2 + [0, 1, 2, 3]


@pytest.mark.parametrize("config", by_name(PATHS))
@pytest.mark.parametrize("dtype", by_name(DTYPES))
def test_formats(device: str, dtype: torch.dtype, config: Config) -> None:
    a, b = operands(device, dtype, (3, 70, 256, 256))
    check(a, b, [70, 3, 65], config=config)


@pytest.mark.parametrize("config", by_name(PATHS))
@pytest.mark.parametrize("depth", [16, 100, 128, 192, 320, 333])
@pytest.mark.parametrize("dtype", by_name({name: DTYPES[name] for name in ("e4m3fn", "bf16")}))
def test_depth_tails(device: str, dtype: torch.dtype, depth: int, config: Config) -> None:
    """A last partial group has a scale of its own; depths that TMA can't read take pointers on both paths."""
    a, b = operands(device, dtype, (2, 40, 128, depth))
    check(a, b, [33, 40], config=config)


@pytest.mark.parametrize("config", by_name(PATHS))
@pytest.mark.parametrize("columns", [1, 8, 100, 129, 384])
def test_column_tails(device: str, columns: int, config: Config) -> None:
    a, b = operands(device, DTYPES["e4m3fn"], (2, 20, columns, 192))
    check(a, b, [20, 7], config=config)


@pytest.mark.parametrize("config", by_name(PATHS))
@pytest.mark.parametrize("half", [96, 128, 200, 257])
def test_gate_and_up_are_blocked_apart(device: str, half: int, config: Config) -> None:
    a, b = operands(device, DTYPES["e4m3fn"], (2, 33, 2 * half, 192), segments=2)
    check(a, b, [33, 5], config=config)


@pytest.mark.parametrize("config", by_name(PATHS))
@pytest.mark.parametrize("rows", [1, 2, 63, 65, 131])
def test_rows_of_the_buffer(device: str, rows: int, config: Config) -> None:
    """M need not be a multiple of anything: TMA reads on into the next expert's rows, and past the last one."""
    a, b = operands(device, DTYPES["e4m3fn"], (3, rows, 128, 128))
    check(a, b, [rows, 1, rows // 2], config=config)


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param(None, id="all-rows"),
        pytest.param([0, 0, 0, 0, 0], id="no-rows"),
        pytest.param([0, 0, 150, 0, 0], id="one-hot-expert"),
        pytest.param([0, 64, 0, 128, 0], id="empty-experts"),
        pytest.param([1, 150, 0, 65, 149], id="mixed"),
        pytest.param([151, 4096, 2**31 - 1, 1, 0], id="more-than-the-buffer"),
    ],
)
def test_counts(device: str, counts: list[int] | None) -> None:
    a, b = operands(device, DTYPES["e4m3fn"], (5, 150, 200, 128))
    check(a, b, counts)


def test_single_expert(device: str) -> None:
    a, b = operands(device, DTYPES["e4m3fn"], (1, 90, 300, 256))
    check(a, b, [80])


def test_tall_expert_in_bands(device: str) -> None:
    """More row tiles than a band has, and a last band of one."""
    a, b = operands(device, DTYPES["e4m3fn"], (2, 64 * 18, 200, 128), segments=2)
    check(a, b, [64 * 17 - 1, 64 * 16 + 1], config=SMALL_TILES)


@pytest.mark.parametrize("config", CANDIDATES, ids=lambda config: "-".join(map(str, config)))
def test_configurations(device: str, config: Config) -> None:
    a, b = operands(device, DTYPES["e4m3fn"], (3, 140, 256, 384))
    check(a, b, [130, 0, 17], config=config)


@pytest.mark.parametrize("parts", [1, 5], ids=["whole", "parts"])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_output_types(device: str, out_dtype: torch.dtype, parts: int) -> None:
    """More parts than groups of K_dim: some are empty."""
    a, b = operands(device, DTYPES["e4m3fn"], (2, 140, 384, 192))
    check(a, b, [140, 111], out_dtype=out_dtype, config=SMALL_TILES._replace(parts=parts))


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("block_n", [16, 32, 64])
def test_narrow_tiles_have_the_scales_of_their_blocks(device: str, block_n: int, segments: int) -> None:
    a, b = operands(device, DTYPES["e4m3fn"], (2, 70, 400, 256), segments=segments)
    check(a, b, [70, 3], config=SMALL_TILES._replace(block_n=block_n))


@pytest.mark.parametrize("expected_rows", [None, 0, 1, 300, 10**6])
def test_expected_rows_is_a_hint(device: str, expected_rows: int | None) -> None:
    a, b = operands(device, DTYPES["e4m3fn"], (2, 40, 128, 128))
    check(a, b, [40, 11], expected_rows=expected_rows)


def test_scales_are_a_slice_of_a_larger_buffer(device: str) -> None:
    a, b = quantized(device, (2, 40, 128, 320))
    larger = torch.full((2, 5, 64), torch.nan, device=device)
    larger[:, :3, 8:48] = a.scales.transpose(1, 2)
    sliced = larger[:, :3, 8:48].transpose(1, 2)
    check(QuantizedTensor(a.values, sliced, "transposed"), b, [40, 11])


def test_misaligned_operands_take_pointers(device: str) -> None:
    """A contiguous view that starts off a 16-byte boundary, which TMA can't read."""
    a, b = quantized(device, (2, 40, 128, 256))
    storage = torch.empty(a.values.numel() + 3, dtype=torch.uint8, device=device)
    shifted = storage[3:].view(a.values.dtype).view(a.values.shape)
    shifted.copy_(a.values)
    check(QuantizedTensor(shifted, a.scales, "transposed"), b, [40, 11])


def test_bad_group_spoils_its_row_alone(device: str) -> None:
    a, b = quantized(device, (2, 40, 128, 256))
    clean = check(a, b, [40, 11])
    a.scales[0, 7, 1] = torch.nan
    out = launch(a, b, torch.tensor([40, 11], dtype=torch.int32, device=device), poisoned_output(a, b))
    assert out[0, 7].isnan().all()
    assert torch.equal(out[0, :7], clean[0, :7])
    assert torch.equal(out[0, 8:], clean[0, 8:])
    assert torch.equal(out[1, :11], clean[1, :11])


@pytest.mark.parametrize("dtype", by_name(DTYPES))
def test_repeat_runs_are_equal(device: str, dtype: torch.dtype) -> None:
    a, b = operands(device, dtype, (2, 70, 200, 320))
    num_tokens = torch.tensor([70, 13], dtype=torch.int32, device=device)
    first = launch(a, b, num_tokens, poisoned_output(a, b))
    second = launch(a, b, num_tokens, poisoned_output(a, b))
    assert torch.equal(first.view(torch.int32), second.view(torch.int32))


def test_nothing_to_do(device: str) -> None:
    """No experts, rows or columns: nothing is launched. No K_dim: zeros."""
    counts = torch.zeros(2, dtype=torch.int32, device=device)
    for experts, rows, columns in ((0, 4, 8), (2, 0, 8), (2, 4, 0)):
        a, b = (torch.empty(experts, n, 64, dtype=torch.bfloat16, device=device) for n in (rows, columns))
        launch(a, b, counts[:experts], torch.empty(experts, rows, columns, device=device))
    a, b = (torch.empty(2, n, 0, dtype=torch.bfloat16, device=device) for n in (4, 8))
    assert torch.equal(launch(a, b, None, poisoned_output(a, b)), torch.zeros(2, 4, 8, device=device))


def similarity_loss(x: Tensor, y: Tensor) -> float:
    """1 - 2 * sum(xy) / sum(x^2 + y^2): DeepGEMM's measure of what quantization costs."""
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


# e5m2 has one bit of mantissa less than e4m3fn: twice the error, four times the loss.
LOSS = {"e4m3fn": 1e-3, "e5m2": 4e-3, "int8": 1e-3, "bf16": 1e-5, "fp16": 1e-5}


@pytest.mark.gpu
@pytest.mark.parametrize("expected_rows", [64, 1024], ids=["small-tiles", "large-tiles"])
@pytest.mark.parametrize(
    ("columns", "depth", "segments"),
    [
        pytest.param(4096, 7168, 2, id="deepseek-v3-w13"),
        pytest.param(7168, 2048, 1, id="deepseek-v3-w2"),
        pytest.param(5760, 2880, 2, id="gpt-oss-w13"),
        pytest.param(2880, 2880, 1, id="gpt-oss-w2"),
        pytest.param(3072, 2048, 2, id="qwen3-w13"),
    ],
)
@pytest.mark.parametrize("name", DTYPES)
def test_model_shapes(device: str, name: str, columns: int, depth: int, segments: int, expected_rows: int) -> None:
    experts, rows = 8, 384
    x = torch.randn(experts, rows, depth, device=device, dtype=torch.bfloat16)
    w = torch.randn(experts, columns, depth, device=device, dtype=torch.bfloat16)
    dtype = DTYPES[name]
    a: Operand = x.to(dtype, copy=True)
    b: Operand = w.to(dtype)
    if dtype not in PLAIN:
        a = reference.quantize_expert_batch(x, dtype=dtype)
        b = reference.quantize_weight(w, dtype=dtype, segments=segments)
    counts = [1, 300, 0, 64, 65, 128, 200, 299]
    for out_dtype in (torch.bfloat16, torch.float32):
        out = check(a, b, counts, out_dtype=out_dtype, expected_rows=expected_rows)
        for expert in (1, 6):
            product = x[expert, : counts[expert]].float() @ w[expert].float().T
            assert similarity_loss(out[expert, : counts[expert]], product) < LOSS[name]


@pytest.mark.gpu
def test_counts_do_not_recompile(device: str) -> None:
    from moequant.kernels.gemm.grouped_gemm import grouped_gemm_kernel

    a, b = operands(device, DTYPES["e4m3fn"], (4, 256, 512, 512))
    out = poisoned_output(a, b)
    compiled = set()
    for counts in ([1, 16, 0, 3], [256, 256, 256, 256], [0, 0, 0, 0], [17, 128, 1, 64]):
        launch(a, b, torch.tensor(counts, dtype=torch.int32, device=device), out, expected_rows=16)
        compiled.add(sum(len(cache[0]) for cache in grouped_gemm_kernel.device_caches.values()))
    assert len(compiled) == 1


COMPILE_CASES = [
    *cases(call_grouped_gemm, *(case for rows in (16, 1024) for case in each_format(BF16, expected_rows=rows))),
    *cases(call_grouped_gemm, *each_format(out_dtype=torch.float32)),
    # gpt-oss: a trailing half group
    *cases(call_grouped_gemm, *each_format(BF16, columns=2880, depth=2880)),
    *cases(call_grouped_gemm, *each_format(BF16, torch.float16, push=True)),
    # rows that TMA cannot read
    *cases(call_grouped_gemm, {"dtype": BF16, "depth": 2890}, wide=False, may_spill=True),
]


OPERATION_CASES = {
    "grouped_gemm_blockscale": {"int8, counted": lambda: gemm_arguments(True), "bfloat16": lambda: gemm_arguments(False)},
}
