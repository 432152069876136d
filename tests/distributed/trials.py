"""Random settings and inputs for transports, and their comparison with one process that has all ranks' tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moequant import MoEQuantDispatcher
from moequant.batch import ExpertBatch
from moequant.testing import assert_bit_equal, in_one_process
from moequant.transport.buffers import named

Way = Callable[[MoEQuantDispatcher, list[torch.Tensor], int], tuple[ExpertBatch, torch.Tensor]]
SHAPES = 12
# buffers that hold something from one call to the next
KEPT = ("flags", "count_words", "epochs", "arrivals", "fault")


def patience(seconds: float) -> float:
    """A time limit for waits of which one will come to nothing, the same on all ranks: on a machine as busy as this one is now, no rank
    that lives comes so late. seconds: what something took on this rank that all ranks took part in."""
    slowest = torch.tensor(seconds)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return max(2.0, 10 * float(slowest))


def install_interpreter() -> None:
    """`setup` of ranks whose kernels are interpreted: the test has the fixture `interpreted`."""
    import interpreter

    interpreter.install()


def stand_in(batch: ExpertBatch, first_expert: int = 0) -> torch.Tensor:
    """An elementwise expert, exact by construction, different for neighbouring experts."""
    values = batch.values.float()
    if batch.scales is not None:
        values = values * batch.scales.repeat_interleave(128, -1)[..., : values.shape[-1]]
    return (values * (1.0 + (first_expert + batch.experts_of_rows()) % 3)[..., None]).bfloat16()


def draw(trial: int, ranks: int, tokens: int, layout: str = "padded") -> tuple[dict[str, Any], list[list[torch.Tensor]]]:
    """Random settings, and each rank's hidden states, ids and weights; the same on every rank. tokens: a rank has fewer. In layout
    "ragged" the ranks have room for about as many rows as in "padded".

    What kernels are compiled for is drawn from SHAPES sets; everything else is new in each trial.
    """
    generator = torch.Generator().manual_seed(trial % SHAPES)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    top_k, hidden = pick(1, 7), pick(1, 300)
    dtype = (torch.bfloat16, torch.float32, torch.float16)[trial % SHAPES % 3]
    settings = {
        "top_k": top_k,
        "hidden_size": hidden,
        "quant": ("fp8_e4m3fn", "int8", "none", "fp8_e5m2")[trial % SHAPES % 4],
        "recipe": ("default", "ue8m0")[pick(0, 2)],
        "reduce": ("exact", "per_rank")[trial % SHAPES // 4 % 2],
        "on_overflow": "drop",
    }
    generator.manual_seed(1000 + trial)
    experts, most = ranks * pick(-(-top_k // ranks), 8), pick(1, tokens)
    capacity = (None, pick(1, 40))[pick(0, 2)]
    settings |= {"num_experts": experts, "max_tokens_per_rank": most, "capacity": capacity}
    if layout == "ragged":
        rank_capacity = None if capacity is None else capacity * (experts // ranks)
        settings |= {"layout": layout, "capacity": None, "rank_capacity": rank_capacity}
    hot = pick(0, 4) == 0
    inputs = []
    for _ in range(ranks):
        # some ranks have none
        mine = pick(0, most + 1) * min(1, pick(0, 4))
        scores = torch.rand(mine, experts, generator=generator)
        if hot:
            scores[:, 0] = -1.0
        ids = scores.argsort(1)[:, :top_k].contiguous()
        ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
        weights = torch.rand(mine, top_k, generator=generator)
        inputs.append([torch.randn(mine, hidden, generator=generator).to(dtype), ids, weights])
    return settings, inputs


def there_and_back(
    dispatcher: MoEQuantDispatcher, inputs: list[torch.Tensor], first_expert: int
) -> tuple[ExpertBatch, torch.Tensor]:
    """The plain way through a dispatcher: what dispatch and combine return."""
    batch, handle = dispatcher.dispatch(*inputs)
    return batch, dispatcher.combine(stand_in(batch, first_expert), handle)


def check_trial(
    rank: int,
    ranks: int,
    trial: int,
    transport: dict[str, Any],
    group: dist.ProcessGroup | None,
    device: str,
    way: Way = there_and_back,
    tokens: int = 40,
    layout: str = "padded",
) -> None:
    """One random setting through the group, compared with one process. transport: further settings. way: how, as `there_and_back`.
    tokens: of each rank there are fewer; few where kernels are interpreted. layout: of the batch."""
    settings, inputs = draw(trial, ranks, tokens, layout)
    expected, outputs, dropped = in_one_process(settings, inputs, stand_in)
    with MoEQuantDispatcher(group, **settings, **transport, device=device) as dispatcher:
        for name, buffer in named(dispatcher._slots[0].buffers).items():
            if name not in KEPT:
                buffer.view(torch.uint8).fill_(0xFF)
        # a faster rank's first rows must not be overwritten
        dist.barrier(group)
        local = settings["num_experts"] // ranks
        batch, out = way(dispatcher, [tensor.to(device) for tensor in inputs[rank]], rank * local)
        assert dispatcher.check() == dropped
    name = f"trial {trial}, {transport}, {way.__name__}, {settings}"
    assert_same_batch(rank, ranks, settings, inputs, batch, expected, name)
    assert_bit_equal(out.cpu(), outputs[rank], name)


def assert_same_batch(
    rank: int,
    ranks: int,
    settings: dict[str, Any],
    inputs: list[list[torch.Tensor]],
    batch: ExpertBatch,
    expected: ExpertBatch,
    name: str,
) -> None:
    """A rank's batch is its part of the one of all experts that `in_one_process` returns."""
    local = settings["num_experts"] // ranks
    mine = slice(rank * local, (rank + 1) * local)
    assert_bit_equal(batch.num_tokens.cpu(), expected.num_tokens[mine], name)
    if batch.expert_start is not None and expected.expert_start is not None:
        assert_bit_equal(batch.expert_start.cpu(), expected.expert_start[mine] - rank * batch.values.shape[0], name)
    starts = torch.tensor([0, *(len(hidden) for hidden, _, _ in inputs)]).cumsum(0)
    for expert in range(local):
        whole = rank * local + expert
        assert_bit_equal(batch.rows_of(batch.values, expert).cpu(), expected.rows_of(expected.values, whole), name)
        if batch.scales is not None and expected.scales is not None:
            assert_bit_equal(batch.rows_of(batch.scales, expert).cpu(), expected.rows_of(expected.scales, whole), name)
        source = batch.rows_of(batch.sources, expert).cpu()
        entry = starts[source >> 32] * settings["top_k"] + (source & 0xFFFFFFFF)
        assert_bit_equal(entry, expected.rows_of(expected.sources, whole), name)


def count_wrong(
    rank: int,
    ranks: int,
    pool: list[torch.Tensor],
    expected: torch.Tensor,
    layer: Callable[..., torch.Tensor],
    replays: int,
    late: bool,
) -> int:
    """Replays a graph that takes the next input of a pool, runs a layer on it, and counts, on the device, the numbers that differ from
    what is expected. pool: hidden states, ids and weights, stacked. late: one rank waits now and then, the same draw on every rank says
    which one and when. Returns the count."""
    size, device = len(expected), expected.device
    turn, wrong = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))

    def step() -> None:
        out = layer(*(tensor.index_select(0, turn % size)[0] for tensor in pool))
        wrong.add_((out.view(torch.int16) != expected.index_select(0, turn % size)[0].view(torch.int16)).sum())
        turn.add_(1)

    step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    sleeper = random.Random(7)
    for _ in range(replays):
        who, cycles = sleeper.randrange(ranks), sleeper.randrange(400_000)
        if late and who == rank:
            torch.cuda._sleep(cycles)
        graph.replay()
    torch.cuda.synchronize()
    assert int(turn) == replays + 1
    return int(wrong)
