"""Guards around the buffers that other ranks store to: whoever stores outside them is heard of, with the place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from trials import install_interpreter, stand_in

from moequant import GuardError, MoEQuantDispatcher
from moequant.testing import run_ranks
from moequant.transport.base import BufferSpec
from moequant.transport.buffers import named
from moequant.transport.guards import GUARD_BYTES, Guards, offsets_of

SETTINGS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 40, "max_tokens_per_rank": 3, "transport": "symmetric"}
LAYOUTS = pytest.mark.parametrize("layout", ["padded", "ragged"])
SPECS = {
    "flags": BufferSpec((3,), torch.int32),
    "rows": BufferSpec((2, 128), torch.bfloat16),
    "none": BufferSpec((0,), torch.int32),
}


def guarded(slots: int) -> tuple[torch.Tensor, Guards, int]:
    """Zeros with their guards, as the transport lays its block out, and a slot's bytes."""
    _, block = offsets_of(SPECS)
    memory = torch.zeros(slots * block + 256, dtype=torch.uint8)
    return memory, Guards(memory, SPECS, slots), block


def test_buffers_are_aligned_and_all_that_lies_between_them_is_guarded():
    offsets, block = offsets_of(SPECS)
    assert offsets == {"flags": 256, "rows": 768, "none": 1536} and block == 1792
    memory, _, _ = guarded(2)
    free = memory == 0
    for slot in range(2):
        for name, begin in offsets.items():
            begin += slot * block
            end = begin + SPECS[name].nbytes
            assert free[begin:end].all()
            assert not free[begin - GUARD_BYTES : begin].any() and not free[end : end + GUARD_BYTES].any()
            free[begin:end] = False
    assert free.nonzero().flatten().tolist() == [2 * block + byte for byte in range(4)], "the abort word"


def test_each_byte_of_the_gaps_is_watched_and_no_other():
    memory, guards, _ = guarded(2)
    watched = [byte for byte in range(0, len(memory), 1) if memory[byte] != 0]
    memory[memory == 0] = 7
    guards.check(memory, 0)
    for byte in watched[::13] + watched[-1:]:
        kept = int(memory[byte])
        memory[byte] = 0
        with pytest.raises(GuardError, match="rank 3: 1 bytes between"):
            guards.check(memory, 3)
        memory[byte] = kept
    guards.check(memory, 0)


def test_the_error_names_the_buffers_on_both_sides_and_how_far_off_it_was():
    memory, guards, block = guarded(2)
    begin = block + 768 + 512
    memory[begin + 10 : begin + 14] = 0
    said = (
        '4 bytes between "rows" of slot 1 and "none" of slot 1 were overwritten, from 10 bytes behind "rows" of slot 1 to 243 bytes'
    )
    with pytest.raises(GuardError, match=said):
        guards.check(memory, 0)


def run_stray_stores(rank: int, ranks: int, layout: str, device: str) -> list[str]:
    """What rank 1 hears of stores around its buffers, one after the other, and rank 0 does not."""
    device = device.format(rank=rank)
    # the rows that combine pulls are in a buffer of their own
    dispatcher = MoEQuantDispatcher(**SETTINGS, slots=2, overlap=False, layout=layout, device=device)
    inputs = torch.ones(2, 40).bfloat16(), torch.tensor([[0, 3], [1, 2]]), torch.ones(2, 2)
    batch, handle = dispatcher.dispatch(*(x.to(device) for x in inputs), slot=1)
    dispatcher.combine(stand_in(batch), handle)
    assert dispatcher.check() == 0
    transport: Any = dispatcher._transport
    specs, heard = named(transport.buffer_specs(dispatcher.config)), []
    # of each buffer the byte before it, and the one behind it
    begins = {name: transport.slot_bytes + offset for name, offset in transport.offsets.items()}
    places = [place for name, begin in begins.items() for place in (begin - 1, begin + specs[name].nbytes)]
    for place in places:
        byte = transport.memory.local[place : place + 1]
        kept = byte.clone()
        if rank == 1:
            byte.zero_()
        heard += refused(dispatcher.check)
        byte.copy_(kept)
    assert dispatcher.check() == 0
    if rank == 1:
        transport.memory.local[places[-1]] = 0
    heard += refused(dispatcher.close)
    assert dispatcher._closed and transport.memory.local.numel() == 0
    return heard


def refused(step: Callable[[], object]) -> list[str]:
    try:
        step()
    except GuardError as error:
        return [str(error)]
    return []


def check_stray_stores(heard: list[list[str]]) -> None:
    names = ["flags", "count_words", "values", "headers", "returns", "output"]
    assert heard[0] == [] and len(heard[1]) == 2 * len(names) + 1
    for index, name in enumerate(names):
        before, behind = heard[1][2 * index : 2 * index + 2]
        assert before.startswith("rank 1: 1 bytes between") and f'and "{name}" of slot 1 were' in before
        assert behind.startswith(f'rank 1: 1 bytes between "{name}" of slot 1 and')
    assert heard[1][-1] == heard[1][-2], "close says the same"


@LAYOUTS
def test_check_and_close_say_what_was_stored_outside_a_buffer(layout, interpreted, monkeypatch):
    monkeypatch.setenv("MOEQUANT_CHECK_GUARDS", "1")
    check_stray_stores(run_ranks(run_stray_stores, 2, layout, "cpu", setup=install_interpreter))


@pytest.mark.multigpu
@LAYOUTS
def test_check_and_close_on_gpus_say_what_was_stored_outside_a_buffer(layout):
    check_stray_stores(run_ranks(run_stray_stores, 2, layout, "cuda:{rank}", backend="cpu:gloo,cuda:nccl"))


def run_without_the_switch(rank: int, ranks: int, settings: dict[str, Any]) -> int:
    dispatcher = MoEQuantDispatcher(**SETTINGS, **settings, device="cpu")
    transport: Any = dispatcher._transport
    transport.memory.local[0] = 0
    assert dispatcher.check() == 0
    with pytest.raises(GuardError, match=f'rank {rank}: 1 bytes between the beginning and "flags" of slot 0'):
        transport.check_guards()
    specs = named(transport.buffer_specs(dispatcher.config))
    shared = sum(specs[name].nbytes for name in [*transport.offsets, "guards"])
    # the abort word has 256 bytes of its own
    assert transport.memory.local.numel() == shared + 256
    made = named(dispatcher._slots[0].buffers).values()
    told = MoEQuantDispatcher.buffer_bytes(**SETTINGS, **settings, world_size=ranks)
    assert sum(x.numel() * x.itemsize for x in made) == told - specs["guards"].nbytes
    # expert output is shared by those alone whose combine pulls it
    assert ("output" in specs) == (not settings.get("overlap", True) and settings.get("reduce") != "per_rank")
    dispatcher.close()
    return shared


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"overlap": False},
        {"overlap": False, "layout": "ragged"},
        {"reduce": "per_rank", "overlap": False},
        {"layout": "ragged"},
    ],
    ids=str,
)
def test_nobody_looks_without_the_switch_and_buffer_bytes_counts_the_guards(settings, interpreted, monkeypatch):
    monkeypatch.setenv("MOEQUANT_CHECK_GUARDS", "0")
    shared = run_ranks(run_without_the_switch, 2, settings, setup=install_interpreter)
    assert min(shared) > 6 * GUARD_BYTES
