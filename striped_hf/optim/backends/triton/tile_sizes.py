"""Tile sizes: the numbers of elements that one program of each kernel works on."""

import triton.language as tl

# A warp of the update reads a row of 128 columns. A lane reads the same four elements of every
# tensor, 16 bytes in float32, so that Triton converts no layout. A thread has 16 elements (update)
# or 32 (statistics) of every tensor at a time. The statistics of float32 have all of these loads in
# flight together. The update has not: the assembler moves each load to its use, so that a warp
# waits for memory 2 to 6 times in each tile (``python -m benchmarks.gpu_static``). The other warps
# of a multiprocessor, 16 to 32, work meanwhile. ``arguments.Tuning`` has the alternative.
STATISTICS_TILE_ROWS, STATISTICS_TILE_COLUMNS = 16, 256
UPDATE_TILE_ROWS = 16
# Rows that one program of the update works on, tile by tile. The data that it reads once (its
# shape, and the roots of its columns) are less than a hundredth of these rows.
UPDATED_ROWS = tl.constexpr(64)
# Rows whose squares one program adds up. More rows leave fewer partial sums (4 bytes per element,
# divided by the rows), which is right for large models. Fewer rows make more programs, which small
# models need.
SUMMED_ROWS_OF_SMALL_MODELS, SUMMED_ROWS_OF_LARGE_MODELS = 128, 256
LARGE_MODEL = 1 << 29  # elements of all matrices
# Partial sums that one program reads at a time: the number for each sum, and the number of sums.
COMBINED_PARTIALS, COMBINED_WIDTH = 32, 64
# Tiles, and additions of partial sums, that one program skips if their entries are not in their
# first step (in a lagged step whose number only the device knows).
TILES_OF_FIRST_STEP = 32
# Elements of a stripe that one program averages, 8 for each thread: with 16 it spills registers. A
# block with more rows has several programs (25 for 50,257 rows), and one more launch adds up their
# sums.
STRIPE_BLOCK = 2048
TOTALS_BLOCK = 64  # sums of segments that one program adds up at a time
VECTOR_BLOCK = 1024  # elements of a 0-D or 1-D parameter


def update_tile_rows(transposed: bool, low_bits: bool) -> int:
    """Returns the rows of a tile of the update.

    Transposed matrices with low bits have two layouts and four tensors, so that a thread needs an
    address for each element of each tensor. With 16 rows it spills registers: 109 instructions for
    each element, with 8 rows 95 (sm_90).
    """
    return UPDATE_TILE_ROWS // 2 if transposed and low_bits else UPDATE_TILE_ROWS


def folded_rows(elements: int) -> int:
    """Returns the number of rows that one program of ``fold_kernel`` folds, by a matrix's elements.

    Small matrices need many programs, about a thousand if there are enough rows. Large matrices
    need few partial sums: with 2^25 elements or more, 3/256 float32 for each element.
    """
    return 64 if elements < 1 << 24 else 128 if elements < 1 << 25 else 256
