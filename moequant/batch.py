"""The values that travel between the steps of a layer: `QuantizedTensor`, `ExpertBatch`, `DispatchHandle`.

Letters: L local experts, M rows of an expert's buffer, R rows of a rank's (layout "ragged"), H hidden size, G = ceil(H / 128) groups,
T tokens of this rank, K top-k, N and K_dim columns and contraction of a weight.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from moequant.checks import check_int, check_is, check_part, check_tensor
from moequant.errors import LayoutError
from moequant.formats import FORMAT_OF_DTYPE, recipe_of
from moequant.sizes import ceil_div

ScaleLayout = Literal["row", "transposed", "tma_aligned", "transposed_flat", "ue8m0_packed", "block"]
NARROW_DTYPES = tuple(FORMAT_OF_DTYPE)
LAYOUTS: tuple[str, ...] = get_args(ScaleLayout)
# In place of a guess of an expert's rows, by which products choose kernels and tiles: a choice that is the same for any number of them.
ANY_ROWS = -1


def empty_transposed_scales(num_experts: int, rows: int, groups: int, device: torch.device | str) -> Tensor:
    """Uninitialised float32 scales, as Hopper's GEMMs read them.

    Args:
        num_experts: L.
        rows: M.
        groups: G.
        device: where.

    Returns:
        Shape (L, M, G), element strides (M*G, 1, M).
    """
    return torch.empty(num_experts, groups, rows, dtype=torch.float32, device=device).transpose(1, 2)


def empty_scales_of(shape: Sequence[int], group_size: int, device: torch.device | str) -> Tensor:
    """Uninitialised float32 scales of activations, as Hopper's GEMMs read them.

    Args:
        shape: of the activations, (..., rows, columns): (L, M, H), or ragged (R, H).
        group_size: columns of a group.
        device: where.

    Returns:
        (..., rows, G), the rows of one group side by side: element strides (M*G, 1, M), ragged (1, R).
    """
    return torch.empty(*shape[:-2], ceil_div(shape[-1], group_size), shape[-2], dtype=torch.float32, device=device).mT


def empty_scales(num_experts: int, rows: int, groups: int, layout: ScaleLayout, device: torch.device | str) -> Tensor:
    """Uninitialised activation scales in a layout of `QuantizedTensor`.

    Args:
        num_experts: L.
        rows: M.
        groups: G.
        layout: any but "block".
        device: where.

    Returns:
        (L, M, G) float32, or (L, M, ceil(G / 4)) int32 for "ue8m0_packed".
    """
    if layout == "row":
        return torch.empty(num_experts, rows, groups, dtype=torch.float32, device=device)
    if layout == "transposed":
        return empty_transposed_scales(num_experts, rows, groups, device)
    packed = layout == "ue8m0_packed"
    columns, dtype = (ceil_div(groups, 4), torch.int32) if packed else (groups, torch.float32)
    # at least one aligned piece: without rows torch forgets the stride
    aligned = max(4, ceil_div(rows, 4) * 4)
    return torch.empty(num_experts, columns, aligned, dtype=dtype, device=device)[..., :rows].transpose(1, 2)


def scale_layout(scales: Tensor) -> ScaleLayout:
    """The layout of activation scales, by their strides.

    Args:
        scales: (L, M, G), or ragged (R, G).

    Returns:
        "transposed" or "row".
    """
    return "transposed" if scales.stride(-2) == 1 or scales.shape[-2] == 1 else "row"


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor in a narrow type, with one float32 scale for each group: `dequantized = values * scales`.

    Attributes:
        values: (..., rows, columns), float8 or int8.
        scales: on values' device, float32, but for "ue8m0_packed". A trailing partial group is a group of its own.
        layout: how the scales lie. "row": (..., rows, ceil(columns / group_size)), contiguous. "transposed": (L, M, G) with element
            strides (M*G, 1, M), or strides (any, 1, any) for a slice of a larger buffer: the rows of one group side by side. Of ragged
            rows (R, G), strides (1, R) or (1, any).
            "tma_aligned": as "transposed", with groups a multiple of 4 rows apart, as TMA wants to read them. "transposed_flat":
            (..., M, G), contiguous, in the order of a contiguous (G, M): read as (M, G) it is scrambled. "ue8m0_packed": (..., M,
            ceil(G / 4)) int32, strides as "tma_aligned": the exponents of four groups' powers of two, the first in the lowest byte;
            0xFF for NaN; 0 past the last group. Of recipe "ue8m0". What lies between M and the next multiple of 4 is anything.
            "block": (..., segments * ceil(rows / segments / group_size), ceil(columns / group_size)), contiguous: one scale for
            each group_size x group_size block of a weight.
        recipe: the arithmetic that made it (`moequant.formats.RECIPES`).
        group_size: columns of a group, and rows of a block.
        segments: "block" only: the rows are this many equal parts, blocked apart. w13 has 2: gate and up.

    Raises:
        LayoutError: the scales' shape or strides are not what `layout` says. Strides are not asked of scales without elements.
        ValueError: another wrong argument.
    """

    values: Tensor
    scales: Tensor
    layout: ScaleLayout
    recipe: str = "default"
    group_size: int = 128
    segments: int = 1

    def __post_init__(self) -> None:
        check_tensor("values", self.values, dtypes=NARROW_DTYPES)
        check_tensor("scales", self.scales, device=self.values.device)
        if self.values.dim() < 2:
            raise ValueError(f"values must be (..., rows, columns), got shape {tuple(self.values.shape)}; call .unsqueeze(0)")
        recipe_of(self.recipe)
        check_int("group_size", self.group_size, 1)
        check_int("segments", self.segments)
        if not isinstance(self.layout, str) or self.layout not in LAYOUTS:
            raise LayoutError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        rows, columns = self.values.shape[-2:]
        groups = ceil_div(columns, self.group_size)
        if self.layout == "block":
            if not self.segments or rows % self.segments:
                raise LayoutError(f"segments must divide the {rows} rows of values, got segments={self.segments}")
            rows = self.segments * ceil_div(rows // self.segments, self.group_size)
        elif self.segments != 1:
            raise LayoutError(f'segments are of layout "block" alone: leave them 1 for "{self.layout}", got {self.segments}')
        packed = self.layout == "ue8m0_packed"
        if packed:
            groups = ceil_div(groups, 4)
            if self.recipe != "ue8m0":
                raise LayoutError(f'layout "ue8m0_packed" holds exponents: it needs recipe "ue8m0", got "{self.recipe}"')
        expected = (*self.values.shape[:-2], rows, groups)
        if tuple(self.scales.shape) != expected:
            raise LayoutError(
                f'values of shape {tuple(self.values.shape)} with layout "{self.layout}", group_size={self.group_size} and '
                f"segments={self.segments} need scales of shape {expected}, got {tuple(self.scales.shape)}"
            )
        dtype = torch.int32 if packed else torch.float32
        if self.scales.dtype != dtype:
            raise LayoutError(f'layout "{self.layout}" needs scales of {dtype}, got {self.scales.dtype}')
        if self.scales.numel() == 0:
            return
        if self.layout in ("transposed", "tma_aligned", "ue8m0_packed"):
            if rows > 1 and self.scales.stride(-2) != 1:
                raise LayoutError(
                    f'layout "{self.layout}" needs the rows of one group side by side (stride 1 in the next to last dimension), got '
                    f"strides {self.scales.stride()}; moequant.batch.empty_scales allocates them so"
                )
            if self.layout != "transposed" and groups > 1 and self.scales.stride(-1) % 4:
                raise LayoutError(f'layout "{self.layout}" needs groups a multiple of 4 apart, got strides {self.scales.stride()}')
        elif not self.scales.is_contiguous():
            raise LayoutError(f'layout "{self.layout}" needs contiguous scales, got strides {self.scales.stride()}')

    @classmethod
    def made_of(
        cls, values: Tensor, scales: Tensor, layout: ScaleLayout, recipe: str, group_size: int = 128, segments: int = 1
    ) -> QuantizedTensor:
        """One of parts that are known to fit together: without the checks, which cost as much as a launch.

        Args:
            values: as the constructor's.
            scales: as the constructor's.
            layout: as the constructor's.
            recipe: as the constructor's.
            group_size: as the constructor's.
            segments: as the constructor's.

        Returns:
            The tensor.
        """
        if torch.compiler.is_compiling():
            return cls(values, scales, layout, recipe, group_size, segments)
        made = object.__new__(cls)
        # as a frozen dataclass has to be filled
        made.__dict__.update(values=values, scales=scales, layout=layout, recipe=recipe, group_size=group_size, segments=segments)
        return made

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.values.shape

    def scales_by_row(self) -> Tensor:
        """The float32 scales, each where its indices say.

        Returns:
            (..., rows, groups): a view, except that packed ones are unpacked.
        """
        if self.layout == "transposed_flat":
            rows, groups = self.scales.shape[-2:]
            return self.scales.view(*self.scales.shape[:-2], groups, rows).transpose(-1, -2)
        if self.layout == "ue8m0_packed":
            exponents = (self.scales.unsqueeze(-1) >> torch.arange(0, 32, 8, device=self.device)).int() & 0xFF
            exponents = exponents.flatten(-2)[..., : ceil_div(self.shape[-1], self.group_size)]
            return torch.where(exponents == 0xFF, torch.nan, (exponents << 23).view(torch.float32))
        return self.scales

    @property
    def device(self) -> torch.device:
        """Of the values, and of the scales."""
        return self.values.device


class Owner:
    """Whose batches are meant, a dispatcher's. It has the workspaces of all experts that take them, as long as it lives."""

    def __init__(self) -> None:
        self.workspaces: dict[tuple[object, ...], Any] = {}


class Place(NamedTuple):
    """Where a part's experts are. first: among those of the whole. whole: how many that has."""

    first: int
    whole: int


@dataclass(frozen=True, eq=False)
class ExpertBatch:
    """The rows routed to this rank's experts, as `MoEQuantDispatcher.dispatch` leaves them.

    Rows of an expert are ordered by (source rank, token, k). The tensors are views of the dispatcher's buffers, valid until the
    same slot's next dispatch.

    Layout "padded": each expert has a buffer of M rows, its own ones first. Layout "ragged": the rows of all experts lie in one buffer
    of R, those of expert l from expert_start[l] on.

    Attributes:
        values: (L, M, H), ragged (R, H), contiguous, in the dispatcher's type: a narrow one, bfloat16 for "none", or float16.
        scales: (L, M, G) float32 with element strides (M*G, 1, M), ragged (R, G) with (1, R), or None for rows that are not quantized.
        num_tokens: (L,) int32, the rows of each expert. Rows that belong to none may hold anything; nothing may read them for a valid
            result, or write them.
        sources: (L, M), ragged (R,), int64, where each valid row came from: `source_rank << 32 | token * top_k + k`.
        recipe: the quantization recipe of values and scales.
        expected_rows: a host-side guess of the mean of num_tokens, by which kernels choose their tiles; never more than a hint.
        slot: the dispatcher's slot that it lies in; batches of different slots may be in flight at once.
        owner: the dispatcher's; batches of different owners may be in flight at once, too. None: nobody's in particular.
        expert_start: (L,) int32, ragged: each expert's first row, a multiple of 16; experts without rows have one too, which may be R.
            None: padded.
        batch_invariant: products choose kernels and tiles by the lengths of rows alone, so that what becomes of a row doesn't depend on
            the others.

    Raises:
        ValueError: tensors and numbers that are no batch.
    """

    values: Tensor
    scales: Tensor | None
    num_tokens: Tensor
    sources: Tensor
    recipe: str
    expected_rows: int
    slot: int = 0
    owner: Owner | None = None
    expert_start: Tensor | None = None
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        check_tensor("values", self.values, dims=3 if self.expert_start is None else 2)
        check_tensor("num_tokens", self.num_tokens, dims=1)
        (*rows, columns), device = self.values.shape, self.values.device
        experts = self.num_tokens.shape[0] if self.expert_start is not None else rows[0]
        check_tensor("values", self.values, dtypes=(torch.bfloat16, torch.float16) if self.scales is None else NARROW_DTYPES)
        if self.scales is not None:
            check_tensor("scales", self.scales, shape=(*rows, ceil_div(columns, 128)), dtypes=(torch.float32,), device=device)
        check_tensor("num_tokens", self.num_tokens, shape=(experts,), dtypes=(torch.int32,), device=device)
        if self.expert_start is not None:
            check_tensor("expert_start", self.expert_start, shape=(experts,), dtypes=(torch.int32,), device=device)
        check_tensor("sources", self.sources, shape=tuple(rows), dtypes=(torch.int64,), device=device)
        recipe_of(self.recipe)
        check_int("expected_rows", self.expected_rows)
        check_int("slot", self.slot)
        if self.owner is not None:
            check_is("owner", self.owner, Owner)
        check_is("batch_invariant", self.batch_invariant, bool)

    @property
    def ragged(self) -> bool:
        """Whether the rows of all experts lie in one buffer: layout "ragged"."""
        return self.expert_start is not None

    @property
    def chosen_by(self) -> int:
        """What products choose kernels and tiles by: expected_rows, or, with batch_invariant, ANY_ROWS."""
        return ANY_ROWS if self.batch_invariant else self.expected_rows

    @functools.cached_property
    def activations(self) -> QuantizedTensor | Tensor:
        """Values and scales as the operand that `grouped_gemm_blockscale` takes."""
        if self.scales is None:
            return self.values
        return QuantizedTensor.made_of(self.values, self.scales, "transposed", self.recipe)

    def rows_of(self, x: Tensor, expert: int) -> Tensor:
        """The valid rows of one expert, of the values or of what lies as they do. Syncs with the host.

        Args:
            x: (L, M, ...), ragged (R, ...): values, scales, sources, or expert output.
            expert: from 0 to L - 1.

        Returns:
            (num_tokens[expert], ...), a view of x.

        Raises:
            ValueError: there is no such expert, or x has other rows.
        """
        check_int("expert", expert, 0, self.num_tokens.shape[0] - 1)
        check_tensor("x", x)
        rows = self.sources.shape
        if x.shape[: len(rows)] != rows:
            raise ValueError(f"x must have the batch's rows, {tuple(rows)} and what each has, got shape {tuple(x.shape)}")
        begin = 0 if self.expert_start is None else int(self.expert_start[expert])
        return (x[expert] if self.expert_start is None else x)[begin : begin + int(self.num_tokens[expert])]

    def experts_of_rows(self) -> Tensor:
        """Each row's expert, for experts that work on all rows at once. No sync with the host.

        Returns:
            (L, 1), ragged (R,), int64, from 0 to L - 1; of rows that belong to no expert it is some expert.
        """
        device = self.values.device
        if self.expert_start is None:
            return torch.arange(self.values.shape[0], device=device)[:, None]
        rows = torch.arange(self.values.shape[0], dtype=torch.int32, device=device)
        return (torch.searchsorted(self.expert_start, rows, right=True) - 1).clamp_min(0)

    def part(self, begin: int, end: int) -> ExpertBatch:
        """The batch of some experts, views of this one.

        Args:
            begin: the first expert.
            end: the one after the last.

        Returns:
            The batch of experts begin..end - 1. Ragged: all rows, and where these experts' begin.

        Raises:
            ValueError: unless 0 <= begin < end <= L.
        """
        check_part(begin, end, self.num_tokens.shape[0])
        if (begin, end) not in self._parts:
            narrowed = ("num_tokens", "expert_start") if self.ragged else ("values", "scales", "num_tokens", "sources")
            tensors = {name: getattr(self, name) for name in narrowed}
            changes: dict[str, Any] = {name: None if x is None else x[begin:end] for name, x in tensors.items()}
            self._parts[begin, end] = part = replace(self, **changes)
            # as a frozen dataclass has to be filled
            part.__dict__["_place"] = Place(self._place.first + begin, self._place.whole)
        return self._parts[begin, end]

    @functools.cached_property
    def _parts(self) -> dict[tuple[int, int], ExpertBatch]:
        return {}

    @functools.cached_property
    def _place(self) -> Place:
        return Place(0, self.num_tokens.shape[0])


@dataclass(frozen=True, eq=False)
class DispatchHandle:
    """What `combine` needs to know of the dispatch it answers. Made by `dispatch`, opaque to users.

    Attributes:
        topk_weights: (T, K), the tensor that dispatch was given; it must not change before combine.
        dtype: of the hidden states, and so of combine's output.
        dispatcher: whose it is.
        slot: which of its slots.
        generation: which of the slot's dispatches this was.
        state: the transport's own record of where the rows went.
    """

    topk_weights: Tensor
    dtype: torch.dtype
    dispatcher: int
    slot: int
    generation: int
    state: Any
