/* The arguments that cpu.py passes, and the compilation of functions for several processors. */

#ifndef STRIPED_ENTRY_H
#define STRIPED_ENTRY_H

#include <stdint.h>

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

/* a function that is inlined into a multiversioned one is compiled for its processor too */
#define INLINE static inline __attribute__((always_inline))

#define CODE_BLOCK 128 /* elements of a row that share a scale: momentum.py's BLOCK_SIZE */
#define TASK_ELEMENTS (1 << 17) /* half a megabyte of gradient: far longer than its scheduling */
#define MIN_TASK_ROWS 64 /* a slice's own column sums are then 1/64 of its gradient, or less */
#define MAX_TASK_ROWS 1024 /* the most squares added in float32; then a sum goes on in double */
#define SUM_CHUNK 1024 /* elements of a row that the statistics sum in float32 */
#define SUM_ROWS 4 /* rows that the statistics read together */
#define PARTIAL_SUMS 32 /* parts of a sum: two of the widest vectors, added to in turn */
#define PARAMETER_AHEAD 512 /* elements from a chunk to the prefetched part of the parameter */
#define GRADIENT_AHEAD 256 /* the same for a float32 gradient, while it is summed */
#define BUNDLE_ELEMENTS (1 << 19) /* of a bundle's tensors: their gradients stay in a cache */
#define SEED 0x571219EDu /* rounding.py's */

enum { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 }; /* cpu.py's _FORMATS */

/* A parameter or a part of one, as interface.py's Entry; cpu.py fills it in, 64 bits a field. */
typedef struct {
    void *param;              /* [elements] of param_dtype */
    const void *grad;         /* [elements] of grad_dtype; NULL if it was folded */
    void *exp_avg;            /* [elements], codes by momentum_dtype */
    float *exp_avg_scale;     /* [bands * block_rows, ceil(columns / 128)], integer codes only */
    float *exp_avg_sq_row;    /* [bands * block_rows, column_blocks]; a vector's exp_avg_sq */
    float *exp_avg_sq_col;    /* [bands, columns] */
    void *param_low_bits;     /* rounding.py's join: int32 of a vector, int8 of a matrix; or NULL */
    float *row_sums;          /* of squares, shaped as the stripes */
    float *col_sums;
    float *row_roots;         /* a and c, shaped as the stripes; striped_step allocates its own */
    float *col_roots;
    float *sketch;            /* of exp_avg_scale's shape; NULL if none is kept */
    int64_t bands, block_rows, columns, column_blocks; /* a vector: 1, 1, elements, 1 */
    int64_t whole_start, whole_stride; /* its place in the whole parameter: interface.py's Entry */
    int64_t is_matrix;
    int64_t param_dtype, grad_dtype, momentum_dtype;
    int64_t step;
} Entry;

/* interface.py's Settings */
typedef struct {
    double lr, beta1, beta2, eps, weight_decay;
    int64_t maximize, nesterov, stochastic_rounding, lagged;
} Settings;

#endif
