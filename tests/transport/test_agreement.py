"""Who may build a dispatcher, on what device, and what its ranks have to agree on."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from moequant.config import DispatcherConfig
from moequant.errors import ConfigMismatchError, PeerTimeoutError
from moequant.transport.agreement import agree, choose_device, membership
from thread_ranks import Member, members, on_each

CPU = torch.device("cpu")
CONFIG = DispatcherConfig(num_experts=4, top_k=2, hidden_size=64, max_tokens_per_rank=8, world_size=2, timeout=60.0)


def outcomes(group: list[Member], *mine: Any) -> list[Any]:
    """What agree gives, or the error that it raises, on each rank. mine: each rank's settings, or these and a device."""

    def agreed(member: Member) -> Any:
        given = mine[member.rank()]
        settings, device = given if isinstance(given, tuple) else (given, CPU)
        return agree(settings, device, cast(Any, member), member.rank(), member.size())

    return on_each(group, agreed)


def test_a_group_that_is_none_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match="torch.distributed is not initialised; call init_process_group first"):
        membership(cast(Any, "world"))
    dist.init_process_group("gloo", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="group must be a process group of torch.distributed, or None .*, got 'world'"):
            membership(cast(Any, "world"))
        with pytest.raises(ValueError, match="not a member of the group"):
            membership(cast(Any, dist.GroupMember.NON_GROUP_MEMBER))
        assert membership(None)[1:] == (0, 1)
    finally:
        dist.destroy_process_group()


def test_devices_that_are_none_are_named(monkeypatch):
    for device in ("gpu", "meta", "mps", 1.5):
        with pytest.raises(ValueError, match=f'device must be a "cuda" device or "cpu", got {device!r}'):
            choose_device(None, cast(Any, device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None, None) == CPU
    with pytest.raises(ValueError, match="device must be one of this machine's, got 'cuda', and torch finds 0 GPUs"):
        choose_device(None, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert choose_device(None, None) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device must be one of this machine's, got 'cuda:2', and torch finds 2 GPUs"):
        choose_device(None, "cuda:2")


def test_equal_settings_are_agreed_on_and_numbered():
    group = members(2)
    assert outcomes(group, CONFIG, CONFIG) == [(CONFIG, 0)] * 2
    assert outcomes(group, CONFIG, CONFIG) == [(CONFIG, 1)] * 2
    assert agree(CONFIG, CPU, None, 0, 1) == (CONFIG, 0)


def test_the_number_is_agreed_behind_a_constructor_that_one_rank_left_early():
    group = members(2)
    short = dataclasses.replace(CONFIG, timeout=0.1)
    assert outcomes(group, CONFIG, CONFIG) == [(CONFIG, 0)] * 2
    alone = outcomes(group[:1], short)[0]
    assert isinstance(alone, PeerTimeoutError)
    assert outcomes(group, CONFIG, CONFIG) == [(CONFIG, 1)] * 2
    # a count of its own would begin anew
    newcomer = Member(group[0].get_group_store(), 1, 2)
    assert outcomes([group[0], newcomer], CONFIG, CONFIG) == [(CONFIG, 2)] * 2


def test_settings_that_differ_are_named_on_both_ranks():
    errors = outcomes(members(2), CONFIG, dataclasses.replace(CONFIG, timeout=5.0))
    assert all(isinstance(error, ConfigMismatchError) for error in errors)
    assert [str(error) for error in errors] == [
        "ranks 0 and 1 of the group disagree on timeout: 60.0 and 5.0; give all ranks the same settings",
        "ranks 1 and 0 of the group disagree on timeout: 5.0 and 60.0; give all ranks the same settings",
    ]


def test_a_cpu_rank_among_gpu_ranks_is_a_mismatch_on_both():
    errors = outcomes(members(2), CONFIG, (CONFIG, torch.device("cuda", 0)))
    assert all(isinstance(error, ConfigMismatchError) for error in errors)
    assert "disagree on device: 'cpu' and 'cuda'" in str(errors[0])
    # GPUs of different numbers are no mismatch
    pair = [(CONFIG, torch.device("cuda", rank)) for rank in range(2)]
    assert outcomes(members(2), *pair) == [(CONFIG, 0)] * 2


def test_wrong_settings_are_told_and_not_waited_with():
    group = members(2)
    # nobody else is there, and the error comes at once
    refused = outcomes(group[:1], "top_k must be a positive integer, got 0")[0]
    assert type(refused) is ValueError
    told = outcomes(group[1:], None, CONFIG)[0]
    assert isinstance(told, ConfigMismatchError)
    assert str(told) == "rank 0 of the group has wrong settings: top_k must be a positive integer, got 0"
    assert outcomes(group, CONFIG, CONFIG) == [(CONFIG, 0)] * 2


def test_a_rank_that_never_comes_is_named_in_time():
    error = outcomes(members(2)[:1], dataclasses.replace(CONFIG, timeout=0.2))[0]
    assert isinstance(error, PeerTimeoutError)
    assert error.rank == 1
    assert "rank 1 of the group did not come to the dispatcher's constructor within 0.2 s" in str(error)
