/* The update of parameters and momentum. */

#ifndef STRIPED_UPDATE_H
#define STRIPED_UPDATE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "entry.h"
#include "momentum.h"
#include "numbers.h"
#include "parameters.h"

typedef struct {
    float weight1, step_size, decay, eps; /* weight1 is 1 - beta1 */
    float floor; /* a matrix's root is at least this times |momentum| */
    int nesterov;
} Step;

/* Returns sqrt(u_t), as momentum_floor of reference.py. */
static double momentum_floor(const Settings *settings, double step)
{
    double beta1 = settings->beta1, beta2 = settings->beta2, inverse_sum = 1;
    if (step > 1 && beta1 > 0) {
        double log_r = 2 * log(beta1) - log(beta2), x = fabs(log_r); /* infinite for beta2 = 0 */
        inverse_sum = x > 0 ? expm1(-x) / expm1(-step * x) : 1 / step;
        inverse_sum *= exp((1 - step) * fmax(log_r, 0));
    }
    if (settings->nesterov)
        inverse_sum /= (1 + beta1) * (1 + beta1) * inverse_sum + beta1 * beta1 * (1 - inverse_sum);
    return sqrt((1 - beta2) / (1 - pow(beta2, step)) * inverse_sum) / (1 - beta1);
}

static Step step_of(const Entry *e, const Settings *settings)
{
    return (Step){
        .weight1 = (float)(1 - settings->beta1),
        .step_size = (float)(settings->lr / (1 - pow(settings->beta1, (double)e->step))),
        .decay = (float)(1 - settings->lr * settings->weight_decay),
        .eps = (float)settings->eps,
        .floor = (float)momentum_floor(settings, (double)e->step),
        .nesterov = settings->nesterov != 0,
    };
}

/* Starts at the nearer of the two, as torch's lerp does: else a large m would round a small g away.
 */
INLINE float average(float m, float g, const Step *s)
{
    float w = s->weight1;
    return w < 0.5f ? m + w * (g - m) : g - (1 - w) * (g - m);
}

/* Returns the numerator of the update by the new momentum m. */
INLINE float numerator_of(float m, float g, int nesterov, const Step *s)
{
    return nesterov ? average(m, g, s) : m;
}

/* Updates p; root: the root of the second moment, without eps. */
INLINE void update_element(float *restrict p, float numerator, float root, const Step *s)
{
    *p = *p * s->decay - s->step_size * numerator / (root + s->eps);
}

/* Updates an element of a matrix by its new momentum m. */
INLINE void update_striped(float *restrict p, float m, float g, float a, float c, int nesterov,
                           const Step *s)
{
    float numerator = numerator_of(m, g, nesterov, s);
    float root = a * c, smallest = fabsf(numerator) * s->floor;
    update_element(p, numerator, smallest > root ? smallest : root, s); /* a NaN root stays NaN */
}

/* Updates n elements whose momentum is m, or `stored` in bfloat16 if m is NULL.
 *
 * nesterov is a constant where this is inlined.
 */
INLINE void update_elements(float *restrict p, float *restrict m, uint16_t *restrict stored,
                            const float *restrict g, float a, const float *restrict c, int64_t n,
                            int nesterov, const Step *step)
{
    Step s = *step;
    if (m) {
        for (int64_t i = 0; i < n; i++) {
            m[i] = average(m[i], g[i], &s);
            update_striped(p + i, m[i], g[i], a, c[i], nesterov, &s);
        }
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        float new = average(from_bfloat16(stored[i]), g[i], &s);
        update_striped(p + i, new, g[i], a, c[i], nesterov, &s);
        stored[i] = to_bfloat16(new);
    }
}

/* The new momentum of a whole block of codes that is not encoded yet. The loop over the next block
 * encodes it: in a separate loop the processor would have no other work beside the square roots.
 */
typedef struct {
    float values[2][CODE_BLOCK]; /* of the pending block and of the next one, by turns */
    int which;                   /* the index of the pending one */
    float factor;                /* see encoding_factor */
    void *place;                 /* see momentum_at; NULL if none is pending */
} Pending;

/* Updates a whole block of codes, and encodes the pending block. The new block is pending then.
 *
 * nesterov is a constant where this is inlined.
 */
INLINE void update_coded(const Entry *e, int64_t row, int64_t column, float *restrict p,
                         const float *restrict g, float a, const float *restrict c, int nesterov,
                         const Step *step, Pending *pending)
{
    int8_t buffer[CODE_BLOCK + 1], buffer_before[CODE_BLOCK + 1];
    int in_place = e->momentum_dtype == INT8 && pending->place;
    const int8_t *restrict codes = load_codes(e, row, column, CODE_BLOCK, buffer);
    int8_t *restrict codes_before = in_place ? pending->place : buffer_before;
    const float *restrict before = pending->values[pending->which];
    float *restrict m = pending->values[!pending->which];
    float factor = pending->factor, *scale = scale_at(e, row, column);
    float kept = decoding_factor(e, *scale) * (1 - step->weight1);
    uint32_t largest = 0;
    Step s = *step;
    for (int64_t i = 0; i < CODE_BLOCK; i++) {
        m[i] = decoded(codes[i]) * kept + s.weight1 * g[i];
        update_striped(p + i, m[i], g[i], a, c[i], nesterov, &s);
        largest = larger(largest, m[i]);
        codes_before[i] = encoded(before[i], factor);
    }
    if (e->momentum_dtype == INT4 && pending->place)
        store_pairs(pending->place, codes_before, CODE_BLOCK);
    *scale = float_of(largest);
    if (is_not_finite(largest))
        memset(m, 0, sizeof(float) * CODE_BLOCK);
    pending->which = !pending->which;
    pending->factor = encoding_factor(e, *scale);
    pending->place = momentum_at(e, row, column);
}

/* Returns the gradient of the minimized objective; see load. */
INLINE const float *load_gradient(const Entry *e, int64_t offset, int64_t n,
                                  const Settings *settings, float *buffer)
{
    const float *g = load(e->grad, e->grad_dtype, offset, n, buffer);
    if (!settings->maximize)
        return g;
    for (int64_t i = 0; i < n; i++) buffer[i] = -g[i];
    return buffer;
}

/* Updates n elements of a row by its stored momentum, which includes the gradient; as update_chunk.
 */
INLINE void update_by_stored(const Entry *e, int64_t row, int64_t column, int64_t n,
                             const float *restrict c, const Settings *settings, const Step *step)
{
    int64_t block_columns = e->columns / e->column_blocks, offset = row * e->columns + column;
    float p_buffer[CODE_BLOCK], m_buffer[CODE_BLOCK];
    float *p = load_parameter(e, offset, n, p_buffer);
    const float *m = m_buffer;
    if (is_coded(e))
        decode(e, row, column, n, m_buffer);
    else
        m = load(momentum_at(e, row, column), e->momentum_dtype, 0, n, m_buffer);
    Step s = *step;
    int64_t block = e->column_blocks == 1 ? 0 : column / block_columns;
    for (int64_t i = 0; i < n; block++) { /* once, unless it crosses blocks of columns */
        int64_t end = (block + 1) * block_columns - column, stop = end < n ? end : n;
        float a = e->row_roots[row * e->column_blocks + block];
        for (; i < stop; i++) update_striped(p + i, m[i], 0, a, c[column + i], 0, &s);
    }
    if (p == p_buffer)
        store_parameter(p, e, offset, e->whole_start + row * e->whole_stride + column, n,
                        settings);
}

/* Updates n elements of a row from `column` on: at most CODE_BLOCK, unless needs_no_buffers. */
INLINE void update_chunk(const Entry *e, int64_t row, int64_t column, int64_t n,
                         const float *restrict c, const Settings *settings, const Step *step,
                         Pending *pending)
{
    int64_t block_columns = e->columns / e->column_blocks, offset = row * e->columns + column;
    float g_buffer[CODE_BLOCK], p_buffer[CODE_BLOCK], m_buffer[CODE_BLOCK];
    const float *g = load_gradient(e, offset, n, settings, g_buffer);
    float *p = load_parameter(e, offset, n, p_buffer);
    int64_t block = e->column_blocks == 1 ? 0 : column / block_columns;
    int single_block = column + n <= (block + 1) * block_columns;
    if (is_coded(e) && n == CODE_BLOCK && single_block && !is_tiny(*scale_at(e, row, column))) {
        float a = e->row_roots[row * e->column_blocks + block];
        if (step->nesterov)
            update_coded(e, row, column, p, g, a, c + column, 1, step, pending);
        else
            update_coded(e, row, column, p, g, a, c + column, 0, step, pending);
        if (p == p_buffer)
            store_parameter(p, e, offset, e->whole_start + row * e->whole_stride + column, n,
                            settings);
        return;
    }
    float *m = e->momentum_dtype == FLOAT32 ? momentum_at(e, row, column) : NULL;
    uint16_t *stored = e->momentum_dtype == BFLOAT16 ? momentum_at(e, row, column) : NULL;
    if (is_coded(e))
        decode(e, row, column, n, m = m_buffer);
    for (int64_t i = 0; i < n; block++) { /* once, unless it crosses blocks of columns */
        int64_t end = (block + 1) * block_columns - column, count = (end < n ? end : n) - i;
        const float *c_part = c + column + i, *g_part = g + i;
        float a = e->row_roots[row * e->column_blocks + block], *p_part = p + i;
        float *m_part = m ? m + i : NULL;
        uint16_t *stored_part = m ? NULL : stored + i;
        if (step->nesterov)
            update_elements(p_part, m_part, stored_part, g_part, a, c_part, count, 1, step);
        else
            update_elements(p_part, m_part, stored_part, g_part, a, c_part, count, 0, step);
        i += count;
    }
    if (p == p_buffer)
        store_parameter(p, e, offset, e->whole_start + row * e->whole_stride + column, n,
                        settings);
    if (is_coded(e))
        encode(e, row, column, n, m);
}

/* Whether a row needs no buffers: one long loop hides more of the memory's latency. */
INLINE int needs_no_buffers(const Entry *e, const Settings *settings)
{
    return e->param_dtype == FLOAT32 && e->grad_dtype == FLOAT32 && !settings->maximize &&
           !is_coded(e);
}

/* Updates momentum and parameter of rows of one band by the roots; first: the row in the band. */
MULTIVERSIONED
static void update_rows(const Entry *e, int64_t band, int64_t first, int64_t rows,
                        const Settings *settings)
{
    Step step = step_of(e, settings);
    Pending pending = {.place = NULL};
    const float *c = e->col_roots + band * e->columns;
    first += band * e->block_rows;
    for (int64_t row = first; row < first + rows; row++) {
        int64_t column = 0, rest = e->columns % CODE_BLOCK;
        if (!e->grad) {
            for (; column < e->columns; column += CODE_BLOCK) {
                int64_t n = e->columns - column;
                prefetch_parameter(e, row * e->columns + column);
                update_by_stored(e, row, column, n < CODE_BLOCK ? n : CODE_BLOCK, c, settings,
                                 &step);
            }
            continue;
        }
        if (needs_no_buffers(e, settings)) {
            update_chunk(e, row, 0, e->columns, c, settings, &step, &pending);
            continue;
        }
        for (; column + CODE_BLOCK <= e->columns; column += CODE_BLOCK) {
            prefetch_parameter(e, row * e->columns + column);
            update_chunk(e, row, column, CODE_BLOCK, c, settings, &step, &pending);
        }
        if (rest)
            update_chunk(e, row, column, rest, c, settings, &step, &pending);
    }
    if (pending.place)
        store_codes(e, pending.place, pending.values[pending.which], CODE_BLOCK, pending.factor);
}

/* AdamW's step with the exact second moment, on elements [first, first + count). */
MULTIVERSIONED
static void update_vector(const Entry *e, int64_t first, int64_t count, const Settings *settings)
{
    Step s = step_of(e, settings);
    float beta2 = (float)settings->beta2, weight2 = (float)(1 - settings->beta2);
    float correction = (float)sqrt(1 - pow(settings->beta2, (double)e->step));
    float g_buffer[CODE_BLOCK], p_buffer[CODE_BLOCK];
    for (int64_t j = first; j < first + count; j += CODE_BLOCK) {
        int64_t n = first + count - j < CODE_BLOCK ? first + count - j : CODE_BLOCK;
        const float *restrict g = load_gradient(e, j, n, settings, g_buffer);
        float *restrict p = load_parameter(e, j, n, p_buffer);
        float *restrict m = (float *)e->exp_avg + j, *restrict v = e->exp_avg_sq_row + j;
        for (int64_t i = 0; i < n; i++) {
            v[i] = v[i] * beta2 + weight2 * g[i] * g[i];
            m[i] = average(m[i], g[i], &s);
            float numerator = numerator_of(m[i], g[i], s.nesterov, &s);
            update_element(p + i, numerator, sqrtf(v[i]) / correction, &s);
        }
        if (p == p_buffer)
            store_parameter(p, e, j, e->whole_start + j, n, settings);
    }
}

#endif
