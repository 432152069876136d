"""What a dispatcher survives, what it refuses, and what it leaves behind. On a CPU, with one rank; on GPUs what only they have."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from trials import install_interpreter, stand_in

from moequant import CallOrderError, ConfigMismatchError, GroupedExperts, MoEQuantDispatcher, StaleHandleError
from moequant.testing import assert_bit_equal, run_ranks
from moequant.transport.buffers import named

SETTINGS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 64, "max_tokens_per_rank": 8}
SMALL: dict[str, Any] = SETTINGS | {"hidden_size": 16}
MANY: dict[str, Any] = SETTINGS | {"max_tokens_per_rank": 4096}


def tokens_of(seed: int, device: str = "cpu", hidden: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    ids = torch.rand(8, 4, generator=generator, device="cpu").argsort(1)[:, :2].contiguous()
    x = torch.randn(8, hidden, generator=generator, device="cpu").bfloat16()
    return x.to(device), ids.to(device), torch.rand(8, 2, generator=generator, device="cpu").to(device)


def layer_of(dispatcher: MoEQuantDispatcher, seed: int = 0) -> torch.Tensor:
    return dispatcher(*tokens_of(seed, str(dispatcher.device), dispatcher.config.hidden_size), stand_in)


ORDERS = {
    "combine before dispatch_recv": ("dispatch_send", "combine", "combine came without dispatch_recv; call dispatch_recv first"),
    "combine_send before dispatch_recv": ("dispatch_send", "combine_send", "combine_send came without dispatch_recv"),
    "dispatch_recv after dispatch": ("dispatch", "dispatch_recv", "dispatch_recv came without dispatch_send"),
    "combine_recv after dispatch": ("dispatch", "combine_recv", "combine_recv came without combine_send"),
    "combine between combine_send and combine_recv": ("combine_send", "combine", "combine came without combine_recv"),
    "combine_recv twice": ("combine_recv", "combine_recv", "combine_recv came without combine_send"),
}


def take_step(dispatcher: MoEQuantDispatcher, step: str, handle: Any, output: torch.Tensor) -> Any:
    """The step alone, after a dispatch that gave handle."""
    if step.startswith("dispatch_"):
        return getattr(dispatcher, step)(handle)
    return getattr(dispatcher, step)(*(() if step.endswith(("recv", "pushed")) else (output,)), handle)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_steps_out_of_order_are_refused_and_the_dispatch_can_still_be_combined(order):
    before, step, message = order
    tokens = tokens_of(0)
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher:
        expected = layer_of(dispatcher)
        if before == "dispatch_send":
            handle, output = dispatcher.dispatch_send(*tokens), torch.zeros(4, 16, 64).bfloat16()
        else:
            batch, handle = dispatcher.dispatch(*tokens)
            output = stand_in(batch)
            for earlier in ("combine_send", "combine_recv"):
                if before in (earlier, "combine_recv"):
                    take_step(dispatcher, earlier, handle, output)
        with pytest.raises(CallOrderError, match=message):
            take_step(dispatcher, step, handle, output)
        if before == "dispatch_send":
            output = stand_in(dispatcher.dispatch_recv(handle))
        out = dispatcher.combine_recv(handle) if before == "combine_send" else dispatcher.combine(output, handle)
        assert_bit_equal(out, expected)


def run_pushes(rank: int, ranks: int) -> None:
    """One rank of `symmetric`: what must come before what."""
    tokens = tokens_of(0, hidden=16)
    with MoEQuantDispatcher(**SMALL, transport="symmetric", device="cpu") as dispatcher:
        expected = layer_of(dispatcher)
        batch, handle = dispatcher.dispatch(*tokens)
        output = stand_in(batch)
        with pytest.raises(CallOrderError, match="combine_pushed came without push or begin_push"):
            dispatcher.combine_pushed(handle)
        dispatcher.push(output.half(), handle)
        with pytest.raises(CallOrderError, match="begin_push came without combine_pushed; .* its rows are being pushed"):
            dispatcher.push(output, handle)
        with pytest.raises(CallOrderError, match="combine came without combine_pushed"):
            dispatcher.combine(output, handle)
        # of the type that was pushed
        assert (dispatcher.combine_pushed(handle).float() - expected.float()).norm() < 0.01 * expected.float().norm()
        dispatcher.push(output, handle)
        assert_bit_equal(dispatcher.combine_pushed(handle), expected)
        assert_bit_equal(dispatcher.combine(output, handle), expected)
        with pytest.raises(ValueError, match=r"dtype must be torch.bfloat16 or torch.float16, got torch.float32"):
            dispatcher.begin_push(handle, dtype=torch.float32)

        batch, handle = dispatcher.dispatch_first(*tokens, 0, 1)
        with pytest.raises(CallOrderError, match="combine came without dispatch_second"):
            dispatcher.combine(output, handle)
        dispatcher.dispatch_second(handle)
        with pytest.raises(CallOrderError, match="dispatch_second came without dispatch_first"):
            dispatcher.dispatch_second(handle)
        assert_bit_equal(dispatcher.combine(output, handle), expected)


def test_pushes_out_of_order_are_refused(interpreted):
    run_ranks(run_pushes, 1, setup=install_interpreter)


def run_second_push(rank: int, ranks: int) -> None:
    """Rank 0 is slow to sum what was pushed first, while rank 1 is about to push other rows to the same places."""
    import moequant.kernels.routing.combine as combine

    shipped = combine.combine_shared

    def slow(*args: Any, **kwargs: Any) -> None:
        if rank == 0:
            threading.Event().wait(1.0)
        shipped(*args, **kwargs)

    combine.combine_shared = slow
    with MoEQuantDispatcher(**SMALL, transport="symmetric", device="cpu") as dispatcher:
        batch, handle = dispatcher.dispatch(*tokens_of(rank, hidden=16))
        output = stand_in(batch, 2 * rank)
        outs = []
        for factor in (1, 4, 1):
            dispatcher.push(output * factor, handle)
            outs.append(dispatcher.combine_pushed(handle))
        assert_bit_equal(outs[1], outs[0] * 4)
        assert_bit_equal(outs[2], outs[0])


def test_rows_are_pushed_again_when_all_ranks_have_summed_the_first(interpreted):
    run_ranks(run_second_push, 2, setup=install_interpreter)


@pytest.mark.parametrize("reduce", ["exact", "per_rank"])
def test_a_dispatcher_of_inference_mode_serves_outside_and_the_other_way_round(reduce):
    with torch.inference_mode():
        inside = MoEQuantDispatcher(**SETTINGS, reduce=reduce, device="cpu")
        expected = layer_of(inside)
    outside = MoEQuantDispatcher(**SETTINGS, reduce=reduce, device="cpu")
    for dispatcher in (inside, outside):
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                assert_bit_equal(layer_of(dispatcher), expected)
                assert dispatcher.check() == 0
        dispatcher.close()


def run_foreign_modes(rank: int, ranks: int, transport: str) -> None:
    settings: dict[str, Any] = SETTINGS | {"hidden_size": 16, "transport": transport}
    with torch.device("meta"), torch.inference_mode():
        dispatcher = MoEQuantDispatcher(**settings, device="cpu")
    tokens = tokens_of(rank, hidden=16)

    def layer() -> torch.Tensor:
        return dispatcher(*tokens, lambda batch: stand_in(batch, 2 * rank))

    expected = layer()
    with torch.device("meta"):
        handle = dispatcher.dispatch_send(*tokens)
        assert_bit_equal(dispatcher.combine(stand_in(dispatcher.dispatch_recv(handle), 2 * rank), handle), expected)
    with torch.inference_mode():
        assert_bit_equal(layer(), expected)
    assert dispatcher.check() == 0
    dispatcher.close()


def test_a_default_device_and_inference_mode_change_nothing_on_gloo():
    run_ranks(run_foreign_modes, 2, "collective")


def test_a_default_device_and_inference_mode_change_nothing_on_symmetric(interpreted):
    run_ranks(run_foreign_modes, 2, "symmetric", setup=install_interpreter)


def test_a_dispatcher_is_not_copied():
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher:
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match="a dispatcher can't be copied: .* share one, or build another"):
                duplicate(dispatcher)


def test_threads_take_turns():
    """A layer each, on one slot; and a handle that another thread's dispatch made stale is refused, not answered."""
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher:
        expected = [layer_of(dispatcher, seed) for seed in range(4)]
        wrong = []

        def run(seed: int) -> None:
            for _ in range(30):
                if not torch.equal(layer_of(dispatcher, seed), expected[seed]):
                    wrong.append(seed)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def run_growth(rank: int, ranks: int, transport: str, layout: str) -> None:
    with MoEQuantDispatcher(**SMALL, transport=transport, layout=layout, device="cpu") as dispatcher:
        before = layer_of(dispatcher)
        _, stale = dispatcher.dispatch(*tokens_of(0, hidden=16))
        for most, now in ((5, 8), (20, 20), (20, 20)):
            dispatcher.ensure(most)
            assert dispatcher.config.max_tokens_per_rank == now
        assert_bit_equal(layer_of(dispatcher), before)
        x, ids, weights = (torch.cat([part, part]) for part in tokens_of(1, hidden=16))
        assert_bit_equal(dispatcher(x, ids, weights, stand_in)[:8], layer_of(dispatcher, 1))
        with pytest.raises(StaleHandleError):
            dispatcher.combine(dispatcher.output_buffer(), stale)
        with pytest.raises(ConfigMismatchError, match="max_tokens_per_rank"):
            dispatcher.ensure(21 + rank)


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_a_dispatcher_grows_on_all_ranks_and_keeps_its_bits_on_gloo(layout):
    run_ranks(run_growth, 2, "collective", layout)


def test_a_dispatcher_grows_on_all_ranks_and_keeps_its_bits_on_symmetric(interpreted):
    run_ranks(run_growth, 2, "symmetric", "ragged", setup=install_interpreter)


def test_growth_of_one_rank_needs_nobody():
    with MoEQuantDispatcher(**SETTINGS, device="cpu") as dispatcher:
        expected = layer_of(dispatcher)
        owner = dispatcher._transport.owner
        owner.workspaces["of experts",] = object()
        dispatcher.ensure(64)
        assert_bit_equal(layer_of(dispatcher), expected)
        assert not owner.workspaces and dispatcher.config.max_rows == 64
        with pytest.raises(ValueError, match="max_tokens_per_rank"):
            dispatcher.ensure(0)


def run_close(rank: int, ranks: int) -> None:
    """The memory that ranks share goes with close(), not with the object."""
    dispatcher = MoEQuantDispatcher(**SETTINGS, transport="symmetric", device="cpu")
    transport: Any = dispatcher._transport
    # a storage as Python sees it lives as long as a view of it
    block = weakref.ref(transport.memory.local.untyped_storage())
    mapped = transport.memory.local.untyped_storage().data_ptr()
    dispatcher.close()
    assert block() is None
    assert f"{mapped:x}-" not in Path("/proc/self/maps").read_text()


def test_close_lets_go_of_shared_memory_while_the_object_lives(interpreted):
    run_ranks(run_close, 2, setup=install_interpreter)


def test_close_frees_the_buffers_while_the_object_lives():
    dispatcher = MoEQuantDispatcher(**SETTINGS, device="cpu")
    buffers = [weakref.ref(buffer) for buffer in named(dispatcher._slots[0].buffers).values()]
    dispatcher.close()
    assert not any(buffer() is not None for buffer in buffers)


@pytest.mark.gpu
def test_close_gives_the_memory_of_a_gpu_back():
    before = torch.cuda.memory_allocated()
    dispatcher = MoEQuantDispatcher(**MANY, device="cuda")
    layer_of(dispatcher)
    assert torch.cuda.memory_allocated() - before >= MoEQuantDispatcher.buffer_bytes(**MANY)
    dispatcher.close()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("quant", ["fp8_e4m3fn", "none"])
def test_a_layer_takes_the_memory_that_buffer_bytes_says(layout, quant):
    """To the byte, but that torch takes memory by 512 bytes."""
    settings: dict[str, Any] = {"num_experts": 64, "top_k": 4, "hidden_size": 1024, "max_tokens_per_rank": 2048, "quant": quant}
    settings |= {"layout": layout}
    w13, w2 = torch.randn(64, 1024, 1024).bfloat16().cuda(), torch.randn(64, 1024, 512).bfloat16().cuda()
    layers = [GroupedExperts.from_weights(w13, w2, quant=quant) for _ in range(3)]
    x, ids = torch.randn(2048, 1024).bfloat16().cuda(), torch.rand(2048, 64).argsort(1)[:, :4].contiguous().cuda()
    weights = torch.rand(2048, 4).cuda()

    def taken() -> int:
        before = torch.cuda.memory_allocated()
        dispatcher = MoEQuantDispatcher(**settings, device="cuda")
        for layer in layers:
            dispatcher(x, ids, weights, layer)
        torch.cuda.synchronize()
        after = torch.cuda.memory_allocated()
        dispatcher.close()
        return after - before

    # what a device has once, tile counters
    taken()
    fused = layers[0].fuses(MoEQuantDispatcher(**settings, device="cuda").dispatch(x, ids, weights)[0])
    said = MoEQuantDispatcher.buffer_bytes(**settings, intermediate_size=512, fused=fused)
    assert said <= taken() <= said + 20 * 512


@pytest.mark.multigpu
def test_another_current_device_changes_nothing():
    with MoEQuantDispatcher(**SETTINGS, device="cuda:1") as dispatcher, torch.cuda.device(1):
        expected = layer_of(dispatcher)
        with torch.cuda.device(0):
            assert_bit_equal(layer_of(dispatcher), expected)
            assert dispatcher.check() == 0


def run_other_device(rank: int, ranks: int) -> None:
    """Every rank's current device is GPU 0, where rank 1's tensors are not."""
    torch.cuda.set_device(rank)
    tokens = tokens_of(rank, f"cuda:{rank}")
    with MoEQuantDispatcher(**SETTINGS, transport="symmetric") as dispatcher:
        expected = dispatcher(*tokens, lambda batch: stand_in(batch, 2 * rank))
        torch.cuda.set_device(0)
        results = [dispatcher(*tokens, lambda batch: stand_in(batch, 2 * rank))]
        thread = threading.Thread(target=lambda: results.append(dispatcher(*tokens, lambda batch: stand_in(batch, 2 * rank))))
        thread.start()
        thread.join()
        batch, handle = dispatcher.dispatch(*tokens)
        output = stand_in(batch, 2 * rank)
        dispatcher.push(output, handle)
        results.append(dispatcher.combine_pushed(handle))
        assert dispatcher.check() == 0
        for result in results:
            assert_bit_equal(result, expected)
        torch.cuda.set_device(rank)


@pytest.mark.multigpu
def test_another_current_device_changes_nothing_on_symmetric():
    run_ranks(run_other_device, 2, backend="cpu:gloo,cuda:nccl")
