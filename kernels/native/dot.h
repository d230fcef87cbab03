/* The integer microkernel: sums over K of u8 activations times s8 weights, for a few rows and one block of 64 columns.

   The only place with processor intrinsics. Integer sums are exact, so every form may order them as it likes.
   AVX-512-VNNI multiplies bytes directly (vpdpbusd). The others widen to words and use multiply-add of word pairs, which
   cannot overflow (the byte form of AVX2, vpmaddubsw, saturates): in every 32-bit lane of four weight bytes w0..w3, w0 and w2
   are the sign-extended even bytes and w1 and w3 the odd ones, so activations are kept as words in the order 0, 2, 1, 3. */
#ifndef MR_DOT_H
#define MR_DOT_H

#include "linear.h"
#include "vec.h"

#define MR_UNROLL _Pragma("clang loop unroll(full)")

/* The weights this thread multiplies next, fetched into its second-level cache by the way. Arithmetic on one block is long enough
   to hide the memory time of the next one; without this every block would begin by waiting for memory. */
struct mr_ahead {
    const char *at;
    size_t step;  /* bytes of the next block to pass with every four inputs of this one */
    size_t lines; /* cache lines to fetch in a step: 1, 2 or 4 */
};

/* Fetch a block during `tiles` passes over another one. */
MR_INLINE struct mr_ahead mr_ahead_of(const void *block, size_t tiles) {
    return (struct mr_ahead){block, 4 * MR_BLOCK / tiles, tiles == 1 ? 0 : tiles <= 3 ? 2 : 1};
}

MR_INLINE void mr_fetch_ahead(struct mr_ahead *ahead) {
    if (ahead->lines == 1) {
        __builtin_prefetch(ahead->at, 0, 3);
    } else if (ahead->lines == 2) {
        __builtin_prefetch(ahead->at, 0, 2);
        __builtin_prefetch(ahead->at + 64, 0, 2);
    }
    ahead->at += ahead->step;
}

#if defined(__AVX512VNNI__)
#include <immintrin.h>

typedef uint8_t mr_quantized;
#define MR_DOT_ROWS 6 /* 24 accumulators, 4 weights, 1 activation: 29 of 32 registers */
#define MR_DOT_VECTORS(rows) 4

/* The low byte of every lane holds q: store q + 128. */
MR_INLINE void mr_store_quantized(mr_quantized *to, i32x16 q) {
    u8x16 bytes = __builtin_convertvector((u32x16)q, u8x16) ^ (u8x16)(0x80);
    __builtin_memcpy(to, &bytes, sizeof bytes);
}

MR_INLINE void mr_dot(const mr_quantized *a, size_t stride, const int8_t *w, size_t K4, size_t rows, size_t vectors, struct mr_ahead ahead, i32x16 (*sums)[4]) {
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

#else
typedef int16_t mr_quantized;

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

#define MR_DOT_ROWS 4
/* Columns at a time, in vectors of 16: as many as the registers hold sums for. */
#define MR_DOT_VECTORS(rows) ((rows) == 1 ? 4 : (rows) == 2 ? 2 : 1)
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

MR_INLINE void mr_dot(const mr_quantized *a, size_t stride, const int8_t *w, size_t K4, size_t rows, size_t vectors, struct mr_ahead ahead, i32x16 (*sums)[4]) {
    mr_sums acc[MR_DOT_ROWS][4 * MR_PARTS];
    size_t parts = vectors * MR_PARTS;
    MR_UNROLL for (size_t r = 0; r < rows; ++r) MR_UNROLL for (size_t j = 0; j < parts; ++j) acc[r][j] = (mr_sums)(0);
    for (size_t k = 0; k < K4; ++k, w += 4 * MR_BLOCK, a += 4) {
        mr_fetch_ahead(&ahead);
        MR_UNROLL for (size_t j = 0; j < parts; ++j) {
            mr_words bytes;
            __builtin_memcpy(&bytes, w + sizeof bytes * j, sizeof bytes);
            mr_words even = (bytes << 8) >> 8, odd = bytes >> 8;
            MR_UNROLL for (size_t r = 0; r < rows; ++r) {
                acc[r][j] += mr_pair_dot(even, mr_broadcast_pair(a + r * stride));
                acc[r][j] += mr_pair_dot(odd, mr_broadcast_pair(a + r * stride + 2));
            }
        }
    }
    MR_UNROLL for (size_t r = 0; r < rows; ++r) __builtin_memcpy(sums[r], acc[r], vectors * sizeof(i32x16));
}
#endif

#endif
