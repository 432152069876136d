"""One function an operation, on any device: tensors on a CPU go to `moequant.reference`, others to `moequant.kernels`.

Every function writes into tensors that its caller owns, and is registered with torch.library under its name (`torch.ops.moequant.*`),
so that torch.compile and torch.export see one opaque operation. The public functions call the registered form; the transports, which
torch.compile does not trace, call the plain one.
"""

from moequant.ops.gemm import (
    fuses_gemm1 as fuses_gemm1,
)
from moequant.ops.gemm import (
    gemm1_swiglu as gemm1_swiglu,
)
from moequant.ops.gemm import (
    gemm_kernel as gemm_kernel,
)
from moequant.ops.gemm import (
    grouped_gemm_blockscale as grouped_gemm_blockscale,
)
from moequant.ops.gemm import (
    grouped_gemm_push as grouped_gemm_push,
)
from moequant.ops.gemm import (
    rows_side_by_side as rows_side_by_side,
)
from moequant.ops.int8 import (
    int8_addmm as int8_addmm,
)
from moequant.ops.int8 import (
    int8_gelu as int8_gelu,
)
from moequant.ops.per_tensor import (
    dequantize_fp8 as dequantize_fp8,
)
from moequant.ops.per_tensor import (
    fp8_gemm as fp8_gemm,
)
from moequant.ops.per_tensor import (
    quantize_fp8 as quantize_fp8,
)
from moequant.ops.quantization import (
    dequantize_blocks as dequantize_blocks,
)
from moequant.ops.quantization import (
    fused_rms_quantize as fused_rms_quantize,
)
from moequant.ops.quantization import (
    quantize_expert_batch as quantize_expert_batch,
)
from moequant.ops.quantization import (
    quantize_settings as quantize_settings,
)
from moequant.ops.quantization import (
    quantize_weight as quantize_weight,
)
from moequant.ops.quantization import (
    silu_mul as silu_mul,
)
from moequant.ops.quantization import (
    silu_mul_quantize as silu_mul_quantize,
)
from moequant.ops.registration import (
    registered as registered,
)
from moequant.ops.registration import (
    uses_kernels as uses_kernels,
)
from moequant.ops.routing import (
    combine as combine,
)
from moequant.ops.routing import (
    count_strangers as count_strangers,
)
from moequant.ops.routing import (
    expert_offsets as expert_offsets,
)
from moequant.ops.routing import (
    locate_entries as locate_entries,
)
from moequant.ops.routing import (
    move_source_rows as move_source_rows,
)
from moequant.ops.routing import (
    plan_partials as plan_partials,
)
from moequant.ops.routing import (
    plan_returns as plan_returns,
)
from moequant.ops.routing import (
    plan_sends as plan_sends,
)
from moequant.ops.routing import (
    presum as presum,
)
from moequant.ops.routing import (
    route as route,
)
from moequant.ops.routing import (
    scatter as scatter,
)
