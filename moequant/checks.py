"""Checks of user input. Each says what came, what was expected, and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moequant.errors import CapacityOverflowError, InvalidExpertIdError
from moequant.formats import FLOAT_DTYPES, MIN_EPS

if TYPE_CHECKING:
    from moequant.batch import DispatchHandle
    from moequant.config import DispatcherConfig

# Sizes and numbers of things are int32 in kernels.
MAX_INT = 2**31 - 1
MAX_FLOAT = torch.finfo(torch.float32).max
ID_DTYPES = (torch.int32, torch.int64)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    name: str,
    tensor: Tensor,
    *,
    dims: int | None = None,
    shape: tuple[int, ...] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    remedy: str = "convert it with .to()",
) -> None:
    """Raises ValueError unless tensor is a dense tensor of that many dimensions, that shape, one of those dtypes, on that device.
    remedy: what to do about another dtype."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    # torch.compile can't ask whether a view is negated; what it makes of one is right
    strange = tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized
    if strange or (tensor.is_floating_point() and not torch.compiler.is_compiling() and tensor.is_neg()):
        raise ValueError(f"{name} must be a dense tensor of plain numbers, got {_kind(tensor)}")
    if dims is not None and tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if dtypes is not None and tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {tensor.dtype}; {remedy}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}; move it with .to({str(device)!r})")


def _kind(tensor: Tensor) -> str:
    """What a tensor is that is no dense one, and what makes it one."""
    if tensor.is_nested:
        return "a nested tensor; call .to_padded_tensor()"
    if tensor.layout is not torch.strided:
        return f"layout {tensor.layout}; call .to_dense()"
    return f"{tensor.dtype}; call .dequantize()" if tensor.is_quantized else "a view that torch negates; call .resolve_neg()"


def check_has_numbers(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor without memory, of which the host wants a number."""
    if tensor.is_meta:
        raise ValueError(f'{name} must have memory, got a tensor on "meta"')


def check_output(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless each element of a tensor that is written has a place of its own."""
    if tensor.is_contiguous() or (tensor.dim() > 1 and tensor.mT.is_contiguous()):
        return
    dims = [(step, extent) for step, extent in zip(tensor.stride(), tensor.shape, strict=True) if extent > 1]
    for i, (step, _) in enumerate(dims):
        # how far the dimensions inside this one reach
        if step <= sum(s * (extent - 1) for j, (s, extent) in enumerate(dims) if j != i and s <= step):
            raise ValueError(
                f"elements of {name} must not overlap, as they are written: shape {tuple(tensor.shape)} with strides {tensor.stride()} "
                "has several in one place; give one that owns its memory"
            )


def check_is(name: str, value: object, kind: type | tuple[type, ...], hint: str = "") -> None:
    """Raises ValueError unless value is of a type. hint: what to do."""
    if not isinstance(value, kind):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{name} must be {names}, got {type(value).__name__}{hint and '; ' + hint}")


def check_int(name: str, value: Any, low: int = 0, high: int = MAX_INT) -> None:
    """Raises ValueError unless value is an integer in low..high."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise ValueError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if value < low or value > high:
        raise ValueError(f"{name} must be {f'in {low}..{high}' if value > high else f'at least {low}'}, got {value}")


def check_part(begin: int, end: int, experts: int) -> None:
    """Refuses experts that are none.

    Args:
        begin: the first expert.
        end: the one after the last.
        experts: how many there are.

    Raises:
        ValueError: unless 0 <= begin < end <= experts.
    """
    check_int("begin", begin, 0, experts - 1)
    check_int("end", end, 1, experts)
    if begin >= end:
        raise ValueError(f"begin must be below end, as the part is of experts begin..end - 1, got {begin} and {end}")


def check_number(name: str, value: Any) -> None:
    """Raises ValueError unless value is a number that float32 can hold, or infinite or NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise ValueError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not -MAX_FLOAT <= value <= MAX_FLOAT and value not in (math.inf, -math.inf) and value == value:
        raise ValueError(f"{name} must be a number that float32 can hold, got {value}")


def check_seconds(name: str, value: Any) -> None:
    """Raises ValueError unless value is a time limit."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-3 <= value <= 1e6:
        raise ValueError(f"{name} must be a number of seconds from 0.001 to 1e6, got {value!r}")


def check_weight_shapes(w13: Sequence[int], w2: Sequence[int], gated: bool) -> None:
    """Raises ValueError unless w13 is (L, 2 * I, H), not gated (L, I, H), and w2 (L, H, I)."""
    form = "(L, 2 * I, H), gate first" if gated else "(L, I, H), without a gate"
    if len(w13) != 3:
        raise ValueError(f"w13 must be {form}, got shape {tuple(w13)}")
    experts, columns, hidden = w13
    width = 2 if gated else 1
    if columns % width or tuple(w2) != (experts, hidden, columns // width):
        raise ValueError(f"w13 must be {form}, and w2 (L, H, I); got {tuple(w13)} and {tuple(w2)}")


def check_num_sms(num_sms: int | None) -> None:
    """Raises ValueError unless num_sms is a number of multiprocessors, or None."""
    if num_sms is not None and (isinstance(num_sms, bool) or not isinstance(num_sms, int) or not 0 < num_sms <= MAX_INT):
        raise ValueError(f"num_sms must be at least 1, or None for all, got {num_sms!r}")


def check_counts(num_tokens: Tensor | None, expert_start: Tensor | None, experts: int | None, device: torch.device) -> None:
    """Raises ValueError unless both are None, or num_tokens, and expert_start if it is there, are an int32 for each expert, on a device.
    experts: how many there are; None: as many as num_tokens says."""
    if num_tokens is None:
        if expert_start is not None:
            raise ValueError(
                "expert_start says where each expert's rows begin, and num_tokens how many there are: give both, got None"
            )
        return
    if experts is None:
        check_tensor("num_tokens", num_tokens, dims=1)
        experts = num_tokens.shape[0]
    for name, tensor in (("num_tokens", num_tokens), ("expert_start", expert_start)):
        if tensor is not None:
            check_tensor(name, tensor, shape=(experts,), dtypes=(torch.int32,), device=device)
            check_contiguous(name, tensor)


def check_format(quant: str, device: torch.device) -> None:
    """Raises ValueError if a device can't compute in a format: Triton converts and multiplies float8 from NVIDIA's sm_89 on, and
    float8_e4m3fnuz on AMD alone."""
    if device.type != "cuda" or torch.version.hip is not None or not str(quant).startswith("fp8"):
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9) or quant == "fp8_e4m3fnuz":
        works = '"int8" and "none"' if capability < (8, 9) else '"fp8_e4m3fn", "fp8_e5m2", "int8" and "none"'
        name = torch.cuda.get_device_name(device)
        raise ValueError(f'quant="{quant}" can\'t be computed on {name} (sm_{capability[0]}{capability[1]}); {works} can')


def check_no_grad(**tensors: Tensor | None) -> None:
    """Raises RuntimeError if one of the tensors requires grad under grad mode, or has a tangent of forward-mode differentiation: there
    is no derivative, and detaching it silently would be a wrong result."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                raise RuntimeError(
                    f"{name} requires grad, and this call has no backward; call under torch.no_grad(), or pass {name}.detach()"
                )
    if forward_ad._current_level >= 0:
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(f"{name} has a tangent, and moequant has no forward-mode derivative; pass its primal alone")


def check_tokens(
    config: DispatcherConfig, device: torch.device, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> None:
    """Raises unless these are what `MoEQuantDispatcher.dispatch` takes."""
    remedy = "convert it with .to(), or, if it is quantized, give what it was made of: dispatch quantizes"
    check_tensor("hidden_states", hidden_states, dims=2, dtypes=FLOAT_DTYPES, device=device, remedy=remedy)
    tokens, hidden = hidden_states.shape
    if tokens > config.max_tokens_per_rank:
        raise ValueError(
            f"hidden_states has {tokens} tokens, max_tokens_per_rank is {config.max_tokens_per_rank}; split the tokens, or build "
            "the dispatcher with more"
        )
    if hidden != config.hidden_size:
        raise ValueError(f"hidden_states must have shape {(tokens, config.hidden_size)}, got {tuple(hidden_states.shape)}")
    routing = (tokens, config.top_k)
    check_tensor("topk_ids", topk_ids, shape=routing, dtypes=ID_DTYPES, device=device)
    check_tensor("topk_weights", topk_weights, shape=routing, dtypes=WEIGHT_DTYPES, device=device)
    check_no_grad(hidden_states=hidden_states, topk_weights=topk_weights)
    if device.type == "cpu" and tokens and config.on_invalid_id == "error":
        low, high = topk_ids.aminmax()
        if low < -1 or high >= config.num_experts:
            raise InvalidExpertIdError(
                f"topk_ids must be in -1..{config.num_experts - 1}, got ids from {int(low)} to {int(high)}; -1 means no expert"
            )


def check_expert_output(config: DispatcherConfig, device: torch.device, expert_output: Tensor) -> Tensor:
    """expert_output, contiguous. Raises unless it is what `MoEQuantDispatcher.combine` takes."""
    shape = (*config.batch_shape, config.hidden_size)
    check_tensor("expert_output", expert_output, shape=shape, dtypes=(torch.bfloat16, torch.float16), device=device)
    if expert_output.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "expert_output requires grad, and this call has no backward: combine has one if hidden states or weights required grad in "
            'its dispatch, with quant="none" (give that hidden_states.requires_grad_()), as has a call of the dispatcher with an '
            "nn.Module; where no gradient is wanted, call under torch.no_grad(), or pass expert_output.detach()"
        )
    # a tangent, which has no words of its own
    check_no_grad(expert_output=expert_output)
    return expert_output.contiguous()


def check_out(config: DispatcherConfig, device: torch.device, handle: DispatchHandle, out: Tensor | None) -> Tensor:
    """The output that was given for a handle's tokens, or a new one. Raises unless it is what `MoEQuantDispatcher.combine` takes."""
    shape = (handle.topk_weights.shape[0], config.hidden_size)
    if out is None:
        return torch.empty(shape, dtype=handle.dtype, device=device)
    check_given(out, shape, handle.dtype, device)
    return out


def check_given(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError unless out can be written as the sums of so many tokens, with contiguous rows."""
    check_tensor("out", out, shape=shape, dtypes=(dtype,), device=device)
    check_no_grad(out=out)
    if out.stride(-1) != 1:
        raise ValueError(f"out must have contiguous rows, got strides {out.stride()}")
    check_output("out", out)


def check_eps(eps: float | None) -> None:
    """Raises ValueError unless eps can be the floor of a group's absolute maximum."""
    if eps is not None:
        check_number("eps", eps)
        if not MIN_EPS <= eps < 1e30:
            raise ValueError(f"eps must be at least {MIN_EPS} and below 1e30 (below, 1 / scale overflows), got {eps}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError unless value is one of the choices, which are of one type. 128.0 and True are not 128 and 1."""
    if type(value) is not type(choices[0]) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless the tensor is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}; call .contiguous()")


def check_counted(config: DispatcherConfig, invalid: int, dropped: int, by_source: bool) -> None:
    """Raises InvalidExpertIdError or CapacityOverflowError for what the kernels counted since the last check: ids that are no expert's,
    and rows without room. by_source: each rank has only a part of an expert's rows, as in the padded exchange."""
    if config.ragged:
        name, room = "rank_capacity", f"rows had no room in their rank's buffer of {config.total_rows} rows"
    else:
        name, room = "capacity", f"rows had no room in their expert's buffer of {config.max_rows} rows"
    twice = f"give {name} a number"
    if by_source:
        room += f", or among the {config.rows_per_source} of an expert that a rank can send in the padded exchange,"
        twice += ' and use exchange="packed"'
    overflow = (
        f"{dropped} {room} and were not sent; raise {name} (None holds every row of distinct experts; for experts "
        f'that a token names twice {twice}), or accept it with on_overflow="drop"'
    )
    if invalid:
        raise InvalidExpertIdError(
            f"{invalid} entries of topk_ids were outside -1..{config.num_experts - 1} and were treated as -1; check the router, and "
            f"num_experts{'. Besides, ' + overflow if dropped else ''}"
        )
    if dropped and config.on_overflow == "error":
        raise CapacityOverflowError(overflow)


def with_rows(x: Tensor) -> Tensor:
    """x with the numbers of a row side by side: x itself, or a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
