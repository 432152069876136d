"""Spilled registers are found where they cost: in the loops of products, not around them; and barriers that are too many, or missing."""

from __future__ import annotations

import pytest

from sass import barriers_and_arrivals, spills_beside_products

BODY = """
        /*0000*/                   STL [R1], R0 ;
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7], R0 ;
        /*0020*/              @!P0 BRA 0x00c0 ;
        /*0030*/                   {outer} ;
        /*0040*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], RZ, !UPT ;
        /*0050*/                   {inner} ;
        /*0060*/              @!P0 BRA 0x0040 ;
        /*0070*/               @P1 LDL R0, [R1] ;
        /*0080*/              @!P2 BRA 0x0030 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   NOP ;
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7], R0 ;
        /*00d0*/               @P0 BRA 0x0030 ;
"""


@pytest.mark.parametrize(
    ("outer", "inner", "found"),
    [("NOP", "NOP", 0), ("LDL R2, [R1+0x4]", "NOP", 0), ("NOP", "LDL R2, [R1+0x4]", 1), ("NOP", "@P0 STL.64 [R1+0x8], R2", 1)],
)
def test_spills_count_in_the_loop_of_products_alone(outer, inner, found):
    assert spills_beside_products(BODY.format(outer=outer, inner=inner)) == found


def test_without_a_loop_all_spills_count():
    text = BODY.format(outer="NOP", inner="NOP").replace("@!P0 BRA 0x0040", "NOP").replace("@!P2 BRA 0x0030", "NOP")
    assert spills_beside_products(text) == 2


def test_a_kernel_without_products_has_none():
    assert spills_beside_products("/*0000*/ STL [R1], R0 ;\n/*0010*/ EXIT ;") == 0


ARRIVES = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["wgmma.wait_group.sync.aligned 0;", "bar.sync \t0, 128;", "setp.eq.s32 %p1, %r2, 0;", ARRIVES, ARRIVES], (0, 0)),
        (["bar.sync \t0, 128;", ".loc\t2 231 4", "// begin inline asm", "bar.sync \t0, 128;", ARRIVES], (1, 0)),
        (["bar.sync \t0, 128;", "ld.shared.b32 %r3, [%r4];", "bar.sync \t0, 128;", ARRIVES], (0, 0)),
        (["bar.sync \t0, 128;", "ld.shared.b32 %r3, [%r4];", ARRIVES], (0, 1)),
        (["$L__BB0_1:", ARRIVES, "bar.warp.sync \t-1;", ARRIVES], (0, 1)),
    ],
    ids=["one", "twice", "two with work between", "none", "none in a loop"],
)
def test_barriers_that_follow_each_other_and_arrivals_without_one_are_counted(lines, found):
    assert barriers_and_arrivals("\n".join(lines)) == found
