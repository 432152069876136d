"""Which transport "auto" means, and what is said when it can't be the fastest."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from moequant.config import DispatcherConfig
from moequant.errors import UnreachableError
from moequant.transport import select

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
GROUP = cast(Any, object())


def config(transport: str = "auto", world_size: int = 2, exchange: str = "auto") -> DispatcherConfig:
    return DispatcherConfig(
        num_experts=4,
        top_k=2,
        hidden_size=64,
        max_tokens_per_rank=8,
        world_size=world_size,
        transport=transport,
        exchange=exchange,
    )


def resolved(monkeypatch: pytest.MonkeyPatch, reason: str | None, device: torch.device, **settings: Any) -> str:
    """The transport, where ranks can reach each other's memory unless there is a reason."""
    monkeypatch.setattr(select, "why_unreachable", lambda group, device: reason)
    return select.resolve(config(**settings), GROUP, device).transport


def test_auto_is_symmetric_where_memory_can_be_reached(monkeypatch):
    assert resolved(monkeypatch, None, GPU) == "symmetric"
    assert resolved(monkeypatch, None, GPU, world_size=1) == "local"
    assert resolved(monkeypatch, None, CPU) == "collective"
    # whoever names an exchange wants the transport that has one
    assert resolved(monkeypatch, None, GPU, exchange="packed") == "collective"
    assert resolved(monkeypatch, None, GPU, transport="collective") == "collective"


def test_auto_falls_back_to_collective_with_one_line_that_says_why(monkeypatch, caplog):
    assert resolved(monkeypatch, "ranks are on two hosts", GPU) == "collective"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages == ['transport "auto" is "collective": "symmetric" can\'t be used here: ranks are on two hosts']


def test_symmetric_says_why_it_cannot_be_used(monkeypatch):
    with pytest.raises(UnreachableError, match="can't be used here: ranks are on two hosts"):
        resolved(monkeypatch, "ranks are on two hosts", GPU, transport="symmetric")
    with pytest.raises(ValueError, match="needs torch.distributed"):
        select.resolve(config("symmetric"), None, GPU)


@pytest.mark.parametrize(("experts", "kind"), [(136, "PaddedTransport"), (144, "PackedTransport")])
def test_the_padded_exchange_is_taken_up_to_128_mib_of_padded_rows(experts, kind):
    # 128 rows of 7168 values and 56 scales for each expert: 7392 bytes each
    assert (experts * 128 * 7392 <= 2**27) == (kind == "PaddedTransport")
    settings = DispatcherConfig(
        num_experts=experts, top_k=8, hidden_size=7168, max_tokens_per_rank=128, world_size=8, transport="collective"
    )
    assert select.transport_class(settings).__name__ == kind


def test_buffer_bytes_of_auto_with_an_exchange_are_those_of_collective(monkeypatch):
    sizes: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 64, "max_tokens_per_rank": 8, "world_size": 2}
    for gpus in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus)
        named = {transport: select.buffer_bytes(**sizes, transport=transport) for transport in ("auto", "symmetric", "collective")}
        assert named["symmetric"] != named["collective"]
        assert named["auto"] == named["symmetric" if gpus else "collective"]
        for exchange in ("padded", "packed"):
            exact = select.buffer_bytes(**sizes, transport="collective", exchange=exchange)
            assert select.buffer_bytes(**sizes, exchange=exchange) == exact
