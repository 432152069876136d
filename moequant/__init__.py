"""Expert-parallel runtime for mixture-of-experts models in pure Python: route, quantize, dispatch, grouped GEMM, combine."""

from moequant.activations import Activation
from moequant.batch import DispatchHandle, ExpertBatch, QuantizedTensor
from moequant.checkpoints import CheckpointWeight
from moequant.dispatcher import MoEQuantDispatcher
from moequant.environment import environment
from moequant.errors import (
    CallOrderError,
    CapacityOverflowError,
    ClosedError,
    ConfigMismatchError,
    GuardError,
    InvalidExpertIdError,
    LayoutError,
    OutOfStepError,
    PeerTimeoutError,
    StaleHandleError,
)
from moequant.experts import GroupedExperts
from moequant.gemm import grouped_gemm_blockscale
from moequant.quantization import dequantize, quantize_expert_batch, quantize_weight, silu_mul, silu_mul_quantize

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "CallOrderError",
    "CapacityOverflowError",
    "CheckpointWeight",
    "ClosedError",
    "ConfigMismatchError",
    "DispatchHandle",
    "ExpertBatch",
    "GroupedExperts",
    "GuardError",
    "InvalidExpertIdError",
    "LayoutError",
    "MoEQuantDispatcher",
    "OutOfStepError",
    "PeerTimeoutError",
    "QuantizedTensor",
    "StaleHandleError",
    "dequantize",
    "environment",
    "grouped_gemm_blockscale",
    "quantize_expert_batch",
    "quantize_weight",
    "silu_mul",
    "silu_mul_quantize",
]
