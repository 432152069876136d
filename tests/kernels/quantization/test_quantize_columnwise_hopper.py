"""Rows quantized along the tokens by the kernel for Hopper."""

from __future__ import annotations

from compile_case import BF16, E4M3, cases
from test_quantize_columnwise import call_quantize_columnwise

CASES = [
    *({"dtype": dtype, "blocks": blocks} for dtype in (E4M3, BF16) for blocks in (False, True)),
    {"dtype": E4M3, "layout": "ragged"},
    {"dtype": E4M3, "columns": 1440},
]
COMPILE_CASES = cases(call_quantize_columnwise, *CASES, hopper=True, wide=False)
