"""Times whole layers of several models, numbers of tokens and ways to exchange, in one run: what the tables of layers is made of.

    torchrun --nproc-per-node 8 benchmarks/bench_layers.py
    torchrun --nproc-per-node 8 benchmarks/bench_layers.py --models deepseek-v3 --num-tokens 128 --ways symmetric --skew

Options that are not listed here are launch/bench_ep.py's, which checks and times each case. All steps are timed for `symmetric`; for the
exchanges of `collective` the layer, dispatch and combine. Where a buffer for every row would be large, it has room for twice the mean
number of rows of an expert, at least 2048.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

import torch

# the script runs from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import OneLineParser, process_group
from benchmarks.ep_layer import EXCHANGE
from benchmarks.ep_options import EMPTY_RANKS, SKEWS, parse_options
from launch.bench_ep import Run
from moequant.models import MODELS, model_shape

WAYS = {
    "symmetric": ["--transport", "symmetric"],
    "per_rank": ["--transport", "symmetric", "--reduce", "per_rank"],
    "apart": ["--transport", "symmetric", "--overlap", "off"],
    "packed": ["--transport", "collective", "--exchange", "packed"],
    "padded": ["--transport", "collective", "--exchange", "padded"],
}
CAPACITY = 2048


def make_parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    models, tokens = ["deepseek-v3", "v4-flash", "qwen3-235b", "glm-4.7"], [1, 8, 32, 128, 512, 4096]
    add("--models", nargs="+", choices=sorted(MODELS), default=models, metavar="NAME", help=f"(default: {' '.join(models)})")
    add("--num-tokens", type=int, nargs="+", default=tokens, metavar="T", help=f"of each rank (default: {tokens})")
    add("--ways", nargs="+", choices=WAYS, default=["symmetric", "packed", "padded"], help="(default: symmetric packed padded)")
    return parser


def main(argv: list[str] | None = None) -> int:
    options, rest = make_parser().parse_known_args(argv)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    run = None
    with process_group("cuda") as (rank, device), torch.no_grad():
        for model in options.models:
            for tokens in options.num_tokens:
                for way in options.ways:
                    case = ["--model", model, "--num-tokens", str(tokens), *WAYS[way], *rest]
                    if tokens * ranks > CAPACITY and "--capacity" not in rest:
                        shape = model_shape(model)
                        # of 8 ranks' experts, as launch/bench_ep.py shares them out
                        mean = tokens * max(ranks, 8) * shape.top_k // shape.num_experts
                        case += ["--capacity", str(max(CAPACITY, 2 * mean))]
                    settings = parse_options(case, ranks, __doc__)
                    if run is None:
                        run = Run(settings, rank, device)
                    run.options = settings
                    layer = run.make_layer()
                    steps = EXCHANGE if way in ("packed", "padded") else None
                    run.run_case(layer, settings.routing, steps, run.find_peers(layer) if settings.peers else None)
                    for kind in SKEWS if settings.skew else ():
                        if kind != EMPTY_RANKS or ranks > 1:
                            run.run_case(layer, kind, EXCHANGE)
                    layer.dispatcher.close()
                    del layer
                    gc.collect()
                    torch.cuda.empty_cache()
    return 0 if run is None or run.passed else 1


if __name__ == "__main__":
    sys.exit(main())
