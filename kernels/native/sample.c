/* Sampling: the next token of each row of logits. One form of the kernel; batcher/sampling.py is the reference.

   top_k and top_p become a cut (sample_cut.h): a last token that is kept. Then one pass draws among the tokens before the cut,
   skipping 64 at a time where none is kept or none could still win. z is counted from the largest logit. */
#include "philox.h"
#include "sample_cut.h"

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
#define PAIR(a, b, n) __builtin_shufflevector(a, b, FOURTHS(n))
#define PICK(n)                                                                                                               \
    __builtin_shufflevector(PAIR(v[0], v[1], n), PAIR(v[2], v[3], n), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    switch (i) {
    case 0: return PICK(0);
    case 1: return PICK(1);
    case 2: return PICK(2);
    default: return PICK(3);
    }
}

/* Whether one of the words can lift a token by `lead`: g >= lead means -log(u) <= e^-lead, and 1 - u < -log(u). */
static int can_lift(const struct philox_words *words, float lead) {
    if (lead < 0.01f) return 1;
    u32x16 least = ~words->word[0]; /* 1 - u = (complement + 0.5) / 2^32 */
    for (int i = 1; i < 4; ++i) {
        u32x16 complement = ~words->word[i];
        least = complement < least ? complement : least;
    }
    uint32_t most = (uint32_t)(mr_exp(mr_splat(-lead))[0] * (0x1p32f * 1.001f)) + 1; /* a little more than needed */
    return mr_max_lanes_i32((i32x16)(least <= most) & 1);
}

/* 64 tokens from `first` on, which is a multiple of 4; `most_z` is the largest of theirs. */
static void draw_group(const struct row *r, const f32x16 *logits, uint32_t first, float most_z, struct best *best) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    struct philox_words words = philox((u32x16)lane + first / 4, r->position, r->seed);
    if (!can_lift(&words, best->most - most_z)) return;
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
        draw_group(r, logits, (uint32_t)first, z, &best);
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
    char *slots = run->sample->slots;
    run->sample->token_ids[index] = sample_row(run->sample, index, slots ? slots + slot * run->slot_bytes : NULL);
}

void MR_NAME(mr_sample)(const struct mr_sample *s, const struct mr_parallel *parallel) {
    struct sample_run run = {s, mr_sample_slot_bytes(s->vocab_size)};
    mr_run_slots(parallel, sample_task, s->num_rows, &run);
}
