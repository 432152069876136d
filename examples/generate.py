# pyright: reportMissingImports=false, reportMissingModuleSource=false
"""Generates with a model of transformers, its experts as transformers has them and on moequant, and says what came of it in one table.

    python examples/generate.py [FOLDER]
    torchrun --nproc-per-node 2 examples/generate.py [FOLDER]

FOLDER is a model on this machine; without one a tiny model with random weights is taken. With torchrun the experts are split over the
ranks. Needs `pip install '.[transformers]'` in a checkout of moequant.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.generation.streamers import BaseStreamer

from moequant.integrations.transformers import MoEQuantConfig

# an implementation of experts, and in what they are quantized while they are loaded
WAYS = ("grouped_mm", "moequant", "moequant:fp8_e4m3fn", "moequant:int8")


class Progress(BaseStreamer):
    """A progress bar of one generation; generate hands it the prompt first, then each step's tokens."""

    def __init__(self, steps: int, title: str, hidden: bool) -> None:
        self.bar = tqdm(total=steps, desc=title, unit="step", disable=hidden)
        self.started: float | None = None

    def put(self, value: Tensor) -> None:
        if self.started is None:
            self.started = time.perf_counter()
        else:
            self.bar.update()

    def end(self) -> None:
        self.bar.close()


class LayerTimes:
    """How long the experts of a model take: marks before and behind each call, read at the end."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.device, self.marks = device, []
        for module in model.modules():
            if hasattr(module, "has_post_expert_norm"):
                module.register_forward_pre_hook(lambda *_: self.mark())
                module.register_forward_hook(lambda *_: self.mark())

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def median_us(self) -> float:
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            spans = [1000 * before.elapsed_time(after) for before, after in pairs]
        else:
            spans = [1e6 * (after - before) for before, after in pairs]
        return float(torch.tensor(spans, device="cpu").median())


def tiny(folder: str) -> str:
    """Writes a model with random weights. Of several ranks the first does, and its folder is all ranks'."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    }
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 256,
        "intermediate_size": 128,
    }
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **heads), dtype=torch.bfloat16).save_pretrained(folder)
    shared = [folder]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    return shared[0]


def load(folder: str, way: str, device: torch.device) -> Any:
    """A model with its experts in one of WAYS, split over the ranks if there are several."""
    implementation, _, quant = way.partition(":")
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "experts_implementation": implementation}
    if quant:
        settings["quantization_config"] = MoEQuantConfig(quant)
    if not dist.is_initialized():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **settings)
        return model.to(device).eval()
    ranks, parallel = dist.get_world_size(), "moequant" if implementation == "moequant" else "auto"
    layout = DistributedConfig(tp_size=ranks, ep_size=ranks, ep_implementation=parallel)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=layout, **settings).eval()


def measure(make: Callable[[], Any], ids: Tensor, steps: int, title: str) -> tuple[list[str], Tensor]:
    """A row of the table, and the tokens."""
    device, first = ids.device, not dist.is_initialized() or dist.get_rank() == 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = make()
    settings: dict[str, Any] = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
    # kernels compile in the first steps
    model.generate(ids, **settings | {"max_new_tokens": 2, "min_new_tokens": 2})
    layers, progress = LayerTimes(model, device), Progress(steps, title, hidden=not first)
    tokens = model.generate(ids, **settings, streamer=progress)[:, ids.shape[1] :]
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert progress.started is not None
    rate = tokens.numel() / (time.perf_counter() - progress.started)
    taken = torch.cuda.max_memory_allocated() if device.type == "cuda" else sum(p.nbytes for p in model.parameters())
    return [title, f"{rate:.1f}", f"{layers.median_us():.0f}", f"{taken / 2**30:.3f}"], tokens.cpu()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", help="a model of transformers on this machine")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS[:3])
    parser.add_argument("--prompt", default="The experts of a mixture are")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    given = parser.parse_args(arguments)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or tiny(scratch)
        tokenizer = AutoTokenizer.from_pretrained(folder) if list(Path(folder).glob("tokenizer*")) else None
        vocabulary = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
        prompt = tokenizer(given.prompt).input_ids if tokenizer else [ord(letter) % vocabulary for letter in given.prompt]
        ids = torch.tensor([prompt] * given.batch, device=device)
        rows: list[list[str]] = []
        tokens = ids
        for way in given.ways:
            row, tokens = measure(lambda way=way: load(folder, way, device), ids, given.new_tokens, way)
            rows.append(row)
            gc.collect()
        if not dist.is_initialized() or dist.get_rank() == 0:
            memory = "memory, GiB" if device.type == "cuda" else "weights, GiB"
            print("\n| experts | tokens/s | experts of a layer, us | " + memory + " |\n| --- | --- | --- | --- |")
            print(*(f"| {' | '.join(row)} |" for row in rows), sep="\n")
            print(tokenizer.decode(tokens[0]) if tokenizer else tokens[0].tolist())


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
