# pyright: reportMissingImports=false
"""What test_sglang.py runs with SGLang: its own plugin loader, its own MoE layer.

Each rank is on a GPU where there are as many.

python tests/integrations/sglang_inside.py FOLDER     makes it, and writes <case>-<rank>.json there: what came of each
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import multiprocessing
import os
import pkgutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sglang_layers import agree, build, checkpoint, dense, device, error, import_engine, install_plugin, said, start, tokens
from torch import Tensor

from moequant import MoEQuantDispatcher, quantize_weight
from moequant.errors import PeerTimeoutError

# room for tokens of a rank in the test, of the dispatcher for decoding and the other
DECODE, MOST = 4, 16
# tokens of both ranks
REPLAYED = {"full": (8, 8), "uneven": (8, 3), "one idle": (0, 5), "all idle": (0, 0), "full again": (8, 8)}
COUNTS = {"decode": (4, 3), "full": (16, 16), "one idle": (16, 0), "all idle": (0, 0), "in chunks": (40, 3)}


def not_asked(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """Without the variable, with the same plugin installed."""
    os.environ.pop("MOEQUANT_SGLANG")
    start(rank, ranks, folder)
    from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
    from sglang.srt.layers.moe.moe_runner.base import FusedOpPool
    from sglang.srt.plugins.hook_registry import HookRegistry

    return {
        "loaded": "moequant.integrations.sglang" in sys.modules,
        "hooks": [*HookRegistry._hooks],
        "imported": [name for name in sys.modules if name.startswith("moequant.integrations.sglang.")],
        "class": get_moe_impl_class(None).__name__,
        "fused": FusedOpPool.get_fused_func("deepep", "deep_gemm") is not None,
    }


def alone(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """One rank, in fp8 and in bfloat16."""
    start(rank, ranks, folder)
    hidden, choice = tokens(9, seed=3)
    agree((9,), 0)
    limit, results, rooms = 1.0, {}, set()
    for name, settings in {
        "fp8": {},
        "bfloat16": {"quantized": False},
        "limit": {"quantized": False, "swiglu_limit": limit},
    }.items():
        layer = build(**settings)
        if "quantized" in settings:
            # what SGLang chooses on a GPU
            layer.quant_method.forward = layer.quant_method.forward_cuda
        with torch.inference_mode():
            results[name] = layer(hidden, choice)
        rooms |= {inner.config.max_tokens_per_rank for inner in layer.dispatcher._inners}
    exact = dense(hidden, choice, quantized=False)
    return {
        "fp8": error(results["fp8"], dense(hidden, choice)),
        "bfloat16": error(results["bfloat16"], exact),
        "limit": error(results["limit"], dense(hidden, choice, quantized=False, limit=limit)),
        "no limit": error(results["limit"], exact),
        "rooms": sorted(rooms),
        "device": device().type,
    }


def together(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """Two ranks, two layers that share dispatchers."""
    start(rank, ranks, folder)
    from sglang.srt.model_executor.runner_utils.deepep_adapter import DeepEPCudaGraphRunnerAdapter

    from moequant.integrations.sglang import dispatchers

    dispatchers.DECODE = DECODE
    os.environ["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] = str(MOST)
    # the default device while SGLang builds a model is no CPU: a factory that doesn't name its own fails on this one
    with torch.device("meta"):
        dispatcher = build_under_default(number=1).dispatcher
    layers = [build(number=number) for number in range(2)]
    inners = dispatcher._inners
    errors: dict[str, float] = {}
    calls: dict[str, list[tuple[int, int, int]]] = {}
    call = MoEQuantDispatcher.__call__

    def counted(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls[name].append((self.config.max_tokens_per_rank, hidden.shape[0], kwargs["expected_tokens"]))
        return call(self, hidden, *args, **kwargs)

    with torch.inference_mode(), mock.patch.object(MoEQuantDispatcher, "__call__", counted):
        for number, (name, counts) in enumerate(COUNTS.items()):
            hidden, choice = tokens(counts[rank], seed=2 * number + rank)
            agree(counts, rank)
            calls[name] = []
            first = layers[0](hidden, choice)
            errors[name] = error(first, dense(hidden, choice))
            calls["other layer"] = []
            name = "other layer"
            errors[name] = max(errors.get(name, 0.0), error(layers[1](hidden, choice), first.float()))
    agree((16, 16), rank)
    hidden, choice = tokens(17, seed=0)
    stale = said(lambda: layers[0](hidden, choice))
    first, last = (len(checkpoint()[0]) // ranks * place for place in (rank, rank + 1))
    gate, up, down = (w[first:last] for w in checkpoint())
    parts = {"w13": quantize_weight(torch.cat((gate, up), 1), segments=2), "w2": quantize_weight(down)}
    equal = {
        name: torch.equal(getattr(layers[0], f"{name}_weight").cpu().view(torch.int8), made.values.view(torch.int8))
        and torch.equal(getattr(layers[0], f"{name}_weight_scale_inv").cpu(), made.scales)
        for name, made in parts.items()
    }
    made = layers[0].dispatcher._experts[1]
    graphs = DeepEPCudaGraphRunnerAdapter()
    with mock.patch.object(MoEQuantDispatcher, "check") as checked:
        graphs.capture(is_extend_in_batch=False)
        graphs.replay()
    asked = [entry.kwargs for entry in checked.call_args_list]
    inners[-1]._fault = PeerTimeoutError("rank 1 did not come", 1)
    return {
        "errors": errors,
        "device": device().type,
        "rooms": [inner.config.max_tokens_per_rank for inner in inners],
        "shared": all(layer.dispatcher._inners is inners for layer in layers),
        "stale": stale,
        "equal": equal,
        "in place": made.w13.values.data_ptr() == layers[0].w13_weight.data_ptr(),
        "calls": calls,
        "asked": asked,
        "lost": said(graphs.replay),
    }


def build_under_default(number: int) -> Any:
    """A layer whose parameters are where they belong, though the default device is another where its dispatcher is made."""
    import sglang.srt.layers.moe.fused_moe_triton.layer as module

    create, default = module.create_moe_dispatcher, torch.get_default_device()

    def create_under_default(*args: Any, **kwargs: Any) -> Any:
        with default:
            return create(*args, **kwargs)

    with device(), mock.patch.object(module, "create_moe_dispatcher", create_under_default):
        return build(number=number)


def captured(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """A CUDA graph of a decoding step, replayed for other tokens: ranks have as many, and the last ones of each are padding."""
    start(rank, ranks, folder)
    from sglang.srt.model_executor.runner_utils.deepep_adapter import DeepEPCudaGraphRunnerAdapter

    layer, graphs, graph = build(), DeepEPCudaGraphRunnerAdapter(), torch.cuda.CUDAGraph()
    most = max(max(counts) for counts in REPLAYED.values())
    hidden, choice = tokens(most, seed=rank)
    agree((most,) * ranks, rank)
    found: dict[str, Any] = {"errors": {}, "equal": {}}
    with torch.inference_mode():
        layer(hidden, choice)
        graphs.capture(is_extend_in_batch=False)
        # SGLang's own groups of NCCL have threads that ask for events
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = layer(hidden, choice)
        for number, (name, counts) in enumerate(REPLAYED.items()):
            others, chosen = tokens(most, seed=10 + 2 * number + rank)
            chosen.topk_ids[counts[rank] :] = -1
            for place, value in ((hidden, others), (choice.topk_ids, chosen.topk_ids), (choice.topk_weights, chosen.topk_weights)):
                place.copy_(value)
            graphs.replay()
            graph.replay()
            found["errors"][name] = error(out, dense(hidden, choice))
            # a call between replays
            found["equal"][name] = torch.equal(layer(hidden, choice), out)
    found["lost"] = sum(inner.check() for inner in layer.dispatcher._inners)
    return found


def overlapped(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """Two-batch overlap: both halves under way, step by step as SGLang's operations call them."""
    # so few that an expert's rows lie where its number says, as DeepEP's do
    os.environ["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] = "64"
    start(rank, ranks, folder, enable_two_batch_overlap=True)
    layer = build()
    batches = [tokens(6 + rank, seed=rank), tokens(3 * rank, seed=2 + rank)]
    with torch.inference_mode():
        expected = []
        for number, (hidden, choice) in enumerate(batches):
            agree(((6, 7), (0, 3))[number], rank)
            expected.append(layer(hidden, choice))
        for slot, (hidden, choice) in enumerate(batches):
            layer.dispatcher.dispatch_a(hidden_states=hidden, topk_output=choice, tbo_subbatch_index=slot)
        received = [layer.dispatcher.dispatch_b(tbo_subbatch_index=slot) for slot in range(2)]
        for slot in range(2):
            outputs = layer.run_moe_core(dispatch_output=received[slot])
            layer.dispatcher.combine_a(combine_input=outputs, tbo_subbatch_index=slot)
        found = [layer.dispatcher.combine_b(tbo_subbatch_index=slot) for slot in range(2)]
    first = received[0]
    return {
        "equal": [torch.equal(*pair) for pair in zip(found, expected, strict=True)],
        "apart": [error(one, other.float()) for one, other in zip(found, expected, strict=True)],
        "device": device().type,
        "format": first.format.value,
        "shapes": [list(first.hidden_states.shape), list(first.hidden_states_scale.shape), list(first.masked_m.shape)],
        "types": [str(x.dtype) for x in (first.hidden_states, first.hidden_states_scale, first.masked_m)],
        "rows": [int(received[slot].masked_m.sum()) for slot in range(2)],
        "expected rows": first.expected_m,
        "passed on": bool(torch.equal(first.topk_ids, batches[0][1].topk_ids) and first.topk_weights is batches[0][1].topk_weights),
    }


def refused(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """What is said instead of loading weights, and what returns to SGLang's own."""
    start(rank, ranks, folder)
    from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
    from sglang.srt.layers.moe.fused_moe_triton.layer import create_moe_dispatcher
    from sglang.srt.layers.moe.utils import DeepEPMode, MoeA2ABackend, speculative_moe_a2a_backend_context
    from sglang.srt.runtime_context import get_context, get_flags, get_parallel

    layer, moe = build(), get_flags().moe
    config, method = layer.moe_runner_config, layer.quant_method

    def words(**changes: Any) -> str:
        return said(lambda: create_moe_dispatcher(dataclasses.replace(config, **changes), quant_method=method))

    @contextlib.contextmanager
    def server(**changes: Any) -> Any:
        before = {name: get_context().config_leaf(name) for name in changes}
        get_context().override("test", **changes)
        yield
        get_context().override("test", **before)

    found = {
        "experts": said(lambda: build(num_experts=9)),
        "activation": words(activation="situ"),
        "gate": words(gemm1_alpha=1.7),
        "runner": words(runner_backend="triton"),
        "shared": words(num_fused_shared_experts=1),
        "elastic": words(num_local_experts=5),
        "on input": words(apply_router_weight_on_input=True),
    }
    for name, changes in {"blocks": {"weight_block_size": [32, 32]}, "mxfp8": {"use_mxfp8": True}}.items():
        with mock.patch.multiple(method, **changes):
            found[name] = words()
    method = object()
    found["method"] = words()
    method = layer.quant_method
    with mock.patch.object(moe, "sbo_enabled", True):
        found["single batch"] = words()
    with mock.patch.multiple(moe, tbo_enabled=True, deepep_mode=DeepEPMode.AUTO):
        found["two batches"] = words()
    for name in ("enable_eplb", "enable_lora"):
        with server(**{name: True}):
            found[name] = words()
    with get_parallel().override(attn_dp_enabled=True, moe_dense_tp_size=1, enable_dp_lm_head=True, num_dp_ranks=2):
        found["hidden counts"] = words()
    with server(moe_a2a_backend="none"):
        found["backend"] = words()
    moe.speculative_a2a_backend = MoeA2ABackend.NONE
    with speculative_moe_a2a_backend_context():
        found["draft"] = type(create_moe_dispatcher(config, quant_method=method)).__name__
        found["draft class"] = get_moe_impl_class(None).__name__
    return found


def docstrings(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """What is missing in them, as test_docstrings.py reads them."""
    start(rank, ranks, folder)
    import test_docstrings
    from moequant.integrations import sglang as integration

    names = [module.name for module in pkgutil.iter_modules(integration.__path__)]
    with mock.patch.object(test_docstrings, "MODULES", [f"integrations.sglang.{name}" for name in names]):
        public = dict(test_docstrings.public())
    wrong = []
    for name, value in public.items():
        try:
            test_docstrings.check(name, value)
        except AssertionError as failure:
            wrong.append(f"{name}: {failure}")
    return {"looked at": len(public), "wrong": wrong}


# and on how many ranks
CASES = {
    "docstrings": (docstrings, 1),
    "not_asked": (not_asked, 1),
    "alone": (alone, 1),
    "together": (together, 2),
    "overlapped": (overlapped, 2),
    "refused": (refused, 2),
    "captured_alone": (captured, 1),
    "captured": (captured, 2),
}


def run(case: str, rank: int, folder: Path) -> None:
    function, ranks = CASES[case]
    store = folder / f"{case}-store"
    store.mkdir(exist_ok=True)
    try:
        if "sglang" not in sys.modules:
            import_engine()
        found: dict[str, Any] = function(rank, ranks, str(store))
    except BaseException:
        found = {"failed": traceback.format_exc()}
    (folder / f"{case}-{rank}.json").write_text(json.dumps(found))
    # not sys.exit: a peer that failed would be waited for
    os._exit(0)


def main(folder: Path) -> None:
    """Runs every case. Ranks are forked, which saves them the import, unless there are GPUs, which SGLang asks when it is imported."""
    gpus = torch.cuda.device_count()
    if not gpus:
        import_engine()
    folder.mkdir()
    install_plugin(folder)
    os.environ["MOEQUANT_SGLANG"] = "1"
    context: Any = multiprocessing.get_context("spawn" if gpus else "fork")
    # a rank that looked for garbage among all that is imported would copy it
    gc.freeze()
    started: list[Any] = []
    for case, (function, ranks) in CASES.items():
        if function is captured and gpus < ranks:
            continue
        with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""} if gpus < ranks else {}):
            processes = [context.Process(target=run, args=(case, rank, folder), daemon=True) for rank in range(ranks)]
            for process in processes:
                process.start()
        started += processes
        # on GPUs most of the time goes to imports and compilers, of all cases at once
        while started and not gpus:
            started.pop().join(120)
    end = time.monotonic() + 240
    for process in started:
        process.join(max(0.0, end - time.monotonic()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
