/* What CUDA has built in, for one block at a time on the CPU: a thread of the system for each CUDA thread. Warps shuffle through an
   array between two barriers of their own; shared memory is static, because only one block runs. */
#ifndef EMULATOR_H
#define EMULATOR_H

#include <math.h>
#include <pthread.h>
#include <string.h>

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
static _Thread_local struct index threadIdx, blockIdx, blockDim;
static pthread_barrier_t block_barrier, warp_barriers[EMULATED_MOST_THREADS / 32];
static unsigned long long lanes[EMULATED_MOST_THREADS];

struct MR_ALIGNED mr_words {
    unsigned w[4];
};

static inline void __syncthreads(void) { pthread_barrier_wait(&block_barrier); }

/* What lane `from` of this warp brings. */
static inline unsigned long long exchange(unsigned long long bits, unsigned from) {
    pthread_barrier_t *barrier = &warp_barriers[threadIdx.x / 32];
    lanes[threadIdx.x] = bits;
    pthread_barrier_wait(barrier);
    unsigned long long other = lanes[threadIdx.x / 32 * 32 + from];
    pthread_barrier_wait(barrier);
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
