/* A token for each row of logits: the meaning is batcher/sampling.py, which this is tested against.

   A block a row. What depends on order (top_k, top_p) is found as a cut, the last token that is kept when tokens are ordered by logit
   descending and then by id: a token is kept if it is not behind the cut. A cut is searched by counting what lies before seven
   candidates at once, eight times fewer each pass; counts and weights are integers (a weight is exp(z - z0) in units of 2^-40,
   rounded), so that they do not depend on the order in which threads add. The weights' exp is float32: the cut of top_p can differ
   from the reference's where the cumulative probability passes top_p within about 1e-6. The draw itself is decided in float64:
   scores are estimated in float32 first, and every token within 1e-3 of the best estimate is scored exactly. */
#include "common.cuh"

#define PARTS 16 /* of a row, whose tops are found apart; the launch of millrace_top counts on it */
#define CANDIDATES 7
#define MOST_WARPS 32
#define FLOAT_MAX 3.402823466e+38f
#define WEIGHT_UNIT 1099511627776.0f /* 2^40 */
#define ESTIMATE_MARGIN 1e-3f        /* the estimates are within 1e-5 */

typedef unsigned long long u64;

struct cut {
    unsigned key; /* of the last kept logit */
    unsigned id;  /* of those with that key, ids up to this one */
};

struct row {
    const float *logits;
    int vocab_size;
    double temperature;
    double inverse; /* 1 / temperature, for estimates; of a small temperature no float32 */
    float top;      /* the largest logit */
};

/* NaN counts as -inf, +inf as the largest float, -0 as 0. */
MR_DEVICE float usable(float logit) {
    if (!(logit == logit)) return -__uint_as_float(0x7f800000u);
    return (logit > FLOAT_MAX ? FLOAT_MAX : logit) + 0.0f;
}

/* Unsigned numbers in the order of floats. */
MR_DEVICE unsigned key_of(float value) {
    unsigned bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

MR_DEVICE float value_of(unsigned key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

/* ---- over the block: every thread calls, every thread gets the answer ---- */

MR_DEVICE u64 block_max(u64 value, u64 *shared) {
    for (int offset = 16; offset > 0; offset >>= 1) {
        u64 other = __shfl_xor_sync(MR_FULL_WARP, value, offset);
        value = other > value ? other : value;
    }
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = value;
    __syncthreads();
    for (int v = 0; v < (int)blockDim.x >> 5; ++v) value = shared[v] > value ? shared[v] : value;
    return value;
}

MR_DEVICE u64 block_sum(u64 value, u64 *shared) {
    for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(MR_FULL_WARP, value, offset);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = value;
    __syncthreads();
    value = 0;
    for (int v = 0; v < (int)blockDim.x >> 5; ++v) value += shared[v];
    return value;
}

/* ---- weights and cuts ---- */

/* z - z0, estimated. */
MR_DEVICE float below_top(const struct row *r, float logit) {
    return (float)(((double)logit - (double)r->top) * r->inverse);
}

MR_DEVICE u64 weight(const struct row *r, float logit) { return (u64)(expf(below_top(r, logit)) * WEIGHT_UNIT + 0.5f); }

MR_DEVICE int is_before(struct cut c, unsigned key, unsigned id) { return key > c.key || (key == c.key && id <= c.id); }

/* What token `id` counts in a search: 1, or its weight; nothing if it is behind `within`. */
MR_DEVICE u64 mass(const struct row *r, struct cut within, int by_weight, unsigned id, unsigned *key) {
    float logit = usable(r->logits[id]);
    *key = key_of(logit);
    if (!is_before(within, *key, id)) return 0;
    return by_weight ? weight(r, logit) : 1;
}

/* The largest key in [low, high] with at least `target` of mass at or above it; `low` has. */
MR_DEVICE unsigned search_key(const struct row *r, struct cut within, int by_weight, u64 target, unsigned low, unsigned high,
                              u64 *shared) {
    while (low < high) {
        unsigned at[CANDIDATES];
        u64 above[CANDIDATES];
        for (int j = 0; j < CANDIDATES; ++j) {
            at[j] = low + (unsigned)(((u64)(high - low) * (j + 1) + CANDIDATES) / (CANDIDATES + 1));
            above[j] = 0;
        }
        for (int id = (int)threadIdx.x; id < r->vocab_size; id += (int)blockDim.x) {
            unsigned key;
            u64 m = mass(r, within, by_weight, (unsigned)id, &key);
            MR_UNROLL
            for (int j = 0; j < CANDIDATES; ++j) above[j] += key >= at[j] ? m : 0;
        }
        unsigned next_low = low, next_high = high;
        for (int j = 0; j < CANDIDATES; ++j) {
            u64 all = block_sum(above[j], shared);
            if (all >= target) next_low = at[j];
            else if (at[j] - 1 < next_high) next_high = at[j] - 1;
        }
        low = next_low;
        high = next_high;
    }
    return low;
}

/* The smallest id with at least `target` tokens of `key` (not behind `within`) up to it. */
MR_DEVICE unsigned search_id(const struct row *r, struct cut within, unsigned key, u64 target, u64 *shared) {
    unsigned low = 0, high = (unsigned)r->vocab_size - 1;
    while (low < high) {
        unsigned middle = low + (high - low) / 2, other;
        u64 count = 0;
        for (int id = (int)threadIdx.x; id <= (int)middle; id += (int)blockDim.x)
            count += mass(r, within, 0, (unsigned)id, &other) && other == key;
        if (block_sum(count, shared) >= target) high = middle;
        else low = middle + 1;
    }
    return low;
}

/* The cut after the shortest prefix whose mass reaches `target`; there is that much before `within`. */
MR_DEVICE struct cut find_cut(const struct row *r, struct cut within, int by_weight, u64 target, u64 *shared) {
    unsigned key = search_key(r, within, by_weight, target, within.key, key_of(r->top), shared);
    u64 above = 0, ties = 0;
    for (int id = (int)threadIdx.x; id < r->vocab_size; id += (int)blockDim.x) {
        unsigned other;
        u64 m = mass(r, within, by_weight, (unsigned)id, &other);
        above += other > key ? m : 0;
        ties += other == key && is_before(within, other, (unsigned)id);
    }
    above = block_sum(above, shared);
    ties = block_sum(ties, shared);
    u64 each = by_weight ? weight(r, value_of(key)) : 1;
    u64 wanted = above >= target ? 1 : each ? (target - above + each - 1) / each : ties;
    struct cut c = {key, 0xffffffffu};
    if (wanted < ties) c.id = search_id(r, within, key, wanted, shared);
    else c.id = within.key == key ? within.id : 0xffffffffu;
    return c;
}

/* ---- random numbers: Philox4x32-10 ---- */

MR_DEVICE void philox(unsigned *c, unsigned k0, unsigned k1) {
    for (int round = 0; round < 10; ++round) {
        u64 p0 = (u64)c[0] * 0xD2511F53u, p1 = (u64)c[2] * 0xCD9E8D57u;
        unsigned n0 = (unsigned)(p1 >> 32) ^ c[1] ^ k0, n2 = (unsigned)(p0 >> 32) ^ c[3] ^ k1;
        c[1] = (unsigned)p1;
        c[3] = (unsigned)p0;
        c[0] = n0;
        c[2] = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

/* -log(-log(u)) of u = (word + 0.5) / 2^32, estimated: near 1 from 1 - u, which float32 still resolves. */
MR_DEVICE float gumbel_estimate(unsigned word) {
    float inner = word < 0x80000000u ? -logf(((float)word + 0.5f) * 2.3283064365386963e-10f)
                                     : -log1pf(-(((float)(0xffffffffu - word) + 0.5f) * 2.3283064365386963e-10f));
    return -logf(inner);
}

MR_DEVICE double exact_score(const struct row *r, float logit, unsigned word) {
    double u = ((double)word + 0.5) / 4294967296.0;
    return (double)logit / r->temperature - log(-log(u));
}

struct draw {
    unsigned seed_low, seed_high, position_low, position_high;
    struct cut kept;
    float min_p;
};

MR_DEVICE int is_kept(const struct row *r, const struct draw *d, float logit, unsigned id) {
    unsigned key = key_of(logit);
    if (!is_before(d->kept, key, id)) return 0;
    if (d->min_p <= 0.0f || key == key_of(r->top)) return 1;
    float w = expf(below_top(r, logit));
    if (fabsf(w - d->min_p) > 1e-4f * d->min_p) return w >= d->min_p;
    double z = (double)logit / r->temperature, z0 = (double)r->top / r->temperature;
    return exp(z - z0) >= (double)d->min_p;
}

/* One walk over the tokens that are kept: the best estimate (exact = 0), or among those near it the best exact score. */
MR_DEVICE void walk(const struct row *r, const struct draw *d, int exact, float near, float *best_estimate, double *best,
                    unsigned *best_id) {
    for (int group = (int)threadIdx.x; 4 * group < r->vocab_size; group += (int)blockDim.x) {
        unsigned words[4] = {(unsigned)group, d->position_low, d->position_high, 0};
        philox(words, d->seed_low, d->seed_high);
        for (int j = 0; j < 4; ++j) {
            int id = 4 * group + j;
            if (id >= r->vocab_size) break;
            float logit = usable(r->logits[id]);
            if (!is_kept(r, d, logit, (unsigned)id)) continue;
            float estimate = below_top(r, logit) + gumbel_estimate(words[j]);
            if (!exact) {
                if (estimate > *best_estimate) *best_estimate = estimate;
            } else if (estimate >= near) {
                double score = exact_score(r, logit, words[j]);
                if (score > *best || *best_id == 0xffffffffu) { /* ids grow: the lower one of equals stays */
                    *best = score;
                    *best_id = (unsigned)id;
                }
            }
        }
    }
}

/* The token that the block draws. */
MR_DEVICE unsigned draw_token(const struct row *r, const struct draw *d, u64 *shared) {
    MR_SHARED double scores[MOST_WARPS];
    MR_SHARED unsigned ids[MOST_WARPS];
    float estimate = -__uint_as_float(0x7f800000u);
    double best = 0.0;
    unsigned best_id = 0xffffffffu;
    walk(r, d, 0, 0.0f, &estimate, &best, &best_id);
    /* Scores of float64 near a huge z round to each other, however far apart their estimates are. */
    float rounding = (float)(fabs((double)r->top / r->temperature) * 4.5e-16);
    float near = value_of((unsigned)block_max(key_of(estimate), shared)) - ESTIMATE_MARGIN - rounding;
    walk(r, d, 1, near, &estimate, &best, &best_id);
    for (int offset = 16; offset > 0; offset >>= 1) {
        double score = __shfl_xor_sync(MR_FULL_WARP, best, offset);
        unsigned id = __shfl_xor_sync(MR_FULL_WARP, best_id, offset);
        if (id != 0xffffffffu && (best_id == 0xffffffffu || score > best || (score == best && id < best_id))) {
            best = score;
            best_id = id;
        }
    }
    if ((threadIdx.x & 31) == 0) {
        scores[threadIdx.x >> 5] = best;
        ids[threadIdx.x >> 5] = best_id;
    }
    __syncthreads();
    for (int v = 0; v < (int)blockDim.x >> 5; ++v) {
        if (ids[v] == 0xffffffffu) continue;
        if (best_id == 0xffffffffu || scores[v] > best || (scores[v] == best && ids[v] < best_id)) {
            best = scores[v];
            best_id = ids[v];
        }
    }
    return best_id;
}

/* ---- the kernel ---- */

/* What a part of a row holds. */
struct top {
    u64 best;   /* the largest usable logit and the lowest id that has it: key << 32 | ~id */
    u64 finite; /* whether any logit is finite */
};

MR_DEVICE void look_at(float logit, int id, struct top *top) {
    u64 at = (u64)key_of(usable(logit)) << 32 | ~(unsigned)id;
    top->finite |= fabsf(logit) <= FLOAT_MAX;
    top->best = at > top->best ? at : top->best;
}

/* The tops of PARTS parts of each row: many blocks a row, because one multiprocessor reads a row of a large vocabulary in twenty
   microseconds. Grid: rows * PARTS blocks. Rows of logits begin on 16-byte boundaries if vocab_size is a multiple of 4. */
MR_KERNEL void millrace_top(const float *logits, long long vocab_size, struct top *tops) {
    MR_SHARED u64 shared[MOST_WARPS];
    int part = (int)(blockIdx.x % PARTS), stride = (int)blockDim.x * PARTS;
    const float *row = logits + (long long)(blockIdx.x / PARTS) * vocab_size;
    int vectors = vocab_size % 4 ? 0 : (int)vocab_size / 4;
    struct top top = {0, 0};
    for (int i = part * (int)blockDim.x + (int)threadIdx.x; i < vectors; i += stride) {
        struct mr_words v = ((const struct mr_words *)row)[i];
        MR_UNROLL
        for (int j = 0; j < 4; ++j) look_at(__uint_as_float(v.w[j]), 4 * i + j, &top);
    }
    for (int id = 4 * vectors + part * (int)blockDim.x + (int)threadIdx.x; id < (int)vocab_size; id += stride)
        look_at(row[id], id, &top);
    top.finite = block_max(top.finite, shared);
    top.best = block_max(top.best, shared);
    if (threadIdx.x == 0) tops[blockIdx.x] = top;
}

/* The cut of top_k and top_p together. */
MR_DEVICE struct cut filter(const struct row *r, int top_k, float top_p, u64 *shared) {
    struct cut kept = {0, 0xffffffffu};
    if (top_k > 0 && top_k < r->vocab_size) kept = find_cut(r, kept, 0, (u64)top_k, shared);
    if (top_p >= 1.0f) return kept;
    u64 all = 0;
    for (int id = (int)threadIdx.x; id < r->vocab_size; id += (int)blockDim.x) {
        unsigned key;
        all += mass(r, kept, 1, (unsigned)id, &key);
    }
    double target = ceil((double)top_p * (double)block_sum(all, shared));
    return find_cut(r, kept, 1, target < 1.0 ? 1 : (u64)target, shared);
}

/* A token for each row, from the tops that millrace_top has found. One block a row, of a multiple of 32 threads up to 512
   (registers). */
MR_KERNEL void millrace_sample(const float *logits, long long vocab_size, const struct top *tops, const float *temperature,
                               const int *top_k, const float *top_p, const float *min_p, const long long *seed,
                               const long long *position, long long *token_ids) {
    MR_SHARED u64 shared[MOST_WARPS];
    int at = (int)blockIdx.x;
    struct row r;
    r.logits = logits + (long long)at * vocab_size;
    r.vocab_size = (int)vocab_size;
    u64 top = 0, has_finite = 0;
    for (int part = 0; part < PARTS; ++part) {
        struct top other = tops[at * PARTS + part];
        top = other.best > top ? other.best : top;
        has_finite |= other.finite;
    }
    unsigned token = ~(unsigned)top;
    if (has_finite && temperature[at] > 0.0f) {
        r.temperature = (double)temperature[at];
        r.inverse = 1.0 / r.temperature;
        r.top = value_of((unsigned)(top >> 32));
        struct draw d;
        d.seed_low = (unsigned)(u64)seed[at];
        d.seed_high = (unsigned)((u64)seed[at] >> 32);
        d.position_low = (unsigned)(u64)position[at];
        d.position_high = (unsigned)((u64)position[at] >> 32);
        d.min_p = min_p[at];
        d.kept = filter(&r, top_k[at], top_p[at], shared);
        token = draw_token(&r, &d, shared);
    }
    if (threadIdx.x == 0) token_ids[at] = has_finite ? (long long)token : -1;
}
