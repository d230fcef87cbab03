/* Fetching the next block of weights while this one is multiplied.

   A tile of rows multiplies a block faster than memory delivers the next, so without this every block would begin by waiting.
   A pass is one walk of a microkernel along K of a block: one or several for each tile of rows, by how many columns the
   registers hold. Each pass fetches its share of the next block. Measured on Zen 4 with weights in memory: a single pass is
   best left to the processor's own stream detection; up to three tiles want the second-level cache, more the first. */
#ifndef MR_AHEAD_H
#define MR_AHEAD_H

#include "linear.h"

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
