"""The experts of Hugging Face's models on moequant. Importing it registers, under the name "moequant",

- an experts implementation, for the models' own experts and for those of FP8 checkpoints: `experts_implementation="moequant"`,
- a quantization of experts while a model is loaded: `quantization_config=MoEQuantConfig("fp8_e4m3fn")`,
- an implementation of expert parallelism: `DistributedConfig(ep_implementation="moequant", ...)`.

Needs transformers 5.23 or newer, the extra `transformers`; raises ImportError otherwise.
"""

from moequant.integrations.transformers.requirement import require
from moequant.integrations.versions import installed

require(installed("transformers"))

from moequant.integrations.transformers.config import MoEQuantConfig  # noqa: E402
from moequant.integrations.transformers.contract import UnknownExpertsError  # noqa: E402
from moequant.integrations.transformers.registration import register  # noqa: E402
from moequant.integrations.transformers.settings import Settings, configure  # noqa: E402

register()

__all__ = ["MoEQuantConfig", "Settings", "UnknownExpertsError", "configure"]
