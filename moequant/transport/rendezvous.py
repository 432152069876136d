"""What the ranks of a group tell each other without a collective: by keys in the group's store, under a time limit.

A collective that fails says neither who is missing, nor lets its process end before the group's own limit. Keys do both.
"""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from moequant.errors import PeerTimeoutError

T = TypeVar("T")

# between two looks into the store, at first and at most
POLL_SECONDS = 0.001, 0.05
# for the last of several ranks that notice one fault to say so, some ms behind the others
GRACE_SECONDS = 1.0
# for a store to answer, which takes less than a ms
ANSWER_SECONDS = 5.0
# what a rank gives in place of its value when it waits no longer
GAVE_UP = b""
ADVICE = "build a dispatcher on a new group of the ranks that are left"


class StoreError(RuntimeError):
    """The group's store is gone, or does not answer."""


def exchange(group: dist.ProcessGroup, mine: T, timeout: float, place: str, *, wait: bool = True) -> list[T]:
    """What each rank of the group gives, by rank. Collective: all ranks make the same exchanges, in one order.

    mine: anything that pickle takes. place: where the ranks meet, as in "did not come to ..". wait: a rank that can't go on anyway need
    not wait for the others; it gets an empty list.

    Raises PeerTimeoutError with the first rank that did not come within `timeout` seconds, or with None if the store is gone.
    """
    try:
        everyone, missing = _in_time(lambda: _exchange(group, pickle.dumps(mine), timeout, wait), timeout + ANSWER_SECONDS)
    except StoreError as error:
        raise PeerTimeoutError(f"the ranks of the group can't meet at {place}: {error}; {ADVICE}") from error
    if missing:
        raise PeerTimeoutError(
            f"{named(missing)} of the group did not come to {place} within {timeout:g} s: lost, late, or stopped by an error before, "
            f"which its own output shows. Raise timeout if it was only slow, or {ADVICE}",
            missing[0],
        )
    return [pickle.loads(theirs) for theirs in everyone]


def roll_call(group: dist.ProcessGroup, timeout: float) -> list[int]:
    """The ranks that are lost, after a fault that ends the group. Each rank that noticed calls it, and all get the same answer: those
    that had not called it after `timeout` seconds, or a little after all but one had. Empty if all did.

    Raises StoreError if the store is gone.
    """
    return _in_time(lambda: _roll_call(group, timeout), timeout + GRACE_SECONDS + ANSWER_SECONDS)


def named(ranks: list[int]) -> str:
    """[2] as "rank 2", [0, 2] as "ranks 0, 2"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _exchange(group: dist.ProcessGroup, mine: bytes, timeout: float, wait: bool) -> tuple[list[bytes], list[int]]:
    """What each rank gives, or the ranks that are missing.

    Keys, of exchange n: n/r what rank r gives; n/arrived how many gave it; n/complete that all did; n/read how many are done. The last
    that is done deletes them. What stays is the number of exchanges of each rank.
    """
    store, rank, ranks = _store(group, "moequant"), group.rank(), group.size()
    number = store.add(f"exchanges of {rank}", 0)
    keys = [f"{number}/{peer}" for peer in range(ranks)]
    arrived, complete, read = (f"{number}/{word}" for word in ("arrived", "complete", "read"))
    store.set(keys[rank], mine)
    if store.add(arrived, 1) == ranks:
        store.set(complete, "")
    everyone = []
    if wait:
        deadline, pause = time.monotonic() + timeout, POLL_SECONDS[0]
        while not store.check([complete]):
            if time.monotonic() > deadline:
                given = [store.get(key) if store.check([key]) else None for key in keys]
                if all(given):
                    break
                store.add(arrived, -1)
                store.set(keys[rank], GAVE_UP)
                # who gave up is to blame for a rank that comes later, not for one that waited for the same others
                blamed = None if None in given else GAVE_UP
                return [], [peer for peer, value in enumerate(given) if value == blamed]
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS[1])
        everyone = [store.get(key) for key in keys]
        if GAVE_UP in everyone:
            return [], [everyone.index(GAVE_UP)]
    store.add(f"exchanges of {rank}", 1)
    if store.add(read, 1) == ranks:
        for key in (*keys, arrived, complete, read):
            store.delete_key(key)
    return everyone, []


def _roll_call(group: dist.ProcessGroup, timeout: float) -> list[int]:
    store, rank = _store(group, "moequant/fault"), group.rank()
    store.set(f"{rank}", "here")
    missing = [peer for peer in range(group.size()) if peer != rank]
    deadline, pause = time.monotonic() + timeout, POLL_SECONDS[0]
    while missing and not store.check(["verdict"]):
        missing = [peer for peer in missing if not store.check([f"{peer}"])]
        # the last one may be about to notice
        if len(missing) == 1:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            break
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS[1])
    # who is first decides for all
    return json.loads(store.compare_set("verdict", "", json.dumps(missing)))


def _store(group: dist.ProcessGroup, prefix: str) -> Any:
    """A part of the group's store, whose keys begin so."""
    from torch._C._distributed_c10d import PrefixStore

    return PrefixStore(prefix, group.get_group_store())


def _in_time(work: Callable[[], T], seconds: float) -> T:
    """Calls work, which uses a store, in a thread of its own, since a store whose process is stopped never answers.

    Raises StoreError if it fails, or takes longer.
    """
    outcome: list[T] = []
    problem: list[Exception] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            problem.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if outcome:
        return outcome[0]
    said = str(problem[0]).partition("\n")[0] if problem else f"no answer for {seconds:g} s"
    raise StoreError(
        f"the store of the process group is gone ({said}), most likely with the process that held it: rank 0's, or a launcher's"
    ) from (problem[0] if problem else None)
