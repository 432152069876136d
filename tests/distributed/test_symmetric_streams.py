"""Two dispatches in flight on two streams, begun by the GPUs of half of the ranks in the other order.

While one waits for the other ranks, the launches of the other one have to find room beside it: otherwise rank 0 holds its multiprocessors
for what rank 1 has not begun, and the reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from trials import stand_in

from moequant import MoEQuantDispatcher, ops
from moequant.batch import empty_transposed_scales
from moequant.testing import assert_bit_equal, run_ranks

EXPERTS, TOP_K, HIDDEN = 256, 8, 7168
BACKEND = "cpu:gloo,cuda:nccl"
# of a GPU's clock: some 25 ms, in which whatever is not held back has begun
LATER = 50_000_000
ROUNDS = 5
pytestmark = pytest.mark.multigpu


def tokens_of(rank: int, slot: int, tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2 * rank + slot)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K].contiguous()
    x, weights = torch.randn(tokens, HIDDEN, generator=generator).bfloat16(), torch.rand(tokens, TOP_K, generator=generator)
    return [x.to(f"cuda:{rank}"), ids.to(f"cuda:{rank}"), weights.to(f"cuda:{rank}")]


def product_on(device: str) -> Callable[[], None]:
    """A product in the way of a layer. Where it is one of Hopper's kernels, each of its programs takes a multiprocessor."""
    rows, columns, depth = 1024, 4096, 1024
    a, b = (torch.zeros(4, size, depth, dtype=torch.float8_e4m3fn, device=device) for size in (rows, columns))
    a_scales = empty_transposed_scales(4, rows, depth // 128, device)
    b_scales = torch.ones(4, columns // 128, depth // 128, device=device)
    out = torch.empty(4, rows, columns, dtype=torch.bfloat16, device=device)
    return lambda: ops.grouped_gemm_blockscale(a, a_scales.fill_(1.0), b, b_scales, None, None, out)


def run_streams(
    rank: int, ranks: int, tokens: int, two_dispatchers: bool, mirrored: bool, products: bool, layout: str = "padded"
) -> None:
    """Layers in two slots, or of two dispatchers, on a stream each. On odd ranks (mirrored: on even ones) the first one begins later, on
    the others the second one; the host's order is the same everywhere. products: before each dispatch and each combine."""
    settings: dict[str, Any] = {
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "hidden_size": HIDDEN,
        "max_tokens_per_rank": tokens,
        "transport": "symmetric",
        "timeout": 10.0,
        "layout": layout,
    }
    if two_dispatchers:
        dispatchers = [MoEQuantDispatcher(**settings) for _ in range(2)]
        places = [(dispatcher, 0) for dispatcher in dispatchers]
    else:
        dispatchers = [MoEQuantDispatcher(**settings, slots=2)]
        places = [(dispatchers[0], slot) for slot in range(2)]
    first = EXPERTS // ranks * rank
    inputs = [tokens_of(rank, place, tokens) for place in range(2)]
    product = product_on(f"cuda:{rank}") if products else lambda: None

    def layer(place: int) -> torch.Tensor:
        dispatcher, slot = places[place]
        product()
        batch, handle = dispatcher.dispatch(*inputs[place], slot=slot)
        product()
        return dispatcher.combine(stand_in(batch, first), handle)

    # one after the other, on the same streams: later nothing is loaded or allocated anew, which could wait for the device
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    quiet = []
    for place, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            layer(place)
            quiet.append(layer(place))
        torch.cuda.synchronize()
    late = (rank + mirrored + 1) % 2
    for _ in range(ROUNDS):
        # every rank's GPU begins now
        torch.cuda.synchronize()
        dist.barrier()
        outputs = []
        for place, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if place == late:
                    torch.cuda._sleep(LATER)
                outputs.append(layer(place))
        torch.cuda.synchronize()
        for dispatcher in dispatchers:
            assert dispatcher.check() == 0
        for output, expected in zip(outputs, quiet, strict=True):
            assert_bit_equal(output, expected)
    for dispatcher in dispatchers:
        dispatcher.close()


ORDERS = pytest.mark.parametrize("mirrored", [False, True], ids=["odd-ranks-later", "even-ranks-later"])


@pytest.mark.parametrize("ranks", [2, 4, 8])
@ORDERS
@pytest.mark.parametrize("two_dispatchers", [False, True], ids=["slots", "dispatchers"])
@pytest.mark.parametrize(
    ("tokens", "layout"), [(128, "padded"), (192, "padded"), (256, "padded"), (128, "ragged"), (256, "ragged")]
)
def test_two_dispatches_on_two_streams_go_through_in_both_orders(tokens, layout, two_dispatchers, mirrored, ranks):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    run_ranks(run_streams, ranks, tokens, two_dispatchers, mirrored, False, layout, backend=BACKEND, timeout=120)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@ORDERS
@pytest.mark.parametrize("tokens", [16, 64, 128])
def test_products_that_take_whole_multiprocessors_run_beside_a_dispatch_that_waits(tokens, mirrored, ranks):
    """So many tokens are most programs of `push_tokens` that may begin early."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    run_ranks(run_streams, ranks, tokens, False, mirrored, True, backend=BACKEND, timeout=120)
