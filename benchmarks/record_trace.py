"""Trains small mixture-of-experts language models and records how they route: python benchmarks/record_trace.py [--minutes 5]

The text is the sources of Python's standard library, which every Python carries. One file in 16 is held out; its documents, in order,
are what activations, ids and weights are recorded of, into benchmarks/traces/*.safetensors, with a README.md of how they were made.
One GPU, nothing to download. Letters: N tokens of a batch, K top-k, E experts, C rows of an expert in training, H hidden size,
I intermediate size of an expert, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import sys
import sysconfig
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# the scripts run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import commit, progress
from benchmarks.traces import FOLDER, skew
from moequant.testing import record_routing
from moequant.testing.recording import read_safetensors

HELD_OUT = 16
BALANCE = 0.01
# in training an expert takes so many times the mean number of rows, and drops the others; for the record it takes all
ROOM = 2.0
PIECES = re.compile(r"\n *| ?\w+| ?[^\w\s]+|\s")


@dataclass(frozen=True)
class Sizes:
    """Of a model and its training, without the experts."""

    hidden: int
    intermediate: int
    layers: int
    context: int
    batch: int
    vocabulary: int


class Experts(nn.Module):
    """E SwiGLU experts on buffers of C rows each: fixed sizes, so that a GPU never waits for the host."""

    def __init__(self, sizes: Sizes, experts: int) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.randn(experts, sizes.hidden, 2 * sizes.intermediate) * sizes.hidden**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, sizes.intermediate, sizes.hidden) * sizes.intermediate**-0.5)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x (N, H), ids and weights (N, K). Returns (N, H)."""
        experts, top_k = len(self.w13), ids.shape[1]
        room = math.ceil(ROOM * ids.numel() / experts) if self.training else len(x)
        entries = ids.flatten().argsort(stable=True)
        owners, tokens = ids.flatten()[entries], entries // top_k
        counts = torch.zeros(experts, dtype=torch.long, device=x.device).scatter_add_(0, owners, torch.ones_like(owners))
        place = torch.arange(len(entries), device=x.device) - (counts.cumsum(0) - counts)[owners]
        fits = place < room
        # the rows that don't fit share one behind the buffers
        rows = torch.where(fits, owners * room + place, experts * room)
        buffer = x.new_zeros(experts * room + 1, x.shape[1]).index_copy(0, rows, x[tokens])
        gate, up = torch.bmm(buffer[:-1].view(experts, room, -1), self.w13).chunk(2, -1)
        output = torch.bmm(F.silu(gate) * up, self.w2).flatten(0, 1)
        weighted = F.pad(output, (0, 0, 0, 1))[rows] * (weights.flatten()[entries] * fits).unsqueeze(1).to(output.dtype)
        return torch.zeros_like(x).index_add(0, tokens, weighted.to(x.dtype))


class MoE(nn.Module):
    def __init__(self, sizes: Sizes, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k, self.num_experts = top_k, experts
        self.gate = nn.Linear(sizes.hidden, experts, bias=False)
        # others may take their place
        self.experts: nn.Module = Experts(sizes, experts)
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        # in float32, as it is usual: scores in bfloat16 have ties
        with torch.autocast(x.device.type, enabled=False):
            probabilities = self.gate(tokens.float()).softmax(-1)
        weights, ids = probabilities.topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        # the usual loss: E * sum over experts of (share of the entries) * (mean probability), 1 when balanced
        chosen = torch.zeros_like(probabilities).scatter_(1, ids, 1.0).mean(0) / self.top_k
        self.balance = self.num_experts * (chosen * probabilities.mean(0)).sum()
        narrow = torch.is_autocast_enabled(x.device.type)
        return self.experts(tokens.bfloat16() if narrow else tokens, ids, weights).view(x.shape)


class Block(nn.Module):
    def __init__(self, sizes: Sizes, experts: int, top_k: int) -> None:
        super().__init__()
        self.heads = max(1, sizes.hidden // 64)
        self.norm1, self.norm2 = nn.RMSNorm(sizes.hidden), nn.RMSNorm(sizes.hidden)
        self.qkv = nn.Linear(sizes.hidden, 3 * sizes.hidden, bias=False)
        self.project = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.moe = MoE(sizes, experts, top_k)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.moe(self.norm2(x))


class LanguageModel(nn.Module):
    def __init__(self, sizes: Sizes, experts: int, top_k: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.position = nn.Parameter(torch.randn(sizes.context, sizes.hidden) * 0.02)
        self.layers = nn.ModuleList(Block(sizes, experts, top_k) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, S). Returns logits (B, S, V)."""
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) @ self.embedding.weight.T

    def losses(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, S + 1). Returns the cross entropy of the next token, and the layers' mean balance loss."""
        logits = self(tokens[:, :-1])
        balance = torch.stack([module.balance for module in self.modules() if isinstance(module, MoE)]).mean()
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()), balance


def read_documents(folder: Path) -> tuple[list[str], list[str]]:
    """The sources below a folder, tests and installed packages apart, by name: for training, and held out."""
    parts: tuple[list[str], list[str]] = ([], [])
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if not re.search(r"(^|/)(site-packages|dist-packages|tests?)/", name):
            # by name, so that every Python version holds out the same files
            parts[zlib.crc32(name.encode()) % HELD_OUT == 0].append(path.read_text(errors="replace"))
    return parts


def make_vocabulary(documents: list[str], size: int) -> dict[str, int]:
    """The most frequent pieces of text, behind the 256 bytes of which everything else is made."""
    counts = Counter(piece for document in documents for piece in PIECES.findall(document))
    # ties by name: the same vocabulary on every run
    chosen = sorted(counts, key=lambda piece: (-counts[piece], piece))[: size - 256]
    return {piece: 256 + index for index, piece in enumerate(chosen)}


def encode(documents: list[str], vocabulary: dict[str, int]) -> Tensor:
    """All documents joined, as int64 tokens."""
    tokens: list[int] = []
    for document in documents:
        for piece in PIECES.findall(document):
            number = vocabulary.get(piece)
            tokens.extend(piece.encode() if number is None else (number,))
    return torch.tensor(tokens)


def windows(tokens: Tensor, sizes: Sizes, starts: Tensor) -> Tensor:
    """(B, S + 1) pieces of a text."""
    return tokens[starts.unsqueeze(1) + torch.arange(sizes.context + 1, device=tokens.device)]


def autocast(device: str) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def train(
    model: LanguageModel, sizes: Sizes, text: Tensor, held_out: Tensor, seconds: float, steps: int | None, seed: int = 0
) -> list[dict[str, float]]:
    """Trains for so many seconds, or steps if these are given, on batches of a seed. Returns the loss curve."""
    device = text.device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda")
    generator = torch.Generator(device).manual_seed(seed)
    checked = torch.arange(sizes.batch, device=device) * sizes.context % (len(held_out) - sizes.context)
    history: list[dict[str, float]] = []
    begin, step, done = time.monotonic(), 0, 0.0
    while True:
        elapsed = time.monotonic() - begin
        done = step / steps if steps is not None else elapsed / seconds
        every = max(1, steps // 10) if steps is not None else None
        due = step % every == 0 if every else elapsed >= len(history) * seconds / 12
        if due or done >= 1:
            with torch.no_grad(), autocast(device):
                loss, balance = model.losses(windows(held_out, sizes, checked))
            history.append({"step": step, "seconds": round(elapsed, 1), "held_out": loss.item(), "balance": balance.item()})
            progress(f"step {step}, {elapsed:.0f} s: held-out loss {loss.item():.3f}, balance {balance.item():.3f}")
        if done >= 1:
            return history
        for group in optimizer.param_groups:
            # a warm-up, then half a cosine down to a tenth
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))
        starts = torch.randint(0, len(text) - sizes.context, (sizes.batch,), generator=generator, device=device)
        with autocast(device):
            loss, balance = model.losses(windows(text, sizes, starts))
        (loss + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1


def record(
    model: LanguageModel, sizes: Sizes, held_out: Tensor, path: Path, keep: int, activations: int, history: list[dict[str, float]]
) -> None:
    """Runs the held-out text through the model, window after window, and writes the trace of every second layer."""
    model.eval()
    keep = min(keep, (len(held_out) - 1) // sizes.context * sizes.context)
    with record_routing(model, max_tokens=keep) as recording, torch.no_grad(), autocast(held_out.device.type):
        for first in range(0, keep, sizes.context):
            model(held_out[None, first : first + sizes.context])
    made = f"{commit()}, torch {torch.__version__}, Python {platform.python_version()}"
    if held_out.device.type == "cuda":
        made += f", {torch.cuda.get_device_name()}"
    recording.save(
        path,
        intermediate_size=sizes.intermediate,
        layers=list(recording.layers)[1::2],
        activations=activations,
        history=json.dumps(history),
        made=made,
    )


def describe(folder: Path) -> str:
    """README.md: how the traces of a folder were made, and what they are like."""
    lines = [
        "# Recorded routing",
        "",
        "Written by `python benchmarks/record_trace.py`. Each file is of a language model of its own: decoder layers of attention and a "
        f"mixture of SwiGLU experts (softmax over all experts, the K largest, normalised), trained with the usual load-balancing loss "
        f"(weight {BALANCE}) on the sources of Python's standard library, cut into words and signs, rare ones into bytes. One file in "
        f"{HELD_OUT} was held out; of these, in order, are the recorded tokens: ids and weights as the routers gave them, nothing "
        "dropped, and for the first of them the activations that the routers saw. `launch/bench_ep.py --routing trace:FILE@LAYER` "
        "replays them, in this order.",
        "",
        "| file | layer | experts | top-k | hidden | tokens | activations | busiest / mean | power law | unused experts |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    curves = []
    for path in sorted(folder.glob("*.safetensors")):
        tensors, metadata = read_safetensors(path)
        experts = int(metadata["num_experts"])
        for number, ids, kept in zip(json.loads(metadata["layers"]), tensors["ids"], tensors["activations"], strict=True):
            uneven = skew(ids, experts)
            cells = [path.stem, number, experts, ids.shape[1], kept.shape[1], len(ids), len(kept)]
            cells += [f"{uneven['max_over_mean']:.2f}", f"{uneven['zipf']:.2f}", int(uneven["unused"])]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        if "history" in metadata:
            curves += ["", f"## {path.stem}", "", f"Made by {metadata.get('made', 'an unknown run')}.", ""]
            curves += ["| step | seconds | held-out loss, nats a token | balance loss |", "| --- | --- | --- | --- |"]
            for point in json.loads(metadata["history"]):
                curves.append(f"| {point['step']} | {point['seconds']} | {point['held_out']:.3f} | {point['balance']:.3f} |")
    lines += [
        "",
        '"Busiest / mean" is the busiest expert\'s entries over the mean; "power law" the exponent A of rank**-A that fits the loads of '
        "the busier half best (`--routing zipf:A` makes such loads); a balance loss of 1 is perfect balance within a batch.",
    ]
    return "\n".join(lines + curves) + "\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What says which models are trained, on what, and how long."""
    add = parser.add_argument
    add("--minutes", type=float, default=5.0, help="of training, all models together (default: %(default)s)")
    add("--steps", type=int, help="of training of each model, instead of minutes")
    add("--models", nargs="+", default=["128x8", "256x8"], metavar="ExK", help="experts and top-k (default: %(default)s)")
    add("--hidden", type=int, default=512, help="(default: %(default)s)")
    add("--intermediate", type=int, default=128, help="of an expert (default: %(default)s)")
    add("--layers", type=int, default=6, help="(default: %(default)s)")
    add("--context", type=int, default=512, help="tokens of a window (default: %(default)s)")
    add("--batch", type=int, default=32, help="windows of a step (default: %(default)s)")
    add("--vocabulary", type=int, default=16384, help="(default: %(default)s)")
    add(
        "--text", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="folder of sources (default: the standard library)"
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: %(default)s)")


def prepare(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[Sizes, Tensor, Tensor]:
    """The models' sizes, and on the device the text to train on and the one held out."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    sizes = Sizes(**{name: getattr(options, name) for name in Sizes.__dataclass_fields__})
    progress(f"reading {options.text}")
    documents, held_documents = read_documents(options.text)
    vocabulary = make_vocabulary(documents, sizes.vocabulary)
    text, held_out = (encode(part, vocabulary).to(device) for part in (documents, held_documents))
    if min(len(text), len(held_out)) < 2 * sizes.context:
        parser.error(
            f"{options.text} has {len(text)} tokens to train on and {len(held_out)} held out: too few for {sizes.context} a window"
        )
    progress(f"{len(documents)} files with {len(text)} tokens, {len(held_documents)} held out with {len(held_out)}")
    return sizes, text, held_out


def trained_models(
    options: argparse.Namespace, sizes: Sizes, text: Tensor, held_out: Tensor
) -> Iterator[tuple[str, LanguageModel, list[dict[str, float]]]]:
    """Each model's name, the model, and its loss curve."""
    for name in options.models:
        experts, top_k = map(int, name.split("x"))
        torch.manual_seed(0)
        model = LanguageModel(sizes, experts, top_k).to(text.device)
        progress(f"training {name}")
        yield name, model, train(model, sizes, text, held_out, 60 * options.minutes / len(options.models), options.steps)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    add = parser.add_argument
    add("--keep", type=int, default=16384, help="tokens whose routing is recorded, of every second layer (default: 16384)")
    add("--activations", type=int, default=768, help="tokens whose activations are recorded (default: 768)")
    add("--output", type=Path, default=FOLDER, help="where the traces go (default: benchmarks/traces)")
    options = parser.parse_args(argv)
    sizes, text, held_out = prepare(parser, options)
    for name, model, history in trained_models(options, sizes, text, held_out):
        record(model, sizes, held_out, options.output / f"lm-{name}.safetensors", options.keep, options.activations, history)
    (options.output / "README.md").write_text(describe(options.output))
    for path in sorted(options.output.glob("*.safetensors")):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
