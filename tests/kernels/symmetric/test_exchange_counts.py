"""What one rank does in an exchange of counts: the words it sends, the places it works out, and waits that end."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

import compile_peers
from compile_case import cases
from moequant.config import ROW_ALIGNMENT, round_up
from peer_blocks import EPOCHS, LONG, SHORT, PeerBlocks, assert_same_blocks, fault_word, following

COUNTS = 0
# how many calls the slot has seen before this one, and the word of this one: layer 5 of something
CALLS, CALL = 11, 7 << 10 | 5


def words_of(epoch: int, numbers: torch.Tensor) -> torch.Tensor:
    return (epoch << 32) + numbers.long()


def make_blocks(counts: torch.Tensor, rank: int, epoch: int, device: str) -> PeerBlocks:
    """Before the call that begins the epoch after `epoch`: the other ranks' counts, (W, E), are there, this rank's are not."""
    ranks, experts = counts.shape
    blocks = PeerBlocks(
        ranks,
        device,
        words=((ranks, experts + 2), torch.int64),
        counts=((experts,), torch.int32),
        offsets=((experts,), torch.int32),
        num_tokens=((experts // ranks,), torch.int32),
        expert_start=((experts // ranks,), torch.int32),
    )
    blocks["epoch"][rank] = epoch
    blocks["calls"][rank] = CALLS
    blocks["counts"][rank] = counts[rank]
    blocks["status"][rank] = torch.tensor([100, 200, 300])
    numbers = torch.cat([counts, torch.tensor([[CALLS + 1, CALL]] * ranks)], dim=1).to(device)
    blocks["words"][rank] = words_of(following(epoch), numbers)
    blocks["words"][rank, rank] = words_of(epoch, numbers[rank])
    return blocks


def run(blocks: PeerBlocks, rank: int, capacity: int, limit: int = LONG, shift: int = 0, ragged: bool = False) -> None:
    """capacity: rows of an expert, or, ragged, of a rank."""
    from moequant.kernels.symmetric.exchange_counts import Counts, exchange_counts

    slot = Counts(
        counts=blocks["counts"][rank],
        offsets=blocks["offsets"][rank],
        num_tokens=blocks["num_tokens"][rank],
        calls=blocks["calls"][rank],
        status=blocks["status"][rank],
        words=blocks.offsets["words"] + shift,
        expert_start=blocks["expert_start"][rank] if ragged else None,
        alignment=tl.constexpr(ROW_ALIGNMENT),
    )
    exchange_counts(slot, blocks.peers_of(rank, limit, shift), capacity, CALL)


def expect_words(blocks: PeerBlocks, rank: int, epoch: int, counts: torch.Tensor) -> PeerBlocks:
    """What is sent, whatever comes."""
    expected = blocks.snapshot()
    numbers = torch.cat([counts[rank], torch.tensor([CALLS + 1, CALL])])
    expected["words"][:, rank] = words_of(following(epoch), numbers).to(blocks.memory.device)
    expected["epoch"][rank] = following(epoch)
    expected["calls"][rank] = CALLS + 1
    return expected


def first_rows(wanted: list[int], capacity: int) -> list[int]:
    """Where the experts of one rank begin, which get so many rows."""
    first, starts = 0, []
    for rows in wanted:
        starts.append(min(first, capacity))
        first += round_up(rows, ROW_ALIGNMENT)
    return starts


def expect_places(
    blocks: PeerBlocks, rank: int, epoch: int, counts: torch.Tensor, capacity: int, ragged: bool = False
) -> PeerBlocks:
    expected = expect_words(blocks, rank, epoch, counts)
    wanted, before = counts.sum(0), counts[:rank].sum(0)
    room = torch.full_like(wanted, capacity)
    if ragged:
        starts = torch.tensor([first_rows(experts, capacity) for experts in wanted.view(len(counts), -1).tolist()])
        expected["expert_start"][rank] = starts[rank]
        room -= starts.flatten()
        before = (before + starts.flatten()).clamp(max=capacity)
    placed = wanted.minimum(room)
    expected["offsets"][rank] = before
    expected["num_tokens"][rank] = placed.view(len(counts), -1)[rank]
    expected["status"][rank, 1] += int((wanted - placed).sum())
    return expected


def expect_nothing(
    blocks: PeerBlocks, rank: int, epoch: int, counts: torch.Tensor, capacity: int, ragged: bool = False
) -> PeerBlocks:
    """After a fault no row has a place, and the batch is empty."""
    expected = expect_words(blocks, rank, epoch, counts)
    expected["offsets"][rank] = capacity
    expected["num_tokens"][rank] = 0
    if ragged:
        expected["expert_start"][rank] = 0
    return expected


@pytest.fixture(params=[False, True], ids=["padded", "ragged"])
def ragged(request) -> bool:
    return request.param


def test_the_worked_example(device):
    counts = torch.tensor([[2, 4], [1, 3]])
    blocks = make_blocks(counts, 1, 0, device)
    run(blocks, 1, 5)
    assert blocks["offsets"][1].tolist() == [2, 4]
    assert blocks["num_tokens"][1].tolist() == [5]
    assert blocks["status"][1].tolist() == [100, 202, 300]
    assert blocks["words"][0, 1].tolist() == [1 << 32 | 1, 1 << 32 | 3, 1 << 32 | CALLS + 1, 1 << 32 | CALL]


def test_the_ragged_worked_example(device):
    counts = torch.tensor([[2, 9, 8, 1], [1, 8, 9, 16]])
    blocks = make_blocks(counts, 1, 0, device)
    expected = expect_places(blocks, 1, 0, counts, 32, ragged=True)
    run(blocks, 1, 32, ragged=True)
    assert_same_blocks(blocks, expected)
    assert blocks["expert_start"][1].tolist() == [0, 32]
    assert blocks["num_tokens"][1].tolist() == [17, 0]
    assert blocks["offsets"][1].tolist() == [2, 25, 8, 32]
    assert blocks["status"][1].tolist() == [100, 200 + 1 + 17, 300]


@pytest.mark.parametrize("epoch", EPOCHS)
@pytest.mark.parametrize(
    ("ranks", "local_experts", "rank", "capacity"), [(1, 1, 0, 16), (2, 1, 0, 99), (3, 5, 2, 7), (3, 5, 1, 64), (8, 3, 5, 40)]
)
def test_counts_reach_all_ranks_and_rows_get_their_places(ranks, local_experts, rank, capacity, epoch, ragged, device):
    """Room for all rows, and for fewer; every byte of every rank that is not theirs to change stays."""
    counts = torch.randint(0, 9, (ranks, ranks * local_experts))
    blocks = make_blocks(counts, rank, epoch, device)
    expected = expect_places(blocks, rank, epoch, counts, capacity, ragged)
    run(blocks, rank, capacity, ragged=ragged)
    assert_same_blocks(blocks, expected)


def test_no_rank_has_a_token(ragged, device):
    counts = torch.zeros(3, 6, dtype=torch.long)
    blocks = make_blocks(counts, 1, 4, device)
    expected = expect_places(blocks, 1, 4, counts, 16, ragged)
    run(blocks, 1, 16, ragged=ragged)
    assert_same_blocks(blocks, expected)


@pytest.mark.parametrize("hot", [0, 2, 5])
def test_an_expert_with_everything_leaves_the_others_of_its_rank_what_is_left(hot, device):
    """Experts behind a full buffer begin at its end, and have no row."""
    counts = torch.randint(1, 9, (2, 6))
    counts[:, hot] = 500
    blocks = make_blocks(counts, 1, 2, device)
    expected = expect_places(blocks, 1, 2, counts, 800, ragged=True)
    run(blocks, 1, 800, ragged=True)
    assert_same_blocks(blocks, expected)
    assert int(blocks["status"][1, 1]) > 200


@pytest.mark.parametrize("epoch", EPOCHS)
@pytest.mark.parametrize(("word", "late"), [(0, [2]), (3, [0, 2]), (8, [3]), (9, [0])])
def test_a_rank_that_does_not_come_is_blamed_at_all_ranks(word, late, epoch, ragged, device):
    """One word of an earlier epoch is enough, a count, the number of the call, or what it is; the first such rank is the culprit."""
    counts = torch.randint(1, 9, (4, 8))
    blocks = make_blocks(counts, 1, epoch, device)
    blocks["words"][1, late, word] = words_of(epoch, blocks["words"][1, late, word] & 0xFFFFFFFF)
    # a rank that has noticed an earlier fault is not told of a later one
    blocks["abort"][3] = 5
    expected = expect_nothing(blocks, 1, epoch, counts, 32, ragged)
    expected.expect_fault(1, fault_word(following(epoch), COUNTS, late[0]), told=True)
    run(blocks, 1, 32, limit=SHORT, ragged=ragged)
    assert_same_blocks(blocks, expected)


@pytest.mark.parametrize("all_there", [True, False])
def test_a_fault_that_is_known_ends_the_wait_and_nothing_has_a_place(all_there, ragged, device):
    counts = torch.randint(1, 9, (3, 6))
    blocks = make_blocks(counts, 0, 8, device)
    if not all_there:
        blocks["words"][0, 1:] = 0
    blocks["abort"].fill_(fault_word(9, COUNTS, 2))
    expected = expect_nothing(blocks, 0, 8, counts, 32, ragged)
    expected.expect_fault(0, fault_word(9, COUNTS, 2), told=False)
    run(blocks, 0, 32, ragged=ragged)
    assert_same_blocks(blocks, expected)


def test_hostile_counts_leave_sums_in_order(ragged, device):
    """Negative and huge counts of another rank count as 0 and 2**24."""
    counts = torch.tensor([[0, 0, 0, 0], [5, 6, 7, 8]])
    blocks = make_blocks(counts, 1, 0, device)
    blocks["words"][1, 0, :4] = words_of(1, torch.tensor([2**31 - 1, 2**32 - 5, 2**31, 2**24 + 1]))
    counts[0] = torch.tensor([2**24, 0, 0, 2**24])
    expected = expect_places(blocks, 1, 0, counts, 10, ragged)
    run(blocks, 1, 10, ragged=ragged)
    assert_same_blocks(blocks, expected)


def test_hostile_counts_of_many_experts_leave_first_rows_in_the_buffer(device):
    """Their sum is no int32, and the buffer is as large as one can be."""
    capacity = 2**31 - 16
    counts = torch.full((1, 256), 2**24)
    blocks = make_blocks(counts, 0, 0, device)
    blocks["words"][0, 0, -2:] = words_of(1, torch.tensor([CALLS + 1, CALL]))
    expected = expect_places(blocks, 0, 0, counts, capacity, ragged=True)
    run(blocks, 0, capacity, ragged=True)
    assert_same_blocks(blocks, expected)
    assert blocks["expert_start"][0, -1].item() == capacity


# of another rank: what differs in its number and its word, and whether it is of another call
@pytest.mark.parametrize(("number", "word", "strange"), [(2, 0, True), (0, 1 << 10, True), (0, 1, True), (0, -5, False)])
def test_ranks_in_another_call_are_counted(number, word, strange, device):
    """In one of another number, slot or dispatcher, or of another layer; a layer that is not said goes with any."""
    counts = torch.randint(0, 9, (4, 4))
    blocks = make_blocks(counts, 0, 3, device)
    blocks["words"][0, 1:3, 4] += number
    blocks["words"][0, 1:3, 5] += word
    expected = expect_places(blocks, 0, 3, counts, 99)
    expected["status"][0, 2] += 2 * strange
    run(blocks, 0, 99)
    assert_same_blocks(blocks, expected)


def test_words_may_lie_two_gigabytes_away(device):
    """The words' own place counts in 64 bits, where the block's offset is below 2**31 and the word's above."""
    counts = torch.randint(0, 9, (4, 64))
    blocks = make_blocks(counts, 3, 0, device)
    expected = expect_places(blocks, 3, 0, counts, 99)
    # as if each block began so much earlier
    shift = 2**31 - 256 - blocks.offsets["words"]
    blocks.peers -= shift
    run(blocks, 3, 99, shift=shift)
    assert_same_blocks(blocks, expected)


COMPILE_CASES = cases(compile_peers.exchange_counts, {}, {"ragged": True}, wide=False, may_spill=True, nvidia=True)
