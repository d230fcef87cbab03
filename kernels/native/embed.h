/* Embedding rows taken out of the packed weights of the output layer (linear.h), so that tied weights are stored once. */
#ifndef MR_EMBED_H
#define MR_EMBED_H

#include "linear.h"

/* y[t] = row ids[t] of the table [N, K]; ids are already checked to be in [0, N). */
struct mr_embed {
    const int64_t *ids; /* [rows] */
    float *y;           /* [rows, K] */
    size_t rows, K, N;
    const float *weight; /* [NB][K][64] */
};

struct mr_qembed {
    const int64_t *ids;
    float *y;
    size_t rows, K, N;
    const int8_t *weight; /* [NB][K4][64][4] */
    const float *scale;   /* [NB * 64] */
};

/* Index of the first id outside [0, N), or `rows` if all are inside. */
MR_INLINE size_t mr_first_bad_id(const int64_t *ids, size_t rows, size_t N) {
    size_t t = 0;
    while (t < rows && (uint64_t)ids[t] < N) ++t;
    return t;
}

#endif
