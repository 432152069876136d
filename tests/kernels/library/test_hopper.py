"""The host's side of the Hopper kernels: which scales TMA steps over, what their descriptors cover, tile counters. Needs no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moequant.batch import empty_transposed_scales
from moequant.kernels.library.hopper import counters, scale_matrix, takes
from written_launches import install_gpu

EXPERTS, ROWS, COLUMNS, GROUPS = 3, 40, 256, 4


def taken(a_scales: Tensor) -> bool:
    a, b = (torch.empty(EXPERTS, n, 128 * GROUPS, dtype=torch.float8_e4m3fn) for n in (ROWS, COLUMNS))
    out = torch.empty(EXPERTS, ROWS, COLUMNS, dtype=torch.bfloat16)
    return takes(a, a_scales, b, torch.empty(EXPERTS, 2, GROUPS), out, 1)


def strided(expert: int, row: int, group: int, offset: int = 0) -> Tensor:
    """Scales with these element strides."""
    return torch.empty(4096).as_strided((EXPERTS, ROWS, GROUPS), (expert, row, group), offset)


@pytest.mark.parametrize(
    ("a_scales", "is_taken"),
    [
        pytest.param(strided(160, 1, 40), True, id="side by side"),
        pytest.param(strided(320, 1, 64), True, id="slice of a larger buffer"),
        pytest.param(strided(160, 1, 40, 4), True, id="from a multiple of 16 bytes on"),
        pytest.param(strided(160, 1, 40, 2), False, id="misaligned"),
        pytest.param(strided(160, 1, 42), False, id="groups no multiple of 16 bytes apart"),
        pytest.param(strided(160, 4, 1), False, id="rows of groups"),
        # the descriptor of all rows and groups would not be a matrix
        pytest.param(strided(128, 1, 32), False, id="groups that overlap"),
        pytest.param(strided(0, 1, 0), False, id="one group for all"),
        # an expert's first group would not be a row of the matrix
        pytest.param(strided(180, 1, 40), False, id="experts no multiple of the groups apart"),
    ],
)
def test_scales_are_taken_if_all_are_the_rows_of_one_matrix(a_scales: Tensor, is_taken: bool) -> None:
    assert taken(a_scales) is is_taken


@pytest.mark.parametrize("spare", [0, 1, 5], ids=lambda groups: f"{groups} more groups")
@pytest.mark.parametrize("experts", [1, 3])
def test_the_matrix_of_the_scales_ends_with_the_last_experts_last_group(experts: int, spare: int) -> None:
    """What lies behind need not be this process's memory."""
    larger = empty_transposed_scales(experts, ROWS + 4, GROUPS + spare, "cpu")
    scales = larger[:, :ROWS, :GROUPS]
    descriptor, apart = scale_matrix(scales)
    assert apart == GROUPS + spare
    assert descriptor.base.data_ptr() == scales.data_ptr()
    assert list(descriptor.shape) == [(experts - 1) * apart + GROUPS, ROWS] and list(descriptor.strides) == [ROWS + 4, 1]
    last = scales[-1, -1, -1].data_ptr() - scales.data_ptr()
    rows, columns = descriptor.shape
    assert 4 * ((rows - 1) * descriptor.strides[0] + columns - 1) == last


def test_counters_are_handed_out_when_their_zeros_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may ask while this one waits for them."""
    own, device, waited = type(counters)(), torch.device("cuda", 0), []
    install_gpu(monkeypatch)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device=None: zeros(*shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    stream = SimpleNamespace(synchronize=lambda: waited.append(len(own.unused[device])))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    assert not own.get(device).any() and waited == [0]


def test_no_counter_is_freed_while_a_graph_may_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager calls on two streams with captures between them, until several chunks have been used up."""
    capturing, active = [False], install_gpu(monkeypatch)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device=None: zeros(*shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    own, device, given = type(counters)(), torch.device("cuda", 0), set()
    for _ in range(3):
        for active.stream in (1, 2):
            capturing[0] = False
            own.get(device)
            capturing[0] = True
            given |= {own.get(device).data_ptr() for _ in range(4000)}
    capturing[0] = False
    eager = {pair.data_ptr() for pair in own.of_stream.values()}
    addresses = {chunk[row].data_ptr() for chunk in own.chunks for row in range(len(chunk))}
    assert len(given) >= 12_000 and len(eager) == 2 and not given & eager
    # what was given during a capture without a supply is the graph's own
    assert len(given & addresses) >= 12_000
