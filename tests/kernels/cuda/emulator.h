/* What CUDA has built in, for one block at a time on the CPU. Each CUDA thread has a stack of its own, and they take turns in one
   thread of the system: whoever waits at a barrier lets the next one run (a system's thread and its barriers cost ten times more).
   Warps shuffle through an array between two barriers of their own; shared memory is static, because only one block runs. */
#ifndef EMULATOR_H
#define EMULATOR_H

#include <math.h>
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#define MR_KERNEL static
#define MR_DEVICE static inline
#define MR_SHARED static
#define MR_UNROLL
#define MR_ALIGNED __attribute__((aligned(16)))
#define MR_FULL_WARP 0xffffffffu
#define EMULATED_MOST_THREADS 1024

struct index {
    unsigned x;
};
static struct index threadIdx, blockIdx, blockDim;
static unsigned long long lanes[EMULATED_MOST_THREADS];

/* The turn goes round, up or down. A thread resumes where it waited, or in its fresh stack. */
struct turn {
    jmp_buf place;
    ucontext_t fresh;
    int has_begun, has_ended;
};
static struct turn turns[EMULATED_MOST_THREADS];
static unsigned stride; /* to the next thread: 1, or one less than there are */

static void resume(unsigned thread) {
    struct turn *turn = &turns[thread];
    threadIdx.x = thread;
    if (turn->has_begun) _longjmp(turn->place, 1);
    turn->has_begun = 1;
    setcontext(&turn->fresh);
}

static void pass_turn(void) {
    unsigned next = threadIdx.x;
    do next = (next + stride) % blockDim.x;
    while (turns[next].has_ended);
    if (next != threadIdx.x && !_setjmp(turns[threadIdx.x].place)) resume(next);
}

/* Opens when all that share it have come. */
struct barrier {
    unsigned arrived, opened;
};
static struct barrier block_barrier, warp_barriers[EMULATED_MOST_THREADS / 32];

static inline void wait_at(struct barrier *barrier, unsigned threads) {
    unsigned opened = barrier->opened;
    if (++barrier->arrived == threads) {
        barrier->arrived = 0;
        barrier->opened++;
    }
    while (barrier->opened == opened) pass_turn();
}

struct MR_ALIGNED mr_words {
    unsigned w[4];
};

static inline void __syncthreads(void) { wait_at(&block_barrier, blockDim.x); }

/* What lane `from` of this warp brings. */
static inline unsigned long long exchange(unsigned long long bits, unsigned from) {
    struct barrier *barrier = &warp_barriers[threadIdx.x / 32];
    lanes[threadIdx.x] = bits;
    wait_at(barrier, 32);
    unsigned long long other = lanes[threadIdx.x / 32 * 32 + from];
    wait_at(barrier, 32);
    return other;
}

#define SHUFFLE(NAME, TYPE)                                   \
    static inline TYPE NAME(TYPE value, unsigned from) {      \
        unsigned long long bits = 0;                          \
        memcpy(&bits, &value, sizeof value);                  \
        bits = exchange(bits, from);                          \
        memcpy(&value, &bits, sizeof value);                  \
        return value;                                         \
    }
SHUFFLE(shuffle_float, float)
SHUFFLE(shuffle_double, double)
SHUFFLE(shuffle_unsigned, unsigned)
SHUFFLE(shuffle_u64, unsigned long long)
#define __shfl_sync(mask, value, from) \
    _Generic((value), float: shuffle_float, double: shuffle_double, unsigned: shuffle_unsigned, default: shuffle_u64)(value, from)
#define __shfl_xor_sync(mask, value, offset) __shfl_sync(mask, value, threadIdx.x % 32 ^ (unsigned)(offset))

static inline void mr_let_next_begin(void) {}
static inline void mr_wait_for_previous(void) {}

static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline struct mr_words mr_load_once(const void *at) { return *(const struct mr_words *)at; }

static inline float mr_f16_to_float(unsigned short bits) {
    _Float16 value;
    memcpy(&value, &bits, sizeof value);
    return (float)value;
}

static inline unsigned short mr_float_to_f16(float value) {
    _Float16 half = (_Float16)value;
    unsigned short bits;
    memcpy(&bits, &half, sizeof bits);
    return bits;
}

#endif
