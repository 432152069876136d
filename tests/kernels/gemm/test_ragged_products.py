"""Ragged rows give the bits of padded ones, kernel by kernel: rows at their places and at addresses of their own, GEMM 1 with SwiGLU.

Operands have NaN in the rows that are no expert's, outputs have guards around them, and nothing else is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from guarded import Guarded
from moequant import reference
from moequant.batch import QuantizedTensor, empty_scales_of
from moequant.config import ROW_ALIGNMENT, round_up
from moequant.formats import FORMATS, RECIPES
from moequant.kernels.gemm.grouped_gemm import LARGE_TILES, SHORT, SMALL_TILES, Config, grouped_gemm_blockscale
from moequant.kernels.library import common
from moequant.testing import assert_bit_equal
from ragged_rows import Ragged, ragged

Operands = tuple[QuantizedTensor, QuantizedTensor]
Kernel = Callable[..., None]
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def hopper_test(function: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")(function))


def operands(
    counts: list[int], columns: int, depth: int, device: str, dtype: torch.dtype = torch.float8_e4m3fn, segments: int = 1
) -> Operands:
    """Padded ones whose neighbouring rows and blocks have scales far apart."""
    # as TMA reads scales
    most = max(ROW_ALIGNMENT, round_up(max(counts), ROW_ALIGNMENT))
    x = torch.randn(len(counts), most, depth, device=device) * torch.randint(-3, 4, (len(counts), most, 1), device=device).exp2()
    w = torch.randn(len(counts), columns, depth, device=device) / depth**0.5
    w *= torch.exp2(torch.arange(columns, device=device) // 32 % 5)[:, None]
    a = reference.quantize_expert_batch(x.bfloat16(), dtype=dtype)
    return a, reference.quantize_weight(w.bfloat16(), dtype=dtype, segments=segments)


def bare(x: QuantizedTensor) -> tuple[Tensor, Tensor]:
    return x.values, x.scales


def check(
    kernel: Kernel,
    counts: list[int],
    columns: int,
    depth: int,
    device: str,
    out_dtype: torch.dtype = torch.bfloat16,
    **settings: Any,
) -> None:
    """Stored and, in bfloat16, pushed rows against the same kernel's padded ones."""
    dtype = settings.pop("dtype", torch.float8_e4m3fn)
    a, b = operands(counts, columns, depth, device, dtype)
    rows = ragged(counts, device, spare=settings.pop("spare", 0 if any(counts) else 16))
    expected = torch.empty(*a.shape[:2], columns, dtype=out_dtype, device=device)
    kernel(*bare(a), *bare(b), rows.num_tokens, None, expected, **settings)
    packed, out, mask = rows.operand(a), Guarded(rows.rows, columns, dtype=out_dtype, device=device), rows.mask()
    assert isinstance(packed, QuantizedTensor)
    given = *bare(packed), *bare(b), rows.num_tokens, rows.expert_start
    kernel(*given, out.tensor, **settings)
    out.assert_only(mask.unsqueeze(1), "the product")
    assert_bit_equal(out.tensor[mask], valid(rows, expected))
    if out_dtype != torch.bfloat16:
        return
    pushed, places = Guarded(rows.rows, columns, dtype=out_dtype, device=device), torch.randperm(rows.rows, device=device)
    # nothing that is no expert's row is an address
    destinations = torch.where(mask, pushed.tensor.data_ptr() + places * (2 * columns), 8)
    kernel(*given, None, destinations=destinations, **settings)
    written = torch.zeros(rows.rows, dtype=torch.bool, device=device)
    written[places[mask]] = True
    pushed.assert_only(written.unsqueeze(1), "the pushed product")
    assert_bit_equal(pushed.tensor[places[mask]], out.tensor[mask])


def valid(rows: Ragged, padded: Tensor) -> Tensor:
    """The experts' rows, one behind the other."""
    return torch.cat([padded[expert, :count] for expert, (_, count) in enumerate(rows.spans())])


# in tiles of 64 and 128 rows: parts of one, whole ones, one that ends in the next expert's rows, and none
COUNTS = [70, 0, 16, 129, 64, 1]
CONFIGS = {
    "tma": SMALL_TILES,
    "pointers": SMALL_TILES._replace(tma=False),
    "flattened": SHORT,
    "large tiles": LARGE_TILES,
    "narrow": SMALL_TILES._replace(block_n=32),
    "parts": SMALL_TILES._replace(parts=3),
}


@pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in CONFIGS.items()])
def test_the_plain_kernel_gives_ragged_rows_the_bits_of_padded_ones(config: Config, device: str) -> None:
    check(grouped_gemm_blockscale, COUNTS, 136, 400, device, dtype=torch.int8, config=config)
    check(grouped_gemm_blockscale, [0, 3, 0], 200, 256, device, torch.float32, dtype=torch.int8, config=config, spare=48)


def test_programs_that_share_a_tile_leave_every_other_row(device: str) -> None:
    """Experts of which only the first have rows, more experts than a power of two, and a buffer that ends with the last row."""
    config = SMALL_TILES._replace(parts=2)
    for counts in ([5, 0, 0], [0, 0, 16], [3, 20, 1, 0, 7]):
        check(grouped_gemm_blockscale, counts, 72, 256, device, dtype=torch.int8, config=config)


def test_a_problem_of_ragged_rows_is_chosen_for_as_padded_ones_of_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    from moequant import ops
    from moequant.kernels.library import hopper

    asked = []
    monkeypatch.setattr(common, "runs_gluon", lambda device: True)
    monkeypatch.setattr(hopper, "too_small", lambda *sizes: asked.append(sizes[:4]) or True)
    b = torch.empty(3, 40, 64).bfloat16()
    for a in (torch.empty(100, 64).bfloat16(), torch.empty(3, 34, 64).bfloat16()):
        ops.gemm_kernel(a, None, b, None, None)
    assert asked == [(3, 34, 40, 34)] * 2


def hopper_kernel(*operands: Any, **settings: Any) -> None:
    from moequant.kernels.gemm.grouped_gemm_hopper import grouped_gemm_blockscale_hopper
    from moequant.kernels.library.hopper import supports

    a, a_scales, b, b_scales, _, _, out = operands
    assert supports(a, a_scales, b, b_scales, out)
    grouped_gemm_blockscale_hopper(*operands, **settings)


HOPPER_COUNTS = [
    pytest.param([300, 0, 1, 129, 64], id="mixed"),
    pytest.param([0, 0, 0], id="no-rows"),
    pytest.param([0, 520, 0], id="one-hot-expert"),
    pytest.param([16] * 40, id="tiles-of-few-rows"),
    pytest.param([(37 * i) % 140 for i in range(250)], id="many-experts"),
    pytest.param([1], id="one-row"),
]


@hopper_test
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
@pytest.mark.parametrize("counts", HOPPER_COUNTS)
@pytest.mark.parametrize(("columns", "depth"), [(512, 384), (264, 128), (320, 336), (1024, 2048)], ids=str)
def test_hopper_gives_ragged_rows_the_bits_of_padded_ones(columns: int, depth: int, counts: list[int], wide: bool) -> None:
    from moequant.kernels.gemm.grouped_gemm_hopper import NARROW, WIDE

    config = WIDE if wide else NARROW
    for num_sms in (None, 3):
        check(hopper_kernel, counts, columns, depth, "cuda", config=config, num_sms=num_sms)


@hopper_test
def test_hopper_in_other_types_too() -> None:
    from moequant.kernels.gemm.grouped_gemm_hopper import FLOAT32, WIDE

    check(hopper_kernel, [300, 0, 1, 129, 64], 328, 400, "cuda", torch.float32, config=FLOAT32, spare=16)
    check(hopper_kernel, [300, 0, 1, 129, 64], 328, 400, "cuda", torch.float16, config=WIDE, spare=160)
    check(hopper_kernel, [300, 0, 1, 129, 64], 328, 400, "cuda", dtype=torch.int8, config=WIDE)


@hopper_test
def test_plain_float8_rows_on_the_gpu() -> None:
    for config in CONFIGS.values():
        check(grouped_gemm_blockscale, [300, 0, 1, 129, 64], 328, 400, "cuda", config=config)


@hopper_test
@pytest.mark.parametrize("inner", [256, 768])
@pytest.mark.parametrize("counts", HOPPER_COUNTS)
@pytest.mark.parametrize("recipe", ["default", "ue8m0"])
def test_gemm_1_with_swiglu_gives_ragged_rows_the_bits_of_padded_ones(recipe: str, counts: list[int], inner: int) -> None:
    from moequant.kernels.gemm.gemm1_swiglu_hopper import gemm1_swiglu_hopper, supports_gemm1_swiglu

    a, w13 = operands(counts, 2 * inner, 640, "cuda", segments=2)
    rows, named = ragged(counts, "cuda", spare=32), RECIPES[recipe]
    settings = {"eps": named.eps, "power_of_two": named.power_of_two, "reciprocal": named.reciprocal}
    settings["max_value"] = FORMATS["fp8_e4m3fn"].max
    values = torch.empty(*a.shape[:2], inner, dtype=torch.float8_e4m3fn, device="cuda")
    scales = empty_scales_of(values.shape, 128, "cuda")
    gemm1_swiglu_hopper(*bare(a), *bare(w13), rows.num_tokens, None, values, scales, **settings)
    packed, mask = rows.operand(a), rows.mask()
    assert isinstance(packed, QuantizedTensor)
    out = Guarded(rows.rows, inner, dtype=torch.float8_e4m3fn, device="cuda")
    out_scales = Guarded(inner // 128, rows.rows, dtype=torch.float32, device="cuda")
    assert supports_gemm1_swiglu(*bare(packed), *bare(w13), out.tensor, out_scales.tensor.mT)
    for num_sms in (None, 7):
        given = *bare(packed), *bare(w13), rows.num_tokens, rows.expert_start
        gemm1_swiglu_hopper(*given, out.tensor, out_scales.tensor.mT, num_sms=num_sms, **settings)
        out.assert_only(mask.unsqueeze(1), "values")
        out_scales.assert_only(mask, "scales")
        bits = out.tensor.view(torch.uint8)[mask], valid(rows, values.view(torch.uint8))
        assert_bit_equal(*bits, "values")
        assert_bit_equal(out_scales.tensor.mT[mask], valid(rows, scales), "scales")


@hopper_test
def test_a_graph_replays_with_new_counts_and_new_starts() -> None:
    from moequant.kernels.gemm.grouped_gemm_hopper import grouped_gemm_blockscale_hopper

    a, b = operands([300] * 4, 512, 1024, "cuda")
    packed = reference.quantize_expert_batch(torch.randn(1200, 1024, device="cuda").bfloat16().view(1, 1200, 1024))
    values, scales = packed.values[0], packed.scales[0]
    counts, starts = (torch.zeros(4, dtype=torch.int32, device="cuda") for _ in range(2))
    out = torch.empty(1200, 512, dtype=torch.bfloat16, device="cuda")
    given = values, scales, *bare(b), counts, starts
    grouped_gemm_blockscale_hopper(*given, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grouped_gemm_blockscale_hopper(*given, out)
    for new in ([200, 13, 256, 130], [1, 0, 77, 300], [0, 0, 0, 1200], [2000, 7, 7, 7]):
        rows = ragged(new, "cuda", cut=1200)
        counts.copy_(rows.num_tokens)
        starts.copy_(rows.expert_start)
        out.fill_(torch.nan)
        graph.replay()
        expected = torch.full_like(out, torch.nan)
        grouped_gemm_blockscale_hopper(*given, expected)
        mask = rows.mask()
        assert_bit_equal(out, expected)
        assert out[mask].isfinite().all() and out[~mask].isnan().all()
