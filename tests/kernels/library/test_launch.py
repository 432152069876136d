"""What tells launches apart, with a kernel and a driver that only write down what they are asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import torch

from moequant.kernels.library import launch
from moequant.kernels.library.launch import Launchable
from written_launches import Kernel, install_gpu


@pytest.fixture(autouse=True)
def device(monkeypatch) -> SimpleNamespace:
    return install_gpu(monkeypatch)


def launchable(kernel: Kernel) -> Launchable:
    return Launchable(cast(Any, kernel))


def test_a_launch_of_a_known_kind_starts_what_was_compiled_with_the_arguments_in_order():
    kernel = Kernel("x", "n", "k", "BLOCK", "MODE", "LAST", LAST=9)
    wrapped, x = launchable(kernel), torch.zeros(8)
    for _ in range(3):
        wrapped[(4, 2)](x, 5, MODE="m", BLOCK=64, k=3, num_warps=4)
    assert kernel.compiled == 1
    # addresses of tensors, then what stood by name, in the order of the parameters; options are none
    assert kernel.started == [(1, 4, 2, 1, (x.data_ptr(), 5, 3, 64, "m", 9))] * 2


def test_the_address_is_read_at_each_launch():
    kernel = Kernel("x")
    wrapped, tensors = launchable(kernel), [torch.zeros(8) for _ in range(3)]
    for x in tensors:
        wrapped[(1,)](x)
    assert kernel.compiled == 1 and [start[-1] for start in kernel.started] == [(x.data_ptr(),) for x in tensors[1:]]


class Pair(NamedTuple):
    x: torch.Tensor
    n: int


def test_a_tensor_in_a_tuple_starts_by_its_address_too():
    kernel = Kernel("pair", "size")
    wrapped, pairs = launchable(kernel), [Pair(torch.zeros(8), 5) for _ in range(3)]
    for pair in pairs:
        wrapped[(1,)](pair, size=(pair, 2, None))
    expected = [((pair.x.data_ptr(), 5), ((pair.x.data_ptr(), 5), 2, None)) for pair in pairs[1:]]
    assert kernel.compiled == 1 and [start[-1] for start in kernel.started] == expected


BASE = torch.zeros(64)
KINDS = [
    (BASE, BASE[1:]),
    (BASE, BASE.int()),
    (BASE, None),
    (BASE, torch.nn.Parameter(BASE[1:], requires_grad=False)),
    (5, 6),
    (5, 2**40),
    (0.5, 0.25),
    (Pair(BASE, 5), Pair(BASE[1:], 5)),
    (Pair(BASE, 5), Pair(BASE, 6)),
]


@pytest.mark.parametrize(("one", "other"), KINDS)
@pytest.mark.parametrize("by_name", [False, True])
def test_what_may_be_compiled_otherwise_is_another_kind(one, other, by_name):
    kernel = Kernel("x")
    wrapped = launchable(kernel)
    for value in (one, other, one, other):
        wrapped[(1,)](x=value) if by_name else wrapped[(1,)](value)
    assert kernel.compiled == 2 and [start[0] for start in kernel.started] == [1, 2]


def test_devices_and_options_are_kinds_of_their_own(device):
    kernel = Kernel("x")
    wrapped = launchable(kernel)
    for device.current in (0, 1, 0):
        for warps in (4, 8):
            wrapped[(1,)](BASE, num_warps=warps)
    assert kernel.compiled == 4 and [start[0] for start in kernel.started] == [1, 2]


def test_descriptors_are_told_apart_by_what_they_are_compiled_for():
    def descriptor(block: list[int]) -> Any:
        return SimpleNamespace(base=BASE, block_shape=block, layout="l", padding="zero")

    kernel = Kernel("x")
    wrapped = launchable(kernel)
    for block in ([64, 128], [64, 128], [128, 128]):
        wrapped[(1,)](descriptor(block))
    assert kernel.compiled == 2


def test_ten_thousand_shapes_are_not_all_remembered():
    wrapped = launchable(Kernel("x", "n"))
    for number in range(10000):
        wrapped[(1,)](BASE, number)
    assert len(wrapped.prepared) <= launch.MOST_KINDS


def test_a_profiler_sees_triton_s_own_launches(monkeypatch):
    kernel = Kernel("x")
    wrapped = launchable(kernel)
    wrapped[(1,)](BASE)
    monkeypatch.setattr(launch.knobs.runtime, "launch_enter_hook", SimpleNamespace(calls=[print]))
    wrapped[(1,)](BASE)
    assert kernel.compiled == 2 and kernel.started == []


def test_what_compiles_without_starting_is_not_remembered(monkeypatch):
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda *arguments, **options: None)
    wrapped = launchable(Kernel("x"))
    wrapped[(1,)](BASE)
    assert not wrapped.prepared


def test_recorded_launches_are_made_again_with_the_values_that_are_given():
    kernel = Kernel("x", "n")
    wrapped, x = launchable(kernel), torch.zeros(8)
    with launch.record() as first:
        wrapped[(1,)](x, 5)
    # the first is Triton's
    assert first == [None]
    with launch.record() as launches:
        wrapped[(2,)](x, 5)
        wrapped[(3,)](x, n=5)
        wrapped[(3,)](x, n=5)
    assert [entry is None for entry in launches] == [False, True, False]
    assert launch.recording.launches is None
    for entry in (launches[0], launches[2]):
        assert entry.arguments == {5: x, 6: 5} and entry.values[5:] == [x.data_ptr(), 5]
        entry.start(*entry.grid, 7, *entry.values[:5], 1, 2)
    assert kernel.started[2:] == [(1, 2, 1, 1, (1, 2)), (2, 3, 1, 1, (1, 2))]


def test_a_descriptor_s_value_at_another_address_is_encoded_for_it_once(monkeypatch):
    """As Triton 3.6's C function takes it: first what depends on the address, then sizes."""
    asked = []

    def encoding(given: Any, of: Any) -> list[Any]:
        asked.append(given.base.data_ptr())
        return [(given.base.data_ptr(), of), 3, 4]

    monkeypatch.setattr("triton.backends.nvidia.driver.make_tensordesc_arg", encoding)
    own = SimpleNamespace(base=BASE, block_shape=[64], layout="l", padding="zero")
    prepared = launch.Prepared(print, (), 1, (), {}, {2: "how"})
    assert launch.encoded(own, prepared, "how")[0] == (BASE.data_ptr(), "how")
    made = launch.Descriptor(own, prepared, 2)
    for address in (1024, 2048, 1024):
        assert made.at(address) == (address, "how")
    assert asked == [BASE.data_ptr(), 1024, 2048]
    for address in range(2000):
        made.at(16 * address)
    assert len(made.known) <= launch.MOST_ADDRESSES
    assert own.base is BASE and launch.Descriptor(own, prepared, 1).at(1024).base == (1024, BASE.dtype)
