"""Which rows and columns the Hopper kernels store, from their own source, without a GPU (`tests/gluon_on_cpu.py`).

Each valid element is stored once, to its own place and with the right number, nothing else is stored, and nothing outside the operands
is read.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from gluon_names import Memory
from gluon_on_cpu import StandIn
from guarded import Guarded
from moequant import reference
from moequant.config import round_up
from moequant.kernels.gemm import gemm1_swiglu_hopper as fused, grouped_gemm_hopper as grouped, weight_gradient_hopper as gradient
from moequant.kernels.gemm.gemm1_swiglu_hopper import gemm1_swiglu_hopper, takes_gemm1_swiglu
from moequant.kernels.gemm.grouped_gemm_hopper import FLOAT32, NARROW, WIDE, Config, grouped_gemm_blockscale_hopper
from moequant.kernels.gemm.weight_gradient_hopper import takes_weight_gradient, weight_gradient_hopper
from moequant.kernels.library.hopper import takes
from moequant.testing import assert_nearly_quantized, relative_error
from ragged_rows import ragged
from tokenwise import assert_near_gradient, columnwise_operands, exact_gradient


def addresses(tensor: Tensor, mask: Tensor) -> Tensor:
    """Where the elements of a mask lie."""
    offsets = torch.zeros(tensor.shape, dtype=torch.int64)
    for axis, stride in enumerate(tensor.stride()):
        shape = [-1 if axis == other else 1 for other in range(tensor.ndim)]
        offsets = offsets + (torch.arange(tensor.shape[axis]) * stride).view(shape)
    return tensor.data_ptr() + offsets[mask] * tensor.itemsize


def assert_stored_once(memory: Memory, counter: Tensor, *outputs: tuple[Tensor, Tensor]) -> None:
    stored = torch.cat(memory.stored)
    inside = (stored >= counter.data_ptr()) & (stored < counter.data_ptr() + 8)
    stored = stored[~inside].sort().values
    expected = torch.cat([addresses(*output) for output in outputs]).sort().values
    assert torch.equal(stored.unique(), expected), "an element was stored that is none of the valid ones, or one was left out"
    assert torch.equal(stored, expected), "an element was stored twice"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> tuple[Memory, Tensor]:
    """The kernels run on the CPU. Returns their memory, and the tile counter that they leave at zero."""
    memory, counter = Memory(), torch.zeros(2, dtype=torch.int32)
    kernels = {
        grouped: "grouped_gemm_hopper_kernel",
        fused: "gemm1_swiglu_hopper_kernel",
        gradient: "weight_gradient_hopper_kernel",
    }
    for module, name in kernels.items():
        monkeypatch.setattr(module, name, StandIn(getattr(module, name), memory))
        monkeypatch.setattr(module.counters, "get", lambda device: counter)
    return memory, counter


def operands(experts: int, rows: int, columns: int, depth: int, dtype: torch.dtype, segments: int = 1) -> tuple[Any, Any]:
    a = reference.quantize_expert_batch(torch.randn(experts, rows, depth).bfloat16(), dtype=dtype)
    b = reference.quantize_weight(torch.randn(experts, columns, depth).bfloat16(), dtype=dtype, segments=segments)
    return a, b


def check_product(
    stand_in: tuple[Memory, Tensor],
    shape: tuple[int, int, int, int],
    counts: list[int],
    config: Config,
    push: bool,
    **settings: Any,
) -> None:
    """With starts=True of ragged rows."""
    experts, rows, columns, _ = shape
    out_dtype, dtype = settings.get("out_dtype", torch.bfloat16), settings.get("dtype", torch.int8)
    memory, counter = stand_in
    memory.stored.clear()
    memory.tensors.clear()
    a, b = operands(*shape, dtype)
    num_tokens, expert_start = torch.tensor(counts, dtype=torch.int32), None
    valid = torch.arange(rows) < num_tokens[:, None]
    if settings.get("starts"):
        layout = ragged(counts, cut=settings.get("cut"))
        a, expert_start, valid = layout.operand(a), layout.expert_start, layout.mask()
    buffer = Guarded(*valid.shape, columns, dtype=out_dtype)
    out = buffer.tensor
    assert takes(a.values, a.scales, b.values, b.scales, None if push else out, 1)
    destinations, places = None, torch.arange(valid.numel())
    if push:
        places = torch.randperm(valid.numel())
        # nothing that is not valid is an address
        destinations = torch.where(valid, out.data_ptr() + places.view(valid.shape) * (columns * out.itemsize), 8)
        memory.tensors.append(out)
    given = a.values, a.scales, b.values, b.scales, num_tokens, expert_start, None if push else out
    grouped_gemm_blockscale_hopper(*given, destinations=destinations, config=config, num_sms=settings.get("num_sms", 2))
    assert counter.tolist() == [0, 0]
    written = torch.zeros(valid.numel(), columns, dtype=torch.bool)
    written[places[valid.flatten()]] = True
    buffer.assert_only(written.view(out.shape))
    assert_stored_once(memory, counter, (out, written.view(out.shape)))
    expected = reference.grouped_gemm_blockscale(a, b, num_tokens, expert_start, out_dtype=torch.float32).view(-1, columns)
    # rows that are wrong are so by far: rounding to bfloat16 makes 1.66e-3
    for row in valid.flatten().nonzero().flatten().tolist():
        assert relative_error(out.view(-1, columns)[places[row]], expected[row]) < 4e-3, f"row {row}"


CONFIGS = pytest.mark.parametrize("config", [WIDE, NARROW], ids=["wide", "narrow"])
STARTS = pytest.mark.parametrize("starts", [False, True], ids=["padded", "ragged"])
PUSHED = pytest.mark.parametrize("push", [False, True], ids=["stored", "pushed"])


@CONFIGS
@PUSHED
@STARTS
def test_a_product_stores_each_valid_element_once_whatever_its_columns(stand_in, config, push, starts):
    """Multiples of 8 modulo a wide tile, all of them where rows go to addresses of their own: there masks may be left out."""
    random.seed(0)
    for residue in range(0, 256, 8 if push and not starts else 40):
        columns = residue + 256 * random.randint(residue == 0, 1)
        # a tile that is full, one of a few rows, which the other warpgroup's rows fill up or not, and none
        counts = random.sample([0, 1, random.randint(2, 63), 64, random.randint(65, 127), 128, random.randint(129, 140)], 2)
        check_product(stand_in, (2, 140, columns, 16 * random.randint(1, 12)), counts, config, push, starts=starts)


def test_a_product_that_pushes_stays_in_its_rows_at_gpt_oss_columns(stand_in):
    check_product(stand_in, (3, 200, 2880, 16), [200, 130, 1], NARROW, True)


@PUSHED
def test_counts_past_the_buffer_and_negative_ones_store_no_row_past_it(stand_in, push):
    for config in (WIDE, NARROW):
        check_product(stand_in, (4, 132, 72, 144), [132, 0, -3, 132] if push else [2**31 - 1, 0, -3, 133], config, push)


@PUSHED
def test_no_ragged_row_past_the_buffer_is_stored(stand_in, push):
    """Counts that reach past R: of an expert that begins inside it, and of ones that begin at its end."""
    for config in (WIDE, NARROW):
        for counts, cut in (([70, 200, 9, 2**31 - 1], 160), ([0, 200, -5], 144), ([5, 0, 130, 20], 176)):
            check_product(stand_in, (len(counts), 200, 72, 144), counts, config, push, starts=True, cut=cut)


def test_more_experts_than_the_tma_warp_keeps_counts_of(stand_in):
    for starts in (False, True):
        counts = [random.Random(i).choice([0, 0, 0, 1, 17, 70]) for i in range(140)]
        check_product(stand_in, (140, 80, 64, 16), counts, NARROW, False, starts=starts)


@PUSHED
@STARTS
def test_float8_operands_and_single_programs_store_the_same_places(stand_in, push, starts):
    for config in (WIDE, NARROW):
        settings = {"dtype": torch.float8_e4m3fn, "num_sms": 1, "starts": starts}
        check_product(stand_in, (2, 140, 328, 144), [140, 65], config, push, **settings)


@STARTS
def test_float32_and_float16_rows_store_the_same_places(stand_in, starts):
    for columns in (8, 64, 136, 192, 256):
        check_product(stand_in, (2, 140, columns, 144), [140, 63], FLOAT32, False, out_dtype=torch.float32, starts=starts)
        check_product(stand_in, (2, 140, columns, 144), [140, 63], WIDE, False, out_dtype=torch.float16, starts=starts)


@pytest.mark.parametrize("inner", [128, 384])
@STARTS
def test_gemm_1_stores_each_valid_value_and_scale_once(stand_in, inner, starts):
    memory, counter = stand_in
    experts, rows, hidden, groups = 4, 140, 144, inner // 128
    for counts in ([140, 1, 0, 65], [64, 128, 63, 200], [0, 0, 0, 7]):
        memory.stored.clear()
        memory.tensors.clear()
        a, w13 = operands(experts, rows, 2 * inner, hidden, torch.float8_e4m3fn, segments=2)
        num_tokens, expert_start = torch.tensor(counts, dtype=torch.int32), None
        valid = torch.arange(rows) < num_tokens[:, None]
        if starts:
            layout = ragged([min(count, rows) for count in counts])
            num_tokens = layout.num_tokens
            a, expert_start, valid = layout.operand(a), layout.expert_start, layout.mask()
        *there, last = valid.shape
        values = Guarded(*there, last, inner, dtype=torch.float8_e4m3fn)
        scales = Guarded(*there, groups, round_up(last, 16), dtype=torch.float32)
        scales_view = scales.tensor[..., :last].mT
        given = a.values, a.scales, w13.values, w13.scales
        assert takes_gemm1_swiglu(*given, values.tensor, scales_view)
        arithmetic = {"max_value": 448.0, "eps": 1e-10, "power_of_two": False, "reciprocal": False, "num_sms": 2}
        gemm1_swiglu_hopper(*given, num_tokens, expert_start, values.tensor, scales_view, **arithmetic)
        value_mask = valid[..., None].expand(values.tensor.shape)
        scale_mask = torch.zeros(scales.tensor.shape, dtype=torch.bool)
        scale_mask[..., :last] = valid[..., None, :]
        values.assert_only(value_mask)
        scales.assert_only(scale_mask)
        assert_stored_once(memory, counter, (values.tensor, value_mask), (scales.tensor, scale_mask))
        gate_up = reference.grouped_gemm_blockscale(a, w13, num_tokens, expert_start)
        expected = reference.silu_mul_quantize(gate_up, num_tokens, expert_start)
        for place in reference.expert_places(values.tensor, num_tokens, expert_start):
            result = values.tensor[place], scales_view[place]
            assert_nearly_quantized(result, (expected.values[place], expected.scales[place]))


@pytest.mark.parametrize(
    ("config", "dtype", "shapes"),
    [
        (WIDE, torch.bfloat16, [(1, 8), (130, 264), (64, 128), (193, 520)]),
        (NARROW, torch.float16, [(3, 136), (128, 384), (300, 72)]),
        (FLOAT32, torch.float32, [(70, 4), (200, 260)]),
    ],
    ids=["wide", "narrow", "float32"],
)
def test_a_weight_gradient_stores_each_element_once(stand_in, config, dtype, shapes):
    """Row tiles that end inside an expert, on its edge, and after less than a warpgroup's rows; experts without rows."""
    memory, counter = stand_in
    for number, (columns, depth) in enumerate(shapes):
        memory.stored.clear()
        memory.tensors.clear()
        counts = ([5, 0, 300], [128], [0, 0], [129, 256])[number]
        operands = columnwise_operands(counts, columns, depth)
        buffer = Guarded(len(counts), columns, depth, dtype=dtype)
        assert takes_weight_gradient(*operands, buffer.tensor)
        weight_gradient_hopper(*operands, buffer.tensor, config=config, num_sms=1 + number % 3)
        assert counter.tolist() == [0, 0]
        everything = torch.ones(buffer.tensor.shape, dtype=torch.bool)
        buffer.assert_only(everything)
        assert_stored_once(memory, counter, (buffer.tensor, everything))
        assert_near_gradient(buffer.tensor, exact_gradient(*operands, len(counts)), counts)
