"""MoEQuantDispatcher on one rank: results, limits, errors. Its exchanges are tested in tests/distributed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moequant import (
    ClosedError,
    GroupedExperts,
    InvalidExpertIdError,
    MoEQuantDispatcher,
    StaleHandleError,
    ops,
    reference,
)
from moequant.batch import ExpertBatch
from moequant.testing import assert_bit_equal, in_one_process, poison, relative_error, routing
from moequant.transport.buffers import named

EXPERTS, TOP_K, HIDDEN, TOKENS = 6, 3, 200, 20
SETTINGS: dict[str, Any] = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN, "max_tokens_per_rank": TOKENS}


@pytest.fixture(params=["reference", "kernels"])
def backend(request, monkeypatch, device) -> str:
    """The CPU's path and the kernels (interpreted without a GPU). Where there is a GPU, it is the reference that runs on the CPU."""
    if request.param == "kernels":
        if device == "cpu":
            monkeypatch.setenv("MOEQUANT_CPU_KERNELS", "1")
        assert ops.uses_kernels(torch.empty(0, device=device))
        return device
    return "cpu"


@pytest.fixture(params=["padded", "ragged"])
def settings(request) -> dict[str, Any]:
    return SETTINGS | {"layout": request.param}


def inputs(tokens: int = TOKENS, device: str = "cpu", dtype: torch.dtype = torch.bfloat16):
    hidden = torch.randn(tokens, HIDDEN, dtype=dtype).to(device)
    ids, weights = routing(tokens, TOP_K, EXPERTS)
    return hidden, ids.to(device), weights.to(device)


def stand_in(batch: ExpertBatch) -> torch.Tensor:
    """An elementwise expert, exact by construction: dequantized rows, doubled for odd experts."""
    values = batch.values.float()
    if batch.scales is not None:
        values = values * batch.scales.repeat_interleave(128, -1)[..., : values.shape[-1]]
    return (values * (1.0 + batch.experts_of_rows() % 2)[..., None]).bfloat16()


def expected_output(hidden, ids, weights, quant_dtype=torch.float8_e4m3fn):
    """The stand-in layer, token by token, in plain torch."""
    values, scales = reference.quantize_groups(hidden, 128, quant_dtype, "default", None)
    rows = values.float() * scales.repeat_interleave(128, 1)[:, :HIDDEN]
    acc = torch.zeros(hidden.shape)
    for k in range(ids.shape[1]):
        expert = ids[:, k].long()
        output = (rows * (1.0 + expert % 2).unsqueeze(1)).bfloat16().float()
        acc = torch.where((expert >= 0).unsqueeze(1), acc + weights[:, k : k + 1].float() * output, acc)
    return acc.to(hidden.dtype)


def poison_buffers(dispatcher: MoEQuantDispatcher) -> None:
    for slot in dispatcher._slots:
        for buffer in named(slot.buffers).values():
            buffer.view(torch.uint8).fill_(0xFF)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("quant", ["fp8_e4m3fn", "int8"])
def test_the_stand_in_layer_has_the_expected_bits(quant, dtype, backend, settings):
    hidden, ids, weights = inputs(dtype=dtype)
    ids[3, 1], ids[7] = -1, -1
    with MoEQuantDispatcher(**settings, quant=quant, device=backend) as dispatcher:
        poison_buffers(dispatcher)
        out = dispatcher(hidden.to(backend), ids.to(backend), weights.to(backend), stand_in)
        assert dispatcher.check() == 0
        expected = expected_output(hidden, ids, weights, dispatcher.config.dtype)
    assert_bit_equal(out.cpu(), expected)
    assert not out[7].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_per_rank_sum_of_one_rank_is_rounded_to_bfloat16(dtype, backend, settings):
    hidden, ids, weights = inputs(dtype=dtype)
    ids[3, 1], ids[7] = -1, -1
    with MoEQuantDispatcher(**settings, reduce="per_rank", device=backend) as dispatcher:
        poison_buffers(dispatcher)
        out = dispatcher(hidden.to(backend), ids.to(backend), weights.to(backend), stand_in)
    assert_bit_equal(out.cpu(), expected_output(hidden, ids, weights).bfloat16().to(dtype))
    _, (expected,), _ = in_one_process(settings | {"reduce": "per_rank"}, [(hidden, ids, weights)], stand_in)
    assert_bit_equal(out.cpu(), expected)


@pytest.mark.parametrize("quant", ["fp8_e4m3fn", "int8", "fp8_e5m2", "none"])
def test_the_whole_layer_is_near_a_dense_computation(quant, backend, settings):
    inner, tolerance = 136, {"fp8_e4m3fn": 0.076, "int8": 0.029, "fp8_e5m2": 0.15, "none": 0.006}[quant]
    hidden, ids, weights = inputs()
    w13 = torch.randn(EXPERTS, 2 * inner, HIDDEN).bfloat16() / HIDDEN**0.5
    w2 = torch.randn(EXPERTS, HIDDEN, inner).bfloat16() / inner**0.5
    expected = torch.zeros(TOKENS, HIDDEN)
    for token, k in torch.cartesian_prod(torch.arange(TOKENS), torch.arange(TOP_K)).tolist():
        gate, up = (w13[ids[token, k]].float() @ hidden[token].float()).chunk(2)
        product = torch.nn.functional.silu(gate) * up
        expected[token] += weights[token, k] * (w2[ids[token, k]].float() @ product)
    experts = GroupedExperts.from_weights(w13.to(backend), w2.to(backend), quant=quant)
    with MoEQuantDispatcher(**settings, quant=quant, device=backend) as dispatcher:
        poison_buffers(dispatcher)
        out = dispatcher(hidden.to(backend), ids.to(backend), weights.to(backend), experts)
    assert relative_error(out.cpu(), expected) < tolerance


def test_rows_stand_in_the_order_of_token_and_k_with_their_sources(backend, settings):
    hidden, ids, weights = inputs(device=backend)
    with MoEQuantDispatcher(**settings, quant="none", device=backend) as dispatcher:
        batch, _ = dispatcher.dispatch(hidden, ids, weights)
        for expert in range(EXPERTS):
            entries = (ids.flatten() == expert).nonzero().flatten().tolist()
            assert batch.rows_of(batch.sources, expert).tolist() == entries
            assert_bit_equal(batch.rows_of(batch.values, expert).cpu(), hidden[torch.tensor(entries) // TOP_K].cpu())


def test_the_batch_has_the_contracts_shapes_and_strides(backend):
    hidden, ids, weights = inputs(7, device=backend)
    with MoEQuantDispatcher(**SETTINGS, device=backend) as dispatcher:
        batch, _ = dispatcher.dispatch(hidden, ids, weights)
    assert batch.values.shape == (EXPERTS, 32, HIDDEN) and batch.values.is_contiguous()
    assert batch.scales is not None
    assert batch.scales.shape == (EXPERTS, 32, 2) and batch.scales.stride() == (64, 1, 32)
    assert batch.num_tokens.dtype == torch.int32


def test_no_tokens_give_no_rows(backend, settings):
    with MoEQuantDispatcher(**settings, device=backend) as dispatcher:
        hidden, ids, weights = inputs(0, device=backend)
        batch, handle = dispatcher.dispatch(hidden, ids, weights)
        assert not batch.num_tokens.any()
        assert dispatcher.combine(stand_in(batch), handle).shape == (0, HIDDEN)


def test_strided_inputs_give_the_bits_of_their_copies(backend, settings):
    hidden, ids, weights = inputs(device=backend)
    wide = torch.randn(TOKENS, 2 * HIDDEN, device=backend).bfloat16()
    wide[:, 1::2] = hidden
    with MoEQuantDispatcher(**settings, device=backend) as dispatcher:
        straight = dispatcher(hidden, ids, weights, stand_in)
        strided = dispatcher(wide[:, 1::2], ids.t().contiguous().t(), weights.t().contiguous().t(), stand_in)
    assert_bit_equal(straight, strided)


def test_repeated_experts_and_int64_ids_and_bfloat16_weights_work(backend, settings):
    hidden, ids, weights = inputs(4, device=backend)
    ids[0] = 2
    weights = weights.bfloat16()
    with MoEQuantDispatcher(**settings, device=backend) as dispatcher:
        out = dispatcher(hidden, ids.long(), weights, stand_in)
    assert_bit_equal(out.cpu(), expected_output(hidden.cpu(), ids.cpu(), weights.cpu()))


def test_rows_past_capacity_are_dropped_in_row_order_and_reported(backend):
    hidden, ids, weights = inputs(device=backend)
    ids[:] = torch.tensor([0, 1, 2], device=backend)
    with MoEQuantDispatcher(**SETTINGS, capacity=16, on_overflow="drop", device=backend) as dispatcher:
        batch, handle = dispatcher.dispatch(hidden, ids, weights)
        assert batch.num_tokens.tolist() == [16, 16, 16, 0, 0, 0]
        out = dispatcher.combine(stand_in(batch), handle)
        kept = expected_output(hidden[:16].cpu(), ids[:16].cpu(), weights[:16].cpu())
        assert_bit_equal(out[:16].cpu(), kept)
        assert not out[16:].any()
        assert dispatcher.check() == 12
        assert dispatcher.check() == 0


def test_the_output_may_be_given(backend, settings):
    hidden, ids, weights = inputs(device=backend)
    with MoEQuantDispatcher(**settings, device=backend) as dispatcher:
        batch, handle = dispatcher.dispatch(hidden, ids, weights)
        out = poison(torch.empty(TOKENS, 300, dtype=torch.bfloat16, device=backend))
        result = dispatcher.combine(stand_in(batch), handle, out=out[:, :HIDDEN])
        assert result.data_ptr() == out.data_ptr() and out[:, HIDDEN:].isnan().all()
        assert_bit_equal(result, dispatcher.combine(stand_in(batch), handle))


def test_two_slots_hold_two_batches_at_once(backend, settings):
    first, second = inputs(device=backend), inputs(device=backend)
    with MoEQuantDispatcher(**settings, slots=2, device=backend) as dispatcher:
        batches = [dispatcher.dispatch(*tensors, slot=slot) for slot, tensors in enumerate((first, second))]
        for (batch, handle), tensors in zip(batches, (first, second), strict=True):
            out = dispatcher.combine(stand_in(batch), handle)
            hidden, ids, weights = (tensor.cpu() for tensor in tensors)
            assert_bit_equal(out.cpu(), expected_output(hidden, ids, weights))


def change(arguments, position, value):
    return [*arguments[:position], value, *arguments[position + 1 :]]


HIDDEN_STATES, IDS, WEIGHTS = inputs()
BAD_INPUTS = {
    "hidden of another dtype": (0, HIDDEN_STATES.double(), "bfloat16 or .* got torch.float64"),
    "hidden of another width": (0, HIDDEN_STATES[:, 1:], r"shape \(20, 200\), got \(20, 199\)"),
    "hidden of three dimensions": (0, HIDDEN_STATES[None], "2 dimensions"),
    "no tensor": (0, [1.0], "must be a tensor, got list"),
    "more tokens than the maximum": (0, torch.randn(21, HIDDEN), "21 tokens, max_tokens_per_rank is 20; split"),
    "ids of another dtype": (1, IDS.short(), "int32 or .* got torch.int16"),
    "ids of another top-k": (1, IDS[:, 1:], r"shape \(20, 3\), got \(20, 2\)"),
    "an id past the last expert": (1, IDS.clone().fill_(6), r"in -1..5, got ids from 6 to 6; -1 means no expert"),
    "an id below -1": (1, IDS.clone().fill_(-2), "got ids from -2"),
    "weights of another dtype": (2, WEIGHTS.double(), "float32 or .* got torch.float64"),
    "weights of fewer tokens": (2, WEIGHTS[1:], r"shape \(20, 3\), got \(19, 3\)"),
    "tensors of another device": (0, HIDDEN_STATES.to("meta"), "must be on cpu, got meta"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs_raise_a_value_error_that_says_what_to_do(case):
    position, value, message = BAD_INPUTS[case]
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher:
        with pytest.raises(ValueError, match=message):
            dispatcher.dispatch(*change(inputs(), position, value))
        assert dispatcher(*inputs(), stand_in).shape == (TOKENS, HIDDEN)


def test_out_of_range_ids_are_an_invalid_expert_id_error():
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher, pytest.raises(InvalidExpertIdError):
        dispatcher.dispatch(*change(inputs(), 1, IDS + 6))


@pytest.mark.parametrize("position", [0, 2], ids=["hidden_states", "topk_weights"])
def test_tensors_that_require_grad_raise_under_grad_mode_only(position):
    arguments = [tensor.float().requires_grad_() if index == position else tensor for index, tensor in enumerate(inputs())]
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher:
        with pytest.raises(RuntimeError, match="requires grad, and a batch in fp8_e4m3fn has no gradient"):
            dispatcher.dispatch(*arguments)
        with torch.no_grad():
            dispatcher.dispatch(*arguments)


def test_expert_output_that_requires_grad_raises():
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher:
        batch, handle = dispatcher.dispatch(*inputs())
        with pytest.raises(RuntimeError, match="expert_output requires grad"):
            dispatcher.combine(stand_in(batch).requires_grad_(), handle)


def test_wrong_expert_output_raises():
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher:
        batch, handle = dispatcher.dispatch(*inputs())
        with pytest.raises(ValueError, match=r"expert_output must have shape \(6, 32, 200\)"):
            dispatcher.combine(stand_in(batch)[:, :20], handle)
        with pytest.raises(ValueError, match="expert_output must be torch.bfloat16"):
            dispatcher.combine(stand_in(batch).float(), handle)
        with pytest.raises(ValueError, match="out must be torch.bfloat16"):
            dispatcher.combine(stand_in(batch), handle, out=torch.empty(TOKENS, HIDDEN))


def test_batches_of_two_slots_have_workspaces_of_their_own(settings):
    w13 = torch.randn(EXPERTS, 64, HIDDEN).bfloat16()
    experts = GroupedExperts.from_weights(w13, torch.randn(EXPERTS, HIDDEN, 32).bfloat16(), quant="int8")
    with MoEQuantDispatcher(**settings, quant="int8", slots=2, device="cpu") as dispatcher:
        (first, _), (second, _) = (dispatcher.dispatch(*inputs(), slot=slot) for slot in (0, 1))
        output = experts(first)
        before = output.clone()
        experts(second)
        assert_bit_equal(first.rows_of(output, 0), first.rows_of(before, 0))
        out = torch.empty_like(output)
        assert experts(second, out=out).data_ptr() == out.data_ptr()


def test_a_stale_handle_and_another_dispatchers_handle_raise():
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher, MoEQuantDispatcher(**SETTINGS, device="cpu") as other:
        batch, handle = dispatcher.dispatch(*inputs())
        with pytest.raises(StaleHandleError, match="made by another dispatcher"):
            other.combine(stand_in(batch), handle)
        dispatcher.dispatch(*inputs())
        message = (
            "dispatch 1 of slot 0, whose buffers a later dispatch, or ensure, has taken; combine before the next dispatch, or use"
        )
        with pytest.raises(StaleHandleError, match=message):
            dispatcher.combine(stand_in(batch), handle)


def test_a_slot_that_is_not_there_raises():
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher, pytest.raises(ValueError, match="slot must be in 0..0, got 1"):
        dispatcher.dispatch(*inputs(), slot=1)


def test_a_closed_dispatcher_raises_and_closes_again():
    dispatcher = MoEQuantDispatcher(**SETTINGS, device="cpu")
    batch, handle = dispatcher.dispatch(*inputs())
    output = stand_in(batch)
    dispatcher.close()
    dispatcher.close()
    for call in (lambda: dispatcher.dispatch(*inputs()), lambda: dispatcher.combine(output, handle), dispatcher.check):
        with pytest.raises(ClosedError, match="build a new one"):
            call()


def test_a_group_without_torch_distributed_raises():
    with pytest.raises(ValueError, match="call init_process_group first"):
        MoEQuantDispatcher(object(), **SETTINGS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match='transport "collective" needs torch.distributed'):
        MoEQuantDispatcher(**SETTINGS, transport="collective", device="cpu")


def test_waves_and_pushed_rows_are_for_the_symmetric_transport():
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher:
        batch, handle = dispatcher.dispatch(*inputs())
        pushing = (lambda: dispatcher.push(stand_in(batch), handle), lambda: dispatcher.combine_pushed(handle))
        for call in (*pushing, lambda: dispatcher.dispatch_first(*inputs(), 0, 1)):
            with pytest.raises(RuntimeError, match='only transport "symmetric"'):
                call()


def test_buffer_bytes_is_what_a_dispatcher_allocates(settings):
    with MoEQuantDispatcher(**settings, slots=2, device="cpu") as dispatcher:
        allocated = sum(buffer.nbytes for slot in dispatcher._slots for buffer in named(slot.buffers).values())
    assert MoEQuantDispatcher.buffer_bytes(**settings, slots=2) == allocated
    assert MoEQuantDispatcher.buffer_bytes(**{**settings, "num_experts": 8}, world_size=4, exchange="packed") > 0


def test_a_compiled_layer_of_experts_of_one_s_own_has_the_same_bits(settings):
    with MoEQuantDispatcher(**settings, device="cpu") as dispatcher:

        def layer(hidden, ids, weights):
            return dispatcher(hidden * 2, ids, weights, stand_in) + 1

        arguments = inputs()
        assert_bit_equal(torch.compile(layer, backend="eager")(*arguments), layer(*arguments))


@pytest.mark.gpu
def test_out_of_range_ids_on_a_gpu_are_counted_and_raised_by_check(settings):
    hidden, ids, weights = inputs(device="cuda")
    ids[2, 1], ids[5, 0] = 6, -7
    with MoEQuantDispatcher(**settings) as dispatcher:
        out = dispatcher(hidden, ids, weights, stand_in)
        ids[2, 1] = ids[5, 0] = -1
        assert_bit_equal(out.cpu(), expected_output(hidden.cpu(), ids.cpu(), weights.cpu()))
        with pytest.raises(InvalidExpertIdError, match="2 entries of topk_ids were outside -1..5"):
            dispatcher.check()
        assert dispatcher.check() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["fp8_e4m3fn", "none"])
def test_a_cuda_graph_of_the_layer_replays_with_new_inputs(quant, settings):
    inner = 256
    w13 = torch.randn(EXPERTS, 2 * inner, HIDDEN, device="cuda").bfloat16() / HIDDEN**0.5
    w2 = torch.randn(EXPERTS, HIDDEN, inner, device="cuda").bfloat16() / inner**0.5
    experts = GroupedExperts.from_weights(w13, w2, quant=quant)
    with MoEQuantDispatcher(**settings, quant=quant) as dispatcher:
        static: Any = [tensor.clone() for tensor in inputs(device="cuda")]
        dispatcher(static[0], static[1], static[2], experts)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = dispatcher(static[0], static[1], static[2], experts)
        for seed in range(5):
            torch.manual_seed(seed)
            fresh: Any = inputs(device="cuda")
            for target, source in zip(static, fresh, strict=True):
                target.copy_(source)
            graph.replay()
            replayed = out.clone()
            assert_bit_equal(replayed, dispatcher(fresh[0], fresh[1], fresh[2], experts))


@pytest.mark.gpu
@pytest.mark.parametrize("reduce", ["exact", "per_rank"])
def test_nothing_on_the_device_path_syncs_with_the_host(reduce, settings):
    arguments = inputs(device="cuda")
    with MoEQuantDispatcher(**settings, reduce=reduce) as dispatcher:
        experts = GroupedExperts.from_weights(
            torch.randn(EXPERTS, 256, HIDDEN, device="cuda").bfloat16(), torch.randn(EXPERTS, HIDDEN, 128, device="cuda").bfloat16()
        )
        dispatcher(*arguments, experts)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            dispatcher(*arguments, experts)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # the output is the one allocation
        assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 1
