# pyright: reportMissingImports=false
"""SGLang's own MoE layer, with what it needs of a server, and a dense reference of it. For processes that have SGLang."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import tomllib
import torch
from torch import Tensor

from moequant import dequantize, quantize_weight
from moequant.testing.generators import routing

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 3, 256, 128


def import_engine() -> None:
    """Imports what the layer needs. TorchVision's compiled part, which image processors of SGLang's import, is not here, nor are the
    sources that its kernels would be compiled from."""
    import sglang
    from transformers.utils.import_utils import is_torchvision_available

    # what transformers has found out stays
    is_torchvision_available()
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.io"):
        sys.modules[name] = mock.MagicMock()
    for name in ("include", "csrc"):
        (Path(str(sglang.__file__)).parent / "kernels" / "jit" / name).mkdir(exist_ok=True)
    import sglang.srt.layers.moe.ep_moe.layer


def install_plugin(folder: Path) -> None:
    """Makes this package's entry points known to this process, as an installation does."""
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    made = folder / "moequant-0.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: moequant\nVersion: 0\n")
    groups = {"sglang.srt.plugins": project["entry-points"]["sglang.srt.plugins"]}
    lines = [
        line for name, points in groups.items() for line in (f"[{name}]", *(f"{key} = {value}" for key, value in points.items()))
    ]
    (made / "entry_points.txt").write_text("\n".join(lines))
    sys.path.insert(0, str(folder))


def start(rank: int, ranks: int, folder: str, **settings: Any) -> None:
    """A rank of SGLang's, as its scheduler starts one, and its plugins."""
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, get_context, publish

    torch.set_num_threads(1)
    asked: dict[str, Any] = {
        "moe_a2a_backend": "deepep",
        "moe_runner_backend": "deep_gemm",
        "deepep_mode": "low_latency",
        "device": "cpu",
        "tp_size": ranks,
        "ep_size": ranks,
        "attn_dp_size": ranks,
        "dp_size": ranks,
        "enable_dp_attention": ranks > 1,
    }
    arguments = get_context().override_server_args(**asked | settings).install()
    load_plugins()
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank))
    initialize_moe_config()
    where = {"distributed_init_method": f"file://{folder}/store", "backend": "gloo"}
    init_distributed_environment(world_size=ranks, rank=rank, local_rank=rank, **where)
    initialize_model_parallel()
    initialize_dp_attention(arguments)


def checkpoint(experts: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down of all experts in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((experts, INTERMEDIATE, HIDDEN),) * 2 + ((experts, HIDDEN, INTERMEDIATE),)
    gate, up, down = (torch.randn(shape, generator=generator).div(12).bfloat16() for shape in shapes)
    return gate, up, down


def build(quantized: bool = True, number: int = 0, **changes: Any) -> Any:
    """A layer of SGLang's, filled by its own loader."""
    from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    config = Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[128, 128]) if quantized else None
    settings: dict[str, Any] = {
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "params_dtype": torch.bfloat16,
    }
    layer = get_moe_impl_class(config)(layer_id=number, quant_config=config, prefix="experts", **settings | changes)
    for shard, weight in zip(("w1", "w3", "w2"), checkpoint(), strict=True):
        name = "w2" if shard == "w2" else "w13"
        for expert in range(EXPERTS):
            parts = {"weight": weight[expert]}
            if quantized:
                made = quantize_weight(weight[expert : expert + 1])
                parts = {"weight": made.values[0], "weight_scale_inv": made.scales[0]}
            for part, tensor in parts.items():
                parameter = getattr(layer, f"{name}_{part}")
                layer.weight_loader(parameter, tensor, f"experts.{expert}.{shard}.{part}", shard, expert)
    return layer


def tokens(count: int, seed: int) -> tuple[Tensor, Any]:
    """Hidden states, and SGLang's choice of experts; the last token is padding, as SGLang marks it."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, HIDDEN, generator=generator).bfloat16()
    ids, weights = routing(count, TOP_K, EXPERTS, generator=generator)
    ids[-1:] = -1
    return hidden, StandardTopKOutput(weights, ids, torch.empty(count, EXPERTS))


def dense(hidden: Tensor, choice: Any, quantized: bool = True, limit: float = math.inf) -> Tensor:
    """The layer in float32, every expert for every token, of the weights that the layer has."""
    x = hidden.float()
    gate, up, down = (dequantize(quantize_weight(w)) if quantized else w.float() for w in checkpoint())
    gates, ups = (torch.einsum("th,eih->eti", x, w) for w in (gate, up))
    inner = torch.nn.functional.silu(gates.clamp(max=limit)) * ups.clamp(-limit, limit)
    outputs = torch.einsum("eti,ehi->teh", inner, down)
    shares = torch.zeros(x.shape[0], EXPERTS + 1).scatter_(1, choice.topk_ids.long() % (EXPERTS + 1), choice.topk_weights)
    return torch.einsum("te,teh->th", shares[:, :EXPERTS], outputs)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, by the Frobenius norm; 0 for no tokens."""
    return float((found.float() - expected).norm() / expected.norm().clamp_min(1e-9))


def agree(counts: tuple[int, ...], rank: int) -> None:
    """What SGLang's scheduler says before a step."""
    from sglang.srt.layers.dp_attention import set_dp_buffer_len

    set_dp_buffer_len(sum(counts), counts[rank], False, list(counts))


def said(call: Callable[[], Any]) -> str:
    """The error that a call raises."""
    try:
        call()
    except (ValueError, RuntimeError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing"
