"""Instructions an element, read from machine code."""

import pytest

from benchmarks import sass

# Two loops, one inside the other, and the loop to itself that ends every kernel.
WALK = """
kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P0 LDG.E.U16.CONSTANT R6, desc[UR4][R2.64+0x8] ;
        /*0040*/                   FFMA R5, R4, R4, R5 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/              @!P2 BRA `(.L_x_2) ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
"""


def test_loops_and_loads_are_found():
    code = sass.parse(WALK)
    assert len(code.instructions) == 9 and code.count("LDG") == 2
    assert code.main_loop() == sass.Loop(2, 5) and sass.Loop(1, 6) in code.loops
    assert sass.by_loads(1, 2)(code) == pytest.approx(4 / 5)  # ten bytes are five of them
    assert sass.by_loads(3, 2)(code) == pytest.approx(4 / 5 * 3)
    assert sass.by_elements(2)(code) == 2
    assert sass.by_elements(2)(sass.parse("/*0000*/ EXIT ;")) is None


def test_a_product_repeats_its_loop_until_it_is_complete():
    line = "        /*0000*/                   {} ;\n"
    body = line.format("HMMA.16816.F32.BF16 R4, R8, R12, R4") * 2 + line.format("LDSM.16.M88 R4")
    text = f".L_x_1:\n{body}        /*0030*/  @P0 BRA `(.L_x_1) ;\n" + line.format("EXIT")
    # 32 x 8 x 64 by two warps: four HMMA of 16 x 8 x 16 each, so two passes of the loop.
    assert sass.of_product(32, 8, 64, 2)(sass.parse(text)) == pytest.approx((5 + 4) * 64 / 256)


def test_parts_tiles_and_their_end_are_run_by_fewer_and_fewer_programs():
    line, back = "        /*0000*/   {} ;\n", "        /*0030*/  @P0 BRA `({}) ;\n"
    names = (
        "MOV R1, R2",
        "LDGSTS.E.128 [R1], [R2]",
        "HMMA.16816.F32 R4, R8, R12, R4",
        "FADD R1, R2, R3",
    )
    move, load, multiply, merge = map(line.format, names)
    count, leave = line.format("ATOMG.E.ADD.STRONG.GPU PT, R2, [R4], R3"), line.format("EXIT")
    # One walk is a loop of a step each time, the other is unrolled.
    walks = f".L_x_1:\n{load}{multiply}{back.format('.L_x_1')}" + multiply * 4
    end = f".L_x_2:\n{merge}{back.format('.L_x_2')}" + leave
    text = move + walks + count + merge * 5 + count + end
    # Each is 4 steps: 12 instructions in the loop, 4 unrolled, of which half is counted.
    first, tile, last = 1 + 8, 6, 4 + 2 * 2
    found = sass.of_arrivals(96, 3, 3, 8, 4)(sass.parse(text))
    assert found == pytest.approx((3 * (3 * first + tile) + last) * 128 / 96)
    whole = sass.of_arrivals(96, 1, 3, 8, 4)(sass.parse(text.replace(count, "", 1)))
    assert whole == pytest.approx((3 * (1 + 16 + 5) + last) * 128 / 96)
    assert sass.of_arrivals(96, 1, 3, 8, 4)(sass.parse(text)) is None
