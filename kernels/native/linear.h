/* Linear layers over packed weights: arguments of the kernels and their exported forms.

   A weight matrix [N', K] is stored in NB = ceil(N'/64) blocks of 64 columns (outputs), padded with zeros:
   int8 as [NB][K4][64][4], K4 = ceil(K/4), four inputs of one column side by side; float as [NB][K][64].
   With silu_mul a block holds 32 gate columns, then the same 32 of up, and NB = ceil(N/32) for N outputs. */
#ifndef MR_LINEAR_H
#define MR_LINEAR_H

#include "millrace.h"

#define MR_BLOCK 64 /* columns in a block of weights */

enum mr_activation { MR_NONE = 0, MR_SILU_MUL = 1 };

/* y[rows, N] = activation(rms_norm(x) W^T + bias) + residual; bias, norm and residual may be NULL. */
struct mr_linear {
    const float *x; /* [rows, K] */
    float *y;       /* [rows, N] */
    size_t rows, K, N;
    const float *weight;   /* [NB][K][64] */
    const float *bias;     /* [NB * 64], packed column order */
    const float *norm;     /* [K] */
    const float *residual; /* [rows, N] */
    float norm_epsilon;
    int32_t activation;
    void *scratch; /* with norm: mr_linear_scratch_bytes(rows, K), 64-byte aligned */
};

/* The same with int8 weights, and rows of x quantized to int8 on the way in. K <= MR_QLINEAR_MAX_K. */
struct mr_qlinear {
    const float *x;
    float *y;
    size_t rows, K, N;
    const int8_t *weight;  /* [NB][K4][64][4] */
    const float *scale;    /* [NB * 64] */
    const int32_t *colsum; /* [NB * 64] */
    const float *bias;
    const float *norm;
    const float *residual;
    float norm_epsilon;
    int32_t activation;
    void *scratch; /* mr_qlinear_scratch_bytes(rows, K), 64-byte aligned */
};

/* 255 * 128 * K must fit in an int32. */
#define MR_QLINEAR_MAX_K 65536

/* Blocks of 64 packed columns for N outputs. */
MR_INLINE size_t mr_num_blocks(size_t N, int32_t activation) {
    return mr_ceil_div(N, activation == MR_SILU_MUL ? MR_BLOCK / 2 : MR_BLOCK);
}

/* Elements of a quantized row: whole vectors, and an odd number of lines so that rows do not share cache sets. */
MR_INLINE size_t mr_quantized_stride(size_t K) { return mr_round_up(K, 64) | 64; }

MR_INLINE size_t mr_qlinear_scratch_bytes(size_t rows, size_t K) {
    /* two bytes an element (forms without VNNI keep words), and one scale a row */
    return rows * mr_quantized_stride(K) * 2 + mr_round_up(rows * sizeof(float), 64);
}

MR_INLINE size_t mr_linear_scratch_bytes(size_t rows, size_t K) { return rows * K * sizeof(float); }

#endif
