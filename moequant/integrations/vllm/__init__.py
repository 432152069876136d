"""The experts of vLLM's MoE layers on moequant: a quantization method of vLLM's, with expert parallelism of its own.

    vllm serve Qwen/Qwen3-235B-A22B-FP8 --data-parallel-size 8 --enable-expert-parallel --quantization moequant

vLLM finds `register` by the entry point group "vllm.general_plugins" and calls it in each of its processes, whether or not somebody wants
moequant. Needs vLLM 0.33. Settings: `moequant.integrations.vllm.settings.Settings`.
"""

from moequant.integrations.vllm.registration import register

__all__ = ["register"]
