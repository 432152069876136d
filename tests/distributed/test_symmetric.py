"""The symmetric transport: the bits of one process, whatever the ranks and the settings, and no wait without an end.

On a CPU its kernels run in Triton's interpreter, in processes that share memory: the protocol's logic, not the memory's ordering.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from trials import Way, check_trial, install_interpreter, stand_in, there_and_back

from moequant import GroupedExperts, MoEQuantDispatcher
from moequant.batch import ExpertBatch
from moequant.testing import assert_bit_equal, run_ranks
from moequant.transport.symmetric import SymmetricTransport


def in_halves(dispatcher: MoEQuantDispatcher, inputs: list[torch.Tensor], first_expert: int) -> tuple[ExpertBatch, torch.Tensor]:
    handle = dispatcher.dispatch_send(*inputs)
    batch = dispatcher.dispatch_recv(handle)
    dispatcher.combine_send(stand_in(batch, first_expert), handle)
    return batch, dispatcher.combine_recv(handle)


def in_its_buffer(
    dispatcher: MoEQuantDispatcher, inputs: list[torch.Tensor], first_expert: int
) -> tuple[ExpertBatch, torch.Tensor]:
    batch, handle = dispatcher.dispatch(*inputs)
    return batch, dispatcher.combine(dispatcher.output_buffer().copy_(stand_in(batch, first_expert)), handle)


def pushed(dispatcher: MoEQuantDispatcher, inputs: list[torch.Tensor], first_expert: int) -> tuple[ExpertBatch, torch.Tensor]:
    if dispatcher.config.per_rank:
        return there_and_back(dispatcher, inputs, first_expert)
    batch, handle = dispatcher.dispatch(*inputs)
    dispatcher.push(stand_in(batch, first_expert), handle)
    return batch, dispatcher.combine_pushed(handle)


def in_waves(dispatcher: MoEQuantDispatcher, inputs: list[torch.Tensor], first_expert: int) -> tuple[ExpertBatch, torch.Tensor]:
    local = dispatcher.config.num_local_experts
    if local == 1:
        return there_and_back(dispatcher, inputs, first_expert)
    hidden, ids, weights = inputs
    _, handle = dispatcher.dispatch_first(hidden, ids, weights, 0, local // 2)
    dispatcher.dispatch_second(handle)
    batch = dispatcher._transport.expert_batch(dispatcher._slots[0], len(hidden))
    return batch, dispatcher.combine(stand_in(batch, first_expert), handle)


WAYS: tuple[Way, ...] = (there_and_back, in_halves, in_its_buffer, pushed, in_waves)
LAYOUTS = pytest.mark.parametrize("layout", ["padded", "ragged"])


def run_trials(rank: int, ranks: int, trials: Iterable[int], layout: str, device: str, tokens: int) -> None:
    device = device.format(rank=rank)
    for trial in trials:
        way = WAYS[trial // 3 % len(WAYS)]
        check_trial(rank, ranks, trial, settings_of(trial), None, device, way, tokens, layout)


def settings_of(trial: int) -> dict[str, Any]:
    """Without overlap, combine pulls the rows that it would push."""
    return {"transport": "symmetric", "overlap": trial % 2 == 0}


# of one and two ranks each way with each data type; of four and eight each way once, and of four all types, with and without overlap
@LAYOUTS
@pytest.mark.parametrize(("ranks", "trials"), [(1, range(15)), (2, range(15)), (4, (1, 3, 8, 10, 14)), (8, range(0, 15, 3))])
def test_interpreted_kernels_have_the_bits_of_one_process(ranks, trials, layout, interpreted):
    run_ranks(run_trials, ranks, trials, layout, "cpu", 20, setup=install_interpreter)


@pytest.mark.multigpu
@LAYOUTS
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_random_settings_have_the_bits_of_one_process(ranks, layout):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    run_ranks(run_trials, ranks, range(200), layout, "cuda:{rank}", 40, backend="cpu:gloo,cuda:nccl")


def run_subgroups(rank: int, ranks: int, trials: int, device: str, tokens: int) -> None:
    # odd and even ranks: group ranks differ from global ranks
    members = [[0, 2], [1, 3]]
    groups: list[Any] = [dist.new_group(group) for group in members]
    mine, device = rank % 2, device.format(rank=rank)
    # both groups at the same time, each with trials of its own
    for trial in range(mine, trials, 2):
        way = WAYS[trial // 2 % len(WAYS)]
        layout = ("padded", "ragged")[trial // 4 % 2]
        check_trial(members[mine].index(rank), 2, trial, settings_of(trial // 8), groups[mine], device, way, tokens, layout)
    with pytest.raises(ValueError, match="not a member of the group"):
        MoEQuantDispatcher(
            groups[1 - mine], num_experts=4, top_k=1, hidden_size=8, max_tokens_per_rank=1, transport="symmetric", device=device
        )


def test_two_interpreted_groups_of_two_in_a_world_of_four_work_apart(interpreted):
    run_ranks(run_subgroups, 4, 16, "cpu", 20, setup=install_interpreter)


@pytest.mark.multigpu
def test_two_groups_of_two_gpus_work_apart():
    if torch.cuda.device_count() < 4:
        pytest.skip("needs 4 GPUs")
    run_ranks(run_subgroups, 4, 100, "cuda:{rank}", 40, backend="cpu:gloo,cuda:nccl")


def run_int8_layers(rank: int, ranks: int, sizes: tuple[int, int, int], device: str) -> None:
    """Whole int8 layers; ranks have other tokens, and the last one has none."""
    (most, hidden, inner), device = sizes, device.format(rank=rank)
    generator = torch.Generator().manual_seed(rank)
    tokens = 0 if rank == ranks - 1 else most - rank
    ids = torch.rand(tokens, 2 * ranks, generator=generator).argsort(1)[:, :2].contiguous()
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
    x, weights = torch.randn(tokens, hidden, generator=generator).bfloat16(), torch.rand(tokens, 2, generator=generator)
    shapes = (2, 2 * inner, hidden), (2, hidden, inner)
    w13, w2 = ((torch.randn(shape, generator=generator) * shape[2] ** -0.5).bfloat16().to(device) for shape in shapes)
    experts = GroupedExperts.from_weights(w13, w2, quant="int8")
    settings: dict[str, Any] = {"num_experts": 2 * ranks, "top_k": 2, "hidden_size": hidden, "max_tokens_per_rank": most}
    inputs = x.to(device), ids.to(device), weights.to(device)
    for reduce in ("exact", "per_rank"):
        outputs = []
        for transport in ("symmetric", "collective"):
            with MoEQuantDispatcher(**settings, quant="int8", reduce=reduce, transport=transport, device=device) as dispatcher:
                outputs.append(dispatcher(*inputs, experts))
                assert dispatcher.check() == 0
        assert_bit_equal(outputs[0], outputs[1], reduce)
        assert outputs[0].shape == (tokens, hidden) and bool(outputs[0].isfinite().all())
        # whatever is the same everywhere could still be nothing
        assert tokens == 0 or bool((outputs[0][(ids >= 0).any(1).to(device)] != 0).any(1).all())


@pytest.mark.parametrize("ranks", [2, 3])
def test_interpreted_int8_layers_have_the_bits_of_the_collective_transport(ranks, interpreted):
    run_ranks(run_int8_layers, ranks, (9, 136, 72), "cpu", setup=install_interpreter)


@pytest.mark.multigpu
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_int8_layers_on_gpus_have_the_bits_of_the_collective_transport(ranks):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    run_ranks(run_int8_layers, ranks, (256, 1032, 384), "cuda:{rank}", backend="cpu:gloo,cuda:nccl")


@pytest.mark.parametrize("seconds", [1e-3, 60.0, 2200.0, 1e6])
def test_time_limits_are_what_they_are_given_as(seconds):
    """In units of 2**20 ns, which the kernels compare as int32."""
    units = SymmetricTransport._units(seconds)
    assert 1 <= units < 2**31
    assert abs(units * 2**20 * 1e-9 - seconds) <= 2e-3
