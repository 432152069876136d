"""One rank's signals reach all ranks, and a wait ends: when all have come, when the time is up, when a fault is known."""

from __future__ import annotations

import time

import pytest
import torch

import compile_peers
from compile_case import cases
from peer_blocks import EPOCHS, LONG, NO_FAULT, SHORT, PeerBlocks, assert_same_blocks, fault_word, following, output_flag

ROWS, OUTPUTS = 1, 2


def make_blocks(ranks: int, rank: int, epoch: int, flags: list[int], device: str) -> PeerBlocks:
    """At rank, in the given epoch, with these flags; all other ranks' flags hold what nobody may change."""
    blocks = PeerBlocks(ranks, device)
    blocks["flags"].fill_(77)
    blocks["flags"][rank] = torch.tensor(flags)
    blocks["epoch"][rank] = epoch
    return blocks


def run(
    blocks: PeerBlocks, rank: int, phase: int = OUTPUTS, limit: int = LONG, signal: bool = True, wait: bool = True, way: int = 0
) -> None:
    from moequant.kernels.symmetric.signal_and_wait import signal_and_wait

    signal_and_wait(blocks.peers_of(rank, limit), blocks["status"][rank], phase, signal, wait, way)


def expect_signal(blocks: PeerBlocks, rank: int, epoch: int, way: int = 0) -> PeerBlocks:
    """Of outputs."""
    expected = blocks.snapshot()
    expected["flags"][:, rank] = output_flag(epoch, way)
    expected["epoch"][rank] = epoch
    return expected


def test_the_worked_example(device):
    blocks = make_blocks(2, 0, 6, [26, 28], device)
    run(blocks, 0, way=2)
    assert blocks["flags"].tolist() == [[30, 28], [30, 77]]
    assert blocks["epoch"][0].item() == 7
    assert blocks["status"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert blocks["fault"][0].item() == NO_FAULT


@pytest.mark.parametrize("epoch", EPOCHS)
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1), (3, 0), (8, 7)])
def test_a_round_in_which_all_come(ranks, rank, epoch, device):
    """Ranks that signal late have the same epoch, those ahead the one after it, on both sides of the wrap."""
    new = following(epoch)
    flags = [output_flag(new, 3) if peer % 2 else output_flag(following(new)) for peer in range(ranks)]
    flags[rank] = output_flag(epoch)
    blocks = make_blocks(ranks, rank, epoch, flags, device)
    expected = expect_signal(blocks, rank, new, 3)
    run(blocks, rank, way=3)
    assert_same_blocks(blocks, expected)


@pytest.mark.parametrize("epoch", EPOCHS)
def test_ranks_whose_outputs_come_back_in_another_way_are_counted(epoch, device):
    """Not those whose next flag is there already, which no longer say."""
    new = following(epoch)
    blocks = make_blocks(6, 2, epoch, [output_flag(new, way) for way in (0, 1, 2, 3, 1, 7)], device)
    expected = expect_signal(blocks, 2, new, 1)
    expected["status"][2, 2] = 2
    run(blocks, 2, way=1)
    assert_same_blocks(blocks, expected)


@pytest.mark.parametrize("epoch", EPOCHS)
def test_a_signal_alone_waits_for_nobody(epoch, device):
    blocks = make_blocks(3, 1, epoch, [output_flag(epoch)] * 3, device)
    expected = expect_signal(blocks, 1, following(epoch))
    blocks["fault"][1] = expected["fault"][1] = 5
    run(blocks, 1, wait=False)
    assert_same_blocks(blocks, expected)


def test_a_wait_alone_is_for_the_epoch_that_has_begun_and_says_nothing(device):
    blocks = make_blocks(3, 2, -(2**31), [-(2**31), 1 - 2**31, -(2**31)], device)
    # of an earlier wait
    blocks["fault"][2] = 5
    expected = blocks.snapshot()
    expected["fault"][2] = NO_FAULT
    run(blocks, 2, phase=ROWS, signal=False)
    assert_same_blocks(blocks, expected)


@pytest.mark.parametrize("epoch", EPOCHS)
@pytest.mark.parametrize("phase", [ROWS, OUTPUTS])
@pytest.mark.parametrize("late", [[0], [2, 4], [4]])
def test_the_first_rank_that_does_not_come_is_blamed_at_all_ranks(late, phase, epoch, device):
    new = following(epoch)
    flag = output_flag if phase == OUTPUTS else int
    blocks = make_blocks(5, 1, epoch, [flag(epoch if peer in late else new) for peer in range(5)], device)
    # a rank that has noticed an earlier fault is not told of a later one
    blocks["abort"][3] = 5
    expected = expect_signal(blocks, 1, new)
    expected["flags"][:, 1] = flag(new)
    expected.expect_fault(1, fault_word(new, phase, late[0]), told=True)
    run(blocks, 1, phase, SHORT)
    assert_same_blocks(blocks, expected)


def test_the_encoding_of_a_fault(device):
    """step << 8 | rank, step = (epoch * 4 + phase) modulo 2**22."""
    for epoch, step in [(5, 22), (2**20 + 5, 22), (-1, 2**22 - 2), (1 - 2**31, 6)]:
        blocks = make_blocks(8, 0, epoch, [output_flag(epoch)] * 7 + [output_flag(epoch - 1)], device)
        run(blocks, 0, limit=SHORT, signal=False)
        assert blocks["abort"].flatten().tolist() == [step << 8 | 7] * 8
        assert blocks["record"][0].item() == step << 8 | 7


@pytest.mark.parametrize("missing", [[], [0], [0, 2]])
def test_a_fault_that_is_known_ends_the_wait_and_stays(missing, device):
    """At once, whoever is missing; nobody is told again, and the peers still get the signal."""
    blocks = make_blocks(3, 1, 40, [0 if peer in missing else output_flag(41) for peer in range(3)], device)
    blocks["abort"][1] = fault_word(38, ROWS, 2)
    for epoch in (41, 42):
        expected = expect_signal(blocks, 1, epoch)
        expected.expect_fault(1, fault_word(38, ROWS, 2), told=False)
        # of this process: on a busy machine others have the rest
        start = time.process_time()
        run(blocks, 1)
        assert_same_blocks(blocks, expected)
        assert time.process_time() - start < 5.0


@pytest.mark.parametrize("ranks", [2, 5])
def test_the_time_limit_is_kept(ranks, device):
    """200 ms, and little more."""
    for limit, least in [(SHORT, 0.0), (200_000_000 >> 20, 0.19)]:
        blocks = make_blocks(ranks, 0, 1, [output_flag(2)] + [output_flag(1)] * (ranks - 1), device)
        start, busy = time.monotonic(), time.process_time()
        run(blocks, 0, limit=limit)
        assert blocks["record"][0].item() == fault_word(2, OUTPUTS, 1)
        # the first one compiles the kernel, too; what others have of a busy machine is no part of the wait
        assert not least or (least < time.monotonic() - start and time.process_time() - busy < 2.0)


COMPILE_CASES = cases(compile_peers.signal_and_wait, {}, wide=False, nvidia=True)
