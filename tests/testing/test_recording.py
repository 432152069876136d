"""`record_routing` on modules that are shaped like Hugging Face's MoE blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.traces import load_trace
from moequant.testing import assert_bit_equal, record_routing
from moequant.testing.recording import RecordedLayer, Recording, read_safetensors, write_safetensors

EXPERTS, TOP_K, HIDDEN = 6, 2, 16


class Experts(nn.Module):
    """Fused experts, which don't say how many they are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) / 4)


class MixtralBlock(nn.Module):
    """The router is a linear layer; the block has top_k."""

    def __init__(self, normalised: bool = True) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob = TOP_K, normalised
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def choose(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        return ids, weights / weights.sum(-1, keepdim=True) if self.norm_topk_prob else weights

    def forward(self, x):
        tokens = x.flatten(0, 1)
        ids, weights = self.choose(tokens)
        return x + sum((weights[:, k, None] * tokens * (1 + ids[:, k, None]) for k in range(TOP_K)), torch.tensor(0)).view(x.shape)


class TopKRouter(nn.Module):
    """Returns what newer models return."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.num_experts = kind, EXPERTS
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, hidden_states):
        logits = hidden_states @ self.weight.T
        weights, ids = logits.sigmoid().topk(TOP_K)
        if self.kind == "ids, weights":
            return ids, weights
        if self.kind == "logits, weights, ids":
            return logits, weights, ids
        if self.kind == "scores, ids":
            return torch.zeros_like(logits).scatter(-1, ids, weights), ids
        if self.kind == "logits, scores, ids":
            return logits, logits.sigmoid(), ids
        return {"ids": ids, "weights": weights}


class RouterBlock(nn.Module):
    def __init__(self, kind: str, name: str = "router") -> None:
        super().__init__()
        self.name = name
        setattr(self, name, TopKRouter(kind))
        self.experts = Experts()

    def forward(self, x):
        getattr(self, self.name)(hidden_states=x.flatten(0, 1))
        return x


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN), *blocks])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("normalised", [True, False])
def test_logits_become_the_choices_that_the_block_makes(normalised):
    model, x = Model(MixtralBlock(normalised), MixtralBlock(normalised)), torch.randn(2, 5, HIDDEN)
    with record_routing(model) as recording, torch.no_grad():
        out = model(x)
        inputs = model.layers[0](x)
    assert list(recording.layers) == ["layers.1.gate", "layers.2.gate"]
    layer = recording.layers["layers.1.gate"]
    block = model.layers[1]
    assert isinstance(block, MixtralBlock)
    ids, weights = block.choose(inputs.flatten(0, 1))
    assert layer.num_experts == EXPERTS and torch.equal(layer.ids, ids)
    torch.testing.assert_close(layer.weights, weights.detach())
    assert_bit_equal(layer.activations, inputs.flatten(0, 1))
    # the hooks are gone, and the model is as it was
    assert torch.equal(model(x), out)
    assert len(layer.ids) == 10


@pytest.mark.parametrize("kind", ["ids, weights", "logits, weights, ids", "scores, ids", "logits, scores, ids"])
def test_routers_that_return_ids_are_read(kind):
    block = RouterBlock(kind)
    model, x, router = Model(block), torch.randn(1, 4, HIDDEN), block.get_submodule("router")
    assert isinstance(router, TopKRouter)
    with record_routing(model) as recording, torch.no_grad():
        model(x)
        hidden = model.layers[0](x)[0]
        expected, ids = (hidden @ router.weight.T).sigmoid().topk(TOP_K)
    layer = recording.layers["layers.1.router"]
    assert torch.equal(layer.ids, ids) and layer.num_experts == EXPERTS
    torch.testing.assert_close(layer.weights, expected.detach())


def test_other_names_and_other_results_are_told():
    model = Model(RouterBlock("a dictionary", "switch"))
    with pytest.raises(ValueError, match=r"no module with a child `experts` beside a `gate` or `router`; give the routers' names"):
        record_routing(model).__enter__()
    with pytest.raises(ValueError, match="no module named 'switch'"):
        record_routing(model, router="switch").__enter__()
    with record_routing(model, router="*.switch"), pytest.raises(ValueError, match="returned dict, which is neither .* give read="):
        model(torch.randn(1, 4, HIDDEN))
    with record_routing(model, router="*.switch", read=lambda out: (out["ids"], out["weights"])) as recording:
        model(torch.randn(1, 4, HIDDEN))
    assert recording.layers["layers.1.switch"].ids.shape == (4, TOP_K)


def test_calls_are_joined_up_to_a_limit_and_saved_as_a_trace(tmp_path):
    model = Model(MixtralBlock(), MixtralBlock())
    with record_routing(model, max_tokens=9) as recording, torch.no_grad():
        for _ in range(3):
            model(torch.randn(1, 4, HIDDEN))
    recording.save(tmp_path / "mine.safetensors", intermediate_size=24, activations=5, source="a test")
    trace = load_trace(f"{tmp_path / 'mine.safetensors'}@1")
    layer = recording.layers["layers.1.gate"]
    assert (trace.num_experts, trace.top_k, trace.hidden_size, trace.intermediate_size) == (EXPERTS, TOP_K, HIDDEN, 24)
    assert len(trace.ids) == 9 and torch.equal(trace.ids.long(), layer.ids)
    assert torch.equal(trace.activations, layer.activations[:5].bfloat16())
    torch.testing.assert_close(trace.weights.float(), layer.weights, atol=1e-3, rtol=0)


def test_a_block_that_does_not_say_otherwise_makes_weights_sum_to_1():
    block = MixtralBlock()
    del block.norm_topk_prob
    model = Model(block)
    with record_routing(model) as recording, torch.no_grad():
        block.gate(torch.randn(7, HIDDEN))
    torch.testing.assert_close(recording.layers["layers.1.gate"].weights.sum(1), torch.ones(7))


def test_what_is_recorded_keeps_no_graph():
    model, x = Model(MixtralBlock()), torch.randn(2, 5, HIDDEN, requires_grad=True)
    with record_routing(model) as recording:
        out = model(x)
    assert out.requires_grad
    for parts in recording.layers["layers.1.gate"].parts:
        for part in parts:
            assert not part.requires_grad and part.grad_fn is None


def test_hooks_are_gone_after_an_error_in_the_block():
    model = Model(MixtralBlock())
    with pytest.raises(KeyError), record_routing(model) as recording:
        raise KeyError
    model(torch.randn(1, 4, HIDDEN))
    assert not recording.layers
    assert not any(module._forward_hooks for module in model.modules())


def recording_of(**shapes: tuple[int, int, int, int]) -> Recording:
    """Of layers of shape (E, T, K, H)."""
    recording = Recording()
    for name, (experts, tokens, top_k, hidden) in shapes.items():
        ids = torch.rand(tokens, experts).argsort(1)[:, :top_k]
        layer = RecordedLayer(experts, [(ids, torch.rand(tokens, top_k), torch.randn(tokens, hidden))])
        recording.layers[name] = layer
    return recording


@pytest.mark.parametrize("experts, dtype", [(256, torch.uint8), (257, torch.int16), (1000, torch.int16)])
def test_ids_of_any_number_of_experts_come_back(experts, dtype, tmp_path):
    recording = recording_of(only=(experts, 40, 8, 16))
    recording.layers["only"].ids[0, 0] = experts - 1
    recording.save(tmp_path / "mine.safetensors", intermediate_size=1)
    trace = load_trace(str(tmp_path / "mine.safetensors"))
    assert trace.num_experts == experts and trace.ids.dtype == dtype
    assert torch.equal(trace.ids.long(), recording.layers["only"].ids)


@pytest.mark.parametrize("other", [(7, 9, 2, 16), (6, 8, 2, 16), (6, 9, 3, 16), (6, 9, 2, 32)], ids=["E", "T", "K", "H"])
def test_layers_of_another_shape_are_not_saved_together(other, tmp_path):
    recording = recording_of(one=(6, 9, 2, 16), two=other)
    path = tmp_path / "mine.safetensors"
    with pytest.raises(
        ValueError, match=r"layers of one shape, got 2 layers with \(E, T, K, T, H\) of .* choose some with layers="
    ):
        recording.save(path, intermediate_size=1)
    assert not path.exists()
    recording.save(path, intermediate_size=1, layers=["two"])
    assert load_trace(str(path)).num_experts == other[0]


@pytest.mark.parametrize("length", range(9))
def test_what_follows_the_header_begins_at_a_multiple_of_8(length, tmp_path):
    """As the safetensors format asks for; a tensor behind an odd number of bytes is read all the same."""
    tensors = {"a": torch.arange(3).to(torch.uint8), "b": torch.arange(-5, 5).to(torch.int16), "c": torch.randn(3)}
    path = tmp_path / "mine.safetensors"
    write_safetensors(path, tensors, {"k": "x" * length})
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert header % 8 == 0 and len(data) == 8 + header + 3 + 20 + 12 and data[8:9] == b"{"
    read, metadata = read_safetensors(path)
    assert metadata == {"k": "x" * length}
    for name, tensor in tensors.items():
        assert_bit_equal(read[name], tensor)
        assert read[name].data_ptr() % tensor.itemsize == 0


def test_nothing_recorded_can_not_be_saved(tmp_path):
    with record_routing(Model(MixtralBlock())) as recording:
        pass
    with pytest.raises(ValueError, match="run the model inside"):
        recording.save(tmp_path / "none.safetensors", intermediate_size=1)


@pytest.mark.parametrize("most", [-1, 0, 2.0, "all", True], ids=repr)
def test_other_numbers_of_tokens_are_refused(most):
    with pytest.raises(ValueError, match="max_tokens must be"), record_routing(nn.Linear(2, 2), max_tokens=most):
        pass
