"""Transposed weights quantized by the kernel for Hopper: the reference's bits, on a CPU from its source (`tests/gluon_on_cpu.py`)."""

from __future__ import annotations

import pytest
import test_quantize_weight as plain
import torch
from test_quantize_weight import assert_same
from torch import Tensor

from compile_case import BF16, E4M3, E5M2, INT8, cases, empty
from gluon_names import Memory
from gluon_on_cpu import StandIn
from moequant import ops
from moequant.batch import ceil_div
from moequant.formats import RECIPES
from moequant.kernels.library import common
from moequant.kernels.library.arguments import QuantSpec
from moequant.kernels.quantization import quantize_weight_hopper as hopper
from moequant.kernels.quantization.quantize_weight_hopper import quantize_weight_hopper, takes_quantize_weight
from moequant.ops import quantization


@pytest.fixture(autouse=True)
def of_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of the other kernel, of this one."""

    def quantize(w: Tensor, values: Tensor, scales: Tensor, spec: QuantSpec, *, segments: int, block_size: int) -> None:
        assert takes_quantize_weight(w, values, segments, block_size)
        quantize_weight_hopper(w, values, scales, spec, segments=segments, block_size=block_size)

    monkeypatch.setattr(plain, "quantize_weight", quantize)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory()
    monkeypatch.setattr(hopper, "quantize_weight_hopper_kernel", StandIn(hopper.quantize_weight_hopper_kernel, memory))
    return memory


def weights(experts: int, rows: int, columns: int, dtype: torch.dtype = BF16, device: str = "cpu") -> Tensor:
    """(E, N, K_dim) whose rows have stride 1, of several sizes."""
    return (torch.randn(experts, columns, rows) * torch.randn(experts, columns, 1).exp()).to(device, dtype).mT


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_blocks_are_those_of_the_reference_in_the_source(recipe, memory):
    w = weights(2, 2 * 144, 144)
    w[1, 150, 3] = torch.nan
    assert_same(w, E4M3, recipe, 2)
    # once each: values and scales
    assert torch.cat(memory.stored).numel() == w.numel() + 2 * 4 * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_even_blocks_of_wider_types_and_strides_in_the_source(dtype, memory):
    assert_same(weights(3, 256, 128, dtype)[::2], E4M3)
    assert_same(weights(1, 256, 256, dtype)[:, 128:], E4M3, "ue8m0")


def test_what_the_kernel_takes():
    def takes(w: Tensor, made=E4M3, segments=1, block_size=128):
        return takes_quantize_weight(w, empty(*w.shape, dtype=made), segments, block_size)

    w = weights(2, 96, 144)
    assert takes(w) and takes(w, segments=3) and takes(w.float()) and takes(w[:, :48]) and takes(w[1:])
    refused = [
        takes(w.contiguous()),
        takes(w.double()),
        takes(w, made=INT8),
        takes(w, made=E5M2),
        takes(w, segments=4),
        takes(w, block_size=64),
        takes(w[:, 1:]),
        takes(w[:, :, :136]),
        takes(weights(2, 96, 144)[:, ::2]),
        takes(weights(2, 72, 144)[:, :64]),
        takes(w[:0]),
    ]
    assert refused == [False] * 11


@pytest.mark.parametrize("runs", [True, False])
def test_the_operation_chooses_it_where_gluon_runs(runs, memory, monkeypatch):
    monkeypatch.setattr(common, "why_no_gluon", lambda device: None if runs else "another GPU")
    monkeypatch.setattr(quantization, "uses_kernels", lambda x: True)
    called = []
    monkeypatch.setattr(hopper, "quantize_weight_hopper", lambda *given, **settings: called.append(settings))
    for w in (weights(1, 96, 144), weights(1, 96, 144).contiguous()):
        ops.quantize_weight(w, torch.empty(1, 96, 144, dtype=E4M3), torch.empty(1, 1, 2), "default", 1, 128)
    assert called == [{"segments": 1, "block_size": 128}] * runs


def needs_hopper() -> None:
    reason = common.why_no_gluon(torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_random_weights_match_the_reference_on_hopper(seed, dtype, recipe):
    needs_hopper()
    torch.manual_seed(seed)
    experts, segments = int(torch.randint(1, 9, ())), int(torch.randint(1, 4, ()))
    step = 128 if seed == 1 else 16
    rows, columns = (step * int(torch.randint(1, 600 // step, ())) for _ in range(2))
    w = weights(experts, segments * rows, columns, dtype, "cuda")
    for row in range(0, segments * rows, 97):
        w[row % experts, row, row % columns] = (torch.nan, torch.inf, -torch.inf, 0.0)[row % 4]
    assert_same(w, E4M3, recipe, segments)
    # strides of a matrix that has more rows and columns, every other one
    w = weights(2 * experts, segments * rows + 64, columns + 32, dtype, "cuda")[1::2, 64:, 16:-16]
    assert_same(w, E4M3, recipe, segments)


@pytest.mark.gpu
def test_large_weights_match_the_reference_on_hopper():
    needs_hopper()
    assert_same(weights(2, 4096, 7168, device="cuda"), E4M3, "ue8m0", 2)
    assert_same(weights(1, 7168, 300_032, device="cuda"), E4M3)


def call_quantize_weight_turned(
    dtype: torch.dtype, wide: torch.dtype = BF16, recipe: str = "default", segments: int = 1, columns: int = 7168
) -> None:
    w, scales = empty(4, columns, 4096, dtype=wide).mT, empty(4, 32, ceil_div(columns, 128), dtype=torch.float32)
    ops.quantize_weight(w, empty(4, 4096, columns, dtype=dtype), scales, recipe, segments, 128)


CASES = [
    {"dtype": E4M3},
    {"dtype": E4M3, "recipe": "ue8m0", "segments": 2},
    {"dtype": E4M3, "recipe": "deepgemm"},
    {"dtype": E4M3, "wide": torch.float32},
    {"dtype": E4M3, "columns": 2880},
]
COMPILE_CASES = cases(call_quantize_weight_turned, *CASES, hopper=True, wide=False)
