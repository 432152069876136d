"""The settings of a dispatcher, validated once, and the sizes that follow from them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields

import torch

from moequant.batch import ceil_div
from moequant.checks import MAX_INT, check_seconds
from moequant.formats import FORMATS, recipe_of

# what is not quantized, and the types of all
PLAIN_DTYPES = {"none": torch.bfloat16, "float16": torch.float16}
QUANT_DTYPES = {**PLAIN_DTYPES, **{name: fmt.dtype for name, fmt in FORMATS.items()}}
CHOICES = {
    "quant": tuple(QUANT_DTYPES),
    "transport": ("auto", "local", "collective", "symmetric"),
    "exchange": ("auto", "padded", "packed"),
    "on_overflow": ("error", "drop"),
    "on_invalid_id": ("error", "absent"),
    "reduce": ("exact", "per_rank"),
    "layout": ("padded", "ragged", "auto"),
}
# The most tokens of a rank for which layout "auto" is padded: few rows need little memory, and padded ones no launch that finds where
# they start, 3 us of 26 in the smallest layer of benchmarks/results/nvidia-h200.jsonl and nothing that shows in the others.
PADDED_TOKENS = 256
POSITIVE = ("num_experts", "top_k", "hidden_size", "max_tokens_per_rank", "world_size", "slots", "num_sms")

# Experts' rows begin at multiples of it, and buffers end at one. TMA wants scales 16 bytes aligned, which is 4 rows; more than 16 would
# only waste rows: a tile that reaches past its expert's rows reads the next one's, and stores none of them.
ROW_ALIGNMENT = 16


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not less than a value.

    Args:
        value: an integer.
        multiple: a positive one.

    Returns:
        That multiple.
    """
    return ceil_div(value, multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class DispatcherConfig:
    """Settings of a MoEQuantDispatcher, the same on all ranks. `MoEQuantDispatcher` says what each means.

    Attributes:
        num_experts: E.
        top_k: K.
        hidden_size: H.
        max_tokens_per_rank: the largest T.
        world_size: W.
        quant: a key of QUANT_DTYPES.
        transport: "auto", "local", "collective" or "symmetric".
        exchange: of `collective`: "auto", "padded" or "packed".
        layout: "padded" or "ragged"; "auto" becomes one of them.
        capacity: rows of an expert's buffer, or None for all that can come. With "padded" alone.
        rank_capacity: rows of a rank's buffer, an int, or, a float, how many times those that come on average, or None for all that can
            come. With "ragged" alone.
        on_overflow: "error" or "drop".
        on_invalid_id: "error" or "absent".
        reduce: "exact" or "per_rank".
        recipe: a key of `moequant.formats.RECIPES`.
        slots: sets of buffers, 1 or 2.
        shared_batch: whether all ranks hold the same tokens.
        overlap: whether the second GEMM stores its rows at the tokens' ranks.
        num_sms: SMs (multiprocessors) that GEMMs leave to an exchange beside them.
        timeout: seconds, from 0.001 to 1e6.
        first_timeout: the same, until the first check; None: timeout.
        batch_invariant: whether a token's output is the same to the bit whoever else is there.

    Raises:
        ValueError: a setting is wrong; it says what was given and what was expected.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    max_tokens_per_rank: int
    world_size: int = 1
    quant: str = "fp8_e4m3fn"
    transport: str = "auto"
    exchange: str = "auto"
    layout: str = "padded"
    capacity: int | None = None
    rank_capacity: int | float | None = None
    on_overflow: str = "error"
    on_invalid_id: str = "error"
    reduce: str = "exact"
    recipe: str = "default"
    slots: int = 1
    shared_batch: bool = False
    overlap: bool = True
    num_sms: int = 8
    timeout: float = 60.0
    first_timeout: float | None = None
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_INT:
                raise ValueError(f"{name} must be a positive integer, got {value!r}; sizes are int32: below 2**31")
        for name, choices in CHOICES.items():
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        recipe_of(self.recipe)
        if self.num_experts % self.world_size:
            raise ValueError(
                f"num_experts must be a multiple of the number of ranks, got {self.num_experts} experts on {self.world_size} ranks; "
                "add experts that no token is routed to, or use another group"
            )
        for name in ("overlap", "shared_batch", "batch_invariant"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        given = self.transport == "symmetric" or self.exchange != "auto" or (self.capacity, self.rank_capacity) != (None, None)
        if self.shared_batch and given:
            raise ValueError(
                'shared_batch=True goes over transport "collective" in a way of its own, with room for all rows: leave out exchange, '
                f'capacity and rank_capacity, got transport "{self.transport}", exchange "{self.exchange}", {self.capacity!r} and '
                f"{self.rank_capacity!r}"
            )
        self._check_invariance()
        if self.slots > 2:
            raise ValueError(f"slots must be 1 or 2, got {self.slots}")
        if self.capacity is not None and (
            not isinstance(self.capacity, int) or isinstance(self.capacity, bool) or self.capacity < 1
        ):
            raise ValueError(f"capacity must be a positive number of rows for each expert, or None, got {self.capacity!r}")
        self._check_layout()
        for name in ("timeout", "first_timeout"):
            value = getattr(self, name)
            if name == "first_timeout" and value is None:
                continue
            check_seconds(name, value)
        if self.max_tokens_per_rank * self.top_k > MAX_INT:
            raise ValueError(
                f"max_tokens_per_rank times top_k must be below 2**31, as entries are numbered in int32, got {self.max_tokens_per_rank} "
                f"and {self.top_k}"
            )
        if max(self.world_size * self.total_rows, self.num_experts * self.rows_per_source) >= 2**31:
            raise ValueError(
                f"{self.world_size} ranks of {self.total_rows} rows are too many: rows are numbered in int32; lower rank_capacity or "
                "max_tokens_per_rank"
                if self.ragged
                else f"{self.num_experts} experts of {self.max_rows} rows are too many: rows are numbered in int32; lower capacity or "
                "max_tokens_per_rank"
            )
        if self.transport == "local" and self.world_size > 1:
            raise ValueError(f'transport "local" serves one rank, got a group of {self.world_size}; use "collective" or "auto"')

    def _check_invariance(self) -> None:
        """Raises ValueError for settings by which a token's output depends on other tokens, or on the number of ranks."""
        if not self.batch_invariant:
            return
        if self.reduce != "exact":
            raise ValueError(
                f'batch_invariant=True takes reduce="exact" alone, got "{self.reduce}": its sums depend on which rank holds which expert'
            )
        if self.on_overflow != "error":
            raise ValueError(
                f'batch_invariant=True takes on_overflow="error" alone, got "{self.on_overflow}": which rows are dropped depends on the '
                "other tokens"
            )

    def _check_layout(self) -> None:
        """Settles on a layout. Raises ValueError for a capacity that the layout doesn't have, or that is none."""
        if self.shared_batch:
            object.__setattr__(self, "layout", "ragged")
        if self.layout == "auto":
            many = self.max_tokens_per_rank > PADDED_TOKENS and self.capacity is None
            object.__setattr__(self, "layout", "ragged" if many or self.rank_capacity is not None else "padded")
        if self.ragged and self.capacity is not None:
            raise ValueError(
                f'capacity is of layout "padded": layout "ragged" limits the rows of a rank; use rank_capacity, got {self.capacity!r}'
            )
        given = self.rank_capacity
        if given is None:
            return
        if not self.ragged:
            raise ValueError(f'rank_capacity is of layout "ragged": with layout "{self.layout}" use capacity, got {given!r}')
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given <= MAX_INT:
            raise ValueError(
                "rank_capacity must be a positive number of rows (an int), a positive factor of the mean (a float), or None, "
                f"got {given!r}"
            )

    @functools.cached_property
    def num_local_experts(self) -> int:
        """L, the experts of a rank."""
        return self.num_experts // self.world_size

    @functools.cached_property
    def num_batches(self) -> int:
        """Batches of tokens that the ranks have together: W, or one that they share."""
        return 1 if self.shared_batch else self.world_size

    @functools.cached_property
    def num_groups(self) -> int:
        """G, the groups of 128 columns."""
        return ceil_div(self.hidden_size, 128)

    @functools.cached_property
    def ragged(self) -> bool:
        """Whether the experts' rows lie in one buffer, each expert's behind those of the one before."""
        return self.layout == "ragged"

    @functools.cached_property
    def max_rows(self) -> int:
        """M: the most rows of an expert. Padded: its buffer's, by default what W ranks can send when no token names an expert twice.
        Ragged: all of the rank's."""
        if self.ragged:
            return self.total_rows
        wanted = self.world_size * self.max_tokens_per_rank if self.capacity is None else self.capacity
        return round_up(wanted, ROW_ALIGNMENT)

    @functools.cached_property
    def total_rows(self) -> int:
        """R: rows of a rank's buffer, of all its experts. Ragged: by default what W ranks can send when no token names an expert twice,
        wherever each expert's rows begin."""
        experts, tokens = self.num_local_experts, self.max_tokens_per_rank
        if not self.ragged:
            return experts * self.max_rows
        given = self.rank_capacity
        if isinstance(given, int):
            return round_up(given, ROW_ALIGNMENT)
        if self.shared_batch:
            # all of them here, even where tokens name an expert twice
            return round_up(tokens * self.top_k, ROW_ALIGNMENT) + ROW_ALIGNMENT * (experts - 1)
        come = self.world_size * tokens * min(self.top_k, experts)
        all_that_come = min(
            round_up(come, ROW_ALIGNMENT) + ROW_ALIGNMENT * (experts - 1),
            experts * round_up(self.world_size * tokens, ROW_ALIGNMENT),
        )
        if given is None:
            return all_that_come
        # each rank sends T * K rows, so that a rank gets as many on average
        mean = round_up(math.ceil(given * tokens * self.top_k), ROW_ALIGNMENT)
        return min(mean + ROW_ALIGNMENT * experts, all_that_come)

    @functools.cached_property
    def batch_shape(self) -> tuple[int, ...]:
        """The rows of a batch: (L, M), or (R,) if ragged. Values have H columns behind it."""
        return (self.total_rows,) if self.ragged else (self.num_local_experts, self.max_rows)

    @functools.cached_property
    def rows_per_source(self) -> int:
        """C: rows of an expert's buffer that one source rank can fill, in the padded exchange."""
        return min(self.max_rows, round_up(self.max_tokens_per_rank, ROW_ALIGNMENT))

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The type of the batch's values."""
        return QUANT_DTYPES[self.quant]

    @functools.cached_property
    def quantized(self) -> bool:
        """Whether values are in a narrow type, with scales."""
        return self.quant not in PLAIN_DTYPES

    @functools.cached_property
    def output_dtype(self) -> torch.dtype:
        """The type in which `GroupedExperts` give their rows: float16 for "float16", otherwise bfloat16."""
        return PLAIN_DTYPES.get(self.quant, torch.bfloat16)

    @functools.cached_property
    def per_rank(self) -> bool:
        """Whether a token's rows are summed on each rank before they come back."""
        return self.reduce == "per_rank"

    @functools.cached_property
    def first_limit(self) -> float:
        """Seconds that a wait may last in the constructor and until the first check."""
        return self.timeout if self.first_timeout is None else self.first_timeout

    @functools.cached_property
    def pushes(self) -> bool:
        """Whether the experts of a whole layer store their rows at the tokens' ranks. `transport` is resolved."""
        return self.overlap and self.transport == "symmetric" and not self.per_rank

    def mean_rows(self, tokens: int) -> int:
        """The rows that come to an expert on average.

        Args:
            tokens: of all ranks together.

        Returns:
            The mean, from 1 to M.
        """
        return min(max(ceil_div(tokens * self.top_k, self.num_experts), 1), self.max_rows)

    def difference(self, other: DispatcherConfig) -> str:
        """The settings that differ.

        Args:
            other: another rank's.

        Returns:
            Them as text; empty if none does.
        """
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return ", ".join(f"{name}: {mine!r} and {theirs!r}" for name, mine, theirs in pairs if mine != theirs)
