"""Compiles what a dispatch and a combine of the symmetric transport launch for an H100, and prints one JSON object for each launch.

    python tests/compile_pdl.py

A program of its own for the reasons that `compile_kernels.py` has. Of the launches that begin early it takes those with the most to hold:
each size of part, the largest K, bfloat16 rows, waves, weights that travel.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

import compile_peers as calls
from compile_case import BF16, E4M3, cases, empty
from compile_kernels import PDL_MODULES, TARGETS, FakeDriver, measure
from moequant.kernels.routing import route as route_module


def route() -> None:
    ids, rows_in_expert = empty(128, 8, dtype=torch.int64), empty(128, 8, dtype=torch.int32)
    route_module.route(ids, rows_in_expert, empty(256, dtype=torch.int32), status=empty(3, dtype=torch.int64), pdl=True)


CASES = [
    *cases(calls.push_tokens, *({"dtype": E4M3, "tokens": tokens} for tokens in (1, 128, 1024))),
    *cases(calls.push_tokens, {"dtype": E4M3, "tokens": 128, "per_rank": True}),
    *cases(calls.push_tokens, *({"dtype": E4M3, "tokens": 100, "wave": wave} for wave in (1, 2)), {"dtype": BF16}),
    *cases(calls.push_tokens, {"dtype": E4M3, "columns": 2048, "top_k": 10, "experts": 512, "ranks": 2, "per_rank": True}),
    *cases(calls.push_tokens, *({"dtype": E4M3, "tokens": 100, "wave": wave, "ragged": True} for wave in (0, 2))),
    *cases(calls.push_tokens, {"dtype": E4M3, "tokens": 128, "per_rank": True, "ragged": True}),
    *cases(calls.unpack_rows, *({"dtype": dtype, "expected_rows": rows} for dtype, rows in ((E4M3, 32), (BF16, 16), (E4M3, 4096)))),
    *cases(calls.unpack_rows, {"dtype": E4M3, "expected_rows": 32, "columns": 2880, "experts": 64, "ranks": 2}),
    *cases(calls.unpack_rows, *({"dtype": dtype, "expected_rows": 16, "ragged": True} for dtype in (E4M3, BF16))),
    *cases(
        calls.combine_shared,
        *({"tokens": tokens, "way": way} for way, tokens in (("pulled", 1), ("pulled", 32), ("pushed", 32), ("summed", 1))),
    ),
    *cases(calls.combine_shared, {"tokens": 64, "columns": 2048, "top_k": 10}, {"tokens": 1024}),
    *cases(calls.exchange_counts, {"experts": 512}, {"experts": 384}, {"experts": 512, "ranks": 2}),
    *cases(calls.exchange_counts, *({"experts": 512, "ranks": ranks, "ragged": True} for ranks in (2, 8))),
    *cases(calls.signal_and_wait, {}),
    *cases(route, {}),
]


def main() -> None:
    os.environ["MOEQUANT_CPU_KERNELS"] = "1"
    triton.runtime.driver.set_active(FakeDriver(TARGETS["sm_90"].gpu))
    modules: Any = (*PDL_MODULES, route_module)
    for module in modules:
        module.uses_pdl = lambda device: True
    run = JITFunction.run
    report: dict[str, Any] = {}

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled: Any = run(self, *args, grid=grid, warmup=True, **options)
        ptx = compiled.asm["ptx"]
        marks = [mark for mark in ("wait", "launch_dependents") if f"griddepcontrol.{mark}" in ptx]
        launch = {
            "kernel": self.fn.__name__,
            "early": options.get("launch_pdl", False),
            "limit": options.get("maxnreg"),
            "warps": options["num_warps"],
            # of waiting for the launch before and letting the next begin, in the order of the code
            "steps": sorted(marks, key=lambda mark: ptx.index(f"griddepcontrol.{mark}")),
            "shared": compiled.metadata.shared,
        }
        print(json.dumps({**report, **launch, **measure(compiled.asm, disassemble=False)}), flush=True)
        return compiled

    JITFunction.run = compile_only
    for case in CASES:
        report["case"] = str(case)
        case.call(**case.arguments)


if __name__ == "__main__":
    main()
