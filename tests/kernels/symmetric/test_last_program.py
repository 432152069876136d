"""The last program of a launch knows that it is the last. What waits and signals do is tested with the kernels that call them."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from moequant.kernels.library.symmetric import last_program


@triton.jit
def find_last_kernel(arrivals_ptr, found_ptr):
    last = last_program(arrivals_ptr)
    tl.store(found_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), last.to(tl.int32))


@pytest.mark.parametrize("grid", [(1,), (5,), (1, 3), (3, 1), (2, 3), (4, 4)], ids=str)
def test_one_program_of_each_launch_is_the_last_whatever_the_grid(grid, device):
    arrivals, found = (torch.zeros(size, dtype=torch.int32, device=device) for size in (1, 16))
    for _ in range(3):
        found.zero_()
        find_last_kernel[grid](arrivals, found)
        assert found.sum() == 1 and arrivals.item() == 0
        # interpreted programs run one after the other
        assert device == "cuda" or found.nonzero().item() == torch.Size(grid).numel() - 1
