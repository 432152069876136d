"""The specification: every step of the pipeline in plain torch, in the order in which a layer runs them. It runs on any device and is
what runs on a CPU. The kernels in `moequant.kernels` give the same bits (GEMMs: the same numbers within rounding).

    hidden_states (T, H), topk_ids (T, K), topk_weights (T, K)
      route                    which slot of its expert's rows each (token, k) takes
      expert_offsets           where each source rank's rows start in each expert's buffer
      plan_sends, plan_returns packed exchange: which tokens go to which rank, and in which order their rows come back
      scatter                  quantize, and place rows in expert-major buffers
      move_source_rows         padded exchange: between rows apart by source rank and rows side by side
      grouped_gemm_blockscale, silu_mul_quantize, grouped_gemm_blockscale
      combine                  weighted sum over k

Letters: T tokens of this rank, K top-k, E experts in all, W ranks, L = E / W local experts, M rows of an expert's buffer, C rows of an
expert's buffer per source rank, H hidden size, I intermediate size, G = ceil(H / 128) groups, N and K_dim of a GEMM.
"""

from moequant.reference.dense import (
    mm_fp8_blockscale as mm_fp8_blockscale,
)
from moequant.reference.gemm import (
    grouped_gemm_blockscale as grouped_gemm_blockscale,
)
from moequant.reference.gemm import (
    operand_rows as operand_rows,
)
from moequant.reference.int8 import (
    int8_addmm as int8_addmm,
)
from moequant.reference.int8 import (
    int8_gelu as int8_gelu,
)
from moequant.reference.per_tensor import (
    dequantize_fp8 as dequantize_fp8,
)
from moequant.reference.per_tensor import (
    fp8_gemm as fp8_gemm,
)
from moequant.reference.per_tensor import (
    fp8_scale as fp8_scale,
)
from moequant.reference.per_tensor import (
    quantize_fp8 as quantize_fp8,
)
from moequant.reference.quantization import (
    INF_BITS as INF_BITS,
)
from moequant.reference.quantization import (
    blocks_of as blocks_of,
)
from moequant.reference.quantization import (
    counted_rows as counted_rows,
)
from moequant.reference.quantization import (
    dequantize as dequantize,
)
from moequant.reference.quantization import (
    dequantize_blocks as dequantize_blocks,
)
from moequant.reference.quantization import (
    group_scales as group_scales,
)
from moequant.reference.quantization import (
    pack_exponents as pack_exponents,
)
from moequant.reference.quantization import (
    quantize_expert_batch as quantize_expert_batch,
)
from moequant.reference.quantization import (
    quantize_groups as quantize_groups,
)
from moequant.reference.quantization import (
    quantize_rows as quantize_rows,
)
from moequant.reference.quantization import (
    quantize_weight as quantize_weight,
)
from moequant.reference.quantization import (
    rms_norm as rms_norm,
)
from moequant.reference.quantization import (
    round_to as round_to,
)
from moequant.reference.quantization import (
    silu_mul as silu_mul,
)
from moequant.reference.quantization import (
    silu_mul_quantize as silu_mul_quantize,
)
from moequant.reference.quantization import (
    swiglu as swiglu,
)
from moequant.reference.routing import (
    combine as combine,
)
from moequant.reference.routing import (
    combine_per_rank as combine_per_rank,
)
from moequant.reference.routing import (
    count_strangers as count_strangers,
)
from moequant.reference.routing import (
    expert_offsets as expert_offsets,
)
from moequant.reference.routing import (
    locate_entries as locate_entries,
)
from moequant.reference.routing import (
    move_source_rows as move_source_rows,
)
from moequant.reference.routing import (
    plan_partials as plan_partials,
)
from moequant.reference.routing import (
    plan_returns as plan_returns,
)
from moequant.reference.routing import (
    plan_sends as plan_sends,
)
from moequant.reference.routing import (
    presum as presum,
)
from moequant.reference.routing import (
    route as route,
)
from moequant.reference.routing import (
    scatter as scatter,
)
