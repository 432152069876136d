"""A rank's rows of a token become one weighted sum at the token's rank, with the reference's bits; then all ranks are told."""

from __future__ import annotations

import pytest
import torch

from compile_case import cases, empty
from compile_peers import peers_of
from moequant import reference
from moequant.batch import ceil_div
from peer_blocks import EPOCHS, LONG, NO_FAULT, SHORT, PeerBlocks, assert_same_blocks, fault_word, following, output_flag

OUTPUTS = 2
RANKS, RANK, MAX_TOKENS = 3, 1, 6
# L, M, H, top_k, scale words, counts
SHAPES = [
    (1, 16, 1, 1, 0, [16]),
    (3, 8, 300, 4, 4, [3, 0, 8]),
    (2, 9, 1100, 6, 12, [9, 1]),
    (4, 16, 64, 2, 0, [0, 0, 0, 0]),
    (2, 20, 40, 9, 4, [20, 17]),
]


class Sums:
    """Rows and headers of rank 1: tokens of all ranks with some of their entries here. What is not valid is NaN, or 0x55.

    ragged: the experts' rows lie in one buffer, a few rows apart, in which M rows of the last have room.
    """

    def __init__(self, shape, device, epoch=0, dtype=torch.bfloat16, ragged=False):
        self.experts, capacity, self.columns, self.top_k, self.scale_words, counts = shape
        starts = [expert * capacity for expert in range(self.experts)]
        if ragged:
            starts = [sum(min(max(count, 0), capacity) + 3 for count in counts[:expert]) for expert in range(self.experts)]
        rows = starts[-1] + capacity
        self.lie = (rows,) if ragged else (self.experts, capacity)
        self.expert_start = torch.tensor(starts, dtype=torch.int32, device=device) if ragged else None
        self.counts = torch.tensor(counts, dtype=torch.int32)
        self.epoch, self.device = epoch, device
        lanes = 4 * ceil_div(self.top_k, 4)
        self.weights_word = self.scale_words + 4 + lanes
        self.blocks = PeerBlocks(
            RANKS,
            device,
            headers=((*self.lie, self.weights_word + lanes), torch.int32),
            returns=((RANKS, MAX_TOKENS, self.columns), torch.bfloat16),
        )
        self.blocks["epoch"][RANK] = epoch
        self.blocks["flags"][RANK] = output_flag(following(epoch))
        self.y = torch.full((rows, self.columns), float("nan"), dtype=dtype)
        self.valid = [
            first + row for first, count in zip(starts, counts, strict=True) for row in range(min(max(count, 0), capacity))
        ]
        self.y[self.valid] = torch.randn(len(self.valid), self.columns).to(dtype)
        self._give_headers()

    def _give_headers(self) -> None:
        """Deals the rows to tokens, up to K rows each, whose other entries are absent."""
        held: list[int] = []
        left, tokens = torch.randperm(len(self.valid)).tolist(), torch.randperm(RANKS * MAX_TOKENS).tolist()
        while left and tokens:
            source, token = divmod(tokens.pop(), MAX_TOKENS)
            entries = torch.randperm(self.top_k)[: int(torch.randint(1, self.top_k + 1, ()))].tolist()
            rows = dict.fromkeys(range(self.top_k), -1) | {k: self.valid[left.pop()] for k in entries if left}
            held = [row for row in rows.values() if row >= 0]
            for k, row in rows.items():
                if row >= 0:
                    self.header(row)[self.scale_words :][:4] = torch.tensor([token * self.top_k + k, source, held[0], 0])
            leading = self.header(held[0])
            leading[self.scale_words + 4 :][: self.top_k] = torch.tensor(list(rows.values()))
            weights = torch.randn(self.top_k)
            # of an entry that is absent, whatever the weight
            weights[[row < 0 for row in rows.values()]] = float("nan")
            leading[self.weights_word :][: self.top_k] = weights.view(torch.int32)
        # more rows than tokens have entries: they follow one that leads
        for place in left:
            self.header(self.valid[place])[self.scale_words :][:4] = torch.tensor([0, 0, held[0], 0])

    def header(self, flat: int) -> torch.Tensor:
        return self.blocks["headers"][RANK].view(len(self.y), -1)[flat]

    def run(self, wait: bool = True, limit: int = LONG) -> None:
        from moequant.kernels.library.symmetric import headers_of
        from moequant.kernels.symmetric.push_rank_sums import Sums as Place, push_rank_sums

        blocks = self.blocks
        push_rank_sums(
            self.y.to(self.device).view(*self.lie, self.columns),
            headers_of(blocks["headers"][RANK], self.scale_words),
            self.counts.to(self.device),
            self.expert_start,
            blocks.peers_of(RANK, limit),
            Place(blocks.offsets["returns"], MAX_TOKENS),
            self.top_k,
            wait,
        )

    def expected_signal(self) -> PeerBlocks:
        expected = self.blocks.snapshot()
        expected["epoch"][RANK] = following(self.epoch)
        expected["flags"][:, RANK] = output_flag(following(self.epoch))
        return expected

    def expected(self) -> PeerBlocks:
        expected = self.expected_signal()
        for flat in self.valid:
            header = self.header(flat).cpu()
            entry, source, first_copy = header[self.scale_words :][:3].tolist()
            if first_copy != flat or not 0 <= source < RANKS or not 0 <= entry < MAX_TOKENS * self.top_k:
                continue
            rows = header[self.scale_words + 4 :][: self.top_k]
            rows = torch.where((rows >= 0) & (rows < len(self.y)), rows, -1).unsqueeze(0)
            weights = header[self.weights_word :][: self.top_k].view(torch.float32).unsqueeze(0)
            out = torch.zeros(1, self.columns, dtype=torch.bfloat16)
            reference.combine(self.y, rows, weights, out)
            expected["returns"][source, RANK, entry // self.top_k] = out[0]
        return expected

    def check(self) -> None:
        expected = self.expected()
        self.run()
        assert_same_blocks(self.blocks, expected)


@pytest.fixture(params=[False, True], ids=["padded", "ragged"])
def ragged(request) -> bool:
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_reach_their_tokens_with_the_bits_of_the_reference(shape, dtype, ragged, device):
    """Experts without rows, top-k 1, absent entries whose weights are NaN; no byte of any rank changes besides."""
    Sums(shape, device, dtype=dtype, ragged=ragged).check()


def test_the_worked_example(device):
    sums = Sums((1, 16, 4, 3, 0, [10]), device)
    for flat in range(10):
        sums.header(flat)[:4] = torch.tensor([0, 0, 15, 0])
    sums.header(4)[:7] = torch.tensor([18, 0, 4, 0, 4, -1, 9])
    sums.header(4)[8:11] = torch.tensor([0.5, float("nan"), 2.0]).view(torch.int32)
    sums.y[4], sums.y[9] = 3.0, 5.0
    # token 6 of 7
    sums.header(4)[0] = 5 * 3
    sums.check()
    assert sums.blocks["returns"][0, 1, 5].tolist() == [11.5] * 4


def test_the_product_is_rounded_before_the_addition(device):
    """1 * x - w * x with w * x rounded to x is 0; with a fused multiply-add it is what rounding w * x took away."""
    sums = Sums((1, 4, 16, 2, 0, [2]), device)
    x, w = 1 + 2.0**-7, 1 + 2.0**-23
    sums.y[:2] = x
    sums.header(0)[:6] = torch.tensor([0, 2, 0, 0, 0, 1])
    sums.header(1)[:4] = torch.tensor([1, 2, 0, 0])
    sums.header(0)[8:10] = torch.tensor([-w, w]).view(torch.int32)
    sums.check()
    assert sums.blocks["returns"][2, 1, 0].tolist() == [0.0] * 16


@pytest.mark.parametrize("epoch", EPOCHS)
def test_the_next_epoch_begins_and_all_are_told(epoch, device):
    """The launch leaves the counter of arrivals ready for the next one, which finds ranks 0 and 2 missing and blames rank 0."""
    sums = Sums(SHAPES[1], device, epoch)
    sums.blocks["flags"][RANK, 2] = output_flag(following(following(epoch)))
    sums.check()
    sums.epoch = following(epoch)
    sums.blocks["flags"][RANK, 2] = output_flag(sums.epoch)
    expected = sums.expected()
    expected.expect_fault(RANK, fault_word(following(sums.epoch), OUTPUTS, 0), told=True)
    sums.run(limit=SHORT)
    assert_same_blocks(sums.blocks, expected)


def test_a_push_without_a_wait_waits_for_nobody(device):
    sums = Sums(SHAPES[1], device)
    sums.blocks["flags"].zero_()
    expected = sums.expected()
    sums.run(wait=False)
    assert_same_blocks(sums.blocks, expected)


def test_after_a_fault_no_sum_is_stored(ragged, device):
    """Headers may then be anything. The flags go up all the same, and the wait ends at once."""
    sums = Sums(SHAPES[1], device, ragged=ragged)
    fault = fault_word(1, 1, 2)
    sums.blocks["fault"][RANK] = fault
    sums.blocks["abort"].fill_(fault)
    sums.blocks["flags"][RANK] = 0
    expected = sums.expected_signal()
    expected.expect_fault(RANK, fault, told=False)
    sums.run()
    assert_same_blocks(sums.blocks, expected)


def test_counts_out_of_range_stay_in_the_buffer(device):
    Sums((3, 5, 130, 2, 4, [-3, 6, 2**31 - 1]), device).check()


def test_counts_that_the_buffer_has_no_room_for_stay_in_it(device):
    sums = Sums((3, 5, 130, 2, 4, [-3, 4, 5]), device, ragged=True)
    sums.counts[2] = 2**31 - 1
    sums.check()


FAR = [-1, -(2**31), 2**31 - 1]


@pytest.mark.parametrize(
    "word, hostile",
    [(0, [-(2**31), 2**31 - 1, -4, MAX_TOKENS * 4]), (1, [*FAR, RANKS]), (2, [*FAR, None]), (4, [*FAR, None]), (7, [*FAR, None])],
    ids=["entry", "source", "first_copy", "first row", "last row"],
)
def test_hostile_headers_become_no_address(word, hostile, ragged, device):
    """No sum of a row whose header names no token of any rank; of rows that are not in the buffer, no part of a sum."""
    sums = Sums((3, 8, 300, 4, 4, [8, 8, 8]), device, ragged=ragged)
    hostile = [len(sums.y) if number is None else number for number in hostile]
    leading = [flat for flat in sums.valid if sums.header(flat)[sums.scale_words + 2] == flat]
    for flat, value in zip(leading, hostile, strict=False):
        sums.header(flat)[sums.scale_words + word] = value
    assert len(leading) > len(hostile)
    sums.check()


@pytest.mark.parametrize("entry", [-1, -3])
def test_a_negative_entry_is_of_no_token(entry, device):
    sums = Sums((1, 4, 64, 4, 4, [1]), device)
    sums.header(0)[4] = entry
    sums.check()


def test_rows_past_2_to_the_31_elements(ragged, device):
    """Memory that is reserved, but on a CPU not filled: only the last of three experts has a row, for the last of 2**21 tokens."""
    from moequant.kernels.library.symmetric import headers_of
    from moequant.kernels.symmetric.push_rank_sums import Sums as Place, push_rank_sums

    capacity, columns, max_tokens = 2**20 + 1, 1024, 2**21 + 1
    y = torch.empty(3, capacity, columns, dtype=torch.bfloat16, device=device)
    headers = torch.empty(3, capacity, 12, dtype=torch.int32, device=device)
    y[2, 0] = torch.randn(columns)
    headers[2, 0] = torch.tensor([max_tokens - 1, 0, 2 * capacity, 0, 2 * capacity, 0, 0, 0, 0, 0, 0, 0])
    headers[2, 0, 8] = torch.tensor([0.5]).view(torch.int32)[0]
    returns = torch.zeros(1, dtype=torch.bfloat16, device=device).new_empty(max_tokens, columns)
    blocks = PeerBlocks(1, device)
    counts = torch.tensor([0, 0, 1], dtype=torch.int32, device=device)
    place = Place(returns.data_ptr() - blocks.memory.data_ptr(), max_tokens)
    starts = None
    if ragged:
        y, headers = y.flatten(0, 1), headers.flatten(0, 1)
        starts = torch.tensor([0, 5, 2 * capacity], dtype=torch.int32, device=device)
    push_rank_sums(y, headers_of(headers, 0), counts, starts, blocks.peers_of(0), place, 1, True)
    assert (returns[-1] == y.view(3, capacity, columns)[2, 0] * 0.5).all()
    assert blocks["fault"].item() == NO_FAULT


def call_push_rank_sums(ragged: bool) -> None:
    from moequant.kernels.library.symmetric import headers_of
    from moequant.kernels.symmetric.push_rank_sums import Sums, push_rank_sums as kernel

    y, headers, counts = empty(32, 1024, 7168), empty(32, 1024, 76, dtype=torch.int32), empty(32, dtype=torch.int32)
    if ragged:
        y, headers = y[0], headers[0]
    kernel(y, headers_of(headers, 56), counts, counts if ragged else None, peers_of(), Sums(1024, 128), 8, True)


COMPILE_CASES = cases(call_push_rank_sums, {"ragged": False}, {"ragged": True}, nvidia=True)
