"""Slots' buffers have names, sizes that are known before them, and parts that are kept from call to call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moequant.config import DispatcherConfig
from moequant.transport.base import Transport
from moequant.transport.buffers import BufferSpec, named
from moequant.transport.local import LocalTransport
from moequant.transport.packed import PackedTransport
from moequant.transport.padded import PaddedTransport
from moequant.transport.shared import SharedTransport
from moequant.transport.symmetric import SymmetricTransport

CPU = torch.device("cpu")
KINDS: list[type[Transport[Any]]] = [LocalTransport, PackedTransport, PaddedTransport, SharedTransport, SymmetricTransport]


def config(**changes: Any) -> DispatcherConfig:
    sizes = {"num_experts": 4, "top_k": 2, "hidden_size": 256, "max_tokens_per_rank": 6, "world_size": 1, "quant": "fp8_e4m3fn"}
    return DispatcherConfig(**{**sizes, **changes})


def local(**changes: Any) -> LocalTransport:
    return LocalTransport(config(**changes), 0, CPU, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("reduce", ["exact", "per_rank"])
@pytest.mark.parametrize("quant", ["fp8_e4m3fn", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_transport_says_what_it_will_need(kind, quant, reduce):
    specs = named(kind.buffer_specs(config(world_size=2, quant=quant, reduce=reduce)))
    assert all(isinstance(spec, BufferSpec) and spec.nbytes > 0 for spec in specs.values())
    assert ("scales" in specs) == (quant != "none") and ("partials" in specs) == (reduce == "per_rank")
    # made when float32 tokens come
    assert "routed_float32" not in specs


@pytest.mark.parametrize("reduce", ["exact", "per_rank"])
@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_what_is_allocated_is_what_was_said(reduce, layout):
    transport = local(reduce=reduce, layout=layout)
    specs, made = named(transport.buffer_specs(transport.config)), named(transport.allocate().buffers)
    assert {name: BufferSpec(tuple(buffer.shape), buffer.dtype) for name, buffer in made.items()} == specs


def test_the_part_of_a_number_of_tokens_is_kept_while_they_are_as_many():
    """And can be written in any mode, whichever it was made in."""
    slot = local(reduce="per_rank").allocate()
    with torch.inference_mode():
        taken = slot.take(3)
    assert slot.take(3) is taken and not taken.rows.is_inference()
    for part, whole in (
        (taken.rows_in_expert, slot.buffers.rows_in_expert),
        (taken.rows, slot.buffers.rows),
        (taken.partials, slot.buffers.partials),
    ):
        assert whole is not None and part.shape == (3, *whole.shape[1:]) and part.data_ptr() == whole.data_ptr()
    assert [slot.take(tokens).rows.shape[0] for tokens in (0, 6, 3)] == [0, 6, 3]


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_a_place_for_expert_output_is_made_once(layout):
    transport = local(layout=layout)
    slot = transport.allocate()
    assert slot.output is None
    output = transport.output_buffer(slot)
    assert transport.output_buffer(slot) is output and output.shape == slot.buffers.values.shape
