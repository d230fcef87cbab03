/* PagedAttention: rotary embedding, writing keys and values to their blocks, causal attention over the block table.

   One form of the kernel (README.md has the meaning, attention_plan.h the cut into tiles, attention_kv.h the writing,
   attention_tile.h the inner loops). First all keys and values are written, then every (tile of query tokens, KV head) is computed
   by whichever worker is free: scores of all its keys, a two-pass softmax for each row, the weighted sum of the values. A row's
   numbers are made in one order whatever tile it is in, so they do not depend on chunking, neighbours, threads, or where its
   blocks lie. */
#include "attention_kv.h"
#include "attention_tile.h"
#include "vecmath.h"

/* ---- one tile of query tokens with one KV head ---- */

/* Rows are (token, head of the group), token by token. Keys are counted from the first block that any row sees. */
struct work {
    const struct mr_attention *a;
    size_t head;           /* KV head */
    size_t group;          /* query heads that share it */
    size_t token;          /* first, in the packed axis */
    size_t position;       /* of the first token in its sequence */
    size_t rows;
    size_t first_key;      /* index in the sequence of key 0: a multiple of 16 */
    size_t num_blocks;
    const int32_t *blocks; /* their ids */
    float *queries, *sums, *inverse, *scores;
    size_t stride; /* between rows of scores */
    char *converted;
    const char *after[FETCH_AHEAD]; /* keys that this worker is likely to read after this */
};

/* Where a tile's keys or values are read from: block i at base + blocks[i - first] * bytes. */
struct source {
    const char *base;
    const int32_t *blocks;
    size_t bytes;
    size_t first;
    int is_half;
};

struct span {
    size_t begin, end;
};

static struct span clip(struct span span, size_t begin, size_t end) {
    return (struct span){mr_max_size(span.begin, begin), mr_min(span.end, end)};
}

/* The keys that a row sees. */
static struct span seen(const struct work *w, size_t row) {
    size_t position = w->position + row / w->group;
    return (struct span){mr_attention_first_key(w->a, position) - w->first_key, position + 1 - w->first_key};
}

static struct work open_work(const struct mr_attention *a, const struct mr_attention_tile *tile, size_t head, char *scratch) {
    struct work w = {.a = a, .head = head, .group = a->num_heads / a->kv_num_heads, .token = tile->first};
    size_t past = (size_t)a->past_lens[tile->sequence];
    w.position = past + tile->first - (size_t)a->cu_seqlens[tile->sequence];
    w.rows = tile->count * w.group;
    size_t first_block = mr_attention_first_key(a, w.position) / MR_BLOCK_TOKENS;
    w.first_key = first_block * MR_BLOCK_TOKENS;
    size_t num_keys = w.position + tile->count - w.first_key;
    w.num_blocks = mr_ceil_div(num_keys, MR_BLOCK_TOKENS);
    w.blocks = a->block_table + tile->sequence * a->table_width + first_block;
    w.stride = mr_score_stride(num_keys);
    w.queries = (float *)scratch;
    w.sums = w.queries + a->max_tile_rows * MR_ROW_FLOATS;
    w.scores = w.sums + a->max_tile_rows * MR_ROW_FLOATS;
    w.inverse = w.scores + a->score_floats;
    w.converted = scratch + a->slot_bytes - MR_CONVERTED_BYTES;
    return w;
}

/* Query rows of a register tile, and how many tiles the rows take: as even as can be. */
static size_t rows_per_group(const struct work *w) {
    return mr_ceil_div(w->rows, mr_ceil_div(w->rows, TILE_ROWS));
}

/* Blocks that are read together by all row groups in turn. One group reads all it sees in one go. */
static size_t blocks_per_chunk(const struct work *w) {
    if (w->rows <= TILE_ROWS) return w->num_blocks;
    size_t block_bytes = MR_BLOCK_TOKENS * mr_attention_padded_dim(w->a) * sizeof(float);
    return mr_min(mr_max_size(MR_CONVERTED_BYTES / block_bytes, 1), 4);
}

/* Few rows read the cache as it is; many read a chunk that is widened to float once. */
static struct source open_chunk(const struct work *w, const char *pool, size_t first, size_t count) {
    static const int32_t in_order[4] = {0, 1, 2, 3};
    const struct mr_attention *a = w->a;
    size_t bytes = head_block_bytes(a);
    const char *base = pool + w->head * bytes;
    if (!a->cache_is_half || w->rows <= 2 * TILE_ROWS)
        return (struct source){base, w->blocks, a->kv_num_heads * bytes, 0, a->cache_is_half};
    size_t floats = bytes / 2;
    float *to = (float *)w->converted;
    for (size_t block = 0; block < count; ++block, to += floats) {
        const uint16_t *from = (const uint16_t *)(base + (size_t)w->blocks[first + block] * a->kv_num_heads * bytes);
        for (size_t i = 0; i < floats; i += 16) mr_store(to + i, mr_load_f16(from + i));
    }
    return (struct source){w->converted, in_order, floats * sizeof(float), first, 0};
}

static const char *block_at(const struct source *source, size_t block) {
    return source->base + (size_t)source->blocks[block - source->first] * source->bytes;
}

static void prepare_queries(const struct work *w) {
    const struct mr_attention *a = w->a;
    size_t width = (a->num_heads + 2 * a->kv_num_heads) * a->head_dim, dims = mr_attention_padded_dim(a);
    for (size_t row = 0; row < w->rows; ++row) {
        size_t token = w->token + row / w->group, head = w->head * w->group + row % w->group;
        const float *x = a->qkv + token * width + head * a->head_dim;
        float *query = w->queries + row * MR_ROW_FLOATS, *sum = w->sums + row * MR_ROW_FLOATS;
        if (row % w->group == 0 && row + 2 * w->group < w->rows) fetch(x + 2 * width, w->group * a->head_dim * sizeof(float));
        prepare_head(a, token, x, a->q_norm, a->scale, query);
        for (size_t d = 0; d < dims; d += 16) mr_store(sum + d, mr_splat(0.0f));
    }
}

/* One KV head of a block, of keys or of values. */
static const char *pool_block(const struct mr_attention *a, const char *pool, int32_t id, size_t head) {
    return pool + ((size_t)id * a->kv_num_heads + head) * head_block_bytes(a);
}

/* The block that is read after `block` others: keys, then values, then what comes after. */
static const char *soon(const struct work *w, size_t block) {
    if (block < w->num_blocks) return pool_block(w->a, w->a->cache, w->blocks[block], w->head);
    block -= w->num_blocks;
    if (block < w->num_blocks) return pool_block(w->a, cached_values(w->a), w->blocks[block], w->head);
    return w->after[mr_min(block - w->num_blocks, FETCH_AHEAD - 1)];
}

/* Scores of `rows` rows from `row` on with the blocks of `span`. */
static void score_blocks(const struct work *w, const struct source *source, size_t row, size_t rows, struct span span) {
    struct score_tile tile = {.queries = w->queries + row * MR_ROW_FLOATS, .head_dim = w->a->head_dim, .stride = w->stride};
    for (size_t block = span.begin, units; block < span.end; block += units) {
        units = units_of(rows, span.end - block);
        for (size_t u = 0; u < units; ++u) {
            tile.keys[u] = block_at(source, block + u);
            tile.next[u] = soon(w, block + FETCH_AHEAD + u);
        }
        tile.scores = w->scores + row * w->stride + block * MR_BLOCK_TOKENS;
        score_tiles[rows][units][source->is_half](&tile);
    }
}

static void score_all(const struct work *w) {
    size_t chunk = blocks_per_chunk(w), most = rows_per_group(w);
    for (size_t first = 0; first < w->num_blocks; first += chunk) {
        size_t end = mr_min(first + chunk, w->num_blocks);
        struct source source = open_chunk(w, w->a->cache, first, end - first);
        for (size_t row = 0, rows; row < w->rows; row += rows) {
            rows = mr_min(most, w->rows - row);
            struct span blocks = {seen(w, row).begin / 16, mr_ceil_div(seen(w, row + rows - 1).end, 16)};
            score_blocks(w, &source, row, rows, clip(blocks, first, end));
        }
    }
}

/* Scores outside the span to -infinity; `key` is the index of lane 0. */
static f32x16 mask_lanes(f32x16 scores, size_t key, struct span span) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    i32x16 index = lane + (int32_t)key;
    i32x16 inside = (index >= (int32_t)span.begin) & (index < (int32_t)span.end);
    return mr_select(inside, scores, mr_splat(-__builtin_inff()));
}

/* The largest score of a row, after cap and mask, which are stored. */
static float cap_and_mask(float *scores, struct span span, float softcap) {
    f32x16 most = mr_splat(-__builtin_inff());
    for (size_t key = span.begin / 16 * 16; key < span.end; key += 16) {
        f32x16 s = mr_load(scores + key);
        int is_edge = key < span.begin || key + 16 > span.end;
        if (softcap > 0.0f) s = softcap * mr_tanh(s / softcap);
        if (is_edge) s = mask_lanes(s, key, span);
        if (softcap > 0.0f || is_edge) mr_store(scores + key, s);
        most = mr_max(s, most);
    }
    return mr_max_lanes(most);
}

/* Scores to weights, not yet divided by their sum, which is returned. */
static float exponentiate(float *scores, struct span span, float top) {
    f32x16 sums = mr_splat(0.0f);
    for (size_t key = span.begin / 16 * 16; key < span.end; key += 16) {
        f32x16 weights = mr_exp(mr_load(scores + key) - top);
        sums += weights;
        mr_store(scores + key, weights);
    }
    return mr_sum_lanes(sums);
}

/* One pass over all rows, then the other: rows overlap in the processor, the passes of one row would wait for each other. */
static void softmax_all(const struct work *w) {
    const float *sinks = w->a->sinks ? w->a->sinks + w->head * w->group : NULL;
    for (size_t row = 0; row < w->rows; ++row) {
        float top = cap_and_mask(w->scores + row * w->stride, seen(w, row), w->a->softcap);
        if (sinks && sinks[row % w->group] > top) top = sinks[row % w->group];
        w->inverse[row] = top;
    }
    for (size_t row = 0; row < w->rows; ++row) {
        float top = w->inverse[row], sum = exponentiate(w->scores + row * w->stride, seen(w, row), top);
        if (sinks) sum += mr_exp(mr_splat(sinks[row % w->group] - top))[0];
        w->inverse[row] = 1.0f / sum;
    }
}

/* Add the values of the tokens in `span` to the sums of `rows` rows, all of which see them. */
static void add_values(const struct work *w, const struct source *source, size_t row, size_t rows, struct span span) {
    if (span.begin >= span.end) return;
    size_t dims = mr_attention_padded_dim(w->a), skipped = source->first * MR_BLOCK_TOKENS, element = source->is_half ? 2 : 4;
    struct value_tile tile = {.weights = w->scores + row * w->stride + skipped, .stride = w->stride, .blocks = source->blocks,
                              .block_bytes = source->bytes, .num_blocks = w->num_blocks - source->first, .padded_dim = dims,
                              .begin = span.begin - skipped, .end = span.end - skipped};
    for (size_t d = 0, units; d < dims; d += units * 16) {
        units = units_of(rows, (dims - d) / 16);
        tile.values = source->base + d * element;
        for (size_t i = 0; i < FETCH_AHEAD; ++i) tile.after[i] = w->after[i] + d * element;
        tile.sums = w->sums + row * MR_ROW_FLOATS + d;
        value_tiles[rows][units][source->is_half](&tile);
    }
}

/* What only some rows of a group see, [begin, end) clipped by their own span: the rows of each token for themselves, so that no
   row is touched by a value it does not see (0 * NaN is not 0). */
static void add_edge(const struct work *w, const struct source *source, struct span rows, size_t begin, size_t end) {
    if (begin >= end) return;
    for (size_t row = rows.begin, next; row < rows.end; row = next) {
        next = mr_min((row / w->group + 1) * w->group, rows.end);
        add_values(w, source, row, next - row, clip(seen(w, row), begin, end));
    }
}

static void add_group(const struct work *w, const struct source *source, struct span rows, size_t begin, size_t end) {
    /* [first row's begin, last row's begin)   left by the window row by row
       [last row's begin, first row's end)     seen by all
       [first row's end, last row's end)       the causal diagonal */
    struct span first = seen(w, rows.begin), last = seen(w, rows.end - 1);
    size_t left = mr_min(last.begin, last.end), right = mr_max_size(first.end, left);
    add_edge(w, source, rows, mr_max_size(first.begin, begin), mr_min(left, end));
    if (left < first.end) add_values(w, source, rows.begin, rows.end - rows.begin, clip((struct span){left, right}, begin, end));
    add_edge(w, source, rows, mr_max_size(right, begin), mr_min(last.end, end));
}

static void value_all(const struct work *w) {
    size_t chunk = blocks_per_chunk(w), most = rows_per_group(w);
    for (size_t first = 0; first < w->num_blocks; first += chunk) {
        size_t end = mr_min(first + chunk, w->num_blocks);
        struct source source = open_chunk(w, cached_values(w->a), first, end - first);
        for (size_t row = 0; row < w->rows; row += most)
            add_group(w, &source, (struct span){row, mr_min(row + most, w->rows)}, first * 16, end * 16);
    }
}

static void write_out(const struct work *w) {
    const struct mr_attention *a = w->a;
    for (size_t row = 0; row < w->rows; ++row) {
        size_t token = w->token + row / w->group, head = w->head * w->group + row % w->group;
        float *out = a->out + (token * a->num_heads + head) * a->head_dim;
        const float *sums = w->sums + row * MR_ROW_FLOATS;
        f32x16 inverse = mr_splat(w->inverse[row]);
        size_t d = 0;
        for (; d + 16 <= a->head_dim; d += 16) mr_store(out + d, mr_load(sums + d) * inverse);
        if (d < a->head_dim) mr_store_n(out + d, mr_load(sums + d) * inverse, a->head_dim - d);
    }
}

/* Say what comes after: the next head's keys, or those of the tile that this worker is likely to take next. */
static void expect(struct work *w, size_t tile, size_t head) {
    const struct mr_attention *a = w->a;
    int is_same = head + 1 < a->kv_num_heads && a->unit_heads > 1;
    size_t next = is_same ? tile : mr_min(tile + a->num_workers, a->num_tiles - 1);
    struct work then = open_work(a, &a->tiles[next], is_same ? head + 1 : 0, NULL);
    for (size_t i = 0; i < FETCH_AHEAD; ++i)
        w->after[i] = pool_block(a, a->cache, then.blocks[mr_min(i, then.num_blocks - 1)], then.head);
}

static void attend_task(void *user, size_t index, size_t slot) {
    const struct mr_attention *a = user;
    size_t first = index * a->unit_heads, tile = first / a->kv_num_heads;
    for (size_t head = first % a->kv_num_heads, end = head + a->unit_heads; head < end; ++head) {
        struct work w = open_work(a, &a->tiles[tile], head, a->slots + slot * a->slot_bytes);
        expect(&w, tile, head);
        prepare_queries(&w);
        score_all(&w);
        softmax_all(&w);
        value_all(&w);
        write_out(&w);
    }
}

void MR_NAME(mr_attention)(const struct mr_attention *a, const struct mr_parallel *parallel) {
    struct mr_parallel limited = *parallel;
    limited.threads = mr_min(parallel->threads, a->num_workers);
    mr_run_slots(&limited, write_task, mr_ceil_div(a->num_tokens, WRITE_TOKENS), (void *)a);
    mr_run_slots(&limited, attend_task, a->num_tiles * a->kv_num_heads / a->unit_heads, (void *)a);
}
