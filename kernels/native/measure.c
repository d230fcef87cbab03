/* What the processor can do at most: the inner loops of dot.h and linear.c over registers, without a single load.

   The benchmark measures kernels against these, on the same machine in the same minute. */
#include "dot.h"

/* Native registers, one step of the integer loop, and how many independent sums fill the registers and hide the latency. */
#if defined(__AVX512VNNI__)
typedef __m512i int_sums;
typedef __m512i int_data;
typedef float floats __attribute__((ext_vector_type(16)));
#define INT_STEP(sum, a, b) ((sum) = _mm512_dpbusd_epi32(sum, a, b))
#define INT_MULTIPLIES 64
#define CHAINS 24
#elif defined(__ARM_FEATURE_DOTPROD)
typedef int32x4_t int_sums;
typedef int8x16_t int_data;
typedef float floats __attribute__((ext_vector_type(4)));
#define INT_STEP(sum, a, b) ((sum) = vdotq_s32(sum, a, b))
#define INT_MULTIPLIES 16
#define CHAINS 24
#else
typedef mr_sums int_sums;
typedef mr_words int_data;
typedef float floats __attribute__((ext_vector_type(sizeof(mr_sums) / 4)));
#define INT_STEP(sum, a, b) ((sum) += mr_pair_dot(a, b))
#define INT_MULTIPLIES (sizeof(mr_words) / 2)
#define CHAINS 12
#endif

#if defined(__FMA__) || defined(__aarch64__)
#define FLOAT_STEP(sum, a, b) ((sum) = __builtin_elementwise_fma(a, b, sum))
#else
#define FLOAT_STEP(sum, a, b) ((sum) += (a) * (b)) /* what the registers could do; the exact emulation is slower */
#endif

/* The value stays in a register, and the compiler must believe that it changed. */
#if defined(__AVX512F__)
#define OPAQUE(value) __asm__ volatile("" : "+v"(value)) /* any of the 32 registers */
#elif defined(__x86_64__)
#define OPAQUE(value) __asm__ volatile("" : "+x"(value))
#else
#define OPAQUE(value) __asm__ volatile("" : "+w"(value))
#endif

uint64_t MR_NAME(mr_peak_int8)(uint64_t rounds) {
    int_sums sums[CHAINS] = {0};
    int_data a = {0}, b = {0};
    for (uint64_t i = 0; i < rounds; ++i) {
        OPAQUE(a);
        OPAQUE(b);
        MR_UNROLL for (size_t c = 0; c < CHAINS; ++c) INT_STEP(sums[c], a, b);
    }
    MR_UNROLL for (size_t c = 0; c < CHAINS; ++c) OPAQUE(sums[c]);
    return rounds * CHAINS * INT_MULTIPLIES;
}

uint64_t MR_NAME(mr_peak_f32)(uint64_t rounds) {
    floats sums[CHAINS] = {0};
    floats a = {0}, b = {0};
    for (uint64_t i = 0; i < rounds; ++i) {
        OPAQUE(a);
        OPAQUE(b);
        MR_UNROLL for (size_t c = 0; c < CHAINS; ++c) FLOAT_STEP(sums[c], a, b);
    }
    MR_UNROLL for (size_t c = 0; c < CHAINS; ++c) OPAQUE(sums[c]);
    return rounds * CHAINS * (sizeof(floats) / sizeof(float));
}
