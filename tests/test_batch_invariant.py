"""`batch_invariant=True`: a token has the same bits alone, in any batch and any place of it, in both layouts, in training and inference.

Several ranks are in tests/distributed/test_batch_invariant_ranks.py, the choice of kernels in test_ops_gemm.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from invariance import Model, Tokens, differing, one_by_one, some
from moequant import MoEQuantDispatcher, QuantizedTensor, grouped_gemm_blockscale, ops, reference
from moequant.batch import ANY_ROWS, empty_scales_of
from moequant.config import DispatcherConfig
from moequant.kernels.library import common
from moequant.nn import MoEExperts
from moequant.reference.gemm import product
from moequant.testing import relative_error
from ragged_rows import ragged

# odd sizes: rows that begin at any address, groups and blocks that are not whole
ODD, WHOLE = (516, 264, 6, 3), (256, 128, 8, 4)
MKL = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="MKL's products depend on the number of rows")


def on_cpu(model: Model, most: int, **changes: Any) -> MoEQuantDispatcher:
    return MoEQuantDispatcher(**model.settings(most, **changes), device="cpu")


@pytest.mark.parametrize("quant", ["fp8_e4m3fn", "int8", "none", "float16"])
@pytest.mark.parametrize("sizes", [ODD, WHOLE], ids=["odd", "whole"])
def test_a_token_has_its_bits_in_any_batch_and_either_layout(sizes, quant):
    model = Model(*sizes, quant=quant)
    experts, tokens = model.experts_of("cpu"), model.tokens(37, 5, "cpu")
    with on_cpu(model, 1) as alone, on_cpu(model, 37) as padded, on_cpu(model, 64, layout="ragged") as ragged:
        expected = one_by_one(alone, tokens, experts)
        assert not differing(one_by_one(ragged, tokens, experts), expected)
        for dispatcher in (padded, ragged):
            for seed in range(4):
                order = torch.randperm(37, generator=torch.Generator().manual_seed(seed))[: (37, 2, 8, 23)[seed]]
                out = dispatcher(*some(tokens, order), experts)
                assert not differing(out, expected[order])


@MKL
@pytest.mark.parametrize("quant", ["fp8_e4m3fn", "none"])
def test_without_it_a_cpu_gives_a_token_other_bits_in_a_batch(quant):
    model = Model(*WHOLE, quant)
    experts, tokens = model.experts_of("cpu"), model.tokens(64, 5, "cpu")
    with on_cpu(model, 64, batch_invariant=False) as dispatcher:
        assert differing(dispatcher(*tokens, experts), one_by_one(dispatcher, tokens, experts))


def forwards(model: Model, tokens: Tokens, device: str, layout: str) -> dict[str, Tensor]:
    """What a layer gives in inference and in training, and each token alone in training."""
    most, recipe = len(tokens[0]), "ue8m0"
    made: dict[str, Tensor] = {}
    with MoEQuantDispatcher(**model.settings(most, layout=layout, recipe=recipe), device=device) as dispatcher:
        for recompute in (False, True):
            trained = MoEExperts(dispatcher, model.inner, recompute=recompute, dtype=torch.bfloat16)
            with torch.no_grad():
                for parameter, weight in zip((trained.w13, trained.w2), model.weights(device), strict=True):
                    parameter.copy_(weight)
                made[f"inference, {recompute=}"] = trained(*tokens)
                made[f"grouped, {recompute=}"] = dispatcher(*tokens, trained.grouped_experts())
            made[f"training, {recompute=}"] = trained(*tokens)
            assert made[f"training, {recompute=}"].requires_grad
            alone = [trained(*some(tokens, slice(t, t + 1))) for t in range(0, most, 7)]
            made[f"training alone, {recompute=}"] = torch.cat(alone).detach()
    return {name: out.detach() for name, out in made.items()}


def check_forwards(model: Model, tokens: Tokens, device: str, layout: str) -> None:
    made = forwards(model, tokens, device, layout)
    expected = made["inference, recompute=False"]
    for name, out in made.items():
        assert not differing(out, expected[::7] if "alone" in name else expected), name


@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("quant", ["none", "fp8_e4m3fn"])
def test_a_forward_in_training_has_the_bits_of_inference(quant, layout):
    model = Model(520, 264, 4, 2, quant)
    check_forwards(model, model.tokens(64, 6, "cpu"), "cpu", layout)


@pytest.mark.parametrize("depth", [16, 100, 300])
def test_a_row_s_product_is_the_same_in_any_place(depth):
    """Rows of 100 numbers begin at addresses that products of CPUs can tell from each other."""
    rng = torch.Generator().manual_seed(depth)
    row, b = torch.randn(depth, generator=rng), torch.randn(9, depth, generator=rng)
    expected = product(row[None], b, True)
    for place in range(17):
        a = torch.randn(17, depth, generator=rng)
        a[place] = row
        assert torch.equal(product(a, b, True)[place], expected[0])
    assert torch.allclose(expected, row[None] @ b.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, None], ids=str)
@pytest.mark.parametrize(("columns", "depth"), [(210, 200), (256, 384), (1, 1), (128, 0)])
def test_what_a_cpu_runs_has_the_bits_of_the_reference(columns, depth, dtype):
    rng = torch.Generator().manual_seed(depth)
    a, b = (torch.randn(3, rows, depth, generator=rng).bfloat16() for rows in (19, columns))
    operands: tuple[Any, Any] = (a, b)
    if dtype is not None:
        operands = reference.quantize_expert_batch(a, dtype=dtype), reference.quantize_weight(b, dtype=dtype)
    counts = torch.tensor([7, 0, 25], dtype=torch.int32)
    found, expected = (torch.full((3, 19, columns), 7.0) for _ in range(2))
    grouped_gemm_blockscale(*operands, counts, out=found, batch_invariant=True)
    reference.grouped_gemm_blockscale(*operands, counts, out=expected, batch_invariant=True)
    assert torch.equal(found, expected)


def test_a_batch_and_its_parts_carry_the_setting():
    model = Model(*WHOLE, "int8")
    tokens = model.tokens(5, 1, "cpu")
    for setting in (False, True):
        with on_cpu(model, 5, batch_invariant=setting) as dispatcher:
            batch, _ = dispatcher.dispatch(*tokens)
            assert batch.batch_invariant is batch.part(1, 3).batch_invariant is setting


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduce": "per_rank"}, 'batch_invariant=True takes reduce="exact" alone, got "per_rank": its sums depend on which rank'),
        (
            {"on_overflow": "drop"},
            'batch_invariant=True takes on_overflow="error" alone, got "drop": which rows are dropped depends',
        ),
        ({"batch_invariant": 1}, "batch_invariant must be True or False, got 1"),
    ],
    ids=["per_rank", "drop", "no bool"],
)
def test_settings_by_which_tokens_depend_on_others_are_refused(changes, message):
    settings = Model(*WHOLE, "int8").settings(8) | changes
    with pytest.raises(ValueError, match=message):
        DispatcherConfig(**settings)


QWEN3, ODD_LARGE = (2048, 768, 16, 8), (1000, 328, 6, 3)
# of many experts: more than one launch of Hopper's kernels may have
MANY = (512, 256, 320, 8)
SHAPES = {"qwen3-30b": QWEN3, "odd": ODD_LARGE, "many experts": MANY, "deepseek-v3": (7168, 2048, 8, 4)}
QUANTS = ["fp8_e4m3fn", "int8", "none", "float16"]


@pytest.mark.gpu
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_on_a_gpu_has_its_bits_in_500_batches(shape, quant):
    """Of 1 to 600 tokens, through dispatchers that are made for few and for many, in both layouts."""
    model = Model(*SHAPES[shape], quant=quant)
    experts, tokens = model.experts_of("cuda"), model.tokens(600, 3, "cuda")
    with (
        MoEQuantDispatcher(**model.settings(1)) as alone,
        MoEQuantDispatcher(**model.settings(16)) as few,
        MoEQuantDispatcher(**model.settings(600)) as padded,
        MoEQuantDispatcher(**model.settings(600, layout="ragged")) as ragged,
    ):
        expected = one_by_one(alone, tokens, experts)
        assert bool(expected.isfinite().all())
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for number in range(500):
            generator = torch.Generator().manual_seed(number)
            # small ones as often as large ones
            count = int(600 ** float(torch.rand((), generator=generator)))
            order = torch.randperm(600, generator=generator)[:count].cuda()
            dispatcher = few if count <= 16 and number % 3 == 0 else (padded, ragged)[number % 2]
            out = dispatcher(*some(tokens, order), experts, expected_tokens=number if number % 5 == 0 else None)
            wrong += (out.view(torch.int16) != expected[order].view(torch.int16)).sum()
        assert int(wrong) == 0
        for dispatcher in (alone, few, padded, ragged):
            dispatcher.check()


@pytest.mark.gpu
def test_without_it_a_gpu_gives_a_token_other_bits_in_another_dispatcher():
    """Where few rows have room, programs share tiles and add what they have."""
    model = Model(2048, 256, 8, 4, "none")
    experts, tokens = model.experts_of("cuda"), model.tokens(16, 3, "cuda")
    outs = []
    for most in (16, 1024):
        with MoEQuantDispatcher(**model.settings(most, batch_invariant=False)) as dispatcher:
            outs.append(dispatcher(*tokens, experts))
    assert differing(*outs)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("quant", ["none", "fp8_e4m3fn"])
@pytest.mark.parametrize("shape", ["qwen3-30b", "odd"])
def test_a_forward_in_training_on_a_gpu_has_the_bits_of_inference(shape, quant, layout):
    model = Model(*SHAPES[shape], quant=quant)
    check_forwards(model, model.tokens(200, 6, "cuda"), "cuda", layout)


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("quant", [torch.float8_e4m3fn, torch.int8, None], ids=str)
@pytest.mark.parametrize(("columns", "depth"), [(1536, 2048), (136, 7168), (328, 1000), (100, 300)])
def test_a_product_on_a_gpu_is_the_same_of_any_rows_and_experts(columns, depth, quant, out_dtype):
    """One expert's row among 1 to 400 rows of it and beside 1 to 9 other experts."""
    rng = torch.Generator("cuda").manual_seed(columns)
    row = torch.randn(depth, generator=rng, device="cuda").bfloat16()
    weight = torch.randn(columns, depth, generator=rng, device="cuda").bfloat16()
    expected = None
    for experts, rows in ((1, 16), (1, 400), (3, 64), (3, 80), (10, 144), (2, 272)):
        for place in {0, 7, rows // 2, rows - 1}:
            a = torch.randn(experts, rows, depth, generator=rng, device="cuda").bfloat16()
            b = torch.randn(experts, columns, depth, generator=rng, device="cuda").bfloat16()
            a[-1, place], b[-1] = row, weight
            operands: tuple[Any, Any] = (a, b)
            if quant is not None:
                operands = reference.quantize_expert_batch(a, dtype=quant), reference.quantize_weight(b, dtype=quant)
            for counts in (None, torch.full((experts,), place + 1, dtype=torch.int32, device="cuda")):
                out = grouped_gemm_blockscale(*operands, counts, out_dtype=out_dtype, batch_invariant=True)[-1, place]
                expected = out if expected is None else expected
                assert torch.equal(out, expected), (experts, rows, place)


@pytest.fixture
def two_at_a_time(device, monkeypatch):
    """The device, whose kernels, interpreted on a CPU, are launched for two experts at once."""
    monkeypatch.setenv("MOEQUANT_CPU_KERNELS", "1" if device == "cpu" else "0")
    monkeypatch.setattr(common, "MOST_EXPERTS", 2)
    return device


def test_many_experts_are_several_launches_of_some(two_at_a_time):
    """In both layouts, stored and pushed, GEMM 1 with its activation too."""
    device, counts, (experts, most, columns, depth) = two_at_a_time, [3, 0, 17, 32, 5], (5, 32, 256, 144)
    rng = torch.Generator().manual_seed(0)
    x, w = (torch.randn(experts, n, depth, generator=rng).bfloat16().to(device) for n in (most, columns))
    a, b = reference.quantize_expert_batch(x, dtype=torch.int8), reference.quantize_weight(w, dtype=torch.int8, segments=2)
    rows = ragged(counts, device)
    packed = rows.operand(a)
    assert isinstance(packed, QuantizedTensor)
    stored = []
    for left, starts in ((a, None), (packed, rows.expert_start)):
        there, mask = (
            left.values.shape[:-1],
            rows.mask() if starts is not None else reference.counted_rows(rows.num_tokens, a.values),
        )
        given = left.values, left.scales, b.values, b.scales, rows.num_tokens, starts
        out, elsewhere = (torch.full((*there, columns), 7.0, dtype=torch.bfloat16, device=device) for _ in range(2))
        places = torch.arange(mask.numel(), device=device).view(there)
        ops.grouped_gemm_blockscale(*given, out, segments=2, expected_rows=ANY_ROWS)
        assert bool((out[~mask] == 7).all())
        ops.grouped_gemm_push(*given, elsewhere.data_ptr() + places * (2 * columns), ANY_ROWS, None)
        assert torch.equal(elsewhere, out)
        values = torch.zeros(*there, columns // 2, dtype=torch.int8, device=device)
        scales = empty_scales_of(values.shape, 128, device).zero_()
        ops.gemm1_swiglu(*given, values, scales, expected_rows=ANY_ROWS)
        stored.append([out[mask], values[mask], scales[mask]])
        expected = torch.full_like(out, 7.0)
        reference.grouped_gemm_blockscale(left, b, rows.num_tokens, starts, out=expected)
        assert relative_error(out[mask], expected[mask]) < 1.75e-3
    for padded, packed in zip(*stored, strict=True):
        assert torch.equal(padded, packed)


def test_tensors_whose_place_would_choose_the_kernel_are_refused(monkeypatch):
    monkeypatch.setenv("MOEQUANT_CPU_KERNELS", "1")
    whole = torch.zeros(2 * 16 * 64 + 1, dtype=torch.bfloat16)
    a, b = whole[1:].view(2, 16, 64), torch.zeros(2, 8, 64, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match="batch_invariant=True chooses kernels wherever tensors lie: a must begin at a multiple of 16"
    ):
        grouped_gemm_blockscale(a, b, batch_invariant=True)
    assert not grouped_gemm_blockscale(a, b).any()
