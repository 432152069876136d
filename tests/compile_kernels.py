"""Compiles the kernels of operations for GPUs that this machine need not have, and prints one JSON object for each compiled kernel.

    python tests/compile_kernels.py quantize

Without operations it reads from its input which ones (`serve`), and compiles of them what `builds` says.

A program of its own, because the tests' process has asked for Triton's interpreter, and because a failing compiler may abort.
What is compiled, the kernel's test says in its COMPILE_CASES.
"""

# Triton annotates the driver's methods as returning nothing
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from compile_case import E4M3, E5M2, FNUZ, Case
from kernel_tests import SUBJECTS, compile_cases
from moequant.kernels.dense import quantize_tensor as quantize_tensor_module
from moequant.kernels.gemm import grouped_gemm as grouped_gemm_module
from moequant.kernels.gemm.grouped_gemm import Limits
from moequant.kernels.library import common, pdl
from moequant.kernels.symmetric import (
    exchange_counts as exchange_counts_module,
    push_tokens as push_tokens_module,
    signal_and_wait as signal_and_wait_module,
)
from sass import INSTRUCTION, barriers_and_arrivals, spills_beside_products

PDL_MODULES: Any = (
    pdl,
    exchange_counts_module,
    grouped_gemm_module,
    push_tokens_module,
    quantize_tensor_module,
    signal_and_wait_module,
)
FLOAT8 = (E4M3, FNUZ, E5M2)


@dataclass(frozen=True)
class Target:
    """A kind of GPU.

    float8: the formats that its compiler converts to or multiplies. shared_memory: bytes that one program can have.
    """

    gpu: GPUTarget
    float8: tuple[torch.dtype, ...]
    multiprocessors: int
    shared_memory: int
    tma: bool = False


# Triton has no e4m3fn before sm_89; e4m3fnuz is MI300's.
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), (), 108, 166912),
    "sm_90": Target(GPUTarget("cuda", 90, 32), (E4M3, E5M2), 132, 232448, tma=True),
    "sm_100": Target(GPUTarget("cuda", 100, 32), (E4M3, E5M2), 148, 232448, tma=True),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), (FNUZ,), 304, 65536),
    "gfx950": Target(GPUTarget("hip", "gfx950", 64), (E4M3, E5M2), 256, 163840),
}


class FakeDriver(DriverBase):
    """Stands in for a GPU's driver: it knows the target, and nothing can be launched."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__()
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> Any:
        # compiled kernels are kept for each device: one device for each target
        return self.target

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed without a GPU")


def builds_for(case: Case, target: Target) -> bool:
    if case.hopper and target is not TARGETS["sm_90"]:
        return False
    if case.nvidia and target.gpu.backend != "cuda":
        return False
    narrow = [value for value in case.arguments.values() if value in FLOAT8]
    return case.anywhere or all(dtype in target.float8 for dtype in narrow)


def builds(cases: list[Case], every: bool) -> list[tuple[str, Case]]:
    """The targets for which cases are compiled, by target. every: each case for all that build it.

    Otherwise each is compiled for sm_90 and for one other, which goes round, and the first of each function and format for all: what a
    format needs of a compiler every target has shown, and what else a case is, one more than Hopper.
    """
    others = [name for name in TARGETS if name != "sm_90"]
    chosen: dict[str, list[Case]] = {name: [] for name in TARGETS}
    seen: set[tuple[Any, ...]] = set()
    turn = 0
    for case in cases:
        able = [name for name in others if builds_for(case, TARGETS[name])]
        kind = case.call, case.arguments.get("dtype"), case.anywhere
        some = able if every or kind not in seen else [able[turn % len(able)]] if able else []
        turn += kind in seen
        seen.add(kind)
        for name in ("sm_90", *some):
            if builds_for(case, TARGETS[name]):
                chosen[name].append(case)
    return [(name, case) for name in TARGETS for case in chosen[name]]


# Moves of 16 bytes a thread, or of a tile by TMA, in PTX and in AMD's assembly.
WIDE_LOAD = re.compile(
    r"\bld\.global[.\w:]*\.(?:v4\.[bfu]32|v2\.[bfu]64)|cp\.async\.c[ag]\.shared\.global[^;]*, (?:16|0x10)[,;]"
    r"|cp\.async\.bulk\.tensor[.\w]*\.shared::\w+\.global|\b(?:global|buffer)_load_(?:lds_)?dwordx4"
)
WIDE_STORE = re.compile(
    r"\bst\.global[.\w:]*\.(?:v4\.[bfu]32|v2\.[bfu]64)|cp\.async\.bulk\.tensor[.\w]*\.global\.shared"
    r"|\b(?:global|buffer)_store_dwordx4"
)


def dump_of(cubin: bytes, *options: str) -> str:
    """What cuobjdump says of a kernel's code. It lies in Triton's cache, as the code does: a kernel that several tests compile, or that
    is as it was the last time, is disassembled once."""
    tool = knobs.nvidia.cuobjdump
    cache = get_cache_manager(hashlib.sha256(repr((tool.version, options)).encode() + cubin).hexdigest())
    kept = cache.get_file("dump")
    if kept is not None:
        return zlib.decompress(Path(kept).read_bytes()).decode()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run([tool.path, *options, file.name], capture_output=True, text=True, check=True).stdout
    cache.put(zlib.compress(dump.encode(), 1), "dump")
    return dump


def measure(asm: dict[str, Any], disassemble: bool = True) -> dict[str, Any]:
    """What the compiler made of a kernel: registers, bytes of spilled registers (AMD: registers), 16-byte loads and stores, and, of the
    kinds that are looked for, its instructions. disassemble: NVIDIA's too, which takes longer than compiling."""
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        spills = sum(int(count) for count in re.findall(r"\.vgpr_spill_count:\s+(\d+)", text))
        registers = max(int(count) for count in re.findall(r"\.vgpr_count:\s+(\d+)", text))
        instructions = Counter(re.findall(r"^\s+(v_mfma\w*|v_cvt_pk_fp8\w*)", text, re.M))
        beside_products, twice, alone = 0, 0, 0
    else:
        text = asm["ptx"]
        dump = dump_of(asm["cubin"], *(["-sass"] if disassemble else []), "-res-usage")
        usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
        registers, spills = usage["REG"], usage["STACK"] + usage["LOCAL"]
        instructions = Counter(name for _, name, _ in INSTRUCTION.findall(dump))
        beside_products = spills_beside_products(dump)
        twice, alone = barriers_and_arrivals(text)
    return {
        "registers": registers,
        "spills": spills,
        "spills_beside_products": beside_products,
        "barriers_twice": twice,
        "arrivals_alone": alone,
        "wide_loads": len(WIDE_LOAD.findall(text)),
        "wide_stores": len(WIDE_STORE.findall(text)),
        "instructions": dict(instructions),
    }


def compile_operation(name: str, every: bool = True, disassembled: tuple[str, ...] = tuple(TARGETS)) -> None:
    launched: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append((self.fn.__name__, compiled))
        return compiled

    JITFunction.run = compile_only
    # sends CPU tensors to the kernels
    os.environ["MOEQUANT_CPU_KERNELS"] = "1"
    for target_name, group in itertools.groupby(builds(compile_cases(name), every), lambda build: build[0]):
        target = TARGETS[target_name]
        triton.runtime.driver.set_active(FakeDriver(target.gpu))
        limits = Limits(target.multiprocessors, target.shared_memory, target.tma)
        grouped_gemm_module.device_limits = lambda device, limits=limits: limits
        for _, case in group:
            dtype = str(case.arguments.get("dtype")).removeprefix("torch.")
            report = {
                "operation": name,
                "target": target_name,
                "case": str(case),
                "dtype": dtype,
                "wide": case.wide,
                "may_spill": case.may_spill,
            }
            # said first, so that the reader knows which one a crash belongs to
            print(json.dumps(report), flush=True)
            launched.clear()
            common.converts_fnuz = lambda device, native=target_name == "gfx942": native
            common.why_no_gluon = lambda device, wanted=case.hopper: None if wanted else "another kernel is compiled"
            knows_pdl = target.gpu.backend == "cuda" and int(target.gpu.arch) >= 90
            for module in PDL_MODULES:
                module.uses_pdl = lambda device, knows=knows_pdl: knows
            case.call(**case.arguments)
            assert launched, f"{case.call.__name__} launched no kernel"
            assert all(("hopper" in kernel) == case.hopper for kernel, _ in launched), f"{launched} for {case}"
            for kernel, compiled in launched:
                print(json.dumps({**report, "kernel": kernel, **measure(compiled.asm, target_name in disassembled)}), flush=True)
    JITFunction.run = run


def serve() -> None:
    """Compiles what the lines of the standard input ask for, an operation and the targets whose code is disassembled, each in a process
    of its own that has imported all there is, and says after each how that process ended."""
    for line in sys.stdin:
        name, disassembled = json.loads(line)
        child = os.fork()
        if not child:
            status = 1
            try:
                compile_operation(name, every=False, disassembled=disassembled)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(json.dumps({"status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}), flush=True)


if __name__ == "__main__":
    unknown = [name for name in sys.argv[1:] if name not in SUBJECTS]
    if unknown:
        sys.exit(f"there is no kernel {', '.join(unknown)}; those in kernels/ are {', '.join(SUBJECTS)}")
    for operation in sys.argv[1:]:
        compile_operation(operation)
    if not sys.argv[1:]:
        serve()
