"""The reader of machine code, on listings as the disassembler prints them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks import sass

LISTING = """
        /*0000*/                   LDG.E.64 R2, desc[UR4][R8.64] ;          /* 0x0000000408027981 */
        /*0010*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0020*/                   LDG.E.128 R12, desc[UR4][R8.64+0x10] ;
        /*0030*/                   LDG.E.128 R16, desc[UR4][R8.64+0x20] ;
        /*0040*/                   FADD R12, R12, R16 ;
        /*0050*/                   LDG.E.U8 R20, desc[UR4][R8.64] ;
        /*0060*/                   FADD R20, R20, R12 ;
        /*0070*/              @!P1 STG.E.128 desc[UR4][R10.64], R12 ;
        /*0080*/               @P0 BRA 0x20 ;
        /*0090*/                   STL [R1], R20 ;
        /*00a0*/                   EXIT ;
"""


def test_the_loop_that_reads_memory_is_found_and_described():
    code = tuple(sass.parse(LISTING))
    assert len(code) == 11
    loop = sass.hot_loop(code)
    assert (loop[0].address, loop[-1].address) == (0x20, 0x80)
    assert sass.widths(loop, "LDG") == {1: 1, 16: 2}
    assert sass.widths(loop, "STG") == {16: 1}
    assert (sass.spills(code), sass.spills(loop)) == (1, 0)


def test_loads_wait_for_each_other_only_if_a_use_is_between_them():
    """The two loads of 16 bytes are in flight together; the third one begins after the addition."""
    loop = sass.hot_loop(tuple(sass.parse(LISTING)))
    iteration = sass.simulate(loop, 1000)
    assert iteration.serial_waits == 2
    assert 2000 < iteration.cycles < 2100


def test_copies_to_shared_memory_are_waited_for_in_groups():
    """With one group in advance, a group may arrive an iteration after its copies began."""
    loop = tuple(
        sass.parse("""
        /*0000*/                   LDGSTS.E.128 [R5], desc[UR4][R8.64] ;
        /*0010*/                   LDGDEPBAR ;
        /*0020*/                   DEPBAR.LE SB0, 0x1 ;
        /*0030*/                   LDS.128 R12, [R6] ;
        /*0040*/                   FADD R12, R12, R13 ;
        """)
    )
    iteration = sass.simulate(loop, 1000)
    assert iteration.serial_waits == 1
    in_advance = iteration.cycles
    waiting = tuple(each for each in loop if each.name != "DEPBAR")
    assert sass.simulate(waiting, 1000).serial_waits == 0
    assert in_advance < 1000


def test_issue_cycles_count_the_busiest_part_of_a_scheduler():
    square_roots = sass.parse("/*0000*/ MUFU.SQRT R1, R2 ;\n/*0010*/ MUFU.RCP R3, R4 ;")
    assert sass.issue_cycles(tuple(square_roots)) == 16
    assert sass.issue_cycles(tuple(sass.parse(LISTING))) == 16
