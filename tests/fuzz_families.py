"""Which families `fuzz_gpu.py` draws from."""

from __future__ import annotations

import importlib
import random
from typing import Any

import torch

from fuzz_activations import Activated
from fuzz_backward import Backward, Columnwise, PlainRows
from fuzz_checkpoints import Checkpoints
from fuzz_invariant import Invariant
from fuzz_operations import FusedGemm1, Place, Products, Quantizers
from fuzz_training import Trained
from fuzz_weight_gradients import WeightGradients
from fuzz_weights import Weights
from moequant.kernels.library import common


def families_of(place: Place, chosen: list[str] | None = None) -> list[Any]:
    """The classes that a place has, those that come more often several times. chosen: by their `family`; None: all.

    Raises:
        ValueError: it has none of the chosen ones.
    """
    layers, peers, shared, spread = (
        importlib.import_module(f"fuzz_{name}") for name in ("layers", "peers", "shared", "invariant_ranks")
    )
    families: list[Any]
    if place.ranks > 1:
        families = [layers.Layers] * 3 + [shared.Shared, spread.InvariantRanks]
    else:
        families = [
            layers.Layers,
            Products,
            Quantizers,
            Activated,
            Invariant,
            Trained,
            Trained,
            Backward,
            PlainRows,
            Columnwise,
            WeightGradients,
            Weights,
            Checkpoints,
        ]
        if common.runs_gluon(torch.device(place.device)):
            # the Hopper kernels for every size, not only where they are faster
            families += [Products, FusedGemm1]
        if place.device != "cpu":
            families += [peers.PeersOnOneGPU] * 2
    found = [family for family in families if chosen is None or family.family in chosen]
    if not found:
        here = ", ".join(sorted({family.family for family in families}))
        raise ValueError(f"families must be some of those that {place.ranks} of {place.device} have, {here}, got {chosen}")
    return found


def draw_family(block: int, place: Place, chosen: list[str] | None = None) -> Any:
    """The family of a block of settings."""
    rng = random.Random(f"block {block}")
    torch.manual_seed(block)
    return rng.choice(families_of(place, chosen))(rng, place)
