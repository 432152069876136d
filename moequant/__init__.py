"""Expert-parallel runtime for mixture-of-experts models in pure Python: route, quantize, dispatch, grouped GEMM, combine."""
