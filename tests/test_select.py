"""Which transport "auto" means, and what is said when it can't be the fastest."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from moequant.config import DispatcherConfig
from moequant.errors import UnreachableError
from moequant.transport import peer_memory, select

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
    monkeypatch.setattr(select, "why_unreachable", lambda group, device, timeout: reason)
    return select.resolve(config(**settings), GROUP, device).transport


def test_auto_is_symmetric_where_memory_can_be_reached(monkeypatch):
    assert resolved(monkeypatch, None, GPU) == "symmetric"
    assert resolved(monkeypatch, None, GPU, world_size=1) == "local"
    assert resolved(monkeypatch, None, CPU) == "collective"
    # `exchange=` is a setting of "collective" alone: who gives it wants that transport
    assert resolved(monkeypatch, None, GPU, exchange="packed") == "collective"
    assert resolved(monkeypatch, None, GPU, transport="collective") == "collective"


@pytest.mark.parametrize("transport", ["auto", "collective"])
def test_an_exchange_is_packed_on_a_cpu_unless_another_is_asked_for(transport):
    assert select.resolve(config(transport), GROUP, CPU).exchange == "packed"
    assert select.resolve(config(transport, exchange="padded"), GROUP, CPU).exchange == "padded"
    assert select.resolve(config("collective"), GROUP, GPU).exchange == "auto"


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


class Peers:
    """Four GPUs of one host, of which this process has the first, as torch and the driver show them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, access: set[int], atomics: set[int]) -> None:
        self.asked: list[tuple[int, int]] = []
        self.atomics = atomics
        properties = [SimpleNamespace(uuid=f"uuid-{index}") for index in range(4)]
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[getattr(index, "index", index)])
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: peer in access)
        monkeypatch.setattr(peer_memory, "_link_has_atomics", self.link_has_atomics)

    def link_has_atomics(self, device: int, peer: int) -> bool:
        self.asked.append((device, peer))
        return peer in self.atomics

    def problem(self, monkeypatch: pytest.MonkeyPatch, *ranks: tuple[str, str, str]) -> str | None:
        """Why the ranks of these hosts, GPUs and kinds of device can't reach each other; this process's is the first."""
        answers = iter([list(ranks), None])

        def exchange(group: Any, mine: Any, timeout: float, place: str) -> list[Any]:
            everyone = next(answers)
            return [mine] if everyone is None else everyone

        monkeypatch.setattr(peer_memory, "exchange", exchange)
        return peer_memory.why_unreachable(GROUP, GPU, 1.0)


def ranks_on(*gpus: int, host: str = "here") -> list[tuple[str, str, str]]:
    return [(host, f"uuid-{gpu}", "cuda") for gpu in gpus]


def test_gpus_with_atomics_over_their_link_can_be_reached(monkeypatch):
    peers = Peers(monkeypatch, access={1, 2}, atomics={1, 2})
    assert peers.problem(monkeypatch, *ranks_on(0, 1, 2)) is None
    # the fourth is nobody's
    assert peers.asked == [(0, 1), (0, 2)]


def test_gpus_that_only_pcie_links_can_not_be_reached(monkeypatch):
    peers = Peers(monkeypatch, access={1, 2, 3}, atomics={1})
    problem = peers.problem(monkeypatch, *ranks_on(0, 1, 2))
    assert (
        problem == "NVIDIA X 0 and GPU 2 are linked by PCIe, and it needs NVLink: atomics that reach the other GPU's memory whole"
    )


def test_gpus_without_access_and_drivers_that_do_not_answer_can_not_be_reached(monkeypatch):
    peers = Peers(monkeypatch, access={1}, atomics={1, 2})
    assert peers.problem(monkeypatch, *ranks_on(0, 1, 2)) == "NVIDIA X 0 and GPU 2 have no access to each other's memory"

    def silent(device: int, peer: int) -> bool:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(peer_memory, "_link_has_atomics", silent)
    problem = peers.problem(monkeypatch, *ranks_on(0, 1))
    assert problem == "the CUDA driver can't be asked what links the GPUs (libcuda.so.1: cannot open shared object file)"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert peers.problem(monkeypatch, *ranks_on(0, 1)) == "it is written for NVIDIA GPUs"


def test_ranks_on_hosts_or_on_one_gpu_or_too_many_can_not_be_reached(monkeypatch):
    peers = Peers(monkeypatch, access={1, 2, 3}, atomics={1, 2, 3})
    problem = peers.problem(monkeypatch, *ranks_on(0), *ranks_on(1, host="there"))
    assert problem == "the ranks are on 2 hosts, and it works inside one"
    assert peers.problem(monkeypatch, *ranks_on(0, 0)) == "several ranks share one GPU, and it needs one for each"
    assert peers.problem(monkeypatch, *ranks_on(0), ("here", "41", "cpu")) == "it needs a GPU on every rank"
    problem = peers.problem(monkeypatch, *ranks_on(*range(257)))
    assert problem == "it serves up to 256 ranks, and the group has 257"


class Driver:
    """libcuda, as ctypes calls it."""

    def __init__(self, error: int = 0, native: int = 0) -> None:
        self.error, self.native = error, native
        self.asked: tuple[int, int, int] | None = None

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, handle: Any, ordinal: int) -> int:
        # a handle that is no ordinal
        handle._obj.value = 10 + ordinal
        return 0

    def cuDeviceGetP2PAttribute(self, value: Any, attribute: int, source: Any, target: Any) -> int:
        self.asked = attribute, source.value, target.value
        value._obj.value = self.native
        return self.error


def test_the_driver_is_asked_for_native_atomics(monkeypatch):
    for native in (0, 1):
        driver = Driver(native=native)
        monkeypatch.setattr(ctypes, "CDLL", lambda name, driver=driver: driver)
        assert peer_memory._link_has_atomics(2, 5) is bool(native)
        assert driver.asked == (3, 12, 15)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(error=101))
    with pytest.raises(OSError, match="error 101 of the CUDA driver"):
        peer_memory._link_has_atomics(2, 5)


@pytest.mark.multigpu
def test_gpus_of_one_nvlink_domain_have_atomics_over_their_link():
    count = torch.cuda.device_count()
    identities = [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]
    for device in range(count):
        assert all(peer_memory._link_has_atomics(device, peer) for peer in range(count) if peer != device)
        assert peer_memory.peer_access_problem(torch.device("cuda", device), identities) is None


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


@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize(("settings", "outputs"), [({}, 0), ({"overlap": False}, 1), ({"reduce": "per_rank"}, 1)], ids=str)
def test_the_output_of_layers_over_symmetric_is_counted_where_there_is_one(settings, outputs, layout):
    """Rows that GEMM 2 pushes need none. What is pulled lies in shared memory, sums of ranks are made of what doesn't."""
    sizes: dict[str, Any] = {"num_experts": 4, "top_k": 2, "hidden_size": 256, "max_tokens_per_rank": 32, "world_size": 2}
    sizes["layout"] = layout
    pushing = select.buffer_bytes(**sizes, transport="symmetric", intermediate_size=128)
    rows = DispatcherConfig(**sizes).total_rows
    inner = rows * (128 + 4)
    assert pushing - select.buffer_bytes(**sizes, transport="symmetric") == inner
    taken = select.buffer_bytes(**sizes, **settings, transport="symmetric", intermediate_size=128)
    # notes are longer, fewer rows come back, and no addresses are kept for them: all that is less than the output
    assert round((taken - pushing) / (rows * 256 * 2)) == outputs
