"""Which versions of Triton the Hopper kernels are compiled with, and whether a device runs them.

Gluon's names change from one minor version of Triton to the next; `kernels/library/gluon.py` has what differs.
"""

from __future__ import annotations

import functools
import logging
import re

import torch
import triton

LOG = logging.getLogger("moequant")

# The last release of each minor version that is known to work, which tests compile the kernels with, and the torch that brings it.
RELEASES = {"3.6.0": ("2.10", "2.11"), "3.7.1": ("2.12", "2.13"), "3.8.0": ("2.14",), "3.9.0": ("2.15",)}


def minor(version: str) -> tuple[int, int]:
    """(3, 6) of "3.6.1+git"."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


KNOWN = tuple(minor(release) for release in RELEASES)


@functools.lru_cache
def why_no_gluon(device: torch.device) -> str | None:
    """Why a device does not run the Hopper kernels, or None if it does. On a Hopper GPU that does not, the log says so once."""
    if device.type != "cuda":
        return "there is no GPU"
    if torch.version.hip is not None:
        return "they are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return "they are for compute capability 9.0, and the GPU has {}.{}".format(*capability)
    version = minor(triton.__version__)
    if version in KNOWN:
        return None
    if version < KNOWN[0]:
        reason = f"Triton {triton.__version__} is too old"
    else:
        error = probe(device)
        if error is None:
            return None
        reason = f"Triton {triton.__version__} is newer than moequant knows, and does not compile them ({error})"
    torches = [release for brings in RELEASES.values() for release in brings]
    warn_once(
        f"the Hopper kernels are not used: {reason}. GEMMs of fp8 and int8 run as plain Triton kernels, which take up to 1.6 times as "
        f"long. Install torch {torches[0]} to {torches[-1]}, or a newer moequant"
    )
    return reason


@functools.lru_cache
def warn_once(message: str) -> None:
    LOG.warning(message)


def probe(device: torch.device) -> str | None:
    """Compiles the Hopper kernels under a Triton that nobody has tried. Returns what is wrong, or None.

    Their smallest problem, for no program at all: they are compiled and loaded, and nothing runs.
    """
    values = torch.empty(1, 128, 128, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(1, 1, 128, dtype=torch.float32, device=device).transpose(1, 2)
    weights, weight_scales = values.new_empty(1, 256, 128), scales.new_empty(1, 2, 1)
    out = values.new_empty(1, 128, 256, dtype=torch.bfloat16)
    ends = torch.ones(1, dtype=torch.int32, device=device)
    recipe = {"max_value": 448.0, "eps": 1e-10, "power_of_two": False, "reciprocal": False}
    try:
        # imported here: a name may be gone
        from moequant.kernels.gemm.gemm1_swiglu_hopper import gemm1_swiglu_hopper
        from moequant.kernels.gemm.grouped_gemm_hopper import grouped_gemm_blockscale_hopper
        from moequant.kernels.gemm.weight_gradient_hopper import weight_gradient_hopper
        from moequant.kernels.library.arguments import Valid, quant_spec
        from moequant.kernels.quantization.quantize_columnwise_hopper import Config, quantize_columnwise_hopper
        from moequant.kernels.quantization.quantize_weight_hopper import quantize_weight_hopper

        with torch.cuda.device_of(values):
            grouped_gemm_blockscale_hopper(values, scales, weights, weight_scales, None, None, out, num_sms=0)
            gemm1_swiglu_hopper(values, scales, weights, weight_scales, None, None, values, scales, num_sms=0, **recipe)
            # one expert of one block: 128 columns of a and 256 of b
            by_block = scales.view(1, 128), weight_scales.view(2, 1)
            weight_gradient_hopper(values[0], by_block[0], weights[0], by_block[1], ends, out, num_sms=0)
            spec = quant_spec(**recipe)
            by_column = values[0], by_block[0], ends, spec
            quantize_columnwise_hopper(values, scales, Valid(ends, None), *by_column, blocks=False, config=Config(num_sms=0))
            # a weight of no block
            quantize_weight_hopper(out.mT, weights, weight_scales[:0], spec)
    except Exception as error:
        cause: BaseException = error
        # where in the source it was is of no use to a user
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return f"{type(cause).__name__}: {' '.join(str(cause).split())[-200:]}"
    return None
