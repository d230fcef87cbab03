/* The linear layers' kernels: one that does everything for few rows, and small ones around cuBLAS for many (linear_op.c). */
#include "common.cuh"

#define CHUNK 8 /* elements of T in one load */
#define MOST_WARPS 8

struct gemv {
    const void *x;
    int x_is_f32;
    const unsigned short *weight;
    const float *bias;
    const float *norm;
    const float *residual;
    unsigned short *y16;
    float *y32;
    int rows, N, K;
    float epsilon;
    int silu_mul;
    int owned; /* rows of the weight that a block owns; with silu_mul half of gate and the same of up */
};

/* The weight's row that is number `i` of this block's, or -1 past the end. */
MR_DEVICE int weight_row(const struct gemv *g, int i) {
    int outputs = g->silu_mul ? g->owned / 2 : g->owned;
    int n = (int)blockIdx.x * outputs + i % outputs;
    return n < g->N ? n + (i / outputs) * g->N : -1;
}

/* Eight elements of row t of x from k on. */
MR_DEVICE void load_x(const struct gemv *g, int t, int k, float *out) {
    if (g->x_is_f32) mr_load_floats((const float *)g->x + (long long)t * g->K + k, out);
    else mr_unpack(*(const struct mr_words *)((const unsigned short *)g->x + (long long)t * g->K + k), out);
}

/* One output: the sum, scaled by the norm, with bias, activation and residual. `up` counts with silu_mul only. */
MR_DEVICE void store(const struct gemv *g, int t, int row, float y, float up, float inverse) {
    y *= inverse;
    if (g->bias) y += g->bias[row];
    if (g->silu_mul) {
        up *= inverse;
        if (g->bias) up += g->bias[row + g->N];
        y = mr_silu(y) * up;
    }
    long long at = (long long)t * g->N + row;
    if (g->residual) y += g->residual[at];
    if (g->y32) g->y32[at] = y;
    else g->y16[at] = MR_FROM_FLOAT(y);
}

/* A block owns a few rows of the weight and all rows of x; its threads split K, so that a weight is read once, sixteen bytes at a
   time, and the loads of all its rows are under way together; the first ones leave before the kernel that makes x has ended. Each
   block reads x and norm for itself, out of the second cache. The norm needs no pass of its own: rms_norm(x) . w is
   rsqrt(mean(x^2) + epsilon) * sum(x * norm * w), and the sum of squares is gathered beside the products. Sums go through one fixed
   tree, so a result does not depend on what else runs. OWNED * ROWS + ROWS sums must fit a warp's lanes. */
#define MR_GEMV(NAME, ROWS, OWNED)                                                                                            \
    MR_KERNEL void NAME(const void *x, int x_is_f32, const unsigned short *weight, const float *bias, const float *norm,      \
                        const float *residual, unsigned short *y16, float *y32, int rows, int N, int K, float epsilon,        \
                        int silu_mul) {                                                                                       \
        const struct gemv g = {x, x_is_f32, weight, bias, norm, residual, y16, y32, rows, N, K, epsilon, silu_mul, OWNED};    \
        MR_SHARED float partial[MOST_WARPS][OWNED * ROWS + ROWS];                                                             \
        float sum[OWNED][ROWS], squares[ROWS];                                                                                \
        const unsigned short *w[OWNED];                                                                                       \
        struct mr_words packed[OWNED];                                                                                        \
        int k = (int)threadIdx.x * CHUNK, step = (int)blockDim.x * CHUNK;                                                     \
        MR_UNROLL                                                                                                             \
        for (int t = 0; t < ROWS; ++t) squares[t] = 0.0f;                                                                     \
        MR_UNROLL                                                                                                             \
        for (int i = 0; i < OWNED; ++i) {                                                                                     \
            int row = weight_row(&g, i);                                                                                      \
            w[i] = weight + (long long)(row < 0 ? 0 : row) * K; /* past the end: read something, store nothing */             \
            MR_UNROLL                                                                                                         \
            for (int t = 0; t < ROWS; ++t) sum[i][t] = 0.0f;                                                                  \
        }                                                                                                                     \
        MR_UNROLL                                                                                                             \
        for (int i = 0; i < OWNED; ++i) packed[i] = mr_load_once(w[i] + (k < K ? k : 0));                                     \
        mr_let_next_begin();                                                                                                  \
        mr_wait_for_previous();                                                                                               \
        while (k < K) {                                                                                                       \
            float a[ROWS][CHUNK];                                                                                             \
            MR_UNROLL                                                                                                         \
            for (int t = 0; t < ROWS; ++t) load_x(&g, t < rows ? t : 0, k, a[t]);                                             \
            if (norm) {                                                                                                       \
                float gain[CHUNK];                                                                                            \
                mr_load_floats(norm + k, gain);                                                                               \
                MR_UNROLL                                                                                                     \
                for (int t = 0; t < ROWS; ++t) {                                                                              \
                    MR_UNROLL                                                                                                 \
                    for (int j = 0; j < CHUNK; ++j) {                                                                         \
                        squares[t] = fmaf(a[t][j], a[t][j], squares[t]);                                                      \
                        a[t][j] *= gain[j];                                                                                   \
                    }                                                                                                         \
                }                                                                                                             \
            }                                                                                                                 \
            MR_UNROLL                                                                                                         \
            for (int i = 0; i < OWNED; ++i) {                                                                                 \
                float b[CHUNK];                                                                                               \
                mr_unpack(packed[i], b);                                                                                      \
                MR_UNROLL                                                                                                     \
                for (int t = 0; t < ROWS; ++t) {                                                                              \
                    MR_UNROLL                                                                                                 \
                    for (int j = 0; j < CHUNK; ++j) sum[i][t] = fmaf(b[j], a[t][j], sum[i][t]);                               \
                }                                                                                                             \
            }                                                                                                                 \
            k += step;                                                                                                        \
            if (k >= K) break;                                                                                                \
            MR_UNROLL                                                                                                         \
            for (int i = 0; i < OWNED; ++i) packed[i] = mr_load_once(w[i] + k);                                               \
        }                                                                                                                     \
        int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;                                                       \
        MR_UNROLL                                                                                                             \
        for (int t = 0; t < ROWS; ++t) {                                                                                      \
            MR_UNROLL                                                                                                         \
            for (int i = 0; i < OWNED; ++i) {                                                                                 \
                float s = mr_warp_sum(sum[i][t]);                                                                             \
                if (lane == 0) partial[warp][i * ROWS + t] = s;                                                               \
            }                                                                                                                 \
            float s = mr_warp_sum(squares[t]);                                                                                \
            if (lane == 0) partial[warp][OWNED * ROWS + t] = s;                                                               \
        }                                                                                                                     \
        __syncthreads();                                                                                                      \
        if (warp > 0) return;                                                                                                 \
        float s = 0.0f; /* lane i * ROWS + t: output i of row t; behind the outputs the squares of each row */                \
        if (lane < OWNED * ROWS + ROWS)                                                                                       \
            for (int v = 0; v < (int)blockDim.x >> 5; ++v) s += partial[v][lane];                                             \
        int i = lane / ROWS, t = lane % ROWS, outputs = silu_mul ? OWNED / 2 : OWNED;                                         \
        float up = __shfl_sync(MR_FULL_WARP, s, (lane + OWNED / 2 * ROWS) & 31);                                              \
        float all = __shfl_sync(MR_FULL_WARP, s, OWNED * ROWS + t);                                                           \
        int row = i < outputs && t < rows ? weight_row(&g, i) : -1;                                                           \
        if (row >= 0) store(&g, t, row, s, up, norm ? rsqrtf(all / (float)K + epsilon) : 1.0f);                               \
    }

/* Where few rows make few blocks, a block owns fewer. linear_op.c chooses, and knows the numbers. */
MR_GEMV(millrace_gemv_1, 1, 4)
MR_GEMV(millrace_gemv_1_wide, 1, 8)
MR_GEMV(millrace_gemv_2, 2, 4)
MR_GEMV(millrace_gemv_2_wide, 2, 8)

/* Eight floats of T side by side. */
MR_DEVICE struct mr_words pack(const float *values) {
    struct mr_words out;
    MR_UNROLL
    for (int j = 0; j < 4; ++j) out.w[j] = MR_FROM_FLOAT(values[2 * j]) | (unsigned)MR_FROM_FLOAT(values[2 * j + 1]) << 16;
    return out;
}

/* y = rms_norm(x) in T, or x in T without a norm: a block a row, K a multiple of 8. */
MR_KERNEL void millrace_norm_rows(const float *x, const float *norm, unsigned short *y, int K, float epsilon) {
    MR_SHARED float partial[MOST_WARPS];
    const float *row = x + (long long)blockIdx.x * K;
    unsigned short *out = y + (long long)blockIdx.x * K;
    float inverse = 1.0f, values[CHUNK], gain[CHUNK];
    mr_let_next_begin();
    mr_wait_for_previous();
    if (norm) {
        float squares = 0.0f;
        for (int k = (int)threadIdx.x * CHUNK; k < K; k += (int)blockDim.x * CHUNK) {
            mr_load_floats(row + k, values);
            MR_UNROLL
            for (int j = 0; j < CHUNK; ++j) squares = fmaf(values[j], values[j], squares);
        }
        squares = mr_warp_sum(squares);
        if (((int)threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = squares;
        __syncthreads();
        squares = 0.0f;
        for (int v = 0; v < (int)blockDim.x >> 5; ++v) squares += partial[v];
        inverse = rsqrtf(squares / (float)K + epsilon);
    }
    for (int k = (int)threadIdx.x * CHUNK; k < K; k += (int)blockDim.x * CHUNK) {
        mr_load_floats(row + k, values);
        if (norm) {
            mr_load_floats(norm + k, gain);
            MR_UNROLL
            for (int j = 0; j < CHUNK; ++j) values[j] *= inverse * gain[j];
        }
        *(struct mr_words *)(out + k) = pack(values);
    }
}

/* y [rows, N] = silu(gate) * up of gate_up [rows, 2N] (+ bias [2N]). N a multiple of 8: eight elements a thread; else one. */
MR_KERNEL void millrace_silu_mul(const unsigned short *gate_up, const float *bias, unsigned short *y, int rows, int N) {
    mr_let_next_begin();
    mr_wait_for_previous();
    int each = N % CHUNK ? 1 : CHUNK;
    long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * each;
    if (at >= (long long)rows * N) return;
    long long t = at / N;
    int n = (int)(at - t * N);
    const unsigned short *gate = gate_up + t * 2 * N + n, *up = gate + N;
    if (each == 1) {
        float g = MR_TO_FLOAT(*gate) + (bias ? bias[n] : 0.0f), u = MR_TO_FLOAT(*up) + (bias ? bias[n + N] : 0.0f);
        y[at] = MR_FROM_FLOAT(mr_silu(g) * u);
        return;
    }
    float g[CHUNK], u[CHUNK];
    mr_unpack(*(const struct mr_words *)gate, g);
    mr_unpack(*(const struct mr_words *)up, u);
    MR_UNROLL
    for (int j = 0; j < CHUNK; ++j) {
        if (bias) {
            g[j] += bias[n + j];
            u[j] += bias[n + N + j];
        }
        g[j] = mr_silu(g[j]) * u[j];
    }
    *(struct mr_words *)(y + at) = pack(g);
}

/* y [rows, N] = residual + bias, each where given: what a product is then added to. */
MR_KERNEL void millrace_residual_bias(const float *residual, const float *bias, float *y, int rows, int N) {
    mr_let_next_begin();
    mr_wait_for_previous();
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (long long)rows * N) return;
    y[at] = (residual ? residual[at] : 0.0f) + (bias ? bias[at % N] : 0.0f);
}

/* y [rows, N] += bias. */
MR_KERNEL void millrace_add_bias(unsigned short *y, const float *bias, int rows, int N) {
    mr_let_next_begin();
    mr_wait_for_previous();
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (long long)rows * N) return;
    y[at] = MR_FROM_FLOAT(MR_TO_FLOAT(y[at]) + bias[at % N]);
}
