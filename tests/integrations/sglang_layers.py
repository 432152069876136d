# pyright: reportMissingImports=false
"""SGLang's own MoE layer, with what it needs of a server, and a dense reference of it. For processes that have SGLang."""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest import mock

import tomllib
import torch
from torch import Tensor

from moequant import dequantize, quantize_weight
from moequant.testing.generators import routing

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 3, 256, 128


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a package that is not here, and any module in it, where nothing that is asked for is ever called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        inside = fullname.partition(".")[0] == self.name
        return ModuleSpec(fullname, self, is_package=True) if inside else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return mock.MagicMock(__path__=[], __file__=None)

    def exec_module(self, module: Any) -> None:
        pass


def import_engine() -> None:
    """Imports what the layer needs. SGLang's compiled part is not here, which it imports where it sees a GPU, nor are the sources that
    its kernels would be compiled from; TorchVision, which its image processors import, may be."""
    import sglang
    from transformers.utils.import_utils import is_torchvision_available

    # what transformers has found out stays
    if not is_torchvision_available():
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.io"):
            sys.modules[name] = mock.MagicMock()
    if torch.cuda.is_available() and importlib.util.find_spec("sgl_kernel") is None:
        sys.meta_path.append(Absent("sgl_kernel"))
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


def device() -> torch.device:
    """Of this rank: a GPU where it sees any."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start(rank: int, ranks: int, folder: str, **settings: Any) -> None:
    """A rank of SGLang's, as its scheduler starts one, and its plugins."""
    from sglang.srt.distributed.parallel_state import (
        init_distributed_environment,
        initialize_model_parallel,
        set_custom_all_reduce,
    )
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, get_context, publish

    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    # it is compiled; and SGLang's own communicators of NCCL find none
    set_custom_all_reduce(False)
    os.environ["SGLANG_NCCL_SO_PATH"] = os.devnull
    asked: dict[str, Any] = {
        "moe_a2a_backend": "deepep",
        "moe_runner_backend": "deep_gemm",
        "deepep_mode": "low_latency",
        "device": device().type,
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
    where = {"distributed_init_method": f"file://{folder}/store", "backend": "nccl" if torch.cuda.is_available() else "gloo"}
    init_distributed_environment(world_size=ranks, rank=rank, local_rank=rank, **where)
    initialize_model_parallel()
    initialize_dp_attention(arguments)


def checkpoint(experts: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down of all experts in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((experts, INTERMEDIATE, HIDDEN),) * 2 + ((experts, HIDDEN, INTERMEDIATE),)
    gate, up, down = (torch.randn(shape, generator=generator, device="cpu").div(12).bfloat16() for shape in shapes)
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
    # as SGLang's loader of models does
    with device():
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
    if torch.cuda.is_available():
        layer.quant_method.process_weights_after_loading(layer)
    return layer


def tokens(count: int, seed: int) -> tuple[Tensor, Any]:
    """Hidden states, and SGLang's choice of experts; the last token is padding, as SGLang marks it."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, HIDDEN, generator=generator).bfloat16()
    ids, weights = routing(count, TOP_K, EXPERTS, generator=generator)
    ids[-1:] = -1
    hidden, weights, ids = (x.to(device()) for x in (hidden, weights, ids))
    return hidden, StandardTopKOutput(weights, ids, torch.empty(count, EXPERTS, device=device()))


def dense(hidden: Tensor, choice: Any, quantized: bool = True, limit: float = math.inf) -> Tensor:
    """The layer in float32, every expert for every token, of the weights that the layer has."""
    x = hidden.float()
    weights = (dequantize(quantize_weight(w)) if quantized else w.float() for w in checkpoint())
    gate, up, down = (w.to(x.device) for w in weights)
    gates, ups = (torch.einsum("th,eih->eti", x, w) for w in (gate, up))
    inner = torch.nn.functional.silu(gates.clamp(max=limit)) * ups.clamp(-limit, limit)
    outputs = torch.einsum("eti,ehi->teh", inner, down)
    shares = torch.zeros(x.shape[0], EXPERTS + 1, device=x.device).scatter_(
        1, choice.topk_ids.long() % (EXPERTS + 1), choice.topk_weights
    )
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
