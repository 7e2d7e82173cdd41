/* Converts number formats, and computes the random bits of stochastic rounding. */

#ifndef STRIPED_NUMBERS_H
#define STRIPED_NUMBERS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "entry.h"

INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

INLINE float from_bfloat16(uint16_t h) { return float_of((uint32_t)h << 16); }

INLINE uint16_t to_bfloat16(float x)
{
    uint32_t u = bits_of(x), magnitude = u & 0x7FFFFFFF;
    uint32_t nearest_even = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
    return (uint16_t)(magnitude > 0x7F800000 ? (u >> 16 | 0x40) : nearest_even);
}

INLINE float from_float16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7FFF;
    uint32_t normal = (rest << 13) + (112u << 23);
    uint32_t subnormal = bits_of((float)(int32_t)rest * 0x1p-24f);
    uint32_t not_finite = normal + (112u << 23);
    uint32_t magnitude = rest < 0x400 ? subnormal : rest >= 0x7C00 ? not_finite : normal;
    return float_of(sign | magnitude);
}

INLINE uint16_t to_float16(float x)
{
    uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7FFFFFFF;
    uint32_t normal = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    /* adding 1/2 puts the last place of a subnormal half, 2^-24, at the end of the mantissa */
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude >= 0x477FF000 ? 0x7C00 : half; /* from 65520 on */
    half = magnitude > 0x7F800000 ? 0x7E00 : half;
    return (uint16_t)(sign | half);
}

/* Returns the float32 of a bfloat16 and the 16 bits that it lacks: rounding.py's join */
INLINE float join(uint16_t high, int32_t low)
{
    int32_t added = (high & 0x7FFF) == 0 && low < 0 ? 0 : low;
    return float_of(((uint32_t)high << 16) + (uint32_t)added);
}

INLINE int is_nan(uint32_t u) { return (u & 0x7FFFFFFF) > 0x7F800000; }

/* Returns the bfloat16 nearest to the float32 with the bits u: rounding.py's split */
INLINE uint16_t split_high(uint32_t u) { return is_nan(u) ? 0x7FC0 : (u + 0x8000) >> 16; }

/* MurmurHash3's 32-bit finalizer */
INLINE uint32_t mix(uint32_t x)
{
    x = (x ^ x >> 16) * 0x85EBCA6Bu;
    x = (x ^ x >> 13) * 0xC2B2AE35u;
    return x ^ x >> 16;
}

/* rounding.py's truncation after adding random bits below the last kept one */
INLINE float truncate_after_adding(float x, uint32_t random, uint32_t mask)
{
    return float_of((bits_of(x) + (random & mask)) & ~mask);
}

INLINE float stochastic_bfloat16(float x, uint32_t random)
{
    float rounded = truncate_after_adding(x, random, 0xFFFF);
    return (bits_of(x) & 0x7FFFFFFF) < 0x7F800000 ? rounded : x;
}

INLINE float stochastic_float16(float x, uint32_t random)
{
    const float min_normal = 0x1p-14f;
    float rounded = truncate_after_adding(x, random, 0x1FFF);
    /* subnormal halves have a fixed unit, 2^-24: the same one as just above the smallest normal */
    float offset = truncate_after_adding(fabsf(x) + min_normal, random, 0x1FFF);
    float subnormal = copysignf(offset - min_normal, x);
    rounded = fabsf(x) < min_normal ? subnormal : rounded;
    return (bits_of(x) & 0x7FFFFFFF) < 0x7F800000 ? rounded : x;
}

#endif
