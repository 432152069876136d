"""Weights quantized by the kernel for Hopper, as they lie and transposed, and both in one pass: the reference's bits, on a CPU from its
source (`tests/gluon_on_cpu.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compile_case import BF16, E4M3, E5M2, INT8, cases, empty
from gluon_names import Memory
from gluon_on_cpu import StandIn
from guarded import Guarded
from moequant import ops, reference
from moequant.batch import ceil_div
from moequant.formats import RECIPES
from moequant.kernels.library import common
from moequant.kernels.quantization import quantize_weight_hopper as hopper
from moequant.kernels.quantization.quantize_weight_hopper import quantize_weight_hopper, takes_quantize_weight
from moequant.ops import quantization
from moequant.testing import assert_bit_equal

BOTH = pytest.mark.parametrize("both", [False, True], ids=["one way", "both ways"])


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory()
    monkeypatch.setattr(hopper, "quantize_weight_hopper_kernel", StandIn(hopper.quantize_weight_hopper_kernel, memory))
    return memory


def weights(experts: int, rows: int, columns: int, dtype: torch.dtype = BF16, device: str = "cpu") -> Tensor:
    """(E, N, K_dim) whose rows have stride 1, of several sizes."""
    return (torch.randn(experts, columns, rows) * torch.randn(experts, columns, 1).exp()).to(device, dtype).mT


def check(w: Tensor, recipe: str = "default", segments: int = 1, both: bool = False) -> None:
    """What the kernel makes of w (E, N, K_dim) against the reference's, and with both of its transpose too, between guard bytes."""

    def room(x: Tensor) -> tuple[Guarded, Guarded]:
        values, (experts, *sides) = Guarded(*x.shape, dtype=E4M3, device=w.device), x.shape
        return values, Guarded(experts, *(ceil_div(side, 128) for side in sides), dtype=torch.float32, device=w.device)

    made = [(room(w), reference.quantize_weight(w, recipe=recipe, segments=segments))]
    if both:
        made.append((room(w.mT), reference.quantize_weight(w.mT, recipe=recipe)))
    outputs = [(values.tensor, scales.tensor) for (values, scales), _ in made]
    assert takes_quantize_weight(w, outputs[0][0], segments, 128, outputs[-1][0])
    quantize_weight_hopper(w, *outputs[0], ops.quant_spec(E4M3, recipe), across=outputs[1] if both else None)
    for guarded, expected in made:
        for name, buffer in zip(("values", "scales"), guarded, strict=True):
            buffer.assert_only(name=name)
            assert_bit_equal(buffer.tensor, getattr(expected, name), name)


@BOTH
@pytest.mark.parametrize("turned", [False, True], ids=["columns side by side", "rows side by side"])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_blocks_are_those_of_the_reference_in_the_source(recipe, turned, both, memory):
    w = weights(2, 144, 272)
    w[1, 130, 3] = torch.nan
    check(w if turned else w.contiguous(), recipe, both=both)
    # once each: values and scales
    assert torch.cat(memory.stored).numel() == (1 + both) * (w.numel() + 2 * 2 * 3)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_even_blocks_of_wider_types_strides_and_segments_in_the_source(dtype, both, memory):
    check(weights(3, 256, 128, dtype)[::2], segments=2, both=both)
    check(weights(1, 256, 256, dtype)[:, 128:], "ue8m0", both=both)
    check(weights(1, 256, 256, dtype).mT[:, :, 128:], both=both)


def test_what_the_kernel_takes():
    def takes(w: Tensor, made=E4M3, segments=1, block_size=128):
        return takes_quantize_weight(w, empty(*w.shape, dtype=made), segments, block_size)

    w = weights(2, 96, 144)
    assert takes(w) and takes(w.contiguous()) and takes(w.float()) and takes(w[:, :48]) and takes(w[1:])
    assert takes(weights(2, 256, 144), segments=2) and takes(w.contiguous()[:, :, 16:])
    refused = [
        takes(w.double()),
        takes(w, made=INT8),
        takes(w, made=E5M2),
        # parts of blocks
        takes(w, segments=2),
        takes(weights(2, 384, 144), segments=2),
        takes(w, block_size=64),
        # rows, or columns, that are not moved 16 at a time
        takes(w[:, 1:]),
        takes(w.contiguous()[:, :, 1:]),
        takes(w[:, :, :136]),
        takes(w.contiguous()[:, :88]),
        # neither of them side by side
        takes(w[:, ::2]),
        takes(weights(2, 72, 144)[:, :64]),
        takes(w[:0]),
        takes_quantize_weight(w, empty(2, 96, 144, dtype=E4M3), 1, 128, torch.empty(2 * 144 * 96 + 8, dtype=E4M3)[8:]),
    ]
    assert refused == [False] * len(refused)


@pytest.mark.parametrize("runs", [True, False])
def test_the_operation_chooses_it_where_gluon_runs(runs, memory, monkeypatch):
    monkeypatch.setattr(common, "why_no_gluon", lambda device: None if runs else "another GPU")
    monkeypatch.setattr(quantization, "uses_kernels", lambda x: True)
    called: list[Any] = []
    monkeypatch.setattr(hopper, "quantize_weight_hopper", lambda *given, **settings: called.append(settings))
    across = torch.empty(1, 144, 96, dtype=E4M3), torch.empty(1, 2, 1)
    for w in (weights(1, 96, 144), weights(1, 96, 144).contiguous()):
        for more in ((), across):
            ops.quantize_weight(w, torch.empty(1, 96, 144, dtype=E4M3), torch.empty(1, 1, 2), "default", 1, 128, *more)
    assert called == [{"across": None}, {"across": across}] * (2 * runs)


def needs_hopper() -> None:
    reason = common.why_no_gluon(torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_random_weights_match_the_reference_on_hopper(seed, dtype, recipe, both):
    needs_hopper()
    torch.manual_seed(seed)
    experts, segments = int(torch.randint(1, 9, ())), (1, 3, 1)[seed]
    step = 128 if seed == 1 else 16
    rows, columns = (step * int(torch.randint(1, 600 // step, ())) for _ in range(2))
    w = weights(experts, segments * rows, columns, dtype, "cuda")
    for row in range(0, segments * rows, 97):
        w[row % experts, row, row % columns] = (torch.nan, torch.inf, -torch.inf, 0.0)[row % 4]
    check(w, recipe, segments, both)
    check(w.contiguous(), recipe, segments, both)
    # strides of a matrix that has more rows and columns, every other one
    w = weights(2 * experts, segments * rows + 64, columns + 32, dtype, "cuda")
    check(w[1::2, 64:, 16:-16], recipe, segments, both)
    check(w.contiguous()[1::2, 64:, 16:-16], recipe, segments, both)


@pytest.mark.gpu
@BOTH
def test_large_weights_match_the_reference_on_hopper(both):
    needs_hopper()
    check(weights(2, 4096, 7168, device="cuda"), "ue8m0", 2, both)
    check(weights(2, 4096, 7168, device="cuda").contiguous(), "ue8m0", 2, both)
    check(weights(1, 7168, 300_032, device="cuda"), both=both)


def call_quantize_weight_hopper(
    dtype: torch.dtype,
    wide: torch.dtype = BF16,
    recipe: str = "default",
    segments: int = 1,
    columns: int = 7168,
    turned: bool = False,
    both: bool = False,
) -> None:
    w = empty(4, columns, 4096, dtype=wide).mT if turned else empty(4, 4096, columns, dtype=wide)
    blocks = ceil_div(columns, 128)
    across = empty(4, columns, 4096, dtype=dtype), empty(4, blocks, 32, dtype=torch.float32)
    outputs = empty(4, 4096, columns, dtype=dtype), empty(4, 32, blocks, dtype=torch.float32)
    ops.quantize_weight(w, *outputs, recipe, segments, 128, *across if both else ())


CASES = [
    {"dtype": E4M3},
    {"dtype": E4M3, "turned": True},
    {"dtype": E4M3, "recipe": "ue8m0", "segments": 2, "both": True},
    {"dtype": E4M3, "recipe": "deepgemm", "turned": True, "both": True},
    {"dtype": E4M3, "wide": torch.float32, "both": True},
    {"dtype": E4M3, "columns": 2880, "both": True},
]
COMPILE_CASES = cases(call_quantize_weight_hopper, *CASES, hopper=True, wide=False)
