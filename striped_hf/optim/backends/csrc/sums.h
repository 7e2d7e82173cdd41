/* Computes sums of squares by row and by column. */

#ifndef STRIPED_SUMS_H
#define STRIPED_SUMS_H

#include <stdint.h>

#include "entry.h"
#include "parameters.h"

/* Adds the squares of n elements of each of SUM_ROWS rows to col_sums and to row_sums.
 *
 * A row's sum has PARTIAL_SUMS parts, which vectors can hold. Compilers may not reorder a sum.
 */
INLINE void sum_chunk(const float *const *g, float *restrict col_sums, int64_t n,
                      double *restrict row_sums)
{
    float parts[SUM_ROWS][PARTIAL_SUMS] = {{0}};
    int64_t i = 0;
    for (; i + PARTIAL_SUMS <= n; i += PARTIAL_SUMS) {
        for (int64_t r = 0; r < SUM_ROWS; r++)
            for (int64_t k = 0; k < PARTIAL_SUMS; k += 16)
                __builtin_prefetch(g[r] + i + k + GRADIENT_AHEAD, 0, 2);
        for (int64_t k = 0; k < PARTIAL_SUMS; k++) {
            float square[SUM_ROWS], sum = 0;
            for (int64_t r = 0; r < SUM_ROWS; r++) {
                square[r] = g[r][i + k] * g[r][i + k];
                parts[r][k] += square[r];
                sum += square[r];
            }
            col_sums[i + k] += sum;
        }
    }
    for (int64_t r = 0; r < SUM_ROWS; r++) {
        for (int64_t k = 0; k < n - i; k++) {
            float square = g[r][i + k] * g[r][i + k];
            parts[r][k] += square;
            col_sums[i + k] += square;
        }
        for (int64_t half = PARTIAL_SUMS / 2; half > 0; half /= 2)
            for (int64_t k = 0; k < half; k++) parts[r][k] += parts[r][k + half];
        row_sums[r] += parts[r][0];
    }
}

/* Adds the squares of rows to col_sums, [columns], and writes the rows' own sums.
 *
 * first: the index of the first row in the entry.
 * The function reads SUM_ROWS distant rows together: one stream alone does not use the memory's
 * whole bandwidth.
 */
MULTIVERSIONED
static void sum_rows(const Entry *e, int64_t first, int64_t rows, float *restrict col_sums)
{
    int64_t columns = e->columns, block_columns = columns / e->column_blocks;
    int64_t apart = (rows + SUM_ROWS - 1) / SUM_ROWS;
    static const float zeros[SUM_CHUNK];
    float buffers[SUM_ROWS][SUM_CHUNK];
    for (int64_t i = 0; i < apart; i++) {
        for (int64_t block = 0; block < e->column_blocks; block++) {
            double row_sums[SUM_ROWS] = {0};
            int64_t end = (block + 1) * block_columns;
            for (int64_t j = block * block_columns; j < end; j += SUM_CHUNK) {
                int64_t n = end - j < SUM_CHUNK ? end - j : SUM_CHUNK;
                const float *g[SUM_ROWS];
                for (int64_t r = 0; r < SUM_ROWS; r++) {
                    int64_t offset = (first + r * apart + i) * columns + j;
                    g[r] = r * apart + i < rows
                               ? load(e->grad, e->grad_dtype, offset, n, buffers[r])
                               : zeros;
                }
                sum_chunk(g, col_sums + j, n, row_sums);
            }
            for (int64_t r = 0; r < SUM_ROWS && r * apart + i < rows; r++) {
                int64_t row = first + r * apart + i;
                e->row_sums[row * e->column_blocks + block] = (float)row_sums[r];
            }
        }
    }
}

#endif
