"""One function an operation, on any device: tensors on a CPU go to `moequant.reference`, others to `moequant.kernels`.

Every function writes into tensors that its caller owns, and is registered with torch.library under its name (`torch.ops.moequant.*`),
so that torch.compile and torch.export see one opaque operation. Where nothing compiles or traces, a call goes straight to the function.
"""

from moequant.ops.dense import *
from moequant.ops.gemm import *
from moequant.ops.quantization import *
from moequant.ops.registration import *
from moequant.ops.routing import *
