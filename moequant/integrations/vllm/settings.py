"""What a user can set, by vLLM's own option for what it doesn't know:

--additional-config '{"moequant": {"max_tokens": 2048}}'
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from moequant.checks import check_choice, check_int
from moequant.config import CHOICES


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the experts are called, the same in all of an engine's processes, to which vLLM carries them. Defaults need no setting.

    Attributes:
        max_tokens: the most tokens of a rank in one exchange: more are cut into chunks, as many on each rank. Memory follows it.
        transport: as `moequant.MoEQuantDispatcher` takes it.
        reduce: as the dispatcher takes it.
        timeout: seconds that a wait for another rank may last. As long as vLLM waits for a step of the model.
        first_timeout: the same until a step has been through all layers: ranks that load weights and compile may be minutes apart.

    Raises:
        ValueError: a wrong setting.
    """

    max_tokens: int = 1024
    transport: str = "auto"
    reduce: str = "exact"
    timeout: float = 300.0
    first_timeout: float = 1800.0

    def __post_init__(self) -> None:
        check_int("max_tokens", self.max_tokens, 1)
        check_choice("transport", self.transport, CHOICES["transport"])
        check_choice("reduce", self.reduce, CHOICES["reduce"])


def settings_of(additional_config: Any) -> Settings:
    """The settings of an engine.

    Args:
        additional_config: vLLM's.

    Returns:
        Them.

    Raises:
        ValueError: there is no such setting, or its value is wrong.
    """
    given = additional_config.get("moequant", {}) if isinstance(additional_config, dict) else {}
    names = [field.name for field in dataclasses.fields(Settings)]
    if not isinstance(given, dict) or not given.keys() <= set(names):
        raise ValueError(f'"moequant" in --additional-config may have {", ".join(names)}, got {given!r}')
    return Settings(**given)
