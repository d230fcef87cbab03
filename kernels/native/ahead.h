/* Fetching the next block of weights while this one is multiplied.

   A tile of rows multiplies a block faster than memory delivers the next, so without this every block would begin by waiting.
   A pass is one walk of a microkernel along K of a block: one or several for each tile of rows, by how many columns the
   registers hold. Each pass fetches its share of the next block. Measured on Zen 4 with weights in memory: a single pass is
   best left to the processor's own stream detection; up to three tiles want the second-level cache, more the first. */
#ifndef MR_AHEAD_H
#define MR_AHEAD_H

#include "linear.h"
#include "split.h"

#define MR_STEP_BYTES 256 /* of a block in a step of a pass: 64 floats, or four inputs of 64 int8 columns */

/* What one pass fetches. */
struct mr_ahead {
    const char *at;
    size_t step;    /* bytes to go on with every step */
    int32_t level;  /* of cache: 0 fetches nothing */
    int32_t double_; /* two lines a step, not one */
};

/* The passes over a block, each with its share of the next. */
struct mr_passes {
    const char *next_block;
    size_t block_bytes;
    size_t count, done;
    size_t tiles;
};

/* The block that this thread multiplies after `block` of a task that ends at block `end`. */
MR_INLINE size_t mr_next_block(const struct mr_split *split, size_t block, size_t end, size_t next_task) {
    if (block + 1 < end) return block + 1;
    size_t next = mr_split_blocks(split, next_task).begin;
    if (next != block) return next;
    return mr_min(block + 1, split->blocks - 1); /* other rows of this block come first: share the fetching with them */
}

/* The passes of a task's rows over a block, among those of all rows: `tile` rows at most and `vectors` of 16 columns a pass. */
MR_INLINE struct mr_passes mr_passes_over(const void *next_block, size_t block_bytes, const struct mr_split *split,
                                          struct mr_range rows, size_t tile, size_t vectors) {
    size_t tiles = split->row_parts * mr_ceil_div(rows.end - rows.begin, tile);
    size_t passes_a_tile = MR_BLOCK / 16 / vectors;
    return (struct mr_passes){
        .next_block = next_block,
        .block_bytes = block_bytes,
        .count = tiles * passes_a_tile,
        .done = tiles * passes_a_tile * rows.begin / split->rows,
        .tiles = tiles,
    };
}

/* The share of the pass that begins now. */
MR_INLINE struct mr_ahead mr_begin_pass(struct mr_passes *passes) {
    struct mr_ahead ahead = {.at = passes->next_block + passes->block_bytes * passes->done / passes->count};
    ++passes->done;
    ahead.step = MR_STEP_BYTES / passes->count;
    ahead.level = passes->count == 1 ? 0 : passes->tiles <= 3 ? 2 : 1;
    ahead.double_ = ahead.step > 64;
    return ahead;
}

MR_INLINE void mr_fetch_ahead(struct mr_ahead *ahead) {
    if (ahead->level == 1) {
        __builtin_prefetch(ahead->at, 0, 3);
    } else if (ahead->level == 2) {
        __builtin_prefetch(ahead->at, 0, 2);
        if (ahead->double_) __builtin_prefetch(ahead->at + 64, 0, 2);
    }
    ahead->at += ahead->step;
}

#endif
