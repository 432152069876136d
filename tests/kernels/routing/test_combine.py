"""The weighted sum: the reference's bits, products rounded before they are added, absent entries skipped."""

from __future__ import annotations

import pytest
import torch

import compile_peers
from compile_case import BF16, cases, empty
from moequant import ops, reference
from moequant.testing import assert_bit_equal, poison
from operation_case import integers


def both(y, rows, weights, dtype):
    from moequant.kernels.routing.combine import combine

    outputs = [poison(torch.empty(rows.shape[0], y.shape[1], dtype=dtype, device=y.device)) for _ in range(2)]
    combine(y, rows, weights, outputs[0])
    reference.combine(y, rows, weights, outputs[1])
    assert_bit_equal(outputs[0], outputs[1])
    return outputs[0]


@pytest.mark.parametrize("top_k", [1, 2, 6, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_sum_matches_the_reference_bit_for_bit(top_k, dtype, device):
    y = torch.randn(50, 1300, dtype=torch.bfloat16).to(device)
    rows = torch.randint(-1, 50, (7, top_k), dtype=torch.int32, device=device)
    both(y, rows, torch.randn(7, top_k, device=device), dtype)


def test_bfloat16_weights_and_float16_rows(device):
    y = torch.randn(9, 100, dtype=torch.float16).to(device)
    rows = torch.randint(-1, 9, (5, 3), dtype=torch.int32, device=device)
    both(y, rows, torch.randn(5, 3, device=device).bfloat16(), torch.bfloat16)


def test_absent_entries_are_skipped_whatever_lies_around_them(device):
    y = torch.full((4, 64), float("nan"), dtype=torch.bfloat16, device=device)
    y[2] = 3.0
    rows = torch.tensor([[-1, 2, -1], [-1, -1, -1]], dtype=torch.int32, device=device)
    weights = torch.tensor([[float("inf"), 0.5, float("nan")]] * 2, device=device)
    out = both(y, rows, weights, torch.float32)
    assert out.tolist() == [[1.5] * 64, [0.0] * 64]


def test_no_tokens_and_no_rows(device):
    empty = torch.empty(0, 32, dtype=torch.bfloat16, device=device)
    both(empty, torch.empty(0, 2, dtype=torch.int32, device=device), torch.empty(0, 2, device=device), torch.bfloat16)
    both(empty, torch.full((3, 2), -1, dtype=torch.int32, device=device), torch.ones(3, 2, device=device), torch.bfloat16)


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_a_sum_without_weights_matches_the_reference(ranks, device):
    y = torch.randn(40, 1300, dtype=torch.bfloat16).to(device)
    both(y, torch.randint(-1, 40, (9, ranks), dtype=torch.int32, device=device), None, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("numbers", [[-(2.0**-30)], [2.0**17, -(2.0**17)], [2.0**17, -(2.0**17) + 512], [-(2.0**-30), 2.0**-31]])
def test_sums_of_bfloat16_are_float32_where_the_output_is_float16(numbers):
    y = torch.tensor(numbers, device="cuda").bfloat16().unsqueeze(1).repeat(1, 64)
    both(y, torch.arange(len(numbers), dtype=torch.int32, device="cuda").unsqueeze(0), None, torch.float16)


@pytest.mark.parametrize("top_k", [1, 6])
def test_a_ranks_sums_match_the_reference_and_leave_tokens_without_a_row(top_k, device):
    from moequant.kernels.routing.combine import presum

    y = torch.randn(20, 1300, dtype=torch.float16).to(device)
    rows = torch.randint(-1, 20, (12, top_k), dtype=torch.int32, device=device)
    rows[3] = rows[11] = -1
    weights = torch.randn(12, top_k, device=device)
    outputs = [torch.full((12, 1300), 7.0, dtype=torch.bfloat16, device=device) for _ in range(2)]
    presum(y, rows, weights, outputs[0])
    reference.presum(y, rows, weights, outputs[1])
    assert_bit_equal(outputs[0], outputs[1])
    assert (outputs[0][[3, 11]] == 7).all()


def test_the_product_is_rounded_before_the_addition(device):
    """1 + (1 + 2**-12)**2 with a fused multiply-add keeps the 2**-24, which two roundings lose."""
    value = 1 + 2.0**-7
    y = torch.full((2, 16), value, dtype=torch.bfloat16, device=device)
    weights = torch.tensor([[1.0, 1 + 2.0**-20]], device=device)
    out = both(y, torch.tensor([[0, 1]], dtype=torch.int32, device=device), weights, torch.float32)
    product = torch.tensor(1 + 2.0**-20) * torch.tensor(value)
    assert out[0, 0].item() == (torch.tensor(value) + product).item()


@pytest.mark.gpu
def test_model_sizes_match_the_reference_on_the_gpu():
    y = torch.randn(30000, 7168, dtype=torch.bfloat16, device="cuda")
    rows = torch.randint(-1, 30000, (4096, 8), dtype=torch.int32, device="cuda")
    both(y, rows, torch.rand(4096, 8, device="cuda"), torch.bfloat16)


def call_combine(weights: torch.dtype | None = torch.float32, top_k: int = 8, out: torch.dtype = BF16) -> None:
    rows, topk_weights = empty(128, top_k, dtype=torch.int32), None if weights is None else empty(128, top_k, dtype=weights)
    ops.combine(empty(32768, 7168), rows, topk_weights, empty(128, 7168, dtype=out))


def call_presum() -> None:
    rows, topk_weights = empty(128, 8, dtype=torch.int32), empty(128, 8, dtype=torch.float32)
    ops.presum(empty(32768, 7168), rows, topk_weights, empty(128, 7168))


COMPILE_CASES = [
    *cases(call_combine, {}, {"weights": BF16}, {"weights": None}, {"weights": None, "top_k": 1, "out": torch.float16}),
    *cases(call_presum, {}),
    *cases(compile_peers.combine_shared, {}),
]


OPERATION_CASES = {
    "presum": {
        "of one token": lambda: (
            torch.randn(4, 5).bfloat16(),
            integers([0, 3], [-1, -1]),
            torch.rand(2, 2),
            torch.zeros(2, 5).bfloat16(),
        )
    },
    "combine": {
        "with absent entries": lambda: (
            torch.randn(4, 5).bfloat16(),
            integers([0, 3], [-1, 1]),
            torch.rand(2, 2),
            torch.zeros(2, 5).bfloat16(),
        ),
        "without weights": lambda: (torch.randn(4, 5).bfloat16(), integers([0, 3]), None, torch.zeros(1, 5)),
    },
}
