/* Sample's arguments, as the operator hands them to a kernel. R rows, V tokens in the vocabulary; README.md has the meaning. */
#ifndef MR_SAMPLE_H
#define MR_SAMPLE_H

#include "millrace.h"

struct mr_sample {
    size_t num_rows;
    size_t vocab_size;
    const float *logits;      /* [R, V] */
    const float *temperature; /* [R], and so the others */
    const int32_t *top_k;
    const float *top_p;
    const float *min_p;
    const int64_t *seed;
    const int64_t *position;
    int64_t *token_ids; /* [R] */
    char *slots;        /* [workers][mr_sample_slot_bytes], or NULL if no row limits its candidates */
};

enum { MR_SAMPLE_BUCKETS = 256 };

/* Whether a row keeps only some tokens by top_k or top_p, which takes scratch. */
MR_INLINE int mr_sample_is_limited(const struct mr_sample *s, size_t row) {
    return s->temperature[row] > 0.0f && (s->top_k[row] > 0 || s->top_p[row] < 1.0f);
}

/* Scratch of one worker: the weight of each bucket; an id and a weight for each token; the maxima of groups of 64. */
MR_INLINE size_t mr_sample_slot_bytes(size_t vocab_size) {
    size_t tokens = mr_round_up(vocab_size, 16), groups = mr_round_up(vocab_size / 64 + 1, 16);
    return mr_round_up(MR_SAMPLE_BUCKETS * sizeof(double) + (2 * tokens + groups) * sizeof(float), 64);
}

/* Bytes for all workers. */
MR_INLINE size_t mr_sample_scratch_bytes(const struct mr_sample *s, size_t threads) {
    int is_limited = 0;
    for (size_t row = 0; row < s->num_rows; ++row) is_limited |= mr_sample_is_limited(s, row);
    return is_limited ? mr_min(threads ? threads : 1, s->num_rows) * mr_sample_slot_bytes(s->vocab_size) : 0;
}

#endif
