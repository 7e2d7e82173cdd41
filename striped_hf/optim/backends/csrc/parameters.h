/* Loads and stores parameters and gradients. */

#ifndef STRIPED_PARAMETERS_H
#define STRIPED_PARAMETERS_H

#include <stdint.h>

#include "entry.h"
#include "numbers.h"

/* Returns n elements from `offset` on as float32: a pointer to them if they are float32, else
 * converted in buffer.
 */
INLINE const float *load(const void *array, int64_t dtype, int64_t offset, int64_t n, float *buffer)
{
    if (dtype == FLOAT32)
        return (const float *)array + offset;
    const uint16_t *source = (const uint16_t *)array + offset;
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < n; i++) buffer[i] = from_bfloat16(source[i]);
    else
        for (int64_t i = 0; i < n; i++) buffer[i] = from_float16(source[i]);
    return buffer;
}

/* Returns n <= CODE_BLOCK elements of the parameter with its low bits as float32; as load. */
INLINE float *load_parameter(const Entry *e, int64_t offset, int64_t n, float *buffer)
{
    if (!e->param_low_bits)
        return (float *)load(e->param, e->param_dtype, offset, n, buffer);
    const uint16_t *high = (const uint16_t *)e->param + offset;
    if (e->is_matrix) {
        const int8_t *low = (const int8_t *)e->param_low_bits + offset;
        for (int64_t i = 0; i < n; i++) buffer[i] = join(high[i], low[i] * 256);
    } else {
        const int32_t *low = (const int32_t *)e->param_low_bits + offset;
        for (int64_t i = 0; i < n; i++) buffer[i] = join(high[i], low[i]);
    }
    return buffer;
}

/* Stores n values of a vector in bfloat16 and the bits that it lacks: rounding.py's split. */
INLINE void store_vector_split(const float *restrict values, const Entry *e, int64_t offset,
                               int64_t n)
{
    uint16_t *restrict high = (uint16_t *)e->param + offset;
    int32_t *restrict low = (int32_t *)e->param_low_bits + offset;
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = bits_of(values[i]);
        high[i] = split_high(u);
        low[i] = is_nan(u) ? 0 : (int16_t)(u & 0xFFFF);
    }
}

/* Stores n values of a matrix in bfloat16 and the next 8 bits, as rounding.py's round_to_24_bits
 * and split.
 *
 * random: random bits; NULL: rounds to nearest.
 */
INLINE void store_matrix_split(const float *restrict values, const uint32_t *restrict random,
                               const Entry *e, int64_t offset, int64_t n)
{
    uint16_t *restrict high = (uint16_t *)e->param + offset;
    int8_t *restrict low = (int8_t *)e->param_low_bits + offset;
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = bits_of(values[i]), added = random ? random[i] & 0xFF : 0x80;
        u = is_nan(u) ? u : (u + added) & ~0xFFu;
        high[i] = split_high(u);
        low[i] = (int8_t)(is_nan(u) ? 0 : u >> 8 & 0xFF);
    }
}

/* Prefetches the CODE_BLOCK elements that are PARAMETER_AHEAD elements after `offset`. They need
 * not exist.
 */
INLINE void prefetch_parameter(const Entry *e, int64_t offset)
{
    int64_t size = e->param_dtype == FLOAT32 ? 4 : 2;
    const char *chunk = (const char *)e->param + size * (offset + PARAMETER_AHEAD);
    for (int64_t i = 0; i < size * CODE_BLOCK; i += 64) __builtin_prefetch(chunk + i, 1);
}

/* Draws the random bits of n <= CODE_BLOCK elements.
 *
 * index: the index of the first element in the whole parameter.
 */
INLINE void random_bits(uint32_t *restrict random, const Entry *e, int64_t index, int64_t n)
{
    uint32_t start = (uint32_t)index, step_key = mix(SEED ^ (uint32_t)e->step);
    uint32_t key = mix(step_key ^ (uint32_t)(index >> 32));
    uint32_t next_key = mix(step_key ^ (uint32_t)((index >> 32) + 1));
    for (int64_t i = 0; i < n; i++) {
        uint32_t low = start + (uint32_t)i;
        random[i] = mix(mix(low ^ (low < start ? next_key : key)));
    }
}

/* Rounds n <= CODE_BLOCK values, stochastically or to nearest, and stores them from `offset` on; and
 * their low bits, if the state has any.
 *
 * index: the index of the first value in the whole parameter.
 */
INLINE void store_parameter(const float *restrict values, const Entry *e, int64_t offset,
                            int64_t index, int64_t n, const Settings *settings)
{
    uint16_t *restrict target = (uint16_t *)e->param + offset;
    if (e->param_low_bits && !e->is_matrix) {
        store_vector_split(values, e, offset, n);
    } else if (e->param_low_bits && !settings->stochastic_rounding) {
        store_matrix_split(values, NULL, e, offset, n);
    } else if (settings->stochastic_rounding) {
        uint32_t random[CODE_BLOCK];
        random_bits(random, e, index, n);
        if (e->param_low_bits)
            store_matrix_split(values, random, e, offset, n);
        else if (e->param_dtype == BFLOAT16)
            for (int64_t i = 0; i < n; i++)
                target[i] = to_bfloat16(stochastic_bfloat16(values[i], random[i]));
        else
            for (int64_t i = 0; i < n; i++)
                target[i] = to_float16(stochastic_float16(values[i], random[i]));
    } else if (e->param_dtype == BFLOAT16) {
        for (int64_t i = 0; i < n; i++) target[i] = to_bfloat16(values[i]);
    } else {
        for (int64_t i = 0; i < n; i++) target[i] = to_float16(values[i]);
    }
}

#endif
