/* The integer microkernel: sums over K of u8 activations times s8 weights, for a few rows and one block of 64 columns.

   The only place with processor intrinsics. Integer sums are exact, so every form may order them as it likes. AVX-512-VNNI and
   NEON with dot products multiply bytes directly (vpdpbusd, sdot). The others widen to words and use multiply-add of word
   pairs, which cannot overflow (the byte form of AVX2, vpmaddubsw, saturates): in every 32-bit lane of four weight bytes
   w0..w3, w0 and w2 are the sign-extended even bytes and w1 and w3 the odd ones, so activations are kept as words in the
   order 0, 2, 1, 3. */
#ifndef MR_DOT_H
#define MR_DOT_H

#include "ahead.h"
#include "linear.h"
#include "vec.h"

#if defined(__AVX512VNNI__)
#include <immintrin.h>

typedef uint8_t mr_quantized;
#define MR_DOT_OFFSET 128 /* activations are stored as q + 128; its part of the sums is taken out at the end */
#define MR_DOT_ROWS 6 /* 24 accumulators, 4 weights, 1 activation: 29 of 32 registers */
#define MR_DOT_VECTORS(rows) 4

/* The low byte of every lane holds q: store q + 128. */
MR_INLINE void mr_store_quantized(mr_quantized *to, i32x16 q) {
    u8x16 bytes = __builtin_convertvector((u32x16)q, u8x16) ^ (u8x16)(0x80);
    __builtin_memcpy(to, &bytes, sizeof bytes);
}

MR_INLINE void mr_dot(const mr_quantized *a, size_t stride, const int8_t *w, size_t K4, size_t rows, size_t vectors,
                      struct mr_ahead ahead, i32x16 (*sums)[4]) {
    __m512i acc[MR_DOT_ROWS][4];
    MR_UNROLL for (size_t r = 0; r < rows; ++r) MR_UNROLL for (size_t j = 0; j < vectors; ++j) acc[r][j] = _mm512_setzero_si512();
    for (size_t k = 0; k < K4; ++k, w += 4 * MR_BLOCK, a += 4) {
        mr_fetch_ahead(&ahead);
        __m512i weight[4];
        MR_UNROLL for (size_t j = 0; j < vectors; ++j) weight[j] = _mm512_loadu_si512(w + 64 * j);
        MR_UNROLL for (size_t r = 0; r < rows; ++r) {
            int32_t four;
            __builtin_memcpy(&four, a + r * stride, sizeof four);
            __m512i activation = _mm512_set1_epi32(four);
            MR_UNROLL for (size_t j = 0; j < vectors; ++j) acc[r][j] = _mm512_dpbusd_epi32(acc[r][j], activation, weight[j]);
        }
    }
    MR_UNROLL for (size_t r = 0; r < rows; ++r) MR_UNROLL for (size_t j = 0; j < vectors; ++j) sums[r][j] = (i32x16)acc[r][j];
}

#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

typedef int8_t mr_quantized; /* both sides are signed here: q itself, and no offset to take out */
#define MR_DOT_OFFSET 0
#define MR_DOT_ROWS 6 /* 24 accumulators of 4 columns, 4 weights, 1 activation: 29 of 32 registers */
#define MR_DOT_VECTORS(rows) ((rows) == 1 ? 4 : (rows) == 2 ? 2 : 1)

MR_INLINE void mr_store_quantized(mr_quantized *to, i32x16 q) {
    i8x16 bytes = __builtin_convertvector(q, i8x16);
    __builtin_memcpy(to, &bytes, sizeof bytes);
}

MR_INLINE void mr_dot(const mr_quantized *a, size_t stride, const int8_t *w, size_t K4, size_t rows, size_t vectors,
                      struct mr_ahead ahead, i32x16 (*sums)[4]) {
    int32x4_t acc[MR_DOT_ROWS][16];
    MR_UNROLL for (size_t r = 0; r < rows; ++r) MR_UNROLL for (size_t j = 0; j < 4 * vectors; ++j) acc[r][j] = vdupq_n_s32(0);
    for (size_t k = 0; k < K4; ++k, w += 4 * MR_BLOCK, a += 4) {
        mr_fetch_ahead(&ahead);
        int8x16_t weight[16];
        MR_UNROLL for (size_t j = 0; j < 4 * vectors; ++j) weight[j] = vld1q_s8(w + 16 * j);
        MR_UNROLL for (size_t r = 0; r < rows; ++r) {
            int32_t four;
            __builtin_memcpy(&four, a + r * stride, sizeof four);
            int8x16_t activation = vreinterpretq_s8_s32(vdupq_n_s32(four));
            MR_UNROLL for (size_t j = 0; j < 4 * vectors; ++j) acc[r][j] = vdotq_s32(acc[r][j], weight[j], activation);
        }
    }
    MR_UNROLL for (size_t r = 0; r < rows; ++r) __builtin_memcpy(sums[r], acc[r], vectors * sizeof(i32x16));
}

#else
typedef int16_t mr_quantized;
#define MR_DOT_OFFSET 128

/* Widest word vector of the form, and the sums of its pairs. */
#if defined(__AVX2__)
#include <immintrin.h>
typedef int16_t mr_words __attribute__((ext_vector_type(16)));
typedef int32_t mr_sums __attribute__((ext_vector_type(8)));
MR_INLINE mr_sums mr_pair_dot(mr_words a, mr_words b) { return (mr_sums)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#elif defined(__SSE2__)
#include <emmintrin.h>
typedef int16_t mr_words __attribute__((ext_vector_type(8)));
typedef int32_t mr_sums __attribute__((ext_vector_type(4)));
MR_INLINE mr_sums mr_pair_dot(mr_words a, mr_words b) { return (mr_sums)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#else
typedef int16_t mr_words __attribute__((ext_vector_type(8)));
typedef int32_t mr_sums __attribute__((ext_vector_type(4)));
MR_INLINE mr_sums mr_pair_dot(mr_words a, mr_words b) {
    return __builtin_convertvector(a.even, mr_sums) * __builtin_convertvector(b.even, mr_sums) +
           __builtin_convertvector(a.odd, mr_sums) * __builtin_convertvector(b.odd, mr_sums);
}
#endif

/* Rows at a time, and columns in vectors of 16: as many as the registers hold sums for. */
#if defined(__SSE2__) && !defined(__AVX2__)
#define MR_DOT_ROWS 2 /* 16 registers of 4 columns */
#define MR_DOT_VECTORS(rows) ((rows) == 1 ? 2 : 1)
#else
#define MR_DOT_ROWS 4 /* 16 registers of 8 columns, or (NEON) 32 of 4 */
#define MR_DOT_VECTORS(rows) ((rows) == 1 ? 4 : (rows) == 2 ? 2 : 1)
#endif
#define MR_PARTS (sizeof(i32x16) / sizeof(mr_sums)) /* registers that make 16 columns */

MR_INLINE void mr_store_quantized(mr_quantized *to, i32x16 q) {
    u16x16 words = __builtin_convertvector((u32x16)q, u16x16);
    words = (words ^ 0x80) & 0xff;
    words = __builtin_shufflevector(words, words, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    __builtin_memcpy(to, &words, sizeof words);
}

MR_INLINE mr_words mr_broadcast_pair(const mr_quantized *a) {
    int32_t pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return (mr_words)(mr_sums)(pair);
}

/* One register of weights: the even bytes and the odd bytes of its columns, as words. */
struct mr_weights {
    mr_words even, odd;
};

MR_INLINE struct mr_weights mr_load_weights(const int8_t *w) {
    mr_words bytes;
    __builtin_memcpy(&bytes, w, sizeof bytes);
    return (struct mr_weights){(bytes << 8) >> 8, bytes >> 8};
}

MR_INLINE mr_sums mr_add_dot(mr_sums sum, struct mr_weights w, mr_words even, mr_words odd) {
    return sum + mr_pair_dot(w.even, even) + mr_pair_dot(w.odd, odd);
}

MR_INLINE void mr_dot(const mr_quantized *a, size_t stride, const int8_t *w, size_t K4, size_t rows, size_t vectors,
                      struct mr_ahead ahead, i32x16 (*sums)[4]) {
    mr_sums acc[MR_DOT_ROWS][4 * MR_PARTS];
    size_t parts = vectors * MR_PARTS;
    MR_UNROLL for (size_t r = 0; r < rows; ++r) MR_UNROLL for (size_t j = 0; j < parts; ++j) acc[r][j] = (mr_sums)(0);
    for (size_t k = 0; k < K4; ++k, w += 4 * MR_BLOCK, a += 4) {
        mr_fetch_ahead(&ahead);
        struct mr_weights weights[4 * MR_PARTS];
        MR_UNROLL for (size_t j = 0; j < parts; ++j) weights[j] = mr_load_weights(w + sizeof(mr_words) * j);
        MR_UNROLL for (size_t r = 0; r < rows; ++r) {
            mr_words even = mr_broadcast_pair(a + r * stride), odd = mr_broadcast_pair(a + r * stride + 2);
            MR_UNROLL for (size_t j = 0; j < parts; ++j) acc[r][j] = mr_add_dot(acc[r][j], weights[j], even, odd);
        }
    }
    MR_UNROLL for (size_t r = 0; r < rows; ++r) __builtin_memcpy(sums[r], acc[r], vectors * sizeof(i32x16));
}
#endif

#endif
