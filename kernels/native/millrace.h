/* What every kernel source shares: names per instruction set, the parallel loop, the table of kernels.

   A kernel source is compiled once per form with -DMR_ISA=portable|avx2|avx512; MR_NAME(f) is then f_avx512 and so on.
   Sources without MR_ISA (operators, processor detection) are compiled once for the baseline processor.
   No libc: fixed-width types come from the compiler, memcpy and memset from mem.c. */
#ifndef MILLRACE_H
#define MILLRACE_H

#include <stddef.h>
#include <stdint.h>

#define MR_JOIN_(a, b) a##_##b
#define MR_JOIN(a, b) MR_JOIN_(a, b)
#ifdef MR_ISA
#define MR_NAME(name) MR_JOIN(name, MR_ISA)
#endif

#define MR_INLINE static inline __attribute__((always_inline))
#define MR_UNROLL _Pragma("clang loop unroll(full)")
#define MR_EXPORT __attribute__((visibility("default")))
#define MR_LIKELY(x) __builtin_expect(!!(x), 1)
#define MR_UNLIKELY(x) __builtin_expect(!!(x), 0)

MR_INLINE size_t mr_min(size_t a, size_t b) { return a < b ? a : b; }
MR_INLINE size_t mr_max_size(size_t a, size_t b) { return a > b ? a : b; }
MR_INLINE size_t mr_ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
MR_INLINE size_t mr_round_up(size_t a, size_t b) { return mr_ceil_div(a, b) * b; }

MR_INLINE int mr_same_text(const char *a, const char *b) {
    for (; *a && *a == *b; ++a, ++b) {}
    return *a == *b;
}

/* One iteration of a parallel loop. */
typedef void (*mr_task)(void *user, size_t index);

/* A loop over [0, count): returns when every iteration ran, each exactly once, in any order, on any thread.
   `threads` is how many iterations can run at the same moment (1 = serial): a hint for splitting work, never for its result. */
struct mr_parallel {
    void (*run)(void *context, mr_task task, size_t count, void *user);
    void *context;
    size_t threads;
};

/* One iteration that also learns its worker slot, [0, slots): no two run at once with the same slot, so a slot may own scratch. */
typedef void (*mr_slot_task)(void *user, size_t index, size_t slot);

struct mr_slots_ {
    mr_slot_task task;
    void *user;
    size_t count;
    size_t next;
};

MR_INLINE size_t mr_slot_count(const struct mr_parallel *parallel, size_t count) {
    return mr_min(parallel->threads ? parallel->threads : 1, count);
}

static inline void mr_slots_worker_(void *user, size_t slot) {
    struct mr_slots_ *work = user;
    for (;;) {
        size_t index = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
        if (index >= work->count) return;
        work->task(work->user, index, slot);
    }
}

/* Run task(user, index, slot) for every index in [0, count); workers take the next index when they are free.
   Slots are below mr_slot_count(parallel, count). With one worker it is a plain loop on the calling thread. */
static inline void mr_run_slots(const struct mr_parallel *parallel, mr_slot_task task, size_t count, void *user) {
    size_t slots = mr_slot_count(parallel, count);
    if (slots <= 1) {
        for (size_t index = 0; index < count; ++index) task(user, index, 0);
        return;
    }
    struct mr_slots_ work = {task, user, count, 0};
    parallel->run(parallel->context, mr_slots_worker_, slots, &work);
}

/* The kernels of one form. Arguments are declared in linear.h, embed.h, attention.h and sample.h and are already checked. */
struct mr_qlinear;
struct mr_linear;
struct mr_qembed;
struct mr_embed;
struct mr_attention;
struct mr_sample;

struct mr_kernels {
    const char *isa;
    void (*qlinear)(const struct mr_qlinear *, const struct mr_parallel *);
    void (*linear)(const struct mr_linear *, const struct mr_parallel *);
    void (*qembed)(const struct mr_qembed *, const struct mr_parallel *);
    void (*embed)(const struct mr_embed *, const struct mr_parallel *);
    void (*attention)(const struct mr_attention *, const struct mr_parallel *);
    void (*sample)(const struct mr_sample *, const struct mr_parallel *);
    uint64_t (*peak_int8)(uint64_t rounds);
    uint64_t (*peak_f32)(uint64_t rounds);
    void (*probe)(uint32_t function, const float *a, const float *b, const float *c, float *out, size_t count);
};

#ifdef MR_ISA
/* Each form's functions, named here once so that table.c and the sources agree: mr_qlinear_avx512 and so on. */
void MR_NAME(mr_qlinear)(const struct mr_qlinear *, const struct mr_parallel *);
void MR_NAME(mr_linear)(const struct mr_linear *, const struct mr_parallel *);
void MR_NAME(mr_qembed)(const struct mr_qembed *, const struct mr_parallel *);
void MR_NAME(mr_embed)(const struct mr_embed *, const struct mr_parallel *);
void MR_NAME(mr_attention)(const struct mr_attention *, const struct mr_parallel *);
void MR_NAME(mr_sample)(const struct mr_sample *, const struct mr_parallel *);

/* Register-only loops that show what the processor can do (measure.c): multiply-adds done by `rounds`. */
uint64_t MR_NAME(mr_peak_int8)(uint64_t rounds);
uint64_t MR_NAME(mr_peak_f32)(uint64_t rounds);

/* One function of vec.h or vecmath.h over arrays, for tests (probe.c). */
void MR_NAME(mr_probe)(uint32_t function, const float *a, const float *b, const float *c, float *out, size_t count);
#endif

/* The table in use (cpu.c): the widest form this processor runs, unless millrace_set_isa narrowed it. */
const struct mr_kernels *mr_active(void);

/* How many threads to expect (cpu.c): processors this process may run on, unless millrace_set_threads said otherwise. */
size_t mr_threads(void);

#endif
