"""A family of its own, which no expert-parallel path uses: the GEMM of float8 matrices (`gemm`), int8 in blocks (`int8`), one scale for
a whole tensor (`per_tensor`). Its public names are those of `moequant.gemm` and `moequant.quantization`."""
