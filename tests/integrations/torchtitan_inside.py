# pyright: reportMissingImports=false
"""What test_torchtitan.py runs with torchtitan: its own MoE layer, with its own dispatchers and with moequant's.

Each rank is on a GPU where there are as many.

python tests/integrations/torchtitan_inside.py FOLDER     makes it, and writes <ranks>-<rank>.json there: what came of it
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torchtitan.config import OverrideConfig, apply_overrides
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.config_utils import make_routed_experts_config
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher, TorchAOTokenDispatcher

import test_docstrings
from moequant.integrations import torchtitan as integration

EXPERTS, TOP_K, DIM, HIDDEN = 8, 3, 64, 48
# torchtitan's own dispatcher asks for it, and there is none in an older torch than that one wants
if not hasattr(torch.compiler, "_is_non_strict_tracing"):
    setattr(torch.compiler, "_is_non_strict_tracing", lambda: False)  # noqa: B010
TARGET = "moequant.integrations.torchtitan.token_dispatcher"


def config() -> MoE.Config:
    """A layer, as torchtitan's models have it."""
    init = functools.partial(nn.init.normal_, std=0.1)
    routed = make_routed_experts_config(
        dim=DIM,
        hidden_dim=HIDDEN,
        num_experts=EXPERTS,
        top_k=TOP_K,
        param_init=dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), init),
        comm_backend="standard",
    )
    gate = Linear.Config(in_features=DIM, out_features=EXPERTS, bias=False, param_init={"weight": init})
    router = TokenChoiceTopKRouter.Config(num_experts=EXPERTS, gate=gate, top_k=TOP_K)
    return MoE.Config(num_experts=EXPERTS, routed_experts=routed, router=router)


def build(rank: int, ranks: int, device: torch.device, *imports: Any) -> Any:
    """This rank's part of the layer in bfloat16, with torchtitan's own dispatcher or after overrides. The same weights each time."""
    chosen = config()
    apply_overrides(OverrideConfig(imports=list(imports)), chosen)
    layer: Any = chosen.build()
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    if ranks > 1:
        local = EXPERTS // ranks
        for name, parameter in list(layer.routed_experts.inner_experts.named_parameters()):
            mine = parameter[rank * local : (rank + 1) * local].detach().clone()
            setattr(layer.routed_experts.inner_experts, name, nn.Parameter(mine))
        layer.routed_experts.token_dispatcher.wire_meshes(ep_mesh=init_device_mesh(device.type, (ranks,), mesh_dim_names=("ep",)))
    return layer.to(device, torch.bfloat16)


# torchtitan's full and selective activation checkpointing
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "selective": {"context_fn": functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten._grouped_mm.default])},
}


def step(layer: Any, x: Tensor, way: str | None = None) -> dict[str, Tensor]:
    """Output and all gradients, by name; what a way doesn't keep is recomputed."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    output = checkpoint(layer, x, use_reentrant=False, **WAYS[way]) if way else layer(x)
    (output.float() * torch.linspace(-1, 1, output.numel(), device=x.device).view_as(output)).sum().backward()
    assert x.grad is not None
    grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "x": x.grad, **grads}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative, by the Frobenius norm."""
    assert found.keys() == expected.keys()
    return {name: float((found[name] - x).float().norm() / x.float().norm()) for name, x in expected.items()}


def run(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    # its other one checks placements on a model's meshes
    set_spmd_backend("default")
    device = torch.device("cuda", rank) if torch.cuda.device_count() >= ranks else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store-{ranks}", rank=rank, world_size=ranks)
    own, other = build(rank, ranks, device), build(rank, ranks, device, (TARGET, {"timeout": 30.0}))
    found: dict[str, Any] = {"class": type(other.routed_experts.token_dispatcher).__name__, "device": device.type}
    # more tokens than before, and fewer
    for length in (5, 11, 3):
        x = torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(100 * length + rank)).to(device, torch.bfloat16)
        expected, mine = step(own, x), step(other, x)
        found[f"{length}"] = error(mine, expected)
        for way in WAYS:
            again = step(other, x, way)
            found[f"{length} {way}"] = all(torch.equal(again[name], mine[name]) for name in mine)
    second = build(rank, ranks, device, TARGET)
    with torch.no_grad():
        found["no grad"] = error({"output": second(x)}, {"output": own(x)})
    # of layers with one timeout, and with another
    known = list(integration._DISPATCHERS.values())
    found["dispatchers"], found["room"] = len(known), known[0].config.max_tokens_per_rank
    padded = TorchAOTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K, pad_multiple=32)
    plain = LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K)
    factory = integration.token_dispatcher
    found["refused"] = [said(lambda: factory(padded)), said(lambda: factory(plain, capacity=8))]
    with mock.patch.object(test_docstrings, "MODULES", ["integrations.torchtitan"]):
        for name, value in test_docstrings.public():
            test_docstrings.check(name, value)
    found["other version"] = said(lambda: integration.require("0.2.2"))
    return found


def said(call: Callable[[], Any]) -> str:
    """The error that a call raises."""
    try:
        call()
    except (ValueError, ImportError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing"


def main(folder: Path) -> None:
    """Runs one rank, and two."""
    folder.mkdir()
    # forked ranks are spared the import, and can't use a GPU that it has asked for something
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.device_count() else "fork")
    for ranks in (1, 2):
        processes = [context.Process(target=write, args=(rank, ranks, folder), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)


def write(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    try:
        found = run(rank, ranks, folder)
    except BaseException:
        found = {"failed": traceback.format_exc()}
    (folder / f"{ranks}-{rank}.json").write_text(json.dumps(found))
    # not sys.exit: a peer that failed would be waited for
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
