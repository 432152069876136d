"""The Hopper kernels compile with every release of Triton that is said to run them, as they do with the installed one.

`.ci/fetch_tritons` fetches the releases; without network these tests are skipped, and then say nothing of the releases that are missing.
"""

from __future__ import annotations

import itertools

import pytest

from triton_releases import OPERATIONS, PAGE, RELEASES, TURNED, cells_of, compiled, is_here, page, run, summary

COMMAND = "python tests/triton_releases.py"

# how many bytes of registers may be spilled around the loops of products: once for each tile, next to thousands of products
SPILLED = {"3.9.0": 64}
PRODUCTS = {"float8_e4m3fn": "QGMMA", "int8": "IGMMA", "None": "IGMMA"}


def needs(release: str) -> None:
    if not is_here(release):
        pytest.skip(f"Triton {release} is not here, and nothing is known of it: run .ci/fetch_tritons, which needs network")


@pytest.mark.parametrize("release", RELEASES)
def test_every_configuration_compiles(release):
    needs(release)
    of_operations = compiled(release)
    for report in itertools.chain(*of_operations):
        name = f"{report['case']}: {report['registers']} registers, {report['spills']} bytes spilled"
        if report["operation"] in TURNED:
            # two programs of four warps on a multiprocessor or three; through shared memory goes a warp's largest number alone
            if report["operation"] == "quantize_weight_hopper":
                two = "turned=True" not in report["case"] or "both=True" in report["case"]
            else:
                two = "dtype=bfloat16" in report["case"]
            assert report["registers"] <= (255 if two else 168), name
            assert report["spills"] == 0 and report["wide_stores"], name
            assert report["instructions"].get("STS", 0) <= 2, f"{name}, {report['instructions']}"
            continue
        assert report["instructions"].get(PRODUCTS[report["dtype"]]), name
        assert report["wide_loads"] and report["wide_stores"] and report["registers"] == 168, name
        assert report["spills_beside_products"] == 0, name
        assert report["barriers_twice"] == report["arrivals_alone"] == 0, f"{name}, {report}"
        assert report["spills"] <= max(SPILLED.get(release, 0), 16 * report["may_spill"]), name
    assert cells_of(PAGE.read_text())[release] == [summary(kernels) for kernels in of_operations], f"run {COMMAND}"


def test_the_page_of_versions_says_what_is_so():
    text = PAGE.read_text()
    assert text == page(cells_of(text)), f"run {COMMAND} --keep"


PROBE = """
import torch, triton
from triton.runtime.jit import JITFunction
from compile_kernels import TARGETS, FakeDriver
from moequant.kernels.library import triton_versions

triton.runtime.driver.set_active(FakeDriver(TARGETS["sm_90"].gpu))
run, launched = JITFunction.run, []

def compile_only(self, *args, grid, warmup, **kwargs):
    launched.append((self.fn.__name__, grid))
    return run(self, *args, grid=grid, warmup=True, **kwargs)

JITFunction.run = compile_only
{change}
print(triton_versions.probe(torch.device("cpu")), launched)
"""
LAUNCHES = str([(f"{kernel}_kernel", (0,)) for kernel in OPERATIONS])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param("", f"None {LAUNCHES}", id="as it is"),
        pytest.param(
            "import triton.experimental.gluon.language as gl; del gl.barrier, gl.warp_specialize",
            "AttributeError",
            id="a name gone",
        ),
        pytest.param(
            "from triton.experimental.gluon.language.nvidia.hopper import mbarrier; mbarrier.wait = None",
            "Error",
            id="another meaning",
        ),
    ],
)
def test_an_unknown_triton_is_judged_by_compiling_the_kernels(change, says, tmp_path):
    newest = list(RELEASES)[-1]
    needs(newest)
    # Triton's cache does not see that its own functions are others: a changed one begins with an empty cache
    cache = {"TRITON_CACHE_DIR": str(tmp_path)} if change else {}
    result = run(newest, "-c", PROBE.format(change=change), **cache)
    assert result.returncode == 0, result.stderr[-4000:]
    assert says in result.stdout
    assert result.stdout.startswith("None") == (not change)
