"""`MoEExperts`: a module with parameters, in what trainers do with modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moequant import Activation, MoEQuantDispatcher
from moequant.nn import MoEExperts
from moequant.testing import assert_bit_equal, relative_error, run_ranks

EXPERTS, TOP_K, HIDDEN, INNER, TOKENS = 4, 2, 64, 32, 12
QUANTS = pytest.mark.parametrize("quant", ["none", "fp8_e4m3fn"])


def dispatcher_of(quant: str = "none", **settings: Any) -> MoEQuantDispatcher:
    common: dict[str, Any] = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN, "max_tokens_per_rank": 32}
    common |= {"quant": quant, "recipe": "ue8m0", "layout": "ragged"}
    return MoEQuantDispatcher(**common | settings)


class Layer(nn.Module):
    """A router and its experts, beside the tokens."""

    def __init__(self, dispatcher: MoEQuantDispatcher, **settings: Any) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False, device=dispatcher.device)
        self.experts = MoEExperts(dispatcher, INNER, **settings)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x.float()).softmax(-1).topk(TOP_K)
        return x + self.experts(x, ids, weights)


def model_of(dispatcher: MoEQuantDispatcher, layers: int = 2, **settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(dispatcher, **settings) for _ in range(layers)))


def tokens_of(rank: int = 0, tokens: int = TOKENS, device: str = "cpu") -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(rank)).bfloat16().to(device)


def gradients(model: nn.Module, x: Tensor, call: Any = None) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = (call or model)(x)
    (out.float() ** 2).mean().backward()
    assert x.grad is not None
    made = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(made) == len(list(model.parameters()))
    return {"output": out.detach(), "x": x.grad} | made


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert_bit_equal(a[name], b[name], name)


@pytest.fixture
def dispatcher() -> Iterator[MoEQuantDispatcher]:
    with dispatcher_of(device="cpu") as made:
        yield made


def change_in_place(model: nn.Sequential) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.5)


def change_by_fused_optimizer(model: nn.Sequential) -> None:
    gradients(model, tokens_of())
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


def change_by_loading(model: nn.Sequential) -> None:
    model.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()})


def change_type(model: nn.Sequential) -> None:
    model.to(torch.float16)
    for layer in model:
        layer.router.float()


@QUANTS
@pytest.mark.parametrize("change", [change_in_place, change_by_fused_optimizer, change_by_loading, change_type])
def test_every_forward_and_backward_has_the_weights_of_now(quant, change):
    with dispatcher_of(quant, device="cpu") as dispatcher:
        model = model_of(dispatcher)
        before = gradients(model, tokens_of())
        change(model)
        after = gradients(model, tokens_of())
        fresh = model_of(dispatcher, dtype=next(model[0].get_submodule("experts").parameters()).dtype)
        fresh.load_state_dict(model.state_dict())
        assert_same(after, gradients(fresh, tokens_of()))
        assert not torch.equal(before["output"], after["output"])
        with torch.no_grad():
            assert_bit_equal(model(tokens_of()), after["output"])


@QUANTS
@pytest.mark.parametrize("way", ["checkpointed", "recompute"])
def test_recomputation_has_the_same_bits(quant, way):
    with dispatcher_of(quant, device="cpu") as dispatcher:
        expected = gradients(model_of(dispatcher), tokens_of())
        model = model_of(dispatcher, recompute=way == "recompute")

        def checkpointed(x: Tensor) -> Tensor:
            for layer in model:
                out = checkpoint(layer, x, use_reentrant=False)
                assert isinstance(out, Tensor)
                x = out
            return x

        assert_same(gradients(model, tokens_of(), checkpointed if way == "checkpointed" else None), expected)


def test_micro_batches_accumulate_in_float32_where_the_parameter_says_so(dispatcher):
    x, others = tokens_of(), tokens_of(1)
    experts = MoEExperts(dispatcher, INNER, dtype=torch.bfloat16)
    routing = torch.arange(TOKENS)[:, None] % EXPERTS, torch.ones(TOKENS, 1)
    ids, weights = (t.expand(-1, TOP_K).contiguous() for t in routing)
    ids = torch.where(torch.arange(TOP_K) > 0, -1, ids)

    def gradient(*batches: Tensor, dtype: torch.dtype | None = torch.bfloat16) -> Tensor:
        experts.w13.grad = None
        experts.w13.grad_dtype = dtype
        for batch in batches:
            experts(batch, ids, weights).sum().backward()
        assert experts.w13.grad is not None
        return experts.w13.grad

    both, first, second = (gradient(*batches, dtype=torch.float32) for batches in ((x, others), (x,), (others,)))
    assert both.dtype == torch.float32 and torch.equal(both, first + second)
    # with more than bfloat16 holds
    assert not torch.equal(first, first.bfloat16().float())
    assert_bit_equal(gradient(x), first.bfloat16())


def test_frozen_parameters_get_no_gradient_and_leave_the_others_theirs(dispatcher):
    model = model_of(dispatcher, bias=True)
    expected = gradients(model, tokens_of())
    experts = [layer.experts for layer in model]
    for names in (("w13",), ("w2", "bias2"), ("w13", "w2", "bias13", "bias2")):
        for module in experts:
            for name in ("w13", "w2", "bias13", "bias2"):
                getattr(module, name).requires_grad_(name not in names)
        model.zero_grad(set_to_none=True)
        x = tokens_of().requires_grad_()
        (model(x).float() ** 2).mean().backward()
        assert x.grad is not None
        assert_bit_equal(x.grad, expected["x"])
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                assert_bit_equal(parameter.grad, expected[name], name)
            else:
                assert parameter.grad is None


def test_interleaved_weights_have_interleaved_gradients(dispatcher):
    apart = MoEExperts(dispatcher, INNER, activation=Activation(limit=0.7), bias=True)
    mixed = MoEExperts(dispatcher, INNER, activation=Activation(limit=0.7, interleaved=True), bias=True)
    with torch.no_grad():
        for name, parameter in apart.named_parameters():
            parameter.normal_(std=0.2)
            value = torch.stack(parameter.chunk(2, 1), 2).flatten(1, 2) if name.endswith("13") else parameter
            getattr(mixed, name).copy_(value)
    x, ids, weights = tokens_of(), torch.rand(TOKENS, EXPERTS).argsort(1)[:, :TOP_K], torch.rand(TOKENS, TOP_K)
    for module in (apart, mixed):
        module(x, ids, weights).sum().backward()
    for name, parameter in apart.named_parameters():
        of_mixed = getattr(mixed, name).grad
        assert parameter.grad is not None and parameter.grad.any()
        assert_bit_equal(
            torch.cat((of_mixed[:, ::2], of_mixed[:, 1::2]), 1) if name.endswith("13") else of_mixed, parameter.grad, name
        )


def test_copies_share_the_dispatcher_and_nothing_else(dispatcher):
    model = model_of(dispatcher)
    other = copy.deepcopy(model)
    experts = other[0].get_submodule("experts")
    assert isinstance(experts, MoEExperts) and experts.dispatcher is dispatcher
    assert_same(gradients(other, tokens_of()), gradients(model, tokens_of()))
    change_in_place(other)
    assert not torch.equal(other(tokens_of()), model(tokens_of()))


def test_the_module_says_what_it_is_and_what_it_takes(dispatcher):
    experts = MoEExperts(dispatcher, INNER, dtype=torch.bfloat16, bias=True)
    assert {name: tuple(p.shape) for name, p in experts.named_parameters()} == {
        "w13": (4, 64, 64),
        "w2": (4, 64, 32),
        "bias13": (4, 64),
        "bias2": (4, 64),
    }
    assert "4 of 4 experts, 64, 32" in repr(experts) and experts.w13.dtype == torch.bfloat16
    assert MoEExperts(dispatcher, INNER, device="meta").w13.is_meta
    with pytest.raises(ValueError, match="dtype must be one of"):
        MoEExperts(dispatcher, INNER, dtype=torch.float64)
    with pytest.raises(ValueError, match="intermediate_size must be at least 1"):
        MoEExperts(dispatcher, 0)
    for name in ("bias", "recompute", "keep_quantized"):
        with pytest.raises(ValueError, match=f"{name} must be bool, got str"):
            MoEExperts(dispatcher, INNER, **{name: cast(Any, "no")})
    with (
        dispatcher_of("fp8_e4m3fn", recipe="deepgemm", device="cpu") as coarse,
        pytest.raises(ValueError, match='recipe "deepgemm"'),
    ):
        MoEExperts(coarse, INNER)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_has_the_same_gradients(backend, dispatcher):
    torch._dynamo.reset()
    model = model_of(dispatcher, layers=1)
    expected = gradients(model, tokens_of())
    compiled = torch.compile(model, backend=backend)
    assert_same(gradients(model, tokens_of(), compiled), expected)
    with torch.no_grad():
        for _ in range(2):
            assert_bit_equal(compiled(tokens_of()), expected["output"])
            change_in_place(model)
            expected["output"] = model(tokens_of())


@pytest.mark.gpu
@QUANTS
def test_recomputation_and_compilation_on_a_gpu_have_the_same_bits(quant):
    torch._dynamo.reset()
    with dispatcher_of(quant, device="cuda") as dispatcher:
        model, x = model_of(dispatcher), tokens_of(device="cuda")
        expected = gradients(model, x)
        for call in (None, torch.compile(model, backend="aot_eager"), lambda x: checkpoint(model, x, use_reentrant=False)):
            assert_same(gradients(model, x, call), expected)
        assert_same(gradients(model_of(dispatcher, recompute=True), x), expected)


def sums_of(model: nn.Module, ranks: int) -> dict[str, Tensor]:
    """The gradients of a loss that is the mean of the ranks' losses."""
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        parameter.grad /= ranks
        if "experts" not in name:
            dist.all_reduce(parameter.grad)
    return {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}


def run_ways(rank: int, ranks: int, quant: str, device: str, ways: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """This rank's gradients by sums of one's own, by DDP, and by FSDP2."""
    device = device.format(rank=rank)
    # the last rank has no tokens
    x = tokens_of(rank, 0 if ranks > 2 and rank == ranks - 1 else TOKENS - rank, device)
    results: dict[str, dict[str, Tensor]] = {}
    with dispatcher_of(quant, device=device) as dispatcher:
        for way in ways:
            model: Any = model_of(dispatcher)
            experts = {name: p for name, p in model.named_parameters() if "experts" in name}
            for parameter in experts.values() if way != "sums" else ():
                parameter.register_hook(lambda grad: grad / ranks)
            if way == "ddp":
                model._ddp_params_and_buffers_to_ignore = list(experts)
                called: Any = DistributedDataParallel(model)
            else:
                called = model
            if way == "fsdp":
                mesh = init_device_mesh(torch.device(device).type, (ranks,))
                fully_shard(model, mesh=mesh, ignored_params=set(experts.values()))
            (called(x).float() ** 2).sum().backward()
            if way == "sums":
                results[way] = sums_of(model, ranks)
            else:
                whole = {name: p.grad for name, p in model.named_parameters()}
                results[way] = {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).cpu() for n, g in whole.items()}
    return results


def one_process(ranks: int, quant: str) -> dict[str, Tensor]:
    with dispatcher_of(quant, device="cpu", max_tokens_per_rank=32 * ranks) as dispatcher:
        model = model_of(dispatcher)
        x = torch.cat([tokens_of(r, 0 if ranks > 2 and r == ranks - 1 else TOKENS - r) for r in range(ranks)])
        ((model(x).float() ** 2).sum() / ranks).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("ranks", "quant", "ways"), [(2, "none", ("sums", "ddp", "fsdp")), (4, "fp8_e4m3fn", ("sums",))])
def test_gradients_of_ranks_are_those_of_one_process_and_so_are_those_of_ddp_and_fsdp(ranks, quant, ways):
    results, expected = run_ranks(run_ways, ranks, quant, "cpu", ways), one_process(ranks, quant)
    for name, of_one in expected.items():
        for way in ways:
            each = [result[way][name] for result in results]
            if "experts" in name:
                # each rank has its own, of the same rows in the same order
                assert_bit_equal(torch.cat(each), of_one, f"{way}: {name}")
            else:
                # a sum over all tokens, taken rank by rank
                assert max(relative_error(grad, of_one) for grad in each) < 1e-5, (way, name)


def run_sharded_experts(rank: int, ranks: int, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Experts over the ranks of a group of two, and each of them sharded over the groups: gradients by FSDP2, and summed by hand."""
    device = device.format(rank=rank)
    mesh = init_device_mesh(torch.device(device).type, (ranks // 2, 2), mesh_dim_names=("replicas", "experts"))
    x, results = tokens_of(rank, TOKENS, device), []
    with dispatcher_of(group=mesh.get_group("experts"), device=device) as dispatcher:
        for sharded in (True, False):
            model: Any = model_of(dispatcher)
            if sharded:
                for layer in model:
                    fully_shard(layer.experts, mesh=mesh["replicas"])
                    # not the mean over the replicas alone: a rank's experts have the gradients of its group's losses
                    layer.experts.set_gradient_divide_factor(ranks)
                    # gloo has no sum that divides
                    layer.experts.set_force_sum_reduction_for_comms(True)
                fully_shard(model, mesh=init_device_mesh(torch.device(device).type, (ranks,)))
            (model(x).float() ** 2).sum().backward()
            if not sharded:
                for name, parameter in model.named_parameters():
                    parameter.grad /= ranks
                    dist.all_reduce(parameter.grad, group=mesh.get_group("replicas") if "experts" in name else None)
            found = {name: p.grad for name, p in model.named_parameters()}
            results.append({n: (g.full_tensor() if hasattr(g, "full_tensor") else g).cpu() for n, g in found.items()})
    return results[0], results[1]


def check_sharded_experts(results: list[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> None:
    for by_fsdp, by_hand in results:
        assert by_fsdp.keys() == by_hand.keys()
        for name, expected in by_hand.items():
            assert relative_error(by_fsdp[name], expected) < 1e-5, name


def test_fsdp_shards_experts_over_the_groups_that_have_them():
    check_sharded_experts(run_ranks(run_sharded_experts, 4, "cpu"))


@pytest.mark.multigpu
def test_ddp_and_fsdp_on_two_gpus_have_the_sums_of_ones_own():
    for result in run_ranks(run_ways, 2, "fp8_e4m3fn", "cuda:{rank}", ("sums", "ddp", "fsdp"), backend="cpu:gloo,cuda:nccl"):
        for way in ("ddp", "fsdp"):
            for name, expected in result["sums"].items():
                assert relative_error(result[way][name], expected) < 1e-5, (way, name)


def initial_weights(rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    with dispatcher_of(device="cpu") as dispatcher:
        torch.manual_seed(7)
        experts = MoEExperts(dispatcher, INNER)
        return experts.w13.detach(), experts.w2.detach()


def test_an_expert_starts_alike_on_any_number_of_ranks_and_unlike_all_others():
    alone, ranks = initial_weights(0, 1), run_ranks(initial_weights, 2)
    for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        assert_bit_equal(torch.cat(parts), whole)
        assert len({float(w.sum()) for w in whole}) == EXPERTS
        assert abs(float(whole.std()) * whole.shape[2] ** 0.5 - 1) < 0.05
