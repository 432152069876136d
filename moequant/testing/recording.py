"""Recording the routing of a model: which experts its routers choose, with which weights, for which activations.

T tokens, K top-k, E experts, H hidden size.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moequant.checks import check_int, check_is

# Names that Hugging Face's models give: the router among a block's children, E and K among a block's or a router's attributes.
ROUTERS = ("gate", "router")
EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
TOP_KS = ("top_k", "num_experts_per_tok", "topk", "k")
SAFETENSORS = {"U8": torch.uint8, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(eq=False)
class RecordedLayer:
    """One router's calls, joined.

    Attributes:
        num_experts: E.
        parts: of each call, ids (T, K) int64, weights (T, K) float32 and activations (T, H) of the model's type, all on the CPU.
    """

    num_experts: int
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def _joined(self, part: int) -> Tensor:
        return torch.cat([parts[part] for parts in self.parts])

    @property
    def ids(self) -> Tensor:
        """(T, K) int64 of all calls."""
        return self._joined(0)

    @property
    def weights(self) -> Tensor:
        """(T, K) float32 of all calls."""
        return self._joined(1)

    @property
    def activations(self) -> Tensor:
        """(T, H) of the model's type, of all calls."""
        return self._joined(2)


class Recording:
    """What `record_routing` recorded.

    Attributes:
        layers: by the router's name in the model, in the order of their first calls.
    """

    def __init__(self) -> None:
        self.layers: dict[str, RecordedLayer] = {}

    def save(
        self, path: str | Path, *, intermediate_size: int, layers: list[str] | None = None, activations: int = 512, **metadata: str
    ) -> None:
        """Writes a trace that `launch/bench_ep.py --routing trace:PATH` replays: all tokens' ids and weights, and the first
        activations.

        Args:
            path: of the file, which is overwritten.
            intermediate_size: of one expert, for `--model trace`.
            layers: which, by name; None for all.
            activations: for how many tokens these are kept.
            **metadata: more to be written into the file.

        Raises:
            ValueError: nothing was recorded, or layers differ in shape.
        """
        chosen = {name: self.layers[name] for name in (self.layers if layers is None else layers)}
        shapes = {(layer.num_experts, *layer.ids.shape, *layer.activations.shape) for layer in chosen.values()}
        if len(shapes) != 1:
            raise ValueError(
                f"a trace holds layers of one shape, got {len(chosen)} layers with (E, T, K, T, H) of {sorted(shapes)}; run the model "
                "inside `with record_routing(model)`, and choose some with layers="
            )
        ((experts, *_),) = shapes
        numbers = [int((re.findall(r"\d+", name) or [index])[-1]) for index, name in enumerate(chosen)]
        parts = list(chosen.values())
        tensors = {
            "ids": torch.stack([layer.ids for layer in parts]).to(torch.uint8 if experts <= 256 else torch.int16),
            "weights": torch.stack([layer.weights for layer in parts]).half(),
            "activations": torch.stack([layer.activations[:activations] for layer in parts]).bfloat16(),
        }
        about = {"num_experts": str(experts), "intermediate_size": str(intermediate_size), "layers": json.dumps(numbers)}
        write_safetensors(Path(path), tensors, about | metadata)


@contextmanager
def record_routing(
    model: nn.Module,
    *,
    router: str | None = None,
    read: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    max_tokens: int | None = None,
) -> Iterator[Recording]:
    """Records what a model's routers do while the block runs, through forward hooks; the model itself is left as it is.

        with record_routing(model) as recording:
            model(input_ids)
        recording.save("mine.safetensors", intermediate_size=model.config.moe_intermediate_size)

    Routers are found as in Hugging Face's models: a module with a child `experts` and a child `gate` or `router`. Such a child
    returns the logits (T, E), of which the softmax's K largest are taken, summing to 1 unless the block's `norm_topk_prob` is
    False; or a tuple with the ids (T, K), integers, and their weights (T, K) or the scores (T, E).

    Args:
        model: with such routers.
        router: a pattern for the routers' names, as "model.layers.*.mlp.my_gate", instead of that search.
        read: from what a router returns to ids and weights, each (T, K), where that is something else.
        max_tokens: of a layer, at least 1; later ones are not recorded.

    Yields:
        The recording, which grows with each call of the model.

    Raises:
        ValueError: the model has no router that is known, or one returns what can't be read.
    """
    check_is("model", model, nn.Module)
    if router is not None:
        check_is("router", router, str)
    if read is not None and not callable(read):
        raise ValueError(f"read must be callable with what a router returns, got {type(read).__name__}")
    if max_tokens is not None:
        check_int("max_tokens", max_tokens, 1)
    modules = dict(model.named_modules())
    if router is not None:
        names = [name for name in modules if fnmatch.fnmatchcase(name, router)]
    else:
        names = [
            f"{name}.{child}".lstrip(".")
            for name, module in modules.items()
            for child in ROUTERS
            if hasattr(module, "experts") and isinstance(getattr(module, child, None), nn.Module)
        ]
    if not names:
        looked = "with a child `experts` beside a `gate` or `router`" if router is None else f"named {router!r}"
        raise ValueError(
            f"{type(model).__name__} has no module {looked}; give the routers' names, as router='model.layers.*.mlp.gate'"
        )
    recording = Recording()
    hooks = []
    for name in names:
        block = modules[name.rpartition(".")[0]]
        hook = _hook(recording, name, block, read, max_tokens)
        hooks.append(modules[name].register_forward_hook(hook, with_kwargs=True))
    try:
        yield recording
    finally:
        for hook in hooks:
            hook.remove()


def _hook(
    recording: Recording,
    name: str,
    block: nn.Module,
    read: Callable[[Any], tuple[Tensor, Tensor]] | None,
    max_tokens: int | None,
) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        ids, weights = read(output) if read is not None else _choices(name, module, block, output)
        layer = recording.layers.setdefault(name, RecordedLayer(_num_experts(name, module, block, output)))
        seen = sum(len(parts[0]) for parts in layer.parts)
        most = None if max_tokens is None else max(0, max_tokens - seen)
        parts = ids.flatten(0, -2).long(), weights.flatten(0, -2).float(), hidden.flatten(0, -2)
        layer.parts.append((*(x[:most].detach().cpu() for x in parts),))  # pyright: ignore[reportArgumentType]

    return record


def _attribute(names: tuple[str, ...], *modules: nn.Module) -> int | None:
    """The first of the names that one of the modules has as a number."""
    found = (getattr(module, name, None) for name in names for module in modules)
    return next((value for value in found if isinstance(value, int)), None)


def _num_experts(name: str, module: nn.Module, block: nn.Module, output: Any) -> int:
    if isinstance(output, Tensor):
        return output.shape[-1]
    count = _attribute(EXPERT_COUNTS, module, block)
    if count is None and isinstance(getattr(block, "experts", None), nn.ModuleList):
        count = len(block.experts)  # pyright: ignore[reportArgumentType]
    if count is None:
        raise ValueError(f"{name} doesn't say how many experts there are; give it an attribute num_experts")
    return count


def _choices(name: str, module: nn.Module, block: nn.Module, output: Any) -> tuple[Tensor, Tensor]:
    """Ids and weights (T, K) from what a router returned."""
    if isinstance(output, Tensor):
        top_k = _attribute(TOP_KS, block, module)
        if top_k is None:
            raise ValueError(f"{name} returns logits, and its block has none of {', '.join(TOP_KS)}; give it one, or read=")
        weights, ids = output.float().softmax(-1).topk(top_k)
        return ids, weights / weights.sum(-1, keepdim=True) if getattr(block, "norm_topk_prob", True) else weights
    tensors = [x for x in output if isinstance(x, Tensor)] if isinstance(output, (tuple, list)) else []
    ids = next((x for x in tensors if not x.is_floating_point() and x.dtype != torch.bool), None)
    # of logits and scores the scores come last
    floats = [x for x in reversed(tensors) if x.is_floating_point()]
    if ids is not None:
        for x in floats:
            if x.shape == ids.shape:
                return ids, x
        if floats:
            return ids, floats[0].gather(-1, ids.long())
    raise ValueError(
        f"{name} returned {type(output).__name__}, which is neither logits nor a tuple with ids and weights; give read="
    )


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a file of the safetensors format.

    Args:
        path: of the file; its folder is made.
        tensors: by name, of the types in SAFETENSORS, on any device.
        metadata: texts by name.
    """
    names = {dtype: name for name, dtype in SAFETENSORS.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    chunks, end = [], 0
    for name, tensor in tensors.items():
        data = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + len(data)]}
        chunks.append(data)
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a file of the safetensors format.

    Args:
        path: of the file.

    Returns:
        Its tensors, on the CPU, and its metadata.
    """
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        # a copy, which is aligned for its type
        flat = torch.frombuffer(data[begin + first : begin + last], dtype=torch.uint8).clone()
        tensors[name] = flat.view(SAFETENSORS[entry["dtype"]]).view(entry["shape"])
    return tensors, metadata
