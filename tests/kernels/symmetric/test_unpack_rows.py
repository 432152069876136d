"""What other ranks stored becomes an expert batch: scales transposed, sources and destinations, copies of tokens that came once."""

from __future__ import annotations

import pytest
import torch

import compile_peers
from compile_case import BF16, INT8, cases
from moequant.batch import ceil_div
from peer_blocks import PeerBlocks, assert_same_blocks, fault_word

FP8 = torch.float8_e4m3fn
RANKS, ENTRIES = 3, 1000
# L, M, H, counts
SHAPES = [
    (1, 16, 1, [16]),
    (3, 20, 300, [3, 0, 17]),
    (2, 9, 1100, [9, 1]),
    (4, 16, 64, [0, 0, 0, 0]),
    (3, 64, 1100, [64, 50, 60]),
]


class Landing:
    """Random rows and headers as `push_tokens` leaves them, a third of the rows followers; rows that are not valid hold 0x55.

    ragged: the experts' rows lie in one buffer, a few rows apart, in which M rows of the last have room.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, list[int]],
        dtype: torch.dtype,
        device: str,
        pushed: bool = True,
        ragged: bool = False,
    ) -> None:
        self.experts, capacity, self.columns, counts = shape
        self.ragged = ragged
        self.starts = [expert * capacity for expert in range(self.experts)]
        if ragged:
            self.starts = [sum(min(max(count, 0), capacity) + 3 for count in counts[:expert]) for expert in range(self.experts)]
        self.rows = self.starts[-1] + capacity
        lie = (self.rows,) if ragged else (self.experts, capacity)
        self.counts = torch.tensor(counts, dtype=torch.int32, device=device)
        self.expert_start = torch.tensor(self.starts, dtype=torch.int32, device=device) if ragged else None
        self.pushed = pushed
        self.return_bytes = 2 * self.columns
        self.groups = ceil_div(self.columns, 128) if dtype != torch.bfloat16 else 0
        self.entry = 4 * ceil_div(self.groups, 4)
        buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "values": ((*lie, self.columns), dtype),
            "headers": ((*lie, self.entry + 4), torch.int32),
            "scales": ((*lie[:-1], self.groups, lie[-1]), torch.float32),
            "sources": (lie, torch.int64),
            "destinations": (lie, torch.int64),
            "returns": ((8,), torch.int32),
        }
        self.blocks = PeerBlocks(RANKS, device, **buffers)
        # of each valid row its expert
        self.experts_of = {
            self.starts[expert] + row: expert for expert, count in enumerate(counts) for row in range(min(max(count, 0), capacity))
        }
        self.valid = list(self.experts_of)
        first_copies = self.valid[::3] + self.valid[1::3]
        for flat in self.valid:
            first_copy = flat if flat in first_copies else first_copies[flat % len(first_copies)]
            header = self.header(flat)
            if first_copy == flat:
                self.values(self.blocks)[flat] = torch.randint(0, 255, (self.columns * dtype.itemsize,), dtype=torch.uint8)
                header[: self.groups] = torch.randn(self.groups).view(torch.int32)
            header[self.entry :] = torch.tensor([int(torch.randint(0, ENTRIES, ())), flat % RANKS, first_copy, 0])

    def header(self, flat: int) -> torch.Tensor:
        """A row's header on rank 1, the one that the rows are on."""
        return self.blocks["headers"][1].view(self.rows, -1)[flat]

    def values(self, blocks: PeerBlocks) -> torch.Tensor:
        """(L * M or R, bytes of a row) uint8."""
        return blocks["values"][1].view(self.rows, -1).view(torch.uint8)

    def run(
        self,
        expected_rows: int = 4,
        part: tuple[int, int] | None = None,
    ) -> None:
        from moequant.kernels.library.symmetric import headers_of
        from moequant.kernels.symmetric.unpack_rows import Landed, Returns, unpack_rows

        blocks = self.blocks
        unpack_rows(
            Landed(
                blocks["values"][1].view(torch.uint8),
                blocks["scales"][1].mT if self.groups else None,
                self.counts,
                blocks["sources"][1],
                self.expert_start,
            ),
            headers_of(blocks["headers"][1], self.groups),
            blocks.peers_of(1),
            Returns(
                blocks["destinations"][1] if self.pushed else None,
                blocks.offsets["returns"],
                ENTRIES,
                self.return_bytes,
            ),
            blocks["values"].itemsize,
            expected_rows,
            part,
        )

    def expected(self, part: tuple[int, int] | None = None) -> PeerBlocks:
        expected, peers = self.blocks.snapshot(), self.blocks.peers.tolist()
        begin, end = part or (0, self.experts)
        for flat in self.valid:
            if not begin <= self.experts_of[flat] < end:
                continue
            entry, source, first_copy = self.header(flat)[self.entry :][:3].tolist()
            expected["sources"][1].view(-1)[flat] = source << 32 | entry
            if self.pushed and 0 <= source < RANKS and 0 <= entry < ENTRIES:
                address = peers[source] + self.blocks.offsets["returns"] + entry * self.return_bytes
                expected["destinations"][1].view(-1)[flat] = address
            if 0 <= first_copy < self.rows:
                place = (flat,) if self.ragged else divmod(flat, self.rows // self.experts)
                expected["scales"][1].mT[place] = self.header(first_copy)[: self.groups].view(torch.float32)
                self.values(expected)[flat] = self.values(self.blocks)[first_copy]
        return expected

    def check(self, expected_rows: int = 4) -> None:
        expected = self.expected()
        self.run(expected_rows)
        assert_same_blocks(self.blocks, expected)


@pytest.fixture(params=[False, True], ids=["padded", "ragged"])
def ragged(request) -> bool:
    return request.param


@pytest.mark.parametrize("pushed", [True, False], ids=["destinations", "no-destinations"])
@pytest.mark.parametrize("dtype", [FP8, torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_land(shape, dtype, pushed, ragged, device):
    """Experts without rows, a full one, several tiles a program; no byte of any rank changes besides."""
    Landing(shape, dtype, device, pushed, ragged).check()


@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16], ids=str)
def test_rows_land_in_the_tiles_of_a_launch_that_begins_early(dtype, ragged, device, monkeypatch):
    """Which no CPU has: it takes the tiles alone, without waiting for a launch before. H of more than a tile's 64 groups, too."""
    from moequant.kernels.symmetric import unpack_rows as module

    if device == "cpu":
        monkeypatch.setattr(module, "may_use_pdl", lambda *launch: True)
        monkeypatch.setattr(module, "pdl_option", lambda *option: {})
        monkeypatch.setattr(module, "wait_for_previous", lambda pdl: None)
    for shape in [*SHAPES[:3], (2, 9, 8300, [9, 2])]:
        Landing(shape, dtype, device, ragged=ragged).check()


def test_rows_of_some_experts_land_alone(ragged, device):
    landing = Landing((5, 20, 300, [3, 0, 17, 20, 1]), FP8, device, ragged=ragged)
    for part in ((1, 3), (0, 1), (3, 5)):
        expected = landing.expected(part)
        landing.run(part=part)
        assert_same_blocks(landing.blocks, expected)


def test_the_worked_example(device):
    landing = Landing((2, 8, 64, [4, 6]), torch.bfloat16, device)
    landing.header(13)[:] = torch.tensor([9, 2, 3, 0])
    landing.header(3)[:] = torch.tensor([8, 2, 3, 0])
    landing.check()
    blocks = landing.blocks
    assert blocks["sources"][1, 1, 5].item() == 2 << 32 | 9
    assert blocks["destinations"][1, 1, 5].item() == int(blocks.peers[2]) + blocks.offsets["returns"] + 9 * 128
    assert (blocks["values"][1, 1, 5].view(torch.int16) == blocks["values"][1, 0, 3].view(torch.int16)).all()


@pytest.mark.parametrize("expected_rows", [0, 10**6])
def test_a_wrong_guess_of_the_rows_changes_no_bit(expected_rows, ragged, device):
    """By it the launch is sized, and begins early on GPUs that can."""
    Landing((2, 40, 300, [33, 7]), FP8, device, ragged=ragged).check(expected_rows)


def test_counts_out_of_range_stay_in_the_buffer(device):
    Landing((3, 5, 130, [-3, 6, 2**31 - 1]), FP8, device).check()


def test_counts_that_the_buffer_has_no_room_for_stay_in_it(device):
    """Of rows behind an expert's there are as many as the buffer has."""
    landing = Landing((3, 5, 130, [-3, 4, 5]), FP8, device, ragged=True)
    landing.counts[2] = 2**31 - 1
    landing.check()
    assert landing.expert_start is not None
    landing.expert_start[1] = landing.rows
    landing.expert_start[0] = 2**31 - 1
    expected = landing.blocks.snapshot()
    landing.run(part=(0, 2))
    assert_same_blocks(landing.blocks, expected)


def test_after_a_fault_the_batch_is_empty_and_nothing_else_is_written(ragged, device):
    """Headers may then be anything, and destinations are those of an earlier call."""
    landing = Landing((2, 8, 300, [8, 5]), FP8, device, ragged=ragged)
    landing.blocks["fault"][1] = fault_word(3, 1, 2)
    expected = landing.blocks.snapshot()
    landing.run()
    assert_same_blocks(landing.blocks, expected)
    assert landing.counts.tolist() == [0, 0]


FAR = [-1, -(2**31), 2**31 - 1]


@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "word, hostile", [(0, [*FAR, ENTRIES]), (1, [*FAR, RANKS]), (2, [*FAR, None])], ids=["entry", "source", "first_copy"]
)
def test_hostile_headers_become_no_address(word, hostile, dtype, ragged, device):
    """Rows keep what their places held; the rows around them land. A first_copy that is not valid is a row of the buffer, no more."""
    landing = Landing((2, 8, 300, [8, 5]), dtype, device, ragged=ragged)
    hostile = [landing.rows if number is None else number for number in hostile]
    # followers, and rows that would lead
    for flat, value in zip([2, 3, 5, 12], hostile, strict=True):
        landing.header(flat)[landing.entry + word] = value
    for flat in landing.valid:
        # nobody follows a row whose own first_copy is another
        if landing.header(flat)[landing.entry + 2] in (2, 3, 5, 12) and flat not in (2, 3, 5, 12):
            landing.header(flat)[landing.entry + 2] = 15
    landing.check()


def test_rows_past_2_to_the_31_elements(ragged, device):
    """Memory that is reserved, but on a CPU not filled: only the last of three experts has rows, of which the second follows."""
    from moequant.kernels.library.symmetric import headers_of
    from moequant.kernels.symmetric.unpack_rows import Landed, Returns, unpack_rows

    capacity, columns, entry = 2**20 + 1, 1024, 2**21 + 5
    values = torch.empty(3, capacity, columns, dtype=torch.int8, device=device)
    headers = torch.empty(3, capacity, 12, dtype=torch.int32, device=device)
    sources, destinations = (torch.empty(3, capacity, dtype=torch.int64, device=device) for _ in range(2))
    scales = torch.empty(3, 8, capacity, device=device).transpose(1, 2)
    values[2, 0] = torch.randint(-128, 128, (columns,))
    values[2, 1] = 0
    headers[2, :2] = torch.arange(12)
    headers[2, :2, 8] = entry
    headers[2, :2, 9] = 0
    headers[2, :2, 10] = 2 * capacity
    counts = torch.tensor([0, 0, 2], dtype=torch.int32, device=device)
    peers = PeerBlocks(1, device).peers_of(0)._replace(pointers=torch.tensor([2**40], device=device))
    batch, returns = Landed(values.view(torch.uint8), scales, counts, sources), Returns(destinations, 256, 2**22, 2048)
    landed = scales[2]
    if ragged:
        starts = torch.tensor([0, 5, 2 * capacity], dtype=torch.int32, device=device)
        scales = torch.empty(8, 3 * capacity, device=device).mT
        landed = scales[2 * capacity :]
        batch = Landed(values.view(torch.uint8).flatten(0, 1), scales, counts, sources.view(-1), starts)
    unpack_rows(batch, headers_of(headers, 8), peers, returns, 1, 4)
    assert (values[2, 1] == values[2, 0]).all()
    assert (landed[:2].cpu().view(torch.int32) == torch.arange(8)).all()
    assert sources[2, :2].tolist() == [entry] * 2
    assert destinations[2, :2].tolist() == [2**40 + 256 + entry * 2048] * 2


COMPILE_CASES = cases(
    compile_peers.unpack_rows, *({"dtype": dtype, "ragged": ragged} for ragged in (False, True) for dtype in (INT8, BF16))
)
