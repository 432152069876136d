"""The names under which transformers finds what is here."""

# pyright: reportMissingImports=false
from __future__ import annotations

from transformers.distributed.expert_parallel import EPImplementationInterface
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from moequant.integrations.transformers import config
from moequant.integrations.transformers.expert_parallel import MoEQuantEP
from moequant.integrations.transformers.layers import experts_forward

NAME = "moequant"


def register() -> None:
    """Registers everything that goes by name. May be called again."""
    ExpertsInterface.register(NAME, experts_forward)
    FP8ExpertsInterface.register(NAME, experts_forward)
    EPImplementationInterface.register(NAME, MoEQuantEP)
    config.register()
