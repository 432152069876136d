"""The number formats and the quantization recipes, by name. Their arithmetic is part of the project's contract: every backend gives
these bits. `moequant.reference` has it as code."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# What is quantized, and what GEMMs come out in.
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)


@dataclass(frozen=True)
class Format:
    """A narrow number format.

    Attributes:
        name: as settings call it, "fp8_e4m3fn" say.
        dtype: of torch.
        max: the largest magnitude that quantization maps to.
    """

    name: str
    dtype: torch.dtype
    max: float


FORMATS = {
    "fp8_e4m3fn": Format("fp8_e4m3fn", torch.float8_e4m3fn, 448.0),
    "fp8_e4m3fnuz": Format("fp8_e4m3fnuz", torch.float8_e4m3fnuz, 240.0),
    "fp8_e5m2": Format("fp8_e5m2", torch.float8_e5m2, 57344.0),
    "int8": Format("int8", torch.int8, 127.0),
}
FORMAT_OF_DTYPE = {fmt.dtype: fmt for fmt in FORMATS.values()}


@dataclass(frozen=True)
class Recipe:
    """How a group's scale and values follow from its numbers.

    Attributes:
        name: as settings call it.
        eps: floor of the group's absolute maximum, so that a group of zeros has a scale.
        power_of_two: the scale is rounded up to a power of two.
        reciprocal: values are x * (1 / scale), two roundings, instead of x / scale, one.
        fnuz_max: the largest magnitude in float8_e4m3fnuz, where it is not the format's.
    """

    name: str
    eps: float
    power_of_two: bool = False
    reciprocal: bool = False
    fnuz_max: float | None = None


RECIPES = {
    # the formula of vLLM's and SGLang's Triton kernels (per_token_group_quant_fp8)
    "default": Recipe("default", eps=1e-10),
    # DeepGEMM's test utilities (per_token_cast_to_fp8)
    "deepgemm": Recipe("deepgemm", eps=1e-4, reciprocal=True),
    # power-of-two scales, as Blackwell's block-scaled GEMMs take them (OCP Microscaling's E8M0, rounded up)
    "ue8m0": Recipe("ue8m0", eps=1e-10, power_of_two=True),
    # "default", but for float8_e4m3fnuz, of which vLLM uses no more than 224 on AMD
    "fnuz_224": Recipe("fnuz_224", eps=1e-10, fnuz_max=224.0),
}

# Below it 1 / scale or the remainder of the division leaves float32's normal range.
MIN_EPS = 1e-20


def format_of(dtype: torch.dtype) -> Format:
    """The format of a torch dtype.

    Args:
        dtype: float8_e4m3fn, float8_e4m3fnuz, float8_e5m2 or int8.

    Returns:
        One of FORMATS.

    Raises:
        ValueError: nothing is quantized to that dtype.
    """
    if not isinstance(dtype, torch.dtype) or dtype not in FORMAT_OF_DTYPE:
        names = ", ".join(str(known) for known in FORMAT_OF_DTYPE)
        raise ValueError(f"dtype must be one of {names}, got {dtype!r}")
    return FORMAT_OF_DTYPE[dtype]


def recipe_of(name: str) -> Recipe:
    """The recipe of a name.

    Args:
        name: a key of RECIPES.

    Returns:
        The recipe.

    Raises:
        ValueError: there is none of that name.
    """
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


def max_of(dtype: torch.dtype, recipe: str) -> float:
    """The magnitude that a recipe maps a group's absolute maximum to.

    Args:
        dtype: float8_e4m3fn, float8_e4m3fnuz, float8_e5m2 or int8.
        recipe: its name.

    Returns:
        The format's own, or the recipe's for float8_e4m3fnuz.
    """
    own = recipe_of(recipe).fnuz_max
    return own if own is not None and dtype == torch.float8_e4m3fnuz else format_of(dtype).max
