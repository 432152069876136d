"""What ranks tell each other through a group's store. Threads with one store stand in for the ranks."""

from __future__ import annotations

import threading
import time
from typing import Any, cast

import pytest
from torch._C._distributed_c10d import FileStore, HashStore, Store

from moequant.errors import PeerTimeoutError
from moequant.transport import rendezvous
from moequant.transport.rendezvous import exchange, named, roll_call
from thread_ranks import Member, members, on_each


@pytest.mark.parametrize("kind", ["hash", "file"])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_all_ranks_get_what_each_gives_and_the_store_is_left_clean(ranks, kind, tmp_path):
    # an exchange that is quick may begin while a slower rank still reads the one before
    store = HashStore() if kind == "hash" else FileStore(str(tmp_path / "store"), 1)
    group = members(ranks, store)

    def rounds(member: Any) -> list[Any]:
        results = []
        for turn in range(6):
            time.sleep(0.003 * ((turn + member.rank()) % 3))
            results.append(exchange(member, (turn, member.rank()), 60.0, "the test"))
        return results

    expected = [[(turn, rank) for rank in range(ranks)] for turn in range(6)]
    assert on_each(group, rounds) == [expected] * ranks
    left = {f"moequant/exchanges of {rank}" for rank in range(ranks)}
    assert {key for key in left if store.check([key])} == left
    # a file store counts a key of its own
    assert store.num_keys() == ranks + (kind == "file")


@pytest.mark.parametrize("missing", [[1], [0, 2]])
def test_who_does_not_come_is_named_and_may_come_later(missing):
    group = members(4)
    present = [member for member in group if member.rank() not in missing]
    start = time.monotonic()
    errors = on_each(present, lambda member: exchange(member, member.rank(), 0.3, "the meeting"))
    assert time.monotonic() - start < 10.0
    for error in errors:
        assert isinstance(error, PeerTimeoutError)
        assert error.rank == missing[0]
        assert f"{named(missing)} of the group did not come to the meeting within 0.3 s: lost, late, or stopped" in str(error)
    # nothing is left of those that gave up: together with the others they meet
    assert on_each(group, lambda member: exchange(member, member.rank(), 60.0, "the meeting")) == [[0, 1, 2, 3]] * 4


def test_a_late_rank_is_not_told_what_others_have_withdrawn():
    group = members(2)
    assert on_each(group[:1], lambda member: exchange(member, "early", 0.1, "the meeting"))[0].rank == 1
    error = on_each(group[1:], lambda member: exchange(member, "late", 0.1, "the meeting"))[0]
    assert isinstance(error, PeerTimeoutError)
    assert error.rank == 0


def test_a_rank_that_does_not_wait_is_heard():
    group = members(2)
    assert exchange(group[0], "refused", 0.0, "the meeting", wait=False) == []
    assert exchange(group[1], "fine", 60.0, "the meeting") == ["refused", "fine"]
    assert on_each(group, lambda member: exchange(member, "next", 60.0, "the meeting")) == [["next"] * 2] * 2


class GoneStore(Store):
    """A store whose process has ended, or was stopped: it raises, or never answers."""

    def __init__(self, answers: bool) -> None:
        super().__init__()
        self.answers, self.released = answers, threading.Event()

    def add(self, key: str, value: int) -> int:
        if not self.answers:
            self.released.wait()
        raise RuntimeError("Broken pipe\nException raised from sendBytes")

    def set(self, key: str, value: Any) -> None:
        self.add(key, 0)


@pytest.mark.parametrize("answers", [True, False])
def test_a_store_that_is_gone_is_an_error_in_words_and_in_time(answers, monkeypatch):
    monkeypatch.setattr(rendezvous, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(rendezvous, "GRACE_SECONDS", 0.1)
    store = GoneStore(answers)
    reason = "Broken pipe" if answers else "no answer for 0.3 s"
    with pytest.raises(PeerTimeoutError, match=rf"can't meet at the place: the store .* is gone \({reason}\).*rank 0's") as info:
        exchange(cast(Any, Member(store, 1, 2)), None, 0.1, "the place")
    assert info.value.rank is None
    with pytest.raises(rendezvous.StoreError, match="the store of the process group is gone"):
        roll_call(cast(Any, Member(store, 1, 2)), 0.1)
    store.released.set()


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_rank_that_misses_the_roll_call_is_lost_for_all(ranks, monkeypatch):
    monkeypatch.setattr(rendezvous, "GRACE_SECONDS", 0.3)
    group = members(ranks)

    def noticed(member: Any) -> list[int]:
        # some notice later than others do
        time.sleep(0.1 * member.rank())
        return roll_call(member, 60.0)

    survivors = [member for member in group if member.rank() != 1]
    assert on_each(survivors, noticed) == [[1]] * (ranks - 1)
    # it was late, and hears what the others have said
    assert roll_call(group[1], 60.0) == [1]


def test_nobody_is_lost_if_all_ranks_notice(monkeypatch):
    monkeypatch.setattr(rendezvous, "GRACE_SECONDS", 30.0)

    def noticed(member: Any) -> list[int]:
        time.sleep(0.1 * member.rank())
        return roll_call(member, 60.0)

    assert on_each(members(3), noticed) == [[]] * 3


def test_several_ranks_that_miss_the_roll_call_are_lost_after_the_limit():
    group = members(4)
    start = time.monotonic()
    assert on_each(group[2:], lambda member: roll_call(member, 0.4)) == [[0, 1]] * 2
    assert time.monotonic() - start >= 0.4
