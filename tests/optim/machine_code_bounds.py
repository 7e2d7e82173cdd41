"""Bounds on the machine code of the kernels, for sm_80 and sm_90, and Triton from 3.6 on.

An H100 can start 128 instructions of threads in a cycle of a multiprocessor, in which its memory
moves 12 bytes. So an update that moves 20 bytes per element hides its arithmetic behind memory up
to about 200 instructions, if enough warps run at a time: this is why registers have bounds, too.
With up to 80 registers, 24 warps run at a time, with 96 there are 20, and with 128 there are 16.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Bound(NamedTuple):
    """What a kernel may use at most.

    Attributes:
        instructions_per_element: Of a thread, in an iteration of the main loop.
        registers: Of a thread.
        reason: What the instructions or the registers are for.
    """

    instructions_per_element: float
    registers: int
    reason: str


_SUMS = "sums of squares: one row's over the lanes of a warp, the columns' in registers"
_FUSED = "as without `fused_statistics`, and 5 to 7 instructions and up to 32 registers for sums"
_FOLDED = "no gradient, no new momentum, and no codes to compute"
_HASH = "16 of the instructions compute the bits that round stochastically, and use them"
_LOW_BITS = "as without `low_bits`, and 16 instructions that join, round and split 24 bits"
_ODD = "elements one by one, each with an address: right, and as fast as its many loads allow"

# the first pattern that matches the whole name counts
BOUNDS: dict[str, Bound] = {
    # statistics
    ".*statistics float32 unaligned.*": Bound(8, 255, _ODD),
    ".*statistics float32 stages=2": Bound(10.5, 128, "copies to and from shared memory"),
    ".*statistics float32.*": Bound(9.3, 128, _SUMS),
    ".*statistics bfloat16.*": Bound(7.5, 80, _SUMS),
    # the update in other layouts
    "matrices .* unaligned .*": Bound(140, 255, _ODD),
    "matrices .* not one_block fused_statistics": Bound(70, 148, "two sums of each row"),
    "matrices .* not one_block": Bound(56, 96, "two roots of each row"),
    # A/B variants
    "matrices float32 float32 approximate_reciprocal": Bound(
        21, 80, "2 instructions divide, instead of 8"
    ),
    "matrices float32 float32 stages=2 approximate_reciprocal": Bound(26, 80, "both of the others"),
    "matrices float32 float32 stages=2": Bound(33, 80, "copies to and from shared memory"),
    "matrices .* stages=2 approximate_reciprocal": Bound(70, 112, "both, with codes"),
    # the update of float32 parameters
    "matrices float32 float32": Bound(28, 80, "8 of the instructions divide"),
    "matrices float32 float32 fused_statistics": Bound(35, 128, _FUSED),
    "matrices float32 (float32|bfloat16) folded": Bound(24.5, 56, _FOLDED),
    "matrices float32 bfloat16": Bound(29.5, 80, "as with float32, and conversions"),
    "matrices float32 bfloat16 fused_statistics": Bound(36, 128, _FUSED),
    "matrices float32 (int8|int4) folded": Bound(32.5, 64, _FOLDED),
    "matrices float32 (int8|int4)( nesterov| maximize| not from_start)?": Bound(
        54, 88, "codes: a square root of each element, and the largest of each row"
    ),
    "matrices float32 (int8|int4) fused_statistics": Bound(59, 128, _FUSED),
    # the update of parameters in 16 bits
    "matrices bfloat16 float32": Bound(48, 96, _HASH),
    "matrices bfloat16 bfloat16": Bound(49, 80, _HASH),
    "matrices bfloat16 (float32|bfloat16) fused_statistics": Bound(56, 104, _FUSED),
    "matrices bfloat16 (float32|bfloat16) folded": Bound(44, 64, _FOLDED),
    "matrices bfloat16 (int8|int4)": Bound(74, 88, f"{_HASH}, and codes of subnormal blocks, too"),
    "matrices bfloat16 (int8|int4) fused_statistics": Bound(79, 128, _FUSED),
    "matrices bfloat16 (int8|int4) folded": Bound(51, 64, _FOLDED),
    "matrices bfloat16 (float32|bfloat16) low_bits": Bound(67, 112, _LOW_BITS),
    "matrices bfloat16 (int8|int4) low_bits": Bound(92, 112, _LOW_BITS),
    "matrices bfloat16 int8 low_bits folded": Bound(66, 88, _LOW_BITS),
    "matrices bfloat16 int8 low_bits fused_statistics": Bound(98, 128, _LOW_BITS),
    "matrices float16 float32 fused_statistics": Bound(64, 128, _FUSED),
    "matrices float16 int4": Bound(81, 80, f"{_HASH}, codes, and subnormal numbers"),
    # folding
    "fold float32 float32 is_first": Bound(14, 80, "interpolation, and sums of squares"),
    "fold float32 bfloat16 .*": Bound(36, 96, "interpolation, sums, and random signs"),
    "fold bfloat16 (int8|int4) is_first.*": Bound(41, 92, "codes, sums; Triton 3.6 needs 89"),
    "fold bfloat16 int8 has_sketch.*": Bound(58, 128, "codes, sums, and random signs"),
    "fold .* not one_block.*": Bound(73, 168, "a loop over the blocks in a tile"),
    "fold .* unaligned .*": Bound(85, 176, _ODD),
    # sums and stripes: their loops are short, and a step needs a few microseconds for all
    "(first_)?combine|add_folded.*": Bound(13, 40, "32 partial sums of each sum, in a fixed order"),
    "means": Bound(26, 32, "one warp adds up a few sums"),
    "stripes before_update has_roots": Bound(75, 40, "numbers of the step, in float64"),
    "stripes .*": Bound(172, 80, "roots that are rounded correctly, and numbers in float64"),
    # vectors: no loop, and their elements are few
    "vectors .*": Bound(147, 64, "divisions and roots that are rounded correctly, and float64"),
}


def bound_of(name: str) -> Bound:
    """Returns the bound of a variant by its name.

    Raises:
        LookupError: There is none.
    """
    for pattern, bound in BOUNDS.items():
        if re.fullmatch(pattern, name):
            return bound
    raise LookupError(f"no bound for {name!r}: add one, with its reason, to BOUNDS")
