"""Tests that run inside vLLM, by test_vllm.py: `pytest` with vLLM on PYTHONPATH, in a process of its own."""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import pkgutil
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.fused_moe.experts.fused_batched_moe as batched_moe
import vllm_ranks as vr
from torch import Tensor
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.activation import SwigluOAIAndMul, SwigluStepAndMul
from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.utils.argparse_utils import FlexibleArgumentParser

import moequant.integrations.vllm as integration
import test_docstrings
from moequant.activations import Activation
from moequant.integrations.vllm import activations, experts as adapter_experts, method as adapter
from moequant.integrations.vllm.settings import settings_of
from moequant.reference.activations import activated
from moequant.testing import relative_error

integration.register()
# of fp8 experts against float32 ones with the same weights
ERROR = 0.06


def errors(world: int, across: tuple[int, ...], padding: int = 0, **options: Any) -> list[tuple[float, float, int]]:
    """Of each rank's layer: its error, that of a second layer on the same dispatchers, and what `check` counts."""

    def rank(number: int, ports: list[int]) -> tuple[float, float, int]:
        with vr.engine(number, ports, **options) as config:
            layers = [vr.load(vr.make_layer(n)) for n in range(2)]
            # ranks that share their tokens are told as one
            found = [vr.call(layer, config, number % len(across), across, padding) for layer in layers]
            exchange = exchange_of(layers[0])
            assert exchange is exchange_of(layers[1])
            one, other = (relative_error(out.float(), expected) for out, expected in found)
            rows = found[0][0]
            assert not padding or not rows[-padding:].any()
            return one, other, exchange.chunks.check() + exchange.decode.check()

    return vr.on_ranks(world, rank)


def exchange_of(layer: Any) -> Any:
    kernel = layer.routed_experts.quant_method.moe_kernel
    experts = kernel.fused_experts
    return experts.exchange if isinstance(experts, adapter_experts.MoEQuantExperts) else kernel.prepare_finalize.exchange


def right(found: list[tuple[float, float, int]]) -> None:
    assert all(0 < one < ERROR and one == other and dropped == 0 for one, other, dropped in found), found


# --- layers -------------------------------------------------------------------------------------------------------------------


def test_one_rank():
    right(errors(1, (16,)))


def test_one_rank_in_chunks_with_rows_that_fill_up():
    right(errors(1, (40,), padding=3, max_tokens=16))


@pytest.mark.parametrize("across", [(16, 16), (16, 1), (1, 7)], ids=str)
def test_two_ranks_with_other_numbers_of_tokens(across):
    right(errors(2, across, data=2))


def test_as_many_chunks_on_each_rank_where_one_has_few_tokens():
    """(40, 3) in chunks of 16: the second rank's second and third have no token."""
    right(errors(2, (40, 3), data=2, max_tokens=16))


def test_two_ranks_with_rows_that_fill_up():
    right(errors(2, (16, 16), padding=5, data=2))


def test_ranks_that_hold_the_same_tokens():
    """Tensor parallel attention without data parallel ranks: each rank computes its experts, and vLLM adds up."""
    right(errors(2, (16,), tensor=2))


def test_a_rank_without_tokens():
    """vLLM skips experts that get no row, so it is the experts that are asked."""

    def rank(number: int, ports: list[int]) -> float:
        across = (8, 0)
        with vr.engine(number, ports, data=2) as config:
            kernel = vr.load(vr.make_layer()).routed_experts.quant_method.moe_kernel
            layer, (x, logits) = kernel.fused_experts, vr.tokens_of(number, across[number])
            weights, ids = vr.route(x, logits, vr.K, False)
            counts, out = torch.tensor(across, dtype=torch.int32), torch.full_like(x, torch.nan)
            named = {"topk_weights": weights, "topk_ids": ids, "expert_map": None, "apply_router_weight_on_input": False}
            w13, w2 = (w.values[4 * number : 4 * number + 4] for w in vr.quantized())
            layer.quant_config._w1.scale, layer.quant_config._w2.scale = (
                w.scales[4 * number : 4 * number + 4] for w in vr.quantized()
            )
            with set_forward_context(None, config, num_tokens=len(x), num_tokens_across_dp=counts):
                layer.apply(output=out, hidden_states=x, w1=w13, w2=w2, activation=MoEActivation.SILU, **named)
            return relative_error(out.float(), vr.dense(x, weights, ids)) if len(x) else 0.0

    assert 0 < vr.on_ranks(2, rank)[0] < ERROR


def test_vllms_batch_invariance_is_the_dispatchers(monkeypatch):
    monkeypatch.setattr(adapter, "envs", SimpleNamespace(VLLM_BATCH_INVARIANT=True))

    def rank(number: int, ports: list[int]) -> bool:
        with vr.engine(number, ports):
            exchange = exchange_of(vr.load(vr.make_layer()))
            return exchange.decode.config.batch_invariant and exchange.chunks.config.batch_invariant

    assert vr.on_ranks(1, rank) == [True] and adapter_experts.MoEQuantExperts._supports_batch_invariance()


def with_experts_of_vllms(test: Callable[[], Any]) -> Any:
    """Runs with vLLM's batched experts in place of its Triton ones, which need a GPU, and what these need of its compiled parts."""

    def silu_and_mul(result: Tensor, both: Tensor) -> None:
        gate, up = both.float().chunk(2, -1)
        result.copy_(torch.nn.functional.silu(gate).to(both.dtype) * up.to(both.dtype))

    def quantize(x: Tensor, group_size: int, **_: Any) -> tuple[Tensor, Tensor]:
        groups = x.float().view(*x.shape[:-1], -1, group_size)
        scales = groups.abs().amax(-1).clamp(min=1e-10) / 448
        return (groups / scales[..., None]).view(x.shape).to(torch.float8_e4m3fn), scales

    library = torch.library.Library("_C", "FRAGMENT")
    library.define("silu_and_mul(Tensor! result, Tensor input) -> ()")
    library.impl("silu_and_mul", silu_and_mul, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched_moe, "_is_capturing_or_compiling", lambda: False)
        patch.setattr("vllm.model_executor.layers.fused_moe.utils.per_token_group_quant_fp8", quantize)
        patch.setattr(adapter, "backend_to_kernel_cls", lambda backend: [Naive])
        patch.setitem(adapter.BATCHED, "triton", Fp8MoeBackend.TRITON)
        return test()


class Naive(batched_moe.NaiveBatchedExperts):
    # whose own answers are about GPUs
    @staticmethod
    def is_supported_config(*_: Any) -> tuple[bool, str | None]:
        return True, None


@pytest.mark.parametrize("across", [(16, 16), (1, 7)], ids=str)
def test_experts_of_vllms_on_this_transport(across):
    right(with_experts_of_vllms(lambda: errors(2, across, data=2, backend="triton")))


def test_experts_of_vllms_where_nothing_is_exchanged():
    right(with_experts_of_vllms(lambda: errors(2, (16,), padding=2, tensor=2, backend="triton")))


# --- weights ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8", [True, False], ids=["an fp8 checkpoint", "a bfloat16 checkpoint"])
def test_weights_lie_as_quantize_weight_makes_them(fp8):
    def rank(number: int, ports: list[int]) -> list[bool]:
        with vr.engine(number, ports, data=2):
            layer = vr.load(vr.make_layer(config=None if fp8 else {}), fp8)
        experts, mine = layer.routed_experts, slice(4 * number, 4 * number + 4)
        return [
            torch.equal(getattr(experts, name + kind).view(torch.uint8), whole[mine].contiguous().view(torch.uint8))
            for name, w in zip(("w13", "w2"), vr.quantized(), strict=True)
            for kind, whole in (("_weight", w.values), ("_weight_scale_inv", w.scales))
        ]

    assert vr.on_ranks(2, rank) == [[True] * 4] * 2


def test_a_bfloat16_checkpoint_gives_what_its_fp8_weights_give():
    def rank(number: int, ports: list[int]) -> bool:
        with vr.engine(number, ports) as config:
            fp8, loaded = vr.load(vr.make_layer(0)), vr.load(vr.make_layer(1, {}), fp8=False)
            return torch.equal(vr.call(fp8, config, 0, (16,))[0], vr.call(loaded, config, 0, (16,))[0])

    assert vr.on_ranks(1, rank) == [True]


# --- activations --------------------------------------------------------------------------------------------------------------


def clamped(limit: float | None, alpha: float = 1.0, beta: float = 0.0) -> Callable[[Tensor], Tensor]:
    """vLLM's `silu_and_mul_with_clamp`, whose kernel is compiled."""

    def compute(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + beta)

    return compute


# as apply_moe_activation calls them
EXPECTED: dict[MoEActivation, tuple[dict[str, float], Callable[[Any, Tensor], Tensor]]] = {
    MoEActivation.SILU: ({"clamp_limit": 2.0, "alpha": 3.0, "beta": 4.0}, lambda _, x: clamped(2.0)(x)),
    MoEActivation.SWIGLUOAI: ({}, SwigluOAIAndMul.forward_native),
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: ({"clamp_limit": 2.0, "alpha": 1.5, "beta": 1.0}, lambda _, x: clamped(2.0, 1.5, 1.0)(x)),
    MoEActivation.SWIGLUSTEP: ({}, SwigluStepAndMul.forward_native),
    MoEActivation.RELU2_NO_MUL: ({}, lambda _, x: torch.relu(x).square()),
    MoEActivation.GELU_TANH_NO_MUL: ({}, lambda _, x: torch.nn.functional.gelu(x, approximate="tanh")),
}


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.value)
def test_activations_are_vllms(kind):
    numbers, expected = EXPECTED[kind]
    found = activations.activation_of(kind, ApplyMoEActivationConfig(**numbers))
    x = 12 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    own = expected(SimpleNamespace(alpha=1.702, limit=7.0), x)
    torch.testing.assert_close(activated(x, found), own, rtol=1e-5, atol=1e-5)


def test_plain_swiglu_is_what_the_fused_kernel_takes():
    assert activations.activation_of(MoEActivation.SILU, ApplyMoEActivationConfig()) == Activation()


# --- flags --------------------------------------------------------------------------------------------------------------------

MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "vocab_size": 128,
    "max_position_embeddings": 128,
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2),
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "head_dim": 128,
}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """vLLM asks a model's class what it can in a process of its own, which imports everything again."""
    monkeypatch.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda function: function())


def config_of(tmp_path: Any, checkpoint: dict[str, Any] | None, **flags: Any) -> VllmConfig:
    given = {"quantization_config": checkpoint} if checkpoint else {}
    (tmp_path / "config.json").write_text(json.dumps(MODEL | given))
    return EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, load_format="dummy", **flags).create_engine_config()


def test_the_flag_serves_an_unchanged_checkpoint(tmp_path):
    made = config_of(tmp_path, vr.CHECKPOINT, quantization="moequant", additional_config={"moequant": {"max_tokens": 512}})
    assert type(made.quant_config) is adapter.MoEQuantConfig and made.quant_config.weight_block_size == [128, 128]
    assert made.additional_config == {"moequant": {"max_tokens": 512}}


def test_without_the_flag_nothing_changes(tmp_path):
    assert type(config_of(tmp_path, vr.CHECKPOINT).quant_config) is Fp8Config


def test_the_flag_serves_a_checkpoint_without_quantization(tmp_path):
    made = config_of(tmp_path, None, quantization="moequant").quant_config
    assert type(made) is adapter.MoEQuantConfig and made.weight_block_size is None


def test_the_commands_of_the_page_are_vllms():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("vllm serve ")]
    assert len(commands) == 4
    for _, _, model, *flags in commands:
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        made = EngineArgs.from_cli_args(parser.parse_args(["--model", model, *flags]))
        assert made.quantization == "moequant"
        settings_of(made.additional_config)
        assert made.enable_expert_parallel == (made.data_parallel_size == 8)


@pytest.mark.parametrize(
    "other",
    [
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {**vr.CHECKPOINT, "weight_block_size": [64, 128]},
        {**vr.CHECKPOINT, "activation_scheme": "static"},
        {"quant_method": "mxfp4"},
    ],
    ids=["per tensor", "other blocks", "static", "mxfp4"],
)
def test_other_checkpoints_are_refused_in_words(other):
    with pytest.raises(ValueError, match="takes checkpoints with fp8 weights in blocks of 128x128"):
        get_quantization_config("moequant").override_quantization_method(other, "moequant")


# --- refusals -----------------------------------------------------------------------------------------------------------------


def refused(number: int, ports: list[int], options: dict[str, Any], arguments: dict[str, Any]) -> str:
    with vr.engine(number, ports, **options), pytest.raises(ValueError) as caught:
        vr.make_layer(**arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    "world, options, arguments, words",
    [
        (1, {}, {"activation": "situ"}, "does not support MoEActivation.SITU activation"),
        (1, {"backend": "flashinfer_cutlass"}, {}, "--moe-backend auto"),
        (1, {"backend": "triton", "max_tokens": 16}, {}, "--max-num-batched-tokens 16 or fewer"),
        (1, {"max_token": 16}, {}, "may have max_tokens, transport"),
        (1, {"max_tokens": 0}, {}, "max_tokens must be"),
        (2, {"data": 2}, {"num_experts": 9}, "got 9 on 2 ranks"),
    ],
    ids=["activation", "backend", "batched without chunks", "unknown setting", "wrong setting", "experts"],
)
def test_layers_that_are_not_served_are_refused_before_they_load(world, options, arguments, words):
    def run() -> list[str]:
        return vr.on_ranks(world, refused, options, arguments)

    found = with_experts_of_vllms(run) if options.get("backend") == "triton" else run()
    assert all(words in text for text in found), found


@pytest.mark.parametrize(
    "changes, words",
    [({"use_ep": False, "dp_size": 2}, "--enable-expert-parallel"), ({"pcp_size": 2}, "prefill context")],
    ids=["no expert parallelism", "prefill context"],
)
def test_parallelism_that_is_not_served_is_refused(changes, words):
    parallel = {"dp_size": 1, "use_ep": True, "pcp_size": 1, "ep_size": 2, "use_all2all_kernels": True} | changes
    why = adapter._unserved(SimpleNamespace(moe_parallel_config=SimpleNamespace(**parallel), num_experts=8), "linear")
    assert words in str(why)


def test_experts_have_to_be_neighbours():
    parallel = SimpleNamespace(dp_size=2, use_ep=True, pcp_size=1, ep_size=2, use_all2all_kernels=True)
    assert "linear" in str(adapter._unserved(SimpleNamespace(moe_parallel_config=parallel, num_experts=8), "round_robin"))


# --- rows that fill up --------------------------------------------------------------------------------------------------------


def test_sequence_parallel_ranks_mask_their_own_rows():
    """7 rows, the last 3 of which fill up, on two sequence parallel ranks: 4 rows each, of which the second's last one is none."""
    for rank, absent in ((0, [False] * 4), (1, [True] * 4)):
        parallel = SimpleNamespace(ep_rank=rank, use_all2all_kernels=True)
        moe: Any = SimpleNamespace(moe_parallel_config=parallel, sp_size=2)
        mask = torch.arange(7) >= 4
        with set_forward_context(None, VllmConfig(), num_tokens=7, is_padding=mask):
            ids = adapter_experts.ids_to_send(moe, torch.ones(4, 2, dtype=torch.int32), None)
        assert (ids < 0)[:, 0].tolist() == absent


def test_registering_uses_no_gpu_and_can_be_repeated():
    integration.register()
    assert not torch.cuda.is_initialized()
    assert get_quantization_config("moequant") is adapter.MoEQuantConfig


def test_weights_on_the_input():
    x, weights = torch.full((2, 4), 3.0).bfloat16(), torch.tensor([[0.5], [2.0]])
    rows, left = adapter_experts.weighted(x, weights, True)
    assert rows[:, 0].tolist() == [1.5, 6.0] and left.tolist() == [[1.0], [1.0]]
    assert adapter_experts.weighted(x, weights, False) == (x, weights)


def test_docstrings_have_every_parameter_what_is_returned_and_what_is_raised(monkeypatch):
    names = tuple(f"integrations.vllm.{module.name}" for module in pkgutil.iter_modules(integration.__path__))
    monkeypatch.setattr(test_docstrings, "MODULES", names)
    public = dict(test_docstrings.public())
    assert len(public) > 20
    for name, value in public.items():
        test_docstrings.check(name, value)
