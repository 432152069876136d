"""The specification: every step of the pipeline in plain torch, in the order in which a layer runs them. It runs on any device and is
what runs on a CPU; of the grouped GEMM there it is the bits that run, in less time (`moequant/ops/on_cpu.py`). The kernels in
`moequant.kernels` give the same bits (GEMMs: the same numbers within rounding).

    hidden_states (T, H), topk_ids (T, K), topk_weights (T, K)
      route                    which of its expert's rows each (token, k) takes
      expert_offsets           where each source rank's rows start in each expert's buffer
      plan_sends, plan_returns packed exchange: which tokens go to which rank, and in which order their rows come back
      scatter                  quantize, and place rows in expert-major buffers
      move_source_rows         padded exchange: between rows apart by source rank and rows side by side
      grouped_gemm_blockscale, silu_mul_quantize, grouped_gemm_blockscale
      combine                  weighted sum over k
      silu_mul_backward, plain_rows   what a backward needs besides
      quantize_columnwise, weight_gradient   gradients of weights from narrow numbers

Letters: T tokens of this rank, K top-k, E experts in all, W ranks, L = E / W local experts, M rows of an expert's buffer, C rows of an
expert's buffer per source rank, H hidden size, I intermediate size, G = ceil(H / 128) groups, N and K_dim of a GEMM.
"""

from moequant.reference.activations import *
from moequant.reference.backward import *
from moequant.reference.columnwise import *
from moequant.reference.dense import *
from moequant.reference.gemm import *
from moequant.reference.quantization import *
from moequant.reference.routing import *
