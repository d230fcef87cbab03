/* Scratch memory for runs: a few blocks that grow to what was needed and are handed from node to node.

   Apart from the runtime's allocator because reuse keeps the block in the cache from one layer to the next, and because a node
   borrows it a hundred times a step. Blocks come from the runtime's default allocator and go back when the last kernel is
   destroyed. A borrower that finds all blocks taken gets one of its own. */
#include "abi.h"

#define MR_NUM_BLOCKS 8
#define MR_OWN_BLOCK (-1)
#define MR_ALIGNMENT 64

struct block {
    void *data;
    size_t bytes;
    int32_t taken;
};

static struct block blocks[MR_NUM_BLOCKS];
static size_t kernels_alive;

static void *aligned(void *data) {
    return (void *)mr_round_up((uintptr_t)data, MR_ALIGNMENT);
}

static int take(struct block *block) {
    int32_t free = 0;
    return __atomic_compare_exchange_n(&block->taken, &free, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

static void drop(struct block *block) { __atomic_store_n(&block->taken, 0, __ATOMIC_RELEASE); }

static OrtStatus *grow(struct block *block, size_t bytes) {
    if (block->bytes >= bytes) return NULL;
    if (block->data) mr_free(block->data);
    *block = (struct block){NULL, 0, 1};
    MR_TRY(mr_allocate(bytes, &block->data));
    block->bytes = bytes;
    return NULL;
}

OrtStatus *mr_scratch_borrow(size_t bytes, struct mr_scratch *out) {
    bytes = mr_round_up(bytes, 4096) + MR_ALIGNMENT;
    for (int32_t slot = 0; slot < MR_NUM_BLOCKS; ++slot) {
        if (!take(&blocks[slot])) continue;
        OrtStatus *status = grow(&blocks[slot], bytes);
        if (status) {
            drop(&blocks[slot]);
            return status;
        }
        *out = (struct mr_scratch){aligned(blocks[slot].data), slot};
        return NULL;
    }
    /* The block's own address is kept in front of the aligned part. */
    void *data;
    MR_TRY(mr_allocate(bytes + MR_ALIGNMENT, &data));
    void **start = aligned((char *)data + sizeof(void *));
    start[-1] = data;
    *out = (struct mr_scratch){start, MR_OWN_BLOCK};
    return NULL;
}

void mr_scratch_return(struct mr_scratch *scratch) {
    if (scratch->slot == MR_OWN_BLOCK) mr_free(((void **)scratch->data)[-1]);
    else drop(&blocks[scratch->slot]);
}

void mr_scratch_kernel_created(void) { __atomic_fetch_add(&kernels_alive, 1, __ATOMIC_RELAXED); }

void mr_scratch_kernel_destroyed(void) {
    if (__atomic_sub_fetch(&kernels_alive, 1, __ATOMIC_ACQ_REL) != 0) return;
    for (int32_t slot = 0; slot < MR_NUM_BLOCKS; ++slot) {
        struct block *block = &blocks[slot];
        if (!take(block)) continue;
        if (block->data) mr_free(block->data);
        block->data = NULL;
        block->bytes = 0;
        drop(block);
    }
}
