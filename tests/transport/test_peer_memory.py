"""Memory that ranks share: what it holds, what is left of it in the file system, and who can't have it."""

from __future__ import annotations

import socket
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from moequant.transport import peer_memory
from moequant.transport.peer_memory import PeerMemory, why_unreachable

CPU = torch.device("cpu")


def test_shared_memory_begins_as_zeros_and_leaves_no_file_behind(one_rank, monkeypatch, tmp_path):
    shipped = torch.from_file
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # memory of a GPU holds what was there before
    monkeypatch.setattr(torch, "from_file", lambda *arguments, **options: shipped(*arguments, **options).fill_(0x55))
    memory = PeerMemory(one_rank, 1000, CPU)
    assert memory.local.shape == (1000,) and not memory.local.any()
    assert memory.pointers.tolist() == [memory.local.data_ptr()]
    assert list(tmp_path.iterdir()) == []
    memory.local.fill_(7)
    assert bool((memory.local == 7).all())


class Ranks:
    """Threads that stand in for the ranks of a group, each with a host's name and a GPU that all of them see."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpus: list[int], hosts: list[str], access: Any) -> None:
        """access: of two GPUs, whether the first can address the second's memory."""
        self.gpus, self.place = gpus, threading.local()
        self.barrier, self.given = threading.Barrier(len(gpus), timeout=60), [None] * len(gpus)

        def gather(out: list[Any], mine: Any, group: Any = None) -> None:
            out[:] = self.exchange(group, mine)

        monkeypatch.setattr(dist, "all_gather_object", gather)
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: len(gpus))
        monkeypatch.setattr(peer_memory, "exchange", self.exchange, raising=False)
        monkeypatch.setattr(peer_memory, "_link_has_atomics", lambda device, peer: True, raising=False)
        monkeypatch.setattr(socket, "gethostname", lambda: hosts[self.place.rank])
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(uuid=f"uuid {self.number(gpu)}"))
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: access(self.number(a), self.number(b)))

    @staticmethod
    def number(gpu: Any) -> int:
        return gpu if isinstance(gpu, int) else gpu.index

    def exchange(self, group: Any, mine: Any, *_: Any, **__: Any) -> list[Any]:
        self.given[self.place.rank] = mine
        self.barrier.wait()
        everyone = list(self.given)
        self.barrier.wait()
        return everyone

    def reasons(self) -> list[str | None]:
        """Why they are unreachable, by each rank's word."""

        def ask(rank: int) -> str | None:
            self.place.rank = rank
            return why_unreachable(cast(Any, None), torch.device("cuda", self.gpus[rank]))

        with ThreadPoolExecutor(len(self.gpus)) as pool:
            return list(pool.map(ask, range(len(self.gpus))))


def between_two(gpu: int, other: int) -> bool:
    """As CUDA answers: a GPU is no peer of itself."""
    return gpu != other


def test_two_gpus_of_one_host_reach_each_other(monkeypatch):
    assert Ranks(monkeypatch, [0, 1], ["a", "a"], between_two).reasons() == [None, None]


def test_ranks_of_two_hosts_hear_that_it_works_inside_one(monkeypatch):
    reasons = Ranks(monkeypatch, [0, 1], ["a", "b"], between_two).reasons()
    assert reasons == ["the ranks are on 2 hosts, and it works inside one"] * 2


def test_ranks_that_share_a_gpu_hear_that_each_needs_one(monkeypatch):
    reasons = Ranks(monkeypatch, [1, 1], ["a", "a"], between_two).reasons()
    assert reasons == ["several ranks share one GPU, and it needs one for each"] * 2


@pytest.mark.parametrize("blocked", [(0, 1), (1, 0)], ids=str)
def test_one_way_without_access_is_told_to_both_ranks(monkeypatch, blocked):
    reasons = Ranks(monkeypatch, [0, 1], ["a", "a"], lambda gpu, other: gpu != other and (gpu, other) != blocked).reasons()
    assert reasons[0] == reasons[1] and "access to" in str(reasons[0])
