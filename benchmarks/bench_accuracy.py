"""Held-out loss of small mixture-of-experts language models, their experts in each format: python benchmarks/bench_accuracy.py

The models and the text are those of benchmarks/record_trace.py, trained here, in bfloat16 on a GPU and float32 on a CPU. What is
compared is the same trained model with its experts computed densely in float32, and by moequant; everything else stays in float32.
The loss without experts says how much they are worth. Losses are of whole windows of files that were held out. Nothing is asserted.

Letters: T tokens of a batch of windows, K top-k, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import sys
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch import Tensor, nn

# the scripts run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Bench, OneLineParser, Timing, progress
from benchmarks.record_trace import Experts, LanguageModel, MoE, Sizes, add_options, prepare, trained_models, windows
from moequant import GroupedExperts, MoEQuantDispatcher

# quant and recipe; "left out" says how much of the loss is the experts' affair
EXACT, LEFT_OUT = "dense float32", "left out"
WAYS = ((EXACT, None), (LEFT_OUT, None), ("none", None), ("fp8_e4m3fn", "default"), ("fp8_e4m3fn", "ue8m0"), ("int8", "default"))
# the model of examples/train_moe.py, which one core trains
SMALL = {"models": ["16x4"], "hidden": 256, "layers": 2, "context": 64, "batch": 8, "vocabulary": 4096}


class QuantizedExperts(nn.Module):
    """What takes the place of `Experts` in a trained model: the same weights, run by moequant."""

    def __init__(self, dense: Experts, dispatcher: MoEQuantDispatcher) -> None:
        super().__init__()
        config = dispatcher.config
        w13, w2 = (w.detach().mT.to(torch.bfloat16 if config.quant == "none" else w.dtype) for w in (dense.w13, dense.w2))
        self.dispatcher = dispatcher
        self.experts = GroupedExperts.from_weights(w13, w2, quant=config.quant, recipe=config.recipe)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x (N, H), ids and weights (N, K). Returns (N, H)."""
        return self.dispatcher(x, ids, weights, self.experts)


class NoExperts(nn.Module):
    """What takes the place of `Experts` to show what they are worth: nothing is added to the residual stream."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x (N, H). Returns zeros (N, H)."""
        return torch.zeros_like(x)


@torch.no_grad()
def evaluate(model: LanguageModel, sizes: Sizes, held_out: Tensor, batches: int) -> tuple[Tensor, Timing]:
    """The loss of each batch of windows, which are spread evenly over the text, and the time of one."""
    count, last = batches * sizes.batch, len(held_out) - sizes.context - 1
    # float64 has every place of a text exactly
    starts = torch.linspace(0, last, count, dtype=torch.float64, device=held_out.device).long()
    losses: list[float] = []
    samples: list[float] = []
    # the first once more, before the clock counts
    for number in range(-1, batches):
        tokens = windows(held_out, sizes, starts[max(0, number) * sizes.batch :][: sizes.batch])
        begin = time.perf_counter()
        # item waits for the GPU
        loss = model.losses(tokens)[0].item()
        if number >= 0:
            losses.append(loss)
            samples.append(1e6 * (time.perf_counter() - begin))
    return torch.tensor(losses, dtype=torch.float64), Timing.of(samples)


def run_way(
    model: LanguageModel, dense: list[Experts], sizes: Sizes, held_out: Tensor, batches: int, quant: str, recipe: str | None
) -> tuple[Tensor, Timing]:
    """`evaluate` with the experts in one format."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if quant in (EXACT, LEFT_OUT):
        for layer, experts in zip(layers, dense, strict=True):
            layer.experts = experts if quant == EXACT else NoExperts()
        return evaluate(model, sizes, held_out, batches)
    with MoEQuantDispatcher(
        num_experts=layers[0].num_experts,
        top_k=layers[0].top_k,
        hidden_size=sizes.hidden,
        max_tokens_per_rank=sizes.batch * sizes.context,
        quant=quant,
        recipe=recipe or "default",
        layout="ragged",
        device=held_out.device,
    ) as dispatcher:
        for layer, experts in zip(layers, dense, strict=True):
            layer.experts = QuantizedExperts(experts, dispatcher)
        return evaluate(model, sizes, held_out, batches)


def run_model(bench: Bench, name: str, model: LanguageModel, sizes: Sizes, held_out: Tensor, batches: int, steps: int) -> None:
    """Evaluates one model in all formats."""
    model.eval()
    dense = [module for module in model.modules() if isinstance(module, Experts)]
    experts, top_k = map(int, name.split("x"))
    shape = {"T": sizes.batch * sizes.context, "H": sizes.hidden, "I": sizes.intermediate, "E": experts, "K": top_k}
    exact = torch.zeros(())
    for quant, recipe in WAYS:
        way = " ".join(filter(None, (quant, recipe)))
        progress(f"evaluating {name}: {way}")
        losses, timing = run_way(model, dense, sizes, held_out, batches, quant, recipe)
        exact = losses if quant == EXACT else exact
        # both of the same windows: their difference scatters much less than either
        difference = (losses - exact) / exact.mean()
        relative, error = difference.mean().item(), difference.std().item() / batches**0.5
        bench.record(
            "accuracy",
            {**shape, "layers": sizes.layers, "quant": quant, "recipe": recipe},
            timing,
            floor_us=None,
            label=f"{name} {way}: loss {losses.mean():.4f}, {relative:+.3%} (error {error:.3%})",
            loss=float(f"{losses.mean():.6g}"),
            relative_loss=float(f"{relative:.4g}"),
            relative_loss_error=float(f"{error:.3g}"),
            tokens=batches * shape["T"],
            steps=steps,
            vocabulary=sizes.vocabulary,
            context=sizes.context,
        )


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--batches", type=int, default=64, help="of windows that are evaluated, at least 2 (default: %(default)s)")
    parser.add_argument("--output-json", type=Path, help="where records are appended (default: as for the other benchmarks)")
    if parser.parse_known_args(argv)[0].device == "cpu" or not torch.cuda.is_available():
        parser.set_defaults(**SMALL)
    options = parser.parse_args(argv)
    if options.batches < 2:
        parser.error(f"--batches must be at least 2, got {options.batches}: an error follows from several")
    sizes, text, held_out = prepare(parser, options)
    bench = Bench.start(options.output_json, device=options.device)
    for name, model, history in trained_models(options, sizes, text, held_out):
        run_model(bench, name, model, sizes, held_out, options.batches, int(history[-1]["step"]))
    progress("")


if __name__ == "__main__":
    main()
