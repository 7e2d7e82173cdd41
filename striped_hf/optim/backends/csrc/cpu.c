/* The CPU backend: the arithmetic of reference.py in as few readings of memory as it takes.
 *
 * Three entry points take a table of all tensors of a param group and make one OpenMP parallel
 * region each: striped_statistics and striped_update, between which sums are exchanged with other
 * processes and become roots, and striped_step, which does it all for parameters that are whole.
 * The work is cut into tasks of whole rows by the tensors' shapes alone, and every sum is taken in
 * the tasks' order: the bits do not depend on the number of threads, nor on which thread takes
 * which task.
 *
 * A matrix [..., R, C] with blocks (br, bc) is seen as `bands` of `height` = R / br rows, one band
 * for each block of rows of each matrix, so that the column stripe is [bands, C] and the row stripe
 * [bands * height, bc].
 *
 * Where it differs from the reference: sums of squares are taken in another order, the mean of the
 * row stripe is taken in double, codes are scaled by one factor in the place of two divisions and
 * averaged as b1 m + (1 - b1) g, and a compiler may fuse a multiplication with an addition. A
 * parameter may thereby differ in its last places, and a momentum code by one where its value stood
 * on the border between two.
 *
 * No intrinsics: the loops are written so that compilers vectorise them, and function
 * multiversioning picks the widest build that the processor runs. Prefetched are a float32 gradient
 * where it is summed and the parameter where its row is taken in stretches: for the rest, and for
 * momentum and gradients in the update, the processors measured do it better by themselves.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <omp.h>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(STRIPED_BASELINE)
#if !defined(__clang__) && __GNUC__ >= 12
#define MULTIVERSIONED \
    __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MULTIVERSIONED \
    __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#endif
#else
#define MULTIVERSIONED
#endif

/* what is inlined into a multiversioned function is compiled for its processor too */
#define INLINE static inline __attribute__((always_inline))

#define CODE_BLOCK 128     /* elements of a row that share a scale: momentum.py's BLOCK_SIZE */
#define TASK_ELEMENTS (1 << 17) /* half a megabyte of gradient: dwarfs its scheduling */
#define MIN_TASK_ROWS 64   /* a slice's own column sums are then 1/64 of its gradient, or less */
#define MAX_TASK_ROWS 1024 /* as many squares are added in float32 before a sum goes on in double */
#define STRETCH 1024       /* elements of a row that the statistics sum in float32 */
#define ROWS 4             /* read together by the statistics */
#define PARTS 32           /* of a sum: two of the widest vectors, to add to in turn */
#define AHEAD 512          /* elements from a stretch to what is prefetched of the parameter */
#define SUM_AHEAD 256      /* and of a float32 gradient, where it is summed */
#define BUNDLE_ELEMENTS (1 << 19) /* of tensors stepped together: their gradients stay in a cache */
#define SEED 0x571219EDu   /* rounding.py's */

enum { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 };

/* One row of the table; cpu.py fills it in, 64 bits a field. */
typedef struct {
    void *param;              /* [elements] of param_dtype */
    const void *grad;         /* [elements] of grad_dtype */
    void *exp_avg;            /* [elements], codes by momentum_dtype */
    float *exp_avg_scale;     /* [bands * height, ceil(columns / 128)], integer codes only */
    float *exp_avg_sq_row;    /* [bands * height, col_blocks]; a vector's exp_avg_sq [elements] */
    float *exp_avg_sq_col;    /* [bands, columns] */
    float *row_sums;          /* of squares, shaped as the stripes */
    float *col_sums;
    float *row_roots;         /* a and c, shaped as the stripes; striped_step places its own */
    float *col_roots;
    int64_t bands, height, columns, col_blocks; /* a vector: 1, 1, elements, 1 */
    int64_t start, pitch;     /* its place in the whole: reference.py's Entry */
    int64_t is_matrix;
    int64_t param_dtype, grad_dtype, momentum_dtype;
    int64_t step;
} Tensor;

typedef struct {
    double lr, beta1, beta2, eps, weight_decay;
    int64_t maximize, nesterov, stochastic_rounding, lagged;
} Settings;

/* ------------------------------------------------------------------------------------------------
 * numbers
 * --------------------------------------------------------------------------------------------- */

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

/* ------------------------------------------------------------------------------------------------
 * stretches of up to CODE_BLOCK elements, in the caches
 * --------------------------------------------------------------------------------------------- */

/* Returns n elements at `offset` as float32: in place where they are that, else in buffer. */
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

/* Asks for the stretch of a parameter that is AHEAD of `offset`; there need be none. */
INLINE void prefetch_parameter(const Tensor *t, int64_t offset)
{
    int64_t size = t->param_dtype == FLOAT32 ? 4 : 2;
    const char *stretch = (const char *)t->param + size * (offset + AHEAD);
    for (int64_t i = 0; i < size * CODE_BLOCK; i += 64) __builtin_prefetch(stretch + i, 1);
}

/* Rounds n values to `offset` of a parameter, stochastically or to nearest.
 *
 * index: of the first one in the whole parameter.
 */
INLINE void store_parameter(const float *restrict values, const Tensor *t, int64_t offset,
                            int64_t index, int64_t n, const Settings *settings)
{
    uint16_t *restrict target = (uint16_t *)t->param + offset;
    if (settings->stochastic_rounding) {
        uint32_t start = (uint32_t)index, step_key = mix(SEED ^ (uint32_t)t->step);
        uint32_t key = mix(step_key ^ (uint32_t)(index >> 32));
        uint32_t next_key = mix(step_key ^ (uint32_t)((index >> 32) + 1));
        uint32_t random[CODE_BLOCK];
        for (int64_t i = 0; i < n; i++) {
            uint32_t low = start + (uint32_t)i;
            random[i] = mix(mix(low ^ (low < start ? next_key : key)));
        }
        if (t->param_dtype == BFLOAT16)
            for (int64_t i = 0; i < n; i++)
                target[i] = to_bfloat16(stochastic_bfloat16(values[i], random[i]));
        else
            for (int64_t i = 0; i < n; i++)
                target[i] = to_float16(stochastic_float16(values[i], random[i]));
    } else if (t->param_dtype == BFLOAT16) {
        for (int64_t i = 0; i < n; i++) target[i] = to_bfloat16(values[i]);
    } else {
        for (int64_t i = 0; i < n; i++) target[i] = to_float16(values[i]);
    }
}

/* Where the momentum of a row is stored from a column on, a multiple of CODE_BLOCK. */
INLINE void *momentum_at(const Tensor *t, int64_t row, int64_t column)
{
    int64_t offset = row * t->columns + column;
    switch (t->momentum_dtype) {
    case FLOAT32: return (float *)t->exp_avg + offset;
    case BFLOAT16: return (uint16_t *)t->exp_avg + offset;
    case INT8: return (int8_t *)t->exp_avg + offset;
    default: return (uint8_t *)t->exp_avg + row * ((t->columns + 1) / 2) + column / 2;
    }
}

INLINE float *scale_at(const Tensor *t, int64_t row, int64_t column)
{
    int64_t blocks = (t->columns + CODE_BLOCK - 1) / CODE_BLOCK;
    return t->exp_avg_scale + row * blocks + column / CODE_BLOCK;
}

INLINE float largest_code(const Tensor *t) { return t->momentum_dtype == INT8 ? 127.0f : 7.0f; }

/* Returns what decoded momentum is in units of. */
INLINE float unit_of(const Tensor *t, float scale)
{
    return scale / (largest_code(t) * largest_code(t));
}

/* Returns the factor by which encoded scales a root. */
INLINE float factor_of(const Tensor *t, float scale) { return largest_code(t) / sqrtf(scale); }

/* Returns n integer codes of a stretch: in place where they are bytes, else in buffer, [n + 1]. */
INLINE const int8_t *load_codes(const Tensor *t, int64_t row, int64_t column, int64_t n,
                                int8_t *restrict buffer)
{
    if (t->momentum_dtype == INT8)
        return momentum_at(t, row, column);
    const uint8_t *pairs = momentum_at(t, row, column);
    int64_t half = (n + 1) / 2;
    for (int64_t i = 0; i < half; i++) {
        buffer[i] = (int8_t)((pairs[i] & 15) - 8);
        buffer[i + half] = (int8_t)((pairs[i] >> 4) - 8); /* past the end where n is odd: unused */
    }
    return buffer;
}

/* Stores what load_codes reads, of codes that are not in their place; may write to codes[n]. */
INLINE void store_pairs(uint8_t *restrict pairs, int8_t *restrict codes, int64_t n)
{
    int64_t half = (n + 1) / 2;
    if (n & 1)
        codes[n] = -8; /* the last low nibble's partner is zero */
    for (int64_t i = 0; i < half; i++)
        pairs[i] = (uint8_t)(((codes[i] + 8) & 15) | (codes[i + half] + 8) << 4);
}

/* Returns the momentum that a code stands for, in units of unit_of. */
INLINE float decoded(int8_t code)
{
    float y = code;
    return y * fabsf(y);
}

/* Returns the code of a momentum.
 *
 * factor: see factor_of. Adding 1.5 x 2^23 rounds to an integer, half to even, whose lowest bits are
 * then the mantissa's. Zero times Inf is NaN, whose lowest bits are zero.
 */
INLINE int8_t encoded(float x, float factor)
{
    return (int8_t)bits_of(copysignf(sqrtf(fabsf(x)), x) * factor + 12582912.0f);
}

/* As integers magnitudes order as the floats do, with Inf and then NaN above all. */
INLINE uint32_t larger(uint32_t magnitude, float x)
{
    uint32_t own = bits_of(x) & 0x7FFFFFFF;
    return own > magnitude ? own : magnitude;
}

INLINE int is_coded(const Tensor *t)
{
    return t->momentum_dtype == INT8 || t->momentum_dtype == INT4;
}

/* Decodes one stretch of momentum in integer codes. */
INLINE void decode(const Tensor *t, int64_t row, int64_t column, int64_t n, float *restrict values)
{
    int8_t buffer[CODE_BLOCK + 1];
    const int8_t *codes = load_codes(t, row, column, n, buffer);
    float unit = unit_of(t, *scale_at(t, row, column));
    for (int64_t i = 0; i < n; i++) values[i] = decoded(codes[i]) * unit;
}

/* Encodes n values into their place, see momentum_at. */
INLINE void store_codes(const Tensor *t, void *place, const float *restrict values, int64_t n,
                        float factor)
{
    int8_t buffer[CODE_BLOCK + 1];
    int8_t *restrict codes = t->momentum_dtype == INT8 ? place : buffer;
    for (int64_t i = 0; i < n; i++) codes[i] = encoded(values[i], factor);
    if (t->momentum_dtype == INT4)
        store_pairs(place, codes, n);
}

/* Encodes one stretch of momentum; the inverse of decode. */
INLINE void encode(const Tensor *t, int64_t row, int64_t column, int64_t n,
                   const float *restrict values)
{
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) largest = larger(largest, values[i]);
    float scale = float_of(largest);
    *scale_at(t, row, column) = scale;
    store_codes(t, momentum_at(t, row, column), values, n, factor_of(t, scale));
}

/* ------------------------------------------------------------------------------------------------
 * rows
 * --------------------------------------------------------------------------------------------- */

/* Adds the squares of n elements of each of ROWS rows to their columns' sums, and their own sums to
 * row_sums. A row's sum has PARTS parts, which vectors can hold: compilers may not reorder it.
 */
INLINE void sum_stretch(const float *const *g, float *restrict col_sums, int64_t n,
                        double *restrict row_sums)
{
    float parts[ROWS][PARTS] = {{0}};
    int64_t i = 0;
    for (; i + PARTS <= n; i += PARTS) {
        for (int64_t r = 0; r < ROWS; r++)
            for (int64_t k = 0; k < PARTS; k += 16)
                __builtin_prefetch(g[r] + i + k + SUM_AHEAD, 0, 2);
        for (int64_t k = 0; k < PARTS; k++) {
            float square[ROWS], sum = 0;
            for (int64_t r = 0; r < ROWS; r++) {
                square[r] = g[r][i + k] * g[r][i + k];
                parts[r][k] += square[r];
                sum += square[r];
            }
            col_sums[i + k] += sum;
        }
    }
    for (int64_t r = 0; r < ROWS; r++) {
        for (int64_t k = 0; k < n - i; k++) {
            float square = g[r][i + k] * g[r][i + k];
            parts[r][k] += square;
            col_sums[i + k] += square;
        }
        for (int64_t half = PARTS / 2; half > 0; half /= 2)
            for (int64_t k = 0; k < half; k++) parts[r][k] += parts[r][k + half];
        row_sums[r] += parts[r][0];
    }
}

/* Adds the squares of rows to their columns' sums, and writes their rows' sums.
 *
 * first: index of the first row in the whole tensor; col_sums: [columns].
 * ROWS rows that lie far apart are read together: one stream alone does not fill the memory's bus.
 */
MULTIVERSIONED
static void sum_rows(const Tensor *t, int64_t first, int64_t rows, float *restrict col_sums)
{
    int64_t columns = t->columns, width = columns / t->col_blocks, apart = (rows + ROWS - 1) / ROWS;
    static const float zeros[STRETCH];
    float buffers[ROWS][STRETCH];
    for (int64_t i = 0; i < apart; i++) {
        for (int64_t block = 0; block < t->col_blocks; block++) {
            double row_sums[ROWS] = {0};
            int64_t end = (block + 1) * width;
            for (int64_t j = block * width; j < end; j += STRETCH) {
                int64_t n = end - j < STRETCH ? end - j : STRETCH;
                const float *g[ROWS];
                for (int64_t r = 0; r < ROWS; r++) {
                    int64_t offset = (first + r * apart + i) * columns + j;
                    g[r] = r * apart + i < rows
                               ? load(t->grad, t->grad_dtype, offset, n, buffers[r])
                               : zeros;
                }
                sum_stretch(g, col_sums + j, n, row_sums);
            }
            for (int64_t r = 0; r < ROWS && r * apart + i < rows; r++)
                t->row_sums[(first + r * apart + i) * t->col_blocks + block] = (float)row_sums[r];
        }
    }
}

typedef struct {
    float weight1, step_size, decay, eps; /* weight1 is 1 - beta1 */
    float own_share; /* of a lagged root: what |g| times this is, it is at least */
    int nesterov;
} Step;

static Step step_of(const Tensor *t, const Settings *settings)
{
    double correction2 = 1 - pow(settings->beta2, (double)t->step);
    return (Step){
        .weight1 = (float)(1 - settings->beta1),
        .step_size = (float)(settings->lr / (1 - pow(settings->beta1, (double)t->step))),
        .decay = (float)(1 - settings->lr * settings->weight_decay),
        .eps = (float)settings->eps,
        .own_share = (float)sqrt((1 - settings->beta2) / correction2),
        .nesterov = settings->nesterov != 0,
    };
}

INLINE float average(float m, float g, const Step *s) { return m + s->weight1 * (g - m); }

/* Moves p by its new momentum; root is the second moment's, without eps. */
INLINE void move(float *restrict p, float m, float g, float root, int nesterov, const Step *s)
{
    float numerator = nesterov ? average(m, g, s) : m;
    *p = *p * s->decay - s->step_size * (numerator / (root + s->eps));
}

INLINE float root_of(float a, float c, float g, int lagged, const Step *s)
{
    float root = a * c, own = fabsf(g) * s->own_share;
    return lagged && own > root ? own : root;
}

/* Updates n elements whose momentum is one of two arrays: m, or stored in bfloat16 where m is NULL.
 *
 * nesterov and lagged are constants where this is inlined.
 */
INLINE void move_striped(float *restrict p, float *restrict m, uint16_t *restrict stored,
                         const float *restrict g, float a, const float *restrict c, int64_t n,
                         int nesterov, int lagged, const Step *step)
{
    Step s = *step;
    if (m) {
        for (int64_t i = 0; i < n; i++) {
            m[i] = average(m[i], g[i], &s);
            move(p + i, m[i], g[i], root_of(a, c[i], g[i], lagged, &s), nesterov, &s);
        }
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        float new = average(from_bfloat16(stored[i]), g[i], &s);
        move(p + i, new, g[i], root_of(a, c[i], g[i], lagged, &s), nesterov, &s);
        stored[i] = to_bfloat16(new);
    }
}

/* The new momentum of a whole stretch, to be encoded among the work of the next one, in one loop:
 * by themselves the roots hold up all that a processor can look ahead at.
 */
typedef struct {
    float values[2][CODE_BLOCK]; /* of the stretch that waits, and of the next, by turns */
    int which;                   /* of them waits */
    float factor;                /* see factor_of */
    void *place;                 /* see momentum_at; NULL where none waits */
} Waiting;

/* Updates a whole stretch, and encodes the one that waits; it waits then itself.
 *
 * nesterov and lagged are constants where this is inlined.
 */
INLINE void move_coded(const Tensor *t, int64_t row, int64_t column, float *restrict p,
                       const float *restrict g, float a, const float *restrict c, int nesterov,
                       int lagged, const Step *step, Waiting *waiting)
{
    int8_t buffer[CODE_BLOCK + 1], buffer_before[CODE_BLOCK + 1];
    int in_place = t->momentum_dtype == INT8 && waiting->place;
    const int8_t *restrict codes = load_codes(t, row, column, CODE_BLOCK, buffer);
    int8_t *restrict codes_before = in_place ? waiting->place : buffer_before;
    const float *restrict before = waiting->values[waiting->which];
    float *restrict m = waiting->values[!waiting->which];
    float factor = waiting->factor, *scale = scale_at(t, row, column);
    float kept = unit_of(t, *scale) * (1 - step->weight1);
    uint32_t largest = 0;
    Step s = *step;
    for (int64_t i = 0; i < CODE_BLOCK; i++) {
        m[i] = decoded(codes[i]) * kept + s.weight1 * g[i];
        move(p + i, m[i], g[i], root_of(a, c[i], g[i], lagged, &s), nesterov, &s);
        largest = larger(largest, m[i]);
        codes_before[i] = encoded(before[i], factor);
    }
    if (t->momentum_dtype == INT4 && waiting->place)
        store_pairs(waiting->place, codes_before, CODE_BLOCK);
    *scale = float_of(largest);
    waiting->which = !waiting->which;
    waiting->factor = factor_of(t, *scale);
    waiting->place = momentum_at(t, row, column);
}

/* Returns the gradient of what is minimised; see load. */
INLINE const float *load_ascent(const Tensor *t, int64_t offset, int64_t n,
                                const Settings *settings, float *buffer)
{
    const float *g = load(t->grad, t->grad_dtype, offset, n, buffer);
    if (!settings->maximize)
        return g;
    for (int64_t i = 0; i < n; i++) buffer[i] = -g[i];
    return buffer;
}

/* Updates n elements of a row from `column` on: CODE_BLOCK at most, unless is_in_place. */
INLINE void update_stretch(const Tensor *t, int64_t row, int64_t column, int64_t n,
                           const float *restrict c, int lagged, const Settings *settings,
                           const Step *step, Waiting *waiting)
{
    int64_t width = t->columns / t->col_blocks, offset = row * t->columns + column;
    float g_buffer[CODE_BLOCK], p_buffer[CODE_BLOCK], m_buffer[CODE_BLOCK];
    const float *g = load_ascent(t, offset, n, settings, g_buffer);
    float *p = (float *)load(t->param, t->param_dtype, offset, n, p_buffer);
    int64_t block = t->col_blocks == 1 ? 0 : column / width;
    int single_block = column + n <= (block + 1) * width;
    if (is_coded(t) && n == CODE_BLOCK && single_block) {
        float a = t->row_roots[row * t->col_blocks + block];
        if (step->nesterov)
            move_coded(t, row, column, p, g, a, c + column, 1, lagged, step, waiting);
        else
            move_coded(t, row, column, p, g, a, c + column, 0, lagged, step, waiting);
        if (p == p_buffer)
            store_parameter(p, t, offset, t->start + row * t->pitch + column, n, settings);
        return;
    }
    float *m = t->momentum_dtype == FLOAT32 ? momentum_at(t, row, column) : NULL;
    uint16_t *stored = t->momentum_dtype == BFLOAT16 ? momentum_at(t, row, column) : NULL;
    if (is_coded(t))
        decode(t, row, column, n, m = m_buffer);
    for (int64_t i = 0; i < n; block++) { /* once, but where it crosses blocks of columns */
        int64_t end = (block + 1) * width - column, count = (end < n ? end : n) - i;
        const float *c_part = c + column + i, *g_part = g + i;
        float a = t->row_roots[row * t->col_blocks + block], *p_part = p + i;
        float *m_part = m ? m + i : NULL;
        uint16_t *stored_part = m ? NULL : stored + i;
        if (step->nesterov)
            move_striped(p_part, m_part, stored_part, g_part, a, c_part, count, 1, lagged, step);
        else
            move_striped(p_part, m_part, stored_part, g_part, a, c_part, count, 0, lagged, step);
        i += count;
    }
    if (p == p_buffer)
        store_parameter(p, t, offset, t->start + row * t->pitch + column, n, settings);
    if (is_coded(t))
        encode(t, row, column, n, m);
}

/* Tells whether a row needs no buffers: one long loop hides more of the memory's delay. */
INLINE int is_in_place(const Tensor *t, const Settings *settings)
{
    return t->param_dtype == FLOAT32 && t->grad_dtype == FLOAT32 && !settings->maximize &&
           !is_coded(t);
}

INLINE void walk_rows(const Tensor *t, int64_t band, int64_t first, int64_t rows, int lagged,
                      const Settings *settings)
{
    Step step = step_of(t, settings);
    Waiting waiting = {.place = NULL};
    const float *c = t->col_roots + band * t->columns;
    first += band * t->height;
    for (int64_t row = first; row < first + rows; row++) {
        int64_t column = 0, rest = t->columns % CODE_BLOCK;
        if (is_in_place(t, settings)) {
            update_stretch(t, row, 0, t->columns, c, lagged, settings, &step, &waiting);
            continue;
        }
        for (; column + CODE_BLOCK <= t->columns; column += CODE_BLOCK) {
            prefetch_parameter(t, row * t->columns + column);
            update_stretch(t, row, column, CODE_BLOCK, c, lagged, settings, &step, &waiting);
        }
        if (rest)
            update_stretch(t, row, column, rest, c, lagged, settings, &step, &waiting);
    }
    if (waiting.place)
        store_codes(t, waiting.place, waiting.values[waiting.which], CODE_BLOCK, waiting.factor);
}

/* Updates momentum and parameter of rows of one band, from `first` in it on, by the roots. */
MULTIVERSIONED
static void update_rows(const Tensor *t, int64_t band, int64_t first, int64_t rows,
                        int lagged, const Settings *settings)
{
    if (lagged)
        walk_rows(t, band, first, rows, 1, settings);
    else
        walk_rows(t, band, first, rows, 0, settings);
}

/* AdamW's step with the exact second moment, on elements [first, first + count). */
MULTIVERSIONED
static void update_vector(const Tensor *t, int64_t first, int64_t count, const Settings *settings)
{
    Step s = step_of(t, settings);
    float beta2 = (float)settings->beta2, weight2 = (float)(1 - settings->beta2);
    float correction = (float)sqrt(1 - pow(settings->beta2, (double)t->step));
    float g_buffer[CODE_BLOCK], p_buffer[CODE_BLOCK];
    for (int64_t j = first; j < first + count; j += CODE_BLOCK) {
        int64_t n = first + count - j < CODE_BLOCK ? first + count - j : CODE_BLOCK;
        const float *restrict g = load_ascent(t, j, n, settings, g_buffer);
        float *restrict p = (float *)load(t->param, t->param_dtype, j, n, p_buffer);
        float *restrict m = (float *)t->exp_avg + j, *restrict v = t->exp_avg_sq_row + j;
        for (int64_t i = 0; i < n; i++) {
            v[i] = v[i] * beta2 + weight2 * g[i] * g[i];
            m[i] = average(m[i], g[i], &s);
            move(p + i, m[i], g[i], sqrtf(v[i]) / correction, s.nesterov, &s);
        }
        if (p == p_buffer)
            store_parameter(p, t, j, t->start + j, n, settings);
    }
}

/* Averages the sums of one band into its stripes. */
MULTIVERSIONED
static void average_band(const Tensor *t, int64_t band, const Settings *settings)
{
    int64_t cells = t->height * t->col_blocks;
    float beta2 = (float)settings->beta2;
    float row_weight = (float)((1 - settings->beta2) / (double)(t->columns / t->col_blocks));
    float col_weight = (float)((1 - settings->beta2) / (double)t->height);
    float *restrict row = t->exp_avg_sq_row + band * cells;
    const float *restrict row_sums = t->row_sums + band * cells;
    for (int64_t i = 0; i < cells; i++) row[i] = row[i] * beta2 + row_weight * row_sums[i];
    float *restrict col = t->exp_avg_sq_col + band * t->columns;
    const float *restrict col_sums = t->col_sums + band * t->columns;
    for (int64_t j = 0; j < t->columns; j++) col[j] = col[j] * beta2 + col_weight * col_sums[j];
}

/* Takes the roots a and c of one band's stripes, which are those of `step`. */
MULTIVERSIONED
static void take_roots(const Tensor *t, int64_t band, const Settings *settings, int64_t step)
{
    int64_t cells = t->height * t->col_blocks;
    float correction = (float)(1 - pow(settings->beta2, (double)step));
    const float *restrict col = t->exp_avg_sq_col + band * t->columns;
    float *restrict c = t->col_roots + band * t->columns;
    for (int64_t j = 0; j < t->columns; j++) c[j] = sqrtf(col[j] / correction);

    const float *restrict row = t->exp_avg_sq_row + band * cells;
    float *restrict a = t->row_roots + band * cells;
    for (int64_t block = 0; block < t->col_blocks; block++) {
        double sum = 0;
        for (int64_t i = block; i < cells; i += t->col_blocks) sum += row[i];
        float mean = (float)(sum / (double)t->height);
        /* 0/0 is an all-zero gradient, which moves nothing; an Inf is as loud as AdamW's */
        float divisor = mean == 0 ? 1.0f : isinf(mean) ? NAN : mean;
        if (t->col_blocks == 1) /* a stride that is a constant is one that compilers vectorise */
            for (int64_t i = 0; i < cells; i++) a[i] = sqrtf(row[i] / divisor);
        else
            for (int64_t i = block; i < cells; i += t->col_blocks) a[i] = sqrtf(row[i] / divisor);
    }
}

/* ------------------------------------------------------------------------------------------------
 * tables
 * --------------------------------------------------------------------------------------------- */

/* Some rows of one band, or some whole bands; of a vector, some elements in the place of rows. */
typedef struct {
    int64_t tensor, band, bands, row, rows;
    float *partial; /* a slice's own column sums, [columns]; NULL where it has whole bands */
    int is_first_taken, is_second_taken; /* by a thread: in the two phases of striped_step */
} Task;

static int is_vector(const Tensor *t) { return !t->is_matrix; }

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Cuts a tensor into tasks, or with tasks == NULL only counts them.
 *
 * partials: where slices of a band put their own column sums; *partial_elements: how many they are.
 */
static int64_t cut(const Tensor *t, int64_t tensor, Task *tasks, float *partials,
                   int64_t *partial_elements)
{
    int64_t count = 0;
    *partial_elements = 0;
    if (is_vector(t)) {
        for (int64_t start = 0; start < t->columns; start += TASK_ELEMENTS, count++)
            if (tasks)
                tasks[count] = (Task){.tensor = tensor, .row = start,
                                      .rows = least(t->columns - start, TASK_ELEMENTS)};
        return count;
    }
    int64_t rows = TASK_ELEMENTS / t->columns;
    rows = rows < MIN_TASK_ROWS ? MIN_TASK_ROWS : least(rows, MAX_TASK_ROWS);
    if (rows >= t->height) {
        int64_t together = TASK_ELEMENTS / (t->height * t->columns);
        together = together < 1 ? 1 : together;
        for (int64_t band = 0; band < t->bands; band += together, count++)
            if (tasks)
                tasks[count] = (Task){.tensor = tensor, .band = band, .rows = t->height,
                                      .bands = least(t->bands - band, together)};
        return count;
    }
    for (int64_t band = 0; band < t->bands; band++)
        for (int64_t row = 0; row < t->height; row += rows, count++) {
            if (tasks)
                tasks[count] = (Task){.tensor = tensor, .band = band, .bands = 1, .row = row,
                                      .rows = least(t->height - row, rows),
                                      .partial = partials + *partial_elements};
            *partial_elements += t->columns;
        }
    return count;
}

static void sum_task(const Tensor *t, const Task *task)
{
    if (is_vector(t))
        return;
    if (task->partial) {
        memset(task->partial, 0, sizeof(float) * (size_t)t->columns);
        sum_rows(t, task->band * t->height + task->row, task->rows, task->partial);
        return;
    }
    for (int64_t band = task->band; band < task->band + task->bands; band++) {
        float *col_sums = t->col_sums + band * t->columns;
        memset(col_sums, 0, sizeof(float) * (size_t)t->columns);
        sum_rows(t, band * t->height, t->height, col_sums);
    }
}

/* Adds up, in their order, the column sums of a band's slices; the first of them does it. */
static void combine(const Tensor *t, const Task *slice)
{
    if (!slice->partial || slice->row > 0)
        return;
    float *col_sums = t->col_sums + slice->band * t->columns;
    int64_t slices = (t->height + slice->rows - 1) / slice->rows;
    for (int64_t j = 0; j < t->columns; j += CODE_BLOCK) {
        int64_t n = least(t->columns - j, CODE_BLOCK);
        double sums[CODE_BLOCK] = {0};
        for (int64_t i = 0; i < slices; i++) {
            const float *partial = slice->partial + i * t->columns + j;
            for (int64_t k = 0; k < n; k++) sums[k] += partial[k];
        }
        for (int64_t k = 0; k < n; k++) col_sums[j + k] = (float)sums[k];
    }
}

static int is_lagged(const Tensor *t, const Settings *settings)
{
    return settings->lagged && t->step > 1 && !is_vector(t); /* a first step has none before it */
}

/* What is done once for each band is done by its first slice. */
static int64_t whole_bands(const Tensor *t, const Task *task)
{
    return is_vector(t) || task->row > 0 ? 0 : task->bands;
}

static void average_task(const Tensor *t, const Task *task, const Settings *settings)
{
    for (int64_t i = 0; i < whole_bands(t, task); i++) average_band(t, task->band + i, settings);
}

static void roots_task(const Tensor *t, const Task *task, const Settings *settings)
{
    int64_t step = t->step - is_lagged(t, settings);
    for (int64_t i = 0; i < whole_bands(t, task); i++)
        take_roots(t, task->band + i, settings, step);
}

static void update_task(const Tensor *t, const Task *task, const Settings *settings)
{
    if (is_vector(t)) {
        update_vector(t, task->row, task->rows, settings);
        return;
    }
    for (int64_t band = task->band; band < task->band + task->bands; band++)
        update_rows(t, band, task->row, task->rows, is_lagged(t, settings), settings);
}

/* Consecutive tensors, whose gradients a cache holds together, and their tasks. */
typedef struct {
    int64_t tensor, tensors, first, count;
} Bundle;

/* What the entry points below share: the tasks of a table in bundles, and memory to work in. */
typedef struct {
    Task *tasks;
    Bundle *bundles;
    int64_t bundle_count;
    float *scratch;
} Plan;

static void free_plan(Plan *plan)
{
    free(plan->tasks);
    free(plan->bundles);
    free(plan->scratch);
}

static int64_t stripe_elements(const Tensor *t)
{
    return is_vector(t) ? 0 : t->bands * (t->height * t->col_blocks + t->columns);
}

/* Points a tensor's sums and roots at scratch memory; returns how much of it they take. */
static int64_t place(Tensor *t, int lagged, float *scratch)
{
    int64_t rows = t->bands * t->height * t->col_blocks, elements = stripe_elements(t);
    float *roots = lagged ? scratch + elements : scratch; /* averaged, sums make room for roots */
    t->row_sums = scratch;
    t->col_sums = scratch + rows;
    t->row_roots = roots;
    t->col_roots = roots + rows;
    return lagged ? 2 * elements : elements;
}

/* Cuts a table into bundles and tasks.
 *
 * place_sums: whether sums and roots are in scratch memory too, or the table says where they are.
 *
 * Bundles have one of two scratch memories in turn: when all threads have met in a bundle, none is
 * in the bundle before any more, but one may still be in it when others have gone on to the next.
 *
 * Returns 0, or 1 where there is no memory; there is nothing to be freed then.
 */
static int make_plan(Plan *plan, Tensor *table, int64_t tensors, const Settings *settings,
                     int place_sums)
{
    *plan = (Plan){.bundles = malloc(sizeof(Bundle) * (size_t)(tensors + 1))};
    if (!plan->bundles)
        return 1;
    int64_t count = 0, elements = 0, used = 0, most = 0, partials;
    for (int64_t k = 0; k < tensors; k++) {
        const Tensor *t = table + k;
        if (elements == 0) {
            plan->bundles[plan->bundle_count++] = (Bundle){.tensor = k, .first = count};
            used = 0;
        }
        Bundle *bundle = plan->bundles + plan->bundle_count - 1;
        count += cut(t, k, NULL, NULL, &partials);
        bundle->tensors = k + 1 - bundle->tensor;
        bundle->count = count - bundle->first;
        used += partials;
        if (place_sums)
            used += stripe_elements(t) * (is_lagged(t, settings) ? 2 : 1);
        most = used > most ? used : most;
        elements += t->bands * t->height * t->columns;
        if (elements >= BUNDLE_ELEMENTS)
            elements = 0;
    }
    plan->tasks = malloc(sizeof(Task) * (size_t)(count + 1));
    plan->scratch = malloc(sizeof(float) * (size_t)(2 * most + 1));
    if (!plan->tasks || !plan->scratch) {
        free_plan(plan);
        return 1;
    }
    Task *tasks = plan->tasks;
    for (int64_t b = 0; b < plan->bundle_count; b++) {
        const Bundle *bundle = plan->bundles + b;
        float *scratch = plan->scratch + b % 2 * most;
        for (int64_t k = bundle->tensor; k < bundle->tensor + bundle->tensors; k++) {
            tasks += cut(table + k, k, tasks, scratch, &partials);
            scratch += partials;
            if (place_sums && !is_vector(table + k))
                scratch += place(table + k, is_lagged(table + k, settings), scratch);
        }
    }
    return 0;
}

/* The entry points return 0, or 1 where there is no memory for a plan; nothing has changed then. */

/* Sums the squares of the gradients of matrices by row and by column into row_sums and col_sums. */
int striped_statistics(Tensor *table, int64_t tensors, const Settings *settings, int64_t threads)
{
    Plan plan;
    if (make_plan(&plan, table, tensors, settings, 0))
        return 1;
#pragma omp parallel num_threads(threads)
    for (int64_t b = 0; b < plan.bundle_count; b++) {
        const Task *tasks = plan.tasks + plan.bundles[b].first;
        int64_t count = plan.bundles[b].count;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) sum_task(table + tasks[i].tensor, tasks + i);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < count; i++) combine(table + tasks[i].tensor, tasks + i);
    }
    free_plan(&plan);
    return 0;
}

/* Updates momentum and parameters by row_roots and col_roots, and vectors' second moments. */
int striped_update(Tensor *table, int64_t tensors, const Settings *settings, int64_t threads)
{
    Plan plan;
    if (make_plan(&plan, table, tensors, settings, 0))
        return 1;
    int64_t count = 0;
    for (int64_t b = 0; b < plan.bundle_count; b++) count += plan.bundles[b].count;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++)
        update_task(table + plan.tasks[i].tensor, plan.tasks + i, settings);
    free_plan(&plan);
    return 0;
}

/* Takes a task, unless another thread has taken it: returns whether it is the caller's. */
static int take(int *is_taken)
{
    int was_taken;
#pragma omp atomic capture
    {
        was_taken = *is_taken;
        *is_taken = 1;
    }
    return !was_taken;
}

/* Statistics, stripes and update in one go.
 *
 * A thread that sums a slice is the one to update it, unless it falls behind: cores that share no
 * cache would have to fetch the gradient from each other.
 */
int striped_step(Tensor *table, int64_t tensors, const Settings *settings, int64_t threads)
{
    Plan plan;
    if (make_plan(&plan, table, tensors, settings, 1))
        return 1;
#pragma omp parallel num_threads(threads)
    for (int64_t b = 0; b < plan.bundle_count; b++) {
        Task *tasks = plan.tasks + plan.bundles[b].first;
        int64_t count = plan.bundles[b].count;
        int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        int64_t share = thread * count / team, share_end = (thread + 1) * count / team;
        for (int64_t k = 0; k < count; k++) { /* its own share first, then what is left of others' */
            Task *task = tasks + (share + k) % count;
            const Tensor *t = table + task->tensor;
            if (!take(&task->is_first_taken))
                continue;
            if (is_lagged(t, settings))
                roots_task(t, task, settings);
            else
                sum_task(t, task);
        }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) {
            const Tensor *t = table + tasks[i].tensor;
            if (is_lagged(t, settings))
                continue;
            combine(t, tasks + i);
            average_task(t, tasks + i, settings);
            roots_task(t, tasks + i, settings);
        }
        for (int64_t k = 0; k < count; k++) { /* backwards: what was summed last is the nearest */
            Task *task = tasks + (share_end - 1 - k + count) % count;
            const Tensor *t = table + task->tensor;
            if (!take(&task->is_second_taken))
                continue;
            if (is_lagged(t, settings))
                sum_task(t, task); /* only now, for the update to find its gradient near */
            update_task(t, task, settings);
        }
        if (!settings->lagged)
            continue;
#pragma omp barrier
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < count; i++) {
            const Tensor *t = table + tasks[i].tensor;
            if (!is_lagged(t, settings))
                continue;
            combine(t, tasks + i);
            average_task(t, tasks + i, settings);
        }
    }
    free_plan(&plan);
    return 0;
}
