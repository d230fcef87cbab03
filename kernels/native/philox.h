/* Philox4x32-10, 16 counters at a time, and Gumbel noise from its words. Included by sample.c only.

   Apart because a random number is a fact about (seed, position, token) that other code reproduces: batcher/sampling.py has the
   same function. Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3. */
#ifndef MR_PHILOX_H
#define MR_PHILOX_H

#include "vec.h"

typedef uint64_t u64x8 __attribute__((ext_vector_type(8)));

struct philox_words {
    u32x16 word[4];
};

/* High and low halves of the products with a 32-bit multiplier: even and odd lanes apart, as 64-bit lanes. */
MR_INLINE void multiply(u32x16 x, uint32_t multiplier, u32x16 *high, u32x16 *low) {
    u64x8 even = ((u64x8)x & 0xffffffffu) * (uint64_t)multiplier;
    u64x8 odd = ((u64x8)x >> 32) * (uint64_t)multiplier;
    *high = (u32x16)((even >> 32) | (odd & 0xffffffff00000000u));
    *low = (u32x16)((even & 0xffffffffu) | (odd << 32));
}

/* Counter words (c0, low half of c12, high half of c12, 0), key words (low, high). */
MR_INLINE struct philox_words philox(u32x16 c0, uint64_t c12, uint64_t key) {
    u32x16 x0 = c0, x1 = (u32x16)((uint32_t)c12), x2 = (u32x16)((uint32_t)(c12 >> 32)), x3 = (u32x16)(0u);
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; ++round) {
        u32x16 high0, low0, high1, low1;
        multiply(x0, 0xd2511f53u, &high0, &low0);
        multiply(x2, 0xcd9e8d57u, &high1, &low1);
        x0 = high1 ^ x1 ^ k0;
        x2 = high0 ^ x3 ^ k1;
        x1 = low1;
        x3 = low0;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return (struct philox_words){{x0, x1, x2, x3}};
}

/* ln((1 + f) * 2^n) for 1 + f in [sqrt(1/2), sqrt(2)): the polynomial of Cephes logf (Moshier). */
MR_INLINE f32x16 log_of_parts(f32x16 f, f32x16 n) {
    f32x16 z = f * f;
    f32x16 p = mr_splat(7.0376836292e-2f);
    p = mr_fma(p, f, mr_splat(-1.1514610310e-1f));
    p = mr_fma(p, f, mr_splat(1.1676998740e-1f));
    p = mr_fma(p, f, mr_splat(-1.2420140846e-1f));
    p = mr_fma(p, f, mr_splat(1.4249322787e-1f));
    p = mr_fma(p, f, mr_splat(-1.6668057665e-1f));
    p = mr_fma(p, f, mr_splat(2.0000714765e-1f));
    p = mr_fma(p, f, mr_splat(-2.4999993993e-1f));
    p = mr_fma(p, f, mr_splat(3.3333331174e-1f));
    f32x16 y = mr_fma(n, mr_splat(-2.12194440e-4f), p * f * z);
    y = mr_fma(z, mr_splat(-0.5f), y);
    return mr_fma(n, mr_splat(0.693359375f), f + y);
}

/* x > 0, normal, as (1 + f) * 2^n. */
MR_INLINE void split_float(f32x16 x, f32x16 *f, f32x16 *n) {
    i32x16 shifted = mr_bits(x) - 0x3f3504f3; /* the bits of sqrt(1/2) */
    *n = __builtin_convertvector(shifted >> 23, f32x16);
    *f = mr_from_bits((shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
}

/* g = -log(-log(u)), u = (w + 0.5) / 2^32. Near 1 a float cannot hold u, but it holds 1 - u = (~w + 0.5) / 2^32, and the inner
   logarithm needs nothing else there. */
MR_INLINE f32x16 gumbel(u32x16 w) {
    f32x16 u = (__builtin_convertvector(w, f32x16) + 0.5f) * 0x1p-32f;
    f32x16 complement = (__builtin_convertvector(~w, f32x16) + 0.5f) * 0x1p-32f;
    i32x16 is_near_one = (i32x16)(w >= 0xb504f334u); /* sqrt(1/2) */
    f32x16 f, n;
    split_float(u, &f, &n);
    f = mr_select(is_near_one, -complement, f);
    n = mr_select(is_near_one, mr_splat(0.0f), n);
    split_float(-log_of_parts(f, n), &f, &n);
    return -log_of_parts(f, n);
}

/* No u gives more: -log(-log(1 - 2^-33)) is 22.87. */
#define LARGEST_GUMBEL 23.0f

#endif
