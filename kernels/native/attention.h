/* PagedAttention's arguments, as the operator hands them to a kernel: checked, planned, with scratch memory in place.

   README.md has the meaning. T packed tokens, B sequences, M blocks in a row of the block table, 16 tokens in a block. */
#ifndef MR_ATTENTION_H
#define MR_ATTENTION_H

#include "millrace.h"

#define MR_BLOCK_TOKENS 16
#define MR_MAX_HEAD_DIM 256

enum {
    MR_ROW_FLOATS = 272,            /* a query or output row in scratch: 256 and a line, so that rows share no cache sets */
    MR_CONVERTED_BYTES = 16 * 1024, /* of keys or values widened to float once for all rows of a tile; stays in L1 */
};

/* Query tokens [first, first + count) of the packed axis, all of one sequence: with one KV head, a unit of parallel work. */
struct mr_attention_tile {
    uint32_t sequence;
    uint32_t first;
    uint32_t count;
};

struct mr_attention {
    size_t num_tokens;   /* T */
    size_t num_seqs;     /* B */
    size_t table_width;  /* M */
    size_t num_blocks;   /* in the pool, of each layer */
    size_t num_heads;    /* H, a multiple of kv_num_heads */
    size_t kv_num_heads; /* KV */
    size_t head_dim;     /* D, at most MR_MAX_HEAD_DIM */
    size_t rotary_dim;   /* R, even, at most D */
    size_t window;       /* 0: none */
    float scale;
    float softcap; /* 0: none */
    float norm_epsilon;
    int32_t cache_is_half;

    const float *qkv;            /* [T, (H + 2 KV) D] */
    void *cache;                 /* this layer: [2, num_blocks, KV, 16 Dp] */
    const int64_t *positions;    /* [T] */
    const int32_t *cu_seqlens;   /* [B + 1] */
    const int32_t *past_lens;    /* [B] */
    const int32_t *block_table;  /* [B, M] */
    const int32_t *slot_mapping; /* [T] */
    const float *cos_sin;        /* [max_len, R] */
    const float *q_norm;         /* [D] or NULL */
    const float *k_norm;         /* [D] or NULL */
    const float *sinks;          /* [H] or NULL */
    float *out;                  /* [T, H D] */

    /* The plan (attention_plan.h). */
    size_t num_tiles;
    size_t max_tile_rows; /* query rows (tokens x heads of a group) of the largest tile */
    size_t score_floats;  /* the most that one tile's scores take */
    size_t slot_bytes;    /* scratch of one worker */
    size_t num_workers;   /* slots; 1 when the work is too little to share */
    size_t unit_heads;    /* KV heads of a tile that one worker takes together: 1, or all */
    const struct mr_attention_tile *tiles; /* [num_tiles], most work first */
    char *slots;                           /* [workers][slot_bytes], 64-byte aligned */
};

/* Dp: the head dim as it is stored. */
MR_INLINE size_t mr_attention_padded_dim(const struct mr_attention *a) { return mr_round_up(a->head_dim, 16); }

/* Of a token at index `position` of its sequence: the first key it sees (it sees up to itself). */
MR_INLINE size_t mr_attention_first_key(const struct mr_attention *a, size_t position) {
    return a->window && position >= a->window ? position + 1 - a->window : 0;
}

/* Scratch of one worker, in this order: query rows, output rows, scores, one over the softmax's sum for each row, converted. */
MR_INLINE size_t mr_attention_slot_bytes(const struct mr_attention *a) {
    size_t floats = 2 * a->max_tile_rows * MR_ROW_FLOATS + a->score_floats + mr_round_up(a->max_tile_rows, 16);
    return floats * sizeof(float) + (a->cache_is_half ? MR_CONVERTED_BYTES : 0);
}

/* Floats between the rows of a tile's scores: its keys in whole blocks, and a line so that rows share no cache sets. */
MR_INLINE size_t mr_score_stride(size_t num_keys) { return mr_round_up(num_keys, MR_BLOCK_TOKENS) + 16; }

#endif
