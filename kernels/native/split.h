/* How a layer is cut into tasks, and which thread does which.

   A task is one block of 64 columns (several, if they are small) and all rows, or part of the rows where a layer has few blocks
   for its threads. Weights of a task stay in the cache while its rows pass. Every thread starts on a stretch of its own:
   measured, two threads that take turns along one stream of memory get half of what they get from two streams. Nothing of
   this decides what a task computes. */
#ifndef MR_SPLIT_H
#define MR_SPLIT_H

#include "millrace.h"

#define MR_TASK_COST 4096     /* multiply-adds by 64 (about cycles) that make a task worth claiming */
#define MR_MEMORY_ROWS 16     /* below this many rows a block costs its memory traffic, not its arithmetic */
#define MR_TASKS_PER_THREAD 8 /* with fewer blocks than that, rows are cut too: a thread waits at most for one task */

/* Tasks are numbered block by block, the row parts of a block side by side. */
struct mr_split {
    size_t rows, blocks;
    size_t row_step, block_step; /* extent of a task */
    size_t row_parts, block_parts;
};

/* `tile` is the most rows a microkernel takes, `block_cost` the cost of one row and one block in MR_TASK_COST's unit. */
MR_INLINE struct mr_split mr_split_layer(size_t rows, size_t blocks, size_t tile, size_t block_cost, size_t threads) {
    size_t wanted = threads > 1 ? threads * MR_TASKS_PER_THREAD : 1;
    size_t row_parts = 1;
    if (rows >= 4 * tile && blocks < wanted) row_parts = mr_min(mr_ceil_div(wanted, blocks), rows / (2 * tile));
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
    size_t begin = index % split->row_parts * split->row_step;
    return (struct mr_range){begin, mr_min(begin + split->row_step, split->rows)};
}

MR_INLINE struct mr_range mr_split_blocks(const struct mr_split *split, size_t index) {
    size_t begin = index / split->row_parts * split->block_step;
    return (struct mr_range){begin, mr_min(begin + split->block_step, split->blocks)};
}

/* Rows left to do in tiles of at most `tile`: the height of the next one, so that all are about equally high. */
MR_INLINE size_t mr_next_tile(size_t rows_left, size_t tile) {
    return mr_ceil_div(rows_left, mr_ceil_div(rows_left, tile));
}

/* ---- stretches ---- */

/* A task that also learns which one its thread probably does next (`next` == index: nobody knows), to fetch for it. */
typedef void (*mr_chained_task)(void *user, size_t index, size_t next);

#define MR_MAX_STRETCHES 64

struct mr_stretch_ {
    size_t claimed, end;
    char own_line[64 - 2 * sizeof(size_t)];
};

struct mr_chain_ {
    mr_chained_task task;
    void *user;
    size_t num_stretches;
    struct mr_stretch_ stretches[MR_MAX_STRETCHES];
};

static void mr_chain_worker_(void *user, size_t slot) {
    struct mr_chain_ *chain = user;
    for (size_t i = 0; i < chain->num_stretches; ++i) { /* its own stretch, then what is left of the others */
        struct mr_stretch_ *stretch = &chain->stretches[(slot + i) % chain->num_stretches];
        for (;;) {
            size_t index = __atomic_fetch_add(&stretch->claimed, 1, __ATOMIC_RELAXED);
            if (index >= stretch->end) break;
            chain->task(chain->user, index, index + 1 < stretch->end ? index + 1 : index);
        }
    }
}

/* Run task(user, index, next) for every index in [0, count). */
static inline void mr_run_chained(const struct mr_parallel *parallel, mr_chained_task task, size_t count, void *user) {
    size_t workers = mr_slot_count(parallel, count);
    struct mr_chain_ chain;
    chain.task = task;
    chain.user = user;
    chain.num_stretches = mr_min(workers, MR_MAX_STRETCHES);
    for (size_t i = 0; i < chain.num_stretches; ++i) {
        chain.stretches[i].claimed = count * i / chain.num_stretches;
        chain.stretches[i].end = count * (i + 1) / chain.num_stretches;
    }
    if (workers <= 1) mr_chain_worker_(&chain, 0);
    else parallel->run(parallel->context, mr_chain_worker_, workers, &chain);
}

#endif
