"""Loss curves of a mixture-of-experts language model whose experts are trained by torch's own operations in bfloat16, by moequant in
bfloat16, and by moequant in fp8: python benchmarks/bench_loss.py [--steps 1000] [--seeds 0 1 2]

The model and the text are those of benchmarks/record_trace.py. For a seed all ways start with the same weights and see the same batches;
how far apart the seeds' final losses are says what a difference between the ways is worth. Nothing is asserted.

Letters: T tokens of a step, K top-k, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# the scripts run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_accuracy import SMALL, evaluate
from benchmarks.common import Bench, OneLineParser, Timing, progress
from benchmarks.record_trace import Experts, LanguageModel, MoE, Sizes, add_options, autocast, prepare, train
from benchmarks.torch_experts import torch_layer
from moequant import MoEQuantDispatcher
from moequant.nn import MoEExperts

# who multiplies: quant of moequant, or torch
WAYS: dict[str, str | None] = {"torch bfloat16": None, "moequant bfloat16": "none", "moequant fp8": "fp8_e4m3fn"}
STEPS, BATCHES = 1000, 32


class TorchExperts(nn.Module):
    """`MoEExperts` by torch's own operations: parameters in float32, products in bfloat16."""

    def __init__(self, w13: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.w13, self.w2 = nn.Parameter(w13), nn.Parameter(w2)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x (N, H), ids and weights (N, K). Returns (N, H)."""
        return torch_layer(x.bfloat16(), ids, weights, self.w13.bfloat16(), self.w2.bfloat16()).to(x.dtype)


def make_model(sizes: Sizes, name: str, seed: int, device: torch.device, dispatcher: MoEQuantDispatcher | None) -> LanguageModel:
    """The model of a seed, its experts by torch, or of a dispatcher."""
    torch.manual_seed(seed)
    model = LanguageModel(sizes, *map(int, name.split("x"))).to(device)
    for layer in (module for module in model.modules() if isinstance(module, MoE)):
        assert isinstance(layer.experts, Experts)
        w13, w2 = (w.detach().mT.contiguous() for w in (layer.experts.w13, layer.experts.w2))
        if dispatcher is None:
            layer.experts = TorchExperts(w13, w2)
            continue
        experts = layer.experts = MoEExperts(dispatcher, sizes.intermediate, dtype=torch.float32)
        with torch.no_grad():
            experts.w13.copy_(w13)
            experts.w2.copy_(w2)
    return model


def run(bench: Bench, options: Namespace, sizes: Sizes, text: Tensor, held_out: Tensor, name: str, way: str, seed: int) -> float:
    """Trains one model, records its curve, and returns its loss at the end, of all windows."""
    experts, top_k = map(int, name.split("x"))
    tokens, quant = sizes.batch * sizes.context, WAYS[way]
    settings: dict[str, Any] = {"num_experts": experts, "top_k": top_k, "hidden_size": sizes.hidden, "max_tokens_per_rank": tokens}
    settings |= {"quant": quant, "recipe": "ue8m0", "layout": "ragged", "device": text.device}
    with nullcontext() if quant is None else MoEQuantDispatcher(**settings) as dispatcher:
        model = make_model(sizes, name, seed, text.device, dispatcher)
        progress(f"training {name}: {way}, seed {seed}")
        begin = time.perf_counter()
        history = train(model, sizes, text, held_out, 0.0, options.steps, seed)
        step = Timing.of([1e6 * (time.perf_counter() - begin) / options.steps])
        model.eval()
        with torch.no_grad(), autocast(text.device.type):
            losses, _ = evaluate(model, sizes, held_out, options.batches)
    loss = losses.mean().item()
    case = {"T": tokens, "H": sizes.hidden, "I": sizes.intermediate, "E": experts, "K": top_k, "layers": sizes.layers}
    curve = [[int(point["step"]), float(f"{point['held_out']:.5g}")] for point in history]
    label = f"{name} {way}, seed {seed}, {options.steps} steps: loss {loss:.4f}"
    more = {"loss": float(f"{loss:.6g}"), "curve": curve, "tokens": options.batches * tokens, "vocabulary": sizes.vocabulary}
    named = {"way": way, "steps": options.steps, "seed": seed}
    bench.record("training_loss", case | named, step, floor_us=None, label=label, **more)
    return loss


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Returns each way's losses, seed by seed."""
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_options(parser)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=(0, 1, 2), help="of weights and batches (default: 0 1 2)")
    add("--ways", nargs="+", choices=tuple(WAYS), default=tuple(WAYS), help="(default: all)")
    add("--batches", type=int, default=BATCHES, help=f"of windows that the last loss is of, at least 2 (default: {BATCHES})")
    add("--output-json", type=Path, help="where records are appended (default: as for the other benchmarks)")
    parser.set_defaults(steps=STEPS, models=["256x8"])
    if parser.parse_known_args(argv)[0].device == "cpu" or not torch.cuda.is_available():
        parser.set_defaults(**SMALL)
    options = parser.parse_args(argv)
    sizes, text, held_out = prepare(parser, options)
    bench = Bench.start(options.output_json, device=options.device)
    losses: dict[str, list[float]] = {}
    for name in options.models:
        for seed in options.seeds:
            for way in options.ways:
                loss = run(bench, options, sizes, text, held_out, name, way, seed)
                losses.setdefault(f"{name} {way}", []).append(loss)
    progress("")
    for way, of_seeds in losses.items():
        print(f"{way}: {sum(of_seeds) / len(of_seeds):.4f}, seeds from {min(of_seeds):.4f} to {max(of_seeds):.4f}")
    return losses


if __name__ == "__main__":
    main()
