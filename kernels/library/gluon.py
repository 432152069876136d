"""What Gluon calls differently from one minor version of Triton to the next. The Hopper kernels take these names from here.

`kernels/library/triton_versions.py` lists the versions.
"""

from __future__ import annotations

import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from moequant.kernels.library.triton_versions import minor

# A barrier of a partition's threads: "thread_barrier" in 3.6.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# Whether `mbarrier.arrive` lets a partition's threads wait for each other first: since 3.8, where a barrier before it would be a second
# one. Of a newer one nobody knows.
ARRIVE_WAITS = gl.constexpr(minor(triton.__version__) in ((3, 8), (3, 9)))

# Copies of blocks by TMA: "async_copy_.." up to 3.7. In 3.9 the former names are there, and raise.
load_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_block = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

# reinterpret(shared, dtype, shape, layout): shared memory seen as another shape. A private method up to 3.8.
descriptor = gl.shared_memory_descriptor
reinterpret = descriptor.reinterpret if hasattr(descriptor, "reinterpret") else descriptor._reinterpret
