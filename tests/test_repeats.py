"""Steps whose launches are repeated: which inputs are put in anew, and what is not repeated."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from moequant import ExpertBatch, GroupedExperts, MoEQuantDispatcher, quantization, quantize_expert_batch
from moequant.kernels.library import launch
from moequant.kernels.library.arguments import Rows
from moequant.kernels.library.launch import Launchable
from moequant.repeats import MOST_STEPS, Repeats, members_of
from moequant.testing import assert_bit_equal, routing
from written_launches import Kernel, install_gpu


@pytest.fixture
def gpu(monkeypatch) -> SimpleNamespace:
    """CPU tensors are on it."""
    active = install_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Repeats, "device", lambda self, x: 0)
    return active


class Step:
    """A step of one kernel on (x, kept, y, number), and how often it was asked itself."""

    def __init__(self, change: Callable[[Tensor, Tensor], Any] = lambda x, y: (x, y)) -> None:
        self.kernel = Kernel("x", "kept", "y", "n")
        self.wrapped = Launchable(cast(Any, self.kernel))
        self.kept = torch.zeros(16)
        self.change = change
        self.asked = 0
        self.repeats = Repeats()
        # the first launch of a kind is Triton's, which can't be repeated
        for _ in range(2):
            self(torch.zeros(16), torch.zeros(16))
        self.asked = 0
        self.kernel.started.clear()

    def __call__(self, x: Tensor, y: Tensor, *settings: Any) -> Any:
        def call() -> str:
            self.asked += 1
            first, second = self.change(x, y)
            self.wrapped[(2,)](first, self.kept, second, n=5)
            return "result"

        return self.repeats.run(x, (x, y), settings, call)


def held_by(step: Step) -> list[Tensor]:
    (recorded,) = step.repeats._steps.values()
    assert recorded is not None
    arguments = recorded[0][0].launch.arguments
    return [part for part in members_of(tuple(arguments.values())) if isinstance(part, Tensor)]


def test_a_step_that_comes_again_is_launched_with_the_addresses_of_its_inputs(gpu):
    step = Step()
    inputs = [(torch.zeros(16), torch.zeros(16)) for _ in range(3)]
    results = [step(*both) for both in inputs]
    assert step.asked == 0 and results == ["result"] * 3
    assert [started[-1] for started in step.kernel.started] == [
        (x.data_ptr(), step.kept.data_ptr(), y.data_ptr(), 5) for x, y in inputs
    ]


def test_inputs_in_tuples_are_put_in_anew(gpu):
    other = torch.zeros(16)
    step = Step(lambda x, y: (Rows(x, 16), (other, y, 1)))
    inputs = [(torch.zeros(16), torch.zeros(16)) for _ in range(3)]
    for both in inputs:
        step(*both)
    assert step.asked == 0
    assert [started[-1] for started in step.kernel.started] == [
        ((x.data_ptr(), 16), step.kept.data_ptr(), (other.data_ptr(), y.data_ptr(), 1), 5) for x, y in inputs
    ]
    assert [id(tensor) for tensor in held_by(step)] == [id(step.kept), id(other)]


def test_inputs_may_change_places(gpu):
    step, x, y = Step(), torch.zeros(16), torch.zeros(16)
    for both in ((x, y), (y, x)):
        step(*both)
    places = [(x.data_ptr(), y.data_ptr()), (y.data_ptr(), x.data_ptr())]
    assert [(values[0], values[2]) for *_, values in step.kernel.started] == places


X = torch.zeros(64)
OTHERS = {
    "dtype": (X[:16].int(), X[16:32]),
    "shape": (X[:8], X[16:32]),
    "stride": (X[:32:2], X[32:48]),
    "alignment": (X[1:17], X[32:48]),
    "settings": (X[:16], X[16:32], "other"),
    "a negative view": (X[:16], torch._neg_view(X[16:32])),  # pyright: ignore[reportPrivateImportUsage]
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_step_may_depend_on_makes_another_one(gpu, name):
    step = Step()
    step(*OTHERS[name])
    assert step.asked == 1


def test_streams_have_steps_of_their_own(gpu):
    step = Step()
    gpu.stream = 8
    step(torch.zeros(16), torch.zeros(16))
    assert step.asked == 1


def descriptor(x: Tensor) -> SimpleNamespace:
    return SimpleNamespace(base=x, block_shape=[1], padding="zero")


def test_descriptors_of_inputs_are_put_in_anew_and_keep_no_input(gpu):
    step, y = Step(lambda x, y: (descriptor(x), y)), torch.zeros(16)
    inputs = [torch.zeros(16) for _ in range(3)]
    for x in (*inputs, inputs[0]):
        step(x, y)
    assert step.asked == 0
    started = [values for *_, values in step.kernel.started]
    assert [values[0].base for values in started] == [(x.data_ptr(), torch.float32) for x in (*inputs, inputs[0])]
    assert [values[2] for values in started] == [y.data_ptr()] * 4 and started[3][0] is started[0][0]
    assert [id(tensor) for tensor in held_by(step)] == [id(step.kept)]


def test_a_recording_frees_the_input_whose_descriptor_stood_among_its_values(gpu):
    """From Triton 3.7 on a descriptor is launched with the tensor in it."""
    step, x = Step(lambda x, y: (descriptor(x), y)), torch.zeros(32)
    alive = weakref.ref(x)
    step(x, torch.zeros(16))
    assert len(step.repeats._steps) == 2
    # the kernel wrote down what it was started with
    step.kernel.started.clear()
    del x
    assert alive() is None


@pytest.fixture
def watched(monkeypatch) -> SimpleNamespace:
    """Triton's hook: `calls` of it are asked for each launch."""
    hook = SimpleNamespace(calls=[])
    monkeypatch.setattr(launch.knobs.runtime, "launch_enter_hook", hook)
    return hook


def test_a_profiler_sees_a_step_that_was_recorded_and_leaves_no_recording(gpu, watched):
    step, x, y = Step(), torch.zeros(16), torch.zeros(16)
    wider = torch.zeros(32)
    step(x, y)
    for _ in range(2):
        step(x, y)
    assert step.asked == 0
    watched.calls.append(print)
    compiled = step.kernel.compiled
    for _ in range(3):
        step(x, y)
        step(wider, y)
    # each of them by itself and by Triton
    assert step.asked == 6 and step.kernel.compiled == compiled + 6
    watched.calls.clear()
    step.kernel.started.clear()
    for _ in range(3):
        step(x, y)
        step(wider, y)
    assert len(step.kernel.started) + step.kernel.compiled - compiled - 6 == 6, "a launch was left out"
    assert step.asked < 10


def test_a_step_without_a_launch_is_done_itself_each_time(gpu):
    repeats, asked, x = Repeats(), [], torch.zeros(16)
    for _ in range(4):
        repeats.run(x, (x,), (), lambda: asked.append(1))
    assert len(asked) == 4


def test_an_operation_s_tensors_are_its_inputs_in_tuples_too(gpu):
    kernel, repeats, asked = Kernel("x", "pair", "n"), Repeats(), []
    wrapped = Launchable(cast(Any, kernel))

    def operation(x: Tensor, pair: tuple[Tensor, Tensor | None], n: int, text: str) -> None:
        asked.append(text)
        wrapped[(2,)](x, (x, *pair), n=n)

    # Triton's own, then one that is recorded, for each setting
    calls = [(torch.zeros(16), torch.zeros(16)) for _ in range(4)]
    for x, y in calls:
        repeats.call(operation, x, (y, None), 5, "text")
    assert asked == ["text"] * 2
    assert [values for *_, values in kernel.started[1:]] == [
        (x.data_ptr(), (x.data_ptr(), y.data_ptr(), None), 5) for x, y in calls[2:]
    ]
    x, y = calls[0]
    for given in ((x, (y, None), 6, "text"), (x, (y, None), 5, "other"), (x, (y, y), 5, "text"), (x, (None, y), 5, "text")):
        before = len(asked)
        repeats.call(operation, *given)
        assert len(asked) == before + 1


CHANGES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "part of an input": lambda x, y: (x[4:], y),
    "torch's own work": lambda x, y: (x, y.add_(1)),
    "a copy": lambda x, y: (x, y.clone()),
    "memory of its own": lambda x, y: (x, torch.empty(16)),
    "an input in a tuple in a tuple": lambda x, y: (x, (1, (y,))),
    "a descriptor of part of an input": lambda x, y: (x, descriptor(y[4:])),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_step_that_is_not_its_launches_is_done_itself_each_time(gpu, name):
    step = Step(CHANGES[name])
    for _ in range(3):
        step(torch.zeros(16), torch.zeros(16))
    assert step.asked == 3


def test_a_step_that_makes_a_workspace_is_recorded_the_next_time(gpu):
    made = []

    def change(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if not made:
            made.append(torch.empty(16))
        return x, y

    step = Step()
    step.change, step.repeats = change, Repeats()
    for _ in range(4):
        step(torch.zeros(16), torch.zeros(16))
    assert step.asked == 2


def test_two_inputs_in_one_place_are_not_recorded(gpu):
    step, x = Step(), torch.zeros(32)
    step.repeats = Repeats()
    for _ in range(2):
        step(x, x)
    assert step.asked == 2


def test_what_is_no_input_is_held_and_inputs_are_not(gpu):
    step, x = Step(), torch.zeros(16)
    step(x, torch.zeros(16))
    assert [id(tensor) for tensor in held_by(step)] == [id(step.kept)]


def test_ten_thousand_kinds_of_steps_are_not_all_kept(gpu):
    step = Step()
    for number in range(10_000):
        step(torch.zeros(16), torch.zeros(16), number)
    assert len(step.repeats._steps) <= MOST_STEPS


def test_on_a_cpu_each_step_is_done_itself():
    asked: list[int] = []
    for number in range(3):
        Repeats().run(X, (X,), (), lambda number=number: asked.append(number))
    assert asked == [0, 1, 2]


def inputs_of(tokens: int, seed: int, id_dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 256, generator=generator).bfloat16().cuda()
    ids, weights = routing(tokens, 4, 16, "zipf:1", generator)
    return hidden, ids.to("cuda", id_dtype), weights.cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["int8", "none", "fp8_e4m3fn"])
@pytest.mark.parametrize("reduce", ["exact", "per_rank"])
def test_repeated_layers_have_the_bits_of_new_ones(quant, reduce):
    """Layers of a model in turn, numbers of tokens that change, inputs elsewhere each time, two streams: a dispatcher and experts that
    have seen it all, against ones that are new for each call."""
    if quant.startswith("fp8") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8")
    settings: dict[str, Any] = {"num_experts": 16, "top_k": 4, "hidden_size": 256, "max_tokens_per_rank": 64, "quant": quant}
    settings |= {"reduce": reduce}
    generator = torch.Generator().manual_seed(1)
    weights = [
        [torch.randn(16, *shape, generator=generator).bfloat16().cuda() / 16 for shape in ((256, 256), (256, 128))]
        for _ in range(2)
    ]
    layers = [GroupedExperts.from_weights(*pair, quant=quant) for pair in weights]
    side = torch.cuda.Stream()
    with MoEQuantDispatcher(**settings) as dispatcher:
        for number in range(40):
            tokens, which = (1, 64, 17, 0, 64)[number % 5], number % 2
            stream = side if number % 3 == 2 else torch.cuda.current_stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                given = inputs_of(tokens, number, (torch.int64, torch.int32)[number // 5 % 2])
                got = dispatcher(*given, layers[which])
                with MoEQuantDispatcher(**settings) as new:
                    expected = new(*given, GroupedExperts.from_weights(*weights[which], quant=quant))
            torch.cuda.synchronize()
            assert_bit_equal(got, expected)
        kept = [*dispatcher._slots[0].repeats._steps.values()]
        kept += [step for layer in layers for repeats in layer._repeats.values() for step in repeats._steps.values()]
        # one of each layer's calls, and of each dispatch and combine, at least
        assert len(kept) > 6 and None not in kept


@pytest.mark.gpu
def test_repeated_rows_are_pushed_to_the_addresses_of_each_call():
    settings: dict[str, Any] = {"num_experts": 16, "top_k": 4, "hidden_size": 256, "max_tokens_per_rank": 64, "quant": "int8"}
    weights = (torch.randn(16, *shape).bfloat16().cuda() / 16 for shape in ((256, 256), (256, 128)))
    experts = GroupedExperts.from_weights(*weights, quant="int8")
    with MoEQuantDispatcher(**settings) as dispatcher:
        for seed in range(5):
            batch, _ = dispatcher.dispatch(*inputs_of(64, seed))
            pushed = torch.full(batch.values.shape, torch.nan, dtype=torch.bfloat16, device="cuda")
            rows = torch.arange(batch.num_tokens.numel() * batch.values.shape[1], device="cuda").view(batch.sources.shape)
            experts.push(batch, pushed.data_ptr() + rows * 2 * 256)
            expected = experts(batch)
            for expert, count in enumerate(batch.num_tokens.tolist()):
                assert_bit_equal(pushed[expert, :count], expected[expert, :count])
                assert pushed[expert, count:].isnan().all()
        (repeats,) = experts._repeats.values()
        assert len(repeats._steps) == 2 and None not in repeats._steps.values()


@pytest.mark.gpu
def test_experts_of_one_s_own_are_called_each_time():
    calls = []

    def experts(batch: ExpertBatch) -> Tensor:
        calls.append(batch)
        return batch.values.clone()

    settings: dict[str, Any] = {"num_experts": 16, "top_k": 4, "hidden_size": 256, "max_tokens_per_rank": 64, "quant": "none"}
    with MoEQuantDispatcher(**settings) as dispatcher:
        given = inputs_of(20, 0)
        outs = [dispatcher(*given, experts) for _ in range(4)]
    assert len(calls) == 4
    for out in outs[1:]:
        assert_bit_equal(out, outs[0])
        assert out.data_ptr() != outs[0].data_ptr()


@pytest.mark.gpu
def test_weights_that_are_replaced_are_seen():
    settings: dict[str, Any] = {"num_experts": 16, "top_k": 4, "hidden_size": 256, "max_tokens_per_rank": 64, "quant": "none"}
    w13, w2 = torch.ones(16, 256, 256).bfloat16().cuda(), torch.ones(16, 256, 128).bfloat16().cuda()
    experts, given = GroupedExperts(w13, w2), inputs_of(20, 0)
    with MoEQuantDispatcher(**settings) as dispatcher:
        before = [dispatcher(*given, experts) for _ in range(3)][-1]
        experts.w2 = w2 * 2
        assert_bit_equal(dispatcher(*given, experts), before * 2)
        experts.w2 = torch.zeros_like(w2)
        assert not dispatcher(*given, experts).any()


def test_a_repeated_quantizer_raises_what_it_would_raise_the_first_time(gpu, monkeypatch):
    """Settings that are equal to those of a recorded call, and of another type."""
    x, counts = torch.randn(2, 16, 128).bfloat16(), torch.tensor([3, 16], dtype=torch.int32)
    asked = []
    monkeypatch.setattr(quantization.REPEATS, "run", lambda x, inputs, settings, call: asked.append(settings) or call())
    outputs: dict[str, Any] = {"values": torch.empty(2, 16, 128, dtype=torch.int8), "scales": torch.empty(2, 16, 1)}
    quantize_expert_batch(x, counts, dtype=torch.int8, **outputs)
    assert len(asked) == 1
    with pytest.raises(ValueError, match="group_size"):
        quantize_expert_batch(x, counts, dtype=torch.int8, group_size=cast(Any, 128.0), **outputs)
    with pytest.raises(ValueError, match="recipe"):
        quantize_expert_batch(x, counts, dtype=torch.int8, recipe=cast(Any, ["default"]), **outputs)
    with pytest.raises(ValueError, match="num_tokens"):
        quantize_expert_batch(x, cast(Any, [3, 16]), dtype=torch.int8, **outputs)
    assert len(asked) == 1
