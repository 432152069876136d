"""The grouped GEMM of operands and outputs whose offsets 32 bits don't hold. Nothing but the last expert has rows."""

from __future__ import annotations

import pytest
import torch

from far_memory import far, far_along, reserved
from moequant import reference
from moequant.batch import QuantizedTensor
from moequant.kernels.gemm.grouped_gemm import SMALL_TILES, Config, grouped_gemm_blockscale
from moequant.testing import relative_error

# Shapes (L, M, N, K_dim) in which the last expert of one of the three begins 2**31 elements from the first.
SHAPES = {"a": (1025, 512, 16, 4096), "b": (1025, 1, 128, 16384), "out": (1025, 16384, 128, 16)}
paths = pytest.mark.parametrize("config", [SMALL_TILES, SMALL_TILES._replace(tma=False)], ids=["tma", "pointers"])


@paths
@pytest.mark.parametrize("name", SHAPES)
def test_the_last_expert_past_2_to_the_31_elements(name: str, config: Config, device: str) -> None:
    experts, rows, columns, depth = SHAPES[name]
    count, blocks, groups = min(rows, 3), -(-columns // 128), -(-depth // 128)
    shapes = {"a": (rows, depth), "b": (columns, depth), "out": (rows, columns)}
    tensors = {}
    for own, shape in shapes.items():
        dtype, strides = torch.bfloat16 if own == "out" else torch.int8, (shape[0] * shape[1], shape[1], 1)
        if own == name:
            tensors[own] = far((experts, *shape), strides, dtype, device)
        else:
            tensors[own] = reserved(experts * shape[0] * shape[1], dtype, device).view(experts, *shape)
    a, b, out = tensors.values()
    a_scales = reserved(experts * groups * rows, torch.float32, device).view(experts, groups, rows).transpose(1, 2)
    b_scales = reserved(experts * blocks * groups, torch.float32, device).view(experts, blocks, groups)
    a[-1, :count], b[-1] = (torch.randint(-127, 128, (n, depth), dtype=torch.int8, device=device) for n in (count, columns))
    a_scales[-1, :count], b_scales[-1] = (torch.rand(n, groups, device=device) for n in (count, blocks))
    out[-1, : count + 1] = torch.nan
    num_tokens = torch.zeros(experts, dtype=torch.int32, device=device)
    num_tokens[-1] = count
    grouped_gemm_blockscale(a, a_scales, b, b_scales, num_tokens, None, out, config=config)
    left = QuantizedTensor(a[-1:, :count], a_scales[-1:, :count], "transposed")
    expected = reference.grouped_gemm_blockscale(left, QuantizedTensor(b[-1:], b_scales[-1:], "block"), out_dtype=torch.float32)
    assert relative_error(out[-1:, :count], expected) < 3e-3
    # the row that comes next, if there is one
    assert out[-1, count : count + 1].isnan().all()


@paths
@pytest.mark.parametrize("dim", [0, 1], ids=["experts", "groups"])
def test_scales_past_2_to_the_31_elements(dim: int, config: Config, device: str) -> None:
    a, b = (torch.randint(-127, 128, (3, n, 384), dtype=torch.int8, device=device) for n in (5, 16))
    b_scales = torch.rand(3, 1, 3, device=device)
    near = torch.rand(3, 3, 5, device=device)
    outs = []
    for a_scales in (near, far_along(dim, near)):
        # the rows of a group lie side by side
        assert a_scales.stride(2) == 1
        outs.append(torch.empty(3, 5, 16, device=device))
        grouped_gemm_blockscale(a, a_scales.transpose(1, 2), b, b_scales, None, None, outs[-1], config=config)
    assert torch.equal(*outs)


@paths
@pytest.mark.gpu
def test_output_past_2_to_31_elements(config: Config, device: str) -> None:
    """Row offsets don't fit 32 bits: the last expert starts past 2**31 elements of `a` and of `out`."""
    experts, rows, columns, depth = 5, 2**17, 4096, 4096
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    assert (experts - 1) * rows * min(columns, depth) >= 2**31
    num_tokens = torch.tensor([3, 0, 0, 0, 130], dtype=torch.int32, device=device)
    x = torch.randn(experts, 130, depth, device=device, dtype=torch.bfloat16)
    w = torch.randn(experts, columns, depth, device=device, dtype=torch.bfloat16)
    small, b = reference.quantize_expert_batch(x), reference.quantize_weight(w)
    values = torch.empty(experts, rows, depth, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.full((experts, depth // 128, rows), torch.nan, device=device).transpose(1, 2)
    values.view(torch.uint8)[:, :130], scales[:, :130] = small.values.view(torch.uint8), small.scales
    expected = reference.grouped_gemm_blockscale(small, b, num_tokens)
    out = torch.full((experts, rows, columns), torch.nan, dtype=torch.bfloat16, device=device)
    grouped_gemm_blockscale(values, scales, b.values, b.scales, num_tokens, None, out, config=config)
    assert relative_error(out[0, :3], expected[0, :3]) <= 3e-3
    assert relative_error(out[4, :130], expected[4, :130]) <= 3e-3
    assert out[:4, 3:].isnan().all()
    assert out[4, 130:].isnan().all()
