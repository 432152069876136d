"""The symmetric transport: the bits of one process, whatever the ranks and the settings, and no wait without an end.

On a CPU its kernels run in Triton's interpreter, in processes that share memory: the protocol's logic, not the memory's ordering.
"""

from __future__ import annotations

import pytest
import torch
from trials import Way, check_trial, stand_in, there_and_back

from moequant import MoEQuantDispatcher
from moequant.batch import ExpertBatch
from moequant.testing import run_ranks


def install_interpreter() -> None:
    import interpreter

    interpreter.install()


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MOEQUANT_CPU_KERNELS", "1")


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


WAYS: tuple[Way, ...] = (there_and_back, in_halves, in_its_buffer, pushed)


def run_trials(rank: int, ranks: int, trials: int, device: str) -> None:
    device = device.format(rank=rank)
    for trial in range(trials):
        check_trial(rank, ranks, trial, {"transport": "symmetric"}, None, device, WAYS[trial // 3 % len(WAYS)])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_interpreted_kernels_have_the_bits_of_one_process(ranks, interpreted):
    run_ranks(run_trials, ranks, 12, "cpu", setup=install_interpreter, timeout=120)


@pytest.mark.multigpu
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_random_settings_have_the_bits_of_one_process(ranks):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    run_ranks(run_trials, ranks, 200, "cuda:{rank}", backend="cpu:gloo,cuda:nccl", timeout=500)
