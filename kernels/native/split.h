/* How a layer is cut into tasks: ranges of blocks of 64 columns, and for many rows ranges of rows too.

   Pure arithmetic about speed. Weights of a task stay in the cache while its rows pass in tiles; activations of a row range
   stay in the second level while the blocks pass. What a task computes does not depend on the cut. */
#ifndef MR_SPLIT_H
#define MR_SPLIT_H

#include "millrace.h"

struct mr_split {
    size_t rows, blocks;
    size_t row_step, block_step; /* extent of a task */
    size_t row_parts, block_parts;
};

#define MR_TASK_COST 4096       /* multiply-adds by 64 (about cycles) that make a task worth claiming */
#define MR_MEMORY_ROWS 16       /* below this many rows a block costs its memory traffic, not its arithmetic */
#define MR_TASKS_PER_THREAD 4   /* fewer than that with many rows: cut the rows too */
#define MR_PANEL_BYTES (384 * 1024) /* activations of a row range: half of a small second-level cache */

/* `tile` is the most rows a microkernel takes, `row_bytes` the size of an activation row, `block_cost` the cost of one row
   and one block in MR_TASK_COST's unit. */
MR_INLINE struct mr_split mr_split_layer(size_t rows, size_t blocks, size_t tile, size_t row_bytes, size_t block_cost,
                                         size_t threads) {
    size_t panel = mr_max_size(MR_PANEL_BYTES / row_bytes / tile, 1) * tile;
    size_t row_parts = mr_ceil_div(rows, panel);
    size_t wanted = threads > 1 ? threads * MR_TASKS_PER_THREAD : 1;
    if (rows >= 4 * tile && blocks * row_parts < wanted)
        row_parts = mr_min(mr_ceil_div(wanted, blocks), rows / (2 * tile));
    struct mr_split split = {.rows = rows, .blocks = blocks};
    split.row_step = mr_ceil_div(rows, row_parts);
    split.row_parts = mr_ceil_div(rows, split.row_step);
    split.block_step = mr_max_size(MR_TASK_COST / (block_cost * mr_max_size(split.row_step, MR_MEMORY_ROWS)), 1);
    split.block_parts = mr_ceil_div(blocks, split.block_step);
    return split;
}

struct mr_range {
    size_t begin, end;
};

MR_INLINE size_t mr_split_count(const struct mr_split *split) { return split->row_parts * split->block_parts; }

MR_INLINE struct mr_range mr_split_rows(const struct mr_split *split, size_t index) {
    size_t begin = index / split->block_parts * split->row_step;
    return (struct mr_range){begin, mr_min(begin + split->row_step, split->rows)};
}

MR_INLINE struct mr_range mr_split_blocks(const struct mr_split *split, size_t index) {
    size_t begin = index % split->block_parts * split->block_step;
    return (struct mr_range){begin, mr_min(begin + split->block_step, split->blocks)};
}

/* Rows left to do in tiles of at most `tile`: the height of the next one, so that all are about equally high. */
MR_INLINE size_t mr_next_tile(size_t rows_left, size_t tile) {
    return mr_ceil_div(rows_left, mr_ceil_div(rows_left, tile));
}

/* A task that also learns which one its thread does next (`next` == index: none), so that it can fetch for it. */
typedef void (*mr_chained_task)(void *user, size_t index, size_t next);

struct mr_chain_ {
    mr_chained_task task;
    void *user;
    size_t count;
    size_t claimed;
};

static void mr_chain_worker_(void *user, size_t slot) {
    (void)slot;
    struct mr_chain_ *chain = user;
    size_t index = __atomic_fetch_add(&chain->claimed, 1, __ATOMIC_RELAXED);
    while (index < chain->count) {
        size_t next = __atomic_fetch_add(&chain->claimed, 1, __ATOMIC_RELAXED);
        chain->task(chain->user, index, next < chain->count ? next : index);
        index = next;
    }
}

/* Run task(user, index, next) for every index in [0, count): each thread claims one task ahead of the one it does. */
static inline void mr_run_chained(const struct mr_parallel *parallel, mr_chained_task task, size_t count, void *user) {
    struct mr_chain_ chain = {task, user, count, 0};
    size_t workers = mr_slot_count(parallel, count);
    if (workers <= 1) mr_chain_worker_(&chain, 0);
    else parallel->run(parallel->context, mr_chain_worker_, workers, &chain);
}

#endif
