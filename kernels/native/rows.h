/* What happens to a row of activations before it meets the weights, and to a row of sums after.

   Before: RMSNorm. After: bias, SiLU(gate) * up, residual. Shared by the int8 and the float layer. */
#ifndef MR_ROWS_H
#define MR_ROWS_H

#include "linear.h"
#include "vecmath.h"

/* 1 / sqrt(mean(x^2) + epsilon). Four sums of 16 lanes take turns, added as (0 + 1) + (2 + 3), then the lane tree. */
MR_INLINE float mr_inverse_rms(const float *x, size_t K, float epsilon) {
    f32x16 sum[4] = {0};
    size_t k = 0;
    for (; k + 64 <= K; k += 64) {
        for (size_t j = 0; j < 4; ++j) {
            f32x16 v = mr_load(x + k + 16 * j);
            sum[j] = mr_fma(v, v, sum[j]);
        }
    }
    for (size_t j = 0; k < K; k += MR_LANES, ++j) {
        f32x16 v = mr_load_n(x + k, mr_min(K - k, MR_LANES));
        sum[j] = mr_fma(v, v, sum[j]);
    }
    float total = mr_sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
    return 1.0f / mr_sqrtf(total / (float)K + epsilon);
}

/* 16 (or n) normalized elements at k. */
MR_INLINE f32x16 mr_normalized(const float *x, const float *norm, float inverse_rms, size_t k, size_t n) {
    f32x16 v = n == MR_LANES ? mr_load(x + k) : mr_load_n(x + k, n);
    if (!norm) return v;
    f32x16 weight = n == MR_LANES ? mr_load(norm + k) : mr_load_n(norm + k, n);
    return v * inverse_rms * weight;
}

/* Where a row of one block ends up. */
struct mr_finish {
    const float *bias;     /* of the block [64], or NULL */
    const float *residual; /* at the block's first output, or NULL */
    float *y;              /* at the block's first output */
    size_t columns;        /* outputs that exist: up to 64, or 32 with silu_mul */
    int32_t activation;
};

/* Turn the 64 sums of a row and block into outputs. */
MR_INLINE void mr_finish_row(const f32x16 sums[4], const struct mr_finish *to) {
    f32x16 v[4];
    for (size_t j = 0; j < 4; ++j) v[j] = to->bias ? sums[j] + mr_load(to->bias + 16 * j) : sums[j];
    size_t vectors = 4;
    if (to->activation == MR_SILU_MUL) {
        v[0] = mr_silu(v[0]) * v[2];
        v[1] = mr_silu(v[1]) * v[3];
        vectors = 2;
    }
    for (size_t j = 0; j < vectors && 16 * j < to->columns; ++j) {
        size_t n = mr_min(to->columns - 16 * j, MR_LANES);
        if (MR_LIKELY(n == MR_LANES)) {
            if (to->residual) v[j] += mr_load(to->residual + 16 * j);
            mr_store(to->y + 16 * j, v[j]);
        } else {
            if (to->residual) v[j] += mr_load_n(to->residual + 16 * j, n);
            mr_store_n(to->y + 16 * j, v[j], n);
        }
    }
}

#endif
