"""Random layers with `batch_invariant=True` for `fuzz_gpu.py`: a token's bits alone, in any batch, and in both layouts.

T tokens, K top-k, E experts.
"""

from __future__ import annotations

import contextlib
import importlib
import random
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fuzz_activations import draw_grouped_experts
from fuzz_operations import Place
from guarded import guarded_buffers
from moequant import MoEQuantDispatcher
from moequant.testing import assert_bit_equal

# settings by which a token's output depends on no other
ALONE: dict[str, Any] = {
    "batch_invariant": True,
    "reduce": "exact",
    "on_overflow": "error",
    "capacity": None,
    "rank_capacity": None,
    "slots": 1,
}


def by_rows(place: Place) -> contextlib.AbstractContextManager[Any]:
    """While it lasts, interpreted products have the same bits for a row in any place, as those of GPUs have."""
    if place.device != "cpu":
        return contextlib.nullcontext()
    interpreter = importlib.import_module("interpreter")
    return mock.patch.object(interpreter, "product", interpreter.product_by_rows)


class Invariant:
    """Dispatchers for one token, and for many in each layout, all buffers between guards."""

    name = family = "invariant"
    alone: Any
    padded: Any
    ragged: Any

    def __init__(self, rng: random.Random, place: Place) -> None:
        layers = importlib.import_module("fuzz_layers")
        self.place, self.drawn = place, set[str]()
        settings = layers.draw_layer(rng, place) | ALONE | {"on_invalid_id": rng.choice(["error", "absent"])}
        self.settings, most = settings, settings["max_tokens_per_rank"]
        self.dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
        self.experts = draw_grouped_experts(rng, place, settings)
        room = most + rng.choice([0, 1, 300])
        with guarded_buffers(place.device) as self.buffers:
            self.alone, self.padded, self.ragged = (
                MoEQuantDispatcher(
                    **settings | {"layout": layout, "max_tokens_per_rank": tokens}, transport="local", device=place.device
                )
                for layout, tokens in ((settings["layout"], 1), ("padded", most), ("ragged", room))
            )

    def check(self, rng: random.Random) -> None:
        layers = importlib.import_module("fuzz_layers")
        # a token that names an expert twice may have no room
        inputs = layers.draw_inputs(rng, self.settings, 1, self.dtype, twice=False)
        spoiled = inputs[0][1]
        if self.settings["on_invalid_id"] == "absent":
            self.drawn.add("ids beyond the range")
            spoiled = layers.spoil_ids(rng, inputs, self.settings["num_experts"])[0]
        one: Any = [tensor.to(self.place.device) for tensor in inputs[0]]
        mine: Any = [one[0], spoiled.to(self.place.device), one[2]]
        tokens = len(mine[0])
        few = torch.tensor(rng.sample(range(tokens), min(tokens, 2 if self.place.tiny else 24)), dtype=torch.int64)
        given = layers.draw_out(rng, mine[0])
        with guarded_buffers(self.place.device, self.buffers), by_rows(self.place):
            expected = self._alone(one, few)
            outs = {"padded": self.padded(*mine, self.experts), "ragged": self.ragged(*mine, self.experts)}
            guess = layers.draw_guess(rng, 0, tokens)
            dispatcher = rng.choice([self.padded, self.ragged])
            outs["guess"] = dispatcher(given.hidden, *mine[1:], self.experts, out=given.out, expected_tokens=guess)
            self.drawn |= {"out", "expected_tokens"}
            for name, out in outs.items():
                assert_bit_equal(out[few.to(out.device)], expected, f"tokens in a batch and alone, {name} {guess}")
                assert_bit_equal(out, outs["padded"], f"a batch in other layouts, {name} {guess}")
            # some of them, in another order
            order = torch.tensor(rng.sample(range(tokens), rng.randint(0, tokens)), dtype=torch.int64).to(self.place.device)
            some: Any = [tensor[order] for tensor in mine]
            out = rng.choice([self.padded, self.ragged])(*some, self.experts)
            assert_bit_equal(out, outs["padded"][order], "some of a batch's tokens")
        given.check()
        self.buffers.check()
        for dispatcher in (self.alone, self.padded, self.ragged):
            dispatcher.check()

    def _alone(self, mine: Any, few: Tensor) -> Tensor:
        """Each of some tokens in a call of its own."""
        each: Any = [[tensor[token : token + 1] for tensor in mine] for token in few.tolist()]
        outs = [self.alone(*one, self.experts) for one in each]
        return torch.cat(outs) if outs else mine[0][:0].clone()

    def close(self) -> None:
        for dispatcher in (self.alone, self.padded, self.ragged):
            dispatcher.close()
