"""Recorded routing: what benchmarks/record_trace.py wrote, and how launch/bench_ep.py replays it.

A trace is a safetensors file with, for P layers of one model: `ids` (P, N, K) uint8 or int16, `weights` (P, N, K) float16, of N
consecutive tokens of a document; `activations` (P, A, H) bfloat16, the layers' inputs for the first A of them. Its metadata says
`num_experts`, `intermediate_size`, `layers` (the numbers of the P layers in the model) and where it comes from.
`moequant.testing.record_routing` writes such files of other models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moequant.testing.recording import read_safetensors

FOLDER = Path(__file__).resolve().parent / "traces"


class TraceError(ValueError):
    """A trace can't be read or replayed. The message says which, and what to do."""


@dataclass(frozen=True, eq=False)
class Trace:
    """One layer of a recorded model.

    name: the file's, and the layer's number. ids (N, K) and weights (N, K), on the CPU, activations (A, H) bfloat16. num_experts,
    intermediate_size: of the recorded model.
    """

    name: str
    num_experts: int
    intermediate_size: int
    ids: Tensor
    weights: Tensor
    activations: Tensor

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.activations.shape[1]

    def routing(self, first: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Ids (T, K) int32 and weights (T, K) float32 of the tokens from `first` on, in document order; from the start again where the
        document ends."""
        at = torch.arange(first, first + tokens) % len(self.ids)
        return self.ids[at].int(), self.weights[at].float()

    def hidden_states(self, first: int, tokens: int) -> Tensor:
        """The activations (T, H) of the same tokens; from the start again where those that were kept end."""
        return self.activations[torch.arange(first, first + tokens) % len(self.activations)]


def find_traces() -> list[Path]:
    """The recorded files, by name; none if there is no folder."""
    return sorted(FOLDER.glob("*.safetensors"))


def load_trace(spec: str = "") -> Trace:
    """A trace by `FILE[@LAYER]`: a name in the folder or a path; the layer's number in the model, the middle one recorded if none is
    given. Without a file: the first in the folder. Raises TraceError if there is none, or the layer is not in it."""
    name, _, number = spec.partition("@")
    found = find_traces()
    if name:
        candidates = [Path(name), FOLDER / name, FOLDER / f"{name}.safetensors"]
        path = next((path for path in candidates if path.is_file()), None)
    else:
        path = found[0] if found else None
    if path is None:
        listed = ", ".join(path.stem for path in found) or "none; python benchmarks/record_trace.py makes some"
        raise TraceError(f"no trace {name or 'is there'}; in {FOLDER}: {listed}")
    try:
        tensors, metadata = read_safetensors(path)
        layers = json.loads(metadata["layers"])
        index = layers.index(int(number)) if number else len(layers) // 2
        return Trace(
            f"{path.stem}@{layers[index]}",
            int(metadata["num_experts"]),
            int(metadata["intermediate_size"]),
            *(tensors[part][index] for part in ("ids", "weights", "activations")),
        )
    except (KeyError, ValueError, OverflowError) as error:
        raise TraceError(f"{path} is not a trace, or has no layer {number or 'at all'} ({error!r}); give FILE@LAYER") from error


def matching_trace(num_experts: int, top_k: int) -> Trace | None:
    """The first trace of so many experts and choices, if there is one."""
    for path in find_traces():
        trace = load_trace(str(path))
        if (trace.num_experts, trace.top_k) == (num_experts, top_k):
            return trace
    return None


def check_matches(trace: Trace, num_experts: int, top_k: int) -> None:
    """Raises TraceError unless the layer has the experts and the top-k that the trace was recorded with."""
    if (trace.num_experts, trace.top_k) != (num_experts, top_k):
        raise TraceError(
            f"trace {trace.name} has {trace.num_experts} experts and top-{trace.top_k}, the layer {num_experts} and top-{top_k}; it is "
            f"replayed as it was recorded, never mapped: give --num-experts {trace.num_experts} --num-topk {trace.top_k}, or another "
            "--routing"
        )


def skew(ids: Tensor, num_experts: int) -> dict[str, float]:
    """How unevenly experts are chosen. ids: (N, K). max_over_mean: the busiest expert's entries over the mean; zipf: the exponent A of
    the power law rank**-A that fits the loads of the busier half best; unused: experts without any entry."""
    loads = torch.bincount(ids.flatten().long(), minlength=num_experts).double().sort(descending=True).values
    busy = loads[: max(2, num_experts // 2)].clamp_min(0.5)
    x, y = torch.arange(1, len(busy) + 1).double().log(), busy.log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return {
        "max_over_mean": float(loads[0] / loads.mean()),
        "zipf": float(-slope),
        "unused": float((loads == 0).sum()),
    }
