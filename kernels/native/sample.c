/* Sampling: the next token of each row of logits. One form of the kernel; batcher/sampling.py is the reference.

   Nothing is sorted. top_k and top_p become a cut in the order (logit descending, id ascending): a last token, found by walking
   buckets of that order, first coarse, then fine, then token by token. Then one pass over the row draws among those before the cut,
   skipping 64 tokens at a time where none is kept or none could still win. z is counted from the row's largest logit. */
#include "philox.h"
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

/* ---- the cut ---- */

/* Smaller is better: the bits of a float in descending order of its value; both zeros are one. */
static uint32_t rank_of(float logit) {
    float value = usable_one(logit) + 0.0f;
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

/* A radix digit of the rank. */
struct digit {
    uint32_t shift, mask;
};

static uint32_t bucket_of(const float *values, uint32_t id, struct digit digit) {
    return rank_of(values[id]) >> digit.shift & digit.mask;
}

/* The bucket in which the sum reaches `target`; `before` becomes the sum of the buckets before it. The last one in use if rounding
   keeps the sum just below, MR_SAMPLE_BUCKETS if it falls short from the start. */
static uint32_t find_bucket(const double *buckets, double target, double *before, int may_fall_short) {
    uint32_t last = 0;
    for (uint32_t bucket = 0; bucket < MR_SAMPLE_BUCKETS; ++bucket) {
        if (buckets[bucket] == 0.0) continue;
        if (*before + buckets[bucket] >= target) return bucket;
        *before += buckets[bucket];
        last = bucket;
    }
    if (may_fall_short) return MR_SAMPLE_BUCKETS;
    *before -= buckets[last];
    return last;
}

static void keep_bucket(struct candidates *c, const float *values, struct digit digit, uint32_t bucket) {
    size_t count = 0;
    for (size_t i = 0; i < c->count; ++i) {
        c->ids[count] = c->ids[i];
        c->weights[count] = c->weights[i];
        count += bucket_of(values, c->ids[i], digit) == bucket;
    }
    c->count = count;
}

/* The candidate at which the weights, summed in order, reach `target` > 0; the order is by values[id] descending, then by id.
   A radix selection. Uses the candidates up. If the sum stays below, nothing is cut. */
static struct cut find_cut(const float *values, struct candidates *c, double *buckets, double target) {
    static const struct digit digits[] = {{21, 0x7ff}, {10, 0x7ff}, {0, 0x3ff}};
    struct cut cut = {-__builtin_inff(), UINT32_MAX};
    double before = 0.0;
    for (size_t level = 0; level < 3 && c->count > 1; ++level) {
        __builtin_memset(buckets, 0, MR_SAMPLE_BUCKETS * sizeof(double));
        for (size_t i = 0; i < c->count; ++i) buckets[bucket_of(values, c->ids[i], digits[level])] += c->weights[i];
        uint32_t bucket = find_bucket(buckets, target, &before, level == 0);
        if (bucket == MR_SAMPLE_BUCKETS) return cut;
        keep_bucket(c, values, digits[level], bucket);
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
    return find_cut(r->maxima, &groups, r->buckets, (double)k).logit;
}

static void limit_to_k(struct row *r, size_t k) {
    r->cut = (struct cut){reached_by(r, k), UINT32_MAX};
    collect(r);
    r->cut = find_cut(r->logits, &r->candidates, r->buckets, (double)k);
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

/* The same for the whole vocabulary, of which those are candidates that the smallest prefix could need: tokens lighter than their
   share of the rest weigh less than the rest together. */
static double weigh_all(struct row *r, float top_p) {
    struct candidates *c = &r->candidates;
    f64x16 sums = (f64x16)(0.0);
    for (size_t id = 0; id < r->vocab_size; id += 16) {
        size_t count = mr_min(16, r->vocab_size - id);
        f32x16 weights = weigh(r, count == 16 ? mr_load(r->logits + id) : mr_load_n(r->logits + id, count));
        mr_store(c->weights + id, weights); /* the last vector may go past V, not past the scratch */
        for (size_t i = count; i < 16; ++i) weights[i] = 0.0f;
        sums += __builtin_convertvector(weights, f64x16);
    }
    double sum = 0.0;
    for (size_t i = 0; i < 16; ++i) sum += sums[i];
    float least = (float)(0.999 * (1.0 - (double)top_p) * sum / (double)r->vocab_size);
    c->count = 0;
    for (size_t id = 0; id < r->vocab_size; ++id) {
        c->ids[c->count] = (uint32_t)id;
        c->weights[c->count] = c->weights[id];
        c->count += c->weights[id] >= least;
    }
    return sum;
}

static void limit_to_p(struct row *r, float top_p, int is_limited_to_k) {
    if (is_limited_to_k) collect(r);
    double sum = is_limited_to_k ? weigh_candidates(r) : weigh_all(r, top_p);
    struct cut cut = find_cut(r->logits, &r->candidates, r->buckets, (double)top_p * sum);
    if (cut.id != UINT32_MAX) r->cut = cut;
}

/* ---- the draw ---- */

/* Lane by lane the best token so far: the largest z + g, the lowest id on a tie. */
struct best {
    f32x16 score;
    i32x16 id;
    float most;
};

/* Lanes i, i + 4, ... of 64 floats: what word i of 16 consecutive counters belongs to. */
MR_INLINE f32x16 every_fourth(const f32x16 *v, const int i) {
#define FOURTHS(n) n, n + 4, n + 8, n + 12, n + 16, n + 20, n + 24, n + 28
#define PICK(n)                                                                                                               \
    __builtin_shufflevector(__builtin_shufflevector(v[0], v[1], FOURTHS(n)), __builtin_shufflevector(v[2], v[3], FOURTHS(n)), 0, \
                            1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    switch (i) {
    case 0: return PICK(0);
    case 1: return PICK(1);
    case 2: return PICK(2);
    default: return PICK(3);
    }
}

/* 64 tokens from `first` on, which is a multiple of 4. */
static void draw_group(const struct row *r, const f32x16 *logits, uint32_t first, struct best *best) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    struct philox_words words = philox((u32x16)lane + first / 4, r->position, r->seed);
    for (int i = 0; i < 4; ++i) {
        f32x16 logit = every_fourth(logits, i);
        i32x16 id = lane * 4 + (int32_t)(first + (uint32_t)i);
        f32x16 z = (logit - r->top) / r->temperature;
        i32x16 kept = (logit > r->cut.logit) | ((logit == r->cut.logit) & (i32x16)((u32x16)id <= r->cut.id));
        f32x16 score = mr_select(kept & (z >= r->least_z), z + gumbel(words.word[i]), mr_splat(-__builtin_inff()));
        i32x16 is_better = score > best->score;
        best->score = mr_select(is_better, score, best->score);
        best->id = mr_select_i32(is_better, id, best->id);
    }
    best->most = mr_max_lanes(best->score);
}

static void load_group(const float *logits, size_t count, f32x16 *out) {
    float padded[GROUP];
    if (count < GROUP) {
        for (size_t i = 0; i < GROUP; ++i) padded[i] = i < count ? logits[i] : -__builtin_inff();
        logits = padded;
    }
    for (size_t i = 0; i < 4; ++i) out[i] = usable(mr_load(logits + 16 * i));
}

static int64_t draw(const struct row *r) {
    struct best best = {mr_splat(-__builtin_inff()), mr_splat_i32(INT32_MAX), -__builtin_inff()};
    for (size_t first = 0; first < r->vocab_size; first += GROUP) {
        f32x16 logits[4];
        load_group(r->logits + first, mr_min(GROUP, r->vocab_size - first), logits);
        float most = mr_max_lanes(mr_max(mr_max(logits[0], logits[1]), mr_max(logits[2], logits[3])));
        float z = (most - r->top) / r->temperature;
        if (most < r->cut.logit || z < r->least_z || z + LARGEST_GUMBEL < best.most) continue;
        draw_group(r, logits, (uint32_t)first, &best);
    }
    int32_t winner = INT32_MAX;
    for (size_t i = 0; i < 16; ++i)
        if (best.score[i] == best.most && best.id[i] < winner) winner = best.id[i];
    return winner;
}

static struct row open_row(const struct mr_sample *s, size_t index, char *slot) {
    struct row r = {.logits = s->logits + index * s->vocab_size, .vocab_size = s->vocab_size};
    size_t capacity = mr_round_up(s->vocab_size, 16);
    r.cut = (struct cut){-__builtin_inff(), UINT32_MAX};
    r.seed = (uint64_t)s->seed[index];
    r.position = (uint64_t)s->position[index];
    r.buckets = (double *)slot;
    r.candidates.ids = (uint32_t *)(r.buckets + MR_SAMPLE_BUCKETS);
    r.candidates.weights = (float *)(r.candidates.ids + capacity);
    r.maxima = r.candidates.weights + capacity;
    return r;
}

static int64_t sample_row(const struct mr_sample *s, size_t index, char *slot) {
    struct row r = open_row(s, index, slot);
    int64_t top = find_top(r.logits, r.vocab_size);
    float top_p = s->top_p[index], min_p = s->min_p[index], temperature = s->temperature[index];
    int is_only_top = !(temperature > 0.0f) || top_p <= 0.0f || !(min_p <= 1.0f);
    if (top < 0 || is_only_top) return top;
    int is_limited_to_k = s->top_k[index] > 0 && (size_t)s->top_k[index] < r.vocab_size;
    r.top = usable_one(r.logits[top]);
    r.temperature = temperature < 0x1p-100f ? 0x1p-100f : temperature > largest_float ? largest_float : temperature;
    r.least_z = min_p > 0.0f ? mr_log(mr_splat(min_p))[0] : -__builtin_inff();
    if (is_limited_to_k) limit_to_k(&r, (size_t)s->top_k[index]);
    if (top_p < 1.0f) limit_to_p(&r, top_p, is_limited_to_k);
    return draw(&r);
}

struct sample_run {
    const struct mr_sample *sample;
    size_t slot_bytes;
};

static void sample_task(void *user, size_t index, size_t slot) {
    const struct sample_run *run = user;
    run->sample->token_ids[index] = sample_row(run->sample, index, run->sample->slots ? run->sample->slots + slot * run->slot_bytes : NULL);
}

void MR_NAME(mr_sample)(const struct mr_sample *s, const struct mr_parallel *parallel) {
    struct sample_run run = {s, mr_sample_slot_bytes(s->vocab_size)};
    mr_run_slots(parallel, sample_task, s->num_rows, &run);
}
