/* QLinear: int8 weights, activations quantized row by row.

   Two loops: rows are normalized and quantized into scratch, then tasks of (rows x blocks of 64 columns) multiply. With few
   rows the first loop runs on the calling thread. Sums are integers and every float operation is lane-wise, so a row's
   result depends on nothing but the row. */
#include "dot.h"
#include "rows.h"
#include "split.h"

struct layer {
    const struct mr_qlinear *args;
    mr_quantized *quantized; /* [rows, stride] */
    float *row_scale;        /* [rows] */
    size_t stride;
    struct mr_split split;
};

#define ROWS_PER_TASK 8
#define PARALLEL_QUANTIZE 65536 /* elements from which quantizing is worth a parallel loop */

/* ---- quantizing ---- */

/* max |x| as the bits of a float: integer order is the order of magnitudes, and puts NaN on top so that it is not lost. */
MR_INLINE float largest_magnitude(const struct mr_qlinear *args, const float *x, float inverse_rms) {
    i32x16 largest = mr_splat_i32(0);
    for (size_t k = 0; k < args->K; k += MR_LANES) {
        f32x16 v = mr_normalized(x, args->norm, inverse_rms, k, mr_min(args->K - k, MR_LANES));
        largest = mr_max_i32(largest, mr_bits(mr_abs(v)));
    }
    int32_t bits = mr_max_lanes_i32(largest);
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

static void quantize_row(const struct layer *layer, size_t row) {
    const struct mr_qlinear *args = layer->args;
    const float *x = args->x + row * args->K;
    mr_quantized *to = layer->quantized + row * layer->stride;
    float inverse_rms = args->norm ? mr_inverse_rms(x, args->K, args->norm_epsilon) : 1.0f;
    float scale = largest_magnitude(args, x, inverse_rms) / 127.0f;
    float inverse = scale >= 0x1p-126f ? 1.0f / scale : 0.0f;
    layer->row_scale[row] = scale;
    for (size_t k = 0; k < args->K; k += MR_LANES) {
        f32x16 v = mr_normalized(x, args->norm, inverse_rms, k, mr_min(args->K - k, MR_LANES));
        mr_store_quantized(to + k, mr_bits(v * inverse + MR_ROUNDING_BIAS)); /* rounded, in the low byte */
    }
}

static void quantize_rows(void *user, size_t index) {
    const struct layer *layer = user;
    size_t end = mr_min((index + 1) * ROWS_PER_TASK, layer->args->rows);
    for (size_t row = index * ROWS_PER_TASK; row < end; ++row) quantize_row(layer, row);
}

static void quantize(struct layer *layer, const struct mr_parallel *parallel) {
    const struct mr_qlinear *args = layer->args;
    size_t tasks = mr_ceil_div(args->rows, ROWS_PER_TASK);
    if (parallel->threads > 1 && args->rows * args->K >= PARALLEL_QUANTIZE) {
        parallel->run(parallel->context, quantize_rows, tasks, layer);
    } else {
        for (size_t index = 0; index < tasks; ++index) quantize_rows(layer, index);
    }
}

/* ---- multiplying ---- */

/* The integer sums of `rows` rows and one block; `rows` is a constant wherever this is inlined. */
MR_INLINE void block_sums(const struct layer *layer, size_t row, size_t rows, const int8_t *weight, struct mr_passes *passes,
                          i32x16 (*sums)[4]) {
    const mr_quantized *a = layer->quantized + row * layer->stride;
    size_t K4 = mr_ceil_div(layer->args->K, 4);
    for (size_t vector = 0; vector < 4; vector += MR_DOT_VECTORS(rows))
        mr_dot(a, layer->stride, weight + 64 * vector, K4, rows, MR_DOT_VECTORS(rows), mr_begin_pass(passes),
               (i32x16(*)[4])&sums[0][vector]);
}

static void tile(const struct layer *layer, size_t row, size_t rows, const int8_t *weight, struct mr_passes *passes,
                 i32x16 (*sums)[4]) {
    switch (rows) {
    case 1: block_sums(layer, row, 1, weight, passes, sums); break;
    case 2: block_sums(layer, row, 2, weight, passes, sums); break;
#if MR_DOT_ROWS > 2
    case 3: block_sums(layer, row, 3, weight, passes, sums); break;
    case 4: block_sums(layer, row, 4, weight, passes, sums); break;
#endif
#if MR_DOT_ROWS > 4
    case 5: block_sums(layer, row, 5, weight, passes, sums); break;
    case 6: block_sums(layer, row, 6, weight, passes, sums); break;
#endif
    }
}

/* Where row `row` of a block ends up. */
MR_INLINE struct mr_finish finish_of(const struct mr_qlinear *args, size_t row, size_t block) {
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

/* Scales, bias, activation and residual of the rows of a tile. */
static void finish_tile(const struct layer *layer, size_t row, size_t rows, size_t block, i32x16 (*sums)[4]) {
    const struct mr_qlinear *args = layer->args;
    f32x16 scale[4];
    i32x16 offset[4];
    for (size_t j = 0; j < 4; ++j) {
        scale[j] = mr_load(args->scale + block * MR_BLOCK + 16 * j);
        offset[j] = mr_load_i32(args->colsum + block * MR_BLOCK + 16 * j) * MR_DOT_OFFSET;
    }
    for (size_t r = 0; r < rows; ++r) {
        struct mr_finish to = finish_of(args, row + r, block);
        f32x16 row_scale = mr_splat(layer->row_scale[row + r]);
        f32x16 values[4];
        for (size_t j = 0; j < 4; ++j)
            values[j] = __builtin_convertvector(sums[r][j] - offset[j], f32x16) * scale[j] * row_scale;
        mr_finish_row(values, &to);
    }
}

static void multiply(void *user, size_t index, size_t next) {
    const struct layer *layer = user;
    struct mr_range rows = mr_split_rows(&layer->split, index);
    struct mr_range blocks = mr_split_blocks(&layer->split, index);
    size_t block_bytes = mr_ceil_div(layer->args->K, 4) * 4 * MR_BLOCK;
    for (size_t block = blocks.begin; block < blocks.end; ++block) {
        const int8_t *weight = layer->args->weight + block * block_bytes;
        size_t next_block = mr_next_block(&layer->split, block, blocks.end, next);
        struct mr_passes passes = mr_passes_over(layer->args->weight + next_block * block_bytes, block_bytes, &layer->split, rows,
                                                 MR_DOT_ROWS, MR_DOT_VECTORS(mr_next_tile(rows.end - rows.begin, MR_DOT_ROWS)));
        for (size_t row = rows.begin, height; row < rows.end; row += height) {
            i32x16 sums[MR_DOT_ROWS][4];
            height = mr_next_tile(rows.end - row, MR_DOT_ROWS);
            tile(layer, row, height, weight, &passes, sums);
            finish_tile(layer, row, height, block, sums);
        }
    }
}

void MR_NAME(mr_qlinear)(const struct mr_qlinear *args, const struct mr_parallel *parallel) {
    if (args->rows == 0) return;
    size_t stride = mr_quantized_stride(args->K);
    struct layer layer = {.args = args, .quantized = args->scratch, .stride = stride};
    layer.row_scale = (float *)((char *)args->scratch + args->rows * stride * sizeof(mr_quantized));
    layer.split = mr_split_layer(args->rows, mr_num_blocks(args->N, args->activation), MR_DOT_ROWS, args->K,
                                 parallel->threads);
    quantize(&layer, parallel);
    mr_run_chained(parallel, multiply, mr_split_count(&layer.split), &layer);
}
