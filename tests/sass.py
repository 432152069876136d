"""What a kernel's SASS, or its PTX, says that the compiler's own summary does not."""

from __future__ import annotations

import re

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)([^;]*);")
# products of the tensor cores, and the moves of registers that are spilled
PRODUCTS = ("QGMMA", "IGMMA", "HGMMA")
SPILLS = ("LDL", "STL")


def spills_beside_products(dump: str) -> int:
    """Moves of spilled registers in the innermost loops that hold products, where the tensor cores would wait for them; all moves, if
    products are in no loop. dump: cuobjdump's."""
    instructions = [(int(address, 16), name, rest) for address, name, rest in INSTRUCTION.findall(dump)]
    # what follows is of waits that did not succeed at once, each with a branch to where it came from
    end = max((address for address, name, _ in instructions if name == "EXIT"), default=0)
    branches = [
        (re.search(r"0x([0-9a-f]+)", rest), address) for address, name, rest in instructions if name == "BRA" and address < end
    ]
    backward = [range(int(target[1], 16), address) for target, address in branches if target and int(target[1], 16) < address]
    products = [address for address, name, _ in instructions if name in PRODUCTS]
    loops = [loop for loop in backward if any(address in loop for address in products)] or [range(end)] * bool(products)
    innermost = [loop for loop in loops if not any(inner != loop and inner[0] in loop and inner[-1] in loop for inner in loops)]
    return sum(name in SPILLS and any(address in loop for loop in innermost) for address, name, _ in instructions)


def barriers_and_arrivals(ptx: str) -> tuple[int, int]:
    """How many barriers follow another one at once, which cost time for nothing; and how many arrivals come after something in shared
    memory that no barrier, or other arrival, has come after: one thread arrives for all of a partition, which have to be done by then.
    ptx: of a kernel."""
    lines = [line.strip() for line in ptx.splitlines()]
    twice = alone = 0
    barrier = touched = False
    for line in lines:
        if not line or line.startswith((".loc", "//", "{", "}")):
            continue
        if re.match(r"bar(rier)?\.", line):
            twice += barrier and line.startswith("bar.sync")
            barrier, touched = line.startswith("bar.sync"), False
            continue
        barrier = False
        if "mbarrier.arrive.shared" in line:
            alone += touched
        elif re.search(r"\.shared|wgmma", line) or line.endswith(":"):
            touched = True
    return twice, alone
