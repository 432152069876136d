"""Launches that begin early leave room for what the launch before them waits for. Needs no GPU.

What is launched for a shape is asked of the launch functions, with stand-ins for the kernels; what the compiler makes of it, of
`compile_pdl.py`. Letters: T tokens, K top-k, E experts, W ranks, H hidden size.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton

import compile_peers as calls
from compile_case import BF16, E4M3
from moequant.batch import ceil_div
from moequant.kernels.library import pdl
from moequant.kernels.library.triton_versions import KNOWN, minor
from moequant.kernels.routing import combine
from moequant.kernels.symmetric import push_tokens, unpack_rows
from moequant.models import MODELS
from moequant.transport.warm_up import token_counts

ROOT = Path(__file__).resolve().parents[1]
# bytes of a thread: none with the oldest Triton, a few with newer ones
SPILLED = 0 if minor(triton.__version__) == KNOWN[0] else 32
# an H100
SMS, REGISTERS, WARPS, PROGRAMS = 132, 65536, 64, 32
# around what bounds a launch: multiprocessors over the programs of a token
TOKENS = [1, 2, 8, 16, 18, 19, 25, 26, 32, 33, 42, 43, 54, 55, 64, 65, 109, 110, 128, 129, 160, 192, 224, 256, 264, 512, 1024, 8192]
RANKS = [2, 4, 8]


class Launch(NamedTuple):
    """programs: of a launch. registers: of one program, of which each warp takes a multiple of 256."""

    programs: int
    warps: int
    registers: int


# exchange_counts, the largest of those that spin, and a product of kernels/gemm/gemm1_swiglu_hopper.py
SPINS, PRODUCT = Launch(1, 8, 8 * 32 * 96), Launch(1, 12, 12 * 32 * 168)


class StandIn:
    """Of a kernel: keeps what it was launched with."""

    def __init__(self, launched: list[dict[str, Any]]) -> None:
        self.launched = launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.launched.append({"grid": grid, **options})


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is launched from here on, on a device of SMS multiprocessors that knows early launches."""
    return record(monkeypatch, SMS)


def record(monkeypatch: pytest.MonkeyPatch, sms: int) -> list[dict[str, Any]]:
    launches: list[dict[str, Any]] = []
    for module, kernel in ((push_tokens, "push_tokens_kernel"), (unpack_rows, "unpack_rows_kernel"), (combine, "combine_kernel")):
        monkeypatch.setattr(module, kernel, StandIn(launches))
    for module in (push_tokens, unpack_rows, combine, pdl):
        for name in ("num_sms", "multiprocessors", "uses_pdl"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda device, value=name == "uses_pdl" or sms: value)
    return launches


def launch_all(shape: Any, ranks: int, tokens: int, dtype: torch.dtype = E4M3, ragged: bool = False, **push: Any) -> None:
    """What stands behind the waits of a dispatch and a combine: push_tokens, unpack_rows, combine."""
    sizes: dict[str, Any] = {"columns": shape.hidden_size, "ranks": ranks}
    experts, top_k = shape.num_experts, shape.top_k
    rows = min(ceil_div(tokens * top_k * ranks, experts), tokens * ranks)
    with torch.device("meta"):
        calls.push_tokens(dtype, tokens, top_k=top_k, experts=experts, ragged=ragged, **sizes, **push)
        calls.unpack_rows(dtype, rows, experts=experts // ranks, ragged=ragged, **sizes)
        calls.combine_shared(tokens, top_k=top_k, **sizes)


def compiled_for(options: dict[str, Any]) -> dict[str, Any]:
    """Constants, and what the compiler is told besides."""
    told = ("num_warps", "maxnreg", "launch_pdl", "enable_fp_fusion")
    return {key: value for key, value in options.items() if key.isupper() or key in told}


def pdl_launch(options: dict[str, Any]) -> Launch | None:
    """None for a launch that begins when the one before has ended."""
    if "launch_pdl" not in options:
        return None
    programs = 1
    for size in options["grid"]:
        programs *= size
    return Launch(programs, options["num_warps"], options["num_warps"] * 32 * ceil_div(options["maxnreg"], 8) * 8)


def place(held: list[Launch], launch: Launch, spread: bool) -> list[Launch]:
    """What multiprocessors hold when the programs of a launch are put on them, one by one where there is room: on the emptiest, or,
    if not spread, on the fullest."""
    held = list(held)
    for _ in range(launch.programs):
        fitting = [sm for sm, there in enumerate(held) if fits(there, launch)]
        if not fitting:
            break
        sm = (min if spread else max)(fitting, key=lambda sm: held[sm].registers)
        there = held[sm]
        held[sm] = Launch(there.programs + 1, there.warps + launch.warps, there.registers + launch.registers)
    return held


def fits(there: Launch, program: Launch) -> bool:
    return there.programs < PROGRAMS and there.warps + program.warps <= WARPS and there.registers + program.registers <= REGISTERS


def room(waits: list[Launch | None], spread: bool) -> list[Launch]:
    """What multiprocessors hold while so many streams wait, with an early launch behind each."""
    held = [Launch(0, 0, 0)] * SMS
    for launch in waits:
        held = place(held, SPINS, spread)
        if launch is not None:
            held = place(held, launch, spread)
    return held


@pytest.fixture(scope="module")
def found() -> set[Launch]:
    """Every launch of every shape that begins early behind a wait."""
    with pytest.MonkeyPatch.context() as patch:
        launched = record(patch, SMS)
        for shape, ranks, tokens in itertools.product(MODELS.values(), RANKS, TOKENS):
            launch_all(shape, ranks, tokens)
            launch_all(shape, ranks, tokens, ragged=True)
            launch_all(shape, ranks, tokens, BF16, wave=1)
    return {launch for launch in map(pdl_launch, launched) if launch is not None}


def test_beside_one_wait_a_product_fits_and_beside_two_a_dispatch(found):
    """If the hardware puts programs on the emptiest multiprocessor, and if on the fullest."""
    assert len(found) > 20
    # no launch holds more in every way
    largest = {launch for launch in found if not any(launch != other and all(map(int.__le__, launch, other)) for other in found)}
    for spread in (True, False):
        for launch in largest:
            assert any(fits(there, PRODUCT) for there in room([launch], spread)), launch
        for pair in itertools.combinations_with_replacement(largest, 2):
            assert any(fits(there, SPINS) for there in room(list(pair), spread)), pair


def test_the_bounds_hold_wherever_programs_lie(found):
    """The argument of `kernels/library/pdl.py`, without a model of where programs are put."""
    for launch in found:
        assert launch.programs + 1 <= SMS - 3, launch
        held, warps = launch.programs * launch.registers + SPINS.registers, launch.programs * launch.warps + SPINS.warps
        assert SMS * REGISTERS - 2 * held >= SMS * SPINS.registers, launch
        assert SMS * WARPS - 2 * warps >= SMS * SPINS.warps, launch


@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("ranks", RANKS)
def test_small_dispatches_and_combines_begin_early(ranks, ragged, launched):
    """DeepSeek-V3's with up to 128 tokens, and combine with up to 32."""
    for tokens in range(1, 129):
        launched.clear()
        launch_all(MODELS["deepseek-v3"], ranks, tokens, ragged=ragged)
        assert all(pdl_launch(options) is not None for options in launched[: 3 if tokens <= 32 else 2]), tokens


@pytest.mark.parametrize(("sms", "ragged"), [(114, False), (132, False), (132, True), (148, False)])
def test_every_launch_is_compiled_by_the_constructor(sms, ragged, monkeypatch):
    """What a kernel is compiled for at any number of tokens, it is at one of those that `warm_up` takes."""
    launched = record(monkeypatch, sms)
    for shape in {shape.hidden_size: shape for shape in MODELS.values()}.values():
        kinds = []
        for tokens in range(1, 201):
            launched.clear()
            launch_all(shape, 2, tokens, ragged=ragged)
            kinds.append([compiled_for(options) for options in launched])
        for most, kernel in itertools.product((1, 7, 20, 50, 100, 200), range(3)):
            warmed = [kinds[tokens - 1][kernel] for tokens in token_counts(most)]
            cold = [tokens for tokens in range(1, most + 1) if kinds[tokens - 1][kernel] not in warmed]
            assert not cold, (shape, most, kinds[cold[0] - 1][kernel])


def test_compiled_launches_keep_to_what_they_say():
    """Registers, next to none spilled; nothing stands behind two waits; a program of any kernel of a dispatch fits beside two waits."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "compile_pdl.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    reports = list(map(json.loads, result.stdout.splitlines()))
    kernels = {report["kernel"] for report in reports}
    assert kernels == {f"{name}_kernel" for name in STEPS}
    for report in reports:
        name = report["kernel"].removesuffix("_kernel")
        what = {key: value for key, value in report.items() if key != "instructions"}
        assert report["limit"] or not (name in BEHIND_WAITS and report["early"]), what
        if report["limit"]:
            assert report["registers"] <= report["limit"] and report["spills"] <= SPILLED, what
        if report["early"] or "wait" not in STEPS[name]:
            assert report["steps"] == STEPS[name], what
        assert report["warps"] * 32 * ceil_div(report["registers"], 8) * 8 <= SPINS.registers, what
        assert report["shared"] <= 8192, what


# In the order of the code: waits for the launch before, lets the next begin.
STEPS = {
    "route": ["launch_dependents"],
    "exchange_counts": ["launch_dependents", "wait"],
    "push_tokens": ["wait", "launch_dependents"],
    "signal_and_wait": ["launch_dependents"],
    "unpack_rows": ["wait"],
    "combine": ["wait"],
}
BEHIND_WAITS = ("push_tokens", "unpack_rows", "combine")
# the launch before ends by itself
BEHIND_OTHERS = ("exchange_counts", "reduce_split_k", "quantize_tensor")


def test_these_launches_alone_begin_early():
    """A new one belongs into the module's argument, and into this file."""
    asking = {}
    for path in (ROOT / "kernels").rglob("*.py"):
        calls_of = re.findall(r"\*\*pdl_option\((.*)\)", path.read_text())
        if calls_of:
            asking[path.stem] = calls_of
    assert set(asking) == {*BEHIND_WAITS, *BEHIND_OTHERS}
    # with a number of registers
    assert all("," in call for name in BEHIND_WAITS for call in asking[name])
    setting = re.compile(r"launch_pdl\W{0,3}[=:]")
    assert [path.stem for path in (ROOT / "kernels").rglob("*.py") if setting.search(path.read_text())] == ["pdl"]
