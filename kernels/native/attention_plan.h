/* How attention is cut into tiles, and the scratch memory that takes. Included by attention_op.c only.

   Apart from the kernel because it is integer arithmetic, done once a run and the same for every form. A tile holds up to 48
   query rows (a multiple of the kernel's 6): its rows share each key and value that is loaded. Nothing here changes a result. */
#ifndef MR_ATTENTION_PLAN_H
#define MR_ATTENTION_PLAN_H

#include "attention.h"

enum {
    MOST_ROWS = 48,
    FEWEST_ROWS = 16,            /* fewer would read keys and values too often */
    TILE_SCORE_BYTES = 768 * 1024, /* scores that stay in a core's own cache */
    COST_CLASSES = 4 * 64,
    TILES_TO_SPARE = 4,      /* for each worker, or heads go separately */
    SERIAL_COST = 32 * 1024, /* cycles below which waking a thread costs more than it saves */
};

/* Keys that a tile's scores cover: from the first block that its first token sees to its last token. */
static size_t tile_keys(const struct mr_attention *a, size_t first_position, size_t count) {
    size_t first_block = mr_attention_first_key(a, first_position) / MR_BLOCK_TOKENS;
    return first_position + count - first_block * MR_BLOCK_TOKENS;
}

/* Tokens of the tile that starts at `position`. Tiles end at multiples of their size, so that most diagonals fall alike. */
static size_t tile_tokens(const struct mr_attention *a, size_t position, size_t left) {
    size_t group = a->num_heads / a->kv_num_heads;
    size_t keys = tile_keys(a, position, mr_min(left, MOST_ROWS));
    size_t rows = mr_min(MOST_ROWS, TILE_SCORE_BYTES / (mr_score_stride(keys) * sizeof(float)));
    size_t tokens = mr_max_size(mr_max_size(rows, FEWEST_ROWS) / group, 1);
    return mr_min(left, tokens - position % tokens);
}

/* About the processor cycles of a tile: multiply-adds of 16 lanes, or bytes of keys and values at 4 a cycle. */
static uint64_t tile_cost(const struct mr_attention *a, size_t keys, size_t rows) {
    uint64_t lanes = (uint64_t)keys * mr_attention_padded_dim(a);
    uint64_t compute = lanes * rows / 8;
    uint64_t memory = lanes * (a->cache_is_half ? 1 : 2);
    return compute > memory ? compute : memory;
}

/* Costs that differ by less than a quarter share a class; class 0 is the costliest. */
static size_t cost_class(uint64_t cost) {
    size_t log2 = 63u - (size_t)__builtin_clzll(cost | 1);
    size_t quarter = log2 < 2 ? 0 : (size_t)(cost >> (log2 - 2)) & 3u;
    return COST_CLASSES - 1 - (log2 * 4 + quarter);
}

/* One walk over all tiles, in packed order: `visit` sees each with its keys and rows. */
struct tile_walk {
    struct mr_attention *attention;
    size_t class_count[COST_CLASSES + 1];
    uint64_t total_cost;
    struct mr_attention_tile *placed;
};

static void measure_tile(struct tile_walk *walk, struct mr_attention_tile tile, size_t keys, size_t rows) {
    struct mr_attention *a = walk->attention;
    (void)tile;
    uint64_t cost = tile_cost(a, keys, rows);
    walk->class_count[cost_class(cost) + 1] += 1;
    walk->total_cost += cost * a->kv_num_heads;
    a->num_tiles += 1;
    a->max_tile_rows = mr_max_size(a->max_tile_rows, rows);
    a->score_floats = mr_max_size(a->score_floats, rows * mr_score_stride(keys));
}

static void place_tile(struct tile_walk *walk, struct mr_attention_tile tile, size_t keys, size_t rows) {
    size_t class = cost_class(tile_cost(walk->attention, keys, rows));
    walk->placed[walk->class_count[class]++] = tile;
}

static void walk_tiles(struct tile_walk *walk,
                       void (*visit)(struct tile_walk *, struct mr_attention_tile, size_t keys, size_t rows)) {
    const struct mr_attention *a = walk->attention;
    size_t group = a->num_heads / a->kv_num_heads;
    for (size_t sequence = 0; sequence < a->num_seqs; ++sequence) {
        size_t first = (size_t)a->cu_seqlens[sequence], end = (size_t)a->cu_seqlens[sequence + 1];
        size_t position = (size_t)a->past_lens[sequence];
        while (first < end) {
            size_t count = tile_tokens(a, position, end - first);
            struct mr_attention_tile tile = {(uint32_t)sequence, (uint32_t)first, (uint32_t)count};
            visit(walk, tile, tile_keys(a, position, count), count * group);
            first += count;
            position += count;
        }
    }
}

/* Bytes of scratch that mr_attention_place needs for `threads` workers; fills in the plan's numbers. */
static size_t plan_attention(struct mr_attention *a, struct tile_walk *walk, size_t threads) {
    *walk = (struct tile_walk){.attention = a};
    a->num_tiles = a->max_tile_rows = a->score_floats = 0;
    walk_tiles(walk, measure_tile);
    for (size_t class = 0; class < COST_CLASSES; ++class) walk->class_count[class + 1] += walk->class_count[class];
    a->slot_bytes = mr_attention_slot_bytes(a);
    /* With tiles to spare a worker takes all heads of a tile: they lie side by side in a block, and what the processor fetches
       beyond one head's keys is the next head's. */
    threads = walk->total_cost < SERIAL_COST ? 1 : mr_max_size(threads, 1);
    a->unit_heads = a->num_tiles >= TILES_TO_SPARE * threads ? a->kv_num_heads : 1;
    a->num_workers = mr_min(threads, a->num_tiles * a->kv_num_heads / a->unit_heads);
    return mr_round_up(a->num_tiles * sizeof(struct mr_attention_tile), 64) + a->num_workers * a->slot_bytes;
}

/* Lay the plan out in scratch memory (64-byte aligned): the tiles, most work first, then the workers' slots. */
static void place_attention(struct mr_attention *a, struct tile_walk *walk, void *scratch) {
    walk->placed = scratch;
    walk_tiles(walk, place_tile);
    a->tiles = scratch;
    a->slots = (char *)scratch + mr_round_up(a->num_tiles * sizeof(struct mr_attention_tile), 64);
}

#endif
