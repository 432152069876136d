"""Other libraries on the same inputs, where they can be imported: DeepEP (V1: low-latency and normal kernels) and DeepGEMM.

Each has to give the same result before it is timed, up to rounding, and quantization is part of everyone's dispatch: DeepEP's low-latency
kernels do it themselves, for the normal ones this project's kernel runs before. What they leave to their callers is not charged to them:
the normal kernels neither order rows by expert nor apply weights.

Letters as in launch/bench_ep.py; R tokens received.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.ep_layer import Layer
from benchmarks.timing import Way
from moequant import QuantizedTensor, silu_mul_quantize
from moequant.batch import ceil_div, empty_transposed_scales
from moequant.ops import quantize_expert_batch
from moequant.testing import relative_error

# DeepEP's low-latency kernels keep a buffer of T rows for each (expert, rank), and are made for decoding
LOW_LATENCY_TOKENS = 1024
# of e4m3 alone, on the way there; GEMMs of the same operands differ by less
ROUNDING, PRODUCT = 0.05, 5e-3


@dataclass
class Peers:
    """ways: of each step of the layer, by the peer's name, how to do it. remarks: a line for each peer that can't be timed, with the
    reason."""

    ways: dict[str, dict[str, Way]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(self, name: str, steps: dict[str, Callable[[], Any]], in_graph: bool) -> None:
        for step, call in steps.items():
            self.ways.setdefault(step, {})[name] = Way(call, in_graph)


def find_peers(layer: Layer) -> Peers:
    """The peers that are there, checked, with the layer's tokens and weights. Collective."""
    peers = Peers()
    if layer.config.quant != "fp8_e4m3fn" or layer.config.hidden_size % 128:
        peers.remarks.append("peers: none takes other than fp8_e4m3fn with a hidden size of whole groups")
        return peers
    deep_ep, deep_gemm = (import_peer(name, peers.remarks) for name in ("deep_ep", "deep_gemm"))
    on_gpu, group = layer.dispatcher.device.type == "cuda", dist.group.WORLD if dist.is_initialized() else None
    products, gemm_name = None, ""
    if deep_gemm is not None:
        gemm_name = f"deep_gemm {release(deep_gemm)}"
        make = contiguous_products if layer.config.ragged else Products
        products = attempt(gemm_name, lambda: make(deep_gemm, layer), peers.remarks)
    if products is not None:
        peers.add(gemm_name, products.steps() if isinstance(products, Products) else products, on_gpu)
    if deep_ep is not None and group is None:
        peers.remarks.append("deep_ep: needs a process group; start the script with torchrun")
    elif deep_ep is not None:
        name = f"deep_ep {release(deep_ep)}"
        if layer.config.max_tokens_per_rank <= LOW_LATENCY_TOKENS:
            low = attempt(f"{name} low-latency", lambda: LowLatency(deep_ep, group, layer), peers.remarks)
            if low is not None:
                peers.add(f"{name} low-latency", {"dispatch": low.dispatch, "combine": low.combine}, on_gpu)
            if low is not None and isinstance(products, Products):
                both = f"{name} low-latency + {gemm_name}"
                whole = attempt(both, lambda: Composed(low, products, layer), peers.remarks)
                if whole is not None:
                    peers.add(both, {"layer": whole}, on_gpu)
        else:
            peers.remarks.append(f"{name} low-latency: not with more than {LOW_LATENCY_TOKENS} tokens a rank")
        normal = attempt(f"{name} normal", lambda: Normal(deep_ep, group, layer), peers.remarks)
        if normal is not None:
            # its dispatch waits for the host, and its combine takes what that returned
            peers.add(f"{name} normal", {"dispatch": normal.dispatch, "combine": normal.combine}, False)
    return peers


def import_peer(name: str, remarks: list[str]) -> Any:
    """The module, or None and a remark."""
    try:
        return importlib.import_module(name)
    # a library that was built for another torch fails with an OSError
    except (ImportError, OSError, RuntimeError) as error:
        remarks.append(f"{name}: can't be imported ({str(error).splitlines()[0]}), so it is not timed")
        return None


def masked_product(deep_gemm: Any) -> Callable[..., None]:
    """DeepGEMM's masked grouped GEMM, whose name has changed."""
    names = "m_grouped_fp8_gemm_nt_masked", "fp8_m_grouped_gemm_nt_masked"
    return next(getattr(deep_gemm, name) for name in names if hasattr(deep_gemm, name))


def release(module: ModuleType) -> str:
    try:
        return version(module.__name__)
    except PackageNotFoundError:
        return str(getattr(module, "__version__", "of unknown version"))


def attempt(name: str, make: Callable[[], Any], remarks: list[str]) -> Any:
    """What make returns, or None and a remark where it failed on one of the ranks: a peer that refuses must not end the benchmark."""
    made, problem = None, ""
    try:
        made = make()
    except Exception as error:
        problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    problems: list[Any] = [problem]
    if dist.is_initialized():
        problems *= dist.get_world_size()
        dist.all_gather_object(problems, problem)
    problem = next(filter(None, problems), "")
    if problem:
        remarks.append(f"{name}: not timed ({problem})")
        return None
    return made


def expect_near(what: str, x: Tensor, expected: Tensor, tolerance: float) -> None:
    error = relative_error(x, expected) if expected.numel() else 0.0
    if not error <= tolerance:
        raise ValueError(f"{what} is off by {error:.2e}, more than {tolerance}")


def dequantized(values: Tensor, scales: Tensor) -> Tensor:
    """(..., H) and (..., G) to bfloat16."""
    return (values.float() * scales.repeat_interleave(128, -1)).bfloat16()


class LowLatency:
    """DeepEP's low-latency kernels: they quantize, order rows by expert, and sum with weights. received: values (L, W * T, H) and scales;
    counts: (L,) int32; output: what combine sends back."""

    def __init__(self, deep_ep: Any, group: Any, layer: Layer) -> None:
        config, self.layer = layer.config, layer
        self.sizes = config.max_tokens_per_rank, config.num_experts
        nbytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(
            config.max_tokens_per_rank, config.hidden_size, config.world_size, config.num_experts
        )
        self.buffer = deep_ep.Buffer(group, 0, nbytes, low_latency_mode=True, num_qps_per_rank=config.num_local_experts)
        self.ids, self.weights = layer.tokens.ids.long(), layer.tokens.weights.float()
        self.dispatch()
        # experts that change nothing: weights sum to what they sum to
        self.output = dequantized(*self.received)
        expected = layer.tokens.hidden.float() * (self.weights * (self.ids >= 0)).sum(1, keepdim=True)
        expect_near("combine of dispatch", self.combine(), expected, ROUNDING)

    def dispatch(self) -> None:
        self.received, self.counts, self.handle, *_ = self.buffer.low_latency_dispatch(
            self.layer.tokens.hidden, self.ids, *self.sizes, use_fp8=True
        )

    def combine(self) -> Tensor:
        return self.buffer.low_latency_combine(self.output, self.ids, self.weights, self.handle)[0]


class Normal:
    """DeepEP's normal kernels: tokens travel once to each rank that needs them, quantized before; combine adds the ranks' rows."""

    def __init__(self, deep_ep: Any, group: Any, layer: Layer) -> None:
        config, self.layer, hidden = layer.config, layer, layer.tokens.hidden
        ranks = config.world_size
        tunings = deep_ep.Buffer.get_dispatch_config(ranks), deep_ep.Buffer.get_combine_config(ranks)
        nbytes = max(tuning.get_nvl_buffer_size_hint(2 * config.hidden_size, ranks) for tuning in tunings)
        self.buffer = deep_ep.Buffer(group, nbytes, 0)
        self.ids, self.weights = layer.tokens.ids.long(), layer.tokens.weights.float()
        self.values = torch.empty(hidden.shape, dtype=torch.float8_e4m3fn, device=hidden.device)
        self.scales = torch.empty(len(hidden), config.num_groups, device=hidden.device)
        self.dispatch()
        self.output = dequantized(*self.received)
        owners = torch.where(self.ids >= 0, self.ids // config.num_local_experts, -1).unsqueeze(-1)
        reached = (owners == torch.arange(ranks, device=hidden.device)).any(1).sum(1, keepdim=True)
        expect_near("combine of dispatch", self.combine(), hidden.float() * reached, ROUNDING)

    def dispatch(self) -> None:
        recipe = self.layer.config.recipe
        quantize_expert_batch(self.layer.tokens.hidden[None], None, None, self.values[None], self.scales[None], recipe=recipe)
        per_rank, per_node, per_expert, goes, _ = self.buffer.get_dispatch_layout(self.ids, self.layer.config.num_experts)
        self.received, _, _, _, self.handle, _ = self.buffer.dispatch(
            (self.values, self.scales),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=goes,
            num_tokens_per_expert=per_expert,
            topk_idx=self.ids,
            topk_weights=self.weights,
        )

    def combine(self) -> Tensor:
        return self.buffer.combine(self.output, self.handle)[0]


class Products:
    """DeepGEMM's masked grouped GEMMs on the batch and the weights of this project's layer."""

    def __init__(self, deep_gemm: Any, layer: Layer) -> None:
        self.function = masked_product(deep_gemm)
        experts, self.layer = layer.experts, layer
        assert isinstance(experts.w13, QuantizedTensor) and isinstance(experts.w2, QuantizedTensor)
        self.w13, self.w2 = experts.w13, experts.w2
        self.batch, _ = layer.dispatcher.dispatch(*layer.tokens)
        gate_up = experts.gemm1(self.batch)
        inner = experts.activation(gate_up, self.batch)
        assert isinstance(inner, QuantizedTensor)
        self.inner = inner
        self.outputs = torch.empty_like(gate_up), torch.empty_like(experts.gemm2(inner, self.batch))
        for step, call in self.steps().items():
            call()
            ours, theirs = (gate_up, self.outputs[0]) if step == "gemm1" else (experts.gemm2(inner, self.batch), self.outputs[1])
            for expert, count in enumerate(self.batch.num_tokens.tolist()):
                expect_near(step, theirs[expert, :count], ours[expert, :count].float(), PRODUCT)

    def multiply(self, a: tuple[Tensor, Tensor], b: QuantizedTensor, out: Tensor, counts: Tensor) -> None:
        self.function(a, (b.values, b.scales), out, counts, self.batch.expected_rows, disable_ue8m0_cast=True)

    def steps(self) -> dict[str, Callable[[], Any]]:
        batch, inner = self.batch, self.inner
        scales = batch.scales
        assert scales is not None
        return {
            "gemm1": lambda: self.multiply((batch.values, scales), self.w13, self.outputs[0], batch.num_tokens),
            "gemm2": lambda: self.multiply((inner.values, inner.scales), self.w2, self.outputs[1], batch.num_tokens),
        }


def contiguous_products(deep_gemm: Any, layer: Layer) -> dict[str, Callable[[], Any]]:
    """DeepGEMM's contiguous grouped GEMMs of the rows of a ragged batch. It wants each expert's rows from a multiple of 128 on: they are
    moved before, which nobody is charged for."""
    experts, (batch, _) = layer.experts, layer.dispatcher.dispatch(*layer.tokens)
    gate_up = experts.gemm1(batch)
    inner = experts.activation(gate_up, batch)
    output = experts.gemm2(inner, batch)
    counts, device = batch.num_tokens, gate_up.device
    assert batch.expert_start is not None and batch.scales is not None and isinstance(inner, QuantizedTensor)
    room = (counts + 127) // 128 * 128
    owners = torch.arange(len(counts), device=device).repeat_interleave(counts)
    row = torch.arange(len(owners), device=device) - (counts.cumsum(0) - counts)[owners]
    ours, theirs = batch.expert_start[owners] + row, (room.cumsum(0) - room)[owners] + row
    # of rows that belong to no expert -1
    total = int(room.sum())
    groups = torch.full((total,), -1, dtype=torch.int32, device=device).index_copy_(0, theirs, owners.int())

    def product(step: str, values: Tensor, scales: Tensor, w: Any, expected: Tensor) -> Callable[[], Any]:
        moved = torch.zeros(total, values.shape[1], dtype=torch.uint8, device=device)
        moved[theirs] = values.view(torch.uint8)[ours]
        factors = torch.zeros(scales.shape[1], total, device=device).T
        factors[theirs] = scales[ours]
        a, out = (moved.view(values.dtype), factors), torch.empty(total, expected.shape[1], dtype=torch.bfloat16, device=device)

        def call() -> None:
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, (w.values, w.scales), out, groups, disable_ue8m0_cast=True)

        call()
        expect_near(step, out[theirs], expected[ours].float(), PRODUCT)
        return call

    return {
        "gemm1": product("gemm1", batch.values, batch.scales, experts.w13, gate_up),
        "gemm2": product("gemm2", inner.values, inner.scales, experts.w2, output),
    }


class Composed:
    """The whole layer of DeepEP's low-latency kernels and DeepGEMM, with this project's SwiGLU between."""

    def __init__(self, exchange: LowLatency, products: Products, layer: Layer) -> None:
        self.exchange, self.products = exchange, products
        shape, size = exchange.received[0].shape[:2], layer.experts.intermediate_size
        device = exchange.output.device
        self.gate_up = torch.empty(*shape, 2 * size, dtype=torch.bfloat16, device=device)
        self.inner = torch.empty(*shape, size, dtype=torch.float8_e4m3fn, device=device)
        self.scales = empty_transposed_scales(shape[0], shape[1], ceil_div(size, 128), device)
        self.output = torch.empty_like(exchange.output)
        expect_near("the layer", self(), layer().float(), ROUNDING)

    def __call__(self) -> Tensor:
        exchange, products = self.exchange, self.products
        exchange.dispatch()
        products.multiply(exchange.received, products.w13, self.gate_up, exchange.counts)
        silu_mul_quantize(self.gate_up, exchange.counts, dtype=self.inner.dtype, values=self.inner, scales=self.scales)
        products.multiply((self.inner, self.scales), products.w2, self.output, exchange.counts)
        return exchange.buffer.low_latency_combine(self.output, exchange.ids, exchange.weights, exchange.handle)[0]
