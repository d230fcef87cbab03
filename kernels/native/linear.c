/* Linear: float weights, each output one fused multiply-add after the other along K.

   The same shape as qlinear.c: with `norm` rows are normalized into scratch first, then tasks of (rows x blocks of 64
   columns) multiply. */
#include "ahead.h"
#include "rows.h"
#include "split.h"

/* Rows and vectors of 16 columns that a tile keeps in registers. */
#if defined(__AVX512F__)
#define MAX_ROWS 6
#define VECTORS(rows) 4
#elif defined(__AVX2__)
#define MAX_ROWS 6
#define VECTORS(rows) ((rows) == 1 ? 4 : (rows) == 2 ? 2 : 1)
#else
#define MAX_ROWS 6
#define VECTORS(rows) 1
#endif

struct layer {
    const struct mr_linear *args;
    const float *input; /* [rows, K], normalized */
    struct mr_split split;
};

#define ROWS_PER_TASK 8
#define PARALLEL_NORM 65536 /* elements from which normalizing is worth a parallel loop */
#define MULTIPLY_COST 4     /* a float multiply-add takes four times as long as an int8 one */

static void normalize_rows(void *user, size_t index) {
    const struct mr_linear *args = ((struct layer *)user)->args;
    size_t end = mr_min((index + 1) * ROWS_PER_TASK, args->rows);
    for (size_t row = index * ROWS_PER_TASK; row < end; ++row) {
        const float *x = args->x + row * args->K;
        float *to = (float *)args->scratch + row * args->K;
        float inverse_rms = mr_inverse_rms(x, args->K, args->norm_epsilon);
        for (size_t k = 0; k < args->K; k += MR_LANES) {
            size_t n = mr_min(args->K - k, MR_LANES);
            mr_store_n(to + k, mr_normalized(x, args->norm, inverse_rms, k, n), n);
        }
    }
}

static void normalize(struct layer *layer, const struct mr_parallel *parallel) {
    const struct mr_linear *args = layer->args;
    size_t tasks = mr_ceil_div(args->rows, ROWS_PER_TASK);
    if (parallel->threads > 1 && args->rows * args->K >= PARALLEL_NORM) {
        parallel->run(parallel->context, normalize_rows, tasks, layer);
    } else {
        for (size_t index = 0; index < tasks; ++index) normalize_rows(layer, index);
    }
}

/* Sums of `rows` rows and `vectors` vectors of columns, both constant wherever this is inlined. */
MR_INLINE void dot(const float *x, size_t K, const float *weight, size_t rows, size_t vectors, struct mr_ahead ahead,
                   f32x16 (*sums)[4]) {
    f32x16 acc[MAX_ROWS][4];
    MR_UNROLL for (size_t r = 0; r < rows; ++r) MR_UNROLL for (size_t j = 0; j < vectors; ++j) acc[r][j] = mr_splat(0.0f);
    for (size_t k = 0; k < K; ++k, weight += MR_BLOCK) {
        mr_fetch_ahead(&ahead);
        f32x16 w[4];
        MR_UNROLL for (size_t j = 0; j < vectors; ++j) w[j] = mr_load(weight + 16 * j);
        MR_UNROLL for (size_t r = 0; r < rows; ++r) {
            f32x16 a = mr_splat(x[r * K + k]);
            MR_UNROLL for (size_t j = 0; j < vectors; ++j) acc[r][j] = mr_fma(a, w[j], acc[r][j]);
        }
    }
    MR_UNROLL for (size_t r = 0; r < rows; ++r) MR_UNROLL for (size_t j = 0; j < vectors; ++j) sums[r][j] = acc[r][j];
}

MR_INLINE void block_sums(const struct layer *layer, size_t row, size_t rows, const float *weight, struct mr_passes *passes,
                          f32x16 (*sums)[4]) {
    size_t K = layer->args->K;
    for (size_t vector = 0; vector < 4; vector += VECTORS(rows))
        dot(layer->input + row * K, K, weight + 16 * vector, rows, VECTORS(rows), mr_begin_pass(passes), (f32x16(*)[4])&sums[0][vector]);
}

static void tile(const struct layer *layer, size_t row, size_t rows, const float *weight, struct mr_passes *passes,
                 f32x16 (*sums)[4]) {
    switch (rows) {
    case 1: block_sums(layer, row, 1, weight, passes, sums); break;
    case 2: block_sums(layer, row, 2, weight, passes, sums); break;
    case 3: block_sums(layer, row, 3, weight, passes, sums); break;
    case 4: block_sums(layer, row, 4, weight, passes, sums); break;
    case 5: block_sums(layer, row, 5, weight, passes, sums); break;
    case 6: block_sums(layer, row, 6, weight, passes, sums); break;
    }
}

/* Where row `row` of a block ends up. */
MR_INLINE struct mr_finish finish_of(const struct mr_linear *args, size_t row, size_t block) {
    size_t outputs = args->activation == MR_SILU_MUL ? MR_BLOCK / 2 : MR_BLOCK;
    size_t at = row * args->N + block * outputs;
    return (struct mr_finish){
        .bias = args->bias ? args->bias + block * MR_BLOCK : NULL,
        .residual = args->residual ? args->residual + at : NULL,
        .y = args->y + at,
        .columns = mr_min(args->N - block * outputs, outputs),
        .activation = args->activation,
    };
}

static void finish_tile(const struct layer *layer, size_t row, size_t rows, size_t block, f32x16 (*sums)[4]) {
    for (size_t r = 0; r < rows; ++r) {
        struct mr_finish to = finish_of(layer->args, row + r, block);
        mr_finish_row(sums[r], &to);
    }
}

static void multiply(void *user, size_t index, size_t next) {
    const struct layer *layer = user;
    struct mr_range rows = mr_split_rows(&layer->split, index);
    struct mr_range blocks = mr_split_blocks(&layer->split, index);
    size_t block_floats = layer->args->K * MR_BLOCK;
    for (size_t block = blocks.begin; block < blocks.end; ++block) {
        const float *weight = layer->args->weight + block * block_floats;
        size_t next_block = mr_next_block(&layer->split, block, blocks.end, next);
        struct mr_passes passes = mr_passes_over(layer->args->weight + next_block * block_floats, block_floats * sizeof(float), &layer->split, rows,
                                                 MAX_ROWS, VECTORS(mr_next_tile(rows.end - rows.begin, MAX_ROWS)));
        for (size_t row = rows.begin, height; row < rows.end; row += height) {
            f32x16 sums[MAX_ROWS][4];
            height = mr_next_tile(rows.end - row, MAX_ROWS);
            tile(layer, row, height, weight, &passes, sums);
            finish_tile(layer, row, height, block, sums);
        }
    }
}

void MR_NAME(mr_linear)(const struct mr_linear *args, const struct mr_parallel *parallel) {
    if (args->rows == 0) return;
    struct layer layer = {.args = args, .input = args->norm ? args->scratch : args->x};
    layer.split = mr_split_layer(args->rows, mr_num_blocks(args->N, args->activation), MAX_ROWS, args->K * MULTIPLY_COST,
                                 parallel->threads);
    if (args->norm) normalize(&layer, parallel);
    mr_run_chained(parallel, multiply, mr_split_count(&layer.split), &layer);
}
