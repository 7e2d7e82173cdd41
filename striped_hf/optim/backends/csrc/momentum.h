/* Loads and stores the momentum: momentum.py describes its formats. */

#ifndef STRIPED_MOMENTUM_H
#define STRIPED_MOMENTUM_H

#include <math.h>
#include <stdint.h>

#include "entry.h"
#include "numbers.h"

/* Returns the place of a row's momentum from a column on; column: a multiple of CODE_BLOCK. */
INLINE void *momentum_at(const Entry *e, int64_t row, int64_t column)
{
    int64_t offset = row * e->columns + column;
    switch (e->momentum_dtype) {
    case FLOAT32: return (float *)e->exp_avg + offset;
    case BFLOAT16: return (uint16_t *)e->exp_avg + offset;
    case INT8: return (int8_t *)e->exp_avg + offset;
    default: return (uint8_t *)e->exp_avg + row * ((e->columns + 1) / 2) + column / 2;
    }
}

INLINE float *scale_at(const Entry *e, int64_t row, int64_t column)
{
    int64_t blocks = (e->columns + CODE_BLOCK - 1) / CODE_BLOCK;
    return e->exp_avg_scale + row * blocks + column / CODE_BLOCK;
}

INLINE float largest_code(const Entry *e) { return e->momentum_dtype == INT8 ? 127.0f : 7.0f; }

/* Returns the factor that turns the result of `decoded` into a momentum. */
INLINE float decoding_factor(const Entry *e, float scale)
{
    return scale / (largest_code(e) * largest_code(e));
}

/* Whether decoding_factor would be a denormal number, which lacks places, or nearly one. */
INLINE int is_tiny(float scale) { return scale > 0 && scale < 0x1p-100f; }

/* Whether a scale, as bits, is Inf or NaN: its block has no codes but zero. */
INLINE int is_not_finite(uint32_t scale) { return scale >= 0x7F800000; }

/* Returns the factor by which `encoded` multiplies a square root. */
INLINE float encoding_factor(const Entry *e, float scale)
{
    return is_not_finite(bits_of(scale)) ? 0 : largest_code(e) / sqrtf(scale);
}

/* Returns n integer codes: a pointer to them if they are bytes, else unpacked in buffer, [n + 1].
 */
INLINE const int8_t *load_codes(const Entry *e, int64_t row, int64_t column, int64_t n,
                                int8_t *restrict buffer)
{
    if (e->momentum_dtype == INT8)
        return momentum_at(e, row, column);
    const uint8_t *pairs = momentum_at(e, row, column);
    int64_t half = (n + 1) / 2;
    for (int64_t i = 0; i < half; i++) {
        buffer[i] = (int8_t)((pairs[i] & 15) - 8);
        buffer[i + half] = (int8_t)((pairs[i] >> 4) - 8); /* past the end where n is odd: unused */
    }
    return buffer;
}

/* Packs n codes into the pairs that load_codes unpacks; may write to codes[n]. */
INLINE void store_pairs(uint8_t *restrict pairs, int8_t *restrict codes, int64_t n)
{
    int64_t half = (n + 1) / 2;
    if (n & 1)
        codes[n] = -8; /* the last low nibble's partner is zero */
    for (int64_t i = 0; i < half; i++)
        pairs[i] = (uint8_t)(((codes[i] + 8) & 15) | (codes[i + half] + 8) << 4);
}

/* Returns the momentum of a code, without its decoding_factor. */
INLINE float decoded(int8_t code)
{
    float y = code;
    return y * fabsf(y);
}

/* Returns the code of a momentum.
 *
 * factor: see encoding_factor. Adding 1.5 x 2^23 rounds to an integer, half to even, and puts the
 * integer's lowest bits into the mantissa's lowest bits. Zero times Inf is NaN, whose lowest bits
 * are zero.
 */
INLINE int8_t encoded(float x, float factor)
{
    return (int8_t)bits_of(copysignf(sqrtf(fabsf(x)), x) * factor + 12582912.0f);
}

/* Returns the larger of a magnitude and |x|, as bits. As integers they have the order of the
 * floats, with Inf and then NaN above all.
 */
INLINE uint32_t larger(uint32_t magnitude, float x)
{
    uint32_t other = bits_of(x) & 0x7FFFFFFF;
    return other > magnitude ? other : magnitude;
}

INLINE int is_coded(const Entry *e)
{
    return e->momentum_dtype == INT8 || e->momentum_dtype == INT4;
}

/* Decodes the momentum of n elements of one block of codes. */
INLINE void decode(const Entry *e, int64_t row, int64_t column, int64_t n, float *restrict values)
{
    int8_t buffer[CODE_BLOCK + 1];
    const int8_t *codes = load_codes(e, row, column, n, buffer);
    float scale = *scale_at(e, row, column), unit = decoding_factor(e, scale);
    if (is_tiny(scale)) {
        double exact = (double)scale / (largest_code(e) * largest_code(e));
        for (int64_t i = 0; i < n; i++) values[i] = (float)(decoded(codes[i]) * exact);
        return;
    }
    for (int64_t i = 0; i < n; i++) values[i] = decoded(codes[i]) * unit;
}

/* Encodes n values and stores the codes in `place`, which momentum_at returned. */
INLINE void store_codes(const Entry *e, void *place, const float *restrict values, int64_t n,
                        float factor)
{
    int8_t buffer[CODE_BLOCK + 1];
    int8_t *restrict codes = e->momentum_dtype == INT8 ? place : buffer;
    for (int64_t i = 0; i < n; i++) codes[i] = encoded(values[i], factor);
    if (e->momentum_dtype == INT4)
        store_pairs(place, codes, n);
}

/* Encodes the momentum of n elements of one block of codes; the inverse of decode. */
INLINE void encode(const Entry *e, int64_t row, int64_t column, int64_t n,
                   const float *restrict values)
{
    static const float zeros[CODE_BLOCK];
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) largest = larger(largest, values[i]);
    float scale = float_of(largest);
    *scale_at(e, row, column) = scale;
    store_codes(e, momentum_at(e, row, column), is_not_finite(largest) ? zeros : values, n,
                encoding_factor(e, scale));
}

#endif
