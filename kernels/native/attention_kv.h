/* Attention's heads and where they are kept: norm and rotation of a vector, keys and values into their blocks. Included by
   attention.c only.

   Apart because a key's way into its block (a column, or a whole block of columns at once) has nothing to do with how it is read.
   A number is made by the same operations on either way. */
#ifndef MR_ATTENTION_KV_H
#define MR_ATTENTION_KV_H

#include "attention.h"
#include "vec.h"

enum { WRITE_TOKENS = 16, FETCH_HEADS = 3 };

#define UNROLL _Pragma("clang loop unroll(full)")

/* ---- a head's vector: norm, rotation, scale ---- */

/* 16 lanes, or the n that are left. */
MR_INLINE f32x16 load_up_to(const float *p, size_t n) { return MR_LIKELY(n >= 16) ? mr_load(p) : mr_load_n(p, n); }

MR_INLINE void store_up_to(float *p, f32x16 v, size_t n) {
    if (MR_LIKELY(n >= 16)) mr_store(p, v);
    else mr_store_n(p, v, n);
}

/* y = x * rsqrt(mean(x^2) + epsilon) * norm. */
static void normalize(const float *x, const float *norm, size_t head_dim, float epsilon, float *y) {
    f32x16 squares = mr_splat(0.0f);
    for (size_t d = 0; d < head_dim; d += 16) {
        f32x16 v = load_up_to(x + d, head_dim - d);
        squares = mr_fma(v, v, squares);
    }
    float inverse = 1.0f / mr_sqrtf(mr_sum_lanes(squares) / (float)head_dim + epsilon);
    for (size_t d = 0; d < head_dim; d += 16) {
        size_t left = head_dim - d;
        store_up_to(y + d, load_up_to(x + d, left) * inverse * load_up_to(norm + d, left), left);
    }
}

/* y[D] = x[D], with pairs (d, d + R/2) turned by the angles of the position, times the scale. */
static void rotate(const float *x, const float *cos_sin, size_t rotary_dim, size_t head_dim, float scale, float *y) {
    size_t half = rotary_dim / 2;
    for (size_t d = 0; d < half; d += 16) {
        size_t left = half - d;
        f32x16 low = load_up_to(x + d, left), high = load_up_to(x + half + d, left);
        f32x16 cosine = load_up_to(cos_sin + d, left), sine = load_up_to(cos_sin + half + d, left);
        store_up_to(y + d, mr_fma(low, cosine, -(high * sine)) * scale, left);
        store_up_to(y + half + d, mr_fma(high, cosine, low * sine) * scale, left);
    }
    for (size_t d = rotary_dim; d < head_dim; d += 16) store_up_to(y + d, load_up_to(x + d, head_dim - d) * scale, head_dim - d);
}

/* y[Dp] from x[D]: normed if there is a norm, turned to the token's position, scaled; zero beyond D. */
static void prepare_head(const struct mr_attention *a, size_t token, const float *x, const float *norm, float scale, float *y) {
    float normed[MR_MAX_HEAD_DIM];
    size_t padded = mr_attention_padded_dim(a);
    if (padded != a->head_dim) mr_store(y + padded - 16, mr_splat(0.0f));
    if (norm) normalize(x, norm, a->head_dim, a->norm_epsilon, normed);
    rotate(norm ? normed : x, a->cos_sin + (size_t)a->positions[token] * a->rotary_dim, a->rotary_dim, a->head_dim, scale, y);
}

/* ---- keys and values into their blocks ---- */

static size_t element_bytes(const struct mr_attention *a) { return a->cache_is_half ? 2 : 4; }

/* Bytes of one block of keys, or of values, of one KV head. */
static size_t head_block_bytes(const struct mr_attention *a) {
    return MR_BLOCK_TOKENS * mr_attention_padded_dim(a) * element_bytes(a);
}

static char *cached_values(const struct mr_attention *a) {
    return (char *)a->cache + a->num_blocks * a->kv_num_heads * head_block_bytes(a);
}

#define ONE_BY_ONE _Pragma("clang loop vectorize(disable) unroll_count(8)") /* a scatter is no faster than its stores */

/* A token's key is a column of its block: one element every 16. */
static void store_key(const struct mr_attention *a, const float *key, char *block, size_t offset) {
    size_t dims = mr_attention_padded_dim(a);
    if (!a->cache_is_half) {
        float *column = (float *)block + offset;
        ONE_BY_ONE for (size_t d = 0; d < dims; ++d) column[d * 16] = key[d];
        return;
    }
    uint16_t half[MR_MAX_HEAD_DIM];
    for (size_t d = 0; d < dims; d += 16) mr_store_f16(half + d, mr_load(key + d));
    uint16_t *column = (uint16_t *)block + offset;
    ONE_BY_ONE for (size_t d = 0; d < dims; ++d) column[d * 16] = half[d];
}

/* A token's value is a row of its block. */
static void store_value(const struct mr_attention *a, const float *value, char *block, size_t offset) {
    size_t dims = mr_attention_padded_dim(a), row = offset * dims;
    for (size_t d = 0; d < dims; d += 16) {
        size_t left = mr_min(a->head_dim - d, 16);
        f32x16 v = left == 16 ? mr_load(value + d) : mr_load_n(value + d, left);
        if (a->cache_is_half) mr_store_f16((uint16_t *)block + row + d, v);
        else mr_store((float *)block + row + d, v);
    }
}

/* Into the second cache: it waits for more lines at once than the first, and memory answers half as fast again. */
#define FETCH(address) __builtin_prefetch(address, 0, 2)

static void fetch(const void *from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) FETCH((const char *)from + i);
}

/* Where one KV head of a token is read, in the projection, and written, in the blocks; `keys` is NULL if it has no slot. */
struct kv_place {
    const float *key, *value;
    char *keys, *values;
    size_t offset; /* in the block */
};

static struct kv_place place_kv(const struct mr_attention *a, size_t token, size_t head) {
    if (a->slot_mapping[token] < 0) return (struct kv_place){0};
    size_t slot = (size_t)a->slot_mapping[token], heads = a->num_heads + 2 * a->kv_num_heads;
    size_t first = (slot / MR_BLOCK_TOKENS * a->kv_num_heads + head) * head_block_bytes(a);
    const float *key = a->qkv + (token * heads + a->num_heads + head) * a->head_dim;
    return (struct kv_place){.key = key,
                             .value = key + a->kv_num_heads * a->head_dim,
                             .keys = (char *)a->cache + first,
                             .values = cached_values(a) + first,
                             .offset = slot % MR_BLOCK_TOKENS};
}

/* A key touches every line of its block: fetched while the heads before are at work. */
static void fetch_kv(const struct mr_attention *a, const struct kv_place *place) {
    if (!place->keys) return;
    size_t row_bytes = mr_attention_padded_dim(a) * element_bytes(a);
    fetch(place->key, a->head_dim * sizeof(float));
    fetch(place->value, a->head_dim * sizeof(float));
    fetch(place->keys, head_block_bytes(a));
    fetch(place->values + place->offset * row_bytes, row_bytes);
}

static void write_kv(const struct mr_attention *a, size_t token, const struct kv_place *place) {
    float key[MR_ROW_FLOATS];
    if (!place->keys) return;
    prepare_head(a, token, place->key, a->k_norm, 1.0f, key);
    store_key(a, key, place->keys, place->offset);
    store_value(a, place->value, place->values, place->offset);
}

/* The KV heads of some tokens, one after the other, each fetched FETCH_HEADS before its turn. */
static void write_tokens(const struct mr_attention *a, size_t first, size_t num_tokens) {
    struct kv_place ahead[FETCH_HEADS];
    size_t heads = a->kv_num_heads, count = num_tokens * heads;
    for (size_t i = 0; i < count + FETCH_HEADS; ++i) {
        struct kv_place *place = &ahead[i % FETCH_HEADS];
        if (i >= FETCH_HEADS) write_kv(a, first + (i - FETCH_HEADS) / heads, place);
        if (i >= count) continue;
        *place = place_kv(a, first + i / heads, i % heads);
        fetch_kv(a, place);
    }
}

/* 16 rows of 16 to 16 columns: swap the off-diagonal quarters of ever smaller squares (Eklundh 1972). */
#define SWAP_STEP(v, n, low, high)                                                                                            \
    UNROLL for (size_t i = 0; i < 16; ++i) {                                                                                  \
        if (i & (n)) continue;                                                                                                \
        f32x16 upper = v[i], lower = v[i + (n)];                                                                              \
        v[i] = __builtin_shufflevector(upper, lower, low);                                                                    \
        v[i + (n)] = __builtin_shufflevector(upper, lower, high);                                                             \
    }
#define LOW_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LOW_4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW_2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW_1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31

MR_INLINE void transpose(f32x16 v[16]) {
    SWAP_STEP(v, 8, LOW_8, HIGH_8)
    SWAP_STEP(v, 4, LOW_4, HIGH_4)
    SWAP_STEP(v, 2, LOW_2, HIGH_2)
    SWAP_STEP(v, 1, LOW_1, HIGH_1)
}

/* The keys of a whole block: what store_key writes 16 times, without the scatter. */
static void store_block_keys(const struct mr_attention *a, float (*keys)[MR_ROW_FLOATS], char *block) {
    for (size_t d = 0; d < mr_attention_padded_dim(a); d += 16) {
        f32x16 v[16];
        UNROLL for (size_t i = 0; i < 16; ++i) v[i] = mr_load(keys[i] + d);
        transpose(v);
        UNROLL for (size_t i = 0; i < 16; ++i) {
            if (a->cache_is_half) mr_store_f16((uint16_t *)block + (d + i) * 16, v[i]);
            else mr_store((float *)block + (d + i) * 16, v[i]);
        }
    }
}

static void write_block(const struct mr_attention *a, size_t first) {
    float keys[MR_BLOCK_TOKENS][MR_ROW_FLOATS];
    for (size_t head = 0; head < a->kv_num_heads; ++head) {
        struct kv_place place;
        for (size_t i = 0; i < MR_BLOCK_TOKENS; ++i) {
            place = place_kv(a, first + i, head);
            prepare_head(a, first + i, place.key, a->k_norm, 1.0f, keys[i]);
            store_value(a, place.value, place.values, i);
        }
        store_block_keys(a, keys, place.keys);
    }
}

/* Whether the 16 tokens from `first` on fill a block in order. */
static int fills_block(const struct mr_attention *a, size_t first) {
    int32_t slot = a->slot_mapping[first];
    if (first + MR_BLOCK_TOKENS > a->num_tokens || slot < 0 || slot % MR_BLOCK_TOKENS) return 0;
    for (size_t i = 1; i < MR_BLOCK_TOKENS; ++i)
        if (a->slot_mapping[first + i] != slot + (int32_t)i) return 0;
    return 1;
}

/* Whether the token is one of 16 that fill a block; it belongs to whoever has the first of them. */
static int is_in_block(const struct mr_attention *a, size_t token) {
    size_t offset = (size_t)(a->slot_mapping[token] & (MR_BLOCK_TOKENS - 1));
    return offset <= token && fills_block(a, token - offset);
}

static void write_task(void *user, size_t index, size_t slot) {
    const struct mr_attention *a = user;
    size_t token = index * WRITE_TOKENS, end = mr_min(token + WRITE_TOKENS, a->num_tokens);
    (void)slot;
    while (token < end) {
        size_t first = token;
        while (token < end && !is_in_block(a, token)) ++token;
        write_tokens(a, first, token - first);
        if (token < end && fills_block(a, token)) write_block(a, token);
        token += token < end;
    }
}

#endif
