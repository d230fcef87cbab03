/* Attention's register tiles: query rows times keys, and weights times values. Included by attention.c only.

   Apart because all the time is spent here and the shapes are the processor's: a tile holds rows x units accumulators of 16 lanes
   (a unit is a block of 16 keys, or 16 dims of the values). Which tile computes a number never changes its bits: a score is one
   chain of multiply-adds over the dims, an output lane one chain over the keys, both in ascending order. */
#ifndef MR_ATTENTION_TILE_H
#define MR_ATTENTION_TILE_H

#include "attention_kv.h"

#if defined(__AVX512F__) /* 32 registers of 16 lanes: 24 accumulators, 4 keys, a query */
#define TILE_ROWS 6
#define TILE_UNITS(rows) 4
#define FOR_TILES(X) X(1, 1) X(1, 2) X(1, 4) X(2, 1) X(2, 2) X(2, 4) X(3, 1) X(3, 2) X(3, 4) \
                     X(4, 1) X(4, 2) X(4, 4) X(5, 1) X(5, 2) X(5, 4) X(6, 1) X(6, 2) X(6, 4)
#elif defined(__FMA__) || defined(__aarch64__) /* 16 registers of 8 lanes, or 32 of 4: 6 pairs or quads of accumulators */
#define TILE_ROWS 6
#define TILE_UNITS(rows) ((rows) == 1 ? 4 : (rows) <= 3 ? 2 : 1)
#define FOR_TILES(X) X(1, 1) X(1, 2) X(1, 4) X(2, 1) X(2, 2) X(3, 1) X(3, 2) X(4, 1) X(5, 1) X(6, 1)
#else /* the multiply-add is a long sequence here: nothing to gain from registers */
#define TILE_ROWS 1
#define TILE_UNITS(rows) 1
#define FOR_TILES(X) X(1, 1)
#endif

/* Where registers are few, the factors of the rows are read again for each unit: kept, they would push accumulators to the stack.
   The compiler cannot know that the pointer has not changed. */
#ifdef __AVX512F__
#define READ_AGAIN(pointer)
#else
#define READ_AGAIN(pointer) __asm__("" : "+r"(pointer))
#endif

#define FETCH_AHEAD 4 /* blocks: about the time that memory takes to answer */

/* 16 lanes at an element offset of keys or values, which are half or float. */
MR_INLINE f32x16 load_lanes(const char *from, size_t element, const int is_half) {
    return is_half ? mr_load_f16((const uint16_t *)from + element) : mr_load((const float *)from + element);
}

struct score_tile {
    const float *queries; /* rows MR_ROW_FLOATS apart, scaled */
    const char *keys[4];  /* one block each: [D][16] */
    const char *next[4];  /* as many blocks that are read soon: fetched meanwhile (half only) */
    size_t head_dim;
    float *scores; /* [rows][stride], 16 for each block */
    size_t stride;
};

/* scores[row][unit][16] = sum over d of queries[row][d] * keys[unit][d][16]. */
MR_INLINE void score_tile(const struct score_tile *t, const size_t rows, const size_t units, const int is_half) {
    f32x16 sums[TILE_ROWS][4];
    UNROLL for (size_t r = 0; r < rows; ++r) {
        UNROLL for (size_t u = 0; u < units; ++u) sums[r][u] = mr_splat(0.0f);
    }
    const float *queries = t->queries;
    const char *keys[4], *next[4];
    UNROLL for (size_t u = 0; u < units; ++u) {
        keys[u] = t->keys[u];
        next[u] = t->next[u];
    }
    for (size_t d = 0; d < t->head_dim; ++d) {
        UNROLL for (size_t u = 0; u < units; ++u) {
            f32x16 k = load_lanes(keys[u], d * 16, is_half);
            if (is_half) FETCH(next[u] + d * 32);
            READ_AGAIN(queries);
            UNROLL for (size_t r = 0; r < rows; ++r) sums[r][u] = mr_fma(mr_splat(queries[r * MR_ROW_FLOATS + d]), k, sums[r][u]);
        }
    }
    UNROLL for (size_t r = 0; r < rows; ++r) {
        UNROLL for (size_t u = 0; u < units; ++u) mr_store(t->scores + r * t->stride + u * 16, sums[r][u]);
    }
}

struct value_tile {
    const float *weights;  /* rows `stride` apart; index 0 is the first token of block 0 */
    size_t stride;
    const char *values;    /* block i at values + blocks[i] * block_bytes: [16][Dp], from the tile's first dim on */
    const int32_t *blocks;
    size_t block_bytes;
    size_t num_blocks;     /* in `blocks` */
    const char *after[FETCH_AHEAD]; /* blocks that are read after the last */
    size_t padded_dim;
    size_t begin, end;     /* tokens, counted from block 0 */
    float *sums;           /* rows MR_ROW_FLOATS apart, from the tile's first dim on */
};

MR_INLINE const char *block_ahead(const struct value_tile *t, size_t block) {
    if (block < t->num_blocks) return t->values + (size_t)t->blocks[block] * t->block_bytes;
    return t->after[block - t->num_blocks];
}

/* sums[row][unit][16] += sum over tokens in [begin, end) of weights[row][token] * values[token][unit][16]. */
MR_INLINE void value_tile(const struct value_tile *t, const size_t rows, const size_t units, const int is_half) {
    f32x16 sums[TILE_ROWS][4];
    UNROLL for (size_t r = 0; r < rows; ++r) {
        UNROLL for (size_t u = 0; u < units; ++u) sums[r][u] = mr_load(t->sums + r * MR_ROW_FLOATS + u * 16);
    }
    const float *weights = t->weights;
    const size_t stride = t->stride, row_bytes = t->padded_dim * (is_half ? 2 : 4);
    for (size_t token = t->begin; token < t->end;) {
        size_t block = token / 16, stop = mr_min(t->end, (block + 1) * 16);
        const char *row = t->values + (size_t)t->blocks[block] * t->block_bytes + token % 16 * row_bytes;
        const char *next = is_half ? block_ahead(t, block + FETCH_AHEAD) + token % 16 * row_bytes : row;
        for (; token < stop; ++token, row += row_bytes, next += row_bytes) {
            UNROLL for (size_t u = 0; u < units; ++u) {
                f32x16 v = load_lanes(row, u * 16, is_half);
                if (is_half && u % 2 == 0) FETCH(next + u * 32);
                READ_AGAIN(weights);
                UNROLL for (size_t r = 0; r < rows; ++r) sums[r][u] = mr_fma(mr_splat(weights[r * stride + token]), v, sums[r][u]);
            }
        }
    }
    UNROLL for (size_t r = 0; r < rows; ++r) {
        UNROLL for (size_t u = 0; u < units; ++u) mr_store(t->sums + r * MR_ROW_FLOATS + u * 16, sums[r][u]);
    }
}

/* One function for each shape and cache type. */
#define DEFINE_TILE(rows, units)                                                                                              \
    static void score_##rows##x##units(const struct score_tile *t) { score_tile(t, rows, units, 0); }                         \
    static void score_half_##rows##x##units(const struct score_tile *t) { score_tile(t, rows, units, 1); }                    \
    static void value_##rows##x##units(const struct value_tile *t) { value_tile(t, rows, units, 0); }                         \
    static void value_half_##rows##x##units(const struct value_tile *t) { value_tile(t, rows, units, 1); }
FOR_TILES(DEFINE_TILE)

#define SCORE_ENTRY(rows, units) [rows][units] = {score_##rows##x##units, score_half_##rows##x##units},
#define VALUE_ENTRY(rows, units) [rows][units] = {value_##rows##x##units, value_half_##rows##x##units},

/* [rows][units][is_half] */
static void (*const score_tiles[TILE_ROWS + 1][5][2])(const struct score_tile *) = {FOR_TILES(SCORE_ENTRY)};
static void (*const value_tiles[TILE_ROWS + 1][5][2])(const struct value_tile *) = {FOR_TILES(VALUE_ENTRY)};

/* The widest tile of `rows` rows with at most `left` units. */
MR_INLINE size_t units_of(size_t rows, size_t left) {
    size_t units = TILE_UNITS(rows);
    (void)rows; /* all the same to some forms */
    while (units > left) units /= 2;
    return units;
}

#endif
