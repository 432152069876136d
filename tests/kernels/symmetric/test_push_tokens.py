"""Tokens reach the places of their rows on all ranks, once a rank, with headers that say what the receiver has to know."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

import compile_peers
from compile_case import BF16, E4M3, cases, each_format
from moequant import ops, reference
from moequant.batch import ceil_div
from peer_blocks import EPOCHS, LONG, SHORT, PeerBlocks, assert_same_blocks, fault_word, following

ROWS = 1
FP8 = torch.float8_e4m3fn
# tokens, top_k, ranks, local experts, M, hidden size
SHAPES = [(5, 1, 2, 3, 8, 300), (7, 4, 3, 2, 5, 130), (1, 6, 1, 8, 3, 1), (0, 2, 2, 2, 4, 64), (3, 9, 4, 3, 16, 1100)]


def words_of_a_note(groups: int, top_k: int, per_rank: bool) -> tuple[int, int, int]:
    """Where a header's entry and its weights begin, and its end, as the module's docstring has them."""
    entry = 4 * ceil_div(groups, 4)
    weights = entry + 4 + 4 * ceil_div(top_k, 4)
    return entry, weights, weights + 4 * ceil_div(top_k, 4) if per_rank else entry + 4


class Push:
    """One rank's call: inputs, the blocks of all ranks, and what has to be in them afterwards. capacity: rows of an expert, or, ragged,
    of a rank."""

    def __init__(
        self, shape, dtype, device, per_rank=False, rank=0, x_dtype=torch.bfloat16, epoch=1, recipe="default", ragged=False
    ):
        tokens, self.top_k, self.ranks, self.local_experts, self.capacity, columns = shape
        self.dtype, self.rank, self.epoch, self.recipe, self.device = dtype, rank, epoch, recipe, device
        self.ragged = ragged
        self.max_tokens = tokens + 3
        self.groups = ceil_div(columns, 128) if dtype != torch.bfloat16 else 0
        experts = self.ranks * self.local_experts
        self.x = torch.randn(tokens, columns).to(device, x_dtype)
        self.ids = torch.rand(tokens, experts).argsort(1)[:, : self.top_k].contiguous().int()
        self.ids[torch.rand(self.ids.shape) < 0.15] = -1
        self.rows_in_expert = torch.empty(self.ids.shape, dtype=torch.int32)
        counts = torch.empty(experts, dtype=torch.int32)
        reference.route(self.ids, self.rows_in_expert, counts)
        # some experts are nearly full
        self.offsets = torch.randint(0, self.capacity + 1, (experts,), dtype=torch.int32)
        if ragged:
            # other ranks' rows lie between this one's, and the last of one rank have no room
            gaps = torch.randint(0, 4, (self.ranks, self.local_experts), dtype=torch.int32)
            ends = (counts.view(self.ranks, -1) + gaps).cumsum(1, dtype=torch.int32)
            self.offsets = (ends - counts.view(self.ranks, -1)).flatten()
            self.capacity = max(1, int(ends.max()) - 2)
        self.weights = torch.rand(tokens, self.top_k) if per_rank else None
        self.entry, self.weights_word, words = words_of_a_note(self.groups, self.top_k, per_rank)
        self.blocks = PeerBlocks(
            self.ranks,
            device,
            values=((self.rows_of_rank, columns), dtype),
            headers=((self.rows_of_rank, words), torch.int32),
            rows=((tokens, self.top_k), torch.int32),
            partials=((tokens, self.ranks), torch.int32),
        )
        self.blocks["epoch"][rank] = epoch
        self.blocks["flags"][rank] = epoch

    @property
    def rows_of_rank(self) -> int:
        return self.capacity if self.ragged else self.local_experts * self.capacity

    def run(
        self,
        wait: bool = True,
        limit: int = LONG,
        values_offset: int | None = None,
        notes_offset: int | None = None,
        wave: int = 0,
        first_experts: int = 0,
    ) -> None:
        from moequant.kernels.symmetric.push_tokens import Entries, Landing, push_tokens

        blocks, rank = self.blocks, self.rank
        push_tokens(
            self.x,
            self.ids.to(self.device),
            None if self.weights is None else self.weights.to(self.device),
            Entries(
                self.rows_in_expert.to(self.device),
                self.offsets.to(self.device),
                blocks["rows"][rank],
                None if self.weights is None else blocks["partials"][rank],
            ),
            Landing(
                rows=blocks.offsets["values"] if values_offset is None else values_offset,
                headers=blocks.offsets["headers"] if notes_offset is None else notes_offset,
                experts=self.ranks * self.local_experts,
                local_experts=self.local_experts,
                capacity=self.capacity,
                columns=self.x.shape[1],
                max_tokens=self.max_tokens,
                spec=ops.quant_spec(self.dtype, self.recipe) if self.groups else None,
                ragged=tl.constexpr(self.ragged),
            ),
            blocks.peers_of(rank, limit),
            self.dtype,
            wait,
            (wave, first_experts),
        )

    def places(self) -> list[list[int]]:
        """Rows among all ranks', -1 where there is none."""
        places = []
        for ids, rows_in_expert in zip(self.ids.tolist(), self.rows_in_expert.tolist(), strict=True):
            row = []
            for expert, slot in zip(ids, rows_in_expert, strict=True):
                named = 0 <= expert < self.ranks * self.local_experts and slot >= 0
                place = int(self.offsets[expert]) + slot if named else -1
                first = (expert // self.local_experts if self.ragged else expert) * self.capacity
                row.append(first + place if 0 <= place < self.capacity else -1)
            places.append(row)
        return places

    def expected(self, wave: int = 0, first_experts: int = 0) -> PeerBlocks:
        """wave: 1: rows of each rank's first experts alone are there; 2: all, of which those of the first wave come first."""
        expected, rows_of_rank, places = self.blocks.snapshot(), self.rows_of_rank, self.places()
        values, scales = self.x.cpu().to(self.dtype if not self.groups else self.x.dtype), None
        if self.groups:
            values, scales = reference.quantize_groups(self.x.cpu(), 128, self.dtype, self.recipe, None)
        for token, rows in enumerate(places):
            if rows:
                expected["rows"][self.rank, token] = torch.tensor(rows, dtype=torch.int32)
            for owner in range(self.ranks):
                theirs = [row - owner * rows_of_rank if row >= 0 and row // rows_of_rank == owner else -1 for row in rows]
                late = [expert % self.local_experts >= first_experts for expert in self.ids[token].tolist()]
                # False, of the first wave, is sorted before True
                entries = sorted((k for k, row in enumerate(theirs) if row >= 0), key=late.__getitem__)
                held = [theirs[k] for k in entries]
                if self.weights is not None:
                    expected["partials"][self.rank, token, owner] = owner * self.max_tokens + token if held else -1
                for k, row in enumerate(theirs):
                    if row < 0 or (wave == 1 and late[k]):
                        continue
                    header = expected["headers"][owner, row]
                    header[self.entry :][:4] = torch.tensor([token * self.top_k + k, self.rank, held[0], 0])
                    if row != held[0]:
                        continue
                    expected["values"][owner, row].view(torch.uint8).copy_(values[token].view(torch.uint8))
                    if scales is not None:
                        header[: self.groups] = scales[token].view(torch.int32)
                    if self.weights is not None:
                        header[self.entry + 4 :][: self.top_k] = torch.tensor(theirs)
                        header[self.weights_word :][: self.top_k] = self.weights[token].view(torch.int32)
        expected["flags"][:, self.rank] = self.epoch
        return expected

    def check(self) -> None:
        expected = self.expected()
        self.run()
        assert_same_blocks(self.blocks, expected)


@pytest.fixture(params=[False, True], ids=["padded", "ragged"])
def ragged(request) -> bool:
    return request.param


@pytest.mark.parametrize("per_rank", [False, True], ids=["exact", "per_rank"])
@pytest.mark.parametrize("dtype", [FP8, torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_and_notes_are_where_they_belong(shape, dtype, per_rank, ragged, device):
    """Experts that overflow, absent entries, no tokens, top-k 1, several experts of one rank; no other byte of any rank changes."""
    Push(shape, dtype, device, per_rank, rank=shape[2] - 1, ragged=ragged).check()


@pytest.mark.parametrize("first_experts", [1, 2])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[3] > 2], ids=str)
def test_in_two_waves_rows_of_the_first_experts_go_first_and_stand_for_the_others(shape, first_experts, ragged, device):
    push = Push(shape, FP8, device, ragged=ragged)
    for wave in (1, 2):
        expected = push.expected(wave, first_experts)
        push.run(wave=wave, first_experts=first_experts)
        assert_same_blocks(push.blocks, expected)


def test_the_worked_example(device):
    push = Push((1, 3, 2, 2, 8, 64), FP8, device)
    push.ids, push.rows_in_expert = torch.tensor([[3, 0, 2]]), torch.tensor([[0, 1, 0]], dtype=torch.int32)
    push.offsets = torch.tensor([4, 0, 8, 5], dtype=torch.int32)
    assert push.places() == [[29, 5, -1]]
    push.check()
    assert push.blocks["rows"][0].tolist() == [[29, 5, -1]]
    assert push.blocks["headers"][1, 13, 4:].tolist() == [0, 0, 13, 0]
    assert push.blocks["headers"][0, 5, 4:].tolist() == [1, 0, 5, 0]


def test_the_ragged_worked_example(device):
    """In the same memory as if each of two experts had 8 rows."""
    push = Push((1, 3, 2, 2, 8, 64), FP8, device)
    push.ragged, push.capacity = True, 16
    push.ids, push.rows_in_expert = torch.tensor([[3, 0, 2]]), torch.tensor([[0, 1, 0]], dtype=torch.int32)
    push.offsets = torch.tensor([4, 0, 16, 13], dtype=torch.int32)
    push.check()
    assert push.blocks["rows"][0].tolist() == [[29, 5, -1]]
    assert push.blocks["headers"][1, 13, 4:].tolist() == [0, 0, 13, 0]


def test_the_layout_of_notes_is_what_the_transport_allocates():
    from moequant.kernels.symmetric.push_tokens import header_words

    for groups in (0, 1, 4, 9):
        for top_k in (1, 4, 6):
            for per_rank in (False, True):
                assert header_words(groups, top_k, per_rank) == words_of_a_note(groups, top_k, per_rank)[2]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz, torch.bfloat16], ids=str)
def test_other_formats_and_inputs(dtype, x_dtype, device):
    Push((4, 2, 2, 2, 8, 200), dtype, device, x_dtype=x_dtype).check()


@pytest.mark.parametrize("recipe", ["deepgemm", "ue8m0"])
def test_recipes(recipe, device):
    Push((4, 2, 2, 2, 8, 200), FP8, device, recipe=recipe).check()


def test_strided_tokens_and_int64_ids(device):
    push = Push((6, 3, 2, 3, 8, 256), FP8, device)
    push.x = torch.randn(6, 400).to(device, torch.bfloat16)[:, 10:266]
    push.ids = push.ids.long()
    push.check()


def test_bad_groups_travel_as_nan(device):
    push = Push((3, 2, 2, 3, 32, 300), FP8, device)
    push.x[0, 140], push.x[1, 299], push.x[2] = float("nan"), float("-inf"), 0.0
    push.offsets.zero_()
    push.check()


def test_a_token_that_names_an_expert_twice_leads_once(device):
    push = Push((2, 4, 2, 2, 8, 130), FP8, device, per_rank=True)
    push.ids = torch.tensor([[1, 3, 1, 1], [3, 3, 0, 1]], dtype=torch.int32)
    reference.route(push.ids, push.rows_in_expert, torch.empty(4, dtype=torch.int32))
    push.offsets = torch.tensor([0, 5, 6, 7], dtype=torch.int32)
    assert push.places() == [[13, 31, 14, 15], [-1, -1, 0, -1]]
    push.check()


def test_ids_slots_and_offsets_out_of_range_become_no_address(ragged, device):
    push = Push((2, 4, 2, 2, 8, 64), FP8, device, per_rank=True, ragged=ragged)
    push.ids = torch.tensor([[4, 2**40, -1, -7], [0, 1, 2, 3]])
    push.rows_in_expert = torch.tensor([[0, 0, 0, 1], [-1, -(2**31), 1, 1]], dtype=torch.int32)
    push.offsets = torch.tensor([0, 0, -5, 2**31 - 1], dtype=torch.int32)
    push.check()
    assert (push.blocks["rows"][0] == -1).all() and (push.blocks["partials"][0] == -1).all()


@pytest.mark.parametrize("epoch", EPOCHS)
def test_flags_carry_the_epoch_that_has_begun(epoch, device):
    """Of three ranks, one is a call ahead; the launch leaves the counter of arrivals ready for the next, which finds rank 2 missing."""
    ahead = following(epoch)
    push = Push((3, 2, 3, 2, 8, 64), FP8, device, epoch=epoch, rank=1)
    push.blocks["flags"][1] = torch.tensor([ahead, epoch, epoch])
    push.check()
    push.epoch = ahead
    push.blocks["epoch"][1] = ahead
    expected = push.expected()
    expected.expect_fault(1, fault_word(ahead, ROWS, 2), told=True)
    push.run(limit=SHORT)
    assert_same_blocks(push.blocks, expected)


def test_a_push_without_a_wait_waits_for_nobody(device):
    push = Push((3, 2, 2, 2, 8, 64), FP8, device, epoch=9)
    push.blocks["flags"].zero_()
    push.blocks["fault"][0] = 5
    expected = push.expected()
    push.run(wait=False)
    assert_same_blocks(push.blocks, expected)


@pytest.mark.parametrize("tokens", [0, 4])
def test_after_a_fault_nothing_is_addressed(tokens, ragged, device):
    """`exchange_counts` says then that no expert has room. The flags go up all the same, and the wait ends at once."""
    push = Push((tokens, 2, 3, 2, 8, 64), FP8, device, per_rank=True, rank=2, epoch=50, ragged=ragged)
    push.offsets.fill_(push.capacity)
    push.blocks["flags"][2] = 0
    push.blocks["abort"].fill_(fault_word(50, 0, 1))
    expected = push.expected()
    expected.expect_fault(2, fault_word(50, 0, 1), told=False)
    push.run()
    assert_same_blocks(push.blocks, expected)
    assert (push.blocks["rows"][2] == -1).all()


def test_rows_past_2_to_the_31_elements(ragged, device):
    """Memory that is reserved, but on a CPU not filled."""
    capacity, columns = 2**21 + 3, 1024
    push = Push((1, 1, 1, 1, 1, columns), torch.int8, device, ragged=ragged)
    push.ids.zero_()
    push.rows_in_expert.zero_()
    push.capacity, push.offsets = capacity, torch.tensor([capacity - 1], dtype=torch.int32)
    values = torch.empty(capacity, columns, dtype=torch.int8, device=device)
    headers = torch.empty(capacity, 12, dtype=torch.int32, device=device)
    start = push.blocks.memory.data_ptr()
    push.run(values_offset=values.data_ptr() - start, notes_offset=headers.data_ptr() - start)
    expected = reference.quantize_groups(push.x.cpu(), 128, torch.int8, "default", None)
    assert (values[-1].cpu() == expected[0]).all()
    assert (headers[-1, :8].cpu() == expected[1].view(torch.int32)).all()
    assert headers[-1, 8:].tolist() == [0, 0, capacity - 1, 0]


COMPILE_CASES = [
    *cases(compile_peers.push_tokens, *each_format(BF16, torch.float16), nvidia=True),
    *cases(compile_peers.push_tokens, {"dtype": E4M3, "tokens": 1}, {"dtype": E4M3, "per_rank": True}, nvidia=True),
    *cases(compile_peers.push_tokens, {"dtype": E4M3, "wave": 2}, nvidia=True),
    *cases(compile_peers.push_tokens, *({"dtype": E4M3, "wave": wave, "ragged": True} for wave in (0, 2)), nvidia=True),
    *cases(compile_peers.push_tokens, {"dtype": E4M3, "per_rank": True, "ragged": True}, nvidia=True),
]
