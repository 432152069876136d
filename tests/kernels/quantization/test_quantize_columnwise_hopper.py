"""Rows quantized along the tokens by the kernel for Hopper: the reference's bits, on a CPU from its source (`tests/gluon_on_cpu.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import test_quantize_columnwise as plain
import torch
from test_quantize_columnwise import DTYPES, LAYOUTS, SCALES, batch, call_quantize_columnwise, check, narrowed
from torch import Tensor

from compile_case import BF16, E4M3, E5M2, INT8, cases
from gluon_names import Memory
from gluon_on_cpu import StandIn
from moequant import ops, quantize_expert_batch
from moequant.columnwise import empty_columnwise
from moequant.kernels.library import common
from moequant.kernels.library.arguments import Valid
from moequant.kernels.quantization import quantize_columnwise_hopper as hopper
from moequant.kernels.quantization.quantize_columnwise_hopper import quantize_columnwise_hopper, takes_columnwise
from moequant.ops import quantization


@pytest.fixture(autouse=True)
def of_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of the other kernel, of this one."""

    def quantize(x: Tensor, x_scales: Tensor | None, valid: Valid, values: Tensor, *made: Any, blocks: bool) -> None:
        assert valid.num_tokens is not None and takes_columnwise(x, x_scales, valid.num_tokens, values)
        quantize_columnwise_hopper(x, x_scales, valid, values, *made, blocks=blocks)

    monkeypatch.setattr(plain, "quantize_columnwise", quantize)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory()
    stand_in = StandIn(hopper.quantize_columnwise_hopper_kernel, memory)
    monkeypatch.setattr(hopper, "quantize_columnwise_hopper_kernel", stand_in)
    return memory


@LAYOUTS
@DTYPES
@SCALES
@pytest.mark.parametrize("columns", [256, 144, 16])
def test_tiles_are_those_of_the_reference_in_the_source(columns, blocks, dtype, layout, memory):
    x, placed = batch(layout, [9, 0, 128, 300, 0], columns, "cpu")
    check(*narrowed(x, placed, dtype), placed, blocks)
    # once each: values, a scale for each block or column of a block, and where the blocks end
    written = 128 * 7
    assert torch.cat(memory.stored).numel() == written * columns + 7 * (-(-columns // 128) if blocks else columns) + 5


@SCALES
@pytest.mark.parametrize(
    "counts", [[0, 0, 0], [1], [128, 256], [129, -5, 0, 127], [3] * 70], ids=["none", "one", "full", "odd", "many"]
)
def test_no_rows_full_blocks_and_many_experts_in_the_source(counts, blocks, memory):
    x, placed = batch("ragged", counts, 128, "cpu")
    check(*narrowed(x, placed, E4M3), placed, blocks)


@SCALES
def test_rows_past_the_buffer_and_blocks_without_room_are_left_out_in_the_source(blocks, memory):
    for counts, cut in (([140, 48, 20], 160), ([40, 2**31 - 1, 5], 48)):
        x, placed = batch("ragged", counts, 144, "cpu", cut=cut)
        check(*narrowed(x, placed, E4M3), placed, blocks)
    counts, starts = (torch.tensor(x, dtype=torch.int32) for x in ([256, 256, 256, 9], [0, 16, 32, 0]))
    for room in (4, 2):
        check(torch.randn(256, 144).bfloat16(), None, Valid(counts, starts), blocks, room=room)


@SCALES
def test_bad_groups_in_the_source(blocks, memory):
    x, placed = batch("ragged", [130, 3], 304, "cpu")
    x[5, 200], x[131 + 13, 7] = torch.inf, torch.nan
    q = quantize_expert_batch(x, *placed, recipe="ue8m0")
    check(q.values, q.scales, placed, blocks)
    check(x, None, placed, blocks)


def test_what_the_kernel_takes():
    def takes(dtype=BF16, columns=144, made=E4M3, experts=2, offset=0, stride=None):
        x, values = torch.zeros(32 * columns + offset, dtype=dtype)[offset:].view(32, columns), torch.zeros(columns, 384).to(made)
        x_scales = None if stride is None else torch.empty(1, 2).as_strided((1, 2), (stride, 1))
        return takes_columnwise(x, x_scales, torch.zeros(experts, dtype=torch.int32), values)

    assert takes() and takes(E4M3, stride=2) and takes(experts=256)
    refused = [
        takes(dtype=INT8),
        takes(dtype=E5M2),
        takes(dtype=torch.float16),
        takes(made=E5M2),
        takes(columns=136),
        takes(experts=0),
        takes(experts=257),
        takes(offset=4),
        takes(E4M3, stride=2**24),
    ]
    assert not any(refused)


@pytest.mark.parametrize("runs", [True, False])
def test_the_operation_chooses_it_where_gluon_runs(runs, memory, monkeypatch):
    monkeypatch.setattr(common, "why_no_gluon", lambda device: None if runs else "another GPU")
    monkeypatch.setattr(quantization, "uses_kernels", lambda x: True)
    called = []
    monkeypatch.setattr(hopper, "quantize_columnwise_hopper", lambda *given, **settings: called.append(settings))
    x, placed = batch("padded", [9, 3], 144, "cpu")
    assert placed.num_tokens is not None
    for columns in (144, 140):
        made = empty_columnwise(columns, x.shape[:-1].numel(), 2, blocks=True, device="cpu")
        ops.quantize_columnwise(x[..., :columns].contiguous(), None, placed.num_tokens, None, *made, "ue8m0", True)
    assert called == [{"blocks": True}] * runs


def needs_hopper() -> None:
    reason = common.why_no_gluon(torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.gpu
@LAYOUTS
@DTYPES
@SCALES
@pytest.mark.parametrize("seed", range(6))
def test_random_batches_match_the_reference_on_hopper(seed, blocks, dtype, layout):
    needs_hopper()
    torch.manual_seed(seed)
    counts = torch.randint(-50, 600, (int(torch.randint(1, 40, ())),)).tolist()
    columns = int(torch.randint(1, 200, ())) * (128 if seed % 2 else 16)
    x, placed = batch(layout, counts, columns, "cuda")
    check(*narrowed(x, placed, dtype), placed, blocks)


@pytest.mark.gpu
@SCALES
def test_bad_groups_and_scales_of_any_strides_on_hopper(blocks):
    needs_hopper()
    x, placed = batch("ragged", [130, 3], 304, "cuda")
    x[5, 200], x[131 + 13, 7] = torch.inf, torch.nan
    check(x, None, placed, blocks)
    q = quantize_expert_batch(x, *placed, recipe="ue8m0")
    for scales in (q.scales, q.scales.contiguous(), q.scales.repeat_interleave(2, 1)[:, ::2]):
        check(q.values, scales, placed, blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=str)
def test_offsets_past_2_to_the_31_on_hopper(dtype):
    needs_hopper()
    plain.test_offsets_past_2_to_the_31(dtype, "cuda")


CASES = [
    *({"dtype": dtype, "blocks": blocks} for dtype in (E4M3, BF16) for blocks in (False, True)),
    {"dtype": E4M3, "layout": "ragged"},
    {"dtype": E4M3, "columns": 1440},
]
COMPILE_CASES = cases(call_quantize_columnwise, *CASES, hopper=True, wide=False)
