"""Calls of experts in every mode of torch, with what models hand over, and what is refused."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", "5.23")

from hf_experts import EXPERTS, HIDDEN, TOP_K, error, make, odd_gate, quantize, run, scan, tokens
from test_transformers_experts import LIMITS

from moequant.integrations.groups import ByGroup
from moequant.integrations.transformers import UnknownExpertsError, configure, layers as layers_of_models
from moequant.integrations.transformers.contract import contract_of
from moequant.integrations.transformers.dispatchers import room_for
from moequant.integrations.transformers.layers import layer_of
from moequant.integrations.transformers.requirement import require
from moequant.integrations.transformers.settings import Settings, current, say_once
from moequant.testing import assert_bit_equal

QWEN, GPT = "Qwen3MoeExperts", "GptOssExperts"
# the latter with a function that is the model's own
OWN = "GptOssExperts of its own"
NAMES = [QWEN, GPT, OWN]
MODES: dict[str, Any] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": torch.enable_grad}


@pytest.fixture
def settings():
    before = current()
    yield
    configure(**vars(before))


@pytest.fixture(autouse=True)
def nothing_said_yet():
    say_once.cache_clear()


def moequant(name: str) -> Any:
    module = make(scan()[name.partition(" ")[0]])
    module.config._experts_implementation_internal = "moequant"
    if name == OWN:
        module._apply_gate = odd_gate
    return module


@pytest.mark.parametrize("order", list(itertools.permutations(MODES)), ids="-".join)
@pytest.mark.parametrize("name", NAMES)
def test_modes_in_any_order_have_one_result(name, order, monkeypatch):
    # what is kept must be made anew
    monkeypatch.setattr("moequant.integrations.transformers.dispatchers._DISPATCHERS", ByGroup())
    module, inputs = moequant(name), tokens(7)
    expected = run(moequant(name), "moequant", *inputs)
    for mode in (*order, *order):
        with MODES[mode]():
            assert_bit_equal(module(*inputs).clone(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    module, inputs = moequant(name), tokens(7)
    expected = run(module, "moequant", *inputs)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_bit_equal(module(*inputs), expected)


@pytest.mark.parametrize("quant", ["fp8_e4m3fn", "int8"])
def test_a_function_of_the_models_own_with_weights_that_are_quantized(quant):
    module, inputs = moequant(OWN), tokens(7)
    expected = run(copy.deepcopy(module).float(), "eager", inputs[0].float(), *inputs[1:])
    quantize(module, quant)
    assert error(run(module, "moequant", *inputs), expected) < LIMITS[quant]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_and_tokens_of_other_types(name, dtype):
    module, (hidden, ids, weights) = moequant(name), tokens(7)
    expected = run(copy.deepcopy(module).float(), "eager", hidden.float(), ids, weights)
    other = copy.deepcopy(module).to(dtype)
    found = run(other, "moequant", hidden.to(dtype), ids, weights.to(dtype))
    assert found.dtype == dtype and error(found, expected) < 6e-3
    # a copy of the weights is made anew when they change, in place or for others that may lie where they lay
    for factor in (2, 4, 8, 16):
        state = {key: value * 2 if "down" in key else value for key, value in other.state_dict().items()}
        other.load_state_dict(state, assign=factor > 2)
        del state
        assert_bit_equal(run(other, "moequant", hidden.to(dtype), ids, weights.to(dtype)), factor * found)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_change_are_used(name):
    module, inputs = moequant(name), tokens(7)
    before = run(module, "moequant", *inputs)
    state = {key: value / 2 if "down" in key else value for key, value in module.state_dict().items()}
    for assign in (False, True):
        module.load_state_dict(state, assign=assign)
        assert_bit_equal(run(module, "moequant", *inputs), before / 2)
        state = {key: value.clone() for key, value in state.items()}


def test_weights_that_are_not_copied_take_no_memory():
    module = moequant(QWEN)
    experts: Any = layer_of(module).experts
    assert experts.w13.data_ptr() == module.gate_up_proj.data_ptr() and experts.w2.data_ptr() == module.down_proj.data_ptr()


def test_copies_are_modules_of_their_own_and_what_is_kept_goes_with_a_module():
    module, inputs = moequant(QWEN), tokens(7)
    expected = run(module, "moequant", *inputs)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.down_proj.zero_()
    assert not run(other, "moequant", *inputs).any()
    assert_bit_equal(run(module, "moequant", *inputs), expected)
    kept, gone = len(layers_of_models._LAYERS), weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None and len(layers_of_models._LAYERS) < kept


def test_models_take_turns_and_implementations_too():
    first, second, inputs = moequant(QWEN), moequant("MixtralExperts"), tokens(7)
    expected = [run(module, "moequant", *inputs) for module in (first, second)]
    by_itself = run(first, "eager", *inputs)
    for _ in range(2):
        for module, sums in zip((first, second), expected, strict=True):
            assert_bit_equal(run(module, "moequant", *inputs), sums)
        assert_bit_equal(run(first, "eager", *inputs), by_itself)


@pytest.mark.parametrize("name", NAMES)
def test_ids_beyond_the_range_are_other_ranks_where_experts_are_split(name):
    module, (hidden, ids, weights) = moequant(name), tokens(9)
    mine, others = ids.clone(), ids % 2 == 0
    mine[others] = EXPERTS
    expected = run(module, "moequant", hidden, ids, weights.masked_fill(others, 0))
    module._is_expert_parallel = True
    assert error(run(module, "moequant", hidden, mine, weights.masked_fill(others, 0)), expected) < 3e-3
    module._is_expert_parallel = False
    with pytest.raises(ValueError, match=f"topk_ids must be in -1..{EXPERTS - 1}"):
        run(module, "moequant", hidden, mine, weights)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_that_name_an_expert_twice_lose_no_rows(name):
    module, (hidden, ids, weights) = moequant(name), tokens(40)
    for same in (torch.zeros_like(ids), ids // 4):
        found = run(module, "moequant", hidden, same, weights)
        assert error(found, run(copy.deepcopy(module).float(), "eager", hidden.float(), same, weights)) < 6e-3


@pytest.mark.parametrize("name", [OWN, "MuseSparkExperts"])
def test_places_that_a_gpu_does_not_count_change_nothing(name, monkeypatch):
    module, inputs = moequant(name), tokens(7)
    # entries of no expert have no row
    inputs[1][:2] = -1
    expected = run(module, "moequant", *inputs)

    def static(valid: torch.Tensor, most: int) -> torch.Tensor:
        assert most == 7 * TOP_K == valid.sum() + 2 * TOP_K
        return torch.nonzero_static(valid, size=most, fill_value=0)[:, 0]

    monkeypatch.setattr("moequant.integrations.transformers.products.places", static)
    assert_bit_equal(run(module, "moequant", *inputs), expected)


@pytest.mark.parametrize("count", [0, 1, 16, 17])
def test_any_number_of_tokens_and_of_experts_for_each(count):
    module, (hidden, ids, weights) = moequant(QWEN), tokens(count)
    whole = run(module, "moequant", hidden, ids, weights)
    assert whole.shape == (count, HIDDEN)
    # one expert after the other, as an exchange of pairs calls them
    parts = [run(module, "moequant", hidden, ids[:, k : k + 1], weights[:, k : k + 1]) for k in range(TOP_K)]
    assert count == 0 or error(sum(part.float() for part in parts), whole) < 5e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_more_tokens_than_fit_are_cut_into_pieces(name, settings):
    module, inputs = moequant(name), tokens(40)
    expected = run(module, "moequant", *inputs)
    configure(max_tokens=12)
    assert_bit_equal(run(module, "moequant", *inputs), expected)


def test_rooms_grow_by_a_factor_up_to_the_limit():
    assert [room_for(count, Settings(max_tokens=500)) for count in (0, 1, 16, 17, 64, 65, 256, 257, 500)] == [
        *(16, 16, 16, 64, 64, 256, 256, 500, 500)
    ]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must"),
        ({"reduce": "no"}, "reduce must"),
        ({"timeout": -1}, "timeout must be a number of seconds"),
        ({"tokens": 1}, "the settings are max_tokens, "),
    ],
)
def test_wrong_settings_are_refused(wrong, words, settings):
    with pytest.raises(ValueError, match=words):
        configure(**wrong)


def test_a_class_that_asks_for_more_than_is_known_is_refused_by_name(monkeypatch):
    module = moequant(QWEN)
    monkeypatch.setattr(type(module), "_apply_post_expert", lambda self, rows: rows, raising=False)
    with pytest.raises(UnknownExpertsError, match="Qwen3MoeExperts asks for _apply_post_expert, which moequant does not know"):
        contract_of(module)


def test_a_class_of_unknown_make_runs_by_its_own_activation_and_it_is_said_once(monkeypatch, caplog):
    module, inputs = moequant(QWEN), tokens(7)
    plain = run(module, "eager", *inputs)
    monkeypatch.setattr(module, "act_fn", nn.Tanh())
    with caplog.at_level(logging.WARNING, "moequant"):
        found = [run(tried, "moequant", *inputs) for tried in (module, copy.deepcopy(module))]
    assert sum("runs as the model's own Python code" in record.message for record in caplog.records) == 1
    expected = run(copy.deepcopy(module).float(), "eager", inputs[0].float(), *inputs[1:])
    assert error(found[0], expected) < 6e-3 and error(plain, expected) > 0.1
    assert_bit_equal(found[0], found[1])


@pytest.mark.parametrize("found", ["5.22.3", "4.57", None])
def test_other_versions_of_transformers_are_refused_in_words(found):
    with pytest.raises(
        ImportError,
        match=rf"needs transformers 5.23 or newer, .*{found or 'there is none'}.*: pip install '\.\[transformers\]' in a checkout",
    ):
        require(found)


@pytest.mark.parametrize("found", ["5.23", "5.23.0.dev0", "5.100.1", "6.0"])
def test_newer_versions_of_transformers_are_taken(found):
    require(found)


def test_importing_moequant_does_not_import_transformers():
    code = "import sys, moequant, moequant.integrations; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=sys.path[0] or ".", env={"PYTHONPATH": ":".join(sys.path)})
