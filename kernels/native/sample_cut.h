/* Where top_k and top_p cut a row: the last token kept, in the order (logit descending, id ascending). Included by sample.c.

   Apart because it is a search for one place, exact in that order, while the draw is arithmetic over all that is kept. Nothing is
   sorted: a few passes narrow down where the place is, then radix selection finds it among the few tokens that are left. */
#ifndef MR_SAMPLE_CUT_H
#define MR_SAMPLE_CUT_H

#include "sample.h"
#include "vecmath.h"

enum { GROUP = 64, CHUNK = 16 * GROUP };

static const float largest_float = 0x1.fffffep127f;

/* The last token kept: tokens with a larger logit, or the same and no larger id, are kept. */
struct cut {
    float logit;
    uint32_t id;
};

struct candidates {
    uint32_t *ids;  /* ascending */
    float *weights; /* in proportion to the probability; the largest is 1 */
    size_t count;
};

struct row {
    const float *logits;
    size_t vocab_size;
    float temperature;
    float top; /* the largest logit */
    float least_z;
    uint64_t seed, position;
    struct cut cut;
    double *buckets;
    struct candidates candidates;
    float *maxima;
};

/* NaN counts as -infinity, +infinity as the largest float. */
MR_INLINE f32x16 usable(f32x16 logits) {
    f32x16 finite = logits > largest_float ? (f32x16)(largest_float) : logits;
    return logits == logits ? finite : (f32x16)(-__builtin_inff());
}

static float usable_one(float logit) {
    if (logit != logit) return -__builtin_inff();
    return logit > largest_float ? largest_float : logit;
}

/* ---- the largest logit ---- */

/* Lane by lane the largest of `count` logits; NaN is passed over. */
static f32x16 largest_lanes(const float *logits, size_t count) {
    f32x16 most[4];
    for (size_t i = 0; i < 4; ++i) most[i] = mr_splat(-__builtin_inff());
    size_t at = 0;
    for (; at + GROUP <= count; at += GROUP)
        for (size_t i = 0; i < 4; ++i) most[i] = mr_max(mr_load(logits + at + 16 * i), most[i]);
    for (; at < count; ++at) {
        f32x16 one = mr_splat(-__builtin_inff());
        one[at % 16] = logits[at];
        most[0] = mr_max(one, most[0]);
    }
    return mr_max(mr_max(most[0], most[1]), mr_max(most[2], most[3]));
}

static int has_finite(const float *logits, size_t count) {
    for (size_t i = 0; i < count; ++i)
        if (logits[i] - logits[i] == 0.0f) return 1;
    return 0;
}

/* The first of the largest logits, or -1 if none is finite. */
static int64_t find_top(const float *logits, size_t count) {
    float top = -__builtin_inff();
    size_t at = 0;
    for (size_t first = 0; first < count; first += CHUNK) {
        float most = mr_max_lanes(largest_lanes(logits + first, mr_min(CHUNK, count - first)));
        if (most <= top) continue;
        top = most;
        at = first;
    }
    if (top == -__builtin_inff()) return -1;
    if (top > largest_float && !has_finite(logits, count)) return -1;
    if (top > largest_float) at = 0; /* infinity counts as the largest float, which may stand before it */
    while (!(usable_one(logits[at]) >= usable_one(top))) ++at;
    return (int64_t)at;
}

/* Smaller is better: the bits of a float in descending order of its value; both zeros are one. */
static uint32_t rank_of(float logit) {
    float value = usable_one(logit) + 0.0f;
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

static uint32_t bucket_of(const float *values, uint32_t id, uint32_t shift) {
    return rank_of(values[id]) >> shift & (MR_SAMPLE_BUCKETS - 1);
}

/* The bucket in which the sum reaches `target`; `before` becomes the sum of the buckets before it. If rounding keeps the sum just
   below, the last one in use. */
static uint32_t find_bucket(const double *buckets, double target, double *before) {
    uint32_t last = 0;
    for (uint32_t bucket = 0; bucket < MR_SAMPLE_BUCKETS; ++bucket) {
        if (buckets[bucket] == 0.0) continue;
        if (*before + buckets[bucket] >= target) return bucket;
        *before += buckets[bucket];
        last = bucket;
    }
    *before -= buckets[last];
    return last;
}

static void keep_bucket(struct candidates *c, const float *values, uint32_t shift, uint32_t bucket) {
    size_t count = 0;
    for (size_t i = 0; i < c->count; ++i) {
        c->ids[count] = c->ids[i];
        c->weights[count] = c->weights[i];
        count += bucket_of(values, c->ids[i], shift) == bucket;
    }
    c->count = count;
}

/* The candidate at which the weights, summed in order from `before` on, reach `target`, or the last one; the order is by values[id]
   descending, then by id. A radix selection, 8 bits of the rank at a time. Uses the candidates up. */
static struct cut find_cut(const float *values, struct candidates *c, double *buckets, double before, double target) {
    struct cut cut = {-__builtin_inff(), UINT32_MAX};
    for (int32_t shift = 24; shift >= 0 && c->count > 1; shift -= 8) {
        __builtin_memset(buckets, 0, MR_SAMPLE_BUCKETS * sizeof(double));
        for (size_t i = 0; i < c->count; ++i) buckets[bucket_of(values, c->ids[i], (uint32_t)shift)] += c->weights[i];
        keep_bucket(c, values, (uint32_t)shift, find_bucket(buckets, target, &before));
    }
    for (size_t i = 0; i < c->count; ++i) { /* all equal: by id */
        cut = (struct cut){usable_one(values[c->ids[i]]), c->ids[i]};
        before += c->weights[i];
        if (before >= target) break;
    }
    return cut;
}

static int is_before(struct cut cut, float logit, uint32_t id) {
    return logit > cut.logit || (logit == cut.logit && id <= cut.id);
}

/* Candidates, each of weight 1: the tokens before the cut. */
static void collect(struct row *r) {
    struct candidates *c = &r->candidates;
    c->count = 0;
    for (size_t first = 0; first < r->vocab_size; first += GROUP) {
        size_t end = mr_min(first + GROUP, r->vocab_size);
        if (end - first == GROUP && mr_max_lanes(largest_lanes(r->logits + first, GROUP)) < r->cut.logit) continue;
        for (size_t id = first; id < end; ++id) {
            c->ids[c->count] = (uint32_t)id;
            c->weights[c->count] = 1.0f;
            c->count += is_before(r->cut, usable_one(r->logits[id]), (uint32_t)id);
        }
    }
}

/* A logit that at least k tokens reach: the k-th largest of the maxima of groups. -infinity if there are fewer groups. */
static float reached_by(struct row *r, size_t k) {
    struct candidates groups = {r->candidates.ids, r->candidates.weights, 0};
    for (size_t first = 0; first + CHUNK <= r->vocab_size; first += CHUNK) {
        mr_store(r->maxima + groups.count, usable(largest_lanes(r->logits + first, CHUNK)));
        groups.count += 16;
    }
    if (k > groups.count) return -__builtin_inff();
    for (size_t i = 0; i < groups.count; ++i) {
        groups.ids[i] = (uint32_t)i;
        groups.weights[i] = 1.0f;
    }
    return find_cut(r->maxima, &groups, r->buckets, 0.0, (double)k).logit;
}

static void limit_to_k(struct row *r, size_t k) {
    r->cut = (struct cut){reached_by(r, k), UINT32_MAX};
    collect(r);
    r->cut = find_cut(r->logits, &r->candidates, r->buckets, 0.0, (double)k);
}

/* e^(z) of 16 logits. */
MR_INLINE f32x16 weigh(const struct row *r, f32x16 logits) { return mr_exp((usable(logits) - r->top) / r->temperature); }

/* Weights of the candidates; returns their sum. */
static double weigh_candidates(struct row *r) {
    struct candidates *c = &r->candidates;
    double sum = 0.0;
    for (size_t first = 0; first < c->count; first += 16) {
        size_t count = mr_min(16, c->count - first);
        float logits[16] = {0};
        for (size_t i = 0; i < count; ++i) logits[i] = r->logits[c->ids[first + i]];
        mr_store_n(c->weights + first, weigh(r, mr_load(logits)), count);
        for (size_t i = 0; i < count; ++i) sum += c->weights[first + i];
    }
    return sum;
}

/* Weights of the whole vocabulary, at their ids; returns their sum. */
static double weigh_all(struct row *r) {
    float *weights = r->candidates.weights;
    f64x16 sums = (f64x16)(0.0);
    size_t whole = r->vocab_size / 16 * 16, left = r->vocab_size - whole;
    for (size_t id = 0; id < whole; id += 16) mr_store(weights + id, weigh(r, mr_load(r->logits + id)));
    if (left) {
        mr_store(weights + whole, mr_splat(0.0f)); /* the scratch is whole vectors */
        mr_store_n(weights + whole, weigh(r, mr_load_n(r->logits + whole, left)), left);
    }
    for (size_t id = 0; id < r->vocab_size; id += 16) sums += __builtin_convertvector(mr_load(weights + id), f64x16);
    double sum = 0.0;
    for (size_t i = 0; i < 16; ++i) sum += sums[i];
    return sum;
}

enum { STEPS = 4 };

/* Of each bound the sum of the weights that reach it. */
static void sums_from(const float *weights, size_t count, const float *bounds, float *out) {
    f32x16 sums[STEPS];
    for (size_t i = 0; i < STEPS; ++i) sums[i] = mr_splat(0.0f);
    for (size_t at = 0; at < count; at += 16) {
        f32x16 w = mr_load(weights + at);
        for (size_t i = 0; i < STEPS; ++i) sums[i] += w >= bounds[i] ? w : (f32x16)(0.0f);
    }
    for (size_t i = 0; i < STEPS; ++i) out[i] = mr_sum_lanes(sums[i]);
}

static double sum_from(const float *weights, size_t count, float bound) {
    f64x16 sums = (f64x16)(0.0);
    for (size_t at = 0; at < count; at += 16) {
        f32x16 w = mr_load(weights + at);
        sums += __builtin_convertvector(w >= bound ? w : (f32x16)(0.0f), f64x16);
    }
    double sum = 0.0;
    for (size_t i = 0; i < 16; ++i) sum += sums[i];
    return sum;
}

/* Between which weights the sum reaches `target`: sum_from(low) does, sum_from(high) does not. Every pass leaves a fifth of the
   range of logarithms; after four a few hundred tokens are left of a large vocabulary. */
static void narrow(const struct row *r, float target, float *low, float *high) {
    for (int pass = 0; pass < 4; ++pass) {
        float bounds[STEPS], sums[STEPS];
        f32x16 width = mr_log(mr_splat(*high / *low)) * (1.0f / (STEPS + 1));
        for (size_t i = 0; i < STEPS; ++i) bounds[i] = *low * mr_exp(width * (float)(i + 1))[0];
        sums_from(r->candidates.weights, r->vocab_size, bounds, sums);
        for (size_t i = 0; i < STEPS; ++i) {
            if (sums[i] >= target) {
                *low = bounds[i];
                continue;
            }
            *high = bounds[i];
            break;
        }
    }
}

/* Whether one of the weights is in [low, high). */
static int has_between(const float *weights, size_t count, float low, float high) {
    i32x16 found = mr_splat_i32(0);
    for (size_t i = 0; i < count; i += 16) {
        f32x16 w = mr_load(weights + i);
        found |= (w >= low) & (w < high);
    }
    return mr_max_lanes_i32(found & 1);
}

/* Candidates: the tokens whose weight is in [low, high). */
static void collect_between(struct row *r, float low, float high) {
    struct candidates *c = &r->candidates;
    c->count = 0;
    for (size_t first = 0; first < r->vocab_size; first += GROUP) {
        size_t end = mr_min(first + GROUP, r->vocab_size);
        if (!has_between(c->weights + first, end - first, low, high)) continue;
        for (size_t id = first; id < end; ++id) { /* the list never overtakes what it is made of */
            float weight = c->weights[id];
            c->ids[c->count] = (uint32_t)id;
            c->weights[c->count] = weight;
            c->count += weight >= low && weight < high;
        }
    }
}

static struct cut cut_at_p(struct row *r, float top_p) {
    double sum = weigh_all(r), target = (double)top_p * sum;
    /* Tokens lighter than an even share of what may be left out are, together, less than that. */
    float low = (float)(0.999 * (1.0 - (double)top_p) * sum / (double)r->vocab_size), high = 2.0f;
    narrow(r, (float)target, &low, &high);
    double before = sum_from(r->candidates.weights, r->vocab_size, high);
    collect_between(r, low, high);
    return find_cut(r->logits, &r->candidates, r->buckets, before, target);
}

static void limit_to_p(struct row *r, float top_p, int is_limited_to_k) {
    if (!is_limited_to_k) {
        r->cut = cut_at_p(r, top_p);
        return;
    }
    collect(r);
    double sum = weigh_candidates(r);
    r->cut = find_cut(r->logits, &r->candidates, r->buckets, 0.0, (double)top_p * sum);
}

#endif
