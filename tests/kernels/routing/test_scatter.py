"""Scatter places rows where the reference does, bit for bit, and leaves everything else alone."""

from __future__ import annotations

import pytest
import torch

from compile_case import BF16, FNUZ, cases, each_format, empty, quantized
from far_memory import far, far_along
from moequant import ops, reference
from moequant.batch import ceil_div
from moequant.formats import FORMATS
from moequant.reference.routing import ragged_rows
from moequant.testing import assert_bit_equal, poison, routing
from operation_case import integers, quantize_outputs

SHAPES = [(1, 1, 1, 128), (9, 3, 4, 300), (33, 8, 10, 128), (20, 2, 3, 1100), (0, 2, 4, 64)]


def routed(tokens, top_k, experts, device):
    ids = routing(tokens, top_k, experts)[0].to(device)
    ids[torch.rand(ids.shape, device=device) < 0.15] = -1
    rows_in_expert = torch.empty(tokens, top_k, dtype=torch.int32, device=device)
    counts = torch.empty(experts, dtype=torch.int32, device=device)
    reference.route(ids, rows_in_expert, counts)
    return ids, rows_in_expert


def run_scatter(kernel, x, ids, rows_in_expert, experts, limit, dtype, quantized, recipe="default", **options):
    """Returns poisoned-before values, scales, rows, sources; of limit rows in all where options have expert_start."""
    columns, device = x.shape[1], x.device
    shape = (experts, limit) if options.get("expert_start") is None else (limit,)
    values = torch.full((*shape, columns * dtype.itemsize), 0x55, dtype=torch.uint8, device=device).view(dtype)
    groups = ceil_div(columns, 128)
    scales = poison(torch.empty(*shape[:-1], groups, shape[-1], device=device).mT) if quantized else None
    rows = poison(torch.empty(rows_in_expert.shape, dtype=torch.int32, device=device))
    sources = poison(torch.empty(shape, dtype=torch.int64, device=device))
    if kernel:
        from moequant.kernels.routing.scatter import scatter

        spec = ops.quant_spec(dtype, recipe) if quantized else None
        scatter(x, ids, rows_in_expert, values, scales, rows=rows, sources=sources, spec=spec, **options)
    else:
        reference.scatter(x, ids, rows_in_expert, values, scales, rows=rows, sources=sources, recipe=recipe, **options)
    return [t for t in (values, scales, rows, sources) if t is not None]


def assert_same(*args, **options) -> list[torch.Tensor]:
    results = [run_scatter(kernel, *args, **options) for kernel in (True, False)]
    for result, expected in zip(*results, strict=True):
        assert_bit_equal(result, expected)
    return results[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["fp8_e4m3fn", "int8"])
def test_quantizing_scatter_matches_the_reference(shape, name, device):
    tokens, top_k, experts, columns = shape
    x = torch.randn(tokens, columns, dtype=torch.bfloat16).to(device)
    ids, rows_in_expert = routed(tokens, top_k, experts, device)
    assert_same(x, ids, rows_in_expert, experts, max(1, tokens), FORMATS[name].dtype, True)


@pytest.mark.parametrize("rows", [16, 64, 700])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("quantized", [True, False])
def test_ragged_rows_are_the_padded_ones_and_none_lies_past_the_end(shape, rows, quantized, device):
    tokens, top_k, experts, columns = shape
    x = torch.randn(tokens, columns, dtype=torch.bfloat16).to(device)
    ids, rows_in_expert = routed(tokens, top_k, experts, device)
    counts = torch.stack([(ids == expert).sum() for expert in range(experts)])
    starts, placed = ragged_rows(counts, rows)
    dtype = torch.float8_e4m3fn if quantized else torch.bfloat16
    ragged = assert_same(x, ids, rows_in_expert, experts, rows, dtype, quantized, expert_start=starts.int())
    padded = run_scatter(False, x, ids, rows_in_expert, experts, max(1, tokens), dtype, quantized)
    for expert, (start, count) in enumerate(zip(starts.tolist(), placed.tolist(), strict=True)):
        # scales and values, and sources; rows are numbered otherwise
        for flat, apart in zip((*ragged[:-2], ragged[-1]), (*padded[:-2], padded[-1]), strict=True):
            assert_bit_equal(flat[start : start + count], apart[expert, :count])
    assert int((ragged[-2] >= 0).sum()) == int(placed.sum())


@pytest.mark.parametrize("recipe", ["deepgemm", "ue8m0"])
def test_recipes_match_the_reference(recipe, device):
    ids, rows_in_expert = routed(12, 2, 4, device)
    assert_same(torch.randn(12, 200, device=device), ids, rows_in_expert, 4, 12, torch.float8_e4m3fn, True, recipe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_plain_rows_are_converted(dtype, device):
    ids, rows_in_expert = routed(15, 3, 4, device)
    assert_same(torch.randn(15, 70, device=device), ids, rows_in_expert, 4, 15, dtype, False)


def test_small_buffers_and_other_ranks_experts_are_skipped(device):
    ids, rows_in_expert = routed(40, 3, 8, device)
    # counted from this rank's first expert
    local = ids - 2
    x = torch.randn(40, 130, dtype=torch.bfloat16, device=device)
    _, _, rows, _ = assert_same(x, local, rows_in_expert, 3, 4, torch.float8_e4m3fn, True)
    assert rows.max() < 3 * 4
    assert ((rows >= 0) == ((local >= 0) & (local < 3) & (rows_in_expert >= 0) & (rows_in_expert < 4))).all()


def test_rows_past_the_capacity_behind_an_offset_are_skipped(device):
    ids, rows_in_expert = routed(30, 2, 4, device)
    offsets = torch.tensor([0, 5, 9, 20], dtype=torch.int32, device=device)
    _, rows, _ = assert_same(
        torch.randn(30, 64, dtype=torch.bfloat16, device=device),
        ids,
        rows_in_expert,
        4,
        30,
        torch.bfloat16,
        False,
        offsets=offsets,
        capacity=10,
    )
    assert (rows[ids == 3] == -1).all() and (rows[(ids == 0) & (rows_in_expert < 10)] >= 0).all()


def test_quantized_rows_with_scales_travel_as_they_are(device):
    x = torch.randn(20, 300, dtype=torch.bfloat16).to(device)
    values, scales = reference.quantize_groups(x, 128, torch.float8_e4m3fn, "default", None)
    ids, rows_in_expert = routed(20, 3, 5, device)
    padded = torch.zeros(20, 7, device=device)
    padded[:, :3] = scales
    sources = torch.zeros(20, 3, dtype=torch.int64, device=device)[:, 0]
    sources += torch.arange(20, device=device) * 1000 + (5 << 32)
    for limit, starts in ((20, None), (96, torch.arange(0, 80, 16, dtype=torch.int32, device=device))):
        given = {"x_scales": padded[:, :3], "row_sources": sources}
        moved = assert_same(values, ids, rows_in_expert, 5, limit, torch.float8_e4m3fn, True, **given, expert_start=starts)
        direct = run_scatter(True, x, ids, rows_in_expert, 5, limit, torch.float8_e4m3fn, True, expert_start=starts)
        for result, expected in zip(moved[:3], direct[:3], strict=True):
            assert_bit_equal(result, expected)


def test_strided_tokens_and_int64_ids_match(device):
    x = torch.randn(18, 400, dtype=torch.bfloat16).to(device)[:, 10:266]
    ids, rows_in_expert = routed(18, 2, 3, device)
    assert_same(x, ids.long(), rows_in_expert, 3, 18, torch.float8_e4m3fn, True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_tokens_rows_and_scales_past_2_to_the_31_elements(dtype, layout, device):
    from moequant.kernels.routing.scatter import scatter

    experts, limit, columns = 3, 2**23, 128
    x = torch.randn(3, columns, device=device).bfloat16()
    values = far((experts, limit, columns), (limit * columns, columns, 1), dtype, device)
    scales = far((experts, limit, 1), (2**30, 1, 2**30), torch.float32, device) if dtype == torch.int8 else None
    ids = torch.tensor([[2], [-1], [2]], dtype=torch.int32, device=device)
    rows_in_expert = torch.tensor([[0], [-1], [limit - 1]], dtype=torch.int32, device=device)
    spec = None if scales is None else ops.quant_spec(dtype, "default")
    if layout == "padded":
        scatter(far_along(0, x), ids, rows_in_expert, values, scales, spec=spec)
    else:
        starts = torch.arange(experts, dtype=torch.int32, device=device) * limit
        # experts' scales far from each other have no ragged form
        scales = None if scales is None else far((experts * limit, 1), (2**8, 1), torch.float32, device)
        scatter(far_along(0, x), ids, rows_in_expert, values.flatten(0, 1), scales, spec=spec, expert_start=starts)
        scales = None if scales is None else scales.unflatten(0, (experts, limit))
    written = values[2, [0, limit - 1]]
    if scales is None:
        assert_bit_equal(written, x[::2])
        return
    expected_values, expected_scales = reference.quantize_groups(x[::2], 128, dtype, "default", None)
    assert_bit_equal(written, expected_values)
    assert_bit_equal(scales[2, [0, limit - 1]], expected_scales)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 128, 4096])
def test_model_sizes_match_the_reference_on_the_gpu(tokens):
    x = torch.randn(tokens, 7168, dtype=torch.bfloat16, device="cuda")
    ids, rows_in_expert = routed(tokens, 8, 64, "cuda")
    assert_same(x, ids, rows_in_expert, 64, tokens, torch.float8_e4m3fn, True)
    starts, _ = ragged_rows(torch.bincount(ids[ids >= 0], minlength=64), 8 * tokens)
    assert_same(x, ids, rows_in_expert, 64, 8 * tokens, torch.float8_e4m3fn, True, expert_start=starts.int())


def call_scatter(dtype: torch.dtype, tokens: int = 128, quantized_before: bool = False, ragged: bool = False) -> None:
    values, scales = quantized(32, 1024, 7168, dtype)
    starts = None
    if ragged:
        values, scales, starts = values[0], None if scales is None else scales[0], empty(32, dtype=torch.int32)
    x, x_scales = empty(tokens, 7168), None
    if quantized_before:
        x, x_scales = empty(tokens, 7168, dtype=dtype), empty(tokens, 56, dtype=torch.float32)
    topk_ids = empty(tokens, 8, dtype=torch.int64)
    rows_in_expert, rows = empty(tokens, 8, dtype=torch.int32), empty(tokens, 8, dtype=torch.int32)
    offsets, sources = empty(256, dtype=torch.int32), empty(32, 1024, dtype=torch.int64)
    ops.scatter(x, topk_ids, rows_in_expert, values, scales, x_scales, rows, sources, None, offsets, 1024, expert_start=starts)


COMPILE_CASES = [
    *cases(call_scatter, *each_format(BF16)),
    # few tokens: each is cut into parts, of which a thread stores 8 bytes
    *cases(call_scatter, *each_format(BF16, tokens=4), wide=False),
    *cases(call_scatter, {"dtype": FNUZ}, anywhere=True),
    *cases(call_scatter, *each_format(quantized_before=True)),
    *cases(call_scatter, *each_format(BF16, ragged=True)),
]


def scatter_arguments(quantized: bool) -> tuple:
    x, ids, rows_in_expert = torch.randn(3, 140), integers([1, 0], [-1, 1], [2, 0]), integers([0, 0], [-1, 1], [0, 1])
    if not quantized:
        return x, ids, rows_in_expert, torch.zeros(2, 4, 140).bfloat16()
    rows, sources = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int64)
    options = torch.arange(3), integers(0, 1, 0), 4, "deepgemm"
    return x, ids, rows_in_expert, *quantize_outputs(), None, rows, sources, *options


def ragged_arguments() -> tuple:
    x, ids, rows_in_expert = torch.randn(3, 140), integers([1, 0], [-1, 1], [1, 0]), integers([0, 0], [-1, 1], [2, 1])
    outputs = torch.zeros(32, 140, dtype=torch.int8), torch.zeros(2, 32).t()
    placed = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(32, dtype=torch.int64)
    return x, ids, rows_in_expert, *outputs, None, *placed, None, None, None, "default", integers(0, 16)


OPERATION_CASES = {
    "scatter": {
        "quantizing": lambda: scatter_arguments(True),
        "converting": lambda: scatter_arguments(False),
        "ragged": ragged_arguments,
    },
}
