"""Trains a small mixture-of-experts language model, its experts on the ranks that torchrun starts, in bfloat16 and in fp8.

    python examples/train_moe.py --steps 200
    torchrun --nproc-per-node 2 examples/train_moe.py --steps 200

The model and the text, the sources of Python's standard library, are those of benchmarks/record_trace.py; nothing is downloaded. In
--folder are, for each precision, the curve as a table and a checkpoint for each rank, from which the same command with more steps goes
on; and one picture of the curves, if there is matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# the script runs from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import progress
from benchmarks.record_trace import BALANCE, LanguageModel, Sizes, autocast, encode, make_vocabulary, read_documents, windows
from moequant import MoEQuantDispatcher
from moequant.nn import MoEExperts

QUANTS = {"bf16": "none", "fp8": "fp8_e4m3fn"}


def build(options: argparse.Namespace, precision: str, device: str) -> tuple[MoEQuantDispatcher, LanguageModel]:
    """The model with the experts of this rank: one dispatcher for all layers, recipe "ue8m0" for the gradients' sake."""
    sizes = sizes_of(options)
    dispatcher = MoEQuantDispatcher(
        num_experts=options.experts,
        top_k=options.top_k,
        hidden_size=sizes.hidden,
        max_tokens_per_rank=sizes.batch * sizes.context,
        quant=QUANTS[precision],
        recipe="ue8m0",
        layout="ragged",
        device=device,
    )
    torch.manual_seed(options.seed)
    model = LanguageModel(sizes, options.experts, options.top_k).to(device)
    for block in model.layers:
        # the router stays; what was there is replaced
        block.get_submodule("moe").experts = MoEExperts(dispatcher, sizes.intermediate, dtype=torch.float32)
    return dispatcher, model


def sizes_of(options: argparse.Namespace) -> Sizes:
    return Sizes(**{name: getattr(options, name) for name in Sizes.__dataclass_fields__})


def average_gradients(model: LanguageModel, ranks: int, largest: float = 1.0) -> None:
    """Makes them those of the mean of the ranks' losses, of a norm of at most 1.

    An expert's gradient has the tokens of all ranks in it already, of everything else each rank has its own tokens'.
    """
    experts, others = split(model)
    for parameter in experts + others:
        assert parameter.grad is not None
        parameter.grad /= ranks
    if ranks > 1:
        joined = torch.cat([parameter.grad.flatten() for parameter in others if parameter.grad is not None])
        dist.all_reduce(joined)
        for parameter, part in zip(others, joined.split([parameter.numel() for parameter in others]), strict=True):
            parameter.grad = part.view_as(parameter)
    of_experts = nn.utils.get_total_norm(p.grad for p in experts if p.grad is not None) ** 2
    if ranks > 1:
        dist.all_reduce(of_experts)
    norm = (of_experts + nn.utils.get_total_norm(p.grad for p in others if p.grad is not None) ** 2).sqrt()
    nn.utils.clip_grads_with_norm_(experts + others, largest, norm)


def split(model: LanguageModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The experts' parameters, and all others."""
    named = list(model.named_parameters())
    return [p for name, p in named if ".experts." in name], [p for name, p in named if ".experts." not in name]


def train(
    options: argparse.Namespace, precision: str, text: Tensor, held_out: Tensor, rank: int, ranks: int
) -> list[tuple[int, float]]:
    """Trains one model, or goes on with it. Returns the curve: steps and held-out losses."""
    device, sizes = text.device.type, sizes_of(options)
    dispatcher, model = build(options, precision, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    saved = options.folder / f"{precision}-rank{rank}-of-{ranks}.pt"
    first, curve = 0, []
    made = {**vars(sizes), "experts": options.experts, "top_k": options.top_k}
    if saved.exists():
        state = torch.load(saved, map_location=device)
        if state["sizes"] != made:
            raise ValueError(
                f"{saved} is of another model: it has {state['sizes']}, and asked for is {made}; take another --folder"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, curve = state["step"], state["curve"]
    checked = torch.arange(sizes.batch, device=device) * sizes.context % (len(held_out) - sizes.context)

    def loss_of_held_out() -> float:
        with torch.no_grad(), autocast(device):
            return model.losses(windows(held_out, sizes, checked))[0].item()

    with dispatcher:
        for step in range(first, options.steps):
            due = step % options.every == 0
            if due:
                curve.append((step, loss_of_held_out()))
            for group in optimizer.param_groups:
                # a warm-up, then half a cosine down to a tenth
                done = step / options.horizon if options.horizon else 0.0
                group["lr"] = options.lr * min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))
            # of the step and the rank alone, so that a run that goes on has the batches of one that was never stopped
            generator = torch.Generator().manual_seed(step * ranks + rank)
            starts = torch.randint(0, len(text) - sizes.context, (sizes.batch,), generator=generator, device="cpu")
            with autocast(device):
                loss, balance = model.losses(windows(text, sizes, starts.to(device)))
            (loss + BALANCE * balance).backward()
            average_gradients(model, ranks)
            optimizer.step()
            optimizer.zero_grad()
            # on a terminal one line that moves, elsewhere a line for each look
            if due or sys.stderr.isatty():
                progress(bar(precision, step + 1, options.steps, loss.item(), curve))
        curve = [point for point in curve if point[0] != options.steps] + [(options.steps, loss_of_held_out())]
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": options.steps, "curve": curve[:-1]}
    state["sizes"] = made
    torch.save(state, saved)
    return curve


def bar(name: str, step: int, steps: int, loss: float, curve: list[tuple[int, float]]) -> str:
    """A progress bar as text."""
    full = 30 * step // steps
    held_out = f", held out {curve[-1][1]:.3f}" if curve else ""
    return f"{name} [{'#' * full}{'.' * (30 - full)}] step {step} of {steps}: loss {loss:.3f}{held_out}"


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """The curves of all precisions, one picture."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"no {path}, as there is no matplotlib: pip install matplotlib; the same command again then draws it at once")
        return
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), "o-", markersize=3, label=name)
    axes.set(xlabel="step", ylabel="held-out loss, nats a token", title="Experts in bfloat16 and in fp8")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=200, help="in all, those of earlier runs included (default: 200)")
    add("--precisions", nargs="+", choices=QUANTS, default=list(QUANTS), help="(default: bf16 fp8)")
    add("--folder", type=Path, default=Path("train_moe"), help="where checkpoints, curves and the picture are (default: train_moe)")
    add("--every", type=int, default=20, help="steps between two looks at the held-out text (default: 20)")
    add("--experts", type=int, default=16, help="(default: 16)")
    add("--top-k", type=int, default=4, help="(default: 4)")
    add("--hidden", type=int, default=256, help="(default: 256)")
    add("--intermediate", type=int, default=128, help="of an expert (default: 128)")
    add("--layers", type=int, default=2, help="(default: 2)")
    add("--context", type=int, default=64, help="tokens of a window (default: 64)")
    add("--batch", type=int, default=8, help="windows of a rank and step (default: 8)")
    add("--vocabulary", type=int, default=4096, help="(default: 4096)")
    add("--lr", type=float, default=1e-3, help="(default: 0.001)")
    add("--horizon", type=int, default=0, help="steps until the learning rate is a tenth; 0: it stays (default: 0)")
    add("--seed", type=int, default=0, help="of the first weights (default: 0)")
    add(
        "--text", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="folder of sources (default: the standard library)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, list[tuple[int, float]]]:
    options = parse(argv)
    device = f"cuda:{os.environ.get('LOCAL_RANK', torch.cuda.current_device())}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    started = "RANK" in os.environ and not dist.is_initialized()
    if started:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    options.folder.mkdir(parents=True, exist_ok=True)
    documents, held_documents = read_documents(options.text)
    vocabulary = make_vocabulary(documents, options.vocabulary)
    text, held_out = (encode(part, vocabulary).to(device) for part in (documents, held_documents))
    curves: dict[str, Any] = {}
    for precision in options.precisions:
        curves[precision] = train(options, precision, text, held_out, rank, ranks)
        if rank == 0:
            (options.folder / f"{precision}.json").write_text(json.dumps(curves[precision]))
            progress("")
            print(f"{precision}: held-out loss {curves[precision][-1][1]:.3f} after {options.steps} steps on {ranks} ranks")
    if rank == 0:
        draw(curves, options.folder / "loss.svg")
    if started:
        dist.destroy_process_group()
    return curves


if __name__ == "__main__":
    main()
