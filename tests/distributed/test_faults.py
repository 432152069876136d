"""Ranks that are lost, stopped or late, on gloo: who is named, and that processes end. Limits are far above what anything here takes, and
far below the process group's own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from trials import stand_in

from moequant import ConfigMismatchError, MoEQuantDispatcher, PeerTimeoutError
from moequant.testing import run_ranks
from moequant.transport import rendezvous
from moequant.transport.rendezvous import exchange
from moequant.transport.wire import Wire

# of dispatchers: a healthy rank that gets no time on a busy machine must not be blamed
TIMEOUT = 3.0
# of groups
GROUP_SECONDS = 100.0
SETTINGS: dict[str, Any] = {"num_experts": 12, "top_k": 2, "hidden_size": 64, "max_tokens_per_rank": 8, "timeout": TIMEOUT}


def world() -> Any:
    return dist.group.WORLD


def build(group: dist.ProcessGroup | None = None, **settings: Any) -> MoEQuantDispatcher:
    return MoEQuantDispatcher(group, **SETTINGS | settings, transport="collective", device="cpu")


def layer(dispatcher: MoEQuantDispatcher, rank: int) -> None:
    hidden, ids = torch.randn(4, 64), torch.arange(8, dtype=torch.int32).view(4, 2)
    dispatcher(hidden, ids, torch.ones(4, 2), lambda batch: stand_in(batch, rank))


def blamed(call: Callable[[], Any]) -> tuple[int | None, str]:
    """Whom the error of a call names, and its words."""
    start = time.monotonic()
    with pytest.raises(PeerTimeoutError) as raised:
        call()
    assert time.monotonic() - start < GROUP_SECONDS / 2
    return raised.value.rank, str(raised.value)


def fall_away(how: str, survivors_are_done: str) -> None:
    """What happens to the rank that is lost; a late one comes back when the others have given it up."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    store = world().get_group_store()
    store.wait([survivors_are_done], timedelta(seconds=GROUP_SECONDS))


def release(lost: int, pids: list[int], how: str, survivors: int, key: str) -> None:
    """Called by each survivor at its end: the last one wakes the late rank, or ends the stopped one."""
    store = world().get_group_store()
    if store.add(f"{key} so far", 1) == survivors:
        store.set(key, "")
        if how == "stopped":
            os.kill(pids[lost], signal.SIGKILL)


def lose_a_rank(rank: int, ranks: int, how: str, exchange_kind: str) -> tuple[int | None, str]:
    """Rank 1 falls away between two layers; the others raise, and so does a late one when it comes back."""
    dispatcher = build(exchange=exchange_kind)
    pids = exchange(world(), os.getpid(), GROUP_SECONDS, "the test")
    layer(dispatcher, rank)
    if rank == 1:
        fall_away(how, "done")
        return blamed(lambda: layer(dispatcher, rank))
    result = blamed(lambda: layer(dispatcher, rank))
    # the fault stays: later calls return at once
    assert "lost a rank earlier" in blamed(lambda: layer(dispatcher, rank))[1]
    dispatcher.close()
    release(1, pids, how, ranks - 1, "done")
    return result


@pytest.mark.parametrize(
    ("how", "ranks", "exchange_kind"),
    [
        ("killed", 2, "packed"),
        ("killed", 3, "padded"),
        ("killed", 4, "packed"),
        ("stopped", 2, "padded"),
        ("stopped", 4, "packed"),
        ("late", 3, "padded"),
    ],
)
def test_survivors_of_a_collective_all_name_the_lost_rank(how, ranks, exchange_kind):
    results = run_ranks(lose_a_rank, ranks, how, exchange_kind, may_die=(1,), timeout=GROUP_SECONDS)
    late = results.pop(1)
    for named, words in results:
        assert named == 1
        assert "rank 1 of the group is lost or late; build a dispatcher on a new group" in words
        silent = re.search(r"had no answer for (\d\S*) s", words)
        assert silent or "the connection broke after 0" in words
        assert silent is None or float(silent[1]) > 0.9 * TIMEOUT
        # of more than two ranks, one may wait for another that has noticed
        if ranks == 2:
            assert (silent is None) == (how == "killed")
    if how == "late":
        assert late[0] == 1
        assert "this rank, 1 of the group, was late, and the others went on without it" in late[1]


def come_late(rank: int, ranks: int) -> None:
    """Later than `timeout`, as a rank does that compiles kernels."""
    with build(timeout=0.5, first_timeout=GROUP_SECONDS / 2) as dispatcher:
        for _ in range(2):
            time.sleep(1.5 * rank)
            layer(dispatcher, rank)
        assert dispatcher.check() == 0


def test_a_rank_may_be_late_in_first_calls():
    run_ranks(come_late, 2, timeout=GROUP_SECONDS)


def lose_the_store(rank: int, ranks: int) -> tuple[int | None, str] | None:
    """Rank 0, which holds the store, is killed: of three ranks nobody can say who it was."""
    server = TCPStore("127.0.0.1", 0, ranks, True, wait_for_workers=False) if rank == 0 else None
    port: Any = exchange(world(), server and server.port, GROUP_SECONDS, "the test")[0]
    dist.destroy_process_group()
    store = server or TCPStore("127.0.0.1", port, ranks, False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=GROUP_SECONDS))
    dispatcher = build()
    layer(dispatcher, rank)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return blamed(lambda: layer(dispatcher, rank))


@pytest.mark.parametrize("ranks", [2, 3])
def test_without_the_store_two_ranks_know_and_more_say_that_they_can_not(ranks):
    results = run_ranks(lose_the_store, ranks, may_die=(0,), timeout=GROUP_SECONDS)[1:]
    for named, words in results:
        if ranks == 2:
            assert named == 0
            assert "rank 0 of the group is lost" in words
        else:
            assert named is None
            assert "which can't be said: the store of the process group is gone" in words


def never_come(rank: int, ranks: int, how: str) -> tuple[int | None, str] | None:
    """Of a subgroup of ranks 0, 2, 3 rank 2, its rank 1, does not come to the constructor."""
    group: Any = dist.new_group([0, 2, 3])
    pids = exchange(world(), os.getpid(), GROUP_SECONDS, "the test")
    if rank == 1:
        return None
    if rank == 2:
        fall_away(how, "done")
        # whoever comes too late waits for those that gave up, and not for long either
        return blamed(lambda: build(group))
    result = blamed(lambda: build(group))
    release(2, pids, how, 2, "done")
    return result


@pytest.mark.parametrize("how", ["killed", "late"])
def test_a_rank_that_never_comes_to_the_constructor_is_named(how):
    results = run_ranks(never_come, 4, how, may_die=(2,), timeout=GROUP_SECONDS)
    for named, words in (results[0], results[3]):
        assert named == 1
        assert f"rank 1 of the group did not come to the dispatcher's constructor within {TIMEOUT:g} s" in words
    if how == "late":
        assert results[2][0] == 0


def refuse_and_agree(rank: int, ranks: int) -> None:
    """A rank whose settings are refused, or that has another kind of device, tells the others, and the group is as good as before."""
    with pytest.raises(ValueError, match="timeout must be a number of seconds from 0.001 to 1e6, got -1") as raised:
        build(timeout=-1 if rank else TIMEOUT)
    assert isinstance(raised.value, ConfigMismatchError) == (rank == 0)
    with pytest.raises(ValueError, match="device must be") as raised:
        MoEQuantDispatcher(**SETTINGS, device="meta" if rank else "cpu")
    # a rank that did not get as far as to tell is waited for, named, and met when it comes
    store = world().get_group_store()
    if rank == 1:
        with pytest.raises(TypeError, match="num_expert"):
            build(num_expert=4)
        store.wait(["given up"], timedelta(seconds=GROUP_SECONDS))
    else:
        assert blamed(build)[0] == 1
        store.set("given up", "")
    layer(build(), rank)


def test_constructors_that_failed_leave_the_group_as_it_was():
    run_ranks(refuse_and_agree, 2, timeout=GROUP_SECONDS)


SCRIPT = """
import sys, time
import torch, torch.distributed as dist
from moequant import MoEQuantDispatcher

def hook(*error):
    sys.__excepthook__(*error)
    print("raised at", time.monotonic(), flush=True)

sys.excepthook = hook
rank, store, where = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
if rank == 1 and where == "constructor":
    time.sleep(1000)
dispatcher = MoEQuantDispatcher(num_experts=2, top_k=1, hidden_size=64, max_tokens_per_rank=4, timeout=3.0, device="cpu")
if rank == 1:
    time.sleep(1000)
batch, handle = dispatcher.dispatch(torch.ones(4, 64), torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1))
"""


@pytest.mark.parametrize("where", ["constructor", "dispatch"])
def test_a_script_ends_soon_after_an_error_that_it_does_not_catch(where, tmp_path):
    # the group's own limit is torch's default, 30 minutes, and the other rank lives
    arguments = [sys.executable, "-c", SCRIPT]
    pipe = subprocess.PIPE
    late = subprocess.Popen([*arguments, "1", str(tmp_path / "store"), where])
    survivor = subprocess.Popen([*arguments, "0", str(tmp_path / "store"), where], stdout=pipe, stderr=pipe, text=True)
    try:
        out, errors = survivor.communicate(timeout=GROUP_SECONDS)
        ended = time.monotonic()
        assert late.poll() is None
    finally:
        for process in (late, survivor):
            process.kill()
            process.wait()
    assert "PeerTimeoutError" in errors
    assert "rank 1 of the group" in errors
    assert survivor.returncode == 1, errors
    # mostly the interpreter's own end, which takes seconds on a busy machine
    assert ended - float(out.split("raised at ")[1]) < 30.0


class Failing:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def wait(self, timeout: timedelta) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("words", "is_the_wires"),
    [
        ("[/build/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:420: Connection reset by peer", True),
        ("[/build/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation", True),
        ("Operation timed out!", True),
        ("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", False),
        ("split sizes don't match the tensor", False),
    ],
)
def test_only_what_the_wire_says_is_taken_for_a_lost_rank(words, is_the_wires, monkeypatch):
    monkeypatch.setattr("moequant.transport.wire.roll_call", lambda group, timeout: [1])
    group: Any = type("Group", (), {"rank": lambda self: 0, "size": lambda self: 2})()
    error = RuntimeError(words)
    with pytest.raises(RuntimeError) as raised:
        Wire(group, 1.0, waits=True)._wait("all_gather", Failing(error))
    assert isinstance(raised.value, PeerTimeoutError) == is_the_wires
    assert raised.value is error or raised.value.__cause__ is error


def test_the_margins_are_what_the_tests_think():
    assert 3 * TIMEOUT + rendezvous.GRACE_SECONDS < GROUP_SECONDS / 2
