/* Computes the averages of the stripes, and their roots. */

#ifndef STRIPED_STRIPES_H
#define STRIPED_STRIPES_H

#include <math.h>
#include <stdint.h>

#include "entry.h"

/* Averages the sums of one band into its stripes. */
MULTIVERSIONED
static void average_band(const Entry *e, int64_t band, const Settings *settings)
{
    int64_t row_elements = e->block_rows * e->column_blocks;
    float beta2 = (float)settings->beta2;
    float row_weight = (float)((1 - settings->beta2) / (double)(e->columns / e->column_blocks));
    float col_weight = (float)((1 - settings->beta2) / (double)e->block_rows);
    float *restrict row = e->exp_avg_sq_row + band * row_elements;
    const float *restrict row_sums = e->row_sums + band * row_elements;
    for (int64_t i = 0; i < row_elements; i++) row[i] = row[i] * beta2 + row_weight * row_sums[i];
    float *restrict col = e->exp_avg_sq_col + band * e->columns;
    const float *restrict col_sums = e->col_sums + band * e->columns;
    for (int64_t j = 0; j < e->columns; j++) col[j] = col[j] * beta2 + col_weight * col_sums[j];
}

/* Computes the roots a and c of one band's stripes, which are the stripes of step `step`. */
MULTIVERSIONED
static void compute_roots(const Entry *e, int64_t band, const Settings *settings, int64_t step)
{
    int64_t row_elements = e->block_rows * e->column_blocks;
    float correction = (float)(1 - pow(settings->beta2, (double)step));
    const float *restrict col = e->exp_avg_sq_col + band * e->columns;
    float *restrict c = e->col_roots + band * e->columns;
    for (int64_t j = 0; j < e->columns; j++) c[j] = sqrtf(col[j] / correction);

    const float *restrict row = e->exp_avg_sq_row + band * row_elements;
    float *restrict a = e->row_roots + band * row_elements;
    for (int64_t block = 0; block < e->column_blocks; block++) {
        double sum = 0;
        for (int64_t i = block; i < row_elements; i += e->column_blocks) sum += row[i];
        float mean = (float)(sum / (double)e->block_rows);
        /* 0/0 is an all-zero gradient, which moves nothing; an Inf gives NaN, as in AdamW */
        float divisor = mean == 0 ? 1.0f : isinf(mean) ? NAN : mean;
        if (e->column_blocks == 1) /* compilers vectorize a loop with a constant stride */
            for (int64_t i = 0; i < row_elements; i++) a[i] = sqrtf(row[i] / divisor);
        else
            for (int64_t i = block; i < row_elements; i += e->column_blocks)
                a[i] = sqrtf(row[i] / divisor);
    }
}

#endif
