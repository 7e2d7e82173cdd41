/* Adds gradients to the momentum during the backward pass: reference.py's fold. */

#ifndef STRIPED_FOLD_H
#define STRIPED_FOLD_H

#include <stdint.h>

#include "entry.h"
#include "momentum.h"
#include "numbers.h"
#include "parameters.h"
#include "update.h"

/* How a gradient is added. */
typedef struct {
    int64_t is_first;   /* it is the first of its step: the momentum decays */
    double coefficient; /* a factor of the gradient */
} Fold;

/* Adds n elements of a gradient to a momentum. */
INLINE void fold_elements(float *restrict m, const float *restrict g, int64_t n, int is_first,
                          const Step *step)
{
    Step s = *step;
    if (is_first)
        for (int64_t i = 0; i < n; i++) m[i] = average(m[i], g[i], &s);
    else
        for (int64_t i = 0; i < n; i++) m[i] += s.weight1 * g[i];
}

/* Returns the sum of n elements, each with its highest random bit as its sign.
 *
 * index: the index of the first element in the whole parameter.
 * A compiler may not reorder a sum, so the sum has parts that vectors can hold.
 */
INLINE float signed_sum(const float *restrict g, const Entry *e, int64_t index, int64_t n)
{
    uint32_t random[CODE_BLOCK];
    float parts[PARTIAL_SUMS] = {0};
    random_bits(random, e, index, n);
    int64_t i = 0;
    for (; i + PARTIAL_SUMS <= n; i += PARTIAL_SUMS)
        for (int64_t k = 0; k < PARTIAL_SUMS; k++)
            parts[k] += float_of(bits_of(g[i + k]) ^ (random[i + k] & 0x80000000));
    for (int64_t k = 0; k < n - i; k++)
        parts[k] += float_of(bits_of(g[i + k]) ^ (random[i + k] & 0x80000000));
    for (int64_t half = PARTIAL_SUMS / 2; half > 0; half /= 2)
        for (int64_t k = 0; k < half; k++) parts[k] += parts[k + half];
    return parts[0];
}

/* Adds the gradient of n <= CODE_BLOCK elements of a row, from a multiple of CODE_BLOCK on. */
INLINE void fold_chunk(const Entry *e, int64_t row, int64_t column, int64_t n,
                       const Settings *settings, const Step *step, const Fold *fold)
{
    int64_t offset = row * e->columns + column;
    float g_buffer[CODE_BLOCK], m_buffer[CODE_BLOCK];
    const float *g = load_gradient(e, offset, n, settings, g_buffer);
    if (fold->coefficient != 1) {
        float coefficient = (float)fold->coefficient;
        for (int64_t i = 0; i < n; i++) g_buffer[i] = g[i] * coefficient;
        g = g_buffer;
    }
    float *m = e->momentum_dtype == FLOAT32 ? momentum_at(e, row, column) : m_buffer;
    uint16_t *halves = e->momentum_dtype == BFLOAT16 ? momentum_at(e, row, column) : NULL;
    if (halves)
        for (int64_t i = 0; i < n; i++) m[i] = from_bfloat16(halves[i]);
    else if (is_coded(e))
        decode(e, row, column, n, m);
    fold_elements(m, g, n, fold->is_first != 0, step);
    if (halves)
        for (int64_t i = 0; i < n; i++) halves[i] = to_bfloat16(m[i]);
    else if (is_coded(e))
        encode(e, row, column, n, m);
    if (e->sketch) {
        int64_t blocks = (e->columns + CODE_BLOCK - 1) / CODE_BLOCK;
        int64_t index = e->whole_start + row * e->whole_stride + column;
        e->sketch[row * blocks + column / CODE_BLOCK] += signed_sum(g, e, index, n);
    }
}

/* Adds the gradient of rows to momentum and sketch; first: the row in the entry. */
MULTIVERSIONED
static void fold_rows(const Entry *e, int64_t first, int64_t rows, const Settings *settings,
                      const Fold *fold)
{
    Step step = step_of(e, settings);
    for (int64_t row = first; row < first + rows; row++)
        for (int64_t column = 0; column < e->columns; column += CODE_BLOCK) {
            int64_t rest = e->columns - column;
            fold_chunk(e, row, column, rest < CODE_BLOCK ? rest : CODE_BLOCK, settings, &step,
                       fold);
        }
}

#endif
