/* QEmbed and Embed: a row of the table is one column of a weight block, four bytes (or one float) every 256 bytes.

   A strided walk, but of as many elements as the hidden size only; a second copy of the table would cost its whole size. */
#include "embed.h"

#include "vec.h"

#define ROWS_PER_TASK 4

struct table {
    const void *args;
    size_t rows;
    void (*copy_row)(const void *args, size_t row);
};

static void copy_rows(void *user, size_t index) {
    const struct table *table = user;
    size_t end = mr_min((index + 1) * ROWS_PER_TASK, table->rows);
    for (size_t row = index * ROWS_PER_TASK; row < end; ++row) table->copy_row(table->args, row);
}

static void copy_all(struct table *table, const struct mr_parallel *parallel) {
    size_t tasks = mr_ceil_div(table->rows, ROWS_PER_TASK);
    if (tasks > 1) {
        parallel->run(parallel->context, copy_rows, tasks, table);
    } else if (tasks == 1) {
        copy_rows(table, 0);
    }
}

static void copy_quantized(const void *user, size_t row) {
    const struct mr_qembed *args = user;
    size_t id = (size_t)args->ids[row], K4 = mr_ceil_div(args->K, 4);
    const int8_t *from = args->weight + id / MR_BLOCK * K4 * 4 * MR_BLOCK + id % MR_BLOCK * 4;
    f32x16 scale = mr_splat(args->scale[id]);
    float *y = args->y + row * args->K;
    for (size_t k = 0; k < args->K; k += MR_LANES) {
        int8_t bytes[MR_LANES] = {0};
        size_t n = mr_min(args->K - k, MR_LANES);
        for (size_t i = 0; i < n; i += 4, from += 4 * MR_BLOCK) __builtin_memcpy(bytes + i, from, 4);
        i8x16 w;
        __builtin_memcpy(&w, bytes, sizeof w);
        f32x16 v = __builtin_convertvector(w, f32x16) * scale;
        if (n == MR_LANES) mr_store(y + k, v);
        else mr_store_n(y + k, v, n);
    }
}

static void copy_float(const void *user, size_t row) {
    const struct mr_embed *args = user;
    size_t id = (size_t)args->ids[row];
    const float *from = args->weight + id / MR_BLOCK * args->K * MR_BLOCK + id % MR_BLOCK;
    float *y = args->y + row * args->K;
    for (size_t k = 0; k < args->K; ++k) y[k] = from[k * MR_BLOCK];
}

void MR_NAME(mr_qembed)(const struct mr_qembed *args, const struct mr_parallel *parallel) {
    struct table table = {args, args->rows, copy_quantized};
    copy_all(&table, parallel);
}

void MR_NAME(mr_embed)(const struct mr_embed *args, const struct mr_parallel *parallel) {
    struct table table = {args, args->rows, copy_float};
    copy_all(&table, parallel);
}
