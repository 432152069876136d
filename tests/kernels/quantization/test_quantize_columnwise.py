"""Rows quantized along the tokens: the reference's bits, zeros behind an expert's rows, and nothing else touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compile_case import BF16, E4M3, E5M2, INT8, cases, ragged as ragged_rows
from far_memory import far
from guarded import Guarded
from moequant import dequantize, ops, quantize_expert_batch, reference
from moequant.batch import QuantizedTensor, ceil_div
from moequant.columnwise import Columnwise, empty_columnwise, most_blocks
from moequant.kernels.library.arguments import Valid
from moequant.kernels.quantization.quantize_columnwise import quantize_columnwise
from moequant.reference.quantization import counted_rows
from moequant.testing import assert_bit_equal
from operation_case import COUNTS
from ragged_rows import ragged

LAYOUTS = pytest.mark.parametrize("layout", ["padded", "ragged"])
SCALES = pytest.mark.parametrize("blocks", [False, True], ids=["rows", "blocks"])
DTYPES = pytest.mark.parametrize("dtype", [E4M3, BF16], ids=str)


def quantize(x: Tensor, x_scales: Tensor | None, placed: Valid, made: Columnwise, blocks: bool) -> None:
    spec = ops.quant_spec(made.values.dtype, "ue8m0")
    quantize_columnwise(x, x_scales, placed, *made, spec, blocks=blocks)


class Outputs:
    """Memory of an operand between guards. No more room than is needed, and rows of scales that begin at any number."""

    def __init__(self, columns: int, room: int, experts: int, blocks: bool, dtype: torch.dtype, device: str) -> None:
        self.columns, self.blocks = columns, blocks
        self.values = Guarded(columns, 128 * room, dtype=dtype, device=device)
        shape = (ceil_div(columns, 128), room) if blocks else (room, columns + 3)
        self.scales = Guarded(*shape, dtype=torch.float32, device=device)
        self.block_ends = Guarded(experts, dtype=torch.int32, device=device)

    @property
    def operand(self) -> Columnwise:
        scales = self.scales.tensor if self.blocks else self.scales.tensor[:, : self.columns]
        return Columnwise(self.values.tensor, scales, self.block_ends.tensor)

    def assert_only(self, written: int) -> None:
        """Nothing behind the blocks that are there was written."""
        for dim, part, size in ((1, self.values, 128 * written), (int(self.blocks), self.scales, written)):
            mask = torch.zeros(part.tensor.shape, dtype=torch.bool, device=part.tensor.device)
            mask.narrow(dim, 0, size)[...] = True
            if part is self.scales and not self.blocks:
                mask[:, self.columns :] = False
            part.assert_only(mask)
        self.block_ends.assert_only()


def batch(layout: str, counts: list[int], columns: int, device: str, cut: int | None = None) -> tuple[Tensor, Valid]:
    """Rows in bfloat16 of several sizes, NaN where there is none, and how many each expert has from where on."""
    rows = ragged(counts, device, spare=0 if cut else 20, cut=cut)
    x = torch.randn(len(counts), max([*rows.valid, 0]) + 5, columns) * torch.randint(-20, 3, (columns,)).exp2()
    if layout == "ragged":
        return rows.pack(x.bfloat16().to(device)), Valid(rows.num_tokens, rows.expert_start)
    x[~counted_rows(torch.tensor(counts), x)] = torch.nan
    return x.bfloat16().to(device), Valid(rows.num_tokens, None)


def narrowed(x: Tensor, placed: Valid, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Rows as they are, or narrow, with NaN in all that are no expert's."""
    if dtype == BF16:
        return x, None
    values = torch.full(x.shape, -1, dtype=torch.int8, device=x.device).view(dtype)
    scales = torch.full((*x.shape[:-1], ceil_div(x.shape[-1], 128)), torch.nan, device=x.device)
    q = quantize_expert_batch(x, *placed, dtype=dtype, recipe="ue8m0", values=values, scales=scales)
    return q.values, q.scales


def check(
    x: Tensor, x_scales: Tensor | None, placed: Valid, blocks: bool, dtype: torch.dtype = E4M3, room: int | None = None
) -> Columnwise:
    assert placed.num_tokens is not None
    experts, rows, columns = len(placed.num_tokens), x.shape[:-1].numel(), x.shape[-1]
    room, device = most_blocks(rows, experts) if room is None else room, str(x.device)
    made, expected = (Outputs(columns, room, experts, blocks, dtype, device) for _ in range(2))
    quantize(x, x_scales, placed, made.operand, blocks)
    counts = placed.num_tokens, placed.expert_start
    reference.quantize_columnwise(x, x_scales, *counts, *expected.operand, "ue8m0", blocks)
    written = int(expected.block_ends.tensor[-1]) if experts else 0
    for out in (made, expected):
        out.assert_only(written)
    for name in ("values", "scales", "block_ends"):
        assert_bit_equal(getattr(made, name).tensor, getattr(expected, name).tensor, name)
    return made.operand


@LAYOUTS
@DTYPES
@SCALES
@pytest.mark.parametrize("columns", [256, 130, 7])
def test_blocks_are_those_of_the_reference(columns, blocks, dtype, layout, device):
    x, placed = batch(layout, [9, 0, 128, 300, 0], columns, device)
    check(*narrowed(x, placed, dtype), placed, blocks)


@LAYOUTS
@SCALES
@pytest.mark.parametrize("counts", [[], [0, 0, 0], [1], [128, 256], [129, -5, 0, 127]], ids=str)
def test_no_rows_and_full_blocks(counts, blocks, layout, device):
    x, placed = batch(layout, counts, 128, device)
    check(*narrowed(x, placed, E4M3), placed, blocks)


@SCALES
def test_no_row_past_the_buffer_counts(blocks, device):
    for counts, cut in (([140, 48, 20], 160), ([40, 2**31 - 1, 5], 48)):
        x, placed = batch("ragged", counts, 140, device, cut=cut)
        check(*narrowed(x, placed, E4M3), placed, blocks)
    x, placed = batch("padded", [3, 130], 140, device)
    more = Valid(torch.tensor([2**31 - 1, 136], dtype=torch.int32, device=device), None)
    check(x.nan_to_num(1.0), None, more, blocks)


@SCALES
def test_blocks_that_have_no_room_are_left_out(blocks, device):
    counts, starts = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([256, 256, 256, 9], [0, 16, 32, 0]))
    x = torch.randn(256, 130).bfloat16().to(device)
    for room in (4, 3, 2):
        check(x, None, Valid(counts, starts), blocks, room=room)


@pytest.mark.parametrize("dtypes", [(INT8, INT8), (BF16, E5M2), (E4M3, INT8)], ids=str)
@SCALES
def test_formats_that_the_kernels_read(blocks, dtypes, device):
    x, placed = batch("padded", [9, 0, 140], 130, device)
    check(*narrowed(x, placed, dtypes[0]), placed, blocks, dtypes[1])


@SCALES
def test_scales_of_any_strides_and_bad_groups(blocks, device):
    x, placed = batch("ragged", [130, 3], 300, device)
    x[5, 200], x[131 + 13, 7] = torch.inf, torch.nan
    q = quantize_expert_batch(x, *placed, recipe="ue8m0")
    assert q.scales.stride(0) == 1 and q.scales[5, 1].isnan()
    made = check(q.values, q.scales, placed, blocks)
    # a bad group's numbers are all unknown
    bad = made.scales[:, 0] if blocks else made.scales[0, ::128]
    assert bad.isnan().tolist() == [False, True, False]


@SCALES
def test_narrow_rows_of_similar_scales_keep_their_numbers(blocks, device):
    """Fp8 times powers of two: scales of columns move the exponents alone."""
    counts = torch.tensor([200, 0, 60], dtype=torch.int32, device=device)
    magnitudes = (torch.rand(3, 200, 260) * 440 + 8).to(E4M3).float()
    values = (magnitudes * torch.randint(0, 2, magnitudes.shape).mul(2).sub(1)).to(E4M3).to(device)
    scales = torch.randint(-3, 4, (3, 200, 3)).float().exp2().to(device)
    wide = dequantize(QuantizedTensor(values, scales, "row", recipe="ue8m0"))
    made = check(values, scales, Valid(counts, None), blocks)
    made_scales = made.scales.repeat_interleave(128, 0)[:260] if blocks else made.scales.mT
    again = made.values.float() * made_scales.repeat_interleave(128, 1)
    assert_bit_equal(again[:, :200], wide[0].mT)
    assert_bit_equal(again[:, 384:444], wide[2, :60].mT)
    assert made.block_ends.tolist() == [2, 3, 4] and not again[:, 200:384].any()


@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=str)
def test_offsets_past_2_to_the_31(dtype, device):
    columns, room = 256, 2**17 - 1
    x = far((2**23 + 16, columns), (columns, 1), dtype, device)
    x[-16:] = torch.randn(16, columns).to(dtype)
    scales = None if dtype == BF16 else far((2**23 + 16, 2), (257, 1), torch.float32, device)
    if scales is not None:
        scales[-16:] = 0.5
    values = far((columns, 128 * room), (128 * room, 1), E4M3, device)
    made = Columnwise(values, torch.empty(room, columns, device=device), torch.empty(1, dtype=torch.int32, device=device))
    count, start = (torch.tensor([number], dtype=torch.int32, device=device) for number in (9, 2**23 + 7))
    quantize(x, scales, Valid(count, start), made, False)
    expected = empty_columnwise(columns, 9, 1, blocks=False, device=device)
    narrow = x[-9:].contiguous(), None if scales is None else scales[-9:]
    reference.quantize_columnwise(*narrow, count, count - 9, *expected)
    assert_bit_equal(made.values[:, :128].contiguous(), expected.values)
    assert_bit_equal(made.scales[:1], expected.scales)


@pytest.mark.gpu
@LAYOUTS
@DTYPES
@SCALES
@pytest.mark.parametrize("seed", range(4))
def test_random_batches_match_the_reference_on_the_gpu(seed, blocks, dtype, layout):
    torch.manual_seed(seed)
    counts = torch.randint(0, 600, (int(torch.randint(1, 40, ())),)).tolist()
    columns = int(torch.randint(1, 200, ())) * 16 + seed % 2
    x, placed = batch(layout, counts, columns, "cuda")
    check(*narrowed(x, placed, dtype), placed, blocks)


def call_quantize_columnwise(
    dtype: torch.dtype, made: torch.dtype = E4M3, columns: int = 7168, layout: str = "padded", blocks: bool = False
) -> None:
    x, x_scales = ragged_rows(4, 256, columns, dtype)
    counts, starts = torch.zeros(4, dtype=torch.int32), None
    if layout == "padded":
        x, x_scales = x.unflatten(0, (4, 256)), None if x_scales is None else x_scales.unflatten(0, (4, 256))
    else:
        starts = counts
    operand = empty_columnwise(columns, 1024, 4, blocks=blocks, device="cpu", dtype=made)
    ops.quantize_columnwise(x, x_scales, counts, starts, *operand, "ue8m0", blocks)


WIDE = [
    *({"dtype": dtype, "made": E4M3, "blocks": blocks} for dtype in (E4M3, BF16) for blocks in (False, True)),
    {"dtype": E4M3, "made": E4M3, "layout": "ragged"},
    *({"dtype": dtype, "made": E4M3, "columns": 1440, "blocks": dtype == BF16} for dtype in (E4M3, BF16)),
    *({"dtype": INT8, "made": INT8, "blocks": blocks} for blocks in (False, True)),
]
# rows that are read number by number
NARROW = [{"dtype": BF16, "made": E4M3, "columns": 1445}, {"dtype": INT8, "made": INT8, "columns": 1445}]
COMPILE_CASES = [
    *cases(call_quantize_columnwise, *WIDE, nvidia=True),
    *cases(call_quantize_columnwise, *NARROW, nvidia=True, wide=False, may_spill=True),
]


def arguments(dtype: torch.dtype, blocks: bool) -> tuple:
    x, scales = torch.ones(2, 4, 140).to(dtype), None if dtype == BF16 else torch.ones(2, 4, 2)
    made = empty_columnwise(140, 8, 2, blocks=blocks, device="cpu", dtype=INT8 if dtype == INT8 else E4M3)
    for out in made:
        out.view(torch.int8).zero_()
    return x, scales, COUNTS, None, *made, "ue8m0", blocks


OPERATION_CASES = {
    "quantize_columnwise": {
        "fp8": lambda: arguments(E4M3, False),
        "int8": lambda: arguments(INT8, True),
        "bfloat16": lambda: arguments(BF16, True),
    }
}
